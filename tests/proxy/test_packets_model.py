"""The packet-trace table against the pure model: rules as values, walked in memory, for each dataplane."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from netlink.nftables.trace import Outcome, Packet, outcomes
from proxy.iptables import walk
from proxy.iptables.dataplane import JUMPS
from proxy.iptables.plan import Plan
from proxy.nftables.dataplane import Dataplane
from tests.proxy.plan import (
    OWN,
    PLACES,
    PROXY_ADDRESSES,
    SERVICES,
    both,
    node_ranges,
    place,
    programmed,
    twin,
)
from tests.proxy.plan_cases import CASES, GROUPS, MODEL_ONLY, PROXYS_OWN
from tests.proxy.plan_lines import Case, where

LOCAL = frozenset({*(place(name, family) for name in OWN for family in Family), *PROXY_ADDRESSES})

Model = Callable[[Packet], Sequence[Outcome]]


def _nftables(family: Family) -> Model:
    fake = FakeNft(family)
    Dataplane(fake).load(programmed(family), node_ranges())
    state = fake.state
    assert state
    return lambda packet: outcomes(state, packet, LOCAL)


def _iptables(family: Family) -> Model:
    chains = Plan(family).reset(programmed(family), node_ranges())
    tables = walk.tables(chains, JUMPS)
    return lambda packet: [path.outcome for path in walk.paths(tables, packet, LOCAL)]


@pytest.fixture(scope="module", params=[_nftables, _iptables], ids=["nftables", "iptables"])
def models(request: pytest.FixtureRequest) -> dict[Family, Model]:
    """The whole plan, loaded in both families."""
    return {family: request.param(family) for family in Family}


def _end(outcome: Outcome) -> str:
    return where(outcome.destination, outcome.port) if outcome.verdict == "accept" else outcome.verdict


@pytest.mark.parametrize("case", (*CASES, *MODEL_ONLY), ids=str)
def test_packet(models: dict[Family, Model], case: Case) -> None:
    found = models[case.family](_packet(case))
    matched = "\n".join(f"{o.verdict} {o.destination}:{o.port}: {' | '.join(o.rules)}" for o in found)
    assert {_end(o) for o in found} == case.expected, matched
    assert {_end(o) for o in found if o.masqueraded} == case.masqueraded, matched


@pytest.mark.parametrize("case", PROXYS_OWN, ids=str)
def test_what_the_l7_proxy_sends_is_not_translated(models: dict[Family, Model], case: Case) -> None:
    ends = [_end(o) for o in models[case.family](_packet(case))]
    assert len(ends) == 1
    assert ends[0] in case.expected


def _packet(case: Case) -> Packet:
    own = case.source in LOCAL
    return Packet(case.source, case.destination, case.protocol.value, case.port, own, case.group)


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
