"""The nftables tables of pods, `podwire_pods`: what a pod may send, and the host ports that lead to it. Pure.

As in proxy/nftables the rules are constant and all data are elements:

    PodRules ──`elements`──▶ elements of sets and maps      `structure` ──▶ empty sets and maps, chains, rules

- ip, ip6: every packet that comes from a pod's interface (pwpod…) must have a source address of that pod. In
  prerouting before connection tracking, so that nothing of a forged packet stays. And the host ports.
- bridge: the same for pods on a bridge, where a pod could also forge MAC addresses, ARP and neighbour
  discovery. Only nodes with such pods have it.

An interface that no element names may send nothing: a pod without rules is cut off, not trusted.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from cni.wiring import HOST_PREFIX
from ipam.records import PROTOCOLS, HostPort
from netlink.family import Family
from netlink.nftables.expressions import (
    IPS_DST_NAT,
    RTN_LOCAL,
    Base,
    Bitwise,
    Cmp,
    Compare,
    Counter,
    Ct,
    CtKey,
    Dnat,
    Do,
    Expression,
    ExtensionHeader,
    FibDestinationType,
    LimitOver,
    Lookup,
    MapLookup,
    Masquerade,
    Meta,
    MetaKey,
    Payload,
    Verdict,
)
from netlink.nftables.objects import (
    BRIDGE,
    PRIORITY_DSTNAT,
    PRIORITY_RAW,
    PRIORITY_SRCNAT,
    Chain,
    Data,
    Elements,
    Field,
    Hook,
    Map,
    Rule,
    Table,
    TableFamily,
)
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import AddChain, AddMap, AddRule, AddTable, Operation

NAME = "podwire_pods"
FAMILIES: tuple[TableFamily, ...] = (*Family, BRIDGE)
TABLES = {family: Table(family, NAME) for family in FAMILIES}
INTERFACES = HOST_PREFIX.encode()
"""How the names of pods' host interfaces begin."""

PODS = Map(
    "pods", (Field.IIFNAME, Field.SOURCE), comment="each pod's interface, and the addresses it may send from"
)
LIMITED_PODS = Map(
    "limited_pods", (Field.IIFNAME, Field.SOURCE), comment="the same of pods with a bandwidth limit"
)
BY_ADDRESS = Map(
    "host_ports_by_address",
    (Field.DESTINATION, Field.L4PROTO, Field.DPORT),
    data=(Field.DESTINATION, Field.DPORT),
    comment="host ports on one address of the node, and the pods they lead to",
)
BY_PORT = Map(
    "host_ports",
    (Field.L4PROTO, Field.DPORT),
    data=(Field.DESTINATION, Field.DPORT),
    comment="host ports on every address of the node, and the pods they lead to",
)
HAIRPIN = Map(
    "hairpin", (Field.SOURCE, Field.DESTINATION), comment="pods that may reach themselves by a host port"
)
MACS = Map(
    "macs", (Field.IIFNAME, Field.ETHER_SOURCE), comment="each pod's interface, and the MAC it may send from"
)
IPV4 = Map("ipv4", (Field.IIFNAME, Field.IPV4_SOURCE), comment="each pod's interface, and its IPv4 addresses")
IPV6 = Map("ipv6", (Field.IIFNAME, Field.IPV6_SOURCE), comment="each pod's interface, and its IPv6 addresses")
TARGETS = Map(
    "targets",
    (Field.IIFNAME, Field.ND_TARGET),
    comment="each pod's interface, and the addresses it may answer neighbour solicitations for",
)
LIMITS = Map(
    "egress_limits",
    (Field.IIFNAME,),
    limits=True,
    comment="how much pods with a bandwidth limit may send; their own queue keeps to less, if they let it",
)

PRIORITY_HOST_PORTS = PRIORITY_DSTNAT + 5
"""After the service proxy's chains: its services and node ports come first."""

