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
from netlink.nftables.expressions import Expression, LimitOver, Verdict, verdict_data


class Hook(IntEnum):
    """Where a base chain is called (NF_INET_*)."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


PRIORITY_RAW, PRIORITY_MANGLE, PRIORITY_DSTNAT, PRIORITY_FILTER, PRIORITY_SRCNAT = -300, -150, -100, 0, 100
SET_ANONYMOUS, SET_INTERVAL, SET_MAP, SET_TIMEOUT, SET_EVAL, SET_CONCAT = 0x1, 0x4, 0x8, 0x10, 0x20, 0x80
DYNAMIC_SIZE = 65_535
ELEMENT_INTERVAL_END = 0x1
VERDICT_TYPE = 0xFFFFFF00


def tlv(kind: int, value: bytes) -> bytes:
    """Encode one piece of nft user data: type and length in a byte each."""
    return bytes((kind, len(value))) + value


def _tlv32(kind: int, value: int) -> bytes:
    return tlv(kind, struct.pack("=I", value))


class Bridge(Enum):
    """The table family that sees the frames of bridges, as `Family` has the two that see packets."""

    BRIDGE = 7

    @property
    def af(self) -> int:
        """NFPROTO_BRIDGE (linux/netfilter.h)."""
        return self.value

    @property
    def keyword(self) -> str:
        """The nftables table family word."""
        return "bridge"


BRIDGE = Bridge.BRIDGE
TableFamily = Family | Bridge


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its family and name."""

    family: TableFamily
    name: str

    def __str__(self) -> str:
        return f"{self.family.keyword} {self.name}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How nft and the kernel see a field: nft's number for its type, bytes that count, typeof description."""

    datatype: int
    length: int
    typeof: bytes

    @property
    def size(self) -> int:
        """Bytes that the field takes in a concatenation: whole four-byte registers."""
        return (self.length + 3) & ~3


class Field(Enum):
    """A part of a concatenated key or of its data.

    SOURCE and DESTINATION are addresses of the table's own family; a bridge's table, which sees both, has
    IPV4_SOURCE and IPV6_SOURCE. The index, as `numgen` makes it, and the packet's priority are host order; an
    interface name takes 16 bytes. ND_TARGET is the address that a neighbour advertisement is about.
    """

    SOURCE = "source"
    DESTINATION = "destination"
    L4PROTO = "l4proto"
    DPORT = "dport"
    INDEX = "index"
    PRIORITY = "priority"
    IIFNAME = "iifname"
    ETHER_SOURCE = "ether source"
    IPV4_SOURCE = "ipv4 source"
    IPV6_SOURCE = "ipv6 source"
    ND_TARGET = "nd target"

    def layout(self, family: TableFamily) -> Layout:
        """Return how the field looks in a table of a family."""
        if self in (Field.SOURCE, Field.DESTINATION):
            assert isinstance(family, Family)
            return _ADDRESSES[self, family]
        return _LAYOUTS[self]


_PAYLOAD, _META, _CONCATENATION, _NUMGEN = 7, 9, 13, 23  # expressions
_TH, _IP, _IP6, _ETHER = 11, 12, 13, 17  # protocols
_TRANSPORT = 3  # where a raw payload's offset starts


def _field(protocol: int, place: int) -> bytes:
    """Describe a header field, by its place in nft's list of the protocol's fields."""
    return _tlv32(0, _PAYLOAD) + tlv(1, _tlv32(0, protocol) + _tlv32(1, place))


def _raw(base: int, offset: int, length: int) -> bytes:
    """Describe bytes of a packet that nft has no name for; offset and length in bits."""
    values = (0, 0, base, offset, length)
    return _tlv32(0, _PAYLOAD) + tlv(1, b"".join(_tlv32(i, v) for i, v in enumerate(values)))


def _meta(key: int) -> bytes:
    return _tlv32(0, _META) + tlv(1, _tlv32(0, key))


