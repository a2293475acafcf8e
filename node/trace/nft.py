"""nftables as the kernel has it: tables, chains, rules and sets of all who made some, as values.

Rules keep the kernel's expressions with their attributes as bytes (linux/netfilter/nf_tables.h), so nothing
is lost of those that nobody here knows: `nft_words` and `nft_walk` give them a meaning.
"""

from __future__ import annotations

import bisect
import functools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from netlink.attributes import parse, parsed, text
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.messages import NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, error_code
from netlink.nftables import dump
from netlink.nftables.batch import NftSocket
from netlink.nftables.objects import (
    ELEMENT_INTERVAL_END,
    SET_ANONYMOUS,
    SET_CONCAT,
    SET_INTERVAL,
    VERDICT_TYPE,
    Map,
)
from netlink.nftables.objects import Table as TableName

GETTABLE, GETCHAIN, GETRULE, GETSET, GETSETELEM = 1, 4, 7, 10, 13
BODY = 20  # netlink header and nfgenmsg
INET, NETDEV, BRIDGE = 1, 5, 7
DORMANT = 1  # NFT_TABLE_F_DORMANT: its chains are not called
FAMILY_WORDS = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
READ_TRIES = 20
OURS = "podwire"
"""How the names of our own tables begin."""

JUMP, GOTO, RETURN, CONTINUE, DROP, ACCEPT, QUEUE = -3, -4, -5, -1, 0, 1, 3

Ask = Callable[[int, int, bytes], Iterator[tuple[int, int, bytes]]]


