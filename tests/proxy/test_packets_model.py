"""The packet-trace table against the pure model: rules as values, walked in memory."""

from __future__ import annotations

from collections import Counter

import pytest

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from netlink.nftables.trace import Outcome, Packet, outcomes
from proxy.nftables.dataplane import Dataplane
from tests.proxy.plan import OWN, PLACES, SERVICES, both, node_ranges, place, programmed, twin
from tests.proxy.plan_cases import CASES, GROUPS, MODEL_ONLY
from tests.proxy.plan_lines import Case, where

LOCAL = frozenset(place(name, family) for name in OWN for family in Family)


@pytest.fixture(scope="module")
def tables() -> dict[Family, FakeNft]:
    """The whole plan, loaded in both families."""
    found = {family: FakeNft(family) for family in Family}
    for family, fake in found.items():
        Dataplane(fake).load(programmed(family), node_ranges())
    return found


def _end(outcome: Outcome) -> str:
    return where(outcome.destination, outcome.port) if outcome.verdict == "accept" else outcome.verdict


@pytest.mark.parametrize("case", (*CASES, *MODEL_ONLY), ids=str)
def test_packet(tables: dict[Family, FakeNft], case: Case) -> None:
    state = tables[case.family].state
    assert state
    packet = Packet(
        case.source, case.destination, case.protocol.value, case.port, from_node=case.source in LOCAL
    )
    found = outcomes(state, packet, LOCAL)
    matched = "\n".join(f"{o.verdict} {o.destination}:{o.port}: {' | '.join(o.rules)}" for o in found)
    assert {_end(o) for o in found} == case.expected, matched
    assert {_end(o) for o in found if o.masqueraded} == case.masqueraded, matched


def test_the_table_has_enough_cases_and_none_twice() -> None:
    assert len(CASES) >= 150
    cases = (*CASES, *MODEL_ONLY)
    for what in (str, lambda c: (c.source, c.destination, c.port, c.protocol)):
        assert not [w for w, n in Counter(map(what, cases)).items() if n > 1]


def test_every_group_names_its_documentation() -> None:
    assert all(found.cases and found.documentation for found in GROUPS)


def test_an_address_has_one_twin() -> None:
    addresses = {
        *PLACES.values(),
        *(a for s in SERVICES for a in (*s.cluster_ips, *s.external_ips)),
        "10.1.1.0",
    }
    found = [twin(a) for a in addresses if ":" not in a]
    assert len(set(found)) == len(found)
    assert twin("10.244.1.10") == "fd00:10:244:1::10"
    assert both("10.244.1.0/24", "0.0.0.0/0") == ("10.244.1.0/24", "0.0.0.0/0", "fd00:10:244:1::/64", "::/0")