_ADDRESSES = {
    (Field.SOURCE, Family.V4): Layout(7, 4, _field(_IP, 11)),
    (Field.DESTINATION, Family.V4): Layout(7, 4, _field(_IP, 12)),
    (Field.SOURCE, Family.V6): Layout(8, 16, _field(_IP6, 8)),
    (Field.DESTINATION, Family.V6): Layout(8, 16, _field(_IP6, 9)),
}
_LAYOUTS = {
    Field.L4PROTO: Layout(12, 1, _meta(16)),
    Field.DPORT: Layout(13, 2, _field(_TH, 2)),
    Field.INDEX: Layout(4, 4, _tlv32(0, _NUMGEN) + tlv(1, _tlv32(0, 1) + _tlv32(1, 2) + _tlv32(2, 0))),
    Field.PRIORITY: Layout(23, 4, _meta(2)),
    Field.IIFNAME: Layout(41, 16, _meta(6)),
    Field.ETHER_SOURCE: Layout(9, 6, _field(_ETHER, 2)),
    Field.IPV4_SOURCE: _ADDRESSES[Field.SOURCE, Family.V4],
    Field.IPV6_SOURCE: _ADDRESSES[Field.SOURCE, Family.V6],
    Field.ND_TARGET: Layout(4, 16, _raw(_TRANSPORT, 64, 128)),
}


def _typeof(fields: tuple[Field, ...], family: TableFamily) -> bytes:
    if len(fields) == 1:
        return fields[0].layout(family).typeof
    parts = b"".join(tlv(i, field.layout(family).typeof) for i, field in enumerate(fields))
    return _tlv32(0, _CONCATENATION) + tlv(1, parts)


def _datatype(fields: tuple[Field, ...], family: TableFamily) -> int:
    number_ = 0
    for field in fields:
        number_ = number_ << 6 | field.layout(family).datatype
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


