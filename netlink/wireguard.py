"""WireGuard devices over generic netlink: their keys, their peers, and what has passed.

A device is made and removed by route netlink (`requests.wireguard_add`); what makes it a tunnel is here. One
message takes any number of peers, and the kernel applies it under one lock. The format is packed here as
route netlink's is: pyroute2's socket (pyroute2.netlink.generic.wireguard) sends one peer in a message, runs
an event loop for each, and takes 0.3 ms to read one: 3 s with 5,000 peers on two devices, and 0.25 so.
Source of all numbers: linux/wireguard.h, linux/genetlink.h.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from netlink.attributes import attribute, nested, parse, parsed, text
from netlink.errors import NetlinkError
from netlink.generic import BODY, Generic
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
)

NAME = "wireguard"
"""Of the generic netlink family, and of the kind of link."""
KEY_BYTES = 32

WG_CMD_GET_DEVICE, WG_CMD_SET_DEVICE = 0, 1
WGDEVICE_A_IFINDEX, WGDEVICE_A_IFNAME, WGDEVICE_A_PRIVATE_KEY, WGDEVICE_A_PUBLIC_KEY = 1, 2, 3, 4
WGDEVICE_A_LISTEN_PORT, WGDEVICE_A_PEERS = 6, 8
WGPEER_A_PUBLIC_KEY, WGPEER_A_FLAGS, WGPEER_A_ENDPOINT, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL = 1, 3, 4, 5
WGPEER_A_LAST_HANDSHAKE_TIME, WGPEER_A_RX_BYTES, WGPEER_A_TX_BYTES, WGPEER_A_ALLOWEDIPS = 6, 7, 8, 9
WGALLOWEDIP_A_FAMILY, WGALLOWEDIP_A_IPADDR, WGALLOWEDIP_A_CIDR_MASK = 1, 2, 3
WGPEER_F_REMOVE_ME, WGPEER_F_REPLACE_ALLOWEDIPS = 1, 2

TIME = struct.Struct("=qq")  # struct __kernel_timespec
MESSAGE_BYTES = 32_000
"""Of peers in one message at most: the length of the attribute around them has 16 bits."""

Endpoint = tuple[str, int]
"""Address and UDP port."""


class Peer(NamedTuple):
    """A peer as it is configured: its public key (base64), where it is, and whose packets are its own.

    `allowed` are CIDRs, in the kernel's spelling; `keepalive` is in seconds, 0: none.
    """

    key: str
    endpoint: Endpoint | None = None
    allowed: frozenset[str] = frozenset()
    keepalive: int = 0


class Known(NamedTuple):
    """A peer as the kernel has it.

    `handshake` is when the last one was (seconds since the epoch), 0: never. Bytes are those of the outer
    packets' payload.
    """

    peer: Peer
    handshake: float = 0.0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a peer, which is made if it is not there; None: it stays as it is."""

    key: str
    endpoint: Endpoint | None = None
    allowed: frozenset[str] | None = None
    keepalive: int | None = None
    remove: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A device: its public key (base64; "" without one), its UDP port, and its peers by their keys.

    The kernel tells the private key too, to root; nobody here looks at it.
    """

    index: int
    name: str
    key: str = ""
    port: int = 0
    peers: Mapping[str, Known] = field(default_factory=dict)


def new_private_key() -> bytes:
    """Return a private key: random, with the bits fixed that Curve25519 has fixed (RFC 7748, section 5)."""
    key = bytearray(os.urandom(KEY_BYTES))
    key[0] &= 248
    key[31] = (key[31] & 127) | 64
    return bytes(key)


class WireGuard(Generic):
    """A socket for the devices of a network namespace.

    Opening raises NetlinkError with ENOENT on a kernel without WireGuard.
    """

    NAME = NAME
    MISSING = "cannot find WireGuard in the kernel", ""

    def device(self, name: str) -> Device:
        """Return a device with its peers. Raises NetlinkError, `gone` without one of that name."""
        body = text(WGDEVICE_A_IFNAME, name)
        while True:
            found = self._ask(WG_CMD_GET_DEVICE, NLM_F_DUMP, body, f"read the WireGuard device {name}")
            if found is not None:
                return _device(name, found)

    def configure(self, name: str, *, private_key: bytes | None = None, port: int | None = None) -> None:
        """Set a device's private key or UDP port. Sessions end with another key, and only with another."""
        parts = [text(WGDEVICE_A_IFNAME, name)]
        if private_key is not None:
            parts.append(attribute(WGDEVICE_A_PRIVATE_KEY, private_key))
        if port is not None:
            parts.append(attribute(WGDEVICE_A_LISTEN_PORT, struct.pack("=H", port)))
        self._set(b"".join(parts), f"configure the WireGuard device {name}")

    def change(self, name: str, changes: Iterable[Change]) -> int:
        """Change peers in the order given; return the number of messages that took.

        An allowed range that another peer of the device has moves from that one to this.
        """
        messages = list(_gathered(map(_peer, changes)))
        for peers in messages:
            body = text(WGDEVICE_A_IFNAME, name) + nested(WGDEVICE_A_PEERS, peers)
            self._set(body, f"change peers of the WireGuard device {name}")
        return len(messages)

    def _set(self, attributes: bytes, what: str) -> None:
        self._ask(WG_CMD_SET_DEVICE, NLM_F_ACK, attributes, what)

    def _ask(self, command: int, flags: int, body: bytes, what: str) -> list[bytes] | None:
        """Return what answers a request; None if it changed while it was told."""
        self._send(self._frame(command, flags, body))
        found: list[bytes] = []
        interrupted = False
        while True:
            for answer, marks, sequence, message in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(marks & NLM_F_DUMP_INTR)
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    if answer == NLMSG_ERROR and (code := error_code(message)):
                        raise NetlinkError(code, f"cannot {what}")
                    return None if interrupted else found
                found.append(message)


