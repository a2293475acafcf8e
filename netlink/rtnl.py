"""A route netlink socket: several requests in one write, answers as values."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from netlink import entries
from netlink.attributes import parse
from netlink.entries import Forwarding, Neighbour
from netlink.errors import NetlinkError
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
    pack,
    split,
)
from netlink.requests import (
    ADDRESS,
    LINK,
    RT_TABLE_MAIN,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTN_UNICAST,
    RULE,
    Request,
    Route,
    Rule,
    address_query,
    forwarding_query,
    link_query,
    neighbour_query,
    proxy_query,
    route_query,
    routes_query,
)

if TYPE_CHECKING:
    from netlink.decode import Address, Link

IFLA_OPERSTATE, IF_OPER_UNKNOWN, IF_OPER_UP = 16, b"\0", b"\6"  # linux/if_link.h, linux/if.h
RTN_LOCAL = 2  # linux/rtnetlink.h
_LINK_HEADER, _ROUTE_KIND = 16 + 16, 16 + 7  # behind nlmsghdr: length of ifinfomsg; rtm_type in rtmsg
EVERYTHING = {RTM_GETLINK: bytes(LINK.size), RTM_GETADDR: bytes(ADDRESS.size), RTM_GETRULE: bytes(RULE.size)}
"""A dump's body by its kind: all zeroes ask for everything."""
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
RECEIVE_BYTES = 1 << 18
WRITE_REQUESTS = 64
"""The answers to one write must fit the receive buffer: each takes about 1 kB of its 208."""


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
        # Since Linux 4.20 the kernel selects what a dump asks for, if it is told to check it; before, it
        # sends all. So answers are looked through here too.
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def port(self) -> int:
        """The socket's netlink port id: notifications of changes that it asked for carry it."""
        return int(self._open().getsockname()[0])

    def commit(self, *requests: Request) -> None:
        """Apply requests in order; NetlinkError names the first that is refused.

        Each stands alone: the kernel goes on after one that it refuses. Callers that need all or nothing
        undo what they asked for.
        """
        for failure in self.attempt(*requests).values():
            raise failure

    def attempt(self, *requests: Request) -> dict[Request, NetlinkError]:
        """Apply requests in order, in one write, or several if there are very many; return the refusals."""
        slices = [requests[at : at + WRITE_REQUESTS] for at in range(0, len(requests), WRITE_REQUESTS)]
        return {request: failure for part in slices for request, failure in self._write(part)}

    def _write(self, requests: tuple[Request, ...]) -> list[tuple[Request, NetlinkError]]:
        """Apply requests in one write and return the refusals.

        The kernel answers in order: to those that it refuses, and to the last whatever became of it.
        """
        first, last = self._sequence + 1, self._sequence + len(requests)
        frames = [self._frame(r.kind, r.flags, r.body) for r in requests[:-1]]
        frames += [self._frame(r.kind, NLM_F_ACK | r.flags, r.body) for r in requests[-1:]]
        self._send(b"".join(frames))
        refused: list[tuple[Request, NetlinkError]] = []
        while True:
            for kind, _, sequence, body in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                if code := error_code(body):
                    request = requests[sequence - first]
                    refused.append((request, NetlinkError(code, f"cannot {request.what}")))
                if sequence == last:
                    return refused

    def links(self) -> tuple[Link, ...]:
        """All interfaces."""
        from netlink import decode

        return tuple(decode.link(m) for m in self.dump(RTM_GETLINK))

    def link(self, name: str) -> Link | None:
        """Return the interface of that name, or None."""
        from netlink import decode

        try:
            index = socket.if_nametoindex(name)
        except OSError:
            return None
        return decode.link(self._ask(RTM_GETLINK, link_query(index), f"look up interface {name}"))

    def passes(self, index: int) -> bool:
        """Whether an interface passes packets: until the kernel's own work is done it drops them, up or not.

        Asking makes newer kernels do that work (rtnl_getlink, Linux 6.8).
        """
        found = self._ask(RTM_GETLINK, link_query(index), f"look up interface {index}")
        states = (value for kind, value in parse(found, _LINK_HEADER) if kind == IFLA_OPERSTATE)
        return next(states, b"") in (b"", IF_OPER_UP, IF_OPER_UNKNOWN)

    def owns(self, address: str) -> bool:
        """Whether packets to an address are for this namespace.

        An IPv6 address is there before its route, which the kernel adds later in a thread of its own.
        """
        try:
            found = self._ask(RTM_GETROUTE, route_query(address), f"find the route to {address}")
        except NetlinkError:
            return False
        return found[_ROUTE_KIND] == RTN_LOCAL

    def addresses(self, index: int | None = None) -> tuple[Address, ...]:
        """All addresses, or those of one interface."""
        from netlink import decode

        found = map(decode.address, self.dump(RTM_GETADDR, address_query(index)))
        return tuple(a for a in found if index in (None, a.index))

    def routes(self, protocol: int | None = None, table: int = RT_TABLE_MAIN) -> tuple[Route, ...]:
        """Routes of a table, or those of one route protocol number in it."""
        messages = self.dump(RTM_GETROUTE, routes_query(table, protocol))
        found = (entries.route(m) for m in messages if not entries.is_cached(m))
        return tuple(r for r in found if r and r.table == table and protocol in (None, r.protocol))

    def rules(self) -> tuple[Rule, ...]:
        """Policy rules of our protocol number."""
        return tuple(r for r in map(entries.rule, self.dump(RTM_GETRULE)) if r)

    def route_to(self, address: str) -> Route | None:
        """Ask the kernel which way it sends packets to an address; None when it cannot, or has it itself.

        The source is the address that it would send from, the MTU includes what it has learned of the path.
        """
        try:
            found = self._ask(RTM_GETROUTE, route_query(address), f"find the route to {address}")
        except NetlinkError:
            return None
        return entries.route(found) if found[_ROUTE_KIND] == RTN_UNICAST else None

    def neighbours(self, index: int | None = None) -> tuple[Neighbour, ...]:
        """Neighbour entries of IPv4 and IPv6, all or those of an interface."""
        found = map(entries.neighbour, self.dump(RTM_GETNEIGH, neighbour_query(index)))
        return tuple(n for n in found if n and index in (None, n.index))

    def forwarding(self, index: int) -> tuple[Forwarding, ...]:
        """Forwarding entries of a VXLAN device."""
        found = map(entries.forwarding, self.dump(RTM_GETNEIGH, forwarding_query(index)))
        return tuple(entry[1] for entry in found if entry and entry[0] == index)

    def proxies(self) -> tuple[tuple[int, str], ...]:
        """All addresses that interfaces answer for, as (interface index, address)."""
        return tuple(p for p in map(entries.proxy, self.dump(RTM_GETNEIGH, proxy_query())) if p)

    def _ask(self, kind: int, body: bytes, what: str) -> bytes:
        """Return the one message that answers a question."""
        self._send(self._frame(kind, 0, body))
        while True:
            for answer, _, sequence, message in self._receive():
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_ERROR:
                    raise NetlinkError(error_code(message), f"cannot {what}")
                return message

    def dump(self, kind: int, body: bytes | None = None) -> list[bytes]:
        """Return all messages of a kind (RTM_GET…), or those that the body selects.

        A dump that changed under way is asked for again.
        """
        while True:
            self._send(self._frame(kind, NLM_F_DUMP, EVERYTHING[kind] if body is None else body))
            found: list[bytes] = []
            interrupted = done = False
            while not done:
                for answer, flags, sequence, message in self._receive():
                    if sequence != self._sequence:
                        continue
                    interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                    if answer == NLMSG_DONE:
                        done = True
                    elif answer == NLMSG_ERROR:
                        raise NetlinkError(error_code(message), "cannot read a table")
                    else:
                        found.append(message)
            if not interrupted:
                return found

    def _frame(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return pack(kind, flags, self._sequence, body)

    def _send(self, data: bytes) -> None:
        self._open().send(data)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield (type, flags, sequence, whole message) of the next datagram."""
        yield from split(self._open().recv(RECEIVE_BYTES))

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError("the netlink socket is not open")
        return self._socket
