"""Packets that are on their way through the rules while these change."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.nftables.objects import Data, Goto
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddTable,
    DeleteChain,
    DeleteElements,
    Operation,
)
from netlink.requests import Route, route_replace
from netlink.rtnl import Rtnl
from proxy.dataplane import NOTHING
from proxy.frontends import Frontend, frontends
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.nftables import parts
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import COMMON_ENDPOINTS, SERVICES, SHAPES, TABLE
from proxy.table import Change
from proxy.topology import Place
from tests.proxy.dataplanes import Recorded
from tests.proxy.world import own

NAME = ObjectName("shop", "web")
CLUSTER_IP = "10.96.0.1"
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def served(addresses: Sequence[str], affinity: int = 0) -> Frontend:
    ports = (ServicePort("", Protocol.TCP, 80),)
    service = Service(NAME, (CLUSTER_IP,), ports, affinity_seconds=affinity)
    found = EndpointSlice(
        NAME,
        NAME,
        Family.V4,
        (EndpointPort("", Protocol.TCP, 8080),),
        tuple(Endpoint(a, "me", True, True, False) for a in addresses),
    )
    (frontend,) = frontends(service, [found], Place("me", ""))
    return frontend


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A namespace with all endpoints, and a way to cluster addresses that ends there."""
    found = namespaces()
    netns.run(found, own, ADDRESSES)

    def route() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(route_replace(Route("10.96.0.0/16", oif=socket.if_nametoindex("lo"))))

    netns.run(found, route)
    return found


def test_who_finds_a_number_of_endpoints_and_then_fewer_of_them_is_served(node: str) -> None:
    """As a change between the two look-ups of a packet makes it; without endpoints it is refused."""

    def run() -> Counter[str]:
        servers = [socket.create_server((address, 8080), backlog=128) for address in ADDRESSES]
        with Nft(Family.V4, TABLE) as nft:
            Dataplane(nft).load([served(ADDRESSES)], NOTHING)
            endpoints = sorted(nft.elements(SERVICES.endpoints).items())
            nft.commit([DeleteElements(SERVICES.endpoints, endpoints[1:])])
            fewer = _taken(servers, 40)
            nft.commit([DeleteElements(SERVICES.endpoints, endpoints[:1])])
            for _ in range(10):
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((CLUSTER_IP, 80), 1)
        for server in servers:
            server.close()
        return fewer

    assert netns.run(node, run) == {ADDRESSES[0]: 40}


def _taken(servers: Sequence[socket.socket], number: int) -> Counter[str]:
    """Connect so many times; count whose queue the connections are in."""
    for _ in range(number):
        socket.create_connection((CLUSTER_IP, 80), 1).close()
    found: Counter[str] = Counter()
    for server in servers:
        server.setblocking(False)
        try:
            while True:
                server.accept()[0].close()
                found[server.getsockname()[0]] += 1
        except BlockingIOError:
            pass
    return found


def _chains(batch: Sequence[Operation], kind: type[AddElements | DeleteElements]) -> set[str]:
    """The chains that elements lead to which this batch adds or deletes."""
    elements = [(op.map, key, data) for op in batch if isinstance(op, kind) for key, data in op.elements]
    shapes: dict[Data, Data] = {key: data for which, key, data in elements if which == SHAPES}
    own = (parts.CHOICE, SHAPES.name)
    led_to = [shapes.get(data, data) for which, _, data in elements if not which.name.startswith(own)]
    return {data.chain for data in led_to if isinstance(data, Goto)}


MANY = tuple(f"10.0.1.{n}" for n in range(1, COMMON_ENDPOINTS + 2))
SHAPES_OF_IT = (
    served(ADDRESSES),
    served(MANY),
    served(ADDRESSES, 60),
    served(ADDRESSES[:2], 60),
    served(MANY[1:]),
)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_led_to_is_there_before_and_goes_after(restarted: bool) -> None:
    """A packet sees the rules of when it came, and the elements of when it looks: never both in one batch."""
    nft = Recorded(Family.V4)
    dataplane = Dataplane(nft)
    before = served(())
    dataplane.load([before], NOTHING)
    for after in (*SHAPES_OF_IT, before):
        if restarted:
            dataplane = Dataplane(nft)
            assert dataplane.load([after], NOTHING)
        else:
            dataplane.apply([Change(before, after)])
            dataplane.tidy()
        before = after
    changes = [batch for batch in nft.batches if not any(isinstance(op, AddTable) for op in batch)]
    assert any(isinstance(op, DeleteChain) for batch in changes for op in batch)
    for batch in changes:
        choices = {op.map.name for op in batch if isinstance(op, AddElements | DeleteElements)}
        made = {op.chain.name for op in batch if isinstance(op, AddChain)}
        gone = {op.name for op in batch if isinstance(op, DeleteChain)}
        assert not made & _chains(batch, AddElements), choices
        assert not gone & _chains(batch, DeleteElements), choices
