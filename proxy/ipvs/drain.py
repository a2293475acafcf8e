"""Real servers on their way out: they get no new connections, and go with the last, or when they are late."""

from __future__ import annotations

import time
from collections.abc import Callable

from netlink.ipvs import Load, Real, Virtual

MOST_SECONDS = 15 * 60.0
"""kube-proxy's (rsGracefulDeletePeriod): as long as IPVS keeps a TCP connection in which nothing happens."""
LOOK_SECONDS = 10.0
"""Between two looks at who is left."""


class Draining:
    """Who is on the way out, and until when at most. What it is on which day only the kernel knows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[Virtual, dict[Real, float]] = {}
        self._looked = float("-inf")

    def __len__(self) -> int:
        return sum(map(len, self._until.values()))

    def __contains__(self, virtual: object) -> bool:
        return virtual in self._until

    @property
    def virtuals(self) -> tuple[Virtual, ...]:
        """Return the virtual servers that somebody is leaving."""
        return tuple(self._until)

    def begin(self, virtual: Virtual, real: Real) -> None:
        """Note that a real server is to go."""
        if not self._until:
            self._looked = self._clock()
        self._until.setdefault(virtual, {})[real] = self._clock() + MOST_SECONDS

    def back(self, virtual: Virtual, real: Real) -> bool:
        """Note that a real server stays after all; return whether it was on its way out."""
        return self.ended(virtual, real)

    def ended(self, virtual: Virtual, real: Real) -> bool:
        """Note that a real server has gone; return whether it was on its way out."""
        there = self._until.get(virtual, {})
        found = there.pop(real, None) is not None
        if found and not there:
            del self._until[virtual]
        return found

    def due(self) -> bool:
        """Whether it is time to look who is left; then not for a while."""
        now = self._clock()
        if not self._until or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        return True

    def over(self, virtual: Virtual, loads: dict[Real, Load]) -> tuple[Real, ...]:
        """Return who can go: nobody's real server any more, or late. `loads`: who is there."""
        now = self._clock()
        found = []
        for real, until in self._until.get(virtual, {}).items():
            load = loads.get(real)
            if load is None or not load.active + load.inactive or now >= until:
                found.append(real)
        return tuple(found)
