"""The three kinds of PATCH: JSON merge patch (RFC 7386), strategic merge patch, JSON patch (RFC 6902).

None of them changes what it is given. Strategic merge patch is described in the Kubernetes community's
document sig-api-machinery/strategic-merge-patch.md.
"""

from __future__ import annotations

from typing import Any

from tests.kubeapi.status import ApiError

MERGE_KEYS = {
    "conditions": "type",
    "addresses": "type",  # of a Node; those of endpoints are within a list that is replaced as a whole
    "ports": "port",  # of a Service
    "ownerReferences": "uid",
}
"""The lists whose elements are merged, and by which field. Others are replaced (Node.spec.taints is)."""

MERGED_VALUES = {"finalizers", "podCIDRs"}
"""The lists of plain values to which a strategic merge patch adds."""

REPLACED = {"EndpointSlice": {"ports", "addresses"}}
"""Where a kind has a list of such a name that is replaced all the same."""

_MISSING = object()


def merge(old: Any, patch: Any) -> Any:
    """Apply a JSON merge patch: null removes, objects merge, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merge(new.get(key), value)
    return new


def strategic(old: Any, patch: Any, kind: str = "") -> Any:
    """Apply a strategic merge patch to an object of a kind."""
    if not isinstance(patch, dict):
        return patch
    match patch.get("$patch"):
        case "replace":
            return {k: v for k, v in patch.items() if k != "$patch"}
        case "delete":
            return {}
    new = dict(old) if isinstance(old, dict) else {}
    if "$retainKeys" in patch:
        new = {k: v for k, v in new.items() if k in patch["$retainKeys"]}
    for key, value in patch.items():
        directive, _, name = key.partition("/")
        if directive == "$deleteFromPrimitiveList":
            new[name] = [v for v in new.get(name, ()) if v not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            new.pop(key, None)
        elif isinstance(value, list):
            order = patch.get(f"$setElementOrder/{key}")
            new[key] = _merged_list(key, new.get(key) or [], value, kind, order)
        else:
            new[key] = strategic(new.get(key), value, kind)
    for key, order in patch.items():  # an order alone, without a change of the list
        name = key.removeprefix("$setElementOrder/")
        if name != key and name not in patch and name in new:
            new[name] = _merged_list(name, new[name], [], kind, order)
    return new


def _merged_list(
    name: str, old: list[Any], patch: list[Any], kind: str, order: list[Any] | None
) -> list[Any]:
    if name in MERGED_VALUES:
        merged = [*old, *(v for v in patch if v not in old)]
        return _ordered(merged, order, lambda v: v)
    key = MERGE_KEYS.get(name)
    if key is None or name in REPLACED.get(kind, ()):
        return patch
    if any(e.get("$patch") == "replace" for e in patch):
        return [e for e in patch if e.get("$patch") != "replace"]
    by_key = {e.get(key): e for e in old}
    for element in patch:
        if key not in element:
            raise ApiError(400, f"map: {element} does not contain declared merge key: {key}")
        if element.get("$patch") == "delete":
            by_key.pop(element[key], None)
        else:
            by_key[element[key]] = strategic(by_key.get(element[key]), element, kind)
    return _ordered(list(by_key.values()), [e.get(key) for e in order or ()], lambda e: e.get(key))


def _ordered(elements: list[Any], order: list[Any] | None, key: Any) -> list[Any]:
    if not order:
        return elements
    places = {value: place for place, value in enumerate(order)}
    return sorted(elements, key=lambda e: places.get(key(e), len(places)))


def json_patch(old: Any, operations: Any) -> Any:
    """Apply a JSON patch; a test that fails, or a path that leads nowhere, is a 422."""
    document: Any = {"": old}
    for operation in operations:
        verb, path = operation.get("op"), _pointer(operation.get("path", ""))
        if verb in ("move", "copy"):
            source = _pointer(operation.get("from", ""))
            value = _at(document, source)
            document = _set(document, source, _MISSING, replace=True) if verb == "move" else document
            document = _set(document, path, value, replace=False)
        elif verb == "test":
            if _at(document, path) != operation.get("value"):
                raise _unprocessable(f"testing value {operation.get('path')} failed")
        elif verb in ("add", "replace"):
            document = _set(document, path, operation.get("value"), replace=verb == "replace")
        elif verb == "remove":
            document = _set(document, path, _MISSING, replace=True)
        else:
            raise _unprocessable(f"Unexpected kind: {verb}")
    return document[""]


def _unprocessable(problem: str) -> ApiError:
    return ApiError(422, f"the server rejected our request due to an error in our request: {problem}")


def _pointer(path: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]


def _at(document: Any, path: list[str]) -> Any:
    for part in path:
        try:
            document = document[int(part)] if isinstance(document, list) else document[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise _unprocessable(f"no value at {'/'.join(path)}") from None
    return document


def _set(document: Any, path: list[str], value: Any, *, replace: bool) -> Any:
    """Return the document with a place set, or removed; what leads there is copied."""
    part, rest = path[0], path[1:]
    copy = list(document) if isinstance(document, list) else dict(document)
    if rest:
        key: Any = int(part) if isinstance(copy, list) else part
        copy[key] = _set(_at(document, [part]), rest, value, replace=replace)
        return copy
    if replace:
        _at(document, [part])  # has to be there
    if isinstance(copy, list):
        index = len(copy) if part == "-" else int(part)
        copy[index : index + replace] = [] if value is _MISSING else [value]
    elif value is _MISSING:
        del copy[part]
    else:
        copy[part] = value
    return copy
