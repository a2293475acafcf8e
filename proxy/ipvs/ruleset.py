"""The constant part of the table: base chains, rules and empty maps. README.md draws the packet's path.

What finds a frontend is that of the nftables dataplane (proxy.nftables.ruleset), with the same maps; what
differs is where it leads. The masquerade is decided where the frontend is found, and travels to postrouting
in the packet's priority: the mark says which virtual server, and must be nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator

from netlink.family import Family
from netlink.nftables.expressions import (
    IP_CT_DIR_REPLY,
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
    Verdict,
)
from netlink.nftables.objects import (
    PRIORITY_DSTNAT,
    PRIORITY_MANGLE,
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
from proxy.ipvs.places import MARK, MARK_MASK
from proxy.ipvs.ways import Way
from proxy.l7 import places
from proxy.nftables import ruleset as shared
from proxy.nftables.ruleset import (
    CLUSTER_ADDRESSES,
    HAIRPIN,
    KINDS,
    LOCAL_POD_CIDRS,
    NO_MASQUERADE,
    NODE_ADDRESSES,
    NODE_PODS,
    OUTSIDE_CHAIN,
    POD_CIDRS,
    REJECT_CHAIN,
    SERVICES,
    SETS,
    SHAPES,
    Kind,
    source,
)

MARKS = {
    kind: Map(
        f"{kind.name}_marks",
        kind.shapes.key,
        data=(Field.INDEX,),  # to nft a plain number in host order, as ipvsadm prints marks
        comment="the mark of the virtual server, where it is known by one",
    )
    for kind in KINDS
}
LEADS = {
    kind: Map(
        f"{kind.name}_leads",
        kind.shapes.key,
        data=(Field.DESTINATION, Field.DPORT),
        comment="where to those are led that are not for a virtual server of their own",
    )
    for kind in KINDS
}
DELIVERED = Map(
    "delivered",
    (Field.DESTINATION, Field.L4PROTO, Field.DPORT),
    comment="ports of other addresses than cluster addresses that are delivered here",
)
DELIVERED_ADDRESSES = Map(
    "delivered_addresses", (Field.DESTINATION,), comment="their addresses, for what ICMP tells of connections"
)
SETS_HERE = (*SETS, DELIVERED, DELIVERED_ADDRESSES)
MAPS = (*SETS_HERE, SHAPES, *(m for k in KINDS for m in (k.shapes, MARKS[k], LEADS[k])))
"""Everything that the table has."""

NUMBERS = 0x71 << 24
REJECTED, DROPPED, MASQUERADED = (struct.pack("=I", NUMBERS | n) for n in (0, 1, 2))
"""What the packet's priority says: of a frontend without endpoints, and of a packet on its way."""

_MASQUERADES = tuple(MasqueradePolicy)
_WAYS = (Way.ADDRESS, Way.MARK, Way.LED, Way.PROXY)

ICMP, ICMPV6, UNREACHABLE = 1, 58, 3  # RFC 792: fragmentation needed is one of them; RFC 4443: errors < 128

Shape = tuple[Kind, Way, MasqueradePolicy]
"""What a frontend's chain depends on."""


@functools.cache
def shapes() -> tuple[Shape, ...]:
    """Return what there is, in order."""
    served = ((SERVICES, Way.ADDRESS, policy) for policy in _MASQUERADES)
    others = ((k, w, policy) for k in KINDS for w in (Way.MARK, Way.LED) for policy in _MASQUERADES)
    return (*served, *others, *((kind, Way.PROXY, MasqueradePolicy.NEVER) for kind in KINDS))


@functools.cache
def shape_id(kind: Kind, way: Way, masquerade: MasqueradePolicy) -> bytes:
    """Return the number of a shape, as registers have it."""
    place = KINDS.index(kind) << 16 | _WAYS.index(way) << 12 | _MASQUERADES.index(masquerade) << 8
    return struct.pack("=I", NUMBERS | place | 0x80)


@functools.cache
def led_shapes() -> frozenset[bytes]:
    """Return the numbers of frontends that are led to the virtual server of another address."""
    return frozenset(shape_id(*shape) for shape in shapes() if shape[1] is Way.LED)


