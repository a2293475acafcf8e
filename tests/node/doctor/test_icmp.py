"""Echo requests and what is heard of them, as bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from node.doctor.icmp import WORDS, Heard, Kind, checksum, parse, request


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("size", [20, 64, 65, 1500])
def test_a_request_has_the_size_that_is_asked_for(family: Family, size: int) -> None:
    packet = request(family, 7, 9, size)
    assert len(packet) == max(size - WORDS[family].header, 8)
    assert struct.unpack_from(">HH", packet, 4) == (7, 9)
    if family is Family.V4:
        assert checksum(packet) == 0


def quoted(family: Family, message: bytes) -> bytes:
    """Return a packet as routers quote it."""
    if family is Family.V4:
        return struct.pack(">BxH5xB10x", 0x45, 20 + len(message), 1) + message
    return struct.pack(">IHBB32x", 6 << 28, len(message), 58, 1) + message


@pytest.mark.parametrize("family", Family)
def test_answers_and_errors_are_told_apart(family: Family) -> None:
    words, sent = WORDS[family], request(family, 7, 9, 100)
    assert parse(family, struct.pack(">BBHHH", words.reply, 0, 0, 7, 9)) == Heard(7, 9, Kind.REPLY)
    kind, code = words.too_big
    limit = struct.pack(">HH", 0, 1400) if family is Family.V4 else struct.pack(">I", 1400)
    too_big = struct.pack(">BBH", kind, code, 0) + limit + quoted(family, sent)
    assert parse(family, too_big) == Heard(7, 9, Kind.TOO_BIG, 1400)
    expired = struct.pack(">BB6x", words.expired, 0) + quoted(family, sent)
    assert parse(family, expired) == Heard(7, 9, Kind.EXPIRED)
    unreachable = struct.pack(">BB6x", words.unreachable, 1) + quoted(family, sent)
    assert parse(family, unreachable) == Heard(7, 9, Kind.UNREACHABLE)


@pytest.mark.parametrize("family", Family)
def test_what_is_about_others_is_not_heard(family: Family) -> None:
    words = WORDS[family]
    other = quoted(family, struct.pack(">BBHHH", words.reply, 0, 0, 7, 9))
    assert parse(family, struct.pack(">BB6x", words.expired, 0) + other) is None
    assert parse(family, request(family, 7, 9, 100)) is None  # one's own, on the loopback interface
    assert parse(family, b"") is None


@given(st.binary(max_size=120), st.sampled_from(Family))
def test_bytes_of_anybody_are_no_error(data: bytes, family: Family) -> None:
    parse(family, data)
