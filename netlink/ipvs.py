"""IPVS: virtual servers of the kernel, and the real servers that they balance over (net/netfilter/ipvs).

Messages are packed and parsed here. pyroute2 has them as classes (pyroute2.netlink.generic.ipvs), and takes
0.2 ms and more for each: 1,000 services of 10 endpoints are 22,000 of them. The tests have pyroute2 read what
is packed here. Source: linux/ip_vs.h, net/netfilter/ipvs/ip_vs_ctl.c, linux/genetlink.h.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from netlink.attributes import attribute, nested, parsed, text
from netlink.errors import NetlinkError
from netlink.family import Family, with_port
from netlink.generic import BODY, Generic
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
)

ATTR_SERVICE, ATTR_DEST = 1, 2
SVC_AF, SVC_PROTOCOL, SVC_ADDR, SVC_PORT, SVC_FWMARK, SVC_SCHED, SVC_FLAGS, SVC_TIMEOUT, SVC_NETMASK = range(
    1, 10
)
DEST_ADDR, DEST_PORT, DEST_METHOD, DEST_WEIGHT, DEST_UPPER, DEST_LOWER, DEST_ACTIVE, DEST_INACTIVE = range(
    1, 9
)
DEST_FAMILY = 11
PERSISTENT = 0x1
MASQUERADING = 0  # IP_VS_CONN_F_MASQ: the destination is translated
EVERY_FLAG = 0xFFFFFFFF

WRITE_REQUESTS = 64
"""The answers to one write must fit the receive buffer: each takes about 1 kB of its 208."""
DUMP_TRIES = 10
_FAMILIES = {family.af: family for family in Family}
_ADDRESS_BYTES = 16  # union nf_inet_addr

# The first attributes of a real server, each with its length and type: address, port, then numbers; as they
# are sent, and as the kernel tells them, with three more and the family, before statistics.
_DESTINATION = struct.Struct("=HH16sHH2s2xHHIHHIHHIHHI")
_TOLD = struct.Struct("=4s16s4s2s2x" + "4sI" * 7 + "4sH2x")
_TOLD_HEADERS = tuple(
    struct.pack("=HH", size, kind)
    for size, kind in ((20, 1), (6, 2), *((8, kind) for kind in range(3, 10)), (6, 11))
)


class Virtual(NamedTuple):
    """What a virtual server is known by: protocol number, address and port; or a mark of packets, alone."""

    family: Family
    protocol: int = 0
    address: str = ""
    port: int = 0
    mark: int = 0

    def __str__(self) -> str:
        if self.mark:
            return f"mark {self.mark:#x} ({self.family.keyword})"
        names = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP", socket.IPPROTO_SCTP: "SCTP"}
        return f"{names.get(self.protocol, self.protocol)} {with_port(self.address, self.port)}"


class Schedule(NamedTuple):
    """How a virtual server balances; and for how many seconds a client keeps its real server; 0: not."""

    scheduler: str
    seconds: int = 0


class Real(NamedTuple):
    """A real server, of the virtual server's family."""

    address: str
    port: int

    def __str__(self) -> str:
        return with_port(self.address, self.port)


class Load(NamedTuple):
    """What a real server is given, and how many connections it has: in use, and otherwise not forgotten."""

    weight: int
    active: int = 0
    inactive: int = 0


class Command(IntEnum):
    """What is asked for (IPVS_CMD_*)."""

    NEW_SERVICE = 1
    SET_SERVICE = 2
    DEL_SERVICE = 3
    GET_SERVICE = 4
    NEW_DEST = 5
    SET_DEST = 6
    DEL_DEST = 7
    GET_DEST = 8


class Request(NamedTuple):
    """One change. A service has a schedule unless it goes, a destination a real server."""

    command: Command
    virtual: Virtual
    schedule: Schedule | None = None
    real: Real | None = None
    weight: int = 1

    def __str__(self) -> str:
        verb = {1: "add", 2: "change", 3: "remove", 5: "add", 6: "change", 7: "remove"}[self.command]
        if self.real is None:
            return f"{verb} the virtual server {self.virtual}"
        return f"{verb} {self.real} of the virtual server {self.virtual}"


