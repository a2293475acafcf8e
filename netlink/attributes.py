"""Netlink attributes as bytes (linux/netlink.h): length and type in host order, padded to four bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator

NLA_F_NESTED = 0x8000
_HEADER = struct.Struct("=HH")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


def padded(data: bytes) -> bytes:
    """Fill up to a multiple of four bytes."""
    return data + _PADDING[len(data) & 3]


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute."""
    return _HEADER.pack(len(payload) + 4, kind) + padded(payload)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Encode an attribute that holds attributes."""
    payload = b"".join(attributes)
    return _HEADER.pack(len(payload) + 4, kind | NLA_F_NESTED) + payload


def text(kind: int, value: str) -> bytes:
    """Encode a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """Encode a 32-bit number in network order, as nfnetlink has them all."""
    return attribute(kind, struct.pack(">i" if value < 0 else ">I", value))


def parse(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of the attributes in `data`; stops at the first that does not fit."""
    end = len(data)
    while start + 4 <= end:
        length, kind = _HEADER.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & 0x3FFF, data[start + 4 : start + length]
        start += (length + 3) & ~3


def parsed(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Return the attributes in `data` by type."""
    return dict(parse(data, start))
