"""Reading a table back: its comment, its chains, the elements of its maps."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from netlink.attributes import parse, parsed, text
from netlink.errors import NetlinkError
from netlink.messages import NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, error_code
from netlink.nftables.expressions import LimitOver, Verdict
from netlink.nftables.objects import ELEMENT_INTERVAL_END, SET_ANONYMOUS, Data, Elements, Goto, Map, Table

GETTABLE, GETCHAIN, GETRULE, GETSET, GETSETELEM, GETGEN = 1, 4, 7, 10, 13, 16
ENOENT, EINTR = 2, 4
DUMP_TRIES = 100
BODY = 20  # netlink header and nfgenmsg

Ask = Callable[[int, int, bytes], Iterator[tuple[int, int, bytes]]]


def generation(ask: Ask) -> int:
    """Return the number of the ruleset's last change, by whomever, in this network namespace."""
    for kind, _, message in ask(GETGEN, 0, b""):
        if kind == NLMSG_ERROR:
            _refuse(message, "ask for the ruleset's generation", missing_is_fine=False)
        return int(struct.unpack(">I", parsed(message, BODY)[1])[0])
    raise NetlinkError(ENOENT, "cannot ask for the ruleset's generation")


def table_comment(ask: Ask, table: Table) -> str | None:
    """Return the comment of a table ("" if it has none), or None when there is no such table."""
    for kind, _, message in ask(GETTABLE, 0, text(1, table.name)):
        if kind == NLMSG_ERROR:
            _refuse(message, f"look up table {table}", missing_is_fine=True)
            return None
        return _comment(parsed(message, BODY).get(6, b""))
    return None


def rules(ask: Ask, table: Table) -> dict[str, tuple[str, ...]]:
    """Return the comments of a table's rules, in order, by chain."""
    found: dict[str, tuple[str, ...]] = {}
    for message in _dump(ask, GETRULE, text(1, table.name), f"list the rules of {table}"):
        attributes = parsed(message, BODY)
        if _string(attributes[1]) == table.name:
            chain = _string(attributes[2])
            found[chain] = (*found.get(chain, ()), _comment(attributes.get(7, b"")))
    return found


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _comment(userdata: bytes) -> str:
    """Return the comment in nft's user data of a table or rule: type 0, length, text."""
    return _string(userdata[2 : 2 + userdata[1]]) if userdata[:1] == b"\0" else ""


def chains(ask: Ask, table: Table) -> frozenset[str]:
    """Return the names of the chains of a table."""
    found = set()
    for message in _dump(ask, GETCHAIN, text(1, table.name), f"list the chains of {table}"):
        attributes = parsed(message, BODY)
        if _string(attributes[1]) == table.name:
            found.add(_string(attributes[3]))
    return frozenset(found)


def maps(ask: Ask, table: Table) -> frozenset[str]:
    """Return the names of the sets and maps of a table; those that rules write in braces have none."""
    found = set()
    for message in _dump(ask, GETSET, text(1, table.name), f"list the maps of {table}", missing_is_fine=True):
        attributes = parsed(message, BODY)
        if not struct.unpack(">I", attributes.get(3, bytes(4)))[0] & SET_ANONYMOUS:
            found.add(_string(attributes[2]))
    return frozenset(found)


def elements(ask: Ask, table: Table, which: Map) -> Elements:
    """Return the elements of a map."""
    found: Elements = {}
    body = text(1, table.name) + text(2, which.name)
    for message in _dump(ask, GETSETELEM, body, f"list map {which.name} of {table}"):
        for kind, payload in parse(message, BODY):
            if kind == 3:
                found.update(_elements(payload, which))
    return found


def _elements(payload: bytes, which: Map) -> Iterator[tuple[bytes, Data]]:
    """Yield the elements of one message.

    Those of a data map differ from the first in nothing but key and data bytes: as long as the rest is the
    same, these are cut out where they stood in the first. A restart reads 100,000 of them.
    """
    _, first = next(parse(payload), (0, b""))
    if not first:
        return
    key, data = _element(first, which)
    length, start = len(first) + 4, 0
    if isinstance(data, bytes) and length == 20 + len(key) + len(data) and not which.interval:
        at = 12 + len(key)
        before, between = payload[:12], payload[12 + len(key) : 20 + len(key)]
        while payload[start : start + 12] == before and payload[start + at : start + at + 8] == between:
            yield payload[start + 12 : start + at], payload[start + at + 8 : start + length]
            start += length
    for _, element in parse(payload, start):
        yield _element(element, which)


def _element(element: bytes, which: Map) -> tuple[bytes, Data]:
    attributes = parsed(element)
    key = parsed(attributes[1])[1]
    if which.ranges:
        key += parsed(attributes[10])[1] if 10 in attributes else key
    elif which.interval:
        flags = struct.unpack(">I", attributes[3])[0] if 3 in attributes else 0
        key += bytes([flags & ELEMENT_INTERVAL_END])
    if 7 in attributes:
        limit = parsed(parsed(attributes[7])[2])
        burst = struct.unpack(">I", limit[3])[0] if 3 in limit else 0
        return key, LimitOver(struct.unpack(">Q", limit[1])[0], burst)
    if 2 not in attributes:
        return key, None
    data = parsed(attributes[2])
    if 1 in data:
        return key, data[1]
    verdict = parsed(data[2])
    code = struct.unpack(">i", verdict[1])[0]
    return key, Goto(_string(verdict[2]) if code == Verdict.GOTO else "")


def _dump(ask: Ask, kind: int, body: bytes, what: str, *, missing_is_fine: bool = False) -> list[bytes]:
    """Return the messages of a dump; one that changed under way is asked for again."""
    for _ in range(DUMP_TRIES):
        found: list[bytes] = []
        interrupted = False
        for answer, flags, message in ask(kind, NLM_F_DUMP, body):
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            if answer == NLMSG_ERROR:
                _refuse(message, what, missing_is_fine=missing_is_fine)
            elif answer != NLMSG_DONE:
                found.append(message)
        if not interrupted:
            return found
    raise NetlinkError(EINTR, f"cannot {what}", f"it changed during each of {DUMP_TRIES} readings")


def _refuse(message: bytes, what: str, *, missing_is_fine: bool) -> None:
    code = error_code(message)
    if code and not (missing_is_fine and code == ENOENT):
        raise NetlinkError(code, f"cannot {what}")
