"""A node and everybody around it, each in a namespace of its own, with servers that say who they are."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cni import wiring
from cni.wiring import Mode, PodAddress, PodLink
from netlink import netns
from netlink.family import Family
from netlink.requests import Route, address_add, link_up, route_replace
from netlink.rtnl import Rtnl
from proxy.model import Protocol
from tests.proxy.plan import CLIENT, HOME, NODE1, NODE1_ALIAS, POD1C

NOBODY = "10.96.0.2"
"""A cluster address that somebody on the default route has too: what is not served leaks out to there."""
OTHERS = (*(a for a in HOME if a != NODE1), POD1C, CLIENT, NOBODY)
PORTS = {Protocol.TCP: (80, 8080, 9090, 5354), Protocol.UDP: (80, 5353)}


@dataclass(slots=True)
class World:
    """`places`: the namespace of each address; `node`: that of the node."""

    node: str
    places: dict[str, str]
    servers: list[socket.socket]

    def namespace_of(self, address: str) -> str:
        """Return where packets from an address come from."""
        return self.places.get(address, self.node)


def build(make: Callable[[], str]) -> World:
    """Make the node and its neighbours; each is reached by a routed link, as pods are."""
    node = make()
    places = {address: make() for address in OTHERS}
    netns.run(node, _configure_node)
    for number, (address, name) in enumerate(places.items()):
        netns.run(node, _connect, number, address, str(netns.path(name)))
    netns.run(node, _default_route, f"pw{list(places).index(NOBODY)}")
    world = World(node, places, [])
    for address, name in places.items():
        world.servers += netns.run(name, listen, address)
    return world


def _configure_node() -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for address in (NODE1, NODE1_ALIAS):
        _own(address)


def _own(address: str) -> None:
    with Rtnl() as rtnl:
        index = socket.if_nametoindex("lo")
        rtnl.commit(link_up(index), address_add(index, f"{address}/32"))


def _connect(number: int, address: str, path: str) -> None:
    mac = wiring.mac_of
    ends = (PodAddress(f"{address}/32", address, Family.V4, Family.V4.gateway),)
    link = PodLink(Mode.ROUTED, "eth0", f"pw{number}", mac(f"host{number}"), mac(address), 1500, ends)
    wiring.attach(link, path)


def _default_route(name: str) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(route_replace(Route("0.0.0.0/0", oif=socket.if_nametoindex(name))))


def listen(address: str) -> list[socket.socket]:
    """Open the servers of an address, in the calling thread's namespace."""
    found = []
    for protocol, ports in PORTS.items():
        for port in ports:
            kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
            server = socket.socket(socket.AF_INET, kind)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, port))
            if protocol is Protocol.TCP:
                server.listen(64)
            server.setblocking(False)
            found.append(server)
    return found


@contextlib.contextmanager
def answering(servers: list[socket.socket]) -> Iterator[None]:
    """Answer everybody with "own address:port client address"."""
    stop_read, stop_write = socket.socketpair()
    selector = selectors.DefaultSelector()
    for server in (*servers, stop_read):
        selector.register(server, selectors.EVENT_READ)

    def work() -> None:
        while True:
            for key, _ in selector.select():
                if key.fileobj is stop_read:
                    return
                assert isinstance(key.fileobj, socket.socket)
                _answer(key.fileobj)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop_write.send(b"x")
        thread.join()
        selector.close()
        for one in (*servers, stop_read, stop_write):
            one.close()


def _answer(server: socket.socket) -> None:
    host, port = server.getsockname()
    with contextlib.suppress(OSError):
        if server.type == socket.SOCK_STREAM:
            connection, peer = server.accept()
            with connection:
                connection.sendall(f"{host}:{port} {peer[0]}".encode())
        else:
            _, peer = server.recvfrom(100)
            server.sendto(f"{host}:{port} {peer[0]}".encode(), peer)


def send(protocol: Protocol, source: str, destination: str, port: int) -> tuple[str, str]:
    """Send a packet from the calling thread's namespace; return who answered and the client it saw.

    The first is "drop" or "reject" when nobody did.
    """
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as client:
        client.settimeout(0.4)
        client.bind((source, 0))
        try:
            client.connect((destination, port))
            client.send(b"who")
            server, seen = client.recv(100).decode().split()
        except TimeoutError:
            return "drop", ""
        except (ConnectionRefusedError, ConnectionResetError, OSError):
            return "reject", ""
        return server, seen
