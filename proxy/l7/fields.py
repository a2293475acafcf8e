"""The kinds of values in an annotation: how each is read, and said in JSON Schema and in the documentation.

Whatever comes of text is printable ASCII, so that no value can end a line of HAProxy's configuration; quoting
what means something within a line is `render`'s work.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 60
UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
TIME = re.compile(r"(0|[1-9][0-9]{0,8})(ms|s|m|h)")
TIMES = '"500ms", "2s", "1m" or "1h"'
PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]{1,60}")
ASCII = re.compile(r"[ -~]*")


class AnnotationError(ValueError):
    """An annotation that cannot be used: one sentence, with the field and the value."""


class UnknownKey(AnnotationError):
    """A key that is not known at its place, nor like one that is."""

    def __init__(self, place: str, key: str, keys: list[str]) -> None:
        super().__init__(f"{place}: there is no such key; known here are {', '.join(keys)}")
        self.place, self.key = place, key


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: `words` for the documentation, a JSON Schema, and how it is read.

    `read` takes the value's place and the value, and raises AnnotationError. `fields` are those of an object.
    """

    words: str
    schema: Mapping[str, Any]
    read: Callable[[str, Any], Any]
    fields: tuple[Field, ...] = ()


@dataclass(frozen=True, slots=True)
class Field:
    """A key of an object. `attribute` is what it is called in the policy; "": its own fields are, one by one.

    `default` is as JSON has it; None: there is none. `tcp` are the values that a service of `ip-protocol` tcp
    may have there (of a list: the items); (): it must not have the key; None: any.
    """

    key: str
    attribute: str
    kind: Kind
    meaning: str
    default: Any = None
    tcp: tuple[Any, ...] | None = None
    required: bool = False


