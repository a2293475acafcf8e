"""How long changes are gathered before they are brought to the kernel together. Pure but for the clock.

A single change on an idle node should not wait; a storm should not be taken one change at a time, as each
sync has a cost of its own (a copy of the mappings, a commit). So the time to gather follows what syncs cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST, IDLE, LONGEST = 0.002, 0.005, 0.9
"""Seconds: at least, at most when nothing went on before, and at most ever."""
IDLE_AFTER = 0.5
TIMES = 1.0
"""Of what a sync costs: with 1, syncs take half of the time at most, however many changes come. More saves
little, as most of the cost is of each change, and makes syncs so long that an ADD waits for one."""
WEIGHT = 0.3
"""Of the last sync in the running average of what one costs."""


class Pacer:
    """Learns what syncs cost; used by the thread that does them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cost = 0.0
        self._ended = float("-inf")

    def gather(self) -> float:
        """Return how long to gather changes from the first one on (seconds)."""
        idle = self._clock() - self._ended > IDLE_AFTER
        return min(max(TIMES * self._cost, SHORTEST), IDLE if idle else LONGEST)

    def synced(self, seconds: float) -> None:
        """Note what a sync of changes has cost; not one that compared everything."""
        self._ended = self._clock()
        self._cost += WEIGHT * (seconds - self._cost)
