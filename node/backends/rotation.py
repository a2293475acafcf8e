"""The change of a node's WireGuard keys without loss: what is known, the time → the next step. Pure.

    idle ─▶ spare ──▶ detour ──▶ usual ──▶ idle
            new key   packets    new key   packets are back
            of pwwg1, take       of pwwg0, on pwwg0
            unused    pwwg1      unused

The two new keys are made when nothing is sent by their device, and it is left alone until every peer has made
a session with the new key. A device that a peer does not know the key of would lose that peer's packets, so
what does not come to an end is given up, or waited for where there is no way back, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from node.backends.hops import Turning

WAIT_SECONDS = 180.0
"""So long peers may take to know a new key; and so old the session of one that is alive can be, on a device
with keepalive (REJECT_AFTER_TIME)."""
SETTLE_SECONDS = 30.0
"""So long a peer has to make a session by keepalive, a few tries, before it is taken for one that is away."""
LEAST_SECONDS = 10.0
"""So long the detour is there before the first device's key changes: peers learn of it by their Node objects,
each when it does, and nothing says that one has."""
QUIET_SECONDS = 3.0
"""So long nothing may arrive by the first device before its key changes."""
KEEPALIVE_SECONDS = 10


class Step(Enum):
    """Where a change of keys is."""

    IDLE = "idle"
    SPARE = "spare"
    DETOUR = "detour"
    USUAL = "usual"


class Observed(NamedTuple):
    """What is seen of peers, by node: when the last handshake on each device was (seconds since the epoch,
    0: never), and how many bytes have come by the first. `busy`: another node is changing its keys.
    `published`: our own Node object says what it is to say.
    """

    handshakes: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {})
    received: Mapping[str, int] = {}
    busy: str = ""
    published: bool = True


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where a change of keys is, since when, and which peers it waits for.

    `asked`: one is to be made. `finished` is when the last one was (0: never); times are in seconds since
    the epoch. `total` and `moved`: how many bytes have come by the first device, and when the last ones did.
    `problem` is what is in its way, or why the last one was given up; a sentence.
    """

    step: Step = Step.IDLE
    asked: bool = False
    since: float = 0.0
    expected: frozenset[str] = frozenset()
    finished: float = 0.0
    total: int = -1
    moved: float = 0.0
    problem: str = ""

    @property
    def detour(self) -> bool:
        """Whether packets of this node are to take the second device."""
        return self.step in (Step.DETOUR, Step.USUAL)

    @property
    def turning(self) -> Turning:
        """What the network has to do for it. The device that is to fall silent must not be kept awake."""
        on = KEEPALIVE_SECONDS
        both = self.step in (Step.SPARE, Step.USUAL)
        return Turning(self.detour, (on, on) if both else (0, on if self.detour else 0))

    @property
    def active(self) -> bool:
        """Whether there is something to do."""
        return self.asked or self.step is not Step.IDLE


class Next(NamedTuple):
    """The state after a step, and the device (0 or 1) that gets a new key before it counts."""

    rotation: Rotation
    new_key: int | None = None


def advance(rotation: Rotation, seen: Observed, now: float) -> Next:
    """Return what follows; the same state where nothing does."""
    match rotation.step:
        case Step.IDLE:
            return _begin(rotation, seen, now)
        case Step.SPARE:
            return _spare(rotation, seen, now)
        case Step.DETOUR:
            return _detour(rotation, seen, now)
        case Step.USUAL:
            return _usual(rotation, seen, now)


def _begin(rotation: Rotation, seen: Observed, now: float) -> Next:
    if not rotation.asked:
        return Next(rotation)
    if seen.busy:
        return Next(replace(rotation, problem=f"keys are not changed yet: {seen.busy}"))
    expected = frozenset(seen.handshakes[0])
    begun = Rotation(Step.SPARE, since=now, expected=expected, finished=rotation.finished)
    return Next(begun, new_key=1)


def _spare(rotation: Rotation, seen: Observed, now: float) -> Next:
    missing = _missing(rotation, seen, now, slot=1)
    if not missing:
        return Next(Rotation(Step.DETOUR, since=now, finished=rotation.finished, moved=now))
    if now - rotation.since < WAIT_SECONDS:
        return Next(rotation)
    words = f"the change of keys was given up: {_named(missing)} did not take the new ones"
    return Next(Rotation(finished=rotation.finished, problem=words))


def _detour(rotation: Rotation, seen: Observed, now: float) -> Next:
    total = sum(seen.received.values())
    if total != rotation.total or not seen.published:
        rotation = replace(rotation, total=total, moved=now)
    if now - rotation.since >= LEAST_SECONDS and now - rotation.moved >= QUIET_SECONDS:
        expected = frozenset(seen.handshakes[1])
        return Next(Rotation(Step.USUAL, since=now, expected=expected, finished=rotation.finished), new_key=0)
    if now - rotation.since >= WAIT_SECONDS:
        words = "the change of keys was given up: some node still sends by the device that is to change"
        return Next(Rotation(finished=rotation.finished, problem=words))
    return Next(rotation)


def _usual(rotation: Rotation, seen: Observed, now: float) -> Next:
    missing = _missing(rotation, seen, now, slot=0)
    if not missing:
        return Next(Rotation(finished=now))
    if now - rotation.since < WAIT_SECONDS:
        return Next(rotation)
    # Back on the first device these would reach nobody; the second one works as well.
    words = f"the change of keys waits for {_named(missing)}, which did not take the last one yet"
    return Next(replace(rotation, problem=words))


def _missing(rotation: Rotation, seen: Observed, now: float, slot: int) -> list[str]:
    """Return the peers that have no session by the new key of a device, but for those that are away.

    These are known, after a while, by having none on the other device either.
    """
    there, other = seen.handshakes[slot], seen.handshakes[1 - slot]
    missing = sorted(n for n in rotation.expected if n in there and there[n] <= rotation.since)
    if now - rotation.since < SETTLE_SECONDS:
        return missing
    return [node for node in missing if now - other.get(node, 0.0) < WAIT_SECONDS]


def _named(nodes: list[str]) -> str:
    shown = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
    return f"node {shown}" if len(nodes) == 1 else f"nodes {shown}"
