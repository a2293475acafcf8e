"""What the L7 proxy has done, for metrics and the command line.

- `L7View` is the proxy, as it is asked here.
- `Counts` adds up HAProxy's counters, so that they only grow, whatever HAProxy does.
- `Sampler` takes the lines of sampled requests and keeps how long these took.
- `L7Stats` puts together what there is of each service port.

    HAProxy ── show stat ──▶ Counts ──▶ L7Stats ──▶ node.l7_metrics, node.describe
            ── datagrams ──▶ Sampler ──▶ ┘
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from netlink.family import with_port
from node.logs import fields
from proxy.l7.model import Backend, Backends
from proxy.l7.stats import LINE_BYTES, Kind, Row, Totals, process_of, quantile, request, rows

log = logging.getLogger("podwire.l7")

LEAST_SECONDS = 1.0
"""How often HAProxy is asked at most: its answer has 400 bytes for each endpoint."""
TRIES = 3
RECEIVE_BYTES = 1 << 20
"""Of lines that may wait; the kernel has HAProxy drop what is more, and HAProxy never waits."""
STEPS = 4
"""Buckets in which a time doubles."""
BOUNDS = tuple(1e-4 * 2 ** (i / STEPS) for i in range(20 * STEPS))
"""A tenth of a millisecond to a minute and a half, in seconds."""
WINDOW_SECONDS = 60.0
PRUNED = 4096
"""After so many lines, what is kept of backends that are gone is forgotten."""


class L7View(Protocol):
    """The proxy of this node; every part of it is for any thread.

    `backends` are those that services ask for, `served` the names of those that packets are led to.
    `ask` has HAProxy answer a command; OSError where it cannot. `configuration` is the text in force, "" of
    none. `reloads` and `restarts` are counted from the daemon's start.
    """

    @property
    def up(self) -> bool:
        """Whether HAProxy runs."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences."""

    @property
    def backends(self) -> Backends:
        """What services ask for."""

    @property
    def served(self) -> Set[str]:
        """What packets are led to."""

    @property
    def reloads(self) -> int:
        """How often another configuration was taken."""

    @property
    def restarts(self) -> int:
        """How often it ended by itself and was started again."""

    @property
    def sampler(self) -> Sampler:
        """Who takes the sample."""

    def ask(self, command: str) -> str:
        """Return HAProxy's answer."""

    def configuration(self) -> str:
        """Return the text in force."""


Key = tuple[str, str]
"""A backend, and one of its servers, or "" for the backend itself."""


class Counted(NamedTuple):
    """What a backend or server has done since the daemon's start, and its row of now; None: HAProxy does not
    answer.
    """

    totals: Totals
    now: Row | None


