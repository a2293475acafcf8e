"""The balancers' stand-ins on a network without daemons: the nodes' answers are the test's own."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lab import balancer, probe, process, runtime
from lab.balancer import Balancer, Front
from lab.probe import Answer, Failure
from lab.state import Lab
from lab.topology import STAND_IN, LabError
from netlink import netns
from netlink.family import Family

NODE_PORT, HEALTH_PORT = 30080, 30090
SECONDS = 10.0


def front_of(lab: Lab, family: Family) -> Front:
    nodes = tuple((node.name, node.address(family)) for node in lab.plan.nodes)
    return Front(family, STAND_IN[family], 80, nodes, NODE_PORT, HEALTH_PORT)


def serve(lab: Lab, node: str, port: int) -> None:
    """An echo server, which answers every GET with 200: also a node's health check."""
    pid_file = lab.root / "hosts" / f"{node}-{port}.pid"
    runtime.serve_in(lab.plan.node(node).namespace, (node, node), [port], pid_file)


def unserve(lab: Lab, node: str, port: int) -> None:
    process.stop([lab.root / "hosts" / f"{node}-{port}.pid"])


def tables(lab: Lab) -> str:
    """All of the router's rules as nft prints them, without counts."""
    command = ["nft", "-s", "list", "ruleset"]
    return netns.run(lab.plan.router, lambda: subprocess.check_output(command, text=True))


@pytest.mark.parametrize("family", Family)
def test_new_connections_go_in_turn_to_the_healthy_nodes_and_keep_the_client(
    make_lab: Callable[[], Lab], family: Family
) -> None:
    lab = make_lab()
    client = lab.plan.host("client")
    target = (client.namespace, STAND_IN[family], 80)
    for node in ("node1", "node2"):
        serve(lab, node, NODE_PORT)
    with Balancer(lab.plan.router, front_of(lab, family)) as found:
        assert found.wait_round(SECONDS)
        assert probe.fetch(*target, timeout=0.2) == [Failure("timed out")]  # nobody is healthy
        for node in ("node1", "node2"):
            serve(lab, node, HEALTH_PORT)
        assert found.wait_for(("node1", "node2"), SECONDS)
        answers = probe.fetch(*target, 20)
        assert Counter(answers) == {Answer(n, client.address(family)): 10 for n in ("node1", "node2")}
        unserve(lab, "node1", HEALTH_PORT)
        assert found.wait_round(SECONDS)
        assert set(probe.fetch(*target, 10)) == {Answer("node2", client.address(family))}
    assert tables(lab) == ""


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("targets", [(), ("node2",), ("node1", "node2")])
def test_its_rules_can_be_printed_and_loaded_again(
    make_lab: Callable[[], Lab], family: Family, targets: tuple[str, ...]
) -> None:
    lab = make_lab()
    netns.run(lab.plan.router, balancer.load, balancer.rules(front_of(lab, family), targets))
    printed = tables(lab)
    assert "the nodes whose health check says 200" in printed
    netns.run(lab.plan.router, balancer.load, f"flush ruleset\n{printed}")
    assert tables(lab) == printed


def test_what_goes_wrong_in_its_thread_is_raised_at_the_end(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    bad = Front(Family.V4, "no address", 80, (), NODE_PORT, HEALTH_PORT)
    with pytest.raises(LabError, match="rules are refused"), Balancer(lab.plan.router, bad) as found:
        assert not found.wait_round(0.5)
    assert tables(lab) == ""


@contextmanager
def holding(lab: Lab, address: str, port: int) -> Iterator[None]:
    """Have a port of the router taken."""
    with netns.run(lab.plan.router, socket.create_server, (address, port)):
        yield


def test_haproxy_uses_the_healthy_nodes_and_tells_them_of_the_client(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    client = lab.plan.host("client")
    front = front_of(lab, Family.V4)
    front = Front(front.family, client.gateway(Family.V4), 8000, front.nodes, NODE_PORT, HEALTH_PORT)
    serve(lab, "node2", NODE_PORT)
    serve(lab, "node2", HEALTH_PORT)
    with balancer.proxying(lab, front) as targets:
        server = process.read(lab.root / "hosts/haproxy.pid")
        assert reaches(lambda: targets() == 1)
        router, behind = lab.plan.node("node2").gateway(Family.V4), client.address(Family.V4)
        answers = probe.fetch(client.namespace, front.address, front.port, 10)
        assert answers == [Answer("node2", router, behind)] * 10
    assert server is not None
    assert not server.alive


def test_an_haproxy_that_cannot_serve_is_said_with_its_words(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    front = Front(Family.V4, lab.plan.host("client").gateway(Family.V4), 8000, (), NODE_PORT, HEALTH_PORT)
    with (
        holding(lab, front.address, front.port),
        pytest.raises(LabError, match=r"(?is)does not serve.*cannot bind"),
        balancer.proxying(lab, front),
    ):
        pass


def reaches(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    pace, tries = threading.Event(), 500
    return any(condition() or pace.wait(0.02) for _ in range(tries))
