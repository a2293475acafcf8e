"""Changes are gathered as long as syncs are dear, and hardly at all on an idle node."""

from __future__ import annotations

from node.pacing import IDLE, LONGEST, SHORTEST, TIMES, Pacer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_change_hardly_waits() -> None:
    assert Pacer(Clock()).gather() == SHORTEST


def test_while_changes_keep_coming_syncs_take_a_share_of_the_time() -> None:
    pacer = Pacer(Clock())
    for _ in range(50):
        pacer.synced(0.010)
    assert abs(pacer.gather() - TIMES * 0.010) < 1e-4


def test_nothing_waits_longer_than_a_second_however_dear_syncs_are() -> None:
    pacer = Pacer(Clock())
    for _ in range(50):
        pacer.synced(5.0)
    assert pacer.gather() == LONGEST < 1.0


def test_after_a_quiet_time_a_change_waits_5_ms_at_most() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    pacer.synced(0.200)
    assert pacer.gather() > IDLE
    clock.now += 1.0
    assert pacer.gather() == IDLE <= 0.005


def test_one_dear_sync_is_forgotten_by_cheap_ones() -> None:
    pacer = Pacer(Clock())
    pacer.synced(1.0)
    for _ in range(30):
        pacer.synced(0.0003)
    assert pacer.gather() == SHORTEST
