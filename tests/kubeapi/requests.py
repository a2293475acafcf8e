"""What a request asks of the store: paths, lists with pages, reads and writes."""

from __future__ import annotations

import base64
import bisect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.kubeapi import patches, tables
from tests.kubeapi.faults import Settings
from tests.kubeapi.resources import BY_PATH, Resource
from tests.kubeapi.selectors import field as value_of
from tests.kubeapi.selectors import parse_fields, parse_labels
from tests.kubeapi.status import ApiError, continue_expired, invalid, too_large
from tests.kubeapi.store import Entry, Snapshot, Store
from tests.kubeapi.watching import WatchOptions, number
from tests.kubeapi.wire import Request

Json = dict[str, Any]

PIECE = 64
"""Objects to a chunk of a list."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names. `namespace` None: all; `name` empty: the collection."""

    resource: Resource
    namespace: str | None
    name: str = ""
    part: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. With `entries`, `body` is what goes before them; they follow, and a closing bracket."""

    code: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] | None = None


def locate(path: str) -> Target | None:
    """Return what a path names; None for paths outside the resources."""
    match path.strip("/").split("/"):
        case ["api", "v1", *rest]:
            group = ""
        case ["apis", group, "v1", *rest]:
            pass
        case _:
            return None
    namespace = None
    if len(rest) >= 3 and rest[0] == "namespaces" and (group, rest[2]) in BY_PATH:
        namespace, rest = rest[1], rest[2:]
    resource = BY_PATH.get((group, rest[0])) if rest else None
    if resource is None or len(rest) > 3 or (namespace is not None and not resource.namespaced):
        return None
    name, part = (*rest[1:], "", "")[:2]
    if part not in ("", "status") or (part and not resource.status):
        return None
    if name and resource.namespaced and namespace is None:
        return None
    return Target(resource, namespace, name, part)


def verb_of(request: Request, target: Target | None) -> str:
    """Return the request's verb, as RBAC and the API server's metrics name it."""
    if target is None:
        return "other"
    if request.method == "GET":
        if request.flag("watch"):
            return "watch"
        return "get" if target.name else "list"
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    return verbs.get(request.method, "other")


def answer(store: Store, settings: Settings, request: Request, target: Target) -> Answer:
    """Answer a request for a resource that is no watch; raises ApiError."""
    resource, key = target.resource, (target.namespace or "", target.name)
    match request.method, bool(target.name):
        case "GET", True:
            return _object(request, resource, store.get(resource, key))
        case "GET", False:
            return _list(store, settings, request, target)
        case "POST", False if target.namespace is not None or not resource.namespaced:
            return _object(request, resource, store.create(resource, key[0], _json(request.body)), 201)
        case "PUT", True:
            return _put(store, request, target)
        case "PATCH", True:
            change = _patch(request, resource)
            return _object(request, resource, store.update(resource, key, change, status=bool(target.part)))
        case "DELETE", True:
            options = _json(request.body) if request.body else {}
            entry, gone = store.delete(resource, key, options.get("preconditions"))
            return _deleted(resource, entry) if gone else _object(request, resource, entry)
        case "DELETE", False:
            for entry in _selected(store.snapshot(resource).entries, _selection(request, target)):
                store.delete(resource, entry.key)
            return Answer(
                200, msgspec.json.encode({"kind": "Status", "apiVersion": "v1", "status": "Success"})
            )
    raise ApiError(405, "the server does not allow this method on the requested resource")


def _json(body: bytes) -> Json:
    decoded = msgspec.json.decode(body)
    if not isinstance(decoded, dict):
        raise ApiError(400, "the object provided is unrecognized")
    return decoded


def _object(request: Request, resource: Resource, entry: Entry, code: int = 200) -> Answer:
    if tables.wanted(request.headers.get("accept", "")):
        return Answer(
            code, msgspec.json.encode(tables.table(resource, str(entry.version), [entry.decoded()]))
        )
    return Answer(code, resource.prefix + entry.body[1:])


def _deleted(resource: Resource, entry: Entry) -> Answer:
    details = {"name": entry.name, "kind": resource.plural, "uid": entry.decoded()["metadata"]["uid"]}
    if resource.group:
        details["group"] = resource.group
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
    return Answer(200, msgspec.json.encode(status))


def _put(store: Store, request: Request, target: Target) -> Answer:
    resource, body = target.resource, _json(request.body)
    key = target.namespace or "", target.name
    try:
        entry = store.update(resource, key, lambda _: body, status=bool(target.part), put=True)
    except ApiError as error:
        if error.code != 404 or not resource.creates or target.part:
            raise
        return _object(request, resource, store.create(resource, key[0], body), 201)
    return _object(request, resource, entry)


def _patch(request: Request, resource: Resource) -> Callable[[Json], Json]:
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    patch = msgspec.json.decode(request.body)
    match kind:
        case "application/merge-patch+json":
            return lambda old: patches.merge(old, patch)
        case "application/strategic-merge-patch+json":
            return lambda old: patches.strategic(old, patch, resource.kind)
        case "application/json-patch+json":
            return lambda old: patches.json_patch(old, patch)
    raise ApiError(415, f"the body of the request was in an unknown format - {kind}")


# Lists


def _selection(request: Request, target: Target) -> Callable[[Entry], bool] | None:
    """Return what decides whether an object is selected; None: all are."""
    resource, namespace = target.resource, target.namespace
    labels = parse_labels(request.query.get("labelSelector", ""))
    fields = parse_fields(request.query.get("fieldSelector", ""), resource.selectable)
    name = target.name  # a watch of one object by its own path
    if labels is None and not fields and namespace is None and not name:
        return None

    def selects(entry: Entry) -> bool:
        if namespace is not None and entry.namespace != namespace:
            return False
        if name and entry.name != name:
            return False
        if labels is not None and not labels(entry.labels):
            return False
        return all((_field(entry, path) == value) is equal for path, equal, value in fields)

    return selects


def _field(entry: Entry, path: str) -> str:
    if path == "metadata.name":
        return entry.name
    if path == "metadata.namespace":
        return entry.namespace
    return value_of(entry.decoded(), path)


def _selected(entries: tuple[Entry, ...], selects: Callable[[Entry], bool] | None) -> tuple[Entry, ...]:
    return entries if selects is None else tuple(e for e in entries if selects(e))


def _list(store: Store, settings: Settings, request: Request, target: Target) -> Answer:
    query = request.query
    limit = number(query.get("limit") or "0", "limit")
    token = query.get("continue", "")
    if token:
        if query.get("resourceVersion", "") not in ("", "0"):
            raise ApiError(400, "specifying resource version is not allowed when using continue")
        snapshot, after = _continued(store, target.resource, token)
    else:
        snapshot, after = _begun(store, settings, request, target.resource), None
        if query.get("resourceVersion") == "0":
            limit = 0  # as lists from the real one's cache
    selects = _selection(request, target)
    entries = snapshot.entries
    start = 0 if after is None else bisect.bisect_right(entries, after, key=lambda e: e.key)
    rest = itertools.islice(entries, start, None)
    chosen = rest if selects is None else filter(selects, rest)
    page = tuple(itertools.islice(chosen, limit or None))
    metadata: Json = {"resourceVersion": str(snapshot.version)}
    if limit and (left := tuple(itertools.islice(chosen, None if _countable(query) else 1))):
        state = {"rv": snapshot.version, "after": page[-1].key}
        metadata["continue"] = base64.urlsafe_b64encode(msgspec.json.encode(state)).decode().rstrip("=")
        if _countable(query):
            metadata["remainingItemCount"] = len(left)
    return _page(request, target.resource, page, metadata)


def _countable(query: dict[str, str]) -> bool:
    """Whether the answer says how many objects are left: not with selectors."""
    return not (query.get("labelSelector") or query.get("fieldSelector"))


def _page(request: Request, resource: Resource, page: tuple[Entry, ...], metadata: Json) -> Answer:
    if tables.wanted(request.headers.get("accept", "")):
        objects = (e.decoded() for e in page)
        made = tables.table(resource, metadata["resourceVersion"], objects)
        return Answer(200, msgspec.json.encode({**made, "metadata": metadata}))
    head = f'{{"kind":"{resource.kind}List","apiVersion":"{resource.api_version}","metadata":'.encode()
    return Answer(200, head + msgspec.json.encode(metadata) + b',"items":[', entries=page)


def list_pieces(answered: Answer) -> Iterator[bytes]:
    """Yield a list's answer in pieces of some 100 kB."""
    entries = answered.entries or ()
    yield answered.body
    for start in range(0, len(entries), PIECE):
        comma = b"," if start else b""
        yield comma + b",".join([e.body for e in entries[start : start + PIECE]])
    yield b"]}\n"


