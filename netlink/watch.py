"""What others change in the kernel of what routes between nodes depend on, told as it happens.

    Watch ── the kernel's notifications ──▶ drain(what is ours) ──▶ Seen: compare now? what has been lost?

Most notifications are of no interest: our own changes, pods that come and go, ARP on ordinary interfaces. Of
those the header is all that is read. The kernel removes IPv4 routes without a word when their address or
interface goes, so these are watched too. Source: linux/rtnetlink.h (RTNLGRP_*), Linux 6.18's behaviour.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import NamedTuple, Self, TypeVar

from netlink import entries
from netlink.attributes import parsed
from netlink.entries import BODY
from netlink.messages import split
from netlink.requests import (
    ADDRESS,
    AF_BRIDGE,
    IFA_ADDRESS,
    IFA_FLAGS,
    IFA_LOCAL,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_MASTER,
    IFLA_MTU,
    LINK,
    NEIGHBOUR,
    NUD_PERMANENT,
    ROUTE,
    ROUTE_PROTOCOL,
    RT_SCOPE_LINK,
    RT_TABLE_MAIN,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
)
from netlink.rtnl import Rtnl

K = TypeVar("K")

# RTNLGRP_ LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE
GROUPS = sum(1 << (group - 1) for group in (1, 3, 5, 7, 8, 9, 11, 19))
RT_TABLE_LOCAL = 255
NOT_WAYS = frozenset({2, 3, 4, 5})
"""RTN_LOCAL, BROADCAST, ANYCAST, MULTICAST: routes that addresses bring with them."""
STATE_FLAGS = IFF_UP | 0x40 | 0x10000
"""IFF_UP, IFF_RUNNING, IFF_LOWER_UP: whether a link passes packets."""
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 32 << 20
"""Our own changes are notified too: 15,000 of 5,000 peers at once, each accounted for with more than 1 kB."""
RECEIVE_BYTES = 1 << 16
DATAGRAMS = 100_000
"""So many are read at once at most; what comes faster than it is read waits for the next time."""
_PID = struct.Struct(
    "=12xI"
)  # struct nlmsghdr: the port id of who asked for a change, 0 for the kernel itself


@dataclass(frozen=True, slots=True)
class Seen:
    """What others have changed since the last time.

    `network`: something that routes between nodes depend on, or one of our routes, rules, neighbours or
    forwarding entries. `lost`: destinations of our routes in the main table that others removed. `overrun`:
    the kernel had to drop notifications, so anything may have changed; `network` is True then.
    """

    network: bool = False
    lost: frozenset[str] = frozenset()
    overrun: bool = False


class Ours(NamedTuple):
    """What is ours: sockets (port ids), tunnels (interface indexes), and all the tunnels' forwarding entries.

    The latter are (interface index, MAC, address). The kernel does not say who changed one, so what matters
    is whether it is as it should be.
    """

    ports: Collection[int]
    devices: Collection[int]
    forwarding: Collection[tuple[int, str, str]]


@dataclass(slots=True)
class _State:
    """What has been told so far, to know a change from a repetition: routers advertise the same for ever."""

    links: dict[int, object] = field(default_factory=dict)
    addresses: dict[object, object] = field(default_factory=dict)
    pods: set[int] = field(default_factory=set)


class Watch:
    """Notifications of the network namespace of the thread that opens it; used by one thread.

    `pods` is what the names of interfaces begin with that do not matter, as pods' host ends. Ready to be
    read when `fileno()` is.
    """

    def __init__(self, *pods: str) -> None:
        self._prefix = tuple(start.encode() for start in pods)
        self._socket: socket.socket | None = None
        self._state = _State()

    def __enter__(self) -> Self:
        self._socket = opened = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        with contextlib.suppress(PermissionError):
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        opened.bind((0, GROUPS))
        self._learn()
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._open().fileno()

    def drain(
        self,
        own: Collection[int],
        devices: Collection[int],
        forwarding: Collection[tuple[int, str, str]] = frozenset(),
    ) -> Seen:
        """Read what there is and return what of it matters; never waits.

        `own` are the port ids of our sockets (`Rtnl.port`), `devices` the indexes of our tunnels,
        `forwarding` the forwarding entries that these should have, as (index, MAC, address), in a set.
        """
        ours, lost = Ours(own, devices, forwarding), set[str]()
        network = overrun = False
        for _ in range(DATAGRAMS):
            try:
                datagram = self._open().recv(RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                overrun = True
                continue
            for kind, _flags, _sequence, message in split(datagram):
                network = self._matters(kind, message, ours, lost) or network
        if overrun:
            self._learn()
        return Seen(network or overrun, frozenset(lost), overrun)

    def _learn(self) -> None:
        """Read the links and addresses that there are."""
        self._state = _State()
        with Rtnl() as rtnl:
            for message in rtnl.dump(RTM_GETLINK):
                self._link(RTM_NEWLINK, message)
            for message in rtnl.dump(RTM_GETADDR):
                self._address(RTM_NEWADDR, message)

    def _matters(self, kind: int, message: bytes, ours: Ours, lost: set[str]) -> bool:
        """Whether a notification is of a change that calls for a comparison; adds to the routes lost."""
        try:
            (port,) = _PID.unpack_from(message)
            if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
                return _neighbour(kind, port, message, ours)
            if kind in (RTM_NEWLINK, RTM_DELLINK):
                return self._link(kind, message)
            if kind in (RTM_NEWADDR, RTM_DELADDR):
                return self._address(kind, message) and port not in ours.ports
            if port in ours.ports:
                return False
            if kind in (RTM_NEWROUTE, RTM_DELROUTE):
                return self._route(kind, port, message, lost)
            return kind == RTM_DELRULE and entries.rule(message) is not None
        except struct.error:  # shorter than its kind
            return False

    def _link(self, kind: int, message: bytes) -> bool:
        """Note a link; whether one changed that is no pod's."""
        family, _, index, flags, _ = LINK.unpack_from(message, BODY)
        if family:  # a bridge's word about its port
            return False
        pods = self._state.pods
        if index in pods:
            if kind == RTM_DELLINK:
                pods.discard(index)
            return False
        if kind == RTM_DELLINK:
            self._state.links.pop(index, None)
            return True
        found = parsed(message, BODY + LINK.size)
        if found.get(IFLA_IFNAME, b"").startswith(self._prefix):
            pods.add(index)
            return False
        told = (flags & STATE_FLAGS, *map(found.get, (IFLA_IFNAME, IFLA_MTU, IFLA_ADDRESS, IFLA_MASTER)))
        return _note(self._state.links, index, told)

    def _address(self, kind: int, message: bytes) -> bool:
        """Note an address; whether one changed. Link-local ones and those of pods' host ends are left out."""
        _, prefix, flags, scope, index = ADDRESS.unpack_from(message, BODY)
        if scope == RT_SCOPE_LINK or index in self._state.pods:
            return False
        found = parsed(message, BODY + ADDRESS.size)
        key = (index, prefix, found.get(IFA_LOCAL), found.get(IFA_ADDRESS))
        if kind == RTM_DELADDR:
            self._state.addresses.pop(key, None)
            return True
        return _note(self._state.addresses, key, found.get(IFA_FLAGS, flags))

    def _route(self, kind: int, port: int, message: bytes, lost: set[str]) -> bool:
        """Whether a route matters that somebody else set or removed."""
        _, _, _, _, table, protocol, _, way, _ = ROUTE.unpack_from(message, BODY)
        foreign = protocol != ROUTE_PROTOCOL
        if table == RT_TABLE_LOCAL or way in NOT_WAYS or (foreign and table != RT_TABLE_MAIN):
            return False
        found = None if entries.is_cached(message) else entries.route(message)
        if found is None:
            return False
        if foreign:
            return found.oif not in self._state.pods and not _is_local(found.destination)
        if found.oif in self._state.pods and (kind == RTM_NEWROUTE or port == 0):
            return False  # a pod that comes, or one whose interface goes: the kernel takes the route away
        if kind == RTM_DELROUTE and found.table == RT_TABLE_MAIN:
            lost.add(found.destination)
        return True

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError("the netlink socket is not open")
        return self._socket


def _neighbour(kind: int, port: int, message: bytes, ours: Ours) -> bool:
    """Whether somebody else changed a neighbour or forwarding entry of a tunnel.

    A neighbour that is deleted is told of first as failed, by who asks, then as gone, by the kernel; the
    kernel alone removes permanent ones, when an interface goes down.
    """
    index: int
    state: int
    family, index, state, _, _ = NEIGHBOUR.unpack_from(message, BODY)
    if index not in ours.devices:
        return False
    if family == AF_BRIDGE:
        entry = entries.forwarding(message)
        if entry is None:
            return False
        wanted = (index, entry[1].mac, entry[1].address) in ours.forwarding
        return wanted == (kind == RTM_DELNEIGH)
    if kind == RTM_DELNEIGH:
        return state == NUD_PERMANENT
    return port != 0 and port not in ours.ports


def _note(known: dict[K, object], key: K, value: object) -> bool:
    """Keep a value; whether it is another than before."""
    before = known.get(key)
    known[key] = value
    return before != value


def _is_local(destination: str) -> bool:
    """Whether a destination is of one link only, or a group of receivers."""
    address = ip_address(destination.partition("/")[0])
    return address.is_link_local or address.is_multicast
