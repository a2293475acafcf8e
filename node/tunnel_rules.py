"""The nftables tables of tunnels, `podwire_tunnels`: nothing translates their packets, only nodes send VXLAN,
TCP segments fit.

The rules are constant for a port, the peers are elements of a set:

    Outer, clamp ──`structure`──▶ empty set, chains, rules      Wanted.peers ──▶ elements

- The outer packets of a tunnel, as its underlay carries them, in the table of the underlay's family:

      arriving   prerouting (before connection tracking): from a peer ▶ not tracked
                 input: from anybody else ▶ counted and dropped
      leaving    output (before connection tracking): to a peer ▶ not tracked
      forwarded  postrouting (after translation): was given an address of this node ▶ counted and dropped

  Of WireGuard, which knows its own, the two rules that drop something are not there.

- What pods say to each other, in the table of their family: a SYN that is forwarded names a segment that fits
  the routes of both directions.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import BatchError, NftSocket
from netlink.nftables.expressions import (
    IPS_DST_NAT,
    IPS_SRC_NAT,
    RTN_LOCAL,
    Base,
    Bitwise,
    Cmp,
    Compare,
    Counter,
    Ct,
    CtKey,
    Do,
    Expression,
    FibDestinationType,
    Lookup,
    Meta,
    MetaKey,
    NoTrack,
    Payload,
    RouteMss,
    TcpOptionSet,
    ToNetworkOrder,
    Verdict,
)
from netlink.nftables.objects import (
    PRIORITY_FILTER,
    PRIORITY_MANGLE,
    PRIORITY_RAW,
    PRIORITY_SRCNAT,
    Chain,
    Field,
    Hook,
    Map,
    Rule,
    Table,
)
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteElements,
    DeleteTable,
    Operation,
    Pairs,
)

NAME = "podwire_tunnels"
TABLES = {family: Table(family, NAME) for family in Family}
PEERS = Map("peers", (Field.SOURCE,), comment="the tunnel addresses of other nodes")

PRIORITY_TRANSLATED = PRIORITY_SRCNAT + 20
"""After all source translation, whoever does it."""
READ_TRIES = 50
"""Each takes a few milliseconds, and fails only if the ruleset changes during it."""
REFUSALS = frozenset({errno.ENOENT, errno.EEXIST, errno.EBUSY})
"""What the kernel says when a table or an element is not as we left it."""

Part = tuple[Table, list[Operation]]


@dataclass(frozen=True, slots=True)
class Outer:
    """What the rules for a tunnel's outer packets are made for: the UDP port of all nodes' VXLAN, or the
    first of the two of their WireGuard.
    """

    port: int
    wireguard: bool = False

    @property
    def ports(self) -> tuple[int, ...]:
        """The UDP ports."""
        return (self.port, self.port + 1) if self.wireguard else (self.port,)

    @property
    def kind(self) -> str:
        """What is in the packets, in a word."""
        return "WireGuard" if self.wireguard else "VXLAN"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the table of a family is to do.

    With `port` 0 nothing is done about outer packets. `peers` are the tunnel addresses of all other nodes, in
    one spelling each. `clamp`: TCP segments are made to fit. `wireguard`: the port is WireGuard's first one.
    """

    port: int = 0
    peers: frozenset[str] = frozenset()
    clamp: bool = False
    wireguard: bool = False

    @property
    def outer(self) -> Outer | None:
        """What the rules for outer packets are made for, None if there are to be none."""
        return Outer(self.port, self.wireguard) if self.port else None


NOTHING = Wanted()


@dataclass(frozen=True, slots=True)
class _Table:
    """What a table holds: its layout ("" if rules are missing, or if it is not ours) and its peers."""

    layout: str
    peers: frozenset[str] = frozenset()


Tables = dict[Family, _Table]
"""The tables that are there."""


