"""Objects, versions and history; safe for threads, and without any I/O.

One counter numbers every write of every kind (resourceVersion). An object is kept as encoded JSON without
kind and apiVersion, beginning with its metadata: a list is then a join, and an event a concatenation.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from tests.kubeapi import rules
from tests.kubeapi.resources import NAMESPACES, RESOURCES, Resource
from tests.kubeapi.status import ApiError, already_exists, conflict, expired, invalid, not_found

Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace (empty where the kind has none) and name; the order of lists."""

KEPT = ("uid", "creationTimestamp", "generation", "deletionTimestamp")
"""Metadata that clients cannot change."""

FIRST_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
"""What generated names end with (apimachinery, util/rand)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of an object."""

    namespace: str
    name: str
    version: int
    labels: dict[str, str]
    body: bytes

    @property
    def key(self) -> Key:
        """Where it is kept."""
        return self.namespace, self.name

    def decoded(self) -> Json:
        """Return the object, for the caller to change."""
        obj: Json = msgspec.json.decode(self.body)
        return obj


@dataclass(frozen=True, slots=True)
class Event:
    """One write. `entry` is the object after it; of a deletion, its last state under the new version."""

    type: str
    resource: Resource
    entry: Entry
    previous: Entry | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All objects of a kind at a version, in the order of lists."""

    version: int
    entries: tuple[Entry, ...]


class Store:
    """The state. `changed` is notified of every write, and may be used to wake its waiters otherwise."""

    def __init__(self, history: int = 10_000) -> None:
        self.changed = threading.Condition()
        self.version = 1
        self.history = history
        self._objects: dict[Resource, dict[Key, Entry]] = {r: {} for r in RESOURCES}
        self._events: list[Event] = []
        self._oldest = 1  # the version before the first event
        self._allocator = rules.Allocator()
        self._snapshots: dict[Resource, Snapshot] = {}
        for name in FIRST_NAMESPACES:
            self.create(NAMESPACES, "", {"metadata": {"name": name}})
        self.compact()

    def load(self, entries: Iterable[tuple[Resource, Entry]]) -> None:
        """Put objects in as they are, without history: a server that starts with them."""
        with self.changed:
            for resource, entry in entries:
                self._objects[resource][entry.key] = entry
                self.version = max(self.version, entry.version)
            self._snapshots.clear()
            self.compact()

    # Reading

    def get(self, resource: Resource, key: Key) -> Entry:
        """Return an object; raises the API's 404."""
        entry = self._objects[resource].get(key)
        if entry is None:
            raise not_found(resource.group, resource.plural, key[1])
        return entry

    def find(self, resource: Resource, key: Key) -> Entry | None:
        """Return an object, or None."""
        return self._objects[resource].get(key)

    def snapshot(self, resource: Resource, version: int | None = None) -> Snapshot:
        """Return all objects as they are, or as they were at a version (410 where history ends before)."""
        with self.changed:
            if version is None or version >= self.version:
                kept = self._snapshots.get(resource)
                if kept is None:
                    objects = self._objects[resource]
                    kept = Snapshot(self.version, tuple(objects[k] for k in sorted(objects)))
                    self._snapshots[resource] = kept
                return Snapshot(self.version, kept.entries)
            if version < self._oldest:
                raise expired(version, self._oldest)
            objects = dict(self._objects[resource])
            for event in reversed(self._events[version - self._oldest :]):
                if event.resource is not resource:
                    continue
                if event.previous is None:
                    objects.pop(event.entry.key, None)
                else:
                    objects[event.entry.key] = event.previous
            return Snapshot(version, tuple(objects[k] for k in sorted(objects)))

    def events(self, version: int) -> list[Event]:
        """Return what was written after a version; 410 when that is not known any more."""
        with self.changed:
            if version < self._oldest:
                raise expired(version, self._oldest)
            return self._events[version - self._oldest :]

    @property
    def oldest(self) -> int:
        """The oldest version from which a watch can go on."""
        return self._oldest

    def compact(self) -> None:
        """Forget all history: versions before the current one are expired."""
        with self.changed:
            self._events.clear()
            self._oldest = self.version
            self.changed.notify_all()

    # Writing

    def create(self, resource: Resource, namespace: str, obj: Json) -> Entry:
        """Add an object; raises the API's 404 (namespace), 409, 422, or 500 for one with a version."""
        obj = _plain(resource, obj)
        metadata = obj["metadata"]
        if metadata.get("resourceVersion"):
            text = "resourceVersion should not be set on objects to be created"
            raise ApiError(500, text, reason="")
        if not metadata.get("name") and metadata.get("generateName"):
            suffix = "".join(random.choice(SUFFIX) for _ in range(5))
            metadata["name"] = metadata["generateName"] + suffix
        _placed(resource, metadata, namespace)
        rules.check(resource, obj)
        with self.changed:
            if resource.namespaced and ("", namespace) not in self._objects[NAMESPACES]:
                raise not_found("", "namespaces", namespace)
            key = namespace, metadata["name"]
            if key in self._objects[resource]:
                raise already_exists(resource.group, resource.plural, key[1])
            rules.prepare(resource, obj, self._allocator)
            rules.check(resource, obj)
            for name in KEPT:
                metadata.pop(name, None)
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
            if resource.generation:
                metadata["generation"] = 1
            return self._write("ADDED", resource, obj, None)

    def update(
        self,
        resource: Resource,
        key: Key,
        change: Callable[[Json], Json],
        *,
        status: bool = False,
        put: bool = False,
    ) -> Entry:
        """Change an object, or its status only; raises the API's 404, 409 and 422.

        A change that changes nothing writes nothing. With `put`, kinds that demand it have to name the
        version they change.
        """
        with self.changed:
            entry = self.get(resource, key)
            old = entry.decoded()
            new = _plain(resource, change(entry.decoded()))
            metadata = new["metadata"]
            _placed(resource, metadata, key[0], key[1])
            _check_version(resource, old, metadata, put=put)
            new = _merged_parts(resource, old, new, status=status)
            metadata = new["metadata"]
            for name in KEPT:
                metadata.pop(name, None)
                if name in old["metadata"]:
                    metadata[name] = old["metadata"][name]
            rules.prepare(resource, new, self._allocator)
            rules.check_update(resource, old, new)
            metadata["resourceVersion"] = old["metadata"]["resourceVersion"]
            if new == old:
                return entry
            if resource.generation and _without_metadata(new) != _without_metadata(old):
                metadata["generation"] = old["metadata"].get("generation", 0) + 1
            if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
                return self._remove(resource, new, entry)
            return self._write("MODIFIED", resource, new, entry)

    def delete(self, resource: Resource, key: Key, preconditions: Json | None = None) -> tuple[Entry, bool]:
        """Remove an object, or mark it if it has finalizers; return its last state and whether it is gone."""
        with self.changed:
            entry = self.get(resource, key)
            obj = entry.decoded()
            metadata = obj["metadata"]
            for field, words in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
                wanted = (preconditions or {}).get(field)
                if wanted is not None and wanted != metadata[field]:
                    why = (
                        f"Precondition failed: {words} in precondition: {wanted}, "
                        f"{words} in object meta: {metadata[field]}"
                    )
                    raise conflict(resource.group, resource.plural, key[1], why)
            if metadata.get("finalizers"):
                if not metadata.get("deletionTimestamp"):
                    metadata["deletionTimestamp"] = now()
                    entry = self._write("MODIFIED", resource, obj, entry)
                return entry, False
            if resource is NAMESPACES:
                for other, objects in self._objects.items():
                    for inside in [k for k in objects if k[0] == key[1]]:
                        self._remove(other, objects[inside].decoded(), objects[inside])
            return self._remove(resource, obj, entry), True

    def overwrite(self, resource: Resource, entry: Entry, obj: Json) -> Entry:
        """Write an object unchecked: what the server's own changes use. The caller holds `changed`."""
        return self._write("MODIFIED", resource, obj, entry)

    def _write(self, kind: str, resource: Resource, obj: Json, previous: Entry | None) -> Entry:
        entry = self._entry(obj)
        self._objects[resource][entry.key] = entry
        self._record(Event(kind, resource, entry, previous))
        return entry

    def _remove(self, resource: Resource, obj: Json, previous: Entry) -> Entry:
        entry = self._entry(obj)
        del self._objects[resource][entry.key]
        self._record(Event("DELETED", resource, entry, previous))
        return entry

    def _entry(self, obj: Json) -> Entry:
        self.version += 1
        return entry_of(obj, self.version)

    def _record(self, event: Event) -> None:
        self._events.append(event)
        self._snapshots.pop(event.resource, None)
        if (excess := len(self._events) - self.history) > self.history // 10:
            del self._events[:excess]
            self._oldest += excess
        self.changed.notify_all()


