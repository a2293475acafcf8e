"""Notice that somebody changed nftables, and set right what is ours.

Every change of any ruleset raises the kernel's generation number, and asking for it takes microseconds; so
the tables themselves are only looked at when it has moved. Listening to nftables' events instead would make
the kernel write one for each of our own elements, 100,000 when services are loaded. As each batch raises
the number by one, counting our own tells whether anybody else changed something: only then is there anything
to look for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cni.rules import Rules

log = logging.getLogger("podwire.sync")

LOOK_SECONDS = 1.0
"""At most one look in this time, however often others change something."""


class Keeper:
    """The watch over the tables of pods and services; used by one thread.

    `intact` tells whether the service proxy's tables have all of their rules, and `commits` how many batches
    it has committed. `mended` is called when the rules of pods were not whole, and `suspect` when somebody
    else changed some ruleset, be it one element of the service proxy's.
    """

    def __init__(
        self,
        rules: Rules,
        intact: Callable[[], bool],
        commits: Callable[[], int],
        mended: Callable[[], None],
        suspect: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._intact = intact
        self._commits = commits
        self._mended = mended
        self._suspect = suspect
        self._clock = clock
        self._seen: int | None = None
        self._others: int | None = None
        self._looked = float("-inf")

    def look(self) -> bool:
        """Set the rules of pods right; return whether the service proxy's are still as they should be."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return True
        generation, own = self._rules.generation()
        if generation == self._seen:
            return True
        others = generation - own - self._commits()
        if others == self._others:
            self._seen = generation
            return True
        self._looked = now
        # A batch of ours that changed nothing has not raised the number: it is less by one then.
        if self._others is not None and others > self._others:
            log.debug("somebody else has changed a ruleset")
            self._suspect()
        self._others = others
        changed = self._rules.reconcile()
        if changed and self._seen is not None:
            log.warning("somebody changed the rules of pods: %d elements or tables set again", changed)
            self._mended()
        self._seen = generation
        return self._intact()
