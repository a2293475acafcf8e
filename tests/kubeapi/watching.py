"""One watch: the stream of events from a version on, through a selection, with bookmarks and an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from tests.kubeapi.faults import Settings, Watch
from tests.kubeapi.resources import Resource
from tests.kubeapi.status import ApiError
from tests.kubeapi.store import Entry, Event, Store, entry_of
from tests.kubeapi.wire import Connection

LOOK = 0.2
"""Seconds between looks at whether the client is still there."""

BOOKMARK_BEFORE_END = 2.0
"""Seconds before its end at which a watch gets a bookmark more (apiserver, cacher)."""

INITIAL_END = ',"annotations":{"k8s.io/initial-events-end":"true"}'


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What the request asks for. `version` None begins with what is there, as synthetic ADDED."""

    resource: Resource
    version: int | None
    selects: Callable[[Entry], bool]
    bookmarks: bool
    timeout: float | None
    initial_bookmark: bool = False
    render: Callable[[bytes], bytes] | None = None  # as a Table


class WatchStream:
    """Sends one watch's events until its end."""

    def __init__(self, store: Store, settings: Settings, options: WatchOptions, watch: Watch) -> None:
        self._store = store
        self._settings = settings
        self._options = options
        self._watch = watch
        self._connection: Connection = watch.connection
        self._sent = 0  # the version up to which all is sent
        self._bookmarked = time.monotonic()

    def run(self, half: bool = False) -> bool:
        """Send events until the end; return whether the connection can be used on.

        `half` is the fault that sends half of the first event and closes.
        """
        options = self._options
        timeout = float("inf") if options.timeout is None else options.timeout
        end = self._watch.started + timeout
        last_bookmark = end - min(BOOKMARK_BEFORE_END, timeout / 2)
        lines = list(self._initial())
        while True:
            if (stop := self._interrupted(lines, half)) is not None:
                return stop
            lines.extend(self._bookmark_if_due(last_bookmark))
            if lines:
                self._connection.chunk(b"".join(lines))
            now = time.monotonic()
            if now >= end:
                self._connection.end()
                return True
            due = end
            if options.bookmarks:
                due = min(due, self._bookmarked + self._settings.bookmark_seconds)
                due = min(due, last_bookmark) if last_bookmark > now else due
            try:
                lines = self._next(max(0.001, min(LOOK, due - now)))
            except ApiError as error:  # this watch is slower than history is long
                self._connection.chunk(_line("ERROR", error.body))
                self._connection.end()
                return True

    def _initial(self) -> Iterator[bytes]:
        """Yield what a watch without a version begins with."""
        options = self._options
        if options.version is not None:
            self._sent = options.version
            return
        snapshot = self._store.snapshot(options.resource)
        self._sent = snapshot.version
        for entry in snapshot.entries:
            if options.selects(entry):
                yield self._event("ADDED", entry)
        if options.initial_bookmark:
            yield self._bookmark(INITIAL_END)

    def _next(self, wait: float) -> list[bytes]:
        """Wait for events and return those that the client is to see, encoded."""
        with self._store.changed:
            if self._store.version <= self._sent:
                self._store.changed.wait(wait)
            if self._store.version <= self._sent:
                return []
            events = self._store.events(self._sent)
            self._sent = self._store.version
        return [line for e in events if e.resource is self._options.resource for line in self._selected(e)]

    def _selected(self, event: Event) -> Iterator[bytes]:
        """What comes into a selection is ADDED, what leaves it is DELETED in its last state there."""
        selects = self._options.selects
        before = event.previous is not None and selects(event.previous)
        after = event.type != "DELETED" and selects(event.entry)
        if event.type == "DELETED":
            if before:
                yield self._event("DELETED", event.entry)
        elif after:
            yield self._event("MODIFIED" if before else "ADDED", event.entry)
        elif before and event.previous:
            yield self._event("DELETED", entry_of(event.previous.decoded(), event.entry.version))

    def _interrupted(self, lines: list[bytes], half: bool) -> bool | None:
        """Do what faults ask for; None: go on, else whether the connection can be used on."""
        watch, life = self._watch, self._settings.watch_life
        cut = watch.cut
        if life is not None and time.monotonic() - watch.started >= life:
            cut = cut or ("clean" if self._settings.cut_clean else "abrupt")
        if half and lines:
            self._connection.chunk(lines[0][: len(lines[0]) // 2])
            return False
        if watch.stalled:
            self._stall(lines)
            return False
        if cut == "clean":
            self._connection.end()
        return {"clean": True, "abrupt": False}.get(cut or "", False if self._connection.closed() else None)

    def _stall(self, lines: list[bytes]) -> None:
        """Send nothing any more, or half an event and then nothing, until the watch is cut."""
        if self._watch.stalled == "partial":
            line = lines[0] if lines else self._bookmark()
            self._connection.chunk(line[: len(line) // 2])
        while not self._watch.cut and not self._connection.closed():
            with self._store.changed:
                self._store.changed.wait(LOOK)

    def _bookmark_if_due(self, last: float) -> Iterator[bytes]:
        now = time.monotonic()
        regular = now - self._bookmarked >= self._settings.bookmark_seconds
        if self._options.bookmarks and (regular or self._bookmarked < last <= now):
            self._bookmarked = now
            yield self._bookmark()

    def _bookmark(self, annotations: str = "") -> bytes:
        resource = self._options.resource
        metadata = f'{{"resourceVersion":"{self._sent}","creationTimestamp":null{annotations}}}'
        body = f'"metadata":{metadata}{resource.empty}}}'
        return self._rendered("BOOKMARK", resource.prefix + body.encode())

    def _event(self, kind: str, entry: Entry) -> bytes:
        return self._rendered(kind, self._options.resource.prefix + entry.body[1:])

    def _rendered(self, kind: str, body: bytes) -> bytes:
        return _line(kind, self._options.render(body) if self._options.render else body)


def _line(kind: str, body: bytes) -> bytes:
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), body)


def number(text: str, name: str = "resourceVersion") -> int:
    """Return a version as a number; a 400 for anything else."""
    if not text.isdecimal():
        raise ApiError(
            400,
            f'Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax',
            details={
                "causes": [{"reason": "FieldValueInvalid", "message": f"{name} is no number", "field": name}]
            },
        )
    return int(text)


def expired_line(error: ApiError) -> bytes:
    """Return the ERROR event that tells a client to list again."""
    return _line("ERROR", msgspec.json.encode(error.status))
