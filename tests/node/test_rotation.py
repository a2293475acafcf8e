"""A change of WireGuard keys, step by step: what it waits for, when it is given up, what a crash leaves."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.backends.hops import Turning
from node.backends.rotation import (
    KEEPALIVE_SECONDS,
    LEAST_SECONDS,
    QUIET_SECONDS,
    SETTLE_SECONDS,
    WAIT_SECONDS,
    Next,
    Observed,
    Rotation,
    Step,
    advance,
)

NOW = 1_000_000.0
ASKED = Rotation(asked=True)
OLD = NOW - 100


def seen(first: dict[str, float], second: dict[str, float] | None = None, **more: object) -> Observed:
    return Observed((first, second if second is not None else dict.fromkeys(first, 0.0)))._replace(**more)  # type: ignore[arg-type]


def at(step: Step, *nodes: str, since: float = NOW, **more: float) -> Rotation:
    return Rotation(step, since=since, expected=frozenset(nodes), **more)  # type: ignore[arg-type]


def test_nothing_is_done_unless_somebody_asks() -> None:
    assert advance(Rotation(), seen({"a": OLD}), NOW) == Next(Rotation())


def test_it_begins_with_a_new_key_of_the_device_that_nobody_uses() -> None:
    found = advance(ASKED, seen({"a": OLD, "b": 0.0}), NOW)
    assert found == Next(at(Step.SPARE, "a", "b"), new_key=1)


def test_it_does_not_begin_while_another_node_is_at_it() -> None:
    after, key = advance(ASKED, seen({"a": OLD}, busy="node a is changing its own"), NOW)
    assert (after.step, after.asked, key) == (Step.IDLE, True, None)
    assert after.problem == "keys are not changed yet: node a is changing its own"


def test_packets_take_the_detour_when_every_peer_has_a_session_there() -> None:
    begun = at(Step.SPARE, "a", "b")
    assert advance(begun, seen({"a": OLD, "b": OLD}, {"a": NOW + 1, "b": OLD}), NOW + 2) == Next(begun)
    after, key = advance(begun, seen({"a": OLD, "b": OLD}, {"a": NOW + 1, "b": NOW + 1}), NOW + 2)
    assert (after.step, after.detour, key) == (Step.DETOUR, True, None)


def test_a_peer_that_goes_away_is_not_waited_for() -> None:
    after, _ = advance(at(Step.SPARE, "a", "b"), seen({"a": OLD}, {"a": NOW + 1}), NOW + 2)
    assert after.step is Step.DETOUR, "its Node object is gone"


def test_a_peer_without_a_session_on_either_device_is_away() -> None:
    begun, found = at(Step.SPARE, "a", "b"), seen({"a": OLD, "b": NOW - 1000}, {"a": NOW + 1, "b": 0.0})
    assert advance(begun, found, NOW + SETTLE_SECONDS - 1).rotation.step is Step.SPARE
    assert advance(begun, found, NOW + SETTLE_SECONDS).rotation.step is Step.DETOUR


def test_it_is_given_up_while_that_costs_nothing_if_a_peer_does_not_take_the_key() -> None:
    late = NOW + WAIT_SECONDS
    found = seen({"a": late - 5, "b": late - 5}, {"a": NOW + 1, "b": 0.0})
    assert advance(at(Step.SPARE, "a", "b"), found, late - 1).rotation.step is Step.SPARE
    after, key = advance(at(Step.SPARE, "a", "b", finished=5.0), found, late)
    assert (after.step, after.finished, key) == (Step.IDLE, 5.0, None)
    assert after.problem == "the change of keys was given up: node b did not take the new ones"


def test_the_usual_device_gets_its_key_when_nothing_comes_by_it_any_more() -> None:
    rotation, now = at(Step.DETOUR), NOW
    for received in (100, 200, 300):
        rotation = advance(rotation, seen({"a": OLD}, {"a": OLD}, received={"a": received}), now).rotation
        now += LEAST_SECONDS
    assert rotation.step is Step.DETOUR, "something came each time"
    quiet = seen({"a": OLD}, {"a": OLD}, received={"a": 300})
    moved = now - LEAST_SECONDS
    assert advance(rotation, quiet, moved + QUIET_SECONDS - 0.1).new_key is None
    assert advance(rotation, quiet, moved + QUIET_SECONDS) == Next(
        at(Step.USUAL, "a", since=moved + QUIET_SECONDS), new_key=0
    )


def test_the_detour_lasts_a_while_and_our_node_object_says_so() -> None:
    begun, quiet = at(Step.DETOUR, total=7, moved=NOW - 60), seen({}, received={"a": 7})
    assert advance(begun, quiet, NOW + LEAST_SECONDS - 1).new_key is None
    assert advance(begun, quiet, NOW + LEAST_SECONDS).new_key == 0
    assert advance(begun, quiet._replace(published=False), NOW + LEAST_SECONDS).new_key is None


def test_it_is_given_up_if_somebody_goes_on_sending_by_the_usual_device() -> None:
    after, key = advance(at(Step.DETOUR), seen({}, received={"a": 9}), NOW + WAIT_SECONDS)
    assert (after.step, after.detour, key) == (Step.IDLE, False, None)
    assert "still sends by the device" in after.problem


def test_packets_come_back_when_every_peer_has_a_session_by_the_new_key() -> None:
    begun = at(Step.USUAL, "a")
    assert advance(begun, seen({"a": OLD}, {"a": OLD}), NOW + 1) == Next(begun)
    assert advance(begun, seen({"a": NOW + 1}, {"a": OLD}), NOW + 2) == Next(Rotation(finished=NOW + 2))


def test_there_is_no_way_back_from_a_new_usual_key_so_it_waits_and_says_for_whom() -> None:
    late = NOW + WAIT_SECONDS
    found = seen({"a": OLD, "b": late}, {"a": late - 5, "b": late})
    after, _ = advance(at(Step.USUAL, "a", "b"), found, late)
    assert (after.step, after.detour) == (Step.USUAL, True)
    assert after.problem == "the change of keys waits for node a, which did not take the last one yet"
    away = seen({"a": OLD, "b": late}, {"a": OLD, "b": late})
    assert advance(after, away, late + WAIT_SECONDS).rotation.step is Step.IDLE


def test_many_that_are_missing_are_counted() -> None:
    names = [f"n{i}" for i in range(9)]
    late = NOW + WAIT_SECONDS
    after, _ = advance(at(Step.SPARE, *names), seen(dict.fromkeys(names, late)), late)
    assert "nodes n0, n1, n2 and 6 more did not" in after.problem


@pytest.mark.parametrize(("step", "wanted"), [
    (Step.IDLE, Turning()),
    (Step.SPARE, Turning(False, (KEEPALIVE_SECONDS, KEEPALIVE_SECONDS))),
    (Step.DETOUR, Turning(True, (0, KEEPALIVE_SECONDS))),
    (Step.USUAL, Turning(True, (KEEPALIVE_SECONDS, KEEPALIVE_SECONDS))),
])  # fmt: skip
def test_a_device_is_kept_awake_only_while_it_is_to_make_sessions(step: Step, wanted: Turning) -> None:
    assert Rotation(step).turning == wanted


@given(
    st.lists(
        st.tuples(
            st.floats(0, 300),
            st.dictionaries(st.sampled_from("abc"), st.floats(0, NOW * 2)),
            st.dictionaries(st.sampled_from("abc"), st.floats(0, NOW * 2)),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_no_key_in_use_is_ever_replaced(
    rounds: list[tuple[float, dict[str, float], dict[str, float], int, bool]],
) -> None:
    """Whatever is seen: pwwg1's key changes without a detour, pwwg0's during one."""
    rotation, now = ASKED, NOW
    for wait, first, second, received, busy in rounds:
        now += wait
        found = Observed((first, second), {"a": received}, "node b is" if busy else "")
        before, (rotation, key) = rotation, advance(rotation, found, now)
        assert key is None or key == (0 if before.detour else 1)
        assert key is None or rotation.step is (Step.USUAL if key == 0 else Step.SPARE)
        order = [Step.IDLE, Step.SPARE, Step.DETOUR, Step.USUAL]
        was, is_ = order.index(before.step), order.index(rotation.step)
        assert is_ in (was, (was + 1) % 4, 0) and not (before.step is Step.USUAL and is_ == 1)
        assert msgspec.json.decode(msgspec.json.encode(rotation), type=Rotation) == rotation
        if rotation.step is Step.IDLE:
            rotation = replace(rotation, asked=True)