def shown(value: object) -> str:
    """Return a value of JSON as it can stand in a sentence."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value).replace("\x7f", "\\u007f")
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}…{text[-10:]}"


def under(place: str, key: str) -> str:
    """Return the place of a key in the object at a place."""
    name = key if PLAIN_KEY.fullmatch(key) else shown(key)
    return f"{place}.{name}" if place else name


def refusal(place: str, value: object, wanted: str) -> AnnotationError:
    """Return the error for a value that is not what is wanted."""
    return AnnotationError(f"{place or 'the annotation'}: {shown(value)} is not {wanted}")


def time_text(milliseconds: int) -> str:
    """Return a time as an annotation has it, in the largest unit that it is a whole number of."""
    unit = next(u for u in ("h", "m", "s", "ms") if milliseconds % UNITS[u] == 0 and milliseconds)
    return f"{milliseconds // UNITS[unit]}{unit}"


def boolean() -> Kind:
    """Return the kind of true and false."""

    def read(place: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise refusal(place, value, "true or false")
        return value

    return Kind("true or false", {"type": "boolean"}, read)


def number(low: int, high: int) -> Kind:
    """Return the kind of whole numbers in a range; 3.0 is one, as in JSON Schema."""
    wanted = f"a whole number from {low} to {high}"

    def read(place: str, value: object) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not isinstance(value, int | float):
            raise refusal(place, value, wanted)
        if not low <= value <= high:
            raise refusal(place, value, wanted)
        return int(value)

    return Kind(f"number, {low} to {high}", {"type": "integer", "minimum": low, "maximum": high}, read)


def one_of(*numbers: int) -> Kind:
    """Return the kind of a few numbers."""
    listed = ", ".join(map(str, numbers))

    def read(place: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in numbers:
            raise refusal(place, value, f"one of {listed}")
        return int(value)

    return Kind(listed, {"enum": [*numbers]}, read)


def time(low: int, high: int) -> Kind:
    """Return the kind of times with a unit, in milliseconds once read."""
    span = f"{time_text(low)} to {time_text(high)}"

    def read(place: str, value: object) -> int:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise refusal(place, value, f"a time: it needs a unit, as in {TIMES}")
        found = TIME.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise refusal(place, value, f"a time such as {TIMES}")
        milliseconds = int(found[1]) * UNITS[found[2]]
        if not low <= milliseconds <= high:
            raise refusal(place, value, f"a time from {time_text(low)} to {time_text(high)}")
        return milliseconds

    return Kind(f"time, {span}", {"type": "string", "pattern": f"^{TIME.pattern}$"}, read)


def choice(names: Mapping[str, Any]) -> Kind:
    """Return the kind of a few words; a value that two words stand for is documented by the first."""
    wanted = f"one of {', '.join(names)}"
    listed: dict[Any, str] = {}
    for name, value in names.items():
        listed.setdefault(value, name)

    def read(place: str, value: object) -> Any:
        if not isinstance(value, str) or value not in names:
            near = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
            raise refusal(place, value, wanted + (f"; did you mean {near[0]}?" if near else ""))
        return names[value]

    return Kind(", ".join(f"`{name}`" for name in listed.values()), {"enum": [*names]}, read)


def text(
    words: str,
    pattern: str,
    longest: int,
    wrong: Callable[[str], str] | None = None,
) -> Kind:
    """Return the kind of text that matches a pattern, in printable ASCII.

    `words` complete "… is not"; so does what `wrong` returns for a text that matches, "" where it is right.
    """
    compiled = re.compile(pattern)

    def read(place: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise refusal(place, value, f"{words} of at most {longest} characters")
        if not ASCII.fullmatch(value):
            raise refusal(place, value, f"{words}: only printable ASCII characters can be")
        if not compiled.fullmatch(value):
            raise refusal(place, value, words)
        if told := wrong(value) if wrong else "":
            raise refusal(place, value, told)
        return value

    schema = {"type": "string", "pattern": f"^({pattern})$", "maxLength": longest}
    return Kind(words, schema, read)


def listing(item: Kind, words: str, most: int, least: int = 0) -> Kind:
    """Return the kind of lists, without anything twice."""

    def read(place: str, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            wanted = f"a list with {least} to {most} entries"
            counted = f" of {len(value)}" if isinstance(value, list) else ""
            raise AnnotationError(f"{place}: {shown(value)}{counted} is not {wanted}")
        found: dict[Any, int] = {}
        for index, entry in enumerate(value):
            first = found.setdefault(item.read(f"{place}[{index}]", entry), index)
            if first != index:
                raise AnnotationError(f"{place}[{index}]: {shown(entry)} is the same as {place}[{first}]")
        return tuple(found)

    schema = {"type": "array", "items": item.schema, "maxItems": most, "uniqueItems": True}
    if least:
        schema["minItems"] = least
    return Kind(words, schema, read, item.fields)


def mapping(key: Kind, value: Kind, words: str, most: int) -> Kind:
    """Return the kind of objects with keys of the user's, which count without regard to case."""

    def read(place: str, values: object) -> tuple[tuple[str, str], ...]:
        if not isinstance(values, dict) or len(values) > most:
            counted = f" of {len(values)} keys" if isinstance(values, dict) else ""
            raise AnnotationError(f"{place}: {shown(values)}{counted} is not {words}, at most {most}")
        seen: dict[str, str] = {}
        for name in values:
            first = seen.setdefault(key.read(place, name).lower(), name)
            if first != name:
                raise AnnotationError(f"{under(place, name)}: it is there already, as {first}")
        return tuple((name, value.read(under(place, name), given)) for name, given in values.items())

    names = {k: v for k, v in key.schema.items() if k != "type"}
    schema = {
        "type": "object",
        "propertyNames": names,
        "additionalProperties": value.schema,
        "maxProperties": most,
    }
    return Kind(words, schema, read)


