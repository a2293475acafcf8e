"""sessionAffinity ClientIP on real traffic: who stays, who moves, who is forgotten."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.requests import Route, route_replace
from netlink.rtnl import Rtnl
from proxy.dataplane import NodeRanges
from proxy.frontends import frontends
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.nftables import parts
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import TABLE
from proxy.topology import Place
from tests.node.world import CLUSTER_IP, NODES, PEER, SERVERS, World, build, ended, podwire, wait_until
from tests.proxy.world import answering

THIRD = "10.244.2.12"
SERVICE = """
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  clusterIP: 10.96.0.1
  ports: [{{port: 80}}]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}
---
kind: EndpointSlice
metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{endpoints}]
"""


def service(*servers: str, seconds: int = 300) -> str:
    endpoints = ", ".join(f"{{addresses: [{s}], nodeName: node2}}" for s in servers)
    return SERVICE.format(seconds=seconds, endpoints=endpoints)


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = build(namespaces, tmp_path_factory.mktemp("affinity"))
    found.write("nodes.yaml", NODES)
    found.write("web.yaml", service(*SERVERS))
    listeners = netns.run(found.peer, _listen)
    with ended(found), answering(listeners):
        found.start()
        yield found


def _listen() -> list[socket.socket]:
    return [socket.create_server((address, 8080), backlog=128) for address in SERVERS]


def who(world: World, times: int = 12) -> set[str]:
    """Return who answers a number of connections in a row."""
    return {world.connect() for _ in range(times)}


def settled(world: World, text: str, endpoints: int) -> None:
    """Write the service and wait until the kernel has it."""
    world.write("web.yaml", text)

    def good() -> bool:
        (found,) = world.json("frontends", "shop/web")
        return len(found["endpoints"]) == endpoints and world.json("status")["problems"] == []

    wait_until(good, "the change")


def test_a_client_stays_with_its_endpoint(world: World) -> None:
    assert len(who(world)) == 1


def test_a_client_stays_while_other_endpoints_come_and_go(world: World) -> None:
    (mine,) = who(world)
    (other,) = set(SERVERS) - {mine}
    for servers in ((*SERVERS, THIRD), (mine, THIRD), (mine,), (mine, other)):
        settled(world, service(*servers), len(servers))
        assert who(world) == {mine}, servers


def test_a_client_whose_endpoint_is_gone_moves_at_once_and_stays_there(world: World) -> None:
    (mine,) = who(world)
    (other,) = set(SERVERS) - {mine}
    settled(world, service(other), 1)
    assert who(world) == {other}
    settled(world, service(*SERVERS), 2)
    assert who(world) == {other}, "what remembered the endpoint that was gone is gone too"


def test_a_restart_and_a_kill_forget_nobody(world: World) -> None:
    (mine,) = who(world)
    for how in (world.stop, lambda: kill(world)):
        how()
        world.start()
        assert who(world) == {mine}


def kill(world: World) -> None:
    assert world.daemon
    world.daemon.kill()
    world.daemon.wait()


def test_a_flushed_ruleset_comes_back_whole(world: World) -> None:
    who(world)
    world.run("nft", "flush", "ruleset")
    wait_until(lambda: world.connect() in SERVERS, "the service again")
    assert len(who(world)) == 1


def test_a_client_is_forgotten_after_the_timeout(world: World) -> None:
    settled(world, service(*SERVERS, seconds=1), 2)

    def remembered() -> int:
        text = world.run("nft", "list", "table", "ip", "podwire")
        return text.count("expires")

    world.connect()
    assert remembered() == 1
    wait_until(lambda: not remembered(), "the client forgotten")


def test_a_client_that_finds_the_set_full_is_served_all_the_same(
    namespaces: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MOST_CLIENTS", 1)
    world = build(namespaces, tmp_path)
    name, ports = ObjectName("shop", "web"), (EndpointPort("", Protocol.TCP, 8080),)
    web = Service(name, (CLUSTER_IP,), (ServicePort("", Protocol.TCP, 80),), affinity_seconds=300)
    piece = EndpointSlice(name, name, Family.V4, ports, (Endpoint(SERVERS[0], "node2"),))

    def load() -> None:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        with Nft(Family.V4, TABLE) as nft:
            Dataplane(nft).load(frontends(web, (piece,), Place("node1")), NodeRanges())
        with Rtnl() as rtnl:
            rtnl.commit(route_replace(Route("10.244.2.0/24", gateway=PEER)))

    netns.run(world.node, load)
    with answering(netns.run(world.peer, _listen)):
        assert world.connect() == SERVERS[0], "which is remembered"
        world.pod = world.node
        assert world.connect() == SERVERS[0], "for which there is no room"
        assert "elements" in world.run("nft", "list", "table", "ip", "podwire")


def test_without_affinity_nothing_of_it_is_left(world: World) -> None:
    who(world)
    text = service(*SERVERS).replace("sessionAffinity: ClientIP", "sessionAffinity: None")
    world.write("web.yaml", text)
    wait_until(
        lambda: "affinity_" not in world.run("nft", "list", "table", "ip", "podwire"), "its parts gone"
    )
    assert len(who(world, 40)) == 2


def test_it_is_told(world: World) -> None:
    found = world.json("services", "shop/web")
    assert found["affinity_seconds"] == 300
    status, out, _ = podwire("services", "--socket", str(world.socket), "shop/web")
    assert (status, "session affinity   300 s" in out) == (0, True)
    assert CLUSTER_IP in out
