"""Read fields of decoded JSON: each comes out with its type, or a CniError names the field and its value.

`where` is what stands before a field's name in messages, such as "prevResult.ips[0].".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_interface
from typing import Any, TypeVar

from cni.errors import BAD_CONFIG, CniError

T = TypeVar("T")
Json = dict[str, Any]

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
IDENTIFIER_FORM = "a letter or digit, then letters, digits, '_', '.' and '-'"
JSON_NAMES = {str: "a string", int: "a number", bool: "true or false", dict: "an object", list: "a list"}
SHOWN = 80  # characters of a wrong value in a message


def show(value: object) -> str:
    """Return a value as messages have it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def wrong(what: str, value: object, form: str, code: int = BAD_CONFIG) -> CniError:
    """Return the error for a field that is not of the form it must have."""
    return CniError(code, f"{what} is {show(value)}, {form}")


def typed(raw: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T | None:
    """Return a field of that type; None when absent or null."""
    value = raw.get(key)
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise wrong(f"{where}{key}", value, f"which is not {JSON_NAMES[kind]}")


def text(where: str, raw: Mapping[str, Any], key: str) -> str:
    """Return a string that must be there."""
    value = typed(raw, key, str, where)
    if not value:
        raise CniError(BAD_CONFIG, f"{where}{key} is missing")
    return value


def objects(raw: Mapping[str, Any], key: str, where: str = "") -> list[tuple[str, Json]]:
    """Return the objects in a list, each with what stands before its fields in messages."""
    items = typed(raw, key, list, where) or []
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise wrong(f"{where}{key}[{at}]", item, "which is not an object")
    return [(f"{where}{key}[{at}].", item) for at, item in enumerate(items)]


def check_address(where: str, key: str, value: str) -> None:
    """Refuse what is neither an address nor empty."""
    try:
        if value:
            ip_address(value)
    except ValueError:
        raise wrong(f"{where}{key}", value, "which is not an address") from None


def check_cidr(where: str, key: str, value: str) -> None:
    """Refuse what is not an address with a prefix length; a netmask is none."""
    fault = wrong(f"{where}{key}", value, "which is not an address with a prefix length")
    length = value.rpartition("/")[2]
    if "/" not in value or not (length.isascii() and length.isdigit()):
        raise fault
    try:
        ip_interface(value)
    except ValueError:
        raise fault from None
