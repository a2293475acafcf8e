"""Tell systemd how the daemon is: sd_notify(3), one datagram a message, to the socket in $NOTIFY_SOCKET.

Without that socket every call does nothing. A message that cannot be sent is lost: the service manager's
health is not the network's.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

SEND_SECONDS = 1.0
"""How long a message may wait for room in the socket's queue."""


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return within which time the service manager wants to hear from this process; None: it does not."""
    try:
        limit = int(environ.get("WATCHDOG_USEC", "0"))
        meant = int(environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return limit / 1e6 if limit > 0 and meant == os.getpid() else None


class Notifier:
    """What the daemon's loop calls; each message is sent at once. Used by one thread."""

    def __init__(
        self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        limit = watchdog_seconds(environ)
        self._interval = limit / 3 if limit else None
        self._clock = clock
        self._alive_at = -1e9
        self._status = ""

    def ready(self, status: str) -> None:
        """Say that starting, or reloading, has ended."""
        self._status = status
        self._send("READY=1", f"STATUS={_line(status)}")

    def status(self, text: str) -> None:
        """Say in words what the daemon does; the same words again are not sent."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """Say that the daemon goes on, at most every third of the time that the watchdog waits."""
        now = self._clock()
        if self._interval is not None and now - self._alive_at >= self._interval:
            self._alive_at = now
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """Say that the configuration is read again; `ready` says that this is done."""
        # The time of CLOCK_MONOTONIC tells the manager to which reload the next READY belongs.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Say that the daemon ends."""
        self._send("STOPPING=1")

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto("\n".join(assignments).encode(errors="replace"), self._address)
        except OSError as error:
            log.debug("the service manager was not told %s: %s", assignments[0], error)


def _address(text: str) -> str | bytes | None:
    """Return the address of a socket: a path, or after an @ a name in the abstract namespace."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return text if text.startswith("/") else None


def _line(text: str) -> str:
    return " ".join(text.split())