def _begun(store: Store, settings: Settings, request: Request, resource: Resource) -> Snapshot:
    """Return the state that a list without a page token asks for."""
    text, match = request.query.get("resourceVersion", ""), request.query.get("resourceVersionMatch", "")
    if match and not text:
        problem = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        raise _option(resource, "resourceVersionMatch", problem)
    if match not in ("", "Exact", "NotOlderThan"):
        raise _option(resource, "resourceVersionMatch", f'Unsupported value: "{match}"')
    version = number(text or "0")
    if match == "Exact" and not version:
        raise _option(
            resource,
            "resourceVersionMatch",
            'Forbidden: resourceVersionMatch "exact" is forbidden for resourceVersion "0"',
        )
    _wait_for(store, version, settings.fresh_wait)
    return store.snapshot(resource, version if match == "Exact" else None)


def _option(resource: Resource, name: str, problem: str) -> ApiError:
    return invalid(f"{resource.kind}ListOptions", "", name, problem, "FieldValueForbidden")


def _wait_for(store: Store, version: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with store.changed:
        while store.version < version:
            left = deadline - time.monotonic()
            if left <= 0:
                raise too_large(version, store.version)
            store.changed.wait(left)


def _continued(store: Store, resource: Resource, token: str) -> tuple[Snapshot, tuple[str, str]]:
    try:
        state = msgspec.json.decode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        version, (namespace, name) = int(state["rv"]), state["after"]
    except (ValueError, KeyError, TypeError):
        raise ApiError(400, "continue key is not valid") from None
    try:
        return store.snapshot(resource, version), (namespace, name)
    except ApiError:
        raise continue_expired() from None


def watch_options(
    request: Request, settings: Settings, resource: Resource, target: Target | None
) -> WatchOptions:
    """Return what a watch asks for; raises ApiError."""
    query = request.query
    target = target or Target(resource, None)
    version = number(query.get("resourceVersion") or "0")
    initial = request.flag("sendInitialEvents")
    bookmarks = request.flag("allowWatchBookmarks")
    if initial and not settings.watch_list:
        problem = (
            "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
        )
        raise _option(resource, "sendInitialEvents", problem)
    if initial and query.get("resourceVersionMatch") != "NotOlderThan":
        problem = "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        raise _option(resource, "resourceVersionMatch", problem)
    seconds = number(query.get("timeoutSeconds") or "0", "timeoutSeconds")
    table = tables.wanted(request.headers.get("accept", ""))
    return WatchOptions(
        resource=resource,
        version=None if initial or not version else version,
        selects=_selection(request, target) or (lambda _: True),
        bookmarks=bookmarks,
        timeout=float(seconds) if seconds else None,
        initial_bookmark=initial and bookmarks,
        render=tables.Renderer(resource) if table else None,
    )
