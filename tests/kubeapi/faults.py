"""What goes wrong on request, and what has been counted."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque

import msgspec

from tests.kubeapi.wire import Connection

LOG_LENGTH = 5_000


class Settings(msgspec.Struct):
    """What can be set at the start and changed at any time. Times are in seconds.

    `expired_as` is how a watch from a forgotten version is told: "event" (an ERROR event in a 200 answer)
    or "status" (a 410 answer). `fresh_wait` is how long a list waits for a version that is not there yet (the
    real one: 3). `watch_life` cuts every watch after that time, without its proper end unless `cut_clean`.
    """

    history: int = 10_000
    bookmark_seconds: float = 60.0
    expired_as: str = "event"
    fresh_wait: float = 0.3
    gzip: bool = False
    watch_list: bool = True
    watch_life: float | None = None
    cut_clean: bool = False
    delay: float = 0.0


class Fault(msgspec.Struct):
    """What happens to requests that match.

    `action`: "status" (answer `code`; `plain`: as text, as priority and fairness does its 429), "hang"
    (answer nothing; a watch: begin, then nothing), "half" (send half of the answer, of a watch half of its
    first event, and close), "close" (close without an answer), "delay" (wait `seconds`, then answer). `verb`
    and `path` (a regular expression, found in path and query) limit it; None: all. `times`: how many
    requests; None: until cleared.
    """

    action: str
    verb: str | None = None
    path: str | None = None
    times: int | None = None
    code: int = 500
    retry_after: int | None = None
    plain: bool = False
    message: str = "a fault that the test asked for"
    seconds: float = 0.0


class Line(msgspec.Struct):
    """One request that was answered. `at` is monotonic; `code` 0 is none."""

    at: float
    verb: str
    target: str
    code: int
    agent: str = ""


class Counters(msgspec.Struct):
    """What happened so far. `watches` are the targets of the watches that are open."""

    verbs: dict[str, int]
    paths: dict[str, int]
    codes: dict[str, int]
    watches: list[str]
    connections: int
    version: int
    churned: int
    churning: bool

    @property
    def open_watches(self) -> int:
        """How many watches are open."""
        return len(self.watches)


class Watch:
    """One open watch, as faults see it. What is set here counts from the watch's next wake-up."""

    def __init__(self, target: str, connection: Connection) -> None:
        self.target = target
        self.connection = connection
        self.started = time.monotonic()
        self.cut: str | None = None  # "abrupt" or "clean"
        self.stalled: str | None = None  # "silent" or "partial": half an event first


class Faults:
    """The faults in force and the counters; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.watches: set[Watch] = set()
        self.verbs: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.log: deque[Line] = deque(maxlen=LOG_LENGTH)
        self.cleared = threading.Event()  # set anew by each clear: what hangs goes on waiting for it

    def add(self, fault: Fault) -> None:
        """Put a fault in force, behind those that are."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Take all faults away; what hangs is closed."""
        with self._lock:
            self._faults.clear()
            self.cleared.set()
            self.cleared = threading.Event()

    def reset(self) -> None:
        """Set the counters to nothing."""
        with self._lock:
            for counter in (self.verbs, self.paths, self.codes):
                counter.clear()
            self.log.clear()

    def met(self, verb: str, target: str) -> Fault | None:
        """Return the first fault that this request meets, and use it up by one."""
        with self._lock:
            for fault in self._faults:
                if fault.verb not in (None, verb) or (fault.path and not re.search(fault.path, target)):
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                return fault
            return None

    def count(self, verb: str, path: str) -> None:
        """Count a request that came."""
        with self._lock:
            self.verbs[verb] += 1
            self.paths[f"{verb} {path}"] += 1

    def answered(self, line: Line) -> None:
        """Note how a request was answered (a watch: when it began)."""
        with self._lock:
            self.codes[str(line.code)] += 1
            self.log.append(line)

    def open(self, watch: Watch) -> None:
        """Count a watch in."""
        with self._lock:
            self.watches.add(watch)

    def close(self, watch: Watch) -> None:
        """Count a watch out."""
        with self._lock:
            self.watches.discard(watch)

    def watching(self, path: str | None = None) -> list[Watch]:
        """Return the open watches, of targets that match only."""
        with self._lock:
            return [w for w in self.watches if not path or re.search(path, w.target)]
