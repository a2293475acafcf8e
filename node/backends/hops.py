"""What backends go by, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from netlink.requests import RT_TABLE_MAIN, Route
from proxy.model import Node

Network = IPv4Network | IPv6Network

NODE_TABLE = 112
"""The routing table for packets of our pods to far nodes' own addresses. They go through the tunnel too:
otherwise they would need NAT, or cross a network that does not know pods' addresses."""

RULE_PRIORITY = 112
"""Before the main table, whose rule has 32766."""

GUARD = 4095
"""The metric of a route that refuses packets which must not leave as they are: behind all that lead on."""

IPV6_MTU = 1280
"""The least that a link must carry for IPv6 (RFC 8200)."""


class Way(NamedTuple):
    """A route of the node's own network: packets to `network` leave by the interface `oif`.

    Without a gateway the network is a subnet of ours. `mtu` is what fits through (bytes): what the route
    says, else what the interface does (`link_mtu`).
    """

    network: Network
    oif: int
    gateway: str | None = None
    mtu: int = 1500
    link_mtu: int = 1500


@dataclass(frozen=True)
class Underlay:
    """The node's own network, as its routes say; routes to pods are none of it."""

    ways: tuple[Way, ...] = ()

    @cached_property
    def _table(self) -> tuple[tuple[int, int, int, Way], ...]:
        """(version, bits behind the prefix, prefix, way), the longest prefix first, as the kernel chooses."""
        rows = ((w.network, w.network.max_prefixlen - w.network.prefixlen, w) for w in self.ways)
        found = [(n.version, bits, int(n.network_address) >> bits, way) for n, bits, way in rows]
        return tuple(sorted(found, key=lambda row: row[1]))

    def way(self, address: str) -> Way | None:
        """Return the route to an address; None where there is none."""
        ip = ip_address(address)
        number = int(ip)
        for version, bits, prefix, way in self._table:
            if version == ip.version and number >> bits == prefix:
                return way
        return None


class Neighbour(NamedTuple):
    """An address of the other side of a tunnel, and its MAC."""

    device: int
    address: str
    mac: str


class Forwarding(NamedTuple):
    """Where a tunnel sends frames for a MAC: an address of the node's own network."""

    device: int
    mac: str
    address: str


class Peering(NamedTuple):
    """What WireGuard's devices know of a peer, as far as one podCIDR goes.

    `keys` are its public keys (base64), one for each device; `address` is where it takes encrypted packets;
    `allowed` are the ranges (CIDRs) that packets from it may come from.
    """

    keys: tuple[str, ...]
    address: str
    allowed: tuple[str, ...]


class Hop(NamedTuple):
    """How the pods of one podCIDR are reached.

    `backend` is local, direct, gateway, vxlan or wireguard. `peer` is the address that packets are sent to on
    the node's own network. `tunnel` is the name of the tunnel device that it needs, "" for none; `claims` are
    what only that node may have then, a MAC or keys. `problem` says what will not work although the hop is
    there. `guards` are routes that refuse the same packets while those of `routes` are not there.
    """

    node: str
    cidr: str
    backend: str
    peer: str
    routes: tuple[Route, ...]
    neighbours: tuple[Neighbour, ...] = ()
    forwarding: tuple[Forwarding, ...] = ()
    tunnel: str = ""
    problem: str = ""
    claims: tuple[str, ...] = ()
    peering: Peering | None = None
    guards: tuple[Route, ...] = ()

    @property
    def route(self) -> Route:
        """The route to the podCIDR itself."""
        return self.routes[0]


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    """What all nodes have in common: UDP port and number of the network (VNI) of VXLAN; WireGuard's port, and
    the one after it.
    """

    port: int = 8472
    vni: int = 112
    wireguard_port: int = 51820