def section(
    make: Callable[[str, dict[str, Any]], Any],
    fields: tuple[Field, ...],
    rules: Mapping[str, Any] | None = None,
) -> Kind:
    """Return the kind of objects with known keys.

    `make` takes the place and what was read, by attribute, and may raise AnnotationError for what does not go
    together; `rules` say the same in JSON Schema.
    """
    keys = [field.key for field in fields]

    def read(place: str, value: object) -> Any:
        if not isinstance(value, dict):
            raise refusal(place, value, f"an object with keys such as {keys[0]}")
        for key in value:
            if key not in keys:
                raise _unknown(under(place, key), key, keys)
        given: dict[str, Any] = {}
        for field in fields:
            if field.key in value:
                found = field.kind.read(under(place, field.key), value[field.key])
                given |= {field.attribute: found} if field.attribute else found
            elif field.required:
                raise AnnotationError(f"{under(place, field.key)} is missing")
        return make(place, given)

    schema: dict[str, Any] = {
        "type": "object",
        "properties": {field.key: _described(field) for field in fields},
        "additionalProperties": False,
    }
    if required := [field.key for field in fields if field.required]:
        schema["required"] = required
    return Kind("object", schema | dict(rules or {}), read, fields)


def either(flag: Callable[[bool], Any], other: Kind) -> Kind:
    """Return the kind of true and false, or of an object that says more than true."""

    def read(place: str, value: object) -> Any:
        if not isinstance(value, bool | dict):
            raise refusal(place, value, f"true, false or an object with keys such as {other.fields[0].key}")
        return flag(value) if isinstance(value, bool) else other.read(place, value)

    schema = {"anyOf": [{"type": "boolean"}, other.schema]}
    return Kind(f"switch (true or false), or an {other.words}", schema, read, other.fields)


def _described(field: Field) -> dict[str, Any]:
    found: dict[str, Any] = {**field.kind.schema, "description": field.meaning}
    return found if field.default is None else found | {"default": field.default}


def _unknown(place: str, key: str, keys: list[str]) -> AnnotationError:
    near = nearest(key, {name: name for name in keys})
    return misspelt(place, near) if near else UnknownKey(place, key, keys)


def misspelt(place: str, near: str) -> AnnotationError:
    """Return the error for an unknown key that is like another."""
    return AnnotationError(f"{place}: there is no such key; did you mean {near}?")


def nearest(key: str, names: Mapping[str, str]) -> str:
    """Return the place of the key that one is like, "" for none. `names` are keys and their places."""
    normal = {name.replace("-", ""): place for name, place in names.items()}
    plain = key[:SHOWN].lower().replace("-", "").replace("_", "")
    near = difflib.get_close_matches(plain, normal, 1, 0.7)
    return normal[near[0]] if near else ""


def places(fields: tuple[Field, ...], place: str = "") -> Iterator[tuple[str, Field]]:
    """Yield every key with its place, those of objects within after them."""
    for field in fields:
        here = f"{place}.{field.key}" if place else field.key
        yield here, field
        many = "[]" if field.kind.schema.get("type") == "array" else ""
        yield from places(field.kind.fields, here + many)


def not_for_tcp(fields: tuple[Field, ...], values: Mapping[str, Any], place: str = "") -> None:
    """Raise AnnotationError for what only HTTP has."""
    for field in fields:
        if field.key not in values:
            continue
        here, value = under(place, field.key), values[field.key]
        if field.tcp == ():
            raise AnnotationError(f"{here}: ip-protocol tcp has no such key, only http")
        if field.tcp is not None:
            for item in value if isinstance(value, list) else [value]:
                if item not in field.tcp:
                    raise AnnotationError(f"{here}: {shown(item)} needs ip-protocol http; it is tcp")
        elif isinstance(value, dict):
            not_for_tcp(field.kind.fields, value, here)


def tcp_schema(fields: tuple[Field, ...]) -> dict[str, Any]:
    """Return in JSON Schema what `not_for_tcp` refuses; nothing where it refuses nothing."""
    found: dict[str, Any] = {}
    for field in fields:
        if field.tcp == ():
            found[field.key] = False
        elif field.tcp is not None:
            listed = {"enum": [*field.tcp]}
            found[field.key] = {"items": listed} if field.kind.schema.get("type") == "array" else listed
        elif inner := tcp_schema(field.kind.fields):
            found[field.key] = inner
    return {"properties": found} if found else {}