def chain_of(kind: Kind, way: Way, masquerade: MasqueradePolicy) -> str:
    """Return the name of a shape's chain."""
    to = {Way.ADDRESS: "served", Way.MARK: "marked", Way.LED: "led", Way.PROXY: "proxied"}[way]
    suffix = {
        MasqueradePolicy.NEVER: "",
        MasqueradePolicy.OFF_CLUSTER: "_masquerade_off_cluster",
        MasqueradePolicy.OFF_NODE: "_masquerade_off_node",
        MasqueradePolicy.ALWAYS: "_masquerade",
    }
    return f"{kind.name}_{to}{suffix[masquerade]}"


def constant_shapes() -> list[tuple[bytes, Data]]:
    """Return the elements of `SHAPES`."""
    return [
        (REJECTED, Goto(REJECT_CHAIN)),
        (DROPPED, Goto("")),
        *((shape_id(*shape), Goto(chain_of(*shape))) for shape in shapes()),
    ]


@functools.cache
def base(family: Family) -> tuple[Operation, ...]:
    """Return what makes the table without any data."""
    structure = tuple(_structure(family))
    digest = hashlib.sha256(repr(structure).encode()).hexdigest()[:12]
    return (AddTable(f"service proxy beside IPVS, and pod masquerade; layout {digest}"), *structure)


def layout_comment(family: Family) -> str:
    """Return the table comment that says which layout the table has: another comment, another layout."""
    table = base(family)[0]
    assert isinstance(table, AddTable)
    return table.comment


def rules(family: Family) -> dict[str, tuple[str, ...]]:
    """Return the comments of all rules, in order, by chain."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in base(family):
        if isinstance(operation, AddRule):
            chain = operation.rule.chain
            found[chain] = (*found.get(chain, ()), operation.rule.comment)
    return found


def _structure(family: Family) -> Iterator[Operation]:
    """Yield maps, chains and rules in packet order."""
    for which in MAPS:
        yield AddMap(which)
    for name in (REJECT_CHAIN, OUTSIDE_CHAIN):
        yield AddChain(Chain(name))
    for name, kind, hook, priority in (
        ("deliver", "filter", Hook.PREROUTING, PRIORITY_MANGLE),
        ("prerouting", "nat", Hook.PREROUTING, PRIORITY_DSTNAT),
        ("forget", "filter", Hook.OUTPUT, PRIORITY_MANGLE),
        ("output", "nat", Hook.OUTPUT, PRIORITY_DSTNAT),
        ("postrouting", "nat", Hook.POSTROUTING, PRIORITY_SRCNAT),
    ):
        yield AddChain(Chain(name, BaseChain(kind, hook, priority)))
    for shape in shapes():
        yield AddChain(Chain(chain_of(*shape)))
    for rule in (
        *shared.reject_empty(family),
        *shared.to_outside(family),
        *_deliver(family),
        _answers("prerouting"),
        *shared.translate(family, "prerouting"),
        _forget(),
        _answers("output"),
        *_own(family),
        *shared.translate(family, "output"),
        *_postrouting(family),
        *(rule for shape in shapes() for rule in _shape_rules(family, shape)),
    ):
        yield AddRule(rule)
    yield AddElements(SHAPES, constant_shapes())


def _deliver(family: Family) -> Iterator[Rule]:
    """Yield what has packets for other addresses than cluster addresses delivered here; all packets meet it.

    ICMP errors about a connection are for the virtual server's address, and IPVS sees what is delivered only.
    """
    key, _ = shared.lookup_key(family, SERVICES)
    to_us = (Constant(struct.pack("=I", MARK)), MetaSet(MetaKey.MARK))
    words = "external addresses of services: delivered here, whatever the route says"
    yield Rule("deliver", (*key, Lookup(DELIVERED.name), *to_us), words)
    number = ICMP if family is Family.V4 else ICMPV6
    errors: tuple[Expression, ...] = (Cmp(Compare.EQ, bytes([UNREACHABLE])),)
    if family is Family.V6:
        errors = (Bitwise(b"\x80", b"\0"), Cmp(Compare.EQ, b"\0"))
    kind = Payload(Base.TRANSPORT, 0, 1)
    told: tuple[Expression, ...] = (Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, bytes([number])), kind, *errors)
    about = (shared.destination_of(family), Lookup(DELIVERED_ADDRESSES.name))
    yield Rule("deliver", (*about, *told, *to_us), "what ICMP tells of their connections")


def _forget() -> Rule:
    """Return what takes our mark from packets that IPVS has translated, which come by `output` once more.

    A tunnel's outer packet has the mark of the packet in it. IPVS would translate that, too, and lead it into
    the tunnel, whose outer packet has the mark: until the kernel's stack is full, and it stops.
    """
    ours = (Meta(MetaKey.MARK), Bitwise(struct.pack("=I", MARK_MASK), bytes(4)))
    say = (Cmp(Compare.EQ, struct.pack("=I", MARK)), Constant(bytes(4)), MetaSet(MetaKey.MARK))
    return Rule("forget", (*ours, *say), "translated by IPVS: the mark must not go into a tunnel")


def _answers(chain: str) -> Rule:
    """Return what lets pass what a refusal answers.

    What the node itself sends to a cluster address comes from that address, as it is one of its own, so the
    answer is addressed to it, too.
    """
    reply = (Ct(CtKey.DIRECTION), Cmp(Compare.EQ, bytes([IP_CT_DIR_REPLY])))
    return Rule(chain, (*reply, Do(Verdict.RETURN)), "answers")


def _own(family: Family) -> Iterator[Rule]:
    """Yield what keeps the L7 proxy's connections from services: IPVS would balance those to an address."""
    group = (Meta(MetaKey.SKGID), Cmp(Compare.EQ, struct.pack("=I", places.OWNER)))
    served = (shared.destination_of(family), Lookup(CLUSTER_ADDRESSES.name))
    words = "what the L7 proxy sends to cluster addresses"
    yield Rule("output", (*group, *served, Do(Verdict.GOTO, REJECT_CHAIN)), words)
    yield Rule("output", (*group, Do(Verdict.RETURN)), "what the L7 proxy sends is never translated")


