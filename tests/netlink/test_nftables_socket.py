"""Batches that span tables and families, and the generation of the ruleset."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import BatchError, NftSocket
from netlink.nftables.expressions import (
    Base,
    Bitwise,
    Cmp,
    Compare,
    Do,
    ExtensionHeader,
    Lookup,
    Meta,
    MetaKey,
    Payload,
    Verdict,
)
from netlink.nftables.objects import BRIDGE, Chain, Field, Map, Rule, Table, TableFamily
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteTable,
    Operation,
)
from tests.netlink.nft import reloaded

FAMILIES: tuple[TableFamily, ...] = (*Family, BRIDGE)
TABLES = [Table(family, "several") for family in FAMILIES]
PORTS = Map("ports", (Field.L4PROTO, Field.DPORT), comment="some ports")
NAMES = Map("names", (Field.IIFNAME,), comment="some interfaces")
HTTP = bytes((6, 0, 0, 0, 0, 80, 0, 0))


@pytest.fixture
def nft(namespaces: Callable[[], str]) -> Iterator[NftSocket]:
    with ExitStack() as stack:
        yield netns.run(namespaces(), stack.enter_context, NftSocket())


def test_one_batch_makes_tables_of_all_families(nft: NftSocket) -> None:
    before = nft.generation()
    operations = [AddTable("one of several"), AddMap(PORTS), AddElements(PORTS, [(HTTP, None)])]
    nft.commit(*((table, operations) for table in TABLES))
    assert nft.generation() == before + 1
    for table in TABLES:
        assert nft.table_comment(table) == "one of several"
        assert nft.elements(table, PORTS) == {HTTP: None}


def test_a_refusal_in_one_table_undoes_the_others(nft: NftSocket) -> None:
    wrong: list[Operation] = [AddTable(""), AddElements(PORTS, [(HTTP, None)])]
    with pytest.raises(BatchError) as caught:
        nft.commit((TABLES[0], [AddTable("")]), (TABLES[2], wrong), (TABLES[1], [AddTable("")]))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.operation == wrong[1]
    assert [nft.table_comment(table) for table in TABLES] == [None] * 3


def test_the_generation_changes_with_every_change_and_by_nothing_else(nft: NftSocket) -> None:
    first = nft.generation()
    assert nft.generation() == first
    nft.commit((TABLES[0], [AddTable("")]))
    second = nft.generation()
    assert second != first
    nft.table_comment(TABLES[0])
    assert nft.generation() == second
    nft.commit((TABLES[0], []))
    assert nft.generation() == second


def test_a_batch_for_a_past_generation_is_refused_as_outdated(nft: NftSocket) -> None:
    seen = nft.generation()
    nft.commit((TABLES[0], [AddTable("")]), generation=seen)
    with pytest.raises(BatchError) as caught:
        nft.commit((TABLES[1], [AddTable("")]), generation=seen)
    assert caught.value.outdated
    assert nft.table_comment(TABLES[1]) is None
    nft.commit((TABLES[1], [AddTable("")]), generation=nft.generation())
    with pytest.raises(BatchError) as refused:
        nft.commit((TABLES[1], [AddTable("")]))
    assert not refused.value.outdated


def test_tables_of_one_name_are_told_apart_by_family(nft: NftSocket) -> None:
    nft.commit((TABLES[0], [AddTable(""), AddChain(Chain("one"))]), (TABLES[2], [AddTable("")]))
    nft.commit((TABLES[2], [DeleteTable()]))
    assert nft.chains(TABLES[0]) == {"one"}
    assert nft.chains(TABLES[2]) == frozenset()
    assert str(TABLES[2]) == "bridge several"


def test_nft_prints_and_reloads_every_field_and_expression_of_frames(namespaces: Callable[[], str]) -> None:
    fields = (Field.IIFNAME, Field.ETHER_SOURCE, Field.IPV4_SOURCE, Field.IPV6_SOURCE, Field.ND_TARGET)
    maps = [Map(f"m{i}", (Field.IIFNAME, f), comment=f.value) for i, f in enumerate(fields[1:])]
    mac = (Meta(MetaKey.IIFNAME), Payload(Base.LINK, 6, 6, 4), Lookup("m0"), Do(Verdict.ACCEPT))
    fragment = (
        ExtensionHeader(44, 2, 2),
        Bitwise(b"\xff\xf8", bytes(2)),
        Cmp(Compare.NEQ, bytes(2)),
        Do(Verdict.DROP),
    )
    ipv4 = (Meta(MetaKey.PROTOCOL), Cmp(Compare.EQ, b"\x08\x00"), Do(Verdict.DROP))

    def inside() -> None:
        name = b"pwx".ljust(16, b"\0")
        with NftSocket() as nft:
            operations: list[Operation] = [AddTable("frames"), AddChain(Chain("c"))]
            operations += [AddMap(which) for which in (*maps, NAMES)]
            operations += [AddRule(Rule("c", rule, "a rule")) for rule in (mac, fragment, ipv4)]
            for which in maps:
                size = which.key_size(BRIDGE) - 16
                operations.append(AddElements(which, [(name + bytes([2]) + bytes(size - 1), None)]))
            nft.commit((TABLES[2], operations))
        printed = reloaded()
        for words in (
            "typeof iifname . ether saddr",
            "typeof iifname . ip saddr",
            "typeof iifname . ip6 saddr",
            "typeof iifname . @th,64,128",
            '"pwx" . 2.0.0.0',
            "iifname . ether saddr @m0 accept",
            "frag frag-off != 0 drop",
        ):
            assert words in printed

    netns.run(namespaces(), inside)


def test_a_batch_may_end_with_an_operation_on_nothing(nft: NftSocket) -> None:
    nothing = AddElements(PORTS, [])
    nft.commit((TABLES[0], [AddTable(""), AddMap(PORTS), nothing]))
    before = nft.generation()
    nft.commit((TABLES[0], [nothing]))
    assert nft.generation() == before


def test_a_socket_is_opened_once(nft: NftSocket) -> None:
    """Opened again, in another namespace, it would work on the wrong ruleset."""
    with pytest.raises(RuntimeError, match="open already"):
        nft.__enter__()
