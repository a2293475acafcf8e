"""Requests from inside a namespace, without any external program: what did the server see?"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from netlink import netns
from netlink.family import Family

TIMEOUT_SECONDS = 2.0
SILENCE_SECONDS = 1.0
"""How long to wait where no answer is expected: what refuses or answers in a lab does so in milliseconds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an echo server said: who it is and which client address it saw."""

    server: str
    seen: str
    forwarded_for: str = ""  # the client's address that a proxy told of, if one did


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there was no answer: `timed out`, `refused`, or the system's words."""

    reason: str


Result = Answer | Failure


def fetch(
    namespace: str, address: str, port: int, count: int = 1, timeout: float = TIMEOUT_SECONDS
) -> list[Result]:
    """Make `count` HTTP requests from inside a namespace, each on a connection of its own.

    Stops at the first that fails: a hundred time-outs in a row tell nothing more.
    """
    return netns.run(namespace, fetch_here, address, port, count, timeout)


def fetch_here(address: str, port: int, count: int = 1, timeout: float = TIMEOUT_SECONDS) -> list[Result]:
    """Do what `fetch` does in the namespace of this thread."""
    results: list[Result] = []
    while len(results) < count and not (results and isinstance(results[-1], Failure)):
        results.append(_get(address, port, timeout))
    return results


def datagram(namespace: str, address: str, port: int, timeout: float = TIMEOUT_SECONDS) -> Result:
    """Send one UDP datagram from inside a namespace and return the answer to it."""
    return netns.run(namespace, _ask, address, port, timeout)


def wait_status(namespace: str, port: int, path: str, deadline: float) -> bool:
    """Wait until `http://127.0.0.1:port/path` answers 200 inside a namespace; False past the deadline."""

    def wait() -> bool:
        while time.monotonic() < deadline:
            if status("127.0.0.1", port, path)[0] == 200:
                return True
            time.sleep(0.02)
        return False

    return netns.run(namespace, wait)


def status(address: str, port: int, path: str, timeout: float = TIMEOUT_SECONDS) -> tuple[int, bytes]:
    """Return the status and body that a GET from this thread's namespace is answered with; 0 without one."""
    try:
        with socket.create_connection((address, port), timeout) as connection:
            head, body = _exchange(connection, address, path)
    except OSError:
        return 0, b""
    words = head.split(b" ")
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body


def unrouted(namespace: str, family: Family) -> int:
    """Return how many packets a router has dropped because it had no route for them (InNoRoutes)."""

    def count() -> int:
        file = "netstat" if family is Family.V4 else "snmp6"
        rows = [line.split() for line in Path("/proc/thread-self/net", file).read_text().splitlines()]
        if family is Family.V6:  # a name and a value in each line
            return int(next(row[1] for row in rows if row[0] == "Ip6InNoRoutes"))
        names, values = (row for row in rows if row[0] == "IpExt:")  # a line of names, one of values
        return int(values[names.index("InNoRoutes")])

    return netns.run(namespace, count)


def _get(address: str, port: int, timeout: float) -> Result:
    try:
        with socket.create_connection((address, port), timeout) as connection:
            body = _exchange(connection, address, "/")[1]
        return answer(body)
    except OSError as error:
        return _failure(error)


def _ask(address: str, port: int, timeout: float) -> Result:
    try:
        family = Family(ip_address(address).version)
        with socket.socket(family.af, socket.SOCK_DGRAM) as client:
            client.settimeout(timeout)
            client.connect((address, port))
            client.send(b"?")
            return answer(client.recv(4096))
    except OSError as error:
        return _failure(error)


def _exchange(connection: socket.socket, host: str, path: str) -> tuple[bytes, bytes]:
    """Send one GET and return the head and the body, read until the server closes."""
    name = f"[{host}]" if ":" in host else host
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


def answer(body: bytes) -> Result:
    """Return what an echo server says in the body of a response, or in a datagram."""
    try:
        fields = json.loads(body)
        return Answer(fields["name"], fields["client_address"], fields.get("forwarded_for", ""))
    except (ValueError, KeyError, TypeError):
        return Failure("answered by something that is no echo server")


def _failure(error: OSError) -> Failure:
    if isinstance(error, TimeoutError):
        return Failure("timed out")
    if isinstance(error, ConnectionRefusedError):
        return Failure("refused")
    return Failure(error.strerror or str(error))
