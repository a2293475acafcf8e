"""The IPVS dataplane on the kernel: what connections meet while endpoints come and go, and what is whose.

Needs a kernel with IPVS; the packets that it must serve are in test_packets_kernel.py.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from netlink import netns
from netlink.delivery import Delivery
from netlink.family import Family
from netlink.ipvs import Command, Ipvs, Real, Request, Schedule, Virtual
from netlink.nftables.batch import Nft
from netlink.requests import address_delete
from netlink.rtnl import Rtnl
from node import dataplanes
from node.dataplanes import IPVS_SYSCTLS
from proxy.dataplane import NOTHING
from proxy.frontends import Frontend, frontends
from proxy.ipvs.dataplane import Dataplane
from proxy.ipvs.drain import LOOK_SECONDS, MOST_SECONDS
from proxy.ipvs.places import DEVICE, MARKED, TABLE
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.table import Change
from proxy.topology import Place
from tests.proxy.dataplanes import needs_ipvs
from tests.proxy.world import own

NAME = ObjectName("shop", "web")
CLUSTER_IP, EXTERNAL = "10.96.0.1", "198.18.0.1"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
PROTOCOLS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
V4 = Family.V4


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def served(
    addresses: Sequence[str], protocol: Protocol = Protocol.TCP, *, affinity: int = 0
) -> tuple[Frontend, ...]:
    """Return the frontends of a service with a cluster and an external address."""
    ports = (ServicePort("", protocol, 80),)
    service = Service(NAME, (CLUSTER_IP,), ports, external_ips=(EXTERNAL,), affinity_seconds=affinity)
    endpoints = tuple(Endpoint(a, "me", True, True, False) for a in addresses)
    found = EndpointSlice(NAME, NAME, V4, (EndpointPort("", protocol, 8080),), endpoints)
    return frontends(service, [found], Place("me", ""))


def changes(old: Sequence[Frontend], new: Sequence[Frontend]) -> list[Change]:
    before, after = {f.key: f for f in old}, {f.key: f for f in new}
    return [Change(before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)]


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A namespace with all endpoints, and a way to service addresses."""
    needs_ipvs()
    found = namespaces()

    def make() -> None:
        own((*ADDRESSES, "192.0.2.1"))
        for name in IPVS_SYSCTLS:
            Path("/proc/sys/net/ipv4/vs", name).write_text("1")

    netns.run(found, make)
    return found


@contextlib.contextmanager
def opened(clock: Callable[[], float]) -> Iterator[tuple[Dataplane, Ipvs]]:
    with Nft(V4, TABLE) as nft, Ipvs() as ipvs, Rtnl() as rtnl:
        yield Dataplane(nft, ipvs, Delivery(rtnl, V4, DEVICE, MARKED), clock=clock), ipvs


@contextlib.contextmanager
def listening(protocol: Protocol = Protocol.TCP) -> Iterator[dict[str, socket.socket]]:
    """Listen at the endpoints."""
    with contextlib.ExitStack() as stack:
        found = {}
        for address in ADDRESSES:
            server = stack.enter_context(socket.socket(socket.AF_INET, PROTOCOLS[protocol]))
            server.bind((address, 8080))
            server.settimeout(5)
            if protocol is Protocol.TCP:
                server.listen(64)
            found[address] = server
        yield found


def weights(ipvs: Ipvs, virtual: Virtual) -> dict[str, int]:
    return {real.address: load.weight for real, load in ipvs.reals(virtual).items()}


def by_mark(ipvs: Ipvs) -> Virtual:
    (found,) = (v for v in ipvs.servers() if v.mark)
    return found


def connect(to: str = CLUSTER_IP) -> socket.socket:
    return socket.create_connection((to, 80), 5)


AT_CLUSTER = Virtual(V4, socket.IPPROTO_TCP, CLUSTER_IP, 80)


@pytest.mark.parametrize("to", [CLUSTER_IP, EXTERNAL])
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_a_connection_outlives_its_endpoints_removal_and_the_endpoint_its_connection(
    node: str, to: str, restarted: bool
) -> None:
    clock = Clock()

    def run() -> None:
        both, one = served(ADDRESSES), served(ADDRESSES[1:])
        with opened(clock) as (dataplane, ipvs), opened(clock) as (next_one, _), listening() as servers:
            _by_default()
            dataplane.load(both, NOTHING)
            clients = [connect(to) for _ in range(2)]  # in turn: one each
            accepted, _ = servers[ADDRESSES[0]].accept()
            accepted.settimeout(5)
            dataplane.apply(changes(both, one))
            virtual = AT_CLUSTER if to == CLUSTER_IP else by_mark(ipvs)
            assert weights(ipvs, virtual) == {ADDRESSES[0]: 0, ADDRESSES[1]: 1}
            if restarted:
                dataplane = next_one
                assert dataplane.load(one, NOTHING)
            clock.now += LOOK_SECONDS
            dataplane.tidy()
            assert ADDRESSES[0] in weights(ipvs, virtual)
            for client in clients:
                client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            with contextlib.ExitStack() as stack:
                for _ in range(4):  # none comes to it any more
                    stack.enter_context(connect(to))
                servers[ADDRESSES[0]].settimeout(0.2)
                with pytest.raises(TimeoutError):
                    servers[ADDRESSES[0]].accept()
            accepted.close()
            for client in clients:
                client.close()
            clock.now += MOST_SECONDS
            dataplane.tidy()
            assert weights(ipvs, virtual) == {ADDRESSES[1]: 1}

    netns.run(node, run)


