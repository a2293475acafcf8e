"""Bring the hops to the kernel: devices, range addresses, neighbours, forwarding entries, routes, rules.

    Nodes ──Peers (pure)──▶ hops ──▶ what changed, at once             one node's change: its own entries only
                                └──▶ all of it against a dump          at start, every 30 s, and when others
                                                                       changed what routes depend on

What the kernel refuses is a sentence, and is tried again; what somebody else has set stays.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from ipaddress import ip_interface
from typing import TYPE_CHECKING

from cni.wiring import HOST_PREFIX
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import (
    ROUTE_PROTOCOL,
    Request,
    Route,
    Rule,
    address_add,
    address_delete,
    neighbour_replace,
    route_add,
    route_delete,
    route_replace,
    rule_add,
    rule_delete,
)
from netlink.rtnl import Rtnl
from node import underlay
from node.backends.hops import (
    NODE_TABLE,
    RULE_PRIORITY,
    Forwarding,
    Hop,
    Site,
    TunnelConfig,
    Turning,
    range_address,
    version_of,
)
from node.logs import fields
from node.peers import Moved, Peers
from node.settings import Settings
from node.tunnel_rules import Wanted
from node.tunnels import Tunnels
from node.vxlan_tunnels import VxlanTunnels
from node.wireguard_keys import Keys
from node.wireguard_tunnels import Seen, WireguardTunnels
from proxy.model import Node

if TYPE_CHECKING:
    from netlink.decode import Link

log = logging.getLogger("podwire.network")

LOOPBACK = 1
Place = tuple[str, int, bool]
"""Destination, routing table, and whether packets are refused."""
MOST_REFUSED = 20
"""Sentences about what the kernel refused; of more only the number is told."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What is configured. `mtu`: see Site. `bridged`: the bridge's own route is the one to our range.

    `turning`: likewise. `liberal`: connection tracking is to pass TCP packets that are outside the window.
    """

    backend: str = "auto"
    mtu: int | None = None
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    bridged: bool = False
    liberal: bool = False
    turning: Turning = field(default_factory=Turning)


@dataclass(frozen=True, slots=True)
class HostRoute:
    """The route to a pod of this node, and what goes with it."""

    device: str
    address: str
    mac: str


class Network:
    """The way to other nodes' pods; used by one thread, and in one network namespace."""

    def __init__(
        self, rtnl: Rtnl, me: str, settings: Settings | None = None, keys: Keys | None = None
    ) -> None:
        self._rtnl = rtnl
        self._vxlan, self._wireguard = VxlanTunnels(rtnl), WireguardTunnels(rtnl, keys)
        self._kinds: tuple[Tunnels, ...] = (self._vxlan, self._wireguard)
        self._settings = settings or Settings()
        self._unset: tuple[str, ...] = ()
        self._me = me
        self._config = NetworkConfig()
        self._peers = Peers(me)
        self._site = Site(Node(me))
        self._refused: dict[str, str] = {}
        self._pods: tuple[HostRoute, ...] = ()
        self.names: dict[int, str] = {}
        """The interfaces' names by their indexes, of the last time."""

    @property
    def hops(self) -> tuple[Hop, ...]:
        """How each podCIDR is reached; for any thread."""
        return tuple(self._peers.hops)

    @property
    def site(self) -> Site:
        """What this node knew of itself the last time."""
        return self._site

    @property
    def accepted(self) -> Mapping[str, tuple[str, ...]]:
        """The podCIDRs that count, by node."""
        return self._peers.accepted

    @property
    def changed(self) -> frozenset[str]:
        """The nodes that the last change was about."""
        return self._peers.changed

    @property
    def forwarding(self) -> set[Forwarding]:
        """The forwarding entries that the kernel is to have."""
        return self._vxlan.forwarding

    def wireguard(self) -> Seen:
        """Return what the WireGuard devices know of nodes now; for any thread. Raises NetlinkError."""
        return self._wireguard.seen()

    @property
    def tunnels(self) -> tuple[int, ...]:
        """The indexes of the tunnel devices that are there."""
        return tuple(self._site.tunnels.values())

    @property
    def uplink(self) -> str:
        """The name of the interface that leads out; "" where there is no default route."""
        out = underlay.way_out(self._site.underlay)
        return self.names.get(out.oif, "") if out else ""

    @property
    def devices(self) -> tuple[str, ...]:
        """The tunnel devices that are there."""
        return tuple(sorted(self._site.tunnels))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences."""
        refused = (*(r for kind in self._kinds for r in kind.refused.values()), *self._refused.values())
        more = len(refused) - MOST_REFUSED
        told = (f"and {more} more routes or neighbours that the kernel refused",) if more > 0 else ()
        return (*self._peers.problems, *refused[:MOST_REFUSED], *told, *self._unset)

    @property
    def incomplete(self) -> bool:
        """Whether something could not be had, and may be later."""
        return bool(self._refused or self._peers.unreached or any(kind.refused for kind in self._kinds))

    def tunnel_rules(self) -> dict[Family, Wanted]:
        """Return what the rules about tunnels are to be."""
        outer = {v: found for kind in self._kinds for v, found in kind.outer(self._site).items()}
        wanted: dict[Family, Wanted] = {}
        for family in Family:
            found, clamp = outer.get(family.value), self._peers.limited
            wanted[family] = Wanted(clamp=clamp)
            if found:
                peers = self._peers.tunnel_addresses(family.value)
                wanted[family] = Wanted(found.port, peers, clamp, found.wireguard)
        return wanted

    def change(self, nodes: Mapping[str, Node], changed: Set[str]) -> bool:
        """Bring what changed of other nodes to the kernel; False: everything has to be compared instead."""
        me = nodes.get(self._me, Node(self._me))
        if me != self._site.node:
            return False
        moved = self._peers.take(nodes, self._site, changed)
        if not self._peers.tunnels <= self._site.tunnels.keys():
            return False
        return self._apply(moved)

    def compare(
        self, nodes: Mapping[str, Node], config: NetworkConfig, pods: Iterable[HostRoute] = ()
    ) -> None:
        """Make the kernel hold exactly what the nodes and the configuration say."""
        self._config, self._pods, self._refused = config, tuple(pods), {}
        links = self._rtnl.links()
        routes = self._rtnl.routes()
        self.names = {link.index: link.name for link in links}
        indexes = {name: index for index, name in self.names.items()}
        me = nodes.get(self._me, Node(self._me))
        site = Site(
            node=me,
            underlay=underlay.ways(links, routes),
            backend=config.backend,
            mtu=config.mtu,
            ranges=_ranges(me),
            tunnels={n: indexes[n] for kind in self._kinds for n in kind.names if n in indexes},
            config=config.tunnel,
            turning=config.turning,
        )
        self._peers.take(nodes, site)
        tunnels: dict[str, int] = {}
        for kind in self._kinds:
            tunnels |= kind.make(site, self._peers.tunnels)
        moved = tunnels != site.tunnels
        if moved:
            self.names |= {index: name for name, index in tunnels.items()}
            site = replace(site, tunnels=tunnels)
            self._peers.take(nodes, site)
        self._site = site
        self._unset = tuple(
            self._settings.assert_all(
                self.devices,
                len({hop.node for hop in self._peers.hops if hop.backend == "direct"}),
                liberal=config.liberal,
                ipv6=6 in site.ranges,
            )
        )
        if self._range_addresses() or moved:
            routes = self._rtnl.routes()  # some are gone with their device or source
        hops = tuple(hop for hop in self._peers.hops if not hop.tunnel or hop.tunnel in tunnels)
        entries = itertools.chain.from_iterable(kind.compare(site, hops) for kind in self._kinds)
        changed = self._do(*entries) + self._routes(self._peers.hops, routes)
        changed += self._host_routes(links, routes)
        self._rules()
        if changed:
            log.info("network compared", extra=fields(changed=changed, podCIDRs=len(hops)))

    def _range_addresses(self) -> bool:
        """Give the node its range addresses: on tunnel devices, else on loopback. Return whether some went.

        On loopback they are never chosen as a source, unless the node has no other address of the family:
        its own packets to pods need one then.
        """
        tunnels = set(self._site.tunnels.values())
        families = {version_of(address) for address in self._site.node.addresses}
        wanted = {
            (index, _host(address), not tunnels and version in families)
            for index in tunnels or {LOOPBACK}
            for version, address in self._site.ranges.items()
        }
        ours = {*tunnels, LOOPBACK}
        there = {(a.index, a.cidr, a.passive) for a in self._rtnl.addresses() if a.index in ours}
        hosts = {_host(address) for address in self._site.ranges.values()}
        # On loopback only what is ours can be told: other addresses there are other people's.
        gone = [
            (index, host)
            for index, host, _ in sorted(there - wanted)
            if host in hosts or (index in tunnels and not _link_local(host))
        ]
        self._do(*(address_delete(*place) for place in gone))
        self._do(*(address_add(i, host, passive=passive) for i, host, passive in sorted(wanted - there)))
        return bool(gone)

    def _routes(self, hops: Iterable[Hop], main: Iterable[Route]) -> int:
        """Make our routes exactly those of the hops.

        Pods' own routes, which lead to an interface other than a tunnel and not to a gateway, are none of it.
        Nor is somebody else's route to one of the destinations: replacing it would take it from them.
        """
        present = (*main, *self._rtnl.routes(table=NODE_TABLE))
        tunnels = set(self._site.tunnels.values())
        ours: dict[Place, list[Route]] = {}
        foreign: dict[tuple[str, int], Route] = {}
        for route in present:
            if route.protocol != ROUTE_PROTOCOL:
                foreign[route.destination, route.table] = route
            elif route.gateway or route.unreachable or route.oif in tunnels:
                ours.setdefault(_place(route), []).append(route)
        wanted: dict[Place, Route] = {}
        for hop in sorted(hops, key=lambda hop: hop.node):
            other, route = foreign.get(_place(hop.route)[:2]), hop.route
            if other and other.priority <= route.priority and not route.unreachable:
                self._refuse(route, f"one of route protocol {other.protocol} is there, which stays")
                if _place(route) in ours:
                    wanted[_place(route)] = route
                continue
            for route in self._wanted(hop):  # of two nodes with one address the first by name counts
                wanted.setdefault(_place(route), route)
        requests = []
        for place, route in wanted.items():
            there = ours.pop(place, [])
            if there == [route]:
                continue
            requests.append(route_replace(route))
            requests += [route_delete(r) for r in there if r.priority != route.priority]
        requests += [route_delete(r) for rest in ours.values() for r in rest]
        return self._do(*requests)

    def _wanted(self, hop: Hop) -> Iterable[Route]:
        """Return the routes of a hop; without its tunnel those that refuse what was to go by it.

        On a bridge, its own route to our range would come second to ours.
        """
        if self._config.bridged and hop.backend == "local":
            return ()
        return (*hop.routes, *hop.guards) if hop.tunnel in ("", *self._site.tunnels) else hop.guards

    def _host_routes(self, links: Iterable[Link], main: Iterable[Route]) -> int:
        """Set the routes to pods of this node again that somebody has taken away."""
        index = {link.name: link.index for link in links if link.name.startswith(HOST_PREFIX)}
        there = {(r.destination, r.oif) for r in main}
        requests: list[Request] = []
        for pod in self._pods:
            oif = index.get(pod.device)
            host = _host(pod.address)
            if oif is not None and (host, oif) not in there:
                log.warning("the route to pod address %s was gone: setting it again", pod.address)
                requests += [
                    route_replace(Route(host, oif=oif)),
                    neighbour_replace(oif, pod.address, pod.mac),
                ]
        return self._do(*requests)

    def _rules(self) -> None:
        """Send packets of our pods to far nodes' addresses by the table that has these."""
        tunnelled = bool(self._site.tunnels)
        wanted = {
            Rule(cidr, NODE_TABLE, RULE_PRIORITY)
            for cidr in self._peers.accepted.get(self._me, ())
            if tunnelled
        }
        there = set(self._rtnl.rules())
        self._do(*map(rule_add, wanted - there), *map(rule_delete, there - wanted))

    def _apply(self, moved: Moved) -> bool:
        """Bring one step's changes to the kernel; False when it has something else than was left there."""
        routes = {_place(r): r for hop in moved.new for r in self._wanted(hop)}
        before = {_place(r) for hop in moved.gone for r in self._wanted(hop)}
        gone = {_place(r): r for hop in moved.gone for r in self._wanted(hop) if _place(r) not in routes}
        if any(table == NODE_TABLE and self._peers.shares(to) for to, table, _ in gone):
            return False  # another node has that address: its route is to be set instead
        try:
            entries = [kind.change(moved, self._peers) for kind in self._kinds]
        except NetlinkError as error:
            log.debug("comparing everything: %s", error)
            return False
        if None in entries:
            return False
        requests = [
            *(request for one in entries if one for request in one.before),
            *((route_replace if place in before else route_add)(r) for place, r in routes.items()),
            *map(route_delete, gone.values()),
            *(request for one in entries if one for request in one.after),
        ]
        refused = self._rtnl.attempt(*requests)
        if requests:
            log.info("routes changed", extra=fields(changed=len(requests)))
        return not refused

    def _do(self, *requests: Request) -> int:
        """Apply requests; note what the kernel refuses, and return how many it did not."""
        refused = self._rtnl.attempt(*requests)
        for request, failure in refused.items():
            if not failure.gone:
                self._refused[request.what] = (
                    f"the kernel refuses to {request.what}: {os.strerror(failure.errno or 0)}"
                )
        return len(requests) - len(refused)

    def _refuse(self, route: Route, why: str) -> None:
        self._refused[route.destination] = f"no route to {route.destination} via {route.gateway}: {why}"


def _ranges(me: Node) -> dict[int, str]:
    """Return our range addresses by IP version; a range of one or two addresses has none to spare."""
    found: dict[int, str] = {}
    for cidr in me.pod_cidrs:
        spare = (128 if version_of(cidr) == 6 else 32) - int(cidr.partition("/")[2])
        if spare > 1:
            found.setdefault(version_of(cidr), range_address(cidr))
    return found


def _place(route: Route) -> Place:
    """Return what there is one route for; and one that refuses packets beside one that leads somewhere."""
    return route.destination, route.table, route.unreachable


def _host(address: str) -> str:
    return f"{address}/{128 if version_of(address) == 6 else 32}"


def _link_local(host: str) -> bool:
    return ip_interface(host).is_link_local