def entry_of(obj: Json, version: int) -> Entry:
    """Return an object as it is kept, with a version set."""
    metadata = obj["metadata"]
    metadata["resourceVersion"] = str(version)
    ordered = {"metadata": metadata, **obj}
    return Entry(
        metadata.get("namespace", ""),
        metadata["name"],
        version,
        metadata.get("labels") or {},
        msgspec.json.encode(ordered),
    )


def now() -> str:
    """Return the time as metav1.Time has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _plain(resource: Resource, obj: Json) -> Json:
    """Return an object without kind and apiVersion, which have to be right, and with metadata."""
    if not isinstance(obj, dict) or not isinstance(obj.get("metadata") or {}, dict):
        raise ApiError(400, "the object provided is unrecognized")
    kind, version = obj.get("kind", resource.kind), obj.get("apiVersion", resource.api_version)
    if (kind, version) != (resource.kind, resource.api_version):
        text = f"{kind} in version {version!r} cannot be handled as a {resource.kind}"
        raise ApiError(400, text)
    rest = {k: v for k, v in obj.items() if k not in ("kind", "apiVersion", "metadata") and v is not None}
    return {"metadata": dict(obj.get("metadata") or {}), **rest}


def _placed(resource: Resource, metadata: Json, namespace: str, name: str | None = None) -> None:
    """Hold the object's namespace and name to those of the request."""
    if resource.namespaced and metadata.setdefault("namespace", namespace) != namespace:
        raise ApiError(
            400, "the namespace of the provided object does not match the namespace sent on the request"
        )
    if not resource.namespaced:
        metadata.pop("namespace", None)
    if name is not None and metadata.setdefault("name", name) != name:
        text = f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
        raise ApiError(400, text)