def _expression(kind: int, expression: Expression) -> bytes:
    return nested(kind, text(1, expression.name), nested(2, expression.attributes()))


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule at the end of a chain; the comment says what it is for and is shown by `nft list`."""

    chain: str
    expressions: tuple[Expression, ...]
    comment: str

    def attributes(self, table: str) -> bytes:
        """Encode for NFT_MSG_NEWRULE."""
        encoded = b"".join(_expression(1, e) for e in self.expressions)
        comment = attribute(7, tlv(0, self.comment.encode() + b"\0"))
        return text(1, table) + text(2, self.chain) + nested(4, encoded) + comment


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """A named set (no data), data map, or verdict map; compared by identity, so that it is a cheap key.

    `interval` sets hold ranges: pairs of elements, the second marked as the end (exclusive). In a set with
    `limits`, each element has its own limit, and is found for packets that exceed it.

    A set with `ranges` has a key of several fields, and elements that span a range of each: their key is the
    first key and then the last one (inclusive). The kernel refuses a range that begins or ends in another
    one, and removes the range that holds the first key, whatever the last one says.

    A `dynamic` set is filled by `Remember`: with up to `size` elements, which go `timeout` seconds after
    they were last remembered (0: they stay).
    """

    name: str
    key: tuple[Field, ...]
    data: tuple[Field, ...] = ()
    verdicts: bool = False
    interval: bool = False
    limits: bool = False
    ranges: bool = False
    dynamic: bool = False
    timeout: int = 0
    size: int = DYNAMIC_SIZE
    comment: str = ""

    def key_size(self, family: TableFamily) -> int:
        """Bytes in a key, as rules load it."""
        return sum(f.layout(family).size for f in self.key)

    def element_size(self, family: TableFamily) -> int:
        """Bytes in an element's key."""
        return self.key_size(family) * (2 if self.ranges else 1) + (1 if self.interval else 0)

    def spans(self, family: TableFamily, element: bytes, key: bytes) -> bool:
        """Whether each field of a key is in an element's range, in a set with ranges."""
        start = 0
        for field in self.key:
            end = start + field.layout(family).size
            last = slice(len(key) + start, len(key) + end)
            if not element[start:end] <= key[start:end] <= element[last]:
                return False
            start = end
        return True

    def attributes(self, table: str, family: TableFamily, identifier: int) -> bytes:
        """Encode for NFT_MSG_NEWSET; `identifier` is unique in the batch."""
        encoded = text(1, table) + text(2, self.name) + number(3, self._flags())
        encoded += number(4, _datatype(self.key, family)) + number(5, self._key_length(family))
        userdata = _tlv32(0, self._byte_order())
        userdata += tlv(3, _typeof(self.key, family))
        if self.data or self.verdicts:
            userdata += _tlv32(1, 1 if self.data == (Field.PRIORITY,) else 0)  # nft's number for byte order
        if self.verdicts:
            encoded += number(6, VERDICT_TYPE) + number(7, 0)
            userdata += tlv(4, _tlv32(0, 1) + tlv(1, b""))
        elif self.data:
            length = sum(f.layout(family).size for f in self.data)
            encoded += number(6, _datatype(self.data, family)) + number(7, length)
            userdata += tlv(4, _typeof(self.data, family))
        if self.comment:
            userdata += tlv(7, self.comment.encode() + b"\0")
        if self.limits:
            encoded += _expression(17, ANY_LIMIT)
        if self.timeout:
            encoded += attribute(11, struct.pack(">Q", self.timeout * 1000))
        return encoded + self._description(family) + number(10, identifier) + attribute(13, userdata)

    def _flags(self) -> int:
        return (
            (SET_MAP if self.data or self.verdicts else 0)
            | (SET_INTERVAL if self.interval or self.ranges else 0)
            | (SET_CONCAT if self.ranges else 0)
            | (SET_EVAL if self.dynamic else 0)
            | (SET_TIMEOUT if self.timeout else 0)
        )

    def _description(self, family: TableFamily) -> bytes:
        """Encode how many elements there may be, or the bytes that count in each field (NFTA_SET_DESC)."""
        if self.dynamic:
            return nested(9, number(1, self.size))
        if self.ranges:
            fields = (nested(1, number(1, f.layout(family).length)) for f in self.key)
            return nested(9, nested(2, *fields))
        return b""

    def _byte_order(self) -> int:
        """Return nft's number for it, which matters for single fields only: some are in the host's."""
        if len(self.key) > 1:
            return 0
        return 1 if self.key[0] in (Field.IIFNAME, Field.INDEX, Field.PRIORITY) else 2

    def _key_length(self, family: TableFamily) -> int:
        return self.key[0].layout(family).length if len(self.key) == 1 else self.key_size(family)


@dataclass(frozen=True, slots=True)
class Goto:
    """The data of a verdict map element: go to a chain, or drop (empty chain)."""

    chain: str

    def encode(self) -> bytes:
        """Encode as element data."""
        if not self.chain:
            return nested(2, verdict_data(Verdict.DROP))
        return nested(2, verdict_data(Verdict.GOTO, self.chain))


ANY_LIMIT = LimitOver(10_000 << 20, 0)
"""What a set with limits says of them; its elements say their own."""

Data = bytes | Goto | LimitOver | None
"""What a key maps to: register bytes, a verdict, a limit (a set with limits), or nothing (a set)."""

Elements = dict[bytes, Data]
"""Elements by key. In an interval set the key has one more byte: 0 for a start, 1 for an end.

In a set with ranges it is the first key of the range and then the last.
"""


def encode_element(key: bytes, data: Data, *, interval: bool = False, ranges: bool = False) -> bytes:
    """Encode one element as NFTA_LIST_ELEM. Keys and data are whole registers, already padded."""
    flags = b""
    if interval:
        if key[-1]:
            flags = number(3, ELEMENT_INTERVAL_END)
        key = key[:-1]
    elif ranges:
        middle = len(key) // 2
        flags = nested(10, attribute(1, key[middle:]))
        key = key[:middle]
    encoded = nested(1, attribute(1, key))
    if isinstance(data, Goto):
        encoded += data.encode()
    elif isinstance(data, LimitOver):
        encoded += _expression(7, data)
    elif data is not None:
        encoded += nested(2, attribute(1, data))
    return nested(1, encoded, flags)
