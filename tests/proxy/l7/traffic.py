"""A pod, its node with HAProxy, and endpoints that say what has come to them.

    pod 10.9.0.2 ── veth ── node 10.9.0.1: HAProxy; endpoints at 10.8.0.x and fd08::x, on lo

What is addressed to 10.96.0.0/16 (HTTP) and 10.97.0.0/16 (TCP) goes to HAProxy; so does fd96::/64 for the
service "six" and fd97::/64 for "six-tcp".
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netlink import netns
from netlink.family import Family, with_port
from proxy.l7.engine import Engine
from proxy.l7.model import Backend, Route, Server
from proxy.l7.places import RANGES, address
from proxy.l7.policy import Policy, Protocol

PORT = 8080
PLAIN = Policy()
SIX = {Protocol.HTTP: "test/six", Protocol.TCP: "test/six-tcp"}
RULES = "\n".join(
    f"table {kind} l7test {{\n"
    + "\n".join(
        f"chain {hook} {{ type nat hook {hook} priority -100;\n"
        + "\n".join(
            f"{kind} daddr {net} tcp dport 1-65535 dnat to "
            + with_port(address(protocol, family, SIX[protocol]), 10000)
            for protocol, net in zip(Protocol, nets, strict=True)
        )
        + "\n}"
        for hook in ("prerouting", "output")
    )
    + "\n}"
    for kind, family, nets in (
        ("ip", Family.V4, ("10.96.0.0/16", "10.97.0.0/16")),
        ("ip6", Family.V6, ("fd96::/64", "fd97::/64")),
    )
)
SETUP = """
ip -n {node} link set lo up
ip -n {pod} link set lo up
ip -n {pod} link add eth0 type veth peer name pod netns {node}
ip -n {pod} addr add 10.9.0.2/24 dev eth0
ip -n {pod} addr add fd09::2/64 dev eth0 nodad
ip -n {node} addr add 10.9.0.1/24 dev pod
ip -n {node} addr add fd09::1/64 dev pod nodad
ip -n {pod} link set eth0 up
ip -n {node} link set pod up
ip -n {pod} route add default via 10.9.0.1
ip -n {pod} route add default via fd09::1
ip -n {node} route add default via 10.9.0.2
ip -n {node} route add default via fd09::2
ip -n {node} route add unreachable 10.8.66.0/24
ip -n {node} route add local 10.8.0.0/24 dev lo
ip -n {node} addr add fd08::1/128 dev lo nodad
ip -n {node} addr add fd08::2/128 dev lo nodad
"""


def endpoint(number: int, family: Family = Family.V4) -> Server:
    """Return an endpoint of the test."""
    return Server(f"10.8.0.{number}" if family is Family.V4 else f"fd08::{number}", PORT)


def backend(
    name: str, number: int, servers: tuple[Server, ...], policy: Policy = PLAIN, family: Family = Family.V4
) -> Backend:
    """Return a service with a cluster address of that number, at port 80."""
    return Backend(name, f"test/{name}", family, policy, (route(number, policy, family),), servers)


def route(number: int, policy: Policy = PLAIN, family: Family = Family.V4) -> Route:
    """Return the cluster address of that number."""
    network = 96 if policy.protocol is Protocol.HTTP else 97
    address = f"10.{network}.{number // 256}.{number % 256}"
    return Route(family, address if family is Family.V4 else f"fd{network}::{number:x}", 80)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets; `seen` is what the endpoint says of the request, if it is one's."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def endpoint(self) -> str:
        return str(self.seen["endpoint"])


class Http(asyncio.Protocol):
    """An endpoint: answers every request with what it got; `/status/N` with that status."""

    def __init__(self, endpoints: Endpoints, name: str) -> None:
        self._endpoints, self._name = endpoints, name
        self._buffer = b""
        self._preface = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._client = transport.get_extra_info("peername")[0]
        self._sni = self._endpoints.names.pop(transport.get_extra_info("ssl_object"), "")
        self._endpoints.open[self._name] = self._endpoints.open.get(self._name, 0) + 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._endpoints.open[self._name] -= 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._preface and self._buffer.startswith(b"PROXY "):
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            self._preface = line.decode()
        if not self._preface and self._buffer.startswith(b"\r\n\r\n\0\r\nQUIT\n"):
            size = int.from_bytes(self._buffer[14:16])
            rest, self._buffer = self._buffer[16 : 16 + size], self._buffer[16 + size :]
            self._preface = f"v2 {socket.inet_ntoa(rest[:4])} {socket.inet_ntoa(rest[4:8])}"
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = [line.split(": ", 1) for line in lines[1:]]
            size = next((int(v) for k, v in headers if k.lower() == "content-length"), 0)
            if len(rest) < size:
                return
            self._buffer = rest[size:]
            self._answer(lines[0], headers)

    def _answer(self, line: str, headers: list[list[str]]) -> None:
        method, path, _ = line.split(" ")
        self._endpoints.requests.append((self._name, method, path))
        status = self._endpoints.statuses.get(self._name, 200)
        if path.startswith("/status/"):
            status = int(path.removeprefix("/status/"))
        if status == 0:
            self._transport.abort()
            return
        said = {
            "endpoint": self._name,
            "method": method,
            "path": path,
            "headers": headers,
            "client": self._client,
            "preface": self._preface,
            "sni": self._sni,
        }
        body = json.dumps(said).encode()
        self._transport.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


class Echo(asyncio.Protocol):
    """An endpoint of TCP: says its name, then what it hears."""

    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._name.encode() + b"\n")

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


@dataclass
class Endpoints:
    """All endpoints, in one thread. `statuses`: what one answers instead of 200; 0: it hangs up."""

    node: str
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    open: dict[str, int] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._servers: dict[Server, asyncio.Server] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def serve(self, server: Server, context: ssl.SSLContext | None = None) -> str:
        """Let an endpoint of HTTP be; return its name."""
        self._listen(server, lambda: Http(self, server.name), context)
        return server.name

    def echo(self, server: Server) -> str:
        """Let an endpoint of TCP be; return its name."""
        self._listen(server, lambda: Echo(server.name), None)
        return server.name

    def _listen(
        self, server: Server, factory: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None
    ) -> None:
        if server in self._servers:
            return
        listening = netns.run(self.node, _listening, server)
        work = self._loop.create_server(factory, sock=listening, ssl=context)
        self._servers[server] = self.call(work)

    def close(self, server: Server) -> None:
        """Let an endpoint refuse connections."""
        self._loop.call_soon_threadsafe(self._servers.pop(server).close)

    def stop(self) -> None:
        async def end() -> None:
            for server in self._servers.values():
                server.close()
            for transport in [*getattr(self._loop, "_transports", {}).values()]:
                transport.abort()
            await asyncio.sleep(0)

        self.call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _listening(server: Server) -> socket.socket:
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((server.address, server.port))
        found.listen(512)
    except BaseException:
        found.close()
        raise
    return found


@dataclass
class World:
    """The pod, the node and the endpoints."""

    pod: str
    node: str
    endpoints: Endpoints

    def connect(self, to: Route, timeout: float = 10.0) -> socket.socket:
        """Return a connection from the pod."""
        return netns.run(self.pod, socket.create_connection, (to.address, to.port), timeout)

    @contextlib.contextmanager
    def client(self, to: Route) -> Iterator[Client]:
        """A connection of HTTP from the pod, for the length of a block."""
        with contextlib.closing(Client(self, to)) as client:
            yield client

    def get(self, to: Route, path: str = "/", **options: Any) -> Answer:
        """Send one request, on a connection of its own."""
        with self.client(to) as client:
            return client.get(path, **options)


class Client:
    """A connection of HTTP from the pod."""

    def __init__(self, world: World, to: Route) -> None:
        self._connection = http.client.HTTPConnection(to.address, to.port)
        self._connection.sock = world.connect(to)
        self._connection.auto_open = 0

    def get(
        self,
        path: str = "/",
        method: str = "GET",
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        self._connection.request(method, path, body, headers or {})
        with self._connection.getresponse() as response:
            found = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, found, response.read())

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def world(make: Callable[[], str]) -> Iterator[World]:
    """Make pod, node and endpoints, for the length of a block."""
    pod, node = make(), make()
    for line in SETUP.format(pod=pod, node=node).strip().splitlines():
        subprocess.run(line.split(), check=True)
    for ranges in RANGES.values():
        for each in ranges.values():
            subprocess.run(("ip", "-n", node, "route", "add", "local", each, "dev", "lo"), check=True)
    for name, value in (("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")):
        netns.run(node, Path("/proc/sys/net", name).write_text, value)
    subprocess.run(("ip", "netns", "exec", node, "nft", "-f", "-"), input=RULES.encode(), check=True)
    found = World(pod, node, Endpoints(node))
    try:
        yield found
    finally:
        found.endpoints.stop()


def bring(engine: Engine, at: World, *backends: Backend) -> frozenset[str]:
    """Have the node's HAProxy serve these."""
    return netns.run(at.node, engine.bring, {b.name: b for b in backends})
