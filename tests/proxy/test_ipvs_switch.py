"""From another dataplane to IPVS and back under traffic: each packet meets one of them, the same verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from netlink import netns
from netlink.family import Family
from tests.proxy import world
from tests.proxy.dataplanes import IPVS, KINDS, Kind, needs_ipvs
from tests.proxy.plan import node_ranges, place, programmed
from tests.proxy.plan_cases import CASES
from tests.proxy.test_iptables_switch import Conversation, _chooses, verdicts


@pytest.fixture(scope="module")
def lab(namespaces: Callable[[], str]) -> Iterator[world.World]:
    needs_ipvs()
    built = world.build(namespaces, CASES)
    with world.answering(built.servers):
        yield built


@pytest.mark.parametrize("other", KINDS, ids=str)
def test_a_switch_to_it_breaks_nothing_and_one_from_it_no_new_connection(
    lab: world.World, other: Kind
) -> None:
    """What IPVS has balanced ends when it goes; UDP that goes on is answered, by another endpoint maybe.

    So do connections with affinity to node ports, as they look the same, whoever has translated them.
    """

    def do(what: Callable[[Family], None]) -> None:
        for family in Family:
            netns.run(lab.node, what, family)

    def load(kind: Kind) -> Callable[[Family], None]:
        return lambda family: kind.load(family, programmed(family), node_ranges())

    some = [c for c in CASES if _chooses(c)]
    old: list[Conversation] = []
    balanced: list[Conversation] = []
    do(load(other))
    try:
        old += [Conversation(lab, case) for case in some]
        do(load(IPVS))
        verdicts(lab)
        assert all(flow.goes_on() for flow in old)
        do(other.remove)
        verdicts(lab)
        assert all(flow.goes_on() for flow in old)
        balanced += [Conversation(lab, case) for case in some]
        do(load(other))
        verdicts(lab)
        assert all(flow.goes_on() for flow in (*old, *balanced))
        do(IPVS.remove)
        verdicts(lab)
        assert all(flow.goes_on() for flow, case in zip(old, some, strict=True) if not case.sticky)
        assert all(flow.ask() for flow in (*old, *balanced))
    finally:
        for flow in (*old, *balanced):
            flow.close()
        do(other.remove)
        do(IPVS.remove)


def test_there_are_flows_to_switch() -> None:
    """Of pods and of outside clients, in both families."""
    sources = {case.source for case in CASES if _chooses(case)}
    assert sources == {place(name, family) for name in ("pod1b", "client") for family in Family}
