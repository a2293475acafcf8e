"""UDP services: what a client that keeps its port meets when endpoints change, and when they do not."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from netlink import netns
from netlink.conntrack import Conntrack
from netlink.family import Family
from tests.node.world import NODE, NODES, PEER, POD, SERVERS, World, build, ended, service, wait_until

PORT, NODE_PORT = 80, 30053
NODE_PORT_SERVICE = service().replace("{port: 80}", "{port: 80, protocol: UDP, nodePort: 30053}")


def udp(text: str) -> str:
    return text.replace("{port: 80}", "{port: 80, protocol: UDP}").replace(
        "{port: 8080}", "{port: 8080, protocol: UDP}"
    )


@dataclass(slots=True)
class Scene:
    """A world, the servers' sockets by address, and a client in the pod that keeps its port."""

    world: World
    servers: dict[str, socket.socket]
    client: socket.socket

    def reaches(self, address: str, port: int = PORT, client: socket.socket | None = None) -> str:
        """Send a datagram; return the address of the server that got it, or nothing."""
        some = client or self.client
        with contextlib.suppress(ConnectionRefusedError):  # told of an earlier one
            some.sendto(b"hello", (address, port))
        ready, _, _ = select.select(self.servers.values(), [], [], 0.3)
        for server in ready:
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)  # so that the entry is of an answered flow, as in life
        return ready[0].getsockname()[0] if ready else ""

    def flows(self, port: int = PORT) -> set[tuple[str, str]]:
        """Return (addressed, sent to) of the node's entries for a port."""

        def work() -> set[tuple[str, str]]:
            with Conntrack() as entries:
                found = entries.flows(Family.V4, socket.IPPROTO_UDP, port)
                return {(f.original.destination, f.reply.source) for f in found}

        return netns.run(self.world.node, work)


@pytest.fixture
def scene(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    world = build(namespaces, tmp_path_factory.mktemp("udp"))
    world.write("nodes.yaml", NODES)
    world.write("web.yaml", udp(service()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended(world))
        world.start()
        servers = {}
        for address in SERVERS:
            server = netns.run(world.peer, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
            stack.enter_context(contextlib.closing(server))
            server.bind((address, 8080))
            servers[address] = server
        client = netns.run(world.pod, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        stack.enter_context(contextlib.closing(client))
        client.bind((POD, 4000))
        yield Scene(world, servers, client)


CLUSTER_IP = "10.96.0.1"


def test_a_client_that_keeps_its_port_reaches_the_new_endpoint(scene: Scene) -> None:
    """kubernetes#139628"""
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    scene.world.write("web.yaml", udp(service(server=SERVERS[1])))
    wait_until(lambda: scene.reaches(CLUSTER_IP) == SERVERS[1], "the new endpoint")


def test_a_service_without_endpoints_for_a_while_is_no_black_hole(scene: Scene) -> None:
    """kubernetes#139628: 13 h of UDP black hole; an absent service is an empty set."""
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    scene.world.write("web.yaml", udp(service()).rpartition("endpoints:")[0] + "endpoints: []")
    wait_until(lambda: not scene.flows(), "the entry gone with the last endpoint")
    assert scene.reaches(CLUSTER_IP) == ""
    scene.world.write("web.yaml", udp(service(server=SERVERS[1])))
    wait_until(lambda: scene.reaches(CLUSTER_IP) == SERVERS[1], "the endpoint that came")


def test_entries_of_a_deleted_service_go_and_those_of_others_stay(scene: Scene) -> None:
    scene.world.write("more.yaml", udp(service("more", "10.96.0.2", SERVERS[1])))
    wait_until(lambda: scene.reaches("10.96.0.2") == SERVERS[1], "the second service")
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    (scene.world.manifests / "web.yaml").unlink()
    wait_until(lambda: scene.flows() == {("10.96.0.2", SERVERS[1])}, "only the other's entry")


def test_node_port_entries_follow_too(scene: Scene) -> None:
    scene.world.write("web.yaml", udp(NODE_PORT_SERVICE))
    wait_until(lambda: scene.reaches(NODE, NODE_PORT) == SERVERS[0], "the node port")
    text = NODE_PORT_SERVICE.replace(SERVERS[0], SERVERS[1])
    scene.world.write("web.yaml", udp(text))
    wait_until(lambda: scene.reaches(NODE, NODE_PORT) == SERVERS[1], "the node port's new endpoint")


def test_a_flow_stays_while_its_endpoint_serves_though_new_ones_go_elsewhere(scene: Scene) -> None:
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    draining = "nodeName: node2, conditions: {ready: false, serving: true, terminating: true}}, "
    text = udp(service()).replace(
        "nodeName: node2}", f"{draining}{{addresses: [{SERVERS[1]}], nodeName: node2}}"
    )
    scene.world.write("web.yaml", text)
    wait_until(lambda: SERVERS[1] in str(scene.world.json("frontends", "shop/web")), "the change")
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    assert scene.flows() == {(CLUSTER_IP, SERVERS[0])}


def test_a_restart_moves_no_flow_whose_endpoint_is_still_one(scene: Scene) -> None:
    """kubernetes#122740: a proxy restart moves QUIC flows."""
    both = udp(service()).replace(
        "nodeName: node2}]", f"nodeName: node2}}, {{addresses: [{SERVERS[1]}], nodeName: node2}}]"
    )
    scene.world.write("web.yaml", both)
    wait_until(lambda: scene.world.json("services")[0]["endpoints_used"] == 2, "both endpoints")
    before = scene.reaches(CLUSTER_IP)
    assert before in SERVERS
    for _ in range(2):
        scene.world.stop()
        scene.world.start()
        assert scene.flows() == {(CLUSTER_IP, before)}
        assert scene.reaches(CLUSTER_IP) == before


def test_what_changed_while_the_daemon_was_away_is_cleaned_at_the_start(scene: Scene) -> None:
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    scene.world.stop()
    scene.world.write("web.yaml", udp(service(server=SERVERS[1])))
    scene.world.start()
    wait_until(lambda: scene.reaches(CLUSTER_IP) == SERVERS[1], "the endpoint that came meanwhile")


def test_a_service_that_was_deleted_while_the_daemon_was_away_is_forgotten_at_the_start(scene: Scene) -> None:
    assert scene.reaches(CLUSTER_IP) == SERVERS[0]
    scene.world.stop()
    (scene.world.manifests / "web.yaml").unlink()
    scene.world.start()
    wait_until(lambda: not scene.flows(), "the entry gone")


def test_traffic_that_is_none_of_a_services_keeps_its_entries(scene: Scene) -> None:
    assert scene.reaches(SERVERS[0], 8080) == SERVERS[0]
    before = scene.flows(8080)
    assert before == {(SERVERS[0], SERVERS[0])}
    scene.world.write("web.yaml", udp(service(server=SERVERS[1])))
    wait_until(lambda: scene.reaches(CLUSTER_IP) == SERVERS[1], "the change")
    assert before <= scene.flows(8080)
    assert scene.reaches(PEER, 9) == ""