@dataclass(frozen=True, slots=True)
class Expr:
    """An expression of a rule: the kernel's name for it, and its attributes by number."""

    name: str
    data: Mapping[int, bytes] = field(default_factory=dict)

    def number(self, kind: int, default: int = 0) -> int:
        """Return an attribute as a number: nfnetlink has them in network order."""
        return int.from_bytes(self.data[kind], "big") if kind in self.data else default

    def word(self, kind: int) -> str:
        """Return an attribute as a string."""
        return string(self.data.get(kind, b""))

    def slot(self, kind: int) -> int:
        """Return an attribute that names a register as the number of its first four bytes, -1: a verdict.

        The kernel names registers of 16 bytes 1 to 4, and those of four 8 to 23.
        """
        value = self.number(kind)
        return value - 8 if value >= 8 else (value - 1) * 4 if value else -1


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule; `handle` names it in its table."""

    handle: int
    expressions: tuple[Expr, ...]
    comment: str = ""

    @property
    def packets(self) -> int | None:
        """How many packets its counter has seen; None without one."""
        found = [e.number(2) for e in self.expressions if e.name == "counter"]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Base:
    """A base chain's place: its type (filter, nat, route), hook (NF_INET_*) and priority; its policy."""

    kind: str
    hook: int
    priority: int
    drops: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; a base chain if it has a hook."""

    name: str
    base: Base | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Jump:
    """A verdict, with the chain that a jump or goto leads to."""

    code: int
    chain: str = ""


Data = bytes | Jump | None


@dataclass(frozen=True, slots=True)
class Set:
    """A set or map, and what is in it.

    In a set of `interval`s a key has one more byte: 0 where a range starts, 1 behind its end. In one with
    `ranges` of several `fields` (bytes each), a key is the first key and then the last. A set whose elements
    are `limited` matches packets beyond a rate only. The key b"" is the element for all others.
    """

    name: str
    elements: Mapping[bytes, Data]
    interval: bool = False
    ranges: bool = False
    fields: tuple[int, ...] = ()
    verdicts: bool = False
    limited: bool = False
    anonymous: bool = False
    bounds: tuple[bytes, ...] = ()
    """Of a set of intervals: where these start (followed by 1) and end (followed by 0), in order."""

    def find(self, key: bytes) -> tuple[bytes, Data] | None:
        """Return the element that a key is in: what stands for it in the set, and its data."""
        if self.ranges:
            found = next((e for e in self.elements if e and self._spans(e, key)), None)
        elif self.interval:
            at = bisect.bisect_right(self.bounds or bounds(self.elements), key + b"\1") - 1
            below = (self.bounds or bounds(self.elements))[at] if at >= 0 else b"\0"
            found = below[:-1] + b"\0" if below[-1] else None
        else:
            found = key if key in self.elements else None
        if found is None and b"" in self.elements:
            found = b""
        return None if found is None else (found, self.elements[found])

    def _spans(self, element: bytes, key: bytes) -> bool:
        start = 0
        for size in self.fields or (len(key),):
            end = start + (size + 3 & ~3)
            if not element[start:end] <= key[start:end] <= element[len(key) + start : len(key) + end]:
                return False
            start = end
        return True


@dataclass(frozen=True, slots=True)
class Table:
    """A table with all that is in it; `family` is an NFPROTO_*."""

    family: int
    name: str
    chains: Mapping[str, Chain]
    sets: Mapping[str, Set]

    def __str__(self) -> str:
        return f"{FAMILY_WORDS.get(self.family, self.family)} {self.name}"


def bounds(elements: Mapping[bytes, Data]) -> tuple[bytes, ...]:
    """Return where intervals start and end, in order: an end comes before the start at its address."""
    return tuple(sorted(e[:-1] + bytes([1 - e[-1]]) for e in elements if e))


def string(value: bytes) -> str:
    """Return a NUL-terminated string."""
    return value.rstrip(b"\0").decode(errors="replace")


def verdict(data: bytes) -> Jump | None:
    """Decode rule or element data (NFTA_DATA_*) that may be a verdict."""
    found = parsed(data)
    if 2 not in found:
        return None
    inner = parsed(found[2])
    return Jump(int(struct.unpack(">i", inner[1])[0]), string(inner.get(2, b"")))


class Reader(NftSocket):
    """Reads the tables that see the packets of an IP family, in the namespace of the thread that opens it."""

    def tables(self, family: Family) -> tuple[Table, ...]:
        """Return the tables of a family, of inet, and of bridge and netdev, which are only told.

        All of one moment: if the ruleset changes meanwhile it is read again. Raises NetlinkError.
        """
        found: tuple[Table, ...] = ()
        for _ in range(READ_TRIES):
            before = self.generation()
            try:
                found = tuple(t for number in (family.af, INET, BRIDGE, NETDEV) for t in self._family(number))
            except NetlinkError as error:
                if not error.gone:
                    raise
                continue
            if self.generation() == before:
                return found
        return found

    def _family(self, family: int) -> Iterator[Table]:
        ask = functools.partial(self._ask, family)
        flags = {
            string(t[1]): int.from_bytes(t.get(2, b""), "big") for t in _dump(ask, GETTABLE, b"", "tables")
        }
        chains: dict[str, dict[str, Chain]] = {}
        for found in _dump(ask, GETCHAIN, b"", "chains"):
            name, table = string(found[3]), string(found[1])
            base = _base(found) if 4 in found and not flags.get(table, 0) & DORMANT else None
            chains.setdefault(table, {})[name] = Chain(name, base)
        for table, some in chains.items():
            rules: dict[str, list[Rule]] = {name: [] for name in some}
            for found in _dump(ask, GETRULE, text(1, table), "rules"):
                if string(found[1]) == table:
                    rules.setdefault(string(found[2]), []).append(_rule(found))
            full = {name: Chain(name, chain.base, tuple(rules[name])) for name, chain in some.items()}
            sets = {s.name: s for s in self._sets(ask, family, table)}
            yield Table(family, table, full, sets)

    def _sets(self, ask: Ask, family: int, table: str) -> Iterator[Set]:
        for found in list(_dump(ask, GETSET, text(1, table), "sets")):
            if string(found[1]) != table:
                continue
            name, flags = string(found[2]), int.from_bytes(found.get(3, b""), "big")
            concat = bool(flags & SET_CONCAT and flags & SET_INTERVAL)
            verdicts = int.from_bytes(found.get(6, b""), "big") == VERDICT_TYPE
            interval = bool(flags & SET_INTERVAL) and not concat
            if table.startswith(OURS) and not verdicts and 17 not in found:
                which = Map(name, (), interval=interval, ranges=concat)
                raw = dump.elements(ask, TableName(Family.V4, table), which)
                elements = cast("dict[bytes, Data]", raw)  # neither verdicts nor limits
            else:
                body = text(1, table) + text(2, name)
                elements = {}
                for message in _dump(ask, GETSETELEM, body, f"the elements of {name}"):
                    elements.update(_elements(message.get(3, b""), interval, concat))
            yield Set(
                name,
                elements,
                interval,
                concat,
                _fields(found),
                verdicts,
                limited=17 in found,
                anonymous=bool(flags & SET_ANONYMOUS),
                bounds=bounds(elements) if interval else (),
            )


def _base(found: dict[int, bytes]) -> Base:
    hook = parsed(found[4])
    return Base(
        string(found.get(7, b"filter")),
        int.from_bytes(hook[1], "big"),
        int(struct.unpack(">i", hook[2])[0]),
        int.from_bytes(found.get(5, b"\1"), "big") == DROP,
    )


def _rule(found: dict[int, bytes]) -> Rule:
    expressions = []
    for _, element in parse(found.get(4, b"")):
        attributes = parsed(element)
        expressions.append(Expr(string(attributes[1]), parsed(attributes.get(2, b""))))
    userdata = found.get(7, b"")
    comment = string(userdata[2 : 2 + userdata[1]]) if userdata[:1] == b"\0" else ""
    return Rule(int.from_bytes(found.get(3, b""), "big"), tuple(expressions), comment)


def _fields(found: dict[int, bytes]) -> tuple[int, ...]:
    """Return the bytes that count in each field of a set's key, where the set says so (NFTA_SET_DESC)."""
    description = parsed(found.get(9, b""))
    return tuple(int.from_bytes(parsed(f)[1], "big") for _, f in parse(description.get(2, b"")))


def _elements(payload: bytes, interval: bool, ranges: bool) -> Iterator[tuple[bytes, Data]]:
    for _, element in parse(payload):
        attributes = parsed(element)
        key = parsed(attributes[1])[1] if 1 in attributes else b""
        if ranges and key:
            key += parsed(attributes[10])[1] if 10 in attributes else key
        elif interval and key:
            key += bytes([int.from_bytes(attributes.get(3, b""), "big") & ELEMENT_INTERVAL_END])
        data: Data = None
        if 2 in attributes:
            data = verdict(attributes[2]) or parsed(attributes[2]).get(1)
        yield key, data


def _dump(ask: Ask, kind: int, body: bytes, what: str) -> list[dict[int, bytes]]:
    """Return the attributes of each message of a dump; one that changed under way is asked for again."""
    for _ in range(READ_TRIES):
        found: list[dict[int, bytes]] = []
        interrupted = False
        for answer, flags, message in ask(kind, NLM_F_DUMP, body):
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            if answer == NLMSG_ERROR:
                if code := error_code(message):
                    raise NetlinkError(code, f"cannot list the {what} of nftables")
            elif answer != NLMSG_DONE:
                found.append(parsed(message, BODY))
        if not interrupted:
            return found
    return found
