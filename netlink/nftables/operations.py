"""What can be asked of nftables, as values, and their messages.

The elements of a map go out as up to 60 kB of bytes a message. Source: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from netlink.attributes import NLA_F_NESTED, attribute, text
from netlink.messages import NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL
from netlink.nftables.objects import Chain, Data, Map, Rule, Table, encode_element, tlv

NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, NEWSET, DELSET = 0, 2, 3, 5, 6, 9, 11
NEWSETELEM, DELSETELEM = 12, 14
ELEMENT_BYTES = 60_000  # a nested attribute's length has 16 bits


@dataclass(frozen=True, slots=True)
class AddTable:
    """Make the table; the comment is kept with it and read back by `Nft.table_comment`."""

    comment: str

    def __str__(self) -> str:
        return "add the table"


@dataclass(frozen=True, slots=True)
class DeleteTable:
    """Remove the table and all in it."""

    def __str__(self) -> str:
        return "delete the table"


@dataclass(frozen=True, slots=True)
class AddChain:
    """Make a chain."""

    chain: Chain

    def __str__(self) -> str:
        return f"add chain {self.chain.name}"


@dataclass(frozen=True, slots=True)
class DeleteChain:
    """Remove a chain and its rules; nothing may go to it any more."""

    name: str

    def __str__(self) -> str:
        return f"delete chain {self.name}"


@dataclass(frozen=True, slots=True)
class AddRule:
    """Append a rule to its chain."""

    rule: Rule

    def __str__(self) -> str:
        return f"add a rule to chain {self.rule.chain} ({self.rule.comment})"


@dataclass(frozen=True, slots=True)
class AddMap:
    """Make an empty set or map."""

    map: Map

    def __str__(self) -> str:
        return f"add map {self.map.name}"


@dataclass(frozen=True, slots=True)
class DeleteMap:
    """Remove a set or map, given as such or by name, and its elements; no rule may use it any more."""

    map: Map | str

    @property
    def name(self) -> str:
        """The name of the set or map."""
        return self.map if isinstance(self.map, str) else self.map.name

    def __str__(self) -> str:
        return f"delete map {self.name}"


@dataclass(frozen=True, slots=True)
class AddElements:
    """Put elements into a map; a key that is there with other data is an error."""

    map: Map
    elements: Sequence[tuple[bytes, Data]]

    def __str__(self) -> str:
        return f"add elements to map {self.map.name}"


@dataclass(frozen=True, slots=True)
class EnsureElements:
    """Put elements into a map unless they are there; a key that is there with other data is an error."""

    map: Map
    elements: Sequence[tuple[bytes, Data]]

    def __str__(self) -> str:
        return f"put elements into map {self.map.name}"


@dataclass(frozen=True, slots=True)
class FlushMap:
    """Take all elements out of a map."""

    map: Map

    def __str__(self) -> str:
        return f"flush map {self.map.name}"


@dataclass(frozen=True, slots=True)
class DeleteElements:
    """Take elements out of a map; a key that is not there is an error."""

    map: Map
    elements: Sequence[tuple[bytes, Data]]

    def __str__(self) -> str:
        return f"delete elements from map {self.map.name}"


Operation = (
    AddTable
    | DeleteTable
    | AddChain
    | DeleteChain
    | AddRule
    | AddMap
    | DeleteMap
    | AddElements
    | EnsureElements
    | DeleteElements
    | FlushMap
)


Pairs = Sequence[tuple[bytes, Data]]
"""Elements on their way into or out of a map."""


def encode(table: Table, operation: Operation, index: int) -> Iterator[tuple[int, int, bytes, Pairs]]:
    """Yield (message type, flags, body, the elements in it) for the operation at `index` of a batch."""
    create = NLM_F_CREATE | NLM_F_EXCL
    head = text(1, table.name)
    match operation:
        case AddTable(comment):
            userdata = attribute(6, tlv(0, comment.encode() + b"\0"))
            yield NEWTABLE, create, head + userdata, ()
        case DeleteTable():
            yield DELTABLE, 0, head, ()
        case AddChain(chain):
            yield NEWCHAIN, create, chain.attributes(table.name), ()
        case DeleteChain(name):
            yield DELCHAIN, 0, head + text(3, name), ()
        case AddRule(rule):
            yield NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule.attributes(table.name), ()
        case AddMap(which):
            yield NEWSET, create, which.attributes(table.name, table.family, index + 1), ()
        case DeleteMap():
            yield DELSET, 0, head + text(2, operation.name), ()
        case AddElements(which, elements):
            yield from _encode_elements(NEWSETELEM, create, head, which, elements)
        case EnsureElements(which, elements):
            yield from _encode_elements(NEWSETELEM, NLM_F_CREATE, head, which, elements)
        case FlushMap(which):
            yield DELSETELEM, 0, head + text(2, which.name), ()
        case DeleteElements(which, elements):
            yield from _encode_elements(DELSETELEM, 0, head, which, elements)


def _encode_elements(
    kind: int, flags: int, table: bytes, which: Map, elements: Pairs
) -> Iterator[tuple[int, int, bytes, Pairs]]:
    head = table + text(2, which.name)
    for start, encoded in chunks(elements, which):
        body = head + struct.pack("=HH", sum(map(len, encoded)) + 4, 3 | NLA_F_NESTED) + b"".join(encoded)
        yield kind, flags, body, elements[start : start + len(encoded)]


def chunks(elements: Pairs, which: Map) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (index of the first, encoded elements) such that each list fits one message.

    The elements of a data map differ in nothing but key and data bytes, and those of other maps with the
    same data in nothing but the key, so their frames are made once: this loads 100,000 elements.
    """
    key, data = elements[0] if elements else (b"", b"")
    if isinstance(data, bytes) and elements and not (which.interval or which.ranges):
        sample = encode_element(key, data)
        before, between = sample[:12], sample[12 + len(key) : len(sample) - len(data)]
        fit = ELEMENT_BYTES // len(sample)
        for start in range(0, len(elements), fit):
            part = elements[start : start + fit]
            yield start, [before + k + between + d for k, d in part]  # type: ignore[operator]
        return
    encoded: list[bytes] = []
    frames: dict[Data, tuple[bytes, bytes]] = {}
    size = start = 0
    for position, (key, data) in enumerate(elements):
        if which.interval or which.ranges:
            element = encode_element(key, data, interval=which.interval, ranges=which.ranges)
        else:
            if data not in frames:
                sample = encode_element(key, data)
                frames[data] = sample[:12], sample[12 + len(key) :]
            before, after = frames[data]
            element = before + key + after
        if size + len(element) > ELEMENT_BYTES:
            yield start, encoded
            encoded, size, start = [], 0, position
        encoded.append(element)
        size += len(element)
    if encoded:
        yield start, encoded
