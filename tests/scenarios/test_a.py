"""Scenario A, on real traffic."""

import pytest

from lab.cases import A, Case
from lab.demo import World, run_case


@pytest.mark.parametrize("case", A, ids=lambda case: case.name)
def test_it_is_as_expected(world: World, case: Case) -> None:
    row = run_case(world, case)
    assert row.passed, f"expected {row.expected}, saw {row.saw}\n" + "\n".join(row.path)