class TunnelRules:
    """The tables of tunnels in the network namespace of the thread that opens this; one thread at a time.

    What the first `apply` finds in the kernel is kept if it is right. Later ones go by what they know, so a
    change of one peer costs one element; `intact` looks whether it is still so.
    """

    def __init__(self) -> None:
        self._nft = NftSocket()
        self._wanted: Mapping[Family, Wanted] | None = None
        self._there: Tables | None = None
        """What the kernel holds, None if that has to be read."""

    def __enter__(self) -> Self:
        self._nft.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._nft.__exit__()

    @property
    def commits(self) -> int:
        """Batches that the kernel took."""
        return self._nft.commits

    def apply(self, wanted: Mapping[Family, Wanted]) -> None:
        """Make the tables hold what is wanted, in one transaction; a family not in it is to have no table.

        Raises BatchError if the kernel refuses it, NetlinkError if the ruleset cannot be read or never holds
        still, ValueError for a peer that is no address of its family. After an error, all is read anew.
        """
        there, self._there, self._wanted = self._there, None, dict(wanted)
        if there is None or not self._changed(there, wanted):
            self._reconcile(wanted)
        self._there = _tables(wanted)

    def intact(self, *, peers: bool = False) -> bool:
        """Return whether the rules are as the last `apply` left them; if not, the next one sets them right.

        With `peers`, whether these are too: 3 µs for each of them. True before the first `apply`, False after
        one that failed. Raises NetlinkError.
        """
        if self._wanted is None:
            return True
        if self._there is None:
            return False
        there, self._there = self._there, None
        try:
            found = self._read(self._wanted, peers=peers)
        except NetlinkError as error:
            if not error.gone:
                raise
            return False
        expected = there if peers else {family: _Table(table.layout) for family, table in there.items()}
        if found == expected:
            self._there = there
        return found == expected

    def _changed(self, there: Tables, wanted: Mapping[Family, Wanted]) -> bool:
        """Commit the difference to what is known; return False if the kernel holds something else."""
        try:
            self._nft.commit(*_difference(there, wanted))
        except BatchError as error:
            if error.errno not in REFUSALS:
                raise
            return False
        return True

    def _reconcile(self, wanted: Mapping[Family, Wanted]) -> None:
        """Commit the difference to what the kernel holds."""
        for _ in range(READ_TRIES):
            # Whoever changes the tables after this makes the kernel refuse the batch.
            generation = self._nft.generation()
            try:
                self._nft.commit(*_difference(self._read(wanted), wanted), generation=generation)
            except BatchError as error:
                if not error.outdated:
                    raise
            except NetlinkError as error:
                if not error.gone:  # a table that was there a moment ago
                    raise
            else:
                return
        raise NetlinkError(
            errno.EAGAIN,
            "cannot set the tables of tunnels right",
            f"the nftables ruleset changed during each of {READ_TRIES} tries",
        )

    def _read(self, wanted: Mapping[Family, Wanted], *, peers: bool = True) -> Tables:
        """Return the tables that are there; peers, if asked for, only of those with the wanted layout."""
        found: Tables = {}
        for family, table in TABLES.items():
            comment = self._nft.table_comment(table)
            if comment is None:
                continue
            here = wanted.get(family, NOTHING)
            shape = family, here.outer, here.clamp
            if comment != layout(*shape) or self._nft.rules(table) != _comments(*shape):
                found[family] = _Table("")
                continue
            found[family] = _Table(comment, self._peers(family, here) if peers else frozenset())
        return found

    def _peers(self, family: Family, wanted: Wanted) -> frozenset[str]:
        """Return the peers in a table, spelled as the wanted ones are."""
        keys = self._nft.elements(TABLES[family], PEERS) if wanted.outer else ()
        spelled = {_packed(family, peer): peer for peer in wanted.peers}
        return frozenset(spelled.get(key) or socket.inet_ntop(family.af, key) for key in keys)


def _tables(wanted: Mapping[Family, Wanted]) -> Tables:
    """Return what there is once the wanted is done."""
    return {
        family: _Table(layout(family, w.outer, w.clamp), w.peers if w.outer else frozenset())
        for family, w in wanted.items()
        if w.outer or w.clamp
    }


def _difference(there: Tables, wanted: Mapping[Family, Wanted]) -> list[Part]:
    """Return what turns the tables that are there into the wanted ones."""
    here = _tables(wanted)
    parts: list[Part] = []
    for family, table in TABLES.items():
        old, new = there.get(family), here.get(family)
        operations: list[Operation] = []
        if old and new and old.layout == new.layout:
            gone, come = old.peers - new.peers, new.peers - old.peers
            operations += [DeleteElements(PEERS, _elements(family, gone))] if gone else []
        else:
            operations += [DeleteTable()] if old else []
            operations += structure(family, wanted[family].outer, wanted[family].clamp) if new else ()
            come = new.peers if new else frozenset()
        operations += [AddElements(PEERS, _elements(family, come))] if come else []
        if operations:
            parts.append((table, operations))
    return parts


def _elements(family: Family, peers: Iterable[str]) -> Pairs:
    return [(_packed(family, peer), None) for peer in peers]


def _packed(family: Family, peer: str) -> bytes:
    try:
        return socket.inet_pton(family.af, peer)
    except OSError:
        raise ValueError(f"peers: {peer!r} is no IPv{family.value} address") from None


@functools.cache
def structure(family: Family, outer: Outer | None, clamp: bool) -> tuple[Operation, ...]:
    """Return what makes a family's table, without peers; nothing if it is to do nothing."""
    parts: list[Operation] = []
    if outer:
        parts.append(AddMap(PEERS))
        parts += _untracked(family, outer)
        parts += () if outer.wireguard else _guard(family, outer)
    if clamp:
        parts += _clamp()
    if not parts:
        return ()
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    what = [f"{outer.kind} on UDP port {outer.port}"] if outer else []
    what += ["TCP segments that fit"] if clamp else []
    return (AddTable(f"{', '.join(what)}; layout {digest}"), *parts)


