"""The constant part of the table: base chains, rules and empty maps, and the shape of balancing chains.

proxy/README.md draws the packet's path. Nothing here depends on which services exist.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from netlink.family import Family
from netlink.nftables.expressions import (
    IPS_DST_NAT,
    RTN_LOCAL,
    Base,
    Bitwise,
    Cmp,
    Compare,
    Constant,
    Counter,
    Ct,
    CtKey,
    Dnat,
    Do,
    Expression,
    FibDestinationType,
    Lookup,
    MapLookup,
    Masquerade,
    Meta,
    MetaKey,
    MetaSet,
    Payload,
    RandomIndex,
    Reject,
    Snat,
    Verdict,
    VerdictLookup,
)
from netlink.nftables.objects import (
    PRIORITY_DSTNAT,
    PRIORITY_SRCNAT,
    Chain,
    Data,
    Field,
    Goto,
    Hook,
    Map,
    Rule,
)
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import AddChain, AddElements, AddMap, AddRule, AddTable, Operation
from proxy.frontends import Masquerade as MasqueradePolicy
from proxy.l7 import places

TABLE = "podwire"

MASQUERADE_MARK = 0x4000
"""The packet mark bit from "this connection is to be masqueraded" to where that happens: kube-proxy's."""

POD_CIDRS = Map("pod_cidrs", (Field.SOURCE,), interval=True, comment="the pod ranges of all nodes")
NODE_PODS = Map("node_pods", (Field.SOURCE,), interval=True, comment="the pod ranges of this node")
LOCAL_POD_CIDRS = Map(
    "local_pod_cidrs", (Field.SOURCE,), interval=True, comment="those that are masqueraded on the way out"
)
NODE_ADDRESSES = Map("node_addresses", (Field.DESTINATION,), comment="the addresses of all nodes")
NO_MASQUERADE = Map(
    "no_masquerade",
    (Field.DESTINATION,),
    interval=True,
    comment="where else than towards pods and nodes pods keep their address",
)
EGRESS = Map(
    "egress",
    (Field.SOURCE,),
    data=(Field.SOURCE,),
    interval=True,
    comment="chosen addresses that pods get towards the outside",
)
HAIRPIN = Map(
    "hairpin", (Field.SOURCE, Field.DESTINATION), comment="endpoints of this node that may call themselves"
)

NODE_PORT_ADDRESSES = Map(
    "node_port_addresses", (Field.DESTINATION,), interval=True, comment="where the node has node ports"
)

RANGE_FIELDS: dict[Map, str] = {
    POD_CIDRS: "pod_cidrs",
    NODE_PODS: "node_pods",
    LOCAL_POD_CIDRS: "local_pod_cidrs",
    NO_MASQUERADE: "no_masquerade",
    NODE_PORT_ADDRESSES: "node_ports",
}
"""The sets that hold what a field of `NodeRanges` has, and which."""
CLUSTER_ADDRESSES = Map(
    "cluster_addresses", (Field.DESTINATION,), comment="addresses that have no other use than their services"
)
RESTRICTED = Map(
    "restricted",
    (Field.DESTINATION, Field.L4PROTO, Field.DPORT),
    comment="load balancer addresses with loadBalancerSourceRanges",
)
ALLOWED_SOURCES = Map(
    "allowed_sources",
    (Field.DESTINATION, Field.L4PROTO, Field.DPORT, Field.SOURCE),
    ranges=True,
    comment="who may use them",
)


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Three maps: `shapes` by key, `endpoints` by key and index, chains of those with `affinity` by key."""

    name: str
    by_address: bool
    shapes: Map
    endpoints: Map
    affinity: Map

    @property
    def first_chain(self) -> str:
        """The chain for packets whose choice is not there: the first endpoint, else refused."""
        return f"{self.name}_first"

    @property
    def affinity_chain(self) -> str:
        """The chain that looks up where frontends with session affinity go."""
        return f"{self.name}_affinity"


def _kind(name: str, *, by_address: bool) -> Kind:
    key = (Field.DESTINATION, Field.L4PROTO, Field.DPORT) if by_address else (Field.L4PROTO, Field.DPORT)
    return Kind(
        name,
        by_address,
        Map(name, key, data=(Field.PRIORITY,), comment="the shape of what balances it: one per frontend"),
        Map(
            f"{name}_endpoints",
            (*key, Field.INDEX),
            data=(Field.DESTINATION, Field.DPORT),
            comment="one per endpoint of a frontend",
        ),
        Map(f"{name}_affinity", key, verdicts=True, comment="chains of frontends with session affinity"),
    )


SERVICES_INTERNAL = _kind("services_internal", by_address=True)
SERVICES = _kind("services", by_address=True)
NODE_PORTS_INTERNAL = _kind("node_ports_internal", by_address=False)
NODE_PORTS = _kind("node_ports", by_address=False)
KINDS = (SERVICES_INTERNAL, SERVICES, NODE_PORTS_INTERNAL, NODE_PORTS)
RANGES = (POD_CIDRS, NODE_PODS, LOCAL_POD_CIDRS, NO_MASQUERADE, NODE_PORT_ADDRESSES)
SETS = (*RANGES, EGRESS, NODE_ADDRESSES, HAIRPIN, CLUSTER_ADDRESSES, RESTRICTED, ALLOWED_SOURCES)
SHAPES = Map("shapes", (Field.PRIORITY,), verdicts=True, comment="the chain of a shape")
"""The only map of verdicts that all packets meet, and it has a few hundred elements.

