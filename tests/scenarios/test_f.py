"""Scenario F, on real traffic."""

import pytest

from lab.cases import BARE, Case, F
from lab.checks import run_case
from lab.world import World
from tests.scenarios.forms import IPTABLES, MAIN, each, view_id, views


@each(F, *MAIN, IPTABLES)
def test_it_is_as_expected(world: World, case: Case) -> None:
    row = run_case(world, case)
    assert row.passed, f"expected {row.expected}, saw {row.saw}\n" + "\n".join(row.path)


@pytest.mark.parametrize("world", views(*MAIN[:2]), ids=view_id, indirect=True)
def test_after_all_scenarios_no_pods_address_has_crossed_the_router(world: World) -> None:
    row = run_case(world, BARE)
    assert row.passed, row.saw
