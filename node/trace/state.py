"""The network state of a node at one moment, as values, and which way its routes send a packet. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from netlink.conntrack import Flow
from netlink.decode import Address, Link
from netlink.entries import Neighbour
from netlink.family import Family
from node.trace.nft import Table
from node.trace.packet import Packet

UNICAST, LOCAL, BROADCAST, ANYCAST, MULTICAST, BLACKHOLE, UNREACHABLE, PROHIBIT, THROW = range(1, 10)
"""A route's types (RTN_*)."""
TYPES = {
    LOCAL: "local", BROADCAST: "broadcast", ANYCAST: "anycast", MULTICAST: "multicast", THROW: "throw",
    BLACKHOLE: "blackhole", UNREACHABLE: "unreachable", PROHIBIT: "prohibit",
}  # fmt: skip
TABLES = {255: "local", 254: "main", 253: "default"}
BRIDGED = {Family.V4: "bridge/bridge-nf-call-iptables", Family.V6: "bridge/bridge-nf-call-ip6tables"}
"""Whether what bridges switch is shown to the rules for IP (br_netfilter)."""
TO_TABLE, RULE_GOTO, RULE_NOP = 1, 2, 3
NUD_FAILED = 0x20
UNIQUE_LOCAL = ip_network("fc00::/7")
NUD = {
    1: "incomplete",
    2: "reachable",
    4: "stale",
    8: "delay",
    16: "probe",
    32: "failed",
    64: "noarp",
    128: "permanent",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A route. `hops`: how many next hops it has, of which the first is shown."""

    destination: str
    kind: int
    table: int
    gateway: str = ""
    oif: int = 0
    mtu: int = 0
    source: str = ""
    metric: int = 0
    hops: int = 1

    def words(self, interfaces: Mapping[int, str]) -> str:
        """Return it as `ip route` would, with its table."""
        parts = [TYPES[self.kind]] if self.kind in TYPES else []
        parts.append("default" if self.destination in ("0.0.0.0/0", "::/0") else self.destination)
        parts += [f"via {self.gateway}"] if self.gateway else []
        parts += [f"dev {interfaces.get(self.oif, self.oif)}"] if self.oif else []
        parts += [f"mtu {self.mtu}"] if self.mtu else []
        parts += [f"(one of {self.hops} next hops)"] if self.hops > 1 else []
        return f"{' '.join(parts)}, table {TABLES.get(self.table, self.table)}"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy rule (`ip rule`). `others` are selectors that are not looked at, in words."""

    priority: int
    table: int
    action: int = TO_TABLE
    source: str = ""
    destination: str = ""
    iif: str = ""
    oif: str = ""
    mark: int = 0
    mask: int = 0
    inverted: bool = False
    suppress: int = -1
    goto: int = 0
    others: str = ""


@dataclass(frozen=True, slots=True)
class PodPlace:
    """A pod of the node: "namespace/name", its host interface, its addresses, its network namespace."""

    name: str
    host_ifname: str
    addresses: tuple[str, ...]
    netns: str = ""


@dataclass(frozen=True, slots=True)
class Remote:
    """A forwarding entry of a VXLAN device: frames for a MAC go to an address."""

    index: int
    mac: str
    address: str


@dataclass(frozen=True, slots=True)
class Secured:
    """A range that a WireGuard device has a peer for: the device's public key and port, the peer's key, the
    range (CIDR), and the address and port that packets to it go to ("", 0: not known).
    """

    index: int
    own: str
    port: int
    key: str
    cidr: str
    address: str
    to: int


@dataclass(frozen=True, slots=True)
class IpRule:
    """A rule of iptables, as iptables-save prints it without "-A CHAIN"; `handle` is its number, from 1.

    In the nft variant it is the one that the rule has in nftables, which events tell of.
    """

    text: str
    packets: int = 0
    handle: int = 0


@dataclass(frozen=True, slots=True)
class IpTable:
    """A table of iptables; the variant is "legacy" or "nft", policies are those of built-in chains."""

    variant: str
    name: str
    chains: Mapping[str, tuple[IpRule, ...]]
    policies: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class State:
    """What one node does with packets of a family.

    `missing`: what could not be read, each a sentence; `recent`: clients by list of xt_recent.
    """

    node: str
    family: Family
    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    ways: tuple[Way, ...] = ()
    policies: tuple[Policy, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    remotes: tuple[Remote, ...] = ()
    flows: tuple[Flow, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    pods: tuple[PodPlace, ...] = ()
    missing: tuple[str, ...] = ()
    iptables: tuple[IpTable, ...] = ()
    recent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    secured: tuple[Secured, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What routing says: the route, and the policy rule that led to it; no route: nothing leads there."""

    way: Way | None
    policy: Policy | None = None


class Routing:
    """Routes of a state, laid out for looking up: by table and prefix length."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tables: dict[int, dict[int, dict[int, Way]]] = {}
        for way in state.ways:
            network = ip_network(way.destination)
            if network.version != state.family.value:
                continue
            lengths = self._tables.setdefault(way.table, {})
            known = lengths.setdefault(network.prefixlen, {})
            start = int(network.network_address)
            if start not in known or way.metric < known[start].metric:
                known[start] = way
        self.interfaces = {link.index: link.name for link in state.links}
        self.by_name = {link.name: link for link in state.links}
        self.by_index = {link.index: link for link in state.links}
        self._own: dict[int, list[Address]] = {}
        for address in state.addresses:
            if (":" in address.cidr) == (state.family is Family.V6):
                self._own.setdefault(address.index, []).append(address)

    def find(self, packet: Packet, *, output: bool = False) -> Found:
        """Return the route of a packet; `output`: it is the node's own, so it comes from no interface."""
        skip_to = 0
        for policy in sorted(self._state.policies, key=lambda p: p.priority):
            if policy.priority < skip_to or not self._selects(policy, packet, output):
                continue
            if policy.action == RULE_GOTO:
                skip_to = policy.goto
                continue
            if policy.action in (BLACKHOLE, UNREACHABLE, PROHIBIT):
                return Found(Way(packet.destination, policy.action, policy.table), policy)
            if policy.action == TO_TABLE:
                way = self._lookup(policy.table, packet.destination, policy.suppress)
                if way and way.kind != THROW:
                    return Found(way, policy)
        return Found(None)

    def kind_of(self, address: str) -> int:
        """Return the type of an address as `fib daddr type` has it: by the local table, else by any route."""
        if ip_address(address).is_multicast:
            return MULTICAST
        way = (
            self._lookup(255, address, -1)
            or self.find(Packet(self._state.family, 6, "", address, 0), output=True).way
        )
        return way.kind if way else UNREACHABLE

    def is_own(self, address: str) -> bool:
        """Whether packets to an address are for this node."""
        return self.kind_of(address) == LOCAL

    def source_for(self, oif: int, gateway: str, destination: str) -> str:
        """Return the address that the kernel chooses as a source for packets out by an interface.

        IPv4 takes the first one in the next hop's subnet, else of the interface (inet_select_addr); IPv6 goes
        by RFC 6724: the interface, the kind of address, then the longest prefix in common.
        """
        usable = [
            (index, a)
            for index, some in self._own.items()
            for a in some
            if not a.deprecated and not _only_link(a.cidr)
        ]
        here = [a.cidr for index, a in usable if index == oif and not a.passive]
        rest = [a.cidr for index, a in usable if index != oif and not a.passive]
        if self._state.family is Family.V6:
            target = ip_address(destination)
            found = max(
                here or rest, key=lambda c: (_label(c) == _label(destination), _common(c, target)), default=""
            )
            return found.partition("/")[0]
        near = [c for c in here if ip_address(gateway or destination) in ip_network(c, strict=False)]
        loopback = [a.cidr for index, a in usable if self.interfaces.get(index) == "lo"]
        return next((c.partition("/")[0] for c in (*near, *here, *loopback, *rest)), "")

    def first_of(self, index: int) -> str:
        """Return the first address of an interface that is not for its link only; "" if it has none."""
        some = (
            a.cidr for a in self._own.get(index, ()) if not ip_address(a.cidr.partition("/")[0]).is_link_local
        )
        return next((c.partition("/")[0] for c in some), "")

    def holder(self, address: str) -> Link | None:
        """Return the interface that has an address."""
        for index, some in self._own.items():
            if any(a.cidr.partition("/")[0] == address for a in some):
                return self.by_index.get(index)
        return None

    def _lookup(self, table: int, address: str, suppress: int) -> Way | None:
        number, bits = int(ip_address(address)), self._state.family.bits
        for length in sorted(self._tables.get(table, {}), reverse=True):
            way = self._tables[table][length].get(number >> (bits - length) << (bits - length))
            if way:
                return way if length > suppress else None
        return None

    def _selects(self, policy: Policy, packet: Packet, output: bool) -> bool:
        checks = self._checks(policy, packet, output)
        return all(checks) != policy.inverted

    def _checks(self, policy: Policy, packet: Packet, output: bool) -> Iterator[bool]:
        for cidr, address in ((policy.source, packet.source), (policy.destination, packet.destination)):
            if cidr:
                yield bool(address) and ip_address(address) in ip_network(cidr)
        if policy.iif:
            yield policy.iif == ("lo" if output else packet.iif)
        if policy.oif:
            yield policy.oif == packet.oif
        if policy.mark or policy.mask:
            yield (packet.mark ^ policy.mark) & policy.mask == 0
        yield not policy.others


def _only_link(cidr: str) -> bool:
    address = ip_address(cidr.partition("/")[0])
    return address.is_link_local or address.is_loopback


def _label(text: str) -> bool:
    """Whether an address is for local use (RFC 4193): such ones are chosen for one another."""
    return ip_address(text.partition("/")[0]) in UNIQUE_LOCAL


def _common(cidr: str, target: IPv4Address | IPv6Address) -> int:
    """Return how many first bits an address has in common with another, its prefix length at most."""
    address, _, length = cidr.partition("/")
    differs = int(ip_address(address)) ^ int(target)
    return min(int(length), target.max_prefixlen - differs.bit_length())
