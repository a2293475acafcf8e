import pytest

from lab.cases import CASES, Case, fair_share, judge
from lab.probe import Answer, Failure

ONE = Case("B", "a", ("b",), seen=("a",))
SPREAD = Case("C", "a", ("b", "c"), "service/x", ("a",), 120)
NOBODY = Case("D", "a", (), "node2:30181")
UNANSWERED = Case("E", "a", (), "lb/front:81", dropped=False)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.scenario for case in CASES} == set("ABCDEFI")


@pytest.mark.parametrize(
    ("case", "results", "passed"),
    [
        (ONE, [Answer("b", "10.0.0.1")], True),
        (ONE, [Answer("b", "10.0.0.2")], False),  # masqueraded where it must not be
        (ONE, [Answer("c", "10.0.0.1")], False),  # the wrong server
        (ONE, [Failure("refused")], False),
        (SPREAD, [Answer("b", "10.0.0.1"), Answer("c", "10.0.0.1")] * 60, True),
        (SPREAD, [Answer("b", "10.0.0.1")] * 120, False),  # no spread
        (SPREAD, [Answer("b", "10.0.0.1")] * 59 + [Answer("c", "10.0.0.1")] * 60 + [Failure("x")], False),
        (NOBODY, [Failure("timed out")], True),
        (NOBODY, [Failure("refused")], False),  # dropped is not refused
        (NOBODY, [Answer("b", "10.0.0.1")], False),
        (UNANSWERED, [Failure("refused")], True),
        (UNANSWERED, [Answer("b", "10.0.0.1")], False),
    ],
)
def test_an_outcome_passes_only_when_all_of_it_is_as_expected(
    case: Case, results: list[Answer | Failure], passed: bool
) -> None:
    assert judge(case, results, ["10.0.0.1"])[2] is passed


def test_a_fair_share_is_around_the_mean_and_never_nothing() -> None:
    assert fair_share(120, 2) == (32, 88)
    assert fair_share(2, 2)[0] == 1
