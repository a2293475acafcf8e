"""The server on its port: connections, authentication, routing, faults."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.kubeapi import discovery
from tests.kubeapi.faults import Fault, Faults, Line, Settings, Watch
from tests.kubeapi.requests import Answer, answer, list_pieces, locate, verb_of, watch_options
from tests.kubeapi.resources import Resource
from tests.kubeapi.status import ApiError
from tests.kubeapi.store import Store
from tests.kubeapi.watching import WatchStream, expired_line
from tests.kubeapi.wire import Connection, Gone, Request

TLS_SECONDS = 10.0
"""How long a client may take for its part of the handshake."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int


class Server:
    """Serves a store. `tokens` are those that count; an empty set lets everybody in."""

    def __init__(self, store: Store, settings: Settings, address: Address) -> None:
        self.store = store
        self.settings = settings
        self.faults = Faults()
        self.tokens: frozenset[str] = frozenset()
        self.address = address
        self._tls: ssl.SSLContext | None = None
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def certificate(self, certificate: Path, key: Path) -> None:
        """Use a certificate for connections that come from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["http/1.1"])
        self._tls = context

    def up(self) -> None:
        """Listen; a second call changes nothing."""
        if self._listener:
            return
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.address.host, self.address.port))
        listener.listen(512)
        self.address = Address(self.address.host, listener.getsockname()[1])
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()

    def down(self) -> None:
        """Stop listening and end all connections, as the end of the process would."""
        listener, self._listener = self._listener, None
        if listener:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock)
        with self._lock:
            self._connections.add(connection)
        try:
            if self._tls:
                sock.settimeout(TLS_SECONDS)
                connection.sock = self._tls.wrap_socket(sock, server_side=True)
                connection.sock.settimeout(None)
            while self._listener and (request := connection.request()):
                if not self._handle(connection, request):
                    break
        except (OSError, Gone):
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            with contextlib.suppress(OSError):
                connection.sock.close()

    def _handle(self, connection: Connection, request: Request) -> bool:
        """Answer one request; return whether the connection can be used on."""
        target = locate(request.path)
        verb = verb_of(request, target)
        self.faults.count(verb, request.path)
        fault = self.faults.met(verb, request.target)
        delay = self.settings.delay + (fault.seconds if fault and fault.action == "delay" else 0)
        if delay:
            time.sleep(delay)
        try:
            if fault and fault.action == "status" and fault.plain:
                return self._send(connection, request, _plain(fault), (verb, fault))
            if fault and fault.action == "status":
                raise ApiError(fault.code, fault.message, retry_after=fault.retry_after)
            if fault and (fault.action == "close" or (fault.action == "hang" and verb != "watch")):
                self._note(verb, request, 0)
                return self._left_alone(connection, fault)
            self._authenticate(request)
            if target and verb == "watch":
                return self._watch(connection, request, target.resource, fault)
            answered = (
                answer(self.store, self.settings, request, target) if target else self._document(request)
            )
        except ApiError as error:
            answered = Answer(error.code, error.body)
            if error.retry_after is not None:
                answered = Answer(error.code, error.body, {"Retry-After": str(error.retry_after)})
        except msgspec.DecodeError as error:
            answered = Answer(400, ApiError(400, f"the body is no JSON: {error}").body)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # An object of another shape than ours handle: the real one says 400 or 422, and what.
            answered = Answer(500, ApiError(500, f"{type(error).__name__}: {error}").body)
        return self._send(connection, request, answered, (verb, fault))

    def _send(
        self, connection: Connection, request: Request, answered: Answer, why: tuple[str, Fault | None]
    ) -> bool:
        verb, fault = why
        self._note(verb, request, answered.code)
        if fault and fault.action == "half":
            self._half(connection, answered)
            return False
        zipped = self.settings.gzip and "gzip" in request.headers.get("accept-encoding", "")
        body = list_pieces(answered) if answered.entries is not None else answered.body
        connection.answer(answered.code, body, answered.headers, zipped)
        return request.headers.get("connection", "").lower() != "close"

    def _half(self, connection: Connection, answered: Answer) -> None:
        """Send the first half of an answer whose length says more."""
        body = b"".join(list_pieces(answered)) if answered.entries is not None else answered.body
        connection.half(answered.code, body)

    def _left_alone(self, connection: Connection, fault: Fault) -> bool:
        """Answer nothing: hold the connection until the fault is cleared or the client goes, or close."""
        if fault.action == "hang":
            cleared = self.faults.cleared
            while not connection.closed() and not cleared.wait(0.1):
                pass
        return False

    def _authenticate(self, request: Request) -> None:
        if not self.tokens or request.path.startswith(discovery.OPEN):
            return
        if "authorization" not in request.headers:
            text = f'forbidden: User "system:anonymous" cannot {request.method.lower()} path "{request.path}"'
            raise ApiError(403, text)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or token.strip() not in self.tokens:
            raise ApiError(401, "Unauthorized")

    def _document(self, request: Request) -> Answer:
        found = discovery.document(request.path, f"{self.address.host}:{self.address.port}")
        if found is None:
            return Answer(404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"})
        if isinstance(found, str):
            return Answer(200, found.encode(), {"Content-Type": "text/plain; charset=utf-8"})
        return Answer(200, msgspec.json.encode(found))

    def _watch(
        self, connection: Connection, request: Request, resource: Resource, fault: Fault | None
    ) -> bool:
        options = watch_options(request, self.settings, resource, locate(request.path))
        error = None
        if options.version is not None:
            try:
                self.store.events(options.version)
            except ApiError as problem:
                if self.settings.expired_as == "status":
                    raise
                error = problem
        self._note("watch", request, 200)
        watch = Watch(request.target, connection)
        if fault and fault.action == "hang":
            watch.stalled = "silent"
        connection.start(200, {"Content-Type": "application/json", "Cache-Control": "no-cache, private"})
        if error:
            connection.chunk(expired_line(error))
            connection.end()
            return True
        self.faults.open(watch)
        try:
            stream = WatchStream(self.store, self.settings, options, watch)
            return stream.run(half=bool(fault and fault.action == "half"))
        finally:
            self.faults.close(watch)

    def _note(self, verb: str, request: Request, code: int) -> None:
        agent = request.headers.get("user-agent", "")
        self.faults.answered(Line(time.monotonic(), verb, request.target, code, agent))


def _plain(fault: Fault) -> Answer:
    """Return a failure without a Status object."""
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    return Answer(fault.code, fault.message.encode() + b"\n", headers)