ETHER_IPV4, ETHER_ARP, ETHER_IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"
TCP, ICMPV6 = bytes([6]), bytes([58])
ROUTER_ADVERTISEMENT, NEIGHBOUR_ADVERTISEMENT, REDIRECT = 134, 136, 137
FRAGMENT_HEADER = 44
FE80_10 = bytes.fromhex("ffc0") + bytes(14)
LINK_LOCAL = bytes.fromhex("fe80") + bytes(14)
LOOPBACK_V4, LOOPBACK_V6 = b"\x7f", bytes(15) + b"\1"
LINK_MULTICAST = bytes.fromhex("ff02")

_PORT = struct.Struct(">HH")

Contents = dict[TableFamily, dict[Map, Elements]]
"""Elements by table and map."""


@dataclass(frozen=True, slots=True)
class PodRules:
    """What the tables must know of one pod interface. `bridge`: it is a bridge's port, not routed.

    `egress` is what it may send: of each family, if routed, because each has its own table.
    """

    host_ifname: str
    mac: str
    addresses: tuple[str, ...]
    host_ports: tuple[HostPort, ...] = ()
    bridge: bool = False
    egress: LimitOver | None = None


def maps(family: TableFamily) -> tuple[Map, ...]:
    """Return the sets and maps of a family's table."""
    if family is BRIDGE:
        return (LIMITS, MACS, IPV4, IPV6, TARGETS)
    return (LIMITS, PODS, LIMITED_PODS, BY_ADDRESS, BY_PORT, HAIRPIN)


@functools.cache
def structure(family: TableFamily) -> tuple[Operation, ...]:
    """Return what makes a family's table without any data."""
    chains, rules = (
        (_packet_chains(family), _packet_rules(family))
        if isinstance(family, Family)
        else (_frame_chains(), _frame_rules())
    )
    parts: list[Operation] = [AddMap(m) for m in maps(family)]
    parts += [AddChain(c) for c in chains]
    parts += [AddRule(r) for r in rules]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    what = "guard and host ports of pods" if isinstance(family, Family) else "guard of pods on a bridge"
    return (AddTable(f"{what}; layout {digest}"), *parts)


@functools.cache
def layout_comment(family: TableFamily) -> str:
    """Return the table comment that says which layout the table has: another comment, another layout."""
    table, *_ = structure(family)
    assert isinstance(table, AddTable)
    return table.comment


