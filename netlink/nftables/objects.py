"""What a table is made of, as frozen values; and the elements of its maps.

`typeof` descriptions are stored with each set in nft's own user data format, so that `nft list ruleset`
prints them and what it prints can be loaded again (libnftnl udata, nftables include/datatype.h and
expression.h for the numbers).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

from netlink.attributes import attribute, nested, number, text
from netlink.family import Family
from netlink.nftables.expressions import Expression, Verdict, verdict_data


class Hook(IntEnum):
    """Where a base chain is called (NF_INET_*)."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


PRIORITY_DSTNAT, PRIORITY_SRCNAT = -100, 100
SET_INTERVAL, SET_MAP = 0x4, 0x8
ELEMENT_INTERVAL_END = 0x1
VERDICT_TYPE = 0xFFFFFF00


def tlv(kind: int, value: bytes) -> bytes:
    """Encode one piece of nft user data: type and length in a byte each."""
    return bytes((kind, len(value))) + value


def _tlv32(kind: int, value: int) -> bytes:
    return tlv(kind, struct.pack("=I", value))


class Field(Enum):
    """A part of a concatenated key or of its data.

    Addresses are the source or destination field of the table's family; the index is host order, as
    `numgen` makes it.
    """

    SOURCE = "source"
    DESTINATION = "destination"
    L4PROTO = "l4proto"
    DPORT = "dport"
    INDEX = "index"

    def size(self, family: Family) -> int:
        """Bytes that the field takes in a concatenation: whole four-byte registers."""
        return family.size if self in (Field.SOURCE, Field.DESTINATION) else 4

    def length(self, family: Family) -> int:
        """Bytes that count."""
        short = {Field.L4PROTO: 1, Field.DPORT: 2}
        return short.get(self, self.size(family))

    def datatype(self, family: Family) -> int:
        """Return nft's number for the field's type."""
        if self in (Field.SOURCE, Field.DESTINATION):
            return 7 if family is Family.V4 else 8
        return {Field.L4PROTO: 12, Field.DPORT: 13, Field.INDEX: 4}[self]

    def typeof(self, family: Family) -> bytes:
        """Describe the expression that the field stands for: (expression number, its own data)."""
        payload, meta, numgen = 7, 9, 23
        if self in (Field.SOURCE, Field.DESTINATION):
            header = 12 if family is Family.V4 else 13
            first = 11 if family is Family.V4 else 7
            place = first if self is Field.SOURCE else first + 1
            return _tlv32(0, payload) + tlv(1, _tlv32(0, header) + _tlv32(1, place))
        if self is Field.DPORT:
            return _tlv32(0, payload) + tlv(1, _tlv32(0, 11) + _tlv32(1, 2))
        if self is Field.L4PROTO:
            return _tlv32(0, meta) + tlv(1, _tlv32(0, 16))
        return _tlv32(0, numgen) + tlv(1, _tlv32(0, 1) + _tlv32(1, 2) + _tlv32(2, 0))


def _typeof(fields: tuple[Field, ...], family: Family) -> bytes:
    if len(fields) == 1:
        return fields[0].typeof(family)
    concatenation = 13
    parts = b"".join(tlv(i, field.typeof(family)) for i, field in enumerate(fields))
    return _tlv32(0, concatenation) + tlv(1, parts)


def _datatype(fields: tuple[Field, ...], family: Family) -> int:
    number_ = 0
    for field in fields:
        number_ = number_ << 6 | field.datatype(family)
    return number_


@dataclass(frozen=True, slots=True)
class Base:
    """A base chain's place: type (`nat`, `filter`), hook, priority."""

    kind: str
    hook: Hook
    priority: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; a base chain if it has a hook. Base chains accept what no rule decides."""

    name: str
    base: Base | None = None

    def attributes(self, table: str) -> bytes:
        """Encode for NFT_MSG_NEWCHAIN."""
        encoded = text(1, table) + text(3, self.name)
        if self.base:
            hook = number(1, self.base.hook) + number(2, self.base.priority)
            encoded += nested(4, hook) + number(5, Verdict.ACCEPT) + text(7, self.base.kind)
        return encoded


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule at the end of a chain; the comment says what it is for and is shown by `nft list`."""

    chain: str
    expressions: tuple[Expression, ...]
    comment: str

    def attributes(self, table: str) -> bytes:
        """Encode for NFT_MSG_NEWRULE."""
        encoded = b"".join(nested(1, text(1, e.name), nested(2, e.attributes())) for e in self.expressions)
        comment = attribute(7, tlv(0, self.comment.encode() + b"\0"))
        return text(1, table) + text(2, self.chain) + nested(4, encoded) + comment


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """A named set (no data), data map, or verdict map; compared by identity, so that it is a cheap key.

    `interval` sets hold ranges: pairs of elements, the second marked as the end (exclusive).
    """

    name: str
    key: tuple[Field, ...]
    data: tuple[Field, ...] = ()
    verdicts: bool = False
    interval: bool = False
    comment: str = ""

    def key_size(self, family: Family) -> int:
        """Bytes in a key."""
        return sum(f.size(family) for f in self.key)

    def attributes(self, table: str, family: Family, identifier: int) -> bytes:
        """Encode for NFT_MSG_NEWSET; `identifier` is unique in the batch."""
        flags = (SET_INTERVAL if self.interval else 0) | (SET_MAP if self.data or self.verdicts else 0)
        encoded = text(1, table) + text(2, self.name) + number(3, flags)
        encoded += number(4, _datatype(self.key, family)) + number(5, self._key_length(family))
        # Byte order matters for single fields only: big endian (2) for addresses.
        userdata = _tlv32(0, 2 if len(self.key) == 1 else 0)
        userdata += tlv(3, _typeof(self.key, family))
        if self.data or self.verdicts:
            userdata += _tlv32(1, 0)
        if self.verdicts:
            encoded += number(6, VERDICT_TYPE) + number(7, 0)
            userdata += tlv(4, _tlv32(0, 1) + tlv(1, b""))
        elif self.data:
            encoded += number(6, _datatype(self.data, family)) + number(
                7, sum(f.size(family) for f in self.data)
            )
            userdata += tlv(4, _typeof(self.data, family))
        if self.comment:
            userdata += tlv(7, self.comment.encode() + b"\0")
        return encoded + number(10, identifier) + attribute(13, userdata)

    def _key_length(self, family: Family) -> int:
        return self.key[0].length(family) if len(self.key) == 1 else self.key_size(family)


@dataclass(frozen=True, slots=True)
class Goto:
    """The data of a verdict map element: go to a chain, or drop (empty chain)."""

    chain: str

    def encode(self) -> bytes:
        """Encode as element data."""
        if not self.chain:
            return nested(2, verdict_data(Verdict.DROP))
        return nested(2, verdict_data(Verdict.GOTO, self.chain))


Data = bytes | Goto | None
"""What a key maps to: register bytes, a verdict, or nothing (a set)."""

Elements = dict[bytes, Data]
"""Elements by key. In an interval set the key has one more byte: 0 for a start, 1 for an end."""


def encode_element(key: bytes, data: Data, *, interval: bool = False) -> bytes:
    """Encode one element as NFTA_LIST_ELEM. Keys and data are whole registers, already padded."""
    flags = b""
    if interval:
        if key[-1]:
            flags = number(3, ELEMENT_INTERVAL_END)
        key = key[:-1]
    encoded = nested(1, attribute(1, key))
    if isinstance(data, Goto):
        encoded += data.encode()
    elif data is not None:
        encoded += nested(2, attribute(1, data))
    return nested(1, encoded, flags)
