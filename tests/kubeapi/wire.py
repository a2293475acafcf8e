"""HTTP/1.1 on a socket: requests in, answers and chunked streams out; what Kubernetes clients need of it."""

from __future__ import annotations

import contextlib
import gzip
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote, urlsplit

CHUNK = 256 * 1024
GZIP_FROM = 128 * 1024
"""Bytes from which kube-apiserver compresses an answer."""


class Gone(Exception):
    """The other side has closed, or sends what is no HTTP."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; header names are in lower case."""

    method: str
    path: str
    target: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def flag(self, name: str) -> bool:
        """Whether a query parameter is true, as Go parses it."""
        return self.query.get(name, "") in ("1", "t", "T", "true", "TRUE", "True")


class Connection:
    """One client's connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def request(self) -> Request | None:
        """Read the next request; None at the end of the connection."""
        try:
            head = self._until(b"\r\n\r\n")
            line, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ")
            headers = {}
            for text in lines:
                name, _, value = text.partition(":")
                headers[name.strip().lower()] = value.strip()
            if headers.get("expect", "").lower() == "100-continue":
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = self._body(headers)
        except (OSError, ValueError, Gone):
            return None
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return Request(method, unquote(parts.path), target, query, headers, body)

    def answer(
        self,
        code: int,
        body: bytes | Iterable[bytes],
        headers: dict[str, str] | None = None,
        zipped: bool = False,
    ) -> None:
        """Send an answer: bytes with their length, anything else in chunks."""
        headers = {
            "Content-Type": "application/json",
            "Cache-Control": "no-cache, private",
            **(headers or {}),
        }
        if isinstance(body, bytes):
            if zipped and len(body) >= GZIP_FROM:
                body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
            headers["Content-Length"] = str(len(body))
            self.send(_head(code, headers) + body)
            return
        if zipped:
            self.answer(code, b"".join(body), headers, zipped)
            return
        self.start(code, headers)
        for piece in body:
            self.chunk(piece)
        self.end()

    def half(self, code: int, body: bytes) -> None:
        """Send the first half of an answer whose length says more."""
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send(_head(code, headers) + body[: len(body) // 2])

    def start(self, code: int, headers: dict[str, str]) -> None:
        """Begin an answer in chunks."""
        self.send(_head(code, {**headers, "Transfer-Encoding": "chunked"}))

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """End an answer in chunks."""
        self.send(b"0\r\n\r\n")

    def send(self, data: bytes) -> None:
        """Send bytes; raises Gone when nobody takes them."""
        try:
            self.sock.sendall(data)
        except (OSError, ValueError) as error:
            raise Gone(str(error)) from None

    def closed(self) -> bool:
        """Whether the client has gone: it sends nothing during an answer, so anything readable is its end."""
        try:
            poll = select.poll()
            poll.register(self.sock.fileno(), select.POLLIN | select.POLLRDHUP)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def cut(self) -> None:
        """End the connection from any thread, without TLS's and HTTP's goodbye."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._receive()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise Gone
        self._buffer += data

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self._exactly(int(headers.get("content-length", "0")))
        pieces = []
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            pieces.append(self._exactly(size))
            self._until(b"\r\n")
        self._until(b"\r\n")
        return b"".join(pieces)


def _head(code: int, headers: dict[str, str]) -> bytes:
    try:
        phrase = HTTPStatus(code).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {code} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
