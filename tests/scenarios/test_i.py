"""Scenario I, on real traffic: services that ask for it go by the L7 proxy of the client's node."""

from __future__ import annotations

from lab.cases import PROXIED, Case
from lab.checks import run_case
from lab.world import World
from tests.scenarios.forms import IPTABLES, MAIN, each


@each(PROXIED, *MAIN, IPTABLES)
def test_it_is_as_expected(world: World, case: Case) -> None:
    row = run_case(world, case)
    assert row.passed, f"expected {row.expected}, saw {row.saw}"