class Turning(NamedTuple):
    """What this node does while its WireGuard keys change.

    `detour`: packets take the second device. `keepalive` is in seconds, for each device, 0: none.
    """

    detour: bool = False
    keepalive: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Site:
    """What this node knows of itself.

    `mtu` is the most that the network between nodes carries (bytes), if less than the underlay says.
    `ranges` are its own range addresses, by IP version. `tunnels` are
    the tunnel devices' indexes by their names, of those that are there.
    """

    node: Node
    underlay: Underlay = field(default_factory=Underlay)
    backend: str = "auto"
    mtu: int | None = None
    ranges: Mapping[int, str] = field(default_factory=dict)
    tunnels: Mapping[str, int] = field(default_factory=dict)
    config: TunnelConfig = field(default_factory=TunnelConfig)
    turning: Turning = field(default_factory=Turning)

    @cached_property
    def tunnel_versions(self) -> frozenset[int]:
        """The IP versions over which this node can have tunnels."""
        return frozenset(v for v in (4, 6) if tunnel_address(self.node, v))

    def fits(self, way: Way) -> int:
        """Return what fits through a way (bytes)."""
        return min(way.mtu, self.mtu) if self.mtu else way.mtu


class Inside(NamedTuple):
    """What fits into a tunnel (bytes), and what will not work as that is too little; "" is nothing."""

    mtu: int
    problem: str


def inside(site: Site, way: Way, overhead: int, cidr: str, address: str) -> Inside:
    """Return what fits into a tunnel to an address by some way, for packets of a podCIDR's family."""
    fits = site.fits(way) - overhead
    if version_of(cidr) == 4 or fits >= IPV6_MTU:
        return Inside(fits, "")
    return Inside(IPV6_MTU, f"{fits} bytes fit into the tunnel to {address}, IPv6 needs {IPV6_MTU}")


def destinations(peer: Node, cidr: str, hosts: bool) -> Iterator[tuple[str, int]]:
    """Yield what the way to a podCIDR leads to, each with its routing table.

    With `hosts` also the peer's own addresses of that family, for packets of our pods. Only of one that is
    known to run podwire: pods' way to a control plane that is no part of the pod network must not end in a
    tunnel.
    """
    yield cidr, RT_TABLE_MAIN
    if hosts:
        version = version_of(cidr)
        bits = 32 if version == 4 else 128
        yield from ((f"{a}/{bits}", NODE_TABLE) for a in peer.addresses if version_of(a) == version)


def source(site: Site, version: int, known: bool) -> str:
    """Return what our own packets into a tunnel come from; "" where we have no pods of that family.

    The node's own address, so that a server that is bound to none answers by the address it was asked at;
    where peers may not lead that through the tunnel (`destinations`), our address in our range.
    """
    own = site.ranges.get(version, "")
    return next((a for a in site.node.addresses if own and known and version_of(a) == version), own)


def version_of(text: str) -> int:
    """Return the IP version of an address or CIDR that is known to be one."""
    return 6 if ":" in text else 4


def tunnel_address(node: Node, version: int) -> str:
    """Return where a node takes tunnelled packets over an IP version: what it says itself, else its first
    address; "" for nowhere.
    """
    return next((a for a in node.tunnel_addresses or node.addresses if (":" in a) == (version == 6)), "")


def metric_of(cidr: str) -> int:
    """Return the metric of our route to an IPv4 podCIDR: some number from 1 to 255.

    The kernel looks for a route's next hop among those with the same interface and metric, one by one
    (fib_find_info, net/ipv4/fib_semantics.c): with one metric for all, 5,000 routes take 0.8 s, and 0.06 so.
    IPv6 has its next hops in the routes.
    """
    if version_of(cidr) == 6:
        return 0
    network = ip_network(cidr)
    return 1 + (int(network.network_address) >> (32 - network.prefixlen)) % 255


def range_address(cidr: str) -> str:
    """Return the address of a podCIDR that is its node's: the first, which no pod gets."""
    return cidr.partition("/")[0]
