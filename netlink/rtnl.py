"""A route netlink socket: several requests in one write, answers as values.

pyroute2 has the message formats. Its own sockets run an event loop per object and cost 0.3-0.6 ms a
request; the same messages over a plain socket cost 0.1 ms, and an ADD sends about ten.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import (
    RT_TABLE_MAIN,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    Request,
    Route,
    _message,
)

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
HEADER = struct.Struct("=IHHII")
RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `peer_index` is a veth's other end, in its own namespace's numbering."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    kind: str
    master: int | None
    peer_index: int | None


@dataclass(frozen=True, slots=True)
class Address:
    """An address on an interface; `cidr` has the prefix length of its subnet."""

    index: int
    cidr: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour entry."""

    index: int
    address: str
    mac: str
    state: int


class Rtnl:
    """Verbs and questions for the network namespace of the thread that opens it; not shared by threads."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0

    def __enter__(self) -> Self:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, 0))
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def commit(self, *requests: Request) -> None:
        """Apply requests in order, in one write.

        Each stands alone: the kernel goes on after one that it refuses, and NetlinkError names the first
        refused. Callers that need all or nothing undo what they asked for.
        """
        if not requests:
            return
        first = self._sequence + 1
        self._send(
            b"".join(self._encode(r.message, r.kind, NLM_F_REQUEST | NLM_F_ACK | r.flags) for r in requests)
        )
        failure: NetlinkError | None = None
        pending = len(requests)
        while pending:
            for kind, _, sequence, body in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                pending -= 1
                code = -struct.unpack_from("=i", body, 16)[0]
                if code and failure is None:
                    failure = NetlinkError(code, f"cannot {requests[sequence - first].what}")
        if failure:
            raise failure

    def links(self) -> tuple[Link, ...]:
        """All interfaces."""
        return tuple(_link(m) for m in self._dump(ifinfmsg, RTM_GETLINK, {}))

    def link(self, name: str) -> Link | None:
        """Return the interface of that name, or None."""
        try:
            index = socket.if_nametoindex(name)
        except OSError:
            return None
        found = self._ask(ifinfmsg, RTM_GETLINK, {"index": index}, f"look up interface {name}")
        return None if found is None else _link(found)

    def addresses(self, index: int | None = None) -> tuple[Address, ...]:
        """All addresses, or those of one interface."""
        found = (
            Address(m["index"], f"{m.get_attr('IFA_LOCAL') or m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}")
            for m in self._dump(ifaddrmsg, RTM_GETADDR, {})
        )
        return tuple(a for a in found if index in (None, a.index))

    def routes(self, protocol: int | None = None) -> tuple[Route, ...]:
        """Routes of the main table, or those of one route protocol number."""
        found = (_route(m) for m in self._dump(rtmsg, RTM_GETROUTE, {}) if _table(m) == RT_TABLE_MAIN)
        return tuple(r for r in found if protocol in (None, r.protocol))

    def route_to(self, address: str) -> Route | None:
        """Ask the kernel which way it sends packets to an address; None when it cannot."""
        family = Family.V6 if ":" in address else Family.V4
        fields = {"family": family.af, "dst_len": family.bits}
        try:
            found = self._ask(rtmsg, RTM_GETROUTE, fields, f"route to {address}", [("RTA_DST", address)])
        except NetlinkError:
            return None
        return None if found is None else _route(found)

    def neighbours(self) -> tuple[Neighbour, ...]:
        """All neighbour entries of IPv4 and IPv6."""
        families = {f.af for f in Family}
        return tuple(
            Neighbour(m["ifindex"], m.get_attr("NDA_DST"), m.get_attr("NDA_LLADDR") or "", m["state"])
            for m in self._dump(ndmsg, RTM_GETNEIGH, {})
            if m["family"] in families
        )

    def _ask(
        self,
        cls: Any,
        kind: int,
        fields: dict[str, Any],
        what: str,
        attrs: list[tuple[str, Any]] | None = None,
    ) -> Any:
        """Return the one message that answers a question."""
        self._send(self._encode(_message(cls, fields, attrs or []), kind, NLM_F_REQUEST))
        for answer, _, sequence, body in self._receive():
            if sequence != self._sequence:
                continue
            if answer == NLMSG_ERROR:
                code = -struct.unpack_from("=i", body, 16)[0]
                raise NetlinkError(code, f"cannot {what}")
            return _decode(cls, body)
        return None

    def _dump(self, cls: Any, kind: int, fields: dict[str, Any]) -> list[Any]:
        """Return all messages of a dump; a dump that changed under way is asked for again."""
        while True:
            self._send(self._encode(_message(cls, fields, []), kind, NLM_F_REQUEST | NLM_F_DUMP))
            found: list[Any] = []
            interrupted = done = False
            while not done:
                for answer, flags, sequence, body in self._receive():
                    if sequence != self._sequence:
                        continue
                    interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                    if answer == NLMSG_DONE:
                        done = True
                    elif answer == NLMSG_ERROR:
                        raise NetlinkError(-struct.unpack_from("=i", body, 16)[0], "cannot read a table")
                    else:
                        found.append(_decode(cls, body))
            if not interrupted:
                return found

    def _encode(self, message: Any, kind: int, flags: int) -> bytes:
        self._sequence += 1
        message["header"]["type"] = kind
        message["header"]["flags"] = flags
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        return bytes(message.data)

    def _send(self, data: bytes) -> None:
        if self._socket is None:
            raise RuntimeError("the netlink socket is not open")
        self._socket.send(data)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield (type, flags, sequence, whole message) of the next datagram."""
        assert self._socket is not None
        data = self._socket.recv(RECEIVE_BYTES)
        offset = 0
        while offset < len(data):
            length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset : offset + length]
            offset += (length + 3) & ~3


def _decode(cls: Any, body: bytes) -> Any:
    message = cls(body)
    message.decode()
    return message


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & 1),
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
        master=message.get_attr("IFLA_MASTER"),
        peer_index=message.get_attr("IFLA_LINK"),
    )


def _table(message: Any) -> int:
    return int(message.get_attr("RTA_TABLE") or message["table"])


def _route(message: Any) -> Route:
    family = Family.V4 if message["family"] == Family.V4.af else Family.V6
    destination = message.get_attr("RTA_DST") or ("0.0.0.0" if family is Family.V4 else "::")
    return Route(
        destination=f"{destination}/{message['dst_len']}",
        gateway=message.get_attr("RTA_GATEWAY"),
        oif=message.get_attr("RTA_OIF"),
        onlink=bool(message["flags"] & 4),
        protocol=message["proto"],
    )
