"""Bring snapshots to the kernel: service proxy, node rules and routes, as much as a change needs."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Self

from msgspec import structs
from netaddr import IPNetwork, iprange_to_cidrs

from cni import flat
from cni.attachments import link_of, wired
from cni.settings import Mode, NodeSettings
from cni.wiring import HOST_PREFIX, ensure_bridge
from ipam.ledger import Ledger, State
from ipam.pools import IpamConfig
from ipam.ranges import address_of
from netlink.family import Family
from netlink.rtnl import Rtnl
from netlink.watch import Watch
from node import dataplanes, masquerade, underlay
from node.backends import OVERHEADS
from node.backends.hops import Hop, TunnelConfig, version_of
from node.bridge import leftover_bridge
from node.changes import told
from node.healthchecks import HealthCheck
from node.kube import own_node
from node.leads import L7Proxy, NoProxy
from node.logs import fields
from node.network import HostRoute, Network, NetworkConfig
from node.services import ServiceProxy
from node.settings import Settings
from node.store import Pending
from node.tunnel_rules import TunnelRules
from node.wireguard import Wireguard
from node.wireguard_tunnels import Seen
from proxy.dataplane import NodeRanges
from proxy.frontends import Frontend
from proxy.ipvs.places import DEVICE as SERVICE_DEVICE
from proxy.l7.places import PORT
from proxy.model import EMPTY, Node, Snapshot
from proxy.topology import Place

log = logging.getLogger("podwire.sync")

IPV6_MTU = 1280
FORMER = "former_cidrs"
"""Among the ledger's settings: podCIDRs of before, of which pods have addresses yet."""

DATAPLANE = "dataplane"
"""Among the ledger's settings: what services were made of last; none: nftables."""

RETRY_SECONDS, COMPARE_SECONDS = 5.0, 30.0
"""How often the kernel is compared with what it should hold: while something of it could not be had, and
otherwise. Others flush rulesets, links go down and come up, default routes appear late."""

EVENT_SECONDS, EVENT_SHARE = 1.0, 10
"""At least so long apart are comparisons that others' changes of the network call for, and so many times as
long as the last one took: where containers of other programs come and go, links change all the time."""

REST_SECONDS = 2.0
SUSPECT_SECONDS = 60.0
"""At least so long apart are comparisons of every element, which a change by somebody else calls for:
10,000 services with 10 endpoints each take half a second."""


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """What the syncer is told once.

    `backend`, `network_mtu` and `tunnel` say how other nodes' pods are reached; `egress` are the addresses
    that pods get towards the outside. `uplink` is the interface of flat mode; "" is the one that leads out.
    `node_port_addresses`: CIDRs of the node's addresses that have node ports; none: the addresses in its
    Node object. `l7_port`: where the L7 proxy listens. `key_dir` has WireGuard's keys, which are changed
    every `rotate_days`, 0: when somebody asks for it.
    """

    node: str
    mode: Mode
    mtu: int | None = None
    no_masquerade: tuple[str, ...] = ()
    masquerade: frozenset[Family] = frozenset(Family)
    ipam: IpamConfig = field(default_factory=IpamConfig)
    uplink: str = ""
    node_port_addresses: tuple[str, ...] = ()
    backend: str = "auto"
    network_mtu: int | None = None
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    egress: tuple[str, ...] = ()
    tcp_be_liberal: bool = False
    dataplane: str = dataplanes.NFTABLES
    ipvs_scheduler: str = "rr"
    l7_port: int = PORT
    key_dir: Path = Path("/var/lib/podwire/wireguard")
    rotate_days: int = 0


@dataclass(slots=True)
class Status:
    """What the daemon shows of its last sync. `last_sync` is seconds since the epoch; 0 = never.

    `ready` says that pods can be given addresses. `pod_mtu` is what new pods get (bytes).
    """

    last_sync: float = 0.0
    ready: bool = False
    pod_cidrs: tuple[str, ...] = ()
    pod_mtu: int = 0
    services: int = 0
    problems: tuple[str, ...] = ()
    node_deleting: bool = False