class Counts:
    """HAProxy's counters, added up over its processes.

    A new process begins at zero. What an old one still does for open connections after a reload, and what one
    did between the last look and its end, is not known. Servers that went are forgotten with their counters.
    """

    def __init__(self, ask: Callable[[str], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._lock = threading.Lock()  # several may want to know at once
        self._asked = float("-inf")
        self._process = 0
        self._last: dict[Key, Totals] = {}
        self._sums: dict[Key, Totals] = {}
        self._now: dict[Key, Row] = {}

    def read(self) -> dict[Key, Counted]:
        """Return what is known of all backends and servers; HAProxy is asked at most once a second."""
        with self._lock:
            if self._clock() - self._asked >= LEAST_SECONDS:
                self._look()
                self._asked = self._clock()
            return {key: Counted(totals, self._now.get(key)) for key, totals in self._sums.items()}

    def _look(self) -> None:
        try:
            process, found = self._answers()
        except (OSError, ValueError) as error:
            log.debug("HAProxy does not tell its counters", extra=fields(error=str(error)))
            self._now = {}
            return
        if process != self._process:
            self._process, self._last = process, {}
        kinds = (Kind.BACKEND, Kind.SERVER)
        self._now = {(r.proxy, r.server): r for r in found if r.kind in kinds}
        self._sums = {
            key: self._sums.get(key, Totals()).plus(row.totals.since(self._last.get(key, Totals())))
            for key, row in self._now.items()
        }
        self._last = {key: row.totals for key, row in self._now.items()}

    def _answers(self) -> tuple[int, tuple[Row, ...]]:
        """Return rows and whose they are; a process that takes another's place in between is asked anew."""
        process = process_of(self._ask("show info"))
        for _ in range(TRIES):
            found = rows(self._ask("show stat"))
            before, process = process, process_of(self._ask("show info"))
            if process == before:
                return process, found
        raise OSError("HAProxy is reloaded all the time")


class Times(NamedTuple):
    """How long requests took: how many in each bucket of BOUNDS (the last: more), and seconds together.

    `recent` are those of the last minute or two, all if there was none.
    """

    counts: tuple[int, ...]
    seconds: float
    recent: tuple[int, ...]

    def quantile(self, share: float) -> float:
        """Return an estimate, in seconds; 0 if nothing is known. Its error is a fifth at most."""
        return quantile(share, self.recent, BOUNDS)


@dataclass(slots=True)
class _Histogram:
    """The buckets since the start, of this minute, and of the one before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0
    this: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    before: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    begun: float = 0.0

    def turn(self, now: float) -> None:
        """Begin another minute when one is over."""
        windows = (now - self.begun) // WINDOW_SECONDS
        if windows >= 1:
            empty = [0] * (len(BOUNDS) + 1)
            self.before = self.this if windows < 2 else empty
            self.this, self.begun = empty.copy(), now

    def add(self, seconds: float, now: float) -> None:
        """Count a request."""
        self.turn(now)
        at = bisect_left(BOUNDS, seconds)
        self.counts[at] += 1
        self.this[at] += 1
        self.seconds += seconds

    def times(self, now: float) -> Times:
        """Return what is known."""
        self.turn(now)
        recent = tuple(map(int.__add__, self.this, self.before))
        counts = tuple(self.counts)
        return Times(counts, self.seconds, recent if any(recent) else counts)


class Sampler:
    """Takes the sample's lines on a datagram socket, in a thread of its own; a context.

    HAProxy may run before and after it: it sends each line to whoever has the path then. `known` are the
    backends that there are; nothing is kept of others. The folder has to be there.
    """

    def __init__(
        self,
        path: Path,
        known: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._known, self._clock = path, known, clock
        self._lock = threading.Lock()
        self._kept: dict[str, _Histogram] = {}
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="l7-sample", daemon=True)
        self._stopped = False

    def __enter__(self) -> Sampler:
        """Listen. Raises OSError where that cannot be."""
        taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.ExitStack() as undo:
            undo.callback(taken.close)
            self._path.unlink(missing_ok=True)  # nobody listens there any more, or not for long
            taken.bind(str(self._path))
            self._path.chmod(0o666)  # HAProxy is another user, and who may come here the folder says
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            undo.pop_all()
        self._socket = taken
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._socket
        self._stopped = True
        self._socket.shutdown(socket.SHUT_RD)  # which wakes the thread
        self._thread.join()
        self._socket.close()

    def times(self) -> dict[str, Times]:
        """Return what is known, by the backend's name."""
        known, now = self._known(), self._clock()
        with self._lock:
            self._forget(known)
            return {name: found.times(now) for name, found in self._kept.items()}

    def _run(self) -> None:
        assert self._socket
        taken = 0
        while True:
            line = self._socket.recv(LINE_BYTES)
            if self._stopped:
                return
            taken += 1
            try:
                self.take(line)
            except ValueError as error:
                log.debug("the L7 proxy's sample has a strange line", extra=fields(error=str(error)))
            if taken % PRUNED == 0:
                known = self._known()
                with self._lock:
                    self._forget(known)

    def take(self, line: bytes) -> None:
        """Count a request. Raises ValueError for what is no line."""
        found = request(line)
        name = found.backend
        if name not in self._kept and name not in self._known():
            return  # a request that no backend was found for, or of one that went
        with self._lock:
            now = self._clock()
            self._kept.setdefault(name, _Histogram(begun=now)).add(found.seconds, now)

    def _forget(self, known: Collection[str]) -> None:
        for name in [n for n in self._kept if n not in known]:
            del self._kept[name]


class State(Enum):
    """Whether a service port's packets go to HAProxy; if not, whether they are balanced without it."""

    SERVED = "served"
    PLAIN = "plain"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Seen:
    """All about one backend. `why` says why it is not served, `servers` are by "address:port".

    `times` is None while no request of it was sampled.
    """

    backend: Backend
    state: State
    why: str
    own: Counted
    servers: Mapping[str, Counted]
    times: Times | None


NOTHING = Counted(Totals(), None)


class L7Stats:
    """What can be said of the proxy, put together when somebody asks."""

    def __init__(self, view: L7View, clock: Callable[[], float] = time.monotonic) -> None:
        self.view = view
        self._counts = Counts(view.ask, clock)

    def seen(self) -> tuple[Seen, ...]:
        """Return all backends, by service; HAProxy is not asked while there is none."""
        backends = self.view.backends
        if not backends:
            return ()
        counted, times = self._counts.read(), self.view.sampler.times()
        served, up, told = self.view.served, self.view.up, by_word(self.view.problems)
        servers: dict[str, dict[str, Counted]] = {}
        for (name, server), found in counted.items():
            if server:
                address, _, port = server.rpartition(":")
                servers.setdefault(name, {})[with_port(address, port)] = found
        result = []
        for backend in sorted(backends.values(), key=lambda b: (b.service, b.name)):
            state, why = judged(backend, served=backend.name in served, up=up, told=told)
            result.append(
                Seen(
                    backend,
                    state,
                    why,
                    counted.get((backend.name, ""), NOTHING),
                    servers.get(backend.name, {}),
                    times.get(backend.name),
                )
            )
        return tuple(result)


def by_word(problems: Iterable[str]) -> dict[str, str]:
    """Return sentences by their words, the first with each."""
    found: dict[str, str] = {}
    for problem in problems:
        for word in problem.split():
            found.setdefault(word.strip(".,;:()'\""), problem)
    return found


def judged(backend: Backend, *, served: bool, up: bool, told: Mapping[str, str]) -> tuple[State, str]:
    """Return whether a backend is served and, if not, why not; `told` are sentences by their words."""
    if served and up:
        return State.SERVED, ""
    names = backend.name, backend.service, backend.service.partition(":")[0]
    words = next((told[name] for name in names if name in told), "")
    if not words:
        words = "it has no endpoints" if not backend.servers else "HAProxy does not have it yet"
        words = words if up else "HAProxy does not run"
    state = State.PLAIN if backend.policy.fail_open or not backend.servers else State.CLOSED
    return state, words
