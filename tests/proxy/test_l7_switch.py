"""A service goes to the L7 proxy and back under traffic: no connection fails, and open ones stay.

A listener at the addresses of the proxy stands for it.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from cni.settings import Mode
from netlink import netns
from netlink.family import Family
from node import l7_network
from proxy.dataplane import Dataplane, NodeRanges
from proxy.frontends import Frontend, frontends
from proxy.l7 import places
from proxy.l7.policy import Policy, Protocol
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Service, ServicePort
from proxy.model import Protocol as Transport
from proxy.table import Change
from proxy.topology import Place
from tests.node.test_l7_network import PODS, pods
from tests.node.world import wait_until
from tests.proxy.dataplanes import KINDS, Kind
from tests.proxy.plan import proxied

NAME = ObjectName("shop", "web")
CLUSTER = {Family.V4: "10.96.0.1", Family.V6: "fd00:10:96::1"}
ENDPOINT, PROXY = b"endpoint", b"proxied!"
SWITCHES, BETWEEN = 16, 8
IPV6_FREEBIND = 78  # linux/in6.h
RANGES = NodeRanges(pod_cidrs=("10.244.0.0/16", "fd00:10:244::/48"))


@pytest.fixture(scope="module")
def lab(namespaces: Callable[[], str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A node with a client and an endpoint; the endpoint and the proxy say who they are, and repeat words."""
    node, homes = pods(namespaces, Mode.ROUTED)
    netns.run(node, l7_network.ensure, tuple(Family), transparent=False)
    servers = [
        *((netns.run(homes["endpoint"], _listen, a, 8080, f), ENDPOINT) for f, a in PODS["endpoint"].items()),
        *(
            (netns.run(node, _listen, address, places.PORT, family), PROXY)
            for family in Family
            for protocol in Protocol
            for address in (places.address(protocol, family, str(NAME)),)
        ),
    ]
    with _serving(servers):
        yield node, homes


def _listen(address: str, port: int, family: Family) -> socket.socket:
    found = socket.socket(family.af)
    if family is Family.V6:
        found.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # no interface has the proxy's
    found.bind((address, port))
    found.listen(512)
    found.setblocking(False)
    return found


@contextlib.contextmanager
def _serving(servers: list[tuple[socket.socket, bytes]]) -> Iterator[None]:
    """Say a name to whoever connects, and then whatever they say."""
    stop_read, stop_write = socket.socketpair()
    selector = selectors.DefaultSelector()
    selector.register(stop_read, selectors.EVENT_READ)
    for server, name in servers:
        selector.register(server, selectors.EVENT_READ, name)

    def work() -> None:
        while True:
            for key, _ in selector.select():
                if key.fileobj is stop_read:
                    return
                assert isinstance(key.fileobj, socket.socket)
                _serve(selector, key.fileobj, key.data)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop_write.send(b"x")
        thread.join()
        left = [key.fileobj for key in selector.get_map().values()]
        selector.close()
        for one in (*left, stop_write):
            assert isinstance(one, socket.socket)
            one.close()


def _serve(selector: selectors.BaseSelector, ready: socket.socket, name: bytes | None) -> None:
    said = b""
    if name is not None:
        connection, _ = ready.accept()
        connection.sendall(name)
        selector.register(connection, selectors.EVENT_READ)
        return
    with contextlib.suppress(ConnectionError):
        said = ready.recv(100)
        ready.sendall(said)
    if not said:
        selector.unregister(ready)
        ready.close()


class Client:
    """Connects all the time, until it is stopped or fails."""

    def __init__(self, namespace: str, family: Family) -> None:
        self.namespace, self.family = namespace, family
        self.reached: Counter[bytes] = Counter()
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=netns.run, args=(namespace, self._work))

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def open(self) -> tuple[socket.socket, bytes]:
        """Connect once; return the connection, and who has it."""
        found = socket.create_connection((CLUSTER[self.family], 80), 5.0)
        return found, found.recv(len(PROXY))

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                connection, who = self.open()
                connection.close()
            except OSError as error:
                self.failure = error
                return
            self.reached[who] += 1

    def goes_on(self, since: int) -> bool:
        """Whether some more connections were made."""
        assert self.failure is None, self.failure
        return self.reached.total() >= since + BETWEEN


def served(family: Family, policy: Policy | None, affinity: int = 0) -> Frontend:
    """Return the frontend of the service; `policy` None: as if it asked for nothing."""
    ports = (ServicePort("", Transport.TCP, 80),)
    service = Service(NAME, (CLUSTER[family],), ports, affinity_seconds=affinity, policy=policy)
    end = Endpoint(PODS["endpoint"][family], "me")
    piece = EndpointSlice(NAME, NAME, family, (EndpointPort("", Transport.TCP, 8080),), (end,))
    (frontend,) = frontends(service, [piece], Place("me"))
    return proxied(service, frontend)


@pytest.mark.parametrize("affinity", [0, 60])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_connection_fails_while_a_service_goes_to_the_proxy_and_back(
    lab: tuple[str, dict[str, str]], kind: Kind, affinity: int
) -> None:
    node, homes = lab
    policies = (None, Policy(), None, Policy(protocol=Protocol.TCP))

    def switch(planes: dict[Family, Dataplane], number: int) -> None:
        for family, plane in planes.items():
            old, new = (served(family, policies[n % 4], affinity) for n in (number, number + 1))
            plane.apply([Change(old, new)])

    def work() -> None:
        with contextlib.ExitStack() as stack:
            planes = {family: stack.enter_context(kind.opened(family)) for family in Family}
            for family, plane in planes.items():
                stack.callback(plane.remove)
                plane.load([served(family, policies[0], affinity)], RANGES)
            clients = [stack.enter_context(Client(homes["client"], family)) for family in Family]
            held: list[tuple[socket.socket, bytes]] = []
            for number in range(SWITCHES):
                before = [client.reached.total() for client in clients]
                for client in clients:
                    connection, who = netns.run(client.namespace, client.open)
                    held.append((stack.enter_context(connection), who))
                    assert who == (PROXY if policies[number % 4] else ENDPOINT)
                switch(planes, number)
                for client, since in zip(clients, before, strict=True):
                    wait_until(partial(client.goes_on, since), "connections are made")
                assert all(_repeats(connection) for connection, _ in held)
            assert {who for client in clients for who in client.reached} == {ENDPOINT, PROXY}

    netns.run(node, work)


def _repeats(connection: socket.socket) -> bool:
    connection.sendall(b"still there?")
    return connection.recv(100) == b"still there?"