def _by_default() -> None:
    """Have the node's own packets leave by loopback, whatever they are for."""
    from netlink.requests import Route, route_replace

    with Rtnl() as rtnl:
        rtnl.commit(route_replace(Route("198.18.0.0/16", oif=socket.if_nametoindex("lo"))))


def test_an_endpoint_without_connections_goes_at_the_next_look(node: str) -> None:
    clock = Clock()

    def run() -> None:
        both, one = served(ADDRESSES), served(ADDRESSES[1:])
        with opened(clock) as (dataplane, ipvs):
            dataplane.load(both, NOTHING)
            dataplane.apply(changes(both, one))
            assert weights(ipvs, AT_CLUSTER) == {ADDRESSES[0]: 0, ADDRESSES[1]: 1}
            clock.now += LOOK_SECONDS
            dataplane.tidy()
            assert weights(ipvs, AT_CLUSTER) == {ADDRESSES[1]: 1}

    netns.run(node, run)


def test_an_endpoint_that_comes_back_gets_connections_again(node: str) -> None:
    clock = Clock()

    def run() -> None:
        both, one = served(ADDRESSES), served(ADDRESSES[1:])
        with opened(clock) as (dataplane, ipvs), listening() as servers:
            dataplane.load(both, NOTHING)
            with connect(), connect():
                servers[ADDRESSES[0]].accept()[0].close()
                clock.now += LOOK_SECONDS
                dataplane.apply(changes(both, one))
                assert weights(ipvs, AT_CLUSTER)[ADDRESSES[0]] == 0
                dataplane.apply(changes(one, both))
                assert weights(ipvs, AT_CLUSTER) == dict.fromkeys(ADDRESSES, 1)
            for _ in range(2):
                connect().close()
            servers[ADDRESSES[0]].accept()[0].close()

    netns.run(node, run)


def test_connections_to_a_service_that_is_gone_go_on_and_new_ones_are_refused(node: str) -> None:
    clock = Clock()

    def run() -> None:
        both = served(ADDRESSES)
        with opened(clock) as (dataplane, ipvs), listening() as servers:
            dataplane.load(both, NOTHING)
            with connect() as first, connect() as second:  # in turn: one each
                accepted, _ = servers[ADDRESSES[0]].accept()
                accepted.settimeout(5)
                clock.now += LOOK_SECONDS
                dataplane.apply(changes(both, ()))
                first.sendall(b"x")
                second.sendall(b"x")
                assert accepted.recv(1) == b"x"
                with pytest.raises(ConnectionRefusedError):
                    connect()
                accepted.close()
            clock.now += MOST_SECONDS
            dataplane.tidy()
            assert not ipvs.servers()
            with Rtnl() as rtnl:
                assert not Delivery(rtnl, V4, DEVICE, MARKED).addresses()

    netns.run(node, run)


def test_udp_endpoints_go_at_once_and_who_goes_on_sending_gets_another(node: str) -> None:
    """Sent on by the same socket, after its entry was forgotten as the daemon does."""
    from netlink.conntrack import Backend, Conntrack, Destination

    def run() -> None:
        both, one = (served(a, Protocol.UDP) for a in (ADDRESSES, ADDRESSES[1:]))
        with opened(Clock()) as (dataplane, ipvs), listening(Protocol.UDP) as servers:
            dataplane.load(both, NOTHING)
            stack = contextlib.ExitStack()
            clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(2)]
            for client in clients:
                client.connect((CLUSTER_IP, 80))
                client.send(b"x")
            for server in servers.values():
                server.recv(1)
            dataplane.apply(changes(both, one))
            virtual = Virtual(V4, socket.IPPROTO_UDP, CLUSTER_IP, 80)
            assert weights(ipvs, virtual) == {ADDRESSES[1]: 1}
            with Conntrack() as conntrack:
                serving = frozenset({Backend(ADDRESSES[1], 8080)})
                conntrack.delete_stale({Destination(17, CLUSTER_IP, 80): serving})
            for client in clients:
                client.send(b"y")
                assert servers[ADDRESSES[1]].recv(1) == b"y"
            stack.close()

    netns.run(node, run)


