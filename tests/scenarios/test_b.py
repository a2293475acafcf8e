"""Scenario B, on real traffic."""

from lab.cases import B, Case
from lab.checks import run_case
from lab.world import World
from tests.scenarios.forms import MAIN, MORE, each


@each(B, *MAIN, *MORE)
def test_it_is_as_expected(world: World, case: Case) -> None:
    row = run_case(world, case)
    assert row.passed, f"expected {row.expected}, saw {row.saw}\n" + "\n".join(row.path)