def _shape_rules(family: Family, shape: Shape) -> Iterator[Rule]:
    """Yield a shape's rules: who is masqueraded, and which virtual server it is."""
    kind, way, policy = shape
    chain = chain_of(*shape)
    say = (Constant(MASQUERADED), MetaSet(MetaKey.PRIORITY))
    if policy is MasqueradePolicy.ALWAYS:
        yield Rule(chain, say, "masquerade every client")
    else:
        yield Rule(chain, (Constant(bytes(4)), MetaSet(MetaKey.PRIORITY)), "found: forget its shape")
    outside = source(family)
    if policy is MasqueradePolicy.OFF_CLUSTER:
        no_pod = (outside, Lookup(POD_CIDRS.name, invert=True))
        yield Rule(chain, (*no_pod, *say), "masquerade clients that are not pods")
    elif policy is MasqueradePolicy.OFF_NODE:
        no_pod = (outside, Lookup(NODE_PODS.name, invert=True))
        yield Rule(chain, (*no_pod, *say), "masquerade clients that are not pods of this node")
    key, _ = shared.lookup_key(family, kind)
    if way is Way.MARK:
        mark = (*key, MapLookup(MARKS[kind].name), MetaSet(MetaKey.MARK))
        yield Rule(chain, mark, "by the virtual server of this mark")
    elif way is not Way.ADDRESS:
        to = Dnat(family.af, address_slot=0, port_slot=family.size // 4)
        yield Rule(chain, (*key, MapLookup(LEADS[kind].name), to), "by what has this address")
        yield Rule(chain, (Do(Verdict.GOTO, REJECT_CHAIN),), "it has just gone")


def _postrouting(family: Family) -> Iterator[Rule]:
    said = (Meta(MetaKey.PRIORITY), Cmp(Compare.EQ, MASQUERADED))
    clear = (Constant(bytes(4)), MetaSet(MetaKey.PRIORITY))
    yield Rule("postrouting", (*said, *clear, Counter(), Masquerade()), "service traffic that is masqueraded")
    destination = shared.destination_of(family, slot=family.size // 4)
    pair = (source(family), destination, Lookup(HAIRPIN.name))
    # Connection tracking does not know of IPVS's translation. What goes from an address to itself, and is not
    # the node talking to itself, can only have been translated.
    elsewhere = (FibDestinationType(), Cmp(Compare.NEQ, struct.pack("=I", RTN_LOCAL)))
    words = "a pod that reached itself by a service"
    yield Rule("postrouting", (*pair, *elsewhere, Counter(), Masquerade()), words)
    inside = (NODE_ADDRESSES, POD_CIDRS, NO_MASQUERADE)
    leaving: tuple[Expression, ...] = (
        *(source(family), Lookup(LOCAL_POD_CIDRS.name)),
        *(p for which in inside for p in (shared.destination_of(family), Lookup(which.name, invert=True))),
    )
    yield Rule("postrouting", (*leaving, Counter(), Do(Verdict.GOTO, OUTSIDE_CHAIN)), "pods to the outside")