@functools.cache
def layout(family: Family, outer: Outer | None, clamp: bool) -> str:
    """Return the table comment that says which layout the table has; "" if there is to be none."""
    for operation in structure(family, outer, clamp):
        if isinstance(operation, AddTable):
            return operation.comment
    return ""


@functools.cache
def _comments(family: Family, outer: Outer | None, clamp: bool) -> dict[str, tuple[str, ...]]:
    """Return the comments of all rules of a table, in order, by chain."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in structure(family, outer, clamp):
        if isinstance(operation, AddRule):
            rule = operation.rule
            found[rule.chain] = (*found.get(rule.chain, ()), rule.comment)
    return found


def _to(port: int) -> tuple[Expression, ...]:
    """Match UDP packets to a port."""
    return (
        Meta(MetaKey.L4PROTO),
        Cmp(Compare.EQ, bytes([socket.IPPROTO_UDP])),
        Payload(Base.TRANSPORT, 2, 2),
        Cmp(Compare.EQ, struct.pack(">H", port)),
    )


def _untracked(family: Family, outer: Outer) -> Iterator[Operation]:
    """Yield the chains by which outer packets between peers are not tracked.

    What is not tracked no rule can translate, be it one for packets with a mark that the outer packet has
    inherited from the inner one (kubernetes#88986), and it costs no entry.
    """
    source = Payload(Base.NETWORK, family.source_offset, family.size)
    destination = Payload(Base.NETWORK, family.destination_offset, family.size)
    local = (FibDestinationType(), Cmp(Compare.EQ, struct.pack("=I", RTN_LOCAL)))
    yield from _chain(
        BaseChain("filter", Hook.PREROUTING, PRIORITY_RAW),
        f"{outer.kind} from a peer: nothing may translate it",
        *((*_to(port), source, Lookup(PEERS.name), *local, NoTrack()) for port in outer.ports),
    )
    yield from _chain(
        BaseChain("filter", Hook.OUTPUT, PRIORITY_RAW),
        f"{outer.kind} to a peer: nothing may translate it",
        *((*_to(port), destination, Lookup(PEERS.name), NoTrack()) for port in outer.ports),
    )


def _guard(family: Family, outer: Outer) -> Iterator[Operation]:
    """Yield the chains that drop VXLAN of others, which has nothing that says whose it is.

    In input, where everything is for this node: its own addresses, and those of broadcast, multicast and
    anycast, which reach the tunnel's socket just as well. Before connection tracking one would also drop
    answers to masqueraded pods, which may have been given that port.
    """
    vxlan, drop = _to(outer.port), (Counter(), Do(Verdict.DROP))
    source = Payload(Base.NETWORK, family.source_offset, family.size)
    yield from _chain(
        BaseChain("filter", Hook.INPUT, PRIORITY_FILTER),
        "VXLAN from what is no node",
        (*vxlan, source, Lookup(PEERS.name, invert=True), *drop),
    )
    # To an address of a node that no Node object has, a pod is masqueraded: it would arrive as from a peer.
    # What has its destination translated too is for a service of that port.
    status = struct.pack("=I", IPS_SRC_NAT | IPS_DST_NAT)
    masqueraded = (
        Ct(CtKey.STATUS),
        Bitwise(status, bytes(4)),
        Cmp(Compare.EQ, struct.pack("=I", IPS_SRC_NAT)),
    )
    yield from _chain(
        BaseChain("filter", Hook.POSTROUTING, PRIORITY_TRANSLATED),
        "VXLAN of a pod that would pass for this node's",
        (*vxlan, *masqueraded, *drop),
    )


def _clamp() -> Iterator[Operation]:
    """Yield the chain that makes TCP segments fit; one that is smaller stays (`TcpOptionSet`).

    The route knows what its path carries, be it through a tunnel or not, so it need not be said here.
    """
    syn, rst = 0x02, 0x04
    opening = (
        Meta(MetaKey.L4PROTO),
        Cmp(Compare.EQ, bytes([socket.IPPROTO_TCP])),
        Payload(Base.TRANSPORT, 13, 1),
        Bitwise(bytes([syn | rst]), b"\0"),
        Cmp(Compare.EQ, bytes([syn])),
    )
    yield from _chain(
        BaseChain("filter", Hook.FORWARD, PRIORITY_MANGLE),
        "segments that fit the routes of both directions",
        (*opening, RouteMss(), ToNetworkOrder(), TcpOptionSet(2, 2, 2)),
    )


def _chain(base: BaseChain, comment: str, *rules: tuple[Expression, ...]) -> Iterator[Operation]:
    """Yield a chain, named by its hook, and its rules, which have one comment."""
    name = base.hook.name.lower()
    yield AddChain(Chain(name, base))
    for expressions in rules:
        yield AddRule(Rule(name, expressions, comment))