def _check_version(resource: Resource, old: Json, metadata: Json, *, put: bool) -> None:
    """Optimistic locking: who names a version, or an identity, has to name the current one."""
    name = metadata["name"]
    version = metadata.get("resourceVersion")
    if put and not version and not resource.unconditional:
        problem = "Invalid value: 0x0: must be specified for an update"
        raise invalid(resource.kind, name, "metadata.resourceVersion", problem)
    if version and version != old["metadata"]["resourceVersion"]:
        raise conflict(resource.group, resource.plural, name)
    if (uid := metadata.get("uid")) and uid != old["metadata"]["uid"]:
        why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {old['metadata']['uid']}"
        raise conflict(resource.group, resource.plural, name, why)


def _merged_parts(resource: Resource, old: Json, new: Json, *, status: bool) -> Json:
    """Take from a write what it may change: the status, or everything else; metadata both."""
    if not resource.status:
        return new
    taken, kept = (new, old) if status else (old, new)
    parts = {k: v for k, v in kept.items() if k not in ("metadata", "status")}
    result = {"metadata": new["metadata"], **parts}
    if "status" in taken:
        result["status"] = taken["status"]
    return result


def _without_metadata(obj: Json) -> Json:
    return {k: v for k, v in obj.items() if k != "metadata"}