The kernel walks every map of verdicts when an element of one changes: with a verdict for each frontend, one
change at 44,000 services took 7 to 17 ms. Writing a number instead takes 0.04. The number travels in the
packet's priority, which routing sets anew (ip_forward).
"""
MAPS = (*SETS, SHAPES, *(m for kind in KINDS for m in (kind.shapes, kind.endpoints, kind.affinity)))
"""Everything that the table has, whatever services there are."""

REJECT_CHAIN = "reject_no_endpoints"
OUTSIDE_CHAIN = "pods_to_outside"


_FORGET_SHAPE: tuple[Expression, ...] = (Constant(bytes(4)), MetaSet(MetaKey.PRIORITY))
"""What the node itself sends is not routed again."""

Shape = tuple[Kind, int, MasqueradePolicy]
"""What a balancing chain depends on: its maps, the number of endpoints, who is masqueraded."""

COMMON_ENDPOINTS = 16
"""Numbers of endpoints whose chains are always there.

A chain that goes makes the kernel wait for a grace period, 15 ms and more. Most services stay below this
number.
"""

COMMON_SHAPES: frozenset[Shape] = frozenset(
    (kind, endpoints, masquerade)
    for endpoints in range(1, COMMON_ENDPOINTS + 1)
    for kind, masquerade in (
        (SERVICES_INTERNAL, MasqueradePolicy.OFF_NODE),
        (SERVICES, MasqueradePolicy.OFF_CLUSTER),
        (SERVICES, MasqueradePolicy.ALWAYS),
        (SERVICES, MasqueradePolicy.NEVER),
        (NODE_PORTS_INTERNAL, MasqueradePolicy.OFF_NODE),
        (NODE_PORTS, MasqueradePolicy.ALWAYS),
        (NODE_PORTS, MasqueradePolicy.NEVER),
    )
)


_MASQUERADES = tuple(MasqueradePolicy)


@functools.cache
def shape_id(kind: Kind, endpoints: int, masquerade: MasqueradePolicy) -> bytes:
    """Return the number of a shape, as registers have it; below a million endpoints."""
    place = KINDS.index(kind) << 22 | _MASQUERADES.index(masquerade) << 20 | endpoints
    return struct.pack("=I", SHAPE_NUMBERS | place)


SHAPE_NUMBERS = 0x70 << 24
REJECTED, DROPPED = (struct.pack("=I", SHAPE_NUMBERS | n << 20) for n in (0, 1))
"""No shape has no endpoints, so these numbers are free."""


def affinity_id(kind: Kind) -> bytes:
    """Return the number that leads to a kind's frontends with session affinity."""
    return struct.pack("=I", SHAPE_NUMBERS | KINDS.index(kind) << 22 | 2 << 20)