@functools.cache
def rule_comments(family: TableFamily) -> dict[str, tuple[str, ...]]:
    """Return the comments of all rules of a table, in order, by chain."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in structure(family):
        if isinstance(operation, AddRule):
            rule = operation.rule
            found[rule.chain] = (*found.get(rule.chain, ()), rule.comment)
    return found


def elements(pod: PodRules) -> Contents:
    """Return the elements that stand for a pod."""
    found: Contents = {}
    name = pod.host_ifname.encode().ljust(16, b"\0")
    addresses = [_packed(address) for address in pod.addresses]
    if pod.bridge:
        _bridge_elements(found, name, bytes.fromhex(pod.mac.replace(":", "")), addresses, pod.egress)
    else:
        for family, address in addresses:
            _put(found, family, LIMITED_PODS if pod.egress else PODS, name + address)
            if pod.egress:
                _put(found, family, LIMITS, name, pod.egress)
    for family in Family:
        first = next((address for other, address in addresses if other is family), None)
        ports = [port for port in pod.host_ports if _is_for(port, family)]
        if first and ports:
            _put(found, family, HAIRPIN, first + first)
            for port in ports:
                which, key = _host_port(port)
                _put(found, family, which, key, first + _PORT.pack(port.container_port, 0))
    return found


def _bridge_elements(
    found: Contents,
    name: bytes,
    mac: bytes,
    addresses: list[tuple[Family, bytes]],
    egress: LimitOver | None,
) -> None:
    _put(found, BRIDGE, MACS, name + mac + bytes(2))
    if egress:
        _put(found, BRIDGE, LIMITS, name, egress)
    for family, address in (*addresses, (Family.V6, link_local(mac))):
        if family is Family.V4:
            _put(found, BRIDGE, IPV4, name + address)
        else:
            _put(found, BRIDGE, IPV6, name + address)
            _put(found, BRIDGE, TARGETS, name + address)


def wanted(pods: Iterable[PodRules]) -> Contents:
    """Return the elements that stand for all pods, oldest first: where two want one key, the newer has it."""
    found: Contents = {}
    for pod in pods:
        for family, contents in elements(pod).items():
            for which, some in contents.items():
                found.setdefault(family, {}).setdefault(which, {}).update(some)
    return found


def link_local(mac: bytes) -> bytes:
    """Return the link-local address that the kernel makes of a MAC (RFC 4291, appendix A)."""
    return LINK_LOCAL[:8] + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


def words(fields: tuple[Field, ...], family: TableFamily, raw: bytes) -> str:
    """Return a key, or the data of an element, as `nft` prints it."""
    found = []
    for field in fields:
        layout = field.layout(family)
        value, raw = raw[: layout.length], raw[layout.size :]
        match field:
            case Field.IIFNAME:
                found.append(value.rstrip(b"\0").decode())
            case Field.ETHER_SOURCE:
                found.append(value.hex(":"))
            case Field.L4PROTO:
                found.append(PROTOCOLS.get(value[0], str(value[0])))
            case Field.DPORT:
                found.append(str(int.from_bytes(value, "big")))
            case _:
                found.append(str(ip_address(value)))
    return " . ".join(found)


def _put(found: Contents, family: TableFamily, which: Map, key: bytes, data: Data = None) -> None:
    found.setdefault(family, {}).setdefault(which, {})[key] = data


def _packed(address: str) -> tuple[Family, bytes]:
    """Return the family and the bytes of an address; ten times as fast as `ipaddress`."""
    family = Family.V6 if ":" in address else Family.V4
    return family, socket.inet_pton(family.af, address)


def _is_for(port: HostPort, family: Family) -> bool:
    return not port.host_ip or _packed(port.host_ip)[0] is family


def _host_port(port: HostPort) -> tuple[Map, bytes]:
    """Return the map that a host port belongs in, and its key."""
    key = bytes((port.protocol, 0, 0, 0)) + _PORT.pack(port.host_port, 0)
    address = _packed(port.host_ip)[1] if port.host_ip else b""
    return (BY_ADDRESS, address + key) if any(address) else (BY_PORT, key)


def _packet_chains(family: Family) -> Iterator[Chain]:
    yield Chain("prerouting", BaseChain("filter", Hook.PREROUTING, PRIORITY_RAW))
    yield Chain("pod")
    if family is Family.V6:
        yield Chain("pod_upper")
    yield Chain("host_ports")
    yield Chain("nat_prerouting", BaseChain("nat", Hook.PREROUTING, PRIORITY_HOST_PORTS))
    yield Chain("nat_output", BaseChain("nat", Hook.OUTPUT, PRIORITY_HOST_PORTS))
    yield Chain("nat_postrouting", BaseChain("nat", Hook.POSTROUTING, PRIORITY_SRCNAT))


def _packet_rules(family: Family) -> Iterator[Rule]:
    """Yield the rules of the ip or ip6 table, in packet order.

    The first is for nearly all packets of pods, and in as few expressions as can be: each costs a request
    0.05 us, and all rules together cost it 1.2 of 21 before there was this one.
    """
    load, wanted = _USUAL[family]
    own = (_source(family, 4), Lookup(PODS.name), _ACCEPT)
    yield Rule("prerouting", (*_FROM_POD, load, wanted, *own), "most of what pods send, from their address")
    yield Rule("prerouting", (*_FROM_POD, Do(Verdict.GOTO, "pod")), "what else pods send")
    yield _limit("pod")
    yield from _ipv4_guard() if family is Family.V4 else _ipv6_guard()
    yield from _translation(family)


def _ipv4_guard() -> Iterator[Rule]:
    family = Family.V4
    yield Rule("pod", (*_loopback(family), *_DROP), "loopback addresses of the node (CVE-2020-8558)")
    yield Rule("pod", (*_own(_source(family, 4), LIMITED_PODS), _ACCEPT), "from an address of the pod")
    yield Rule("pod", _DROP, "from any other: forged, or the pod is not known")


def _ipv6_guard() -> Iterator[Rule]:
    yield from _no_router("pod")
    family, upper = Family.V6, Do(Verdict.GOTO, "pod_upper")
    for which in (PODS, LIMITED_PODS):
        yield Rule("pod", (*_own(_source(family, 4), which), upper), "from an address of the pod")
    link_source = (_source(family), *_masked(FE80_10, LINK_LOCAL))
    unicast = (_destination(family), *_masked(FE80_10, LINK_LOCAL))
    yield Rule("pod", (*link_source, *unicast, upper), "link-local, to the node")
    yield Rule("pod", (*link_source, *_TO_LINK_MULTICAST, upper), "link-local, to all on the link")
    yield from _unspecified("pod", upper)
    yield Rule("pod", _DROP, "from any other: forged, or the pod is not known")
    yield from _upper_layer()


def _frame_chains() -> Iterator[Chain]:
    yield Chain("prerouting", BaseChain("filter", Hook.PREROUTING, PRIORITY_RAW))
    for name in ("pod", "pod_arp", "pod_ipv4", "pod_ipv6", "pod_upper"):
        yield Chain(name)


def _frame_rules() -> Iterator[Rule]:
    """Yield the rules of the bridge table, in packet order.

    Anything but ARP and IP is dropped: pods are given IP, and what else they might send, a VLAN tag around a
    forged packet, PPPoE, spanning tree or LLDP, speaks to the bridge or to other pods in ways not checked
    here. The type is read from the frame, where a VLAN tag shows; `meta protocol` looks behind it.
    """
    yield _limit("prerouting")
    yield Rule("prerouting", (*_FROM_POD, Do(Verdict.GOTO, "pod")), "what pods send")
    ether_source = Payload(Base.LINK, 6, 6, 4)
    yield Rule("pod", (*_own(ether_source, MACS, invert=True), *_DROP), "from a MAC that is not the pod's")
    for kind, chain in ((ETHER_IPV4, "pod_ipv4"), (ETHER_IPV6, "pod_ipv6"), (ETHER_ARP, "pod_arp")):
        yield Rule("pod", (*_ether_type(kind), Do(Verdict.GOTO, chain)), f"to {chain}")
    yield Rule("pod", _DROP, "neither IP nor ARP")
    sender = (
        *_own(Payload(Base.NETWORK, 8, 6, 4), MACS),
        *_own(Payload(Base.NETWORK, 14, 4, 4), IPV4),
    )
    yield Rule("pod_arp", (*_ether_type(ETHER_ARP), *sender, _ACCEPT), "the pod speaks of itself")
    yield Rule("pod_arp", _DROP, "the pod speaks for another")
    ipv4, ipv6 = _protocol(ETHER_IPV4), _protocol(ETHER_IPV6)
    loopback = (*ipv4, *_loopback(Family.V4), *_DROP)
    yield Rule("pod_ipv4", loopback, "loopback addresses of the node (CVE-2020-8558)")
    yield Rule("pod_ipv4", (*ipv4, *_own(_source(Family.V4, 4), IPV4), _ACCEPT), "from an address of the pod")
    yield Rule("pod_ipv4", _DROP, "from any other")
    upper = Do(Verdict.GOTO, "pod_upper")
    yield from _no_router("pod_ipv6")
    yield Rule("pod_ipv6", (*ipv6, *_own(_source(Family.V6, 4), IPV6), upper), "from an address of the pod")
    yield from _unspecified("pod_ipv6", upper, *ipv6)
    yield Rule("pod_ipv6", _DROP, "from any other")
    advertisement = _icmpv6(Compare.EQ, NEIGHBOUR_ADVERTISEMENT)
    target = _own(Payload(Base.TRANSPORT, 8, 16, 4), TARGETS)
    yield Rule("pod_upper", (*advertisement, *target, _ACCEPT), "the pod advertises itself")
    yield Rule("pod_upper", (*advertisement, *_DROP), "the pod advertises another")
    yield from _upper_layer()


def _limit(chain: str) -> Rule:
    over: tuple[Expression, ...] = (Meta(MetaKey.IIFNAME), Lookup(LIMITS.name), *_DROP)
    return Rule(chain, over, "beyond the bandwidth limit of the pod, which bypassed its own queue")


def _no_router(chain: str) -> Iterator[Rule]:
    """Refuse what would steer others' traffic (CVE-2020-13401), whatever its source."""
    for kind, what in ((ROUTER_ADVERTISEMENT, "router advertisement"), (REDIRECT, "redirect")):
        yield Rule(chain, (*_icmpv6(Compare.EQ, kind), *_DROP), f"a {what} (CVE-2020-13401)")


