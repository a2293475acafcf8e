"""Tell load balancers, on each healthCheckNodePort, how many ready endpoints a service has on this node.

- `checks` counts, purely, what is to be told.
- `HealthChecks` listens on the ports and tells it, all in one thread that never waits for a client.

Paths, codes, JSON and headers are kube-proxy's. Source: Kubernetes documentation, "Using Source IP", "Source
IP for Services with Type=LoadBalancer"; KEP-1669 for what does not count.
"""

from __future__ import annotations

import contextlib
import errno
import http
import json
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from netlink.family import IPV6, Family
from proxy.model import EndpointSlice, ObjectName, Service

PATIENCE = 5.0
"""Seconds that a connection may last: a request and its answer are one packet each."""
LONGEST_REQUEST = 8192
MOST_CONNECTIONS = 256
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) \S+ HTTP/1\.[01]\r?\n")
END_OF_HEAD = re.compile(rb"\n\r?\n")

log = logging.getLogger(__name__)

Place = tuple[int, str]
"""A port, and the address it is served on ("" for all)."""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """What is told of a service: its name and how many ready endpoints it has on this node."""

    namespace: str
    name: str
    local_endpoints: int


def check(service: Service, slices: Iterable[EndpointSlice], node: str) -> HealthCheck:
    """Count the ready endpoints of a service on a node.

    Terminating ones do not count even while they serve: the balancer is to stop sending before they are
    gone. A pod of a dual-stack service is one endpoint, so the family that has more of them is what counts.
    """
    local: dict[Family, set[str]] = {}
    for piece in slices:
        if piece.ports:
            local.setdefault(piece.family, set()).update(
                e.address for e in piece.endpoints if e.ready and not e.terminating and e.node == node
            )
    return HealthCheck(service.name.namespace, service.name.name, max(map(len, local.values()), default=0))


def checks(
    services: Iterable[Service], slices: Mapping[ObjectName, Sequence[EndpointSlice]], node: str
) -> dict[int, HealthCheck]:
    """Return what is to be told on which port, for those services that have a health check port.

    Of two services with the same port, which the API server does not admit, the first by name has it.
    """
    found: dict[int, HealthCheck] = {}
    for service in sorted((s for s in services if s.health_port), key=lambda s: s.name):
        found.setdefault(service.health_port, check(service, slices.get(service.name, ()), node))
    return found


def answer(request: bytes | bytearray, told: HealthCheck, healthy: bool) -> bytes | None:
    """Return the answer to a request; None while the request is not complete.

    Like kube-proxy, any method and any path will do. The connection is always closed: balancers ask seldom.
    """
    if len(request) > LONGEST_REQUEST:
        return _response(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, b"")
    if not END_OF_HEAD.search(request):
        return None
    line = REQUEST_LINE.match(request)
    if not line:
        return _response(http.HTTPStatus.BAD_REQUEST, b"")
    body = {
        "service": {"namespace": told.namespace, "name": told.name},
        "localEndpoints": told.local_endpoints,
        "serviceProxyHealthy": healthy,
    }
    good = told.local_endpoints > 0 and healthy
    return _response(
        http.HTTPStatus.OK if good else http.HTTPStatus.SERVICE_UNAVAILABLE,
        json.dumps(body).encode(),
        f"Content-Type: application/json\r\nX-Load-Balancing-Endpoint-Weight: {told.local_endpoints}\r\n",
        head_only=line[1] == b"HEAD",
    )


def _response(status: http.HTTPStatus, body: bytes, headers: str = "", head_only: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n{headers}X-Content-Type-Options: nosniff\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)


@dataclass(slots=True)
class _Client:
    """A connection: on which port, until when (monotonic), and what came so far."""

    socket: socket.socket
    port: int
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    answered: bool = False
    received: int = 0