def constant_shapes() -> list[tuple[bytes, Data]]:
    """Return the elements of `SHAPES` that are always there."""
    return [
        (REJECTED, Goto(REJECT_CHAIN)),
        (DROPPED, Goto("")),
        *((affinity_id(kind), Goto(kind.affinity_chain)) for kind in KINDS),
        *((shape_id(*shape), Goto(balance_chain(*shape))) for shape in sorted(COMMON_SHAPES, key=_order)),
    ]


def _order(shape: Shape) -> tuple[int, str, int]:
    kind, endpoints, masquerade = shape
    return KINDS.index(kind), masquerade.value, endpoints


def balance_chain(kind: Kind, endpoints: int, masquerade: MasqueradePolicy) -> str:
    """Return the name of the chain that balances over a number of endpoints."""
    suffix = {
        MasqueradePolicy.NEVER: "",
        MasqueradePolicy.OFF_CLUSTER: "_masquerade_off_cluster",
        MasqueradePolicy.OFF_NODE: "_masquerade_off_node",
        MasqueradePolicy.ALWAYS: "_masquerade",
    }
    return f"{kind.name}_{endpoints}{suffix[masquerade]}"


def balance_rules(
    family: Family, kind: Kind, endpoints: int, masquerade: MasqueradePolicy
) -> tuple[Operation, ...]:
    """Return what makes a balancing chain: a mark if it masquerades, then the random choice.

    Each look-up of a packet sees the elements of its moment, not those of one moment for the whole walk. So a
    number of endpoints found before a change can lead to a choice that the change has taken away. Without its
    last rule, such a packet would leave for the cluster address, and conntrack hold on to that.
    """
    name = balance_chain(kind, endpoints, masquerade)
    rules = [*mark_rules(family, name, masquerade)]
    rules.append(Rule(name, (*_FORGET_SHAPE, *_choose(family, kind, endpoints)), f"one of {endpoints}"))
    rules.append(Rule(name, (Do(Verdict.GOTO, kind.first_chain),), "the one chosen has just gone"))
    return (AddChain(Chain(name)), *(AddRule(r) for r in rules))