def _gathered(peers: Iterable[bytes]) -> Iterator[bytes]:
    """Yield peers together, in parts of limited size."""
    part: list[bytes] = []
    size = 0
    for peer in peers:
        if part and size + len(peer) > MESSAGE_BYTES:
            yield b"".join(part)
            part, size = [], 0
        part.append(peer)
        size += len(peer)
    if part:
        yield b"".join(part)


def _peer(change: Change) -> bytes:
    """Encode what is to become of a peer. The index of an array's items means nothing (nla 0)."""
    flags = WGPEER_F_REMOVE_ME if change.remove else 0
    parts = [attribute(WGPEER_A_PUBLIC_KEY, base64.b64decode(change.key))]
    if not change.remove:
        if change.endpoint:
            parts.append(attribute(WGPEER_A_ENDPOINT, _sockaddr(*change.endpoint)))
        if change.keepalive is not None:
            seconds = struct.pack("=H", change.keepalive)
            parts.append(attribute(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, seconds))
        if change.allowed is not None:
            flags |= WGPEER_F_REPLACE_ALLOWEDIPS
            parts.append(nested(WGPEER_A_ALLOWEDIPS, *map(_allowed, sorted(change.allowed))))
    parts.append(attribute(WGPEER_A_FLAGS, struct.pack("=I", flags)))
    return nested(0, *parts)


def _allowed(cidr: str) -> bytes:
    network, _, bits = cidr.partition("/")
    family = socket.AF_INET6 if ":" in network else socket.AF_INET
    return nested(
        0,
        attribute(WGALLOWEDIP_A_FAMILY, struct.pack("=H", family)),
        attribute(WGALLOWEDIP_A_IPADDR, socket.inet_pton(family, network)),
        attribute(WGALLOWEDIP_A_CIDR_MASK, bytes([int(bits)])),
    )


def _sockaddr(address: str, port: int) -> bytes:
    """Encode struct sockaddr_in or sockaddr_in6."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address)
        return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + bytes(4)
    return (
        struct.pack("=H", socket.AF_INET)
        + struct.pack(">H", port)
        + socket.inet_pton(socket.AF_INET, address)
        + bytes(8)
    )


def _device(name: str, messages: Iterable[bytes]) -> Device:
    """Decode a device. One with many peers is told in several messages, and so may a peer be."""
    index, key, port = 0, "", 0
    peers: dict[str, Known] = {}
    for message in messages:
        for kind, payload in parse(message, BODY):
            if kind == WGDEVICE_A_IFINDEX:
                index = struct.unpack("=I", payload)[0]
            elif kind == WGDEVICE_A_PUBLIC_KEY and any(payload):
                key = _text(payload)
            elif kind == WGDEVICE_A_LISTEN_PORT:
                port = struct.unpack("=H", payload)[0]
            elif kind == WGDEVICE_A_PEERS:
                for _, one in parse(payload):
                    found = _known(parsed(one))
                    before = peers.get(found.peer.key)
                    peers[found.peer.key] = _joined(before, found) if before else found
    return Device(index, name, key, port, peers)


def _joined(first: Known, rest: Known) -> Known:
    """Return a peer that was told in two parts: the second has its key and the rest of its ranges."""
    return first._replace(peer=first.peer._replace(allowed=first.peer.allowed | rest.peer.allowed))


def _known(found: Mapping[int, bytes]) -> Known:
    endpoint = found.get(WGPEER_A_ENDPOINT)
    allowed = parse(found.get(WGPEER_A_ALLOWEDIPS, b""))
    peer = Peer(
        _text(found[WGPEER_A_PUBLIC_KEY]),
        _endpoint(endpoint) if endpoint else None,
        frozenset(_cidr(parsed(one)) for _, one in allowed),
        _number(found, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL),
    )
    seconds, nanoseconds = TIME.unpack(found.get(WGPEER_A_LAST_HANDSHAKE_TIME, bytes(TIME.size)))
    return Known(
        peer,
        seconds + nanoseconds / 1e9,
        _number(found, WGPEER_A_RX_BYTES),
        _number(found, WGPEER_A_TX_BYTES),
    )


def _number(found: Mapping[int, bytes], kind: int) -> int:
    payload = found.get(kind, b"")
    return int(struct.unpack({2: "=H", 8: "=Q"}[len(payload)], payload)[0]) if payload else 0


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _endpoint(sockaddr: bytes) -> Endpoint:
    (family,) = struct.unpack_from("=H", sockaddr)
    (port,) = struct.unpack_from(">H", sockaddr, 2)
    part = sockaddr[8:24] if family == socket.AF_INET6 else sockaddr[4:8]
    return socket.inet_ntop(family, part), port


def _cidr(found: Mapping[int, bytes]) -> str:
    (family,) = struct.unpack("=H", found[WGALLOWEDIP_A_FAMILY])
    return f"{socket.inet_ntop(family, found[WGALLOWEDIP_A_IPADDR])}/{found[WGALLOWEDIP_A_CIDR_MASK][0]}"