def _unspecified(chain: str, then: Expression, *before: Expression) -> Iterator[Rule]:
    source = (_source(Family.V6), Cmp(Compare.EQ, bytes(16)))
    comment = "no source yet: duplicate address detection, multicast listener reports"
    yield Rule(chain, (*before, *source, *_TO_LINK_MULTICAST, then), comment)


def _upper_layer() -> Iterator[Rule]:
    """Accept packets whose upper-layer header was seen, past all extension headers.

    The kernel finds it where headers and first fragment are whole. Where it does not, the first fragment may
    hide a router advertisement from the rules above (RFC 7112); the later ones are nothing without the first.
    """
    chain = "pod_upper"
    yield Rule(chain, (Meta(MetaKey.L4PROTO), Cmp(Compare.NEQ, ICMPV6), _ACCEPT), "anything but ICMPv6")
    readable = _icmpv6(Compare.NEQ, ROUTER_ADVERTISEMENT)
    yield Rule(chain, (*readable, _ACCEPT), "ICMPv6, its type read: not one that was dropped above")
    offset = (ExtensionHeader(FRAGMENT_HEADER, 2, 2), *_masked(b"\xff\xf8", bytes(2), Compare.NEQ))
    yield Rule(chain, (*offset, _ACCEPT), "a later fragment")
    yield Rule(chain, _DROP, "the upper-layer header is hidden")


