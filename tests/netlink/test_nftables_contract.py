"""One contract for the kernel's nftables and the fake: the same operations, the same refusals."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from netlink import netns
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import BatchError, Nft, Nftables
from netlink.nftables.expressions import Do, LimitOver, Meta, MetaKey, Verdict, VerdictLookup
from netlink.nftables.objects import Chain, Field, Goto, Map, Rule
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteChain,
    DeleteElements,
    DeleteTable,
    EnsureElements,
    FlushMap,
)
from tests.netlink.nft import Use, reloaded

PORTS = Map("ports", (Field.L4PROTO, Field.DPORT), verdicts=True)
TARGETS = Map("targets", (Field.L4PROTO, Field.DPORT, Field.INDEX), data=(Field.DESTINATION, Field.DPORT))
RANGES = Map("ranges", (Field.SOURCE,), interval=True)
LIMITS = Map("limits", (Field.IIFNAME,), limits=True)
SKELETON = (AddTable("a comment"), AddMap(PORTS), AddMap(TARGETS), AddMap(RANGES), AddChain(Chain("one")))

HTTP, DNS = bytes((6, 0, 0, 0, 0, 80, 0, 0)), bytes((17, 0, 0, 0, 0, 53, 0, 0))
FIRST, SECOND = HTTP + bytes(4), HTTP + bytes((1, 0, 0, 0))
ETH0, ETH1 = (name.ljust(16, b"\0") for name in (b"eth0", b"eth1"))
POD = bytes((10, 0, 0, 1, 31, 144, 0, 0))


def test_what_is_committed_is_read_back(use: Use) -> None:
    def check(nft: Nftables) -> None:
        assert nft.table_comment() is None
        nft.commit(
            [
                *SKELETON,
                AddElements(PORTS, [(HTTP, Goto("one")), (DNS, Goto(""))]),
                AddElements(TARGETS, [(FIRST, POD)]),
                AddElements(RANGES, [(bytes((10, 0, 0, 0, 0)), None), (bytes((10, 0, 1, 0, 1)), None)]),
            ]
        )
        assert nft.table_comment() == "a comment"
        assert nft.chains() == {"one"}
        assert nft.elements(PORTS) == {HTTP: Goto("one"), DNS: Goto("")}
        assert nft.elements(TARGETS) == {FIRST: POD}
        assert set(nft.elements(RANGES)) == {bytes((10, 0, 0, 0, 0)), bytes((10, 0, 1, 0, 1))}
        nft.commit([DeleteTable()])
        assert nft.table_comment() is None

    use(check)


def test_an_element_can_be_replaced_in_one_batch(use: Use) -> None:
    def check(nft: Nftables) -> None:
        other = bytes((10, 0, 0, 2, 31, 144, 0, 0))
        nft.commit([*SKELETON, AddElements(TARGETS, [(FIRST, POD)])])
        nft.commit([DeleteElements(TARGETS, [(FIRST, POD)]), AddElements(TARGETS, [(FIRST, other)])])
        assert nft.elements(TARGETS) == {FIRST: other}

    use(check)


def test_a_map_can_be_emptied_and_filled_in_one_batch(use: Use) -> None:
    def check(nft: Nftables) -> None:
        other = bytes((10, 0, 0, 2, 31, 144, 0, 0))
        nft.commit([*SKELETON, AddElements(TARGETS, [(FIRST, POD), (SECOND, POD)])])
        nft.commit([FlushMap(TARGETS), AddElements(TARGETS, [(FIRST, other)])])
        assert nft.elements(TARGETS) == {FIRST: other}
        nft.commit([FlushMap(TARGETS), FlushMap(PORTS)])
        assert nft.elements(TARGETS) == {}

    use(check)


def test_a_refused_batch_changes_nothing_and_names_the_element(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit([*SKELETON, AddElements(TARGETS, [(FIRST, POD)])])
        with pytest.raises(BatchError) as caught:
            nft.commit(
                [
                    AddElements(PORTS, [(HTTP, Goto("one"))]),
                    DeleteElements(TARGETS, [(FIRST, POD), (SECOND, POD)]),
                ]
            )
        assert caught.value.errno == errno.ENOENT
        assert caught.value.element == SECOND
        assert "targets" in str(caught.value)
        assert nft.elements(TARGETS) == {FIRST: POD}
        assert nft.elements(PORTS) == {}
        nft.commit([AddElements(TARGETS, [(SECOND, POD)])])

    use(check)


def test_each_element_of_a_set_has_its_own_limit(use: Use) -> None:
    def check(nft: Nftables) -> None:
        one, other = LimitOver(125_000, 65_536), LimitOver(14_000_000_000, 0)
        nft.commit([*SKELETON, AddMap(LIMITS), AddElements(LIMITS, [(ETH0, one), (ETH1, other)])])
        assert nft.elements(LIMITS) == {ETH0: one, ETH1: other}
        nft.commit([EnsureElements(LIMITS, [(ETH0, one)])])
        nft.commit([DeleteElements(LIMITS, [(ETH0, one)]), AddElements(LIMITS, [(ETH0, other)])])
        assert nft.elements(LIMITS) == {ETH0: other, ETH1: other}

    use(check)


def test_a_key_is_added_once(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit([*SKELETON, AddElements(TARGETS, [(FIRST, POD)])])
        with pytest.raises(BatchError) as caught:
            nft.commit([AddElements(TARGETS, [(SECOND, POD), (FIRST, POD)])])
        assert (caught.value.errno, caught.value.element) == (errno.EEXIST, FIRST)

    use(check)


def test_a_key_is_ensured_any_number_of_times_but_with_one_value(use: Use) -> None:
    def check(nft: Nftables) -> None:
        other = bytes((10, 0, 0, 2, 31, 144, 0, 0))
        nft.commit([*SKELETON, EnsureElements(TARGETS, [(FIRST, POD)])])
        nft.commit([EnsureElements(TARGETS, [(FIRST, POD), (SECOND, POD)])])
        assert nft.elements(TARGETS) == {FIRST: POD, SECOND: POD}
        with pytest.raises(BatchError) as caught:
            nft.commit([EnsureElements(TARGETS, [(SECOND, POD), (FIRST, other)])])
        assert (caught.value.errno, caught.value.element) == (errno.EEXIST, FIRST)
        assert nft.elements(TARGETS) == {FIRST: POD, SECOND: POD}

    use(check)


def test_a_verdict_to_a_missing_chain_is_refused(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit(SKELETON)
        with pytest.raises(BatchError) as caught:
            nft.commit([AddElements(PORTS, [(HTTP, Goto("nowhere"))])])
        assert (caught.value.errno, caught.value.element) == (errno.ENOENT, HTTP)

    use(check)


def test_a_chain_in_use_stays(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit([*SKELETON, AddElements(PORTS, [(HTTP, Goto("one"))])])
        with pytest.raises(BatchError) as caught:
            nft.commit([DeleteChain("one")])
        assert caught.value.errno == errno.EBUSY
        nft.commit([DeleteElements(PORTS, [(HTTP, Goto("one"))]), DeleteChain("one")])
        assert nft.chains() == set()

    use(check)


def test_a_rule_that_names_what_is_missing_is_refused(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit(SKELETON)
        lookup = Rule("one", (Meta(MetaKey.L4PROTO), VerdictLookup("nothing")), "a lookup")
        away = Rule("one", (Do(Verdict.GOTO, "nowhere"),), "a goto")
        elsewhere = Rule("nowhere", (Do(Verdict.DROP),), "a drop")
        for rule in (lookup, away, elsewhere):
            with pytest.raises(BatchError) as caught:
                nft.commit([AddRule(rule)])
            assert caught.value.errno == errno.ENOENT

    use(check)


def test_the_table_exists_once(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit(SKELETON)
        with pytest.raises(BatchError) as caught:
            nft.commit([AddTable("again")])
        assert caught.value.errno == errno.EEXIST

    use(check)


@pytest.mark.parametrize("family", Family)
def test_nft_prints_the_real_ruleset_and_loads_what_it_printed(
    family: Family, namespaces: Callable[[], str]
) -> None:
    from proxy.frontends import Masquerade
    from proxy.nftables import ruleset

    def inside() -> None:
        shapes = [(kind, 20, masquerade) for kind in ruleset.KINDS for masquerade in Masquerade]
        chains = [op for shape in shapes for op in ruleset.balance_rules(family, *shape)]
        with ExitStack() as stack:
            nft = stack.enter_context(Nft(family, ruleset.TABLE))
            nft.commit([*ruleset.base(family), *chains])
        assert "masquerade fully-random" in reloaded()

    netns.run(namespaces(), inside)


def test_an_error_is_one_sentence_with_the_errno() -> None:
    error = NetlinkError(errno.EEXIST, "cannot add chain x")
    assert str(error) == "cannot add chain x: File exists"
    assert error.exists
    assert not error.gone