class Syncer:
    """One snapshot after the other; used by one thread, the one that entered it."""

    def __init__(
        self,
        config: SyncConfig,
        ledger: Ledger,
        clock: Callable[[], float] = time.monotonic,
        settings: Settings | None = None,
        l7: L7Proxy | None = None,
    ) -> None:
        self._config = config
        self._l7 = l7 or NoProxy()
        self._settings = settings or Settings()
        self._ledger = ledger
        self._clock = clock
        self._stack = ExitStack()
        self._kind = dataplanes.kind_of(config.dataplane)
        self._proxy = ServiceProxy(
            self._own_addresses, self._kind, self._l7, config.l7_port, config.ipvs_scheduler
        )
        self._before: str | None = None  # the dataplane that the node had last, once that is known
        self._cluster = masquerade.Cluster()
        self._snapshot = EMPTY
        self._loaded = False
        self._node_problems: tuple[str, ...] = ()
        self._settled: tuple[str, ...] = ()
        self._egress_problems: tuple[str, ...] = ()
        self._nodes: Mapping[str, Node] = {}
        self._disturbed, self._effort = False, 0.0
        self._suspected, self._compared = False, 0.0
        self._synced: float | None = None  # the last time that everything but elements was looked at
        self._busy = 0.0
        self.served_addresses: tuple[str, ...] = ()
        self.status = Status()
        self.wireguard = Wireguard(config.key_dir, config.node)
        self._use_wireguard()

    def __enter__(self) -> Self:
        self._rtnl = self._stack.enter_context(Rtnl())
        self._watch = self._stack.enter_context(Watch(HOST_PREFIX, SERVICE_DEVICE))
        self._tunnel_rules = self._stack.enter_context(TunnelRules())
        self._network = Network(self._rtnl, self._config.node, self._settings, self.wireguard.keys)
        self._stack.enter_context(self._proxy)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def elements(self) -> int:
        """Map elements in the kernel."""
        return self._proxy.elements

    @property
    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, as they are in the kernel; for any thread."""
        return tuple(self._proxy.table)

    @property
    def config(self) -> SyncConfig:
        """What it goes by; for any thread."""
        return self._config

    @property
    def interfaces(self) -> Mapping[int, str]:
        """The names of the node's interfaces by their indexes; for any thread."""
        return self._network.names

    @property
    def hops(self) -> tuple[Hop, ...]:
        """How the pods of each node are reached; for any thread."""
        return self._network.hops

    @property
    def snapshot(self) -> Snapshot:
        """What was brought to the kernel last, or is being brought there; for any thread."""
        return self._snapshot

    @property
    def place(self) -> Place:
        """Where this proxy runs; for any thread."""
        me = self._snapshot.nodes.get(self._config.node, Node(self._config.node))
        return Place(me.name, me.zone)

    @property
    def health_checks(self) -> dict[int, HealthCheck]:
        """What load balancers are to be told, by healthCheckNodePort."""
        return self._proxy.health_checks

    def sync(self, pending: Pending) -> bool:
        """Bring one change to the kernel; return whether everything was compared for it.

        Raises NetlinkError when the kernel refuses; the next sync then compares everything again.
        """
        snapshot, started = pending.snapshot, self._clock()
        if self._loaded:
            endpoints = log.isEnabledFor(logging.DEBUG)
            for line in told(self._snapshot, snapshot, pending.services, pending.nodes, endpoints=endpoints):
                level = logging.INFO if line.important else logging.DEBUG
                log.log(level, line.text, extra=fields(**line.fields))
        self._snapshot = snapshot
        changes = self._proxy.take(snapshot, pending.services, self.place)
        # Until all of it is done, the kernel may lack what was decided.
        loaded, self._loaded = self._loaded, False
        everything = not loaded or pending.compare
        if everything or pending.nodes:
            everything = self._sync_node(snapshot, None if everything else pending.nodes)
        if everything and (not loaded or not self._proxy.intact()):
            self._proxy.compare()
        ranges = self._ranges(everything) if everything or pending.nodes else None
        full = self._proxy.apply(changes, self._families(), ranges)
        if full:
            self._suspected, self._compared = False, self._clock()
            self._replace_dataplane()
        self._l7.take(self._proxy.backends, self._families())
        self._loaded = True
        self._busy = self._clock()
        if everything:
            self._synced, self._effort = self._busy, self._busy - started
        self._report(snapshot)
        return full

    @property
    def dataplane(self) -> str:
        """What services are made of: nftables, or iptables of a variant; for any thread."""
        return self._kind

    def _replace_dataplane(self) -> None:
        """Take away what the node had before; for a moment both are there, and lead to the same endpoints."""
        if self._before is None:
            self._before = self._ledger.settings().get(DATAPLANE, dataplanes.NFTABLES)
        if self._before == self._kind:
            return
        dataplanes.remove(self._before)
        log.info("services are made of %s now, and %s is gone", self._kind, self._before)
        self._ledger.save_settings(self._ledger.settings() | {DATAPLANE: self._kind})
        self._before = self._kind

    @property
    def commits(self) -> int:
        """Batches of rules that were committed."""
        return self._proxy.commits + self._tunnel_rules.commits

    def intact(self) -> bool:
        """Whether the tables of the service proxy and of tunnels have all of their rules."""
        return self._tunnel_rules.intact() and self._proxy.intact()

    def again(self) -> Pending | None:
        """Return a change that compares the kernel with what it should hold, when it is time for that."""
        if self._suspected and self._clock() - self._compared >= SUSPECT_SECONDS:
            self._proxy.compare()
            return self.compare()
        if self._synced is None:
            return None
        if self.wireguard.tick(self._snapshot.nodes, self._config.rotate_days, self._network.wireguard):
            return self.compare()
        own, network = (self._rtnl.port,), self._network
        if self._watch.drain(own, network.tunnels, network.forwarding).network:
            self._disturbed = True
        wait = RETRY_SECONDS if self._network.incomplete else COMPARE_SECONDS
        soon = min(wait, max(EVENT_SECONDS, EVENT_SHARE * self._effort))
        if self._clock() - self._synced < (soon if self._disturbed else wait):
            return None
        return self.compare()

    def rest(self) -> None:
        """Do what can wait until changes pause; call it when there is nothing else to do."""
        if self._clock() - self._busy > REST_SECONDS:
            self._proxy.tidy()

    def suspect(self) -> None:
        """Somebody else changed some ruleset: have every element compared, though not at once each time."""
        self._suspected = True

    def reconfigure(self, config: SyncConfig) -> Pending:
        """Go by other ranges from now on, and return the change that brings them to the kernel."""
        self._config = config
        self._use_wireguard()
        return self.compare()

    def _use_wireguard(self) -> None:
        self.wireguard.used = self._config.backend == "wireguard"

    def wireguard_peers(self) -> Seen:
        """Return what the WireGuard devices know of nodes now; for any thread. Raises NetlinkError."""
        return self._network.wireguard()

    def compare(self) -> Pending:
        """Return a change that compares the kernel with what it should hold."""
        return Pending(self._snapshot, frozenset(), frozenset(), time.monotonic(), compare=True)

    def _ranges(self, everything: bool) -> NodeRanges:
        """Return whose address is replaced on the way out, and where node ports are."""
        config = self._config
        self._cluster.take(self._nodes, self._network.accepted, None if everything else self._network.changed)
        policy = masquerade.Policy(
            config.no_masquerade,
            config.masquerade,
            config.node_port_addresses,
            config.egress,
            pool_cidrs(config.ipam),
            config.mode is Mode.FLAT,
        )
        found = self._cluster.ranges(self._nodes.get(config.node, Node(config.node)), policy)
        if everything:
            own = self._own_addresses()
            self.served_addresses = _within(own, found.node_ports)
            self._egress_problems = masquerade.egress_problems(found.egress, own)
        return found

    def _families(self) -> set[Family]:
        """Return the IP families that this node serves: IPv4, and what its pods' ranges have."""
        ranges = (*self.status.pod_cidrs, *pool_cidrs(self._config.ipam))
        return {Family.V4} | {Family(ip_network(c).version) for c in ranges}

    def _own_addresses(self) -> list[str]:
        """Return the node's addresses; those that IPVS has for services are none."""
        try:
            services = socket.if_nametoindex(SERVICE_DEVICE)
        except OSError:
            services = 0
        return [a.cidr.split("/")[0] for a in self._rtnl.addresses() if a.index != services]

    def _sync_node(self, snapshot: Snapshot, changed: Set[str] | None) -> bool:
        """Set what depends on nodes: the network, and the settings that the CNI plugin works by.

        `changed` are the nodes that did; None: compare everything. Return whether that was done, be it only
        because the change calls for it.
        """
        me = self._config.node
        self._nodes, missing = self._with_own_range(snapshot.nodes)
        everything = changed is None or not self._network.change(self._nodes, changed)
        if everything:
            self._disturbed = False
            self._network.compare(self._nodes, self._network_config(), self._host_routes())
            self._settled = self._settle()
            self._tunnel_rules.intact(peers=True)  # what is not is set right
        self._tunnel_rules.apply(self._network.tunnel_rules())
        node = self._nodes.get(me)
        self._node_problems = (*missing, *self._network.problems, *self._settled)
        self.status.pod_cidrs = node.pod_cidrs if node else ()
        self.status.node_deleting = bool(node and node.deleting)
        return everything

    def _network_config(self) -> NetworkConfig:
        config = self._config
        bridged = config.mode is Mode.BRIDGE
        return NetworkConfig(
            config.backend,
            config.network_mtu,
            config.tunnel,
            bridged,
            config.tcp_be_liberal,
            self.wireguard.turning,
        )

    def _host_routes(self) -> Iterator[HostRoute]:
        """Yield the routes to this node's pods, as their attachments say."""
        settings = NodeSettings.from_mapping(self._ledger.settings())
        for attachment in self._ledger.attachments(State.ATTACHED) if settings else ():
            assert settings
            if wired(attachment).mode is not Mode.BRIDGE:
                link = link_of(attachment, settings)
                for address in link.addresses:
                    yield HostRoute(link.host_ifname, address.ip, link.pod_mac)

    def _pod_mtu(self, cidrs: Iterable[IPNetwork]) -> int:
        """Return the MTU of new pods: what fits on the way out, less what a tunnel to every node takes."""
        config, site = self._config, self._network.site
        if config.mtu:
            return config.mtu
        mtu = underlay.egress_mtu(site.underlay)
        overhead = OVERHEADS.get(config.backend)
        if overhead is None:
            return mtu
        mtu = min(mtu, config.network_mtu or mtu)
        return mtu - overhead(site.node, [c.version for c in cidrs])

    def _settle(self) -> tuple[str, ...]:
        """Set what the CNI plugin works by; return what is wrong, in sentences."""
        config, node = self._config, self._nodes.get(self._config.node)
        cidrs = tuple(IPNetwork(c) for c in node.pod_cidrs) if node else ()
        self.status.ready = bool(cidrs) or config.mode is Mode.FLAT
        if not self.status.ready:
            return ()
        mtu = self._pod_mtu(cidrs)
        found = []
        families = {c.version for c in cidrs} | {version_of(c) for c in pool_cidrs(config.ipam)}
        if mtu < IPV6_MTU and 6 in families:
            found.append(f"MTU {mtu} is too small for IPv6: pods get {IPV6_MTU} (RFC 8200)")
            mtu = IPV6_MTU
        self.status.pod_mtu = mtu
        uplink = config.uplink or self._network.uplink if config.mode is Mode.FLAT else ""
        settings = NodeSettings(config.mode, mtu, cidrs, config.ipam, uplink)
        found += self._keep(settings)
        if config.mode is Mode.BRIDGE:
            return (*found, *ensure_bridge(cidrs))
        found += leftover_bridge(config.mode, self._rtnl, self._ledger.attachments())
        try:
            flat.sync(settings, self._ledger.attachments())
        except flat.NoUplink as error:
            found.append(str(error))
        return tuple(found)

    def _keep(self, settings: NodeSettings) -> list[str]:
        """Save what the CNI plugin works by; a sentence while pods have addresses of podCIDRs of before."""
        before = self._ledger.settings()
        last = NodeSettings.from_mapping(before)
        known = (*map(IPNetwork, before.get(FORMER, "").split()), *(last.pod_cidrs if last else ()))
        former = tuple(c for c in dict.fromkeys(known) if c not in settings.pod_cidrs)
        told = ""
        if former:
            pods = (a.addresses for a in self._ledger.attachments())
            told = own_node.moved(self._config.node, former, settings.pod_cidrs, pods)
        mapping = settings.to_mapping() | ({FORMER: " ".join(map(str, former))} if told else {})
        mapping |= {key: before[key] for key in (DATAPLANE,) if key in before}
        if mapping != before:
            self._ledger.save_settings(mapping)
        return [told] if told else []

    def _with_own_range(self, nodes: Mapping[str, Node]) -> tuple[Mapping[str, Node], list[str]]:
        """Return the nodes, ours with its last known podCIDRs if it has none now, and a sentence then.

        Pods that have addresses of them need their routes and masquerade whatever becomes of the Node object.
        """
        me = self._config.node
        node = nodes.get(me, Node(me))
        if node.pod_cidrs or self._config.mode is Mode.FLAT:
            return nodes, []
        last = NodeSettings.from_mapping(self._ledger.settings())
        if last is None or not last.pod_cidrs:
            return nodes, [f"node {me} has no podCIDR yet: pods cannot be added"]
        cidrs = tuple(map(str, last.pod_cidrs))
        kept = structs.replace(node, pod_cidrs=cidrs)
        return {**nodes, me: kept}, [
            f"node {me} has no podCIDR any more: its last, {', '.join(cidrs)}, counts"
        ]

    def _report(self, snapshot: Snapshot) -> None:
        self.status.last_sync = time.time()
        self.status.services = len(snapshot.services)
        off = self._l7.problems if isinstance(self._l7, NoProxy) else ()
        own = (*self._node_problems, *self.wireguard.problems, *self._egress_problems)
        problems = (*own, *self._proxy.problems, *off)
        for problem in problems:
            if problem not in self.status.problems:
                log.warning("%s", problem)
        self.status.problems = problems


def pool_cidrs(config: IpamConfig) -> tuple[str, ...]:
    """Return what the named pools have, as CIDRs."""
    spans = (
        iprange_to_cidrs(address_of(part.version, part.first), address_of(part.version, part.last))
        for pool in config.pools
        for part in pool.ranges
    )
    return tuple(str(cidr) for span in spans for cidr in span)


def _within(addresses: Iterable[str], cidrs: Iterable[str]) -> tuple[str, ...]:
    """Return those of the addresses that are in the ranges; "" stands for all that there are."""
    ranges = [ip_network(c) for c in cidrs]
    if any(r.prefixlen == 0 for r in ranges):
        return ("",)
    return tuple(a for a in addresses if any(ip_address(a) in r for r in ranges))