class IpvsError(NetlinkError):
    """The kernel refused a change; the others were made."""

    def __init__(self, code: int, request: Request) -> None:
        detail = ""
        if code == errno.ENOENT and request.schedule:
            detail = f"the kernel has no scheduler {request.schedule.scheduler}"
        super().__init__(code, f"cannot {request}", detail)
        self.request = request


class Servers(Protocol):
    """The virtual servers of a network namespace: what the kernel and the fake both do."""

    def servers(self) -> dict[Virtual, Schedule]:
        """Return all virtual servers, anybody's, of both families."""
        ...

    def reals(self, virtual: Virtual) -> dict[Real, Load]:
        """Return the real servers of a virtual server; none, if it is not there."""
        ...

    def commit(self, requests: Sequence[Request]) -> None:
        """Make changes in order; IpvsError names the first that is refused, and the others are made."""
        ...


class Ipvs(Generic):
    """The kernel's IPVS. Raises NetlinkError where the kernel has none."""

    NAME = "IPVS"
    MISSING = "cannot use IPVS", "the kernel has none (its module ip_vs)"

    def servers(self) -> dict[Virtual, Schedule]:
        """Return all virtual servers, anybody's, of both families."""
        return dict(server(message) for message in self._dump(Command.GET_SERVICE, b""))

    def reals(self, virtual: Virtual) -> dict[Real, Load]:
        """Return the real servers of a virtual server; none, if it is not there."""
        asked = nested(ATTR_SERVICE, _identity(virtual))
        return dict(real(message, virtual.family) for message in self._dump(Command.GET_DEST, asked))

    def commit(self, requests: Sequence[Request]) -> None:
        """Make changes in order; IpvsError names the first that is refused, and the others are made."""
        refused: list[IpvsError] = []
        for at in range(0, len(requests), WRITE_REQUESTS):
            refused += self._write(requests[at : at + WRITE_REQUESTS])
        if refused:
            raise refused[0]

    def _write(self, requests: Sequence[Request]) -> list[IpvsError]:
        """Make changes in one write; return what was refused. Only the last is acknowledged."""
        first, last = self._sequence + 1, self._sequence + len(requests)
        self._send(
            b"".join(
                self._frame(r.command, NLM_F_ACK if at == last else 0, encode(r))
                for at, r in enumerate(requests, first)
            )
        )
        refused: list[IpvsError] = []
        while True:
            for kind, _, sequence, message in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                if code := error_code(message):
                    refused.append(IpvsError(code, requests[sequence - first]))
                if sequence == last:
                    return refused

    def _dump(self, command: Command, body: bytes) -> list[bytes]:
        """Return the messages of a dump; one that changed under way is asked for again."""
        for _ in range(DUMP_TRIES):
            self._send(self._frame(command, NLM_F_DUMP, body))
            found = list(self._answers())
            if not any(flags & NLM_F_DUMP_INTR for _, flags, _ in found):
                return [message for _, _, message in found]
        raise NetlinkError(errno.EINTR, "cannot read the virtual servers: they change too fast")

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (type, flags, whole message) of what answers the last request, up to the end."""
        while True:
            for kind, flags, sequence, message in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise NetlinkError(error_code(message), "cannot read the virtual servers")
                yield kind, flags, message


class Absent:
    """The virtual servers of a kernel that has no IPVS."""

    def servers(self) -> dict[Virtual, Schedule]:
        """Return none."""
        return {}

    def reals(self, virtual: Virtual) -> dict[Real, Load]:
        """Return none."""
        return {}

    def commit(self, requests: Sequence[Request]) -> None:
        """Make no changes; IpvsError names the first."""
        if requests:
            raise IpvsError(errno.ENOENT, requests[0])


def encode(request: Request) -> bytes:
    """Encode a change, without its headers."""
    body = _identity(request.virtual)
    if request.schedule is not None:
        body += _schedule(request.virtual.family, request.schedule)
    encoded = nested(ATTR_SERVICE, body)
    if request.real is not None:
        encoded += nested(ATTR_DEST, _destination(request.virtual.family, request))
    return encoded


@functools.lru_cache(maxsize=16)  # one after the other is about the same
def _identity(virtual: Virtual) -> bytes:
    body = attribute(SVC_AF, struct.pack("=H", virtual.family.af))
    if virtual.mark:
        return body + _number(SVC_FWMARK, virtual.mark)
    body += attribute(SVC_PROTOCOL, struct.pack("=H", virtual.protocol))
    body += attribute(SVC_ADDR, _address(virtual.family, virtual.address))
    return body + attribute(SVC_PORT, struct.pack(">H", virtual.port))


def _schedule(family: Family, schedule: Schedule) -> bytes:
    flags = PERSISTENT if schedule.seconds else 0
    mask = 0xFFFFFFFF if family is Family.V4 else family.bits  # a client is one address
    return (
        text(SVC_SCHED, schedule.scheduler)
        + attribute(SVC_FLAGS, struct.pack("=II", flags, EVERY_FLAG))
        + _number(SVC_TIMEOUT, schedule.seconds)
        + _number(SVC_NETMASK, mask)
    )


def _destination(family: Family, request: Request) -> bytes:
    assert request.real is not None
    address, port = _address(family, request.real.address), struct.pack(">H", request.real.port)
    rest = (8, DEST_METHOD, MASQUERADING, 8, DEST_WEIGHT, request.weight, 8, DEST_UPPER, 0, 8, DEST_LOWER, 0)
    return _DESTINATION.pack(20, DEST_ADDR, address, 6, DEST_PORT, port, *rest)


def _address(family: Family, address: str) -> bytes:
    return socket.inet_pton(family.af, address).ljust(_ADDRESS_BYTES, b"\0")


def _number(kind: int, value: int) -> bytes:
    """Encode a 32-bit number in host order."""
    return attribute(kind, struct.pack("=I", value))


def server(message: bytes) -> tuple[Virtual, Schedule]:
    """Decode a virtual server."""
    found = parsed(parsed(message, BODY)[ATTR_SERVICE])
    family = _FAMILIES[struct.unpack_from("=H", found[SVC_AF])[0]]
    flags = struct.unpack_from("=I", found[SVC_FLAGS])[0]
    seconds = struct.unpack("=I", found[SVC_TIMEOUT])[0] if flags & PERSISTENT else 0
    schedule = Schedule(found[SVC_SCHED].rstrip(b"\0").decode(), seconds)
    if SVC_FWMARK in found:
        return Virtual(family, mark=struct.unpack("=I", found[SVC_FWMARK])[0]), schedule
    protocol = struct.unpack_from("=H", found[SVC_PROTOCOL])[0]
    address = socket.inet_ntop(family.af, found[SVC_ADDR][: family.size])
    return Virtual(family, protocol, address, struct.unpack(">H", found[SVC_PORT])[0]), schedule


def real(message: bytes, family: Family) -> tuple[Real, Load]:
    """Decode a real server; `family` is that of its virtual server, which old kernels do not repeat."""
    if len(message) >= BODY + 4 + _TOLD.size:
        values = _TOLD.unpack_from(message, BODY + 4)
        address, port, af = values[1], values[3], values[19]
        if (*values[0:4:2], *values[4::2]) == _TOLD_HEADERS:
            there = _FAMILIES.get(af, family)
            text_ = socket.inet_ntop(there.af, address[: there.size])
            return Real(text_, int.from_bytes(port, "big")), Load(values[7], values[13], values[15])
    found = parsed(parsed(message, BODY)[ATTR_DEST])
    if DEST_FAMILY in found:  # one reached by a tunnel, not ours, can be of the other family
        family = _FAMILIES.get(struct.unpack_from("=H", found[DEST_FAMILY])[0], family)
    address = socket.inet_ntop(family.af, found[DEST_ADDR][: family.size])
    numbers = (struct.unpack("=I", found[kind])[0] for kind in (DEST_WEIGHT, DEST_ACTIVE, DEST_INACTIVE))
    return Real(address, struct.unpack(">H", found[DEST_PORT])[0]), Load(*numbers)
