"""Rules that change how a packet is tracked, or the packet: nft prints them as it prints its own."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.nftables.expressions import (
    IPS_DST_NAT,
    IPS_SRC_NAT,
    RTN_LOCAL,
    Base,
    Bitwise,
    Cmp,
    Compare,
    Ct,
    CtKey,
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
)
from netlink.nftables.fake import FakeNft, State
from netlink.nftables.objects import PRIORITY_RAW, PRIORITY_SRCNAT, Chain, Field, Hook, Map, Rule, Table
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import AddChain, AddMap, AddRule, AddTable, DeleteTable, Operation
from netlink.nftables.text import listing
from proxy.nftables.ruleset import TABLE
from tests.netlink.nft import nft
from tests.netlink.test_nftables_text import listed

PEERS = Map("peers", (Field.SOURCE,))
SNAT, DNAT = struct.pack("=I", IPS_SRC_NAT), struct.pack("=I", IPS_DST_NAT)
EITHER = struct.pack("=I", IPS_SRC_NAT | IPS_DST_NAT)
TCP: tuple[Expression, ...] = (Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, bytes([socket.IPPROTO_TCP])))
UDP: tuple[Expression, ...] = (Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, bytes([socket.IPPROTO_UDP])))
DPORT = Payload(Base.TRANSPORT, 2, 2)
FLAGS = Payload(Base.TRANSPORT, 13, 1)
FIB = FibDestinationType()
STATUS = Ct(CtKey.STATUS)
EQ, NEQ = Compare.EQ, Compare.NEQ

SENTENCES: list[tuple[Hook, tuple[Expression, ...], str, str]] = [
    (Hook.PREROUTING, (NoTrack(),), "notrack", "notrack"),
    (
        Hook.OUTPUT,
        (*UDP, DPORT, Cmp(EQ, b"\x21\x18"), NoTrack()),
        "udp dport 8472 notrack",
        "meta l4proto udp udp dport 8472 notrack",
    ),
    (
        Hook.INPUT,
        (*UDP, DPORT, Cmp(NEQ, b"\x21\x18"), FIB, Cmp(NEQ, struct.pack("=I", RTN_LOCAL))),
        "udp dport != 8472 fib daddr type != local",
        "udp dport != 8472 fib daddr type != local",
    ),
    (
        Hook.FORWARD,
        (
            *TCP,
            FLAGS,
            Bitwise(b"\6", b"\0"),
            Cmp(EQ, b"\2"),
            RouteMss(),
            ToNetworkOrder(),
            TcpOptionSet(2, 2, 2),
        ),
        "tcp flags syn / syn,rst tcp option maxseg size set rt mtu",
        "tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu",
    ),
    (
        Hook.POSTROUTING,
        (
            *TCP,
            FLAGS,
            Bitwise(b"\x3f", b"\0"),
            Cmp(EQ, b"\x11"),
            RouteMss(),
            ToNetworkOrder(),
            TcpOptionSet(2, 2, 2),
        ),
        "tcp flags fin,ack / fin,syn,rst,psh,ack,urg tcp option maxseg size set rt mtu",
        "tcp flags & (fin|syn|rst|psh|ack|urg) == fin|ack tcp option maxseg size set rt mtu",
    ),
    (Hook.FORWARD, (STATUS, Bitwise(SNAT, bytes(4)), Cmp(NEQ, bytes(4))), "ct status snat", "ct status snat"),
    (Hook.FORWARD, (STATUS, Bitwise(DNAT, bytes(4)), Cmp(NEQ, bytes(4))), "ct status dnat", "ct status dnat"),
    (
        Hook.FORWARD,
        (STATUS, Bitwise(EITHER, bytes(4)), Cmp(EQ, SNAT)),
        "ct status snat / snat,dnat",
        "ct status & (snat|dnat) == snat",
    ),
]


@pytest.mark.parametrize(
    ("hook", "expressions", "printed", "written"), SENTENCES, ids=[s[3] for s in SENTENCES]
)
@pytest.mark.parametrize("family", Family)
def test_a_rule_is_what_nft_makes_of_its_text(
    namespace: str,
    family: Family,
    hook: Hook,
    expressions: tuple[Expression, ...],
    printed: str,
    written: str,
) -> None:
    assert_same(namespace, family, hook, expressions, printed, written)


@pytest.mark.parametrize("family", Family)
def test_a_set_of_sources_may_be_asked_for_a_destination(namespace: str, family: Family) -> None:
    destination = Payload(Base.NETWORK, family.destination_offset, family.size)
    sentence = f"{family.keyword} daddr @peers notrack"
    expressions = (destination, Lookup("peers"), NoTrack())
    assert_same(namespace, family, Hook.OUTPUT, expressions, sentence, sentence)


def test_a_chain_comes_after_translation_by_a_number() -> None:
    chain = Chain("c", BaseChain("filter", Hook.POSTROUTING, PRIORITY_SRCNAT + 20))
    printed = listing(Table(Family.V4, TABLE), State("", {"c": chain}, {"c": []}))
    assert "type filter hook postrouting priority 120; policy accept;" in printed


@pytest.mark.parametrize(
    "expressions",
    [
        (RouteMss(), TcpOptionSet(2, 2, 4)),
        (RouteMss(), TcpOptionSet(3, 2, 2)),
        (TcpOptionSet(2, 2, 2),),
        (RouteMss(), TcpOptionSet(2, 2, 2)),
        (ToNetworkOrder(),),
        (DPORT, ToNetworkOrder()),
        (FLAGS, Bitwise(b"\6", b"\0"), Cmp(EQ, b"\2")),
        (*UDP, FLAGS, Bitwise(b"\6", b"\0"), Cmp(EQ, b"\2")),
        (*TCP, FLAGS, Bitwise(b"\6", b"\1"), Cmp(EQ, b"\2")),
        (*TCP, FLAGS, Bitwise(b"\6", b"\0"), Cmp(EQ, b"\0")),
        (*TCP, FLAGS, Bitwise(b"\x42", b"\0"), Cmp(EQ, b"\2")),
        (*TCP, FLAGS, Cmp(EQ, b"\2")),
        (STATUS, Bitwise(SNAT, SNAT), Cmp(EQ, SNAT)),
        (STATUS, Bitwise(EITHER, bytes(4)), Cmp(NEQ, SNAT)),
    ],
    ids=str,
)
def test_what_the_printer_does_not_know_is_an_error(expressions: tuple[Expression, ...]) -> None:
    state = State("", {"c": Chain("c")}, {"c": [Rule("c", expressions, "")]})
    with pytest.raises(NotImplementedError, match="the printer does not know"):
        listing(Table(Family.V4, TABLE), state)


@pytest.fixture(scope="module")
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


def assert_same(
    namespace: str,
    family: Family,
    hook: Hook,
    expressions: tuple[Expression, ...],
    printed: str,
    written: str,
) -> None:
    """A rule of ours and one that nft makes of its text are one, and printed the same."""
    chain = Chain("c", BaseChain("filter", hook, PRIORITY_RAW))
    parts: list[Operation] = [
        AddTable("a"),
        AddMap(PEERS),
        AddChain(chain),
        AddRule(Rule("c", expressions, "r")),
    ]
    fake = FakeNft(family)
    fake.commit(parts)
    assert fake.state
    text = listing(Table(family, TABLE), fake.state)
    assert f'\t\t{printed} comment "r"\n' in text

    def ours() -> tuple[str, list[str]]:
        with Nft(family, TABLE) as kernel:
            kernel.commit(parts)
            try:
                return listed(family)
            finally:
                kernel.commit([DeleteTable()])

    def of_text() -> tuple[str, list[str]]:
        nft("-f", "-", stdin=text.replace(printed, written))
        try:
            return listed(family)
        finally:
            nft("flush", "ruleset")

    assert netns.run(namespace, ours) == netns.run(namespace, of_text)
    assert netns.run(namespace, of_text)[0] == text