def test_clients_with_affinity_leave_an_endpoint_that_is_on_its_way_out(node: str) -> None:
    def run() -> None:
        both = served(ADDRESSES, affinity=600)
        with opened(Clock()) as (dataplane, ipvs), listening() as servers:
            dataplane.load(both, NOTHING)
            with connect() as first:
                counts = {a: v.active + v.inactive for (a, _), v in ipvs.reals(AT_CLUSTER).items()}
                (chosen,) = (a for a, count in counts.items() if count)
                left = tuple(a for a in ADDRESSES if a != chosen)
                dataplane.apply(changes(both, served(left, affinity=600)))
                assert weights(ipvs, AT_CLUSTER)[chosen] == 0
                for _ in range(3):
                    connect().close()
                    servers[left[0]].accept()[0].close()
                first.sendall(b"x")

    netns.run(node, run)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_the_node_itself_is_refused_at_once(node: str, protocol: Protocol) -> None:
    """It speaks from the cluster address, as that is its own: the refusal is from there, and for there."""

    def run() -> None:
        with opened(Clock()) as (dataplane, _):
            dataplane.load(served((), protocol), NOTHING)
            for port in (80, 81):
                with socket.socket(type=PROTOCOLS[protocol]) as client, pytest.raises(ConnectionRefusedError):
                    client.settimeout(5)
                    client.connect((CLUSTER_IP, port))
                    with contextlib.suppress(PermissionError):  # the kernel says at once that a rule took it
                        client.send(b"x")
                    client.recv(1)

    netns.run(node, run)


def test_what_others_have_stays_and_what_is_missing_is_noticed(node: str) -> None:
    others = [Virtual(V4, socket.IPPROTO_TCP, "192.0.2.1", 80), Virtual(V4, mark=7)]

    def run() -> None:
        with opened(Clock()) as (dataplane, ipvs), Rtnl() as rtnl:
            ipvs.commit([Request(Command.NEW_SERVICE, v, Schedule("rr")) for v in others])
            dataplane.load(served(ADDRESSES), NOTHING)
            assert dataplane.intact()
            ipvs.commit([Request(Command.DEL_SERVICE, AT_CLUSTER)])
            assert not dataplane.intact()
            assert dataplane.load(served(ADDRESSES), NOTHING)
            assert dataplane.intact()
            rtnl.commit(address_delete(socket.if_nametoindex(DEVICE), f"{CLUSTER_IP}/32"))
            assert not dataplane.intact()
            assert dataplane.load(served(ADDRESSES), NOTHING)
            with connect_refused():
                pass
            dataplane.remove()
            assert set(ipvs.servers()) == set(others)
            assert rtnl.link(DEVICE) is None
            dataplane.remove()

    netns.run(node, run)


@contextlib.contextmanager
def connect_refused() -> Iterator[None]:
    """Nobody listens at the endpoints: what says no is one of them."""
    with pytest.raises(ConnectionRefusedError):
        connect()
    yield


def test_a_virtual_server_that_was_there_becomes_ours(node: str) -> None:
    """As kube-proxy leaves them: the same address and port, another scheduler, an endpoint that is gone."""
    gone = Real("10.0.0.9", 8080)

    def run() -> None:
        with opened(Clock()) as (dataplane, ipvs):
            ipvs.commit([Request(Command.NEW_SERVICE, AT_CLUSTER, Schedule("wlc", 60))])
            ipvs.commit([Request(Command.NEW_DEST, AT_CLUSTER, real=gone)])
            dataplane.load(served(ADDRESSES), NOTHING)
            assert ipvs.servers()[AT_CLUSTER] == Schedule("rr")
            assert weights(ipvs, AT_CLUSTER) == {gone.address: 0, **dict.fromkeys(ADDRESSES, 1)}

    netns.run(node, run)


def test_opening_it_sets_the_sysctls_and_removing_it_leaves_no_trace(namespaces: Callable[[], str]) -> None:
    needs_ipvs()

    def run() -> None:
        with dataplanes.opened(dataplanes.IPVS, V4, scheduler="lc") as dataplane:
            dataplane.load(served(ADDRESSES), NOTHING)
        for name in IPVS_SYSCTLS:
            assert Path("/proc/sys/net/ipv4/vs", name).read_text() == "1\n"
        with Ipvs() as ipvs:
            assert set(ipvs.servers().values()) == {Schedule("lc")}
        dataplanes.remove(dataplanes.IPVS)
        with Ipvs() as ipvs:
            assert not ipvs.servers()

    netns.run(namespaces(), run)