def _translation(family: Family) -> Iterator[Rule]:
    """Yield the rules of host ports; the service proxy, 5 priorities earlier, has been asked before.

    Loopback addresses of the node lead to pods from the node itself only: others' packets to 127.0.0.0/8 are
    translated before the kernel would drop them. To ::1 nobody's are: the kernel has no route_localnet for
    IPv6 and drops the answer, so that a refused connection is better than one that hangs.
    """
    if family is Family.V4:
        yield Rule("nat_prerouting", (*_loopback(family), _RETURN), "loopback addresses are the node's own")
    else:
        yield Rule("nat_output", (*_loopback(family), _RETURN), "the kernel cannot route from ::1 to a pod")
    local = (FibDestinationType(), Cmp(Compare.EQ, struct.pack("=I", RTN_LOCAL)))
    for chain in ("nat_prerouting", "nat_output"):
        yield Rule(chain, (*local, Do(Verdict.GOTO, "host_ports")), "to an address of this node")
    after = family.size // 4
    dnat = Dnat(family.af, address_slot=0, port_slot=after)
    by_address = (_destination(family), *_transport_key(after), MapLookup(BY_ADDRESS.name), dnat)
    yield Rule("host_ports", by_address, "host ports with a hostIP")
    yield Rule("host_ports", (*_transport_key(0), MapLookup(BY_PORT.name), dnat), "host ports without")
    translated = (
        Ct(CtKey.STATUS),
        Bitwise(struct.pack("=I", IPS_DST_NAT), bytes(4)),
        Cmp(Compare.NEQ, bytes(4)),
    )
    masquerade = (Counter(), Masquerade())
    if family is Family.V4:
        source = (Payload(Base.NETWORK, family.source_offset, 1), Cmp(Compare.EQ, LOOPBACK_V4))
        comment = "from a loopback address of this node: the pod could not answer"
        yield Rule("nat_postrouting", (*translated, *source, *masquerade), comment)
    pair = (_source(family), _destination(family, after), Lookup(HAIRPIN.name))
    yield Rule("nat_postrouting", (*translated, *pair, *masquerade), "a pod that reached itself")


