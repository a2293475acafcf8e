"""Netlink messages (linux/netlink.h): a header of 16 bytes in host order, then what the protocol says."""

from __future__ import annotations

import struct
from collections.abc import Iterator

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP = 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200

_HEADER = struct.Struct("=IHHII")


def pack(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Return a request."""
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def split(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (type, flags, sequence, whole message) of what was received at once."""
    offset = 0
    while offset < len(datagram):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, offset)
        yield kind, flags, sequence, datagram[offset : offset + length]
        offset += (length + 3) & ~3


def error_code(message: bytes) -> int:
    """Return the errno of an NLMSG_ERROR message; 0 is an acknowledgement."""
    return int(-struct.unpack_from("=i", message, _HEADER.size)[0])
