"""Follow one resource of the Kubernetes API: list it in pages, then watch it from there, and so on for ever.

Source: Kubernetes documentation, "API Concepts": efficient detection of changes, resource versions, watch
bookmarks, retrieving large results sets in chunks.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from node.kube.api import Api, ApiError, Stream, refused
from node.sources.objects import Decoded, Object, decode
from node.sources.wire import WireBookmark, WireEvent, WireList
from node.store import Identity

log = logging.getLogger("podwire.source")

PAGE = 500
CACHED, NEWEST = "0", ""
"""resourceVersion of a list: whatever the server has at hand, or what is true at this moment (from etcd)."""
EVENT = msgspec.json.Decoder(WireEvent)
BOOKMARK = msgspec.json.Decoder(WireBookmark)
PAGES = msgspec.json.Decoder(WireList)


class Resource(NamedTuple):
    """What to follow: objects of one kind, below a path, that selectors leave."""

    kind: str
    path: str
    labels: str = ""
    fields: str = ""


class Timing(NamedTuple):
    """How long things may take, in seconds.

    A watch is asked to end after `watch[0]` to `watch[1]`, and begun anew when it is silent for `silence`:
    a server that works sends a bookmark about once a minute. Waits after failures grow from `backoff[0]` to
    `backoff[1]`, each by up to half more or less, so that a thousand nodes do not come at once. A watch that
    ran for `steady`, or brought something, was none, however it ended.
    """

    watch: tuple[float, float] = (300.0, 600.0)
    silence: float = 90.0
    backoff: tuple[float, float] = (0.2, 30.0)
    steady: float = 0.9


class Delivery(NamedTuple):
    """What is new: objects, and None for those that are gone.

    With `complete`, there are no others of the kind, but for those in `keep`: they are there and cannot be
    read, so that what they said before counts.
    """

    kind: str
    changes: Mapping[Identity, Object | None]
    complete: bool = False
    keep: frozenset[Identity] = frozenset()


@dataclass(slots=True)
class State:
    """How following goes; read by other threads. Times are monotonic seconds, 0 is never."""

    error: str = ""
    failing_since: float | None = None
    version: str | None = None
    heard: float = 0.0
    lists: int = 0
    watches: int = 0
    failures: int = 0
    wrong: dict[Identity, tuple[str, ...]] = field(default_factory=dict)


class Reflector:
    """Follows one resource; `run` is for a thread of its own, `end` for any."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        deliver: Callable[[Delivery], None],
        stopped: threading.Event,
        timing: Timing = Timing(),  # noqa: B008 (a frozen value)
    ) -> None:
        self._api, self._resource, self._deliver = api, resource, deliver
        self._stopped, self._timing = stopped, timing
        self._stream: Stream | None = None
        self._failures = 0
        self._progress = False  # the watch has brought something
        self._list_from = CACHED
        self.state = State()

    def run(self) -> None:
        """List and watch until it is stopped; never raises for what a server does."""
        while not self._stopped.is_set():
            error, self._progress = None, False
            began = time.monotonic()
            try:
                if self.state.version is None:
                    self._list()
                    began = time.monotonic()
                self._watch(self.state.version or CACHED)
            except ApiError as failure:
                error = failure
            except Exception as fault:  # ours: without this thread, the node would go by old state for ever
                log.exception("a fault of podwire's own, in following %s", self._resource.path)
                error = ApiError(f"{self._resource.path} cannot be followed: {fault!r}", reason="Expired")
            if self._stopped.is_set():
                return
            self._rest(error, self._progress or time.monotonic() - began >= self._timing.steady)

    @property
    def kind(self) -> str:
        """The kind of object that is followed."""
        return self._resource.kind

    def end(self) -> None:
        """Wake up `run`, which waits for the server, after `stopped` was set."""
        if stream := self._stream:
            stream.end()

    def _rest(self, error: ApiError | None, good: bool) -> None:
        """Decide what a failure means, and wait before the next attempt; `good`: it was of use, though."""
        state, (shortest, longest) = self.state, self._timing.backoff
        if error and error.expired:
            log.info("%s: %s; listing anew", self._resource.path, error)
            # Not from the server's cache again: what it has there may be as old as what we have.
            state.version, self._list_from = None, NEWEST
        elif error and error.status == 400 and self._resource.fields:
            log.info("the API server does not select by %s: that is done here", self._resource.fields)
            self._resource = self._resource._replace(fields="")
        if good:
            self._failures = 0
        if not error:
            self._stopped.wait(0 if good else shortest)
            return
        self._failed(error)
        wait = min(shortest * 2 ** min(self._failures, 16), longest) * random.uniform(0.5, 1.5)
        self._failures += 1
        self._stopped.wait(max(wait, (error.retry_after or 0) * random.uniform(1.0, 1.5)))

    def _failed(self, error: ApiError) -> None:
        self.state.failures += 1
        if self.state.failing_since is None:
            self.state.failing_since = time.monotonic()
        if self._failures == 1 or str(error) != self.state.error:
            log.log(logging.WARNING if self._failures else logging.INFO, "%s", error)
        self.state.error = str(error)

    def _works(self) -> None:
        if self.state.failing_since is not None and self._failures > 1:
            log.info("%s: the API server answers again", self._resource.path)
        self.state.failing_since, self.state.error = None, ""
        self.state.heard = time.monotonic()

    def _list(self) -> None:
        """Read all pages, deliver what they have, and remember where to watch from."""
        objects: dict[Identity, Object | None] = {}
        keep: set[Identity] = set()
        problems: dict[Identity, tuple[str, ...]] = {}
        query = {"limit": str(PAGE), **self._selection()}
        if self._list_from:
            query["resourceVersion"] = self._list_from
        while True:
            page = self._page(query)
            for raw in page.items or ():
                self._take(_decoded(self._resource, raw), objects, keep, problems)
            if not page.metadata.continue_:
                break
            query = {"limit": str(PAGE), **self._selection(), "continue": page.metadata.continue_}
        self.state.wrong = problems
        present = {name: value for name, value in objects.items() if value is not None}
        self._deliver(Delivery(self._resource.kind, present, complete=True, keep=frozenset(keep)))
        self.state.version, self._list_from = page.metadata.resource_version, CACHED
        self.state.lists += 1
        self._works()

    def _page(self, query: Mapping[str, str]) -> WireList:
        data = self._api.get(self._resource.path, query)
        try:
            return PAGES.decode(data)
        except msgspec.MsgspecError as error:
            raise ApiError(f"GET {self._resource.path}: no list: {error}") from None

    def _selection(self) -> dict[str, str]:
        given = {"labelSelector": self._resource.labels, "fieldSelector": self._resource.fields}
        return {name: text for name, text in given.items() if text}

    def _watch(self, version: str) -> None:
        """Deliver changes until the stream ends. Raises ApiError."""
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(round(random.uniform(*self._timing.watch))),
            **self._selection(),
        }
        with self._api.stream(self._resource.path, query, self._timing.silence) as stream:
            self._stream = stream
            self.state.watches += 1
            try:
                for lines in _lines(stream):
                    self._events(lines)
                    self._works()
                    if self._stopped.is_set():
                        return
            finally:
                self._stream = None

    def _events(self, lines: list[bytes]) -> None:
        """Deliver a few events together, and remember the version that they lead to."""
        changes: dict[Identity, Object | None] = {}
        keep: set[Identity] = set()
        version, error = self.state.version, None
        for line in lines:
            try:
                event = EVENT.decode(line)
                if event.type == "ERROR":
                    error = refused(event.object, f"watch {self._resource.path}")
                    break
                if event.type == "BOOKMARK":
                    version = BOOKMARK.decode(event.object).metadata.resource_version
                    continue
            except msgspec.MsgspecError as wrong:
                error = ApiError(f"watch {self._resource.path}: no event: {wrong}", reason="Expired")
                break
            found = _decoded(self._resource, event.object)
            if event.type == "DELETED":
                changes[found.name] = None
                self.state.wrong.pop(found.name, None)
            else:
                self._take(found, changes, keep, self.state.wrong)
            version = found.version
        self._progress = self._progress or version != self.state.version
        if changes:
            self._deliver(Delivery(self._resource.kind, changes))
        self.state.version = version
        if error:
            raise error

    def _take(
        self,
        found: Decoded,
        changes: dict[Identity, Object | None],
        keep: set[Identity],
        problems: dict[Identity, tuple[str, ...]],
    ) -> None:
        """Put an object where it belongs: among the changes, or among those that stay as they were."""
        for problem in found.problems:
            if problem not in self.state.wrong.get(found.name, ()):
                log.warning("%s", problem)
        problems.pop(found.name, None)
        if found.problems:
            problems[found.name] = found.problems
        if found.wrong:
            keep.add(found.name)
        else:
            changes[found.name] = found.value


def _decoded(resource: Resource, raw: msgspec.Raw) -> Decoded:
    try:
        return decode(resource.kind, raw)
    except msgspec.MsgspecError as error:
        raise ApiError(f"{resource.path}: an object cannot be read: {error}", reason="Expired") from None


def _lines(stream: Stream) -> Iterator[list[bytes]]:
    """Yield the complete lines that came together; half a line at the end of the stream is none."""
    rest = b""
    for piece in stream:
        *lines, rest = (rest + piece).split(b"\n")
        if lines := [line for line in lines if line]:
            yield lines
