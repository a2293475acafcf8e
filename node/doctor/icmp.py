"""Echo requests (RFC 792, RFC 4443) to many addresses at once, and what became of each.

    Probe ──`Prober.ask`──▶ Answer: reply | too big | expired | unreachable | refused here | silence

Sizes are of whole IP packets. They are never fragmented, and the kernel's knowledge of paths does not count
(IP_PMTUDISC_PROBE): what a probe of some size shows is what the network carries now. Raw sockets, as these
also receive what routers answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import NamedTuple, Self

from netlink.family import Family

IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3  # linux/in.h, in6.h
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 4 << 20
BATCH = 256
TRIES = 3
RECEIVE_BYTES = 1 << 16
HEADER = 8
"""Bytes of an ICMP header, in both families."""
LEAST = 64
"""Bytes of a probe whose size does not matter."""

NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EPERM})


class Kind(StrEnum):
    """What became of a probe."""

    REPLY = "reply"
    TOO_BIG = "too big"
    EXPIRED = "expired"
    UNREACHABLE = "unreachable"
    NO_ROUTE = "no route"
    SILENCE = "silence"


class Probe(NamedTuple):
    """An echo request: to whom, how many bytes with its IP header, over how many routers at most."""

    address: str
    size: int = LEAST
    ttl: int = 64


class Answer(NamedTuple):
    """What became of a probe, who said so ("" this node), after how long; `mtu` is 0 if nobody said one.

    `detail` is the kernel's reason for NO_ROUTE.
    """

    kind: Kind
    sender: str = ""
    seconds: float = 0.0
    mtu: int = 0
    detail: str = ""


SILENCE = Answer(Kind.SILENCE)


@dataclass(frozen=True, slots=True)
class Words:
    """The numbers of ICMP in one family: types of echo and of errors, IP header, socket options."""

    request: int
    reply: int
    too_big: tuple[int, int]
    expired: int
    unreachable: int
    header: int
    protocol: int
    level: int
    ttl: int
    discover: int


WORDS = {
    Family.V4: Words(
        8, 0, (3, 4), 11, 3, 20, socket.IPPROTO_ICMP, socket.IPPROTO_IP, socket.IP_TTL, IP_MTU_DISCOVER
    ),
    Family.V6: Words(
        *(128, 129, (2, 0), 3, 1, 40),
        *(socket.IPPROTO_ICMPV6, socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, IPV6_MTU_DISCOVER),
    ),
}


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(family: Family, identifier: int, number: int, size: int) -> bytes:
    """Return an echo request of `size` bytes with its IP header; the kernel does the checksum of ICMPv6."""
    words = WORDS[family]
    filling = bytes(max(size - words.header - HEADER, 0))
    header = struct.pack(">BBHHH", words.request, 0, 0, identifier, number)
    if family is Family.V6:
        return header + filling
    return struct.pack(">BBHHH", words.request, 0, checksum(header + filling), identifier, number) + filling


class Heard(NamedTuple):
    """An ICMP message about a probe of ours."""

    identifier: int
    number: int
    kind: Kind
    mtu: int = 0


def parse(family: Family, message: bytes) -> Heard | None:
    """Parse an ICMP message, without its IP header; None if it is not about an echo request."""
    words = WORDS[family]
    if len(message) < HEADER:
        return None
    kind, code, _, first, second = struct.unpack_from(">BBHHH", message)
    if kind == words.reply:
        return Heard(first, second, Kind.REPLY)
    if (kind, code) == words.too_big:
        found, mtu = Kind.TOO_BIG, second if family is Family.V4 else first << 16 | second
    elif kind == words.expired:
        found, mtu = Kind.EXPIRED, 0
    elif kind == words.unreachable:
        found, mtu = Kind.UNREACHABLE, 0
    else:
        return None
    quoted = message[HEADER:]
    if len(quoted) < words.header:
        return None
    length, protocol = (quoted[0] & 15) * 4, quoted[9]
    if family is Family.V6:
        length, protocol = words.header, quoted[6]
    if protocol != words.protocol or len(quoted) < length + HEADER or quoted[length] != words.request:
        return None
    identifier, number = struct.unpack_from(">HH", quoted, length + 4)
    return Heard(identifier, number, found, mtu)


class Prober:
    """Two raw sockets in the network namespace of the thread that opens it. Raises PermissionError then."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._sockets: dict[Family, socket.socket] = {}
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._number = 0

    def __enter__(self) -> Self:
        for family, words in WORDS.items():
            try:
                opened = socket.socket(family.af, socket.SOCK_RAW, words.protocol)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    continue  # IPv6 is off
                raise
            self._stack.enter_context(opened)
            opened.setblocking(False)
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            opened.setsockopt(words.level, words.discover, PMTUDISC_PROBE)
            self._sockets[family] = opened
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, probes: Sequence[Probe], timeout: float) -> list[Answer]:
        """Send probes, each up to three times within the timeout (seconds); return what became of each.

        A bounded number is under way at once, so very many take a multiple of the timeout.
        """
        found: list[Answer] = []
        for start in range(0, len(probes), BATCH):
            found += self._batch(probes[start : start + BATCH], timeout)
        return found

    def _batch(self, probes: Sequence[Probe], timeout: float) -> list[Answer]:
        answers: dict[int, Answer] = {}
        provisional: dict[int, Answer] = {}  # somebody sees no way now; a later try may find one
        under_way: dict[int, tuple[int, float]] = {}  # by number: place among the probes, when it was sent
        for _ in range(TRIES):
            until = time.monotonic() + timeout / TRIES
            for place, probe in enumerate(probes):
                if place not in answers:
                    self._send(probe, place, answers, under_way)
            while len(answers) < len(probes) and (left := until - time.monotonic()) > 0:
                for family in self._readable(left):
                    for place, answer in self._heard(family, under_way):
                        found = provisional if answer.kind is Kind.UNREACHABLE else answers
                        found.setdefault(place, answer)
            if len(answers) == len(probes):
                break
        known = {**provisional, **answers}
        return [known.get(place, SILENCE) for place in range(len(probes))]

    def _readable(self, timeout: float) -> Iterator[Family]:
        ready, _, _ = select.select(list(self._sockets.values()), (), (), timeout)
        return (family for family, opened in self._sockets.items() if opened in ready)

    def _send(
        self, probe: Probe, place: int, answers: dict[int, Answer], under_way: dict[int, tuple[int, float]]
    ) -> None:
        family = Family(ip_address(probe.address).version)
        opened, words = self._sockets.get(family), WORDS[family]
        if opened is None:
            answers[place] = Answer(Kind.NO_ROUTE, detail=os.strerror(errno.EAFNOSUPPORT))
            return
        self._number = (self._number + 1) & 0xFFFF
        packet = request(family, self._identifier, self._number, probe.size)
        hops = [(words.level, words.ttl, struct.pack("=i", probe.ttl))]
        under_way[self._number] = place, time.monotonic()
        try:
            opened.sendmsg([packet], hops, 0, (probe.address, 0))
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                answers[place] = Answer(Kind.TOO_BIG)
            elif error.errno in NO_WAY:
                answers[place] = Answer(Kind.NO_ROUTE, detail=error.strerror or "")
            # Anything else, a full queue say, is as if the packet had been lost.

    def _heard(self, family: Family, under_way: dict[int, tuple[int, float]]) -> Iterator[tuple[int, Answer]]:
        """Yield (place among the probes, answer) of what a socket has received."""
        while True:
            try:
                message, (sender, *_) = self._sockets[family].recvfrom(RECEIVE_BYTES)
            except OSError:  # nothing more; or an error that was reported, and is gone by the next time
                return
            if family is Family.V4:
                message = message[(message[0] & 15) * 4 :]
            heard = parse(family, message)
            if heard is None or heard.identifier != self._identifier or heard.number not in under_way:
                continue
            place, sent = under_way[heard.number]
            took = time.monotonic() - sent
            yield place, Answer(heard.kind, sender.split("%")[0], took, heard.mtu)