def dnat_to(family: Family, protocol: int, address: str, port: int) -> tuple[Expression, ...]:
    """Translate to one address and port; nft loads that only after a match of the protocol."""
    return (
        Meta(MetaKey.L4PROTO),
        Cmp(Compare.EQ, bytes([protocol])),
        Constant(socket.inet_pton(family.af, address)),
        Constant(struct.pack(">H", port), family.size // 4),
        Dnat(family.af, address_slot=0, port_slot=family.size // 4),
    )


def _first(family: Family, kind: Kind) -> Iterator[Operation]:
    """Yield the chain where balancing ends when the choice is not there."""
    name = kind.first_chain
    yield AddChain(Chain(name))
    yield AddRule(Rule(name, _choose(family, kind, 1), "the first"))
    yield AddRule(Rule(name, (Do(Verdict.GOTO, REJECT_CHAIN),), "all have just gone"))


def _choose(family: Family, kind: Kind, endpoints: int) -> tuple[Expression, ...]:
    """Translate to one of so many endpoints."""
    fields, slots = lookup_key(family, kind)
    return (
        *fields,
        RandomIndex(endpoints, slot=slots),
        MapLookup(kind.endpoints.name),
        Dnat(family.af, address_slot=0, port_slot=family.size // 4),
    )


def mark_rules(family: Family, chain: str, masquerade: MasqueradePolicy) -> Iterator[Rule]:
    """Yield what marks the connections of a balancing chain that are to be masqueraded."""
    if masquerade is MasqueradePolicy.ALWAYS:
        yield Rule(chain, _set_mark(), "masquerade every client")
    elif masquerade is MasqueradePolicy.OFF_CLUSTER:
        outside = (source(family), Lookup(POD_CIDRS.name, invert=True))
        yield Rule(chain, (*outside, *_set_mark()), "masquerade clients that are not pods")
    elif masquerade is MasqueradePolicy.OFF_NODE:
        outside = (source(family), Lookup(NODE_PODS.name, invert=True))
        yield Rule(chain, (*outside, *_set_mark()), "masquerade clients that are not pods of this node")


def base(family: Family) -> tuple[Operation, ...]:
    """Return what makes the table without any data."""
    structure = tuple(_structure(family))
    encoded = repr(structure)
    digest = hashlib.sha256(encoded.encode()).hexdigest()[:12]
    return (AddTable(f"service proxy and pod masquerade; layout {digest}"), *structure)


def layout_comment(family: Family) -> str:
    """Return the table comment that says which layout the table has: another comment, another layout."""
    table = base(family)[0]
    assert isinstance(table, AddTable)
    return table.comment


def _structure(family: Family) -> Iterator[Operation]:
    """Yield maps, chains and rules in packet order."""
    for which in MAPS:
        yield AddMap(which)
    yield AddChain(Chain(REJECT_CHAIN))
    yield AddChain(Chain(OUTSIDE_CHAIN))
    for rule in (*reject_empty(family), *to_outside(family)):
        yield AddRule(rule)
    yield AddChain(Chain("prerouting", BaseChain("nat", Hook.PREROUTING, PRIORITY_DSTNAT)))
    yield AddChain(Chain("output", BaseChain("nat", Hook.OUTPUT, PRIORITY_DSTNAT)))
    yield AddChain(Chain("postrouting", BaseChain("nat", Hook.POSTROUTING, PRIORITY_SRCNAT)))
    for rule in (
        *translate(family, "prerouting"),
        *_own(),
        *translate(family, "output"),
        *_postrouting(family),
    ):
        yield AddRule(rule)
    for kind in KINDS:
        yield from _first(family, kind)
    for shape in sorted(COMMON_SHAPES, key=_order):
        yield from balance_rules(family, *shape)
    for kind in KINDS:
        yield AddChain(Chain(kind.affinity_chain))
        known: tuple[Expression, ...] = (
            *_FORGET_SHAPE,
            *lookup_key(family, kind)[0],
            VerdictLookup(kind.affinity.name),
        )
        yield AddRule(Rule(kind.affinity_chain, known, "frontends with session affinity"))
    yield AddElements(SHAPES, constant_shapes())


def reject_empty(family: Family) -> Iterator[Rule]:
    """Yield what answers for frontends without endpoints."""
    tcp = (Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, bytes([6])))
    yield Rule(REJECT_CHAIN, (*tcp, Reject()), "no endpoints: TCP reset")
    yield Rule(REJECT_CHAIN, (Reject(family.port_unreachable),), "no endpoints: ICMP port unreachable")


def to_outside(family: Family) -> Iterator[Rule]:
    """Yield what gives pods' packets to the outside their address."""
    chosen = (source(family), MapLookup(EGRESS.name), Snat(family.af))
    yield Rule(OUTSIDE_CHAIN, chosen, "where an address is chosen for it")
    yield Rule(OUTSIDE_CHAIN, (Counter(), Masquerade()), "else that of the interface")


def _own() -> Iterator[Rule]:
    """Yield what keeps the L7 proxy's connections from coming back to it, or to anybody by a service."""
    group = (Meta(MetaKey.SKGID), Cmp(Compare.EQ, struct.pack("=I", places.OWNER)))
    yield Rule("output", (*group, Do(Verdict.RETURN)), "what the L7 proxy sends is never translated")


def translate(family: Family, chain: str) -> Iterator[Rule]:
    """Yield the destination NAT rules: by address first; node ports last, on addresses of the node.

    Where clients inside the cluster are served differently, their maps come first. What the node itself sends
    is inside.
    """
    key, after = lookup_key(family, SERVICES)
    inside = () if chain == "output" else (source(family), Lookup(POD_CIDRS.name))
    refused: tuple[Expression, ...] = (
        *(*key, Lookup(RESTRICTED.name)),
        *(*key, source(family, after), Lookup(ALLOWED_SOURCES.name, invert=True)),
        *(Counter(), Do(Verdict.DROP)),
    )
    yield Rule(chain, refused, "sources that a load balancer's address is not for")
    words = "external addresses for clients inside the cluster, where these differ"
    yield from _go(family, chain, inside, SERVICES_INTERNAL, words)
    yield from _go(family, chain, (), SERVICES, "cluster and external addresses")
    others = (destination_of(family), Lookup(CLUSTER_ADDRESSES.name), Do(Verdict.GOTO, REJECT_CHAIN))
    yield Rule(chain, others, "ports of cluster addresses that no service has")
    node = _to_this_node(family)
    words = "node ports for clients inside the cluster, where these differ"
    yield from _go(family, chain, (*node, *inside), NODE_PORTS_INTERNAL, words)
    yield from _go(family, chain, node, NODE_PORTS, "node ports")


def _go(
    family: Family, chain: str, condition: tuple[Expression, ...], kind: Kind, words: str
) -> Iterator[Rule]:
    """Yield the two rules that find the shape of a frontend, and go to its chain."""
    shape = (*lookup_key(family, kind)[0], MapLookup(kind.shapes.name), MetaSet(MetaKey.PRIORITY))
    yield Rule(chain, (*condition, *shape), words)
    yield Rule(chain, (Meta(MetaKey.PRIORITY), VerdictLookup(SHAPES.name)), "to the chain of that shape")


def _postrouting(family: Family) -> Iterator[Rule]:
    mark = _mark_bytes()
    marked = (Meta(MetaKey.MARK), Bitwise(mark, bytes(4)), Cmp(Compare.NEQ, bytes(4)))
    clear = (Meta(MetaKey.MARK), Bitwise(b"\xff" * 4, mark), MetaSet(MetaKey.MARK))
    yield Rule(
        "postrouting", (*marked, *clear, Counter(), Masquerade()), "service traffic that was marked for it"
    )
    translated = (
        Ct(CtKey.STATUS),
        Bitwise(struct.pack("=I", IPS_DST_NAT), bytes(4)),
        Cmp(Compare.NEQ, bytes(4)),
    )
    pair = (source(family), destination_of(family, slot=family.size // 4), Lookup(HAIRPIN.name))
    yield Rule(
        "postrouting", (*translated, *pair, Counter(), Masquerade()), "a pod that reached itself by a service"
    )
    inside = (NODE_ADDRESSES, POD_CIDRS, NO_MASQUERADE)
    leaving: tuple[Expression, ...] = (
        *(source(family), Lookup(LOCAL_POD_CIDRS.name)),
        *(part for which in inside for part in (destination_of(family), Lookup(which.name, invert=True))),
    )
    to = (Counter(), Do(Verdict.GOTO, OUTSIDE_CHAIN))
    yield Rule("postrouting", (*leaving, *to), "pods to the outside")


def source(family: Family, slot: int = 0) -> Payload:
    """Load the source address."""
    return Payload(Base.NETWORK, family.source_offset, family.size, slot)


def destination_of(family: Family, slot: int = 0) -> Payload:
    """Return the load of the destination address into a register."""
    return Payload(Base.NETWORK, family.destination_offset, family.size, slot)


def lookup_key(family: Family, kind: Kind) -> tuple[tuple[Expression, ...], int]:
    """Return the loads of a kind's key, and the first free register after them."""
    after = family.size // 4 if kind.by_address else 0
    address: tuple[Expression, ...] = (destination_of(family),) if kind.by_address else ()
    return (*address, Meta(MetaKey.L4PROTO, after), Payload(Base.TRANSPORT, 2, 2, after + 1)), after + 2


def _to_this_node(family: Family) -> tuple[Expression, ...]:
    """Match the node's addresses that have node ports, loopback ones never (CVE-2020-8558)."""
    wanted = (destination_of(family), Lookup(NODE_PORT_ADDRESSES.name))
    local = (*wanted, FibDestinationType(), Cmp(Compare.EQ, struct.pack("=I", RTN_LOCAL)))
    if family is Family.V4:
        first_byte = Payload(Base.NETWORK, family.destination_offset, 1)
        return (*local, first_byte, Cmp(Compare.NEQ, b"\x7f"))
    return (*local, destination_of(family), Cmp(Compare.NEQ, bytes(15) + b"\1"))


def _mark_bytes() -> bytes:
    return struct.pack("=I", MASQUERADE_MARK)


def _set_mark() -> tuple[Expression, ...]:
    mark = _mark_bytes()
    others = bytes(b ^ 0xFF for b in mark)
    return (Meta(MetaKey.MARK), Bitwise(others, mark), MetaSet(MetaKey.MARK))