def _own(load: Payload, which: Map, *, invert: bool = False) -> tuple[Expression, ...]:
    """Match packets of which the bytes loaded behind the interface's name are with it in a set."""
    return (Meta(MetaKey.IIFNAME), load, Lookup(which.name, invert=invert))


def _source(family: Family, slot: int = 0) -> Payload:
    return Payload(Base.NETWORK, family.source_offset, family.size, slot)


def _destination(family: Family, slot: int = 0) -> Payload:
    return Payload(Base.NETWORK, family.destination_offset, family.size, slot)


def _loopback(family: Family) -> tuple[Expression, ...]:
    if family is Family.V4:
        return (Payload(Base.NETWORK, family.destination_offset, 1), Cmp(Compare.EQ, LOOPBACK_V4))
    return (_destination(family), Cmp(Compare.EQ, LOOPBACK_V6))


def _masked(mask: bytes, value: bytes, compare: Compare = Compare.EQ) -> tuple[Expression, ...]:
    return (Bitwise(mask, bytes(len(mask))), Cmp(compare, value))


def _icmpv6(compare: Compare, kind: int) -> tuple[Expression, ...]:
    is_icmpv6 = (Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, ICMPV6))
    return (*is_icmpv6, Payload(Base.TRANSPORT, 0, 1), Cmp(compare, bytes([kind])))


def _ether_type(kind: bytes) -> tuple[Expression, ...]:
    return (Payload(Base.LINK, 12, 2), Cmp(Compare.EQ, kind))


def _protocol(kind: bytes) -> tuple[Expression, ...]:
    """Say of what protocol the packet in a frame is; nft needs it to print the fields of the packet."""
    return (Meta(MetaKey.PROTOCOL), Cmp(Compare.EQ, kind))


def _transport_key(slot: int) -> tuple[Expression, ...]:
    return (Meta(MetaKey.L4PROTO, slot), Payload(Base.TRANSPORT, 2, 2, slot + 1))


_FROM_POD: tuple[Expression, ...] = (Meta(MetaKey.IIFNAME), Cmp(Compare.EQ, INTERFACES))
_USUAL: dict[Family, tuple[Expression, Expression]] = {
    Family.V4: (Payload(Base.NETWORK, Family.V4.destination_offset, 1, 5), Cmp(Compare.NEQ, LOOPBACK_V4, 5)),
    Family.V6: (Meta(MetaKey.L4PROTO, 8), Cmp(Compare.EQ, TCP, 8)),
}
"""What most packets are: not to a loopback address; of a protocol that hides no ICMPv6."""
_DROP: tuple[Expression, ...] = (Counter(), Do(Verdict.DROP))
_ACCEPT, _RETURN = Do(Verdict.ACCEPT), Do(Verdict.RETURN)
_TO_LINK_MULTICAST: tuple[Expression, ...] = (
    Payload(Base.NETWORK, Family.V6.destination_offset, 2),
    Cmp(Compare.EQ, LINK_MULTICAST),
)