class HealthChecks:
    """The listeners. `problems` says, in sentences, which ports cannot be had; `update` tries them again.

    `healthy` is asked in the thread of the listeners. Without `addresses` the ports are open on all of the
    node's, of both families.
    """

    def __init__(self, healthy: Callable[[], bool], addresses: Sequence[str] = ("",)) -> None:
        self.problems: tuple[str, ...] = ()
        self._healthy = healthy
        self._addresses = tuple(addresses)
        self._lock = threading.Lock()  # of all below; the thread never waits for anything while it has it
        self._wanted: Mapping[int, HealthCheck] = {}
        self._listeners: dict[Place, socket.socket] = {}
        self._ports: dict[int, tuple[socket.socket, int]] = {}
        self._clients: dict[
            int, _Client
        ] = {}  # by descriptor; the oldest, whose time is up first, comes first
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def __enter__(self) -> HealthChecks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, wanted: Mapping[int, HealthCheck], addresses: Sequence[str] | None = None) -> None:
        """Tell this from now on: open what is new, close what is gone, leave alone what stays.

        New `addresses` take the place of those known so far. Never raises; see `problems`.
        """
        with self._lock:
            if self._stop.is_set():
                return
            if addresses is not None:
                self._addresses = tuple(addresses)
            self._wanted = dict(wanted)
            if wanted and not self._start():
                return
            places = {(port, address) for port in wanted for address in self._addresses}
            for place in self._listeners.keys() - places:
                self._unlisten(place)
            opened = (self._listen(place) for place in sorted(places - self._listeners.keys()))
            self.problems = tuple(problem for problem in opened if problem)

    def close(self) -> None:
        """Close all ports and connections, and end the thread."""
        self._stop.set()
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            os.eventfd_write(self._wake, 1)
        thread.join()
        with self._lock:
            for place in list(self._listeners):
                self._unlisten(place)
            for descriptor in list(self._clients):
                self._drop(descriptor)
            self._epoll.close()
            os.close(self._wake)

    def _start(self) -> bool:
        """Start the thread if it does not run; without descriptors for it there is only a problem to tell."""
        if self._thread:
            return True
        try:
            self._epoll = select.epoll()
        except OSError as error:
            self.problems = (f"health check ports cannot be served: {error.strerror}",)
            return False
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            self._epoll.close()
            self.problems = (f"health check ports cannot be served: {error.strerror}",)
            return False
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="healthchecks", daemon=True)
        self._thread.start()
        return True

    def _listen(self, place: Place) -> str:
        """Open a listener; return what is wrong, "" when nothing is."""
        port, address = place
        try:
            with contextlib.ExitStack() as stack:
                listener = stack.enter_context(_listener(address, port))
                self._epoll.register(listener, select.EPOLLIN)
                stack.pop_all()
        except (OSError, OverflowError) as error:
            told = self._wanted[port]
            where = f"on {address}" if address else "on the node's addresses"
            what = error.strerror if isinstance(error, OSError) else str(error)
            service = f"{told.namespace}/{told.name}"
            return f"Service {service}: its health check port {port} cannot be opened {where}: {what}"
        self._listeners[place] = listener
        self._ports[listener.fileno()] = listener, port
        return ""

    def _unlisten(self, place: Place) -> None:
        listener = self._listeners.pop(place)
        del self._ports[listener.fileno()]
        listener.close()  # which takes it out of epoll too

    def _run(self) -> None:
        while not self._stop.is_set():
            # Only this thread makes and drops clients, so it may look without the lock.
            oldest = next(iter(self._clients.values()), None)
            events = self._epoll.poll(max(0.0, oldest.deadline - time.monotonic()) if oldest else None)
            healthy = self._is_healthy()  # not under the lock: whoever updates may have locks of its own
            with self._lock:
                # What a descriptor stands for may have changed since: then there is nothing to read.
                for descriptor, _ in events:
                    if descriptor in self._clients:
                        self._serve(descriptor, healthy)
                taken_in = [self._accept(d, healthy) for d, _ in events if d in self._ports]
                self._expire()
            if not all(taken_in):
                self._stop.wait(0.1)  # the waiting connection would wake us at once, again and again

    def _is_healthy(self) -> bool:
        try:
            return self._healthy()
        except Exception:
            log.exception("whether the proxy is healthy cannot be told: it counts as not healthy")
            return False

    def _accept(self, descriptor: int, healthy: bool) -> bool:
        """Take in one that waits at a listener; False when the system has no resources for it.

        One at a time: without a free descriptor accept says so even when nobody waits. When there are too
        many connections the oldest goes, as those who ask properly are done in no time.
        """
        listener, port = self._ports[descriptor]
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                return True  # nobody waits, or who did went away
            self._drop_oldest(1)
            return False
        connection.setblocking(False)
        self._drop_oldest(len(self._clients) + 1 - MOST_CONNECTIONS)
        self._clients[connection.fileno()] = _Client(connection, port, time.monotonic() + PATIENCE)
        try:
            self._epoll.register(connection, select.EPOLLIN)
        except OSError:
            self._drop(connection.fileno())
            return False
        self._serve(connection.fileno(), healthy)  # the request often is there already
        return True

    def _serve(self, descriptor: int, healthy: bool) -> None:
        """Read what a client sent, and answer when that is a request. Whoever breaks the rules is dropped."""
        client = self._clients[descriptor]
        try:
            data = client.socket.recv(LONGEST_REQUEST)
            client.received += len(data)
            if not data or client.received > 8 * LONGEST_REQUEST:
                self._drop(descriptor)
            elif not client.answered:
                client.request += data
                self._answer(descriptor, healthy)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(descriptor)

    def _answer(self, descriptor: int, healthy: bool) -> None:
        client = self._clients[descriptor]
        told = self._wanted.get(client.port)
        reply = answer(client.request, told, healthy) if told else b""
        if reply is None:
            return
        # A few hundred bytes always fit into the buffer of a connection that has sent nothing yet.
        if not reply or client.socket.send(reply) < len(reply):
            self._drop(descriptor)
            return
        # Closing with something unread would be a reset, which can overtake the answer: the client ends it.
        client.socket.shutdown(socket.SHUT_WR)
        client.answered = True

    def _expire(self) -> None:
        now = time.monotonic()
        for descriptor, client in list(self._clients.items()):
            if client.deadline > now:
                break
            self._drop(descriptor)

    def _drop_oldest(self, count: int) -> None:
        for descriptor in list(self._clients)[: max(0, count)]:
            self._drop(descriptor)

    def _drop(self, descriptor: int) -> None:
        self._clients.pop(descriptor).socket.close()


def _listener(address: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; "" is all, of both families.

    Raises OSError, and OverflowError when there can be no such port.
    """
    host = address or ("::" if IPV6.exists() else "0.0.0.0")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        )
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if address else 0)
        listener.bind((host, port))
        listener.listen(128)
        stack.pop_all()
    return listener
