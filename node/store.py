"""Fold objects into a frozen Snapshot, and remember what changed since the last one was taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from node.sources.objects import Object
from proxy.model import EMPTY, EndpointSlice, Node, ObjectName, Service, Snapshot

Identity = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pending:
    """A snapshot, the services and nodes that differ from the last one, and since when.

    `compare`: the kernel is to be compared with all of it, whatever has changed.
    `since` is when the oldest change came (monotonic seconds), and `triggered` are the times at which the
    changes of EndpointSlices happened in the cluster (seconds since the epoch), where these say so.
    """

    snapshot: Snapshot
    services: frozenset[ObjectName]
    nodes: frozenset[str]
    since: float
    triggered: tuple[float, ...] = ()
    compare: bool = False


class Store:
    """Objects in, snapshots out; used by the source's threads and the syncer's.

    `service_changes` and `endpoint_changes` count the Services and EndpointSlices that changed so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = time.time()
        self._triggered: list[float] = []
        self._taken = (0, 0)
        self.service_changes = self.endpoint_changes = 0
        self._changed = threading.Condition()
        self._objects: dict[Identity, Object] = {}
        self._services: dict[ObjectName, Service] = {}
        self._slices: dict[ObjectName, tuple[EndpointSlice, ...]] = {}
        self._nodes: dict[str, Node] = {}
        self._snapshot = EMPTY
        self._touched: set[type] = set()  # the kinds that differ from the snapshot
        self._names: set[ObjectName] = set()
        self._node_names: set[str] = set()
        self._since: float | None = None
        self._ready = False

    def replace(self, objects: Mapping[Identity, Object]) -> None:
        """Set all objects. The first call makes the store ready, even with none."""
        with self._changed:
            gone = dict.fromkeys(self._objects.keys() - objects.keys())
            self._ready, first = True, not self._ready
            self._take_in({**gone, **objects}, first)

    def relist(self, kind: str, objects: Mapping[Identity, Object | None], keep: Set[Identity]) -> None:
        """Set all objects of one kind; those in `keep` stay as they are."""
        with self._changed:
            known = {name for name in self._objects if name[0] == kind}
            self._take_in({**dict.fromkeys(known - objects.keys() - keep), **objects})

    def update(self, changes: Mapping[Identity, Object | None]) -> None:
        """Set these objects, or take them out where None stands; the others stay."""
        with self._changed:
            self._take_in(changes)

    def again(self, services: Set[ObjectName]) -> None:
        """Have these services looked at again, though no object has changed."""
        with self._changed:
            self._names |= services
            if self._ready and services and self._since is None:
                self._since = self._clock()
                self._changed.notify_all()

    def take(self, timeout: float, gather: float = 0.0) -> Pending | None:
        """Wait for a change and return it; None when there was none in that time (seconds).

        Changes that come within `gather` seconds of the first one are returned with it.
        """
        with self._changed:
            if self._since is None:
                self._changed.wait(timeout)
            if self._since is None:
                return None
            while gather > 0 and (left := self._since + gather - self._clock()) > 0:
                self._changed.wait(left)
            self._snapshot = self._frozen()
            pending = Pending(
                self._snapshot,
                frozenset(self._names),
                frozenset(self._node_names),
                self._since,
                tuple(self._triggered),
            )
            self._touched, self._since, self._triggered = set(), None, []
            self._names, self._node_names = set(), set()
            self._taken = self.service_changes, self.endpoint_changes
            return pending

    @property
    def waiting(self) -> tuple[int, int]:
        """How many changes of Services and of EndpointSlices have not been taken yet."""
        services, slices = self._taken
        return self.service_changes - services, self.endpoint_changes - slices

    @property
    def oldest(self) -> float | None:
        """When the oldest change came that has not been taken yet."""
        return self._since

    @property
    def objects(self) -> Mapping[Identity, Object]:
        """All objects as they are now; a copy."""
        with self._changed:
            return dict(self._objects)

    def _take_in(self, changes: Mapping[Identity, Object | None], first: bool = False) -> None:
        for name, new in changes.items():
            old = self._objects.get(name)
            if old is new or old == new:
                continue
            if new is None:
                del self._objects[name]
            else:
                self._objects[name] = new
            self._count(old, new)
            self._fold(old, new)
        if (first or self._touched) and self._since is None:
            self._since = self._clock()
            self._changed.notify_all()

    def _frozen(self) -> Snapshot:
        """Return a snapshot; of the mappings, those are copied that changed since the last one."""
        last, touched = self._snapshot, self._touched
        return Snapshot(
            dict(self._services) if Service in touched else last.services,
            dict(self._slices) if EndpointSlice in touched else last.slices,
            dict(self._nodes) if Node in touched else last.nodes,
        )

    def _fold(self, old: Object | None, new: Object | None) -> None:
        """Take one object out of the mappings and put its next version in."""
        self._touched.add(type(old or new))
        match old:
            case Service():
                self._services.pop(old.name, None)
                self._names.add(old.name)
            case EndpointSlice():
                _set_slice(self._slices, old, present=False)
                self._names.add(old.service)
            case Node():
                self._nodes.pop(old.name, None)
                self._node_names.add(old.name)
        match new:
            case Service():
                self._services[new.name] = new
                self._names.add(new.name)
            case EndpointSlice():
                _set_slice(self._slices, new, present=True)
                self._names.add(new.service)
            case Node():
                self._nodes[new.name] = new
                self._node_names.add(new.name)

    def _count(self, old: Object | None, new: Object | None) -> None:
        if isinstance(new or old, Service):
            self.service_changes += 1
        elif isinstance(new or old, EndpointSlice):
            self.endpoint_changes += 1
        if isinstance(new, EndpointSlice) and new.triggered > self._started:
            before = old.triggered if isinstance(old, EndpointSlice) else 0.0
            if new.triggered != before:  # else it is another field that changed
                self._triggered.append(new.triggered)


def _set_slice(
    slices: dict[ObjectName, tuple[EndpointSlice, ...]], piece: EndpointSlice, *, present: bool
) -> None:
    others = [s for s in slices.get(piece.service, ()) if s.name != piece.name]
    if present:
        others.append(piece)
    if others:
        slices[piece.service] = tuple(sorted(others, key=lambda s: s.name))
    else:
        slices.pop(piece.service, None)
