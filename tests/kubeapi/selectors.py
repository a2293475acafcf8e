"""Label and field selectors, as lists and watches take them.

https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.kubeapi.status import ApiError

Labels = Mapping[str, str]
Matches = Callable[[Labels], bool]

_TERM = re.compile(
    r"\s*(?:"
    r"!\s*(?P<absent>[\w./-]+)"
    r"|(?P<set>[\w./-]+)\s+(?P<how>in|notin)\s*\((?P<values>[^)]*)\)"
    r"|(?P<key>[\w./-]+)\s*(?P<sign>==|!=|=)\s*(?P<value>[\w./-]*)"
    r"|(?P<present>[\w./-]+)"
    r")\s*(?:,|$)"
)


def parse_labels(text: str) -> Matches | None:
    """Return what decides whether labels match; None for a selector that selects everything."""
    tests: list[Matches] = []
    at = 0
    while at < len(text):
        term = _TERM.match(text, at)
        if not term:
            raise ApiError(400, f'unable to parse requirement: found "{text[at:]}" in "{text}"')
        tests.append(_label_test(term))
        at = term.end()
    if not tests:
        return None
    return lambda labels: all(test(labels) for test in tests)


def _label_test(term: re.Match[str]) -> Matches:
    part = term.groupdict()
    if key := part["absent"]:
        return lambda labels: key not in labels
    if key := part["present"]:
        return lambda labels: key in labels
    if key := part["set"]:
        values = frozenset(v.strip() for v in part["values"].split(","))
        if part["how"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values  # also without the label
    key, value = part["key"], part["value"]
    if part["sign"] == "!=":
        return lambda labels: labels.get(key) != value
    return lambda labels: labels.get(key) == value


FieldTest = tuple[str, bool, str]
"""Path, whether it is to be equal, value."""


def parse_fields(text: str, allowed: tuple[str, ...]) -> tuple[FieldTest, ...]:
    """Return the terms of a field selector; a field that is not selectable is a 400, as in the real one."""
    tests = []
    for term in filter(None, text.split(",")):
        parts = re.fullmatch(r"([^=!]+)(==|!=|=)(.*)", term)
        if not parts:
            raise ApiError(400, f'invalid selector: "{text}"; can\'t understand "{term}"')
        path, sign, value = parts.groups()
        if path not in allowed:
            raise ApiError(400, f"field label not supported: {path}")
        tests.append((path, sign != "!=", value))
    return tuple(tests)


def field(obj: Mapping[str, Any], path: str) -> str:
    """Return an object's field as selectors compare it: text, and empty when it is not there."""
    value: Any = obj
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "false" if path == "spec.unschedulable" else ""
    return str(value)
