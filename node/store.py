"""Fold objects into a frozen Snapshot, and remember what changed since the last one was taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from node.sources.objects import Object
from proxy.model import EMPTY, EndpointSlice, Node, ObjectName, Service, Snapshot

Identity = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pending:
    """A snapshot, the services that differ from the last one, whether nodes do, and since when.

    `since` is when the oldest change came (monotonic seconds), and `triggered` are the times at which the
    changes of EndpointSlices happened in the cluster (seconds since the epoch), where these say so.
    """

    snapshot: Snapshot
    services: frozenset[ObjectName]
    nodes: bool
    since: float
    triggered: tuple[float, ...] = ()


class Store:
    """Objects in, snapshots out; used by the source's thread and the syncer's.

    `service_changes` and `endpoint_changes` count the Services and EndpointSlices that changed so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = time.time()
        self._triggered: list[float] = []
        self._taken = (0, 0)
        self.service_changes = self.endpoint_changes = 0
        self._changed = threading.Condition()
        self._objects: Mapping[Identity, Object] = {}
        self._snapshot = EMPTY
        self._services: set[ObjectName] = set()
        self._nodes = False
        self._since: float | None = None

    def replace(self, objects: Mapping[Identity, Object]) -> None:
        """Set all objects. The first call makes the store ready, even with none."""
        with self._changed:
            before, self._objects = self._objects, objects
            first = self._snapshot is EMPTY
            services, slices, nodes = (
                dict(self._snapshot.services),
                dict(self._snapshot.slices),
                dict(self._snapshot.nodes),
            )
            differing = [k for k in before.keys() | objects.keys() if before.get(k) is not objects.get(k)]
            for name in differing:
                old, new = before.get(name), objects.get(name)
                if old != new:
                    self._fold(old, new, services, slices, nodes)
            if not first and self._since is None and not self._services and not self._nodes:
                return
            self._snapshot = Snapshot(services, slices, nodes)
            self._since = self._since or self._clock()
            self._changed.notify_all()

    def take(self, timeout: float) -> Pending | None:
        """Wait for a change and return it; None when there was none in that time (seconds)."""
        with self._changed:
            if self._since is None:
                self._changed.wait(timeout)
            if self._since is None:
                return None
            pending = Pending(
                self._snapshot,
                frozenset(self._services),
                self._nodes,
                self._since,
                tuple(self._triggered),
            )
            self._services, self._nodes, self._since, self._triggered = set(), False, None, []
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

    def _fold(
        self,
        old: Object | None,
        new: Object | None,
        services: dict[ObjectName, Service],
        slices: dict[ObjectName, tuple[EndpointSlice, ...]],
        nodes: dict[str, Node],
    ) -> None:
        """Take one object out of the mappings and put its next version in."""
        self._count(old, new)
        match old:
            case Service():
                services.pop(old.name, None)
                self._services.add(old.name)
            case EndpointSlice():
                _set_slice(slices, old, present=False)
                self._services.add(old.service)
            case Node():
                nodes.pop(old.name, None)
                self._nodes = True
        match new:
            case Service():
                services[new.name] = new
                self._services.add(new.name)
            case EndpointSlice():
                _set_slice(slices, new, present=True)
                self._services.add(new.service)
            case Node():
                nodes[new.name] = new
                self._nodes = True

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
