"""A node and everybody around it, each in a namespace of its own, with servers that say who they are."""

from __future__ import annotations

import contextlib
import ctypes
import selectors
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cni import wiring
from cni.wiring import Mode, PodAddress, PodLink
from netlink import netns
from netlink.family import Family
from netlink.requests import Route, address_add, link_up, route_replace
from netlink.rtnl import Rtnl
from node import l7_network
from proxy.model import Protocol
from tests.node.world import wait_until
from tests.proxy.plan import OWN, PROXIED_PORT, SLICES, place
from tests.proxy.plan_lines import ENDPOINT_PORT, Case, where

KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
NEIGHBOURS = (
    *((name,) for name in ("pod1", "pod1b", "pod1c", "pod2", "pod2b", "client", "stranger")),
    ("node2", "second2"),
    ("upstream",),
)
"""Who is in a namespace together. Upstream has every address that no place has: what is not served leaks."""
DROPPED_SECONDS, ANSWERED_SECONDS = 0.4, 5.0
"""How long to wait for an answer that must not come, and for one that must."""
BACKLOG = 512
"""Connections that nobody has answered yet: there are as many until the world is complete."""
_libc = ctypes.CDLL(None)
IPV6_RECVPKTINFO = 49  # linux/in6.h


@dataclass(slots=True)
class World:
    """`places`: the namespace of each address; `node`: that of the node."""

    node: str
    places: dict[str, str]
    servers: list[socket.socket]

    def namespace_of(self, address: str) -> str:
        """Return where packets from an address come from."""
        return self.places.get(address, self.node)


def build(make: Callable[[], str], cases: Collection[Case]) -> World:
    """Make the node and its neighbours; each is reached by a routed link, as pods are.

    All of them listen on every port that a case or an endpoint has, so that only rules can refuse.
    """
    node = make()
    netns.run(node, _configure_node)
    homes = {names: make() for names in NEIGHBOURS}
    for number, (names, home) in enumerate(homes.items()):
        netns.run(node, _connect, number, _addresses(names), str(netns.path(home)))
    netns.run(node, _default_routes, f"pw{len(homes) - 1}")
    places = {address: home for names, home in homes.items() for address in _addresses(names)}
    elsewhere = {c.destination for c in cases} - places.keys() - set(_addresses(OWN))
    netns.run(homes["upstream",], own, elsewhere)
    ports = {(c.protocol, c.port) for c in cases}
    ports |= {(p.protocol, p.port) for s in SLICES for p in s.ports if p.protocol in KINDS}
    ports.add((Protocol.TCP, PROXIED_PORT))
    with contextlib.ExitStack() as undo:
        servers = [
            undo.enter_context(server)
            for home in (node, *homes.values())
            for server in netns.run(home, listen, ports)
        ]
        for address in (*places, *elsewhere):
            netns.run(node, wait_until, partial(_is_there, address), f"{address} answers")
        undo.pop_all()
    return World(node, places, servers)


def _addresses(names: Iterable[str]) -> list[str]:
    return [place(name, family) for name in names for family in Family]


def _configure_node() -> None:
    for name, value in (
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        # Every refused packet is to be heard of.
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
    ):
        Path("/proc/sys/net", name).write_text(value)
    own(_addresses(name for name in OWN if name != "loopback"))
    l7_network.ensure(tuple(Family), transparent=False)


def own(addresses: Collection[str]) -> None:
    """Give the calling thread's namespace more addresses."""
    with Rtnl() as rtnl:
        index = socket.if_nametoindex("lo")
        rtnl.commit(
            link_up(index), *(address_add(index, f"{a}/{_family(a).bits}") for a in sorted(addresses))
        )


def _family(address: str) -> Family:
    return Family.V6 if ":" in address else Family.V4


def _connect(number: int, addresses: list[str], path: str) -> None:
    mac = wiring.mac_of
    ends = tuple(PodAddress(f"{a}/{_family(a).bits}", a, _family(a), _family(a).gateway) for a in addresses)
    name = f"pw{number}"
    wiring.attach(PodLink(Mode.ROUTED, "eth0", name, mac(f"host{number}"), mac(name), 1500, ends), path)


def _default_routes(name: str) -> None:
    index = socket.if_nametoindex(name)
    everywhere = {Family.V4: "0.0.0.0/0", Family.V6: "::/0"}
    with Rtnl() as rtnl:
        for family, destination in everywhere.items():
            rtnl.commit(route_replace(Route(destination, place("upstream", family), index, onlink=True)))


def _is_there(address: str) -> bool:
    try:
        socket.create_connection((address, ENDPOINT_PORT), 0.1).close()
    except OSError:
        return False
    return True


def listen(ports: Iterable[tuple[Protocol, int]]) -> list[socket.socket]:
    """Listen on ports at all addresses of the calling thread's namespace, in both families."""
    found = []
    for protocol, port in ports:
        server = socket.socket(socket.AF_INET6, KINDS[protocol])
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", port))
        if protocol is Protocol.TCP:
            server.listen(BACKLOG)
        else:
            server.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
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
    port = server.getsockname()[1]
    with contextlib.suppress(OSError):
        if server.type == socket.SOCK_STREAM:
            connection, peer = server.accept()
            with connection:
                connection.sendall(_words(connection.getsockname()[0], port, peer[0]))
            return
        # A socket for all addresses has to be told which of them to answer from (RFC 3542).
        _, ancillary, _, peer = server.recvmsg(100, 100)
        own = ancillary[0][2][:16]
        info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, own + bytes(4))
        server.sendmsg([_words(socket.inet_ntop(socket.AF_INET6, own), port, peer[0])], [info], 0, peer)


def _words(own: str, port: int, peer: str) -> bytes:
    # An IPv6 socket writes IPv4 addresses as ::ffff:192.0.2.1.
    own, peer = (text.removeprefix("::ffff:") for text in (own, peer))
    return f"{where(own, port)} {peer}".encode()


@contextlib.contextmanager
def _group(number: int) -> Iterator[None]:
    """Have the calling thread, and no other, open sockets as a member of a group."""
    before = _libc.setfsgid(number)
    try:
        yield
    finally:
        _libc.setfsgid(before)


def send(case: Case) -> tuple[str, str]:
    """Send a case's packet from the calling thread's namespace; return who answered and the client it saw.

    The first is "drop" or "reject" when nobody did, or what else happened.
    """
    family = socket.AF_INET if case.family is Family.V4 else socket.AF_INET6
    with _group(case.group), socket.socket(family, KINDS[case.protocol]) as client:
        client.settimeout(DROPPED_SECONDS if "drop" in case.expected else ANSWERED_SECONDS)
        client.bind((case.source, 0))
        try:
            client.connect((case.destination, case.port))
            if case.protocol is Protocol.UDP:
                # The node's own packets: the kernel says at once that a rule took one, and then how.
                with contextlib.suppress(PermissionError):
                    client.send(b"who")
            server, seen = client.recv(100).decode().split()
        except TimeoutError:
            return "drop", ""
        except ConnectionRefusedError:
            return "reject", ""
        except OSError as error:
            return f"error: {error.strerror}", ""
        return server, seen
