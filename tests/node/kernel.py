"""What the kernel's rulesets do: the events of nftables in a namespace, as they come."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from netlink import netns

SO_RCVBUFFORCE = 33
NETLINK_NETFILTER, NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES = 12, 7, 10
HEADER = struct.Struct("=IHHII")
NEW_GENERATION = 15
KINDS = {
    12: "new element",
    14: "lost element",
    6: "new rule",
    8: "lost rule",
    3: "new chain",
    5: "lost chain",
}
KINDS |= {0: "new table", 2: "lost table", 9: "new set", 11: "lost set"}
BUFFER = 64 << 20


class Event(NamedTuple):
    """Something that happened to a ruleset; `at` is monotonic seconds."""

    at: float
    what: str


class Events:
    """Events of one namespace since they were listened to."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def take(self, timeout: float = 0.0) -> list[Event]:
        """Return what has happened; wait for something at most `timeout` seconds."""
        found: list[Event] = []
        while select.select([self._listener], [], [], 0 if found else timeout)[0]:
            data, at = self._listener.recv(1 << 18), time.monotonic()
            offset = 0
            while offset < len(data):
                length, kind, *_ = HEADER.unpack_from(data, offset)
                if kind >> 8 == NFNL_SUBSYS_NFTABLES and kind & 0xFF != NEW_GENERATION:
                    found.append(Event(at, KINDS.get(kind & 0xFF, str(kind & 0xFF))))
                offset += (length + 3) & ~3
        return found


@contextlib.contextmanager
def listening(namespace: str) -> Iterator[Events]:
    """Listen to what happens to the rulesets of a namespace."""

    def join() -> socket.socket:
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        listener.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        return listener

    with contextlib.closing(netns.run(namespace, join)) as listener:
        yield Events(listener)
