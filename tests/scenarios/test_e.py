"""Scenario E, on real traffic: load balancers' addresses, and balancers that follow the health checks."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lab import balancer, controller, probe, runtime, state
from lab.balancer import Balancer, Front
from lab.cases import Case, E, fair_share
from lab.checks import run_case
from lab.probe import Answer, Failure, Result
from lab.runtime import Pod, PodSpec
from lab.topology import STAND_IN
from lab.world import World
from netlink import netns
from tests.scenarios.forms import IPTABLES, MAIN, each, view_id, views

SECONDS = 10.0
EVERY = 0.01
SERVICE, BOTH = "front-local", ("node1", "node2")
SECOND = PodSpec("customer-2", "node2", "yaobank", {"app": "customer"}, (80,))

once_per_family = pytest.mark.parametrize(
    "world",
    views(MAIN[0]),
    ids=view_id,
    indirect=True,
)


@each(E, *MAIN, IPTABLES)
def test_it_is_as_expected(world: World, case: Case) -> None:
    row = run_case(world, case)
    assert row.passed, f"expected {row.expected}, saw {row.saw}\n" + "\n".join(row.path)


@once_per_family
def test_a_balancer_spreads_over_the_nodes_with_endpoints_and_leaves_one_within_an_interval(
    world: World,
) -> None:
    front, client = front_of(world), world.address("client")
    target = (world.namespace("client"), front.address, front.port)
    with Balancer(world.namespace("router"), front) as found, second_customer(world) as second:
        assert found.wait_for(BOTH, SECONDS)
        answers = probe.fetch(*target, 60)
        low, high = fair_share(60, 2)
        assert {answer.seen for answer in answers if isinstance(answer, Answer)} == {client}
        for share in (Counter(map(server_of, answers))[name] for name in ("customer", "customer-2")):
            assert low <= share <= high
        controller.publish(world.lab, without=second)
        assert reaches(lambda: health(world, "node2") == 503)
        assert found.wait_round(SECONDS)
        assert found.targets == ("node1",)
        assert set(probe.fetch(*target, 30)) == {Answer("customer", client)}


@once_per_family
def test_draining_a_node_under_policy_local_times_out_no_connection(world: World) -> None:
    """The symptom of kubernetes#50977 and #99299; ends as KEP-1669 has it."""
    front = front_of(world)
    target = (world.namespace("client"), front.address, front.port)
    with Balancer(world.namespace("router"), front) as found:
        assert found.wait_for(("node1",), SECONDS)
        with knocking(*target) as results:
            with second_customer(world) as second:
                assert found.wait_for(BOTH, SECONDS)
                assert reaches(lambda: {"customer", "customer-2"} <= set(map(server_of, results)))
                with connection_to(world, front, "customer-2") as held:
                    terminate(world, second)
                    # Until the balancer has noticed, the node's last endpoint serves what still comes.
                    assert reaches(lambda: health(world, "node2") == 503)
                    assert found.wait_round(SECONDS)
                    assert found.targets == ("node1",)
                    left = len(results)
                    assert reaches(lambda: len(results) > left + 30)
                    controller.publish(world.lab, without=second)
                    assert reaches(lambda: len(results) > left + 60)
                    assert server_of(ask(held)) == "customer-2"  # what is established stays
            assert reaches(lambda: len(results) > left + 90)
    failed = [(i, result) for i, result in enumerate(results) if isinstance(result, Failure)]
    assert not failed, f"of {len(results)} connections"
    assert set(map(server_of, results[left + 1 :])) == {"customer"}  # one may have been under way
    assert {answer.seen for answer in results if isinstance(answer, Answer)} == {world.address("client")}


@once_per_family
def test_a_proxying_balancer_passes_the_clients_address_in_a_header(world: World) -> None:
    here = world.lab.plan.host("client").gateway(world.family)
    front = front_of(world, here, 8000)
    with balancer.proxying(world.lab, front) as targets:
        assert reaches(lambda: targets() == 1)  # node1 has the endpoint
        answers = probe.fetch(world.namespace("client"), front.address, front.port, 30)
        # The policy keeps the address that the nodes see: the balancer's, as it is on the nodes' side.
        router = world.lab.plan.node("node1").gateway(world.family)
        assert set(answers) == {Answer("customer", router, world.address("client"))}


def front_of(world: World, address: str = "", port: int = 80) -> Front:
    """A balancer's address over the node ports of the service with the policy Local."""
    spec = manifest(world, SERVICE)["spec"]
    nodes = tuple((node.name, node.address(world.family)) for node in world.lab.plan.nodes)
    node_port, health_port = spec["ports"][0]["nodePort"], spec["healthCheckNodePort"]
    return Front(world.family, address or STAND_IN[world.family], port, nodes, node_port, health_port)


def manifest(world: World, service: str) -> state.Json:
    found = state.manifests(world.lab, "Service")
    return next(document for document in found if document["metadata"]["name"] == service)


def health(world: World, node: str) -> int:
    """What the node tells a balancer of the service."""
    port = int(manifest(world, SERVICE)["spec"]["healthCheckNodePort"])
    address = world.lab.plan.node(node).address(world.family)
    return netns.run(world.namespace("router"), probe.status, address, port, "/healthz")[0]


@contextmanager
def second_customer(world: World) -> Iterator[Pod]:
    """Run one more pod behind the balanced services, on node2; at the end no node sends to it any more."""
    (pod,) = controller.run(world.lab, [SECOND])
    try:
        yield pod
        controller.publish(world.lab, without=pod)
        assert reaches(lambda: not is_used(world))
    finally:
        controller.remove(world.lab, pod)


def is_used(world: World) -> bool:
    """Whether any node sends a new connection to the second pod: it is missed once in a million."""
    client = world.namespace("client")
    for node in world.lab.plan.nodes:
        for family in world.lab.plan.families:
            results = probe.fetch(client, node.address(family), 30180, 20)
            if "customer" not in set(map(server_of, results)) or len(set(map(server_of, results))) > 1:
                return True
    return False


def terminate(world: World, pod: Pod) -> None:
    """Write the service's EndpointSlices as they are while the pod is terminating but still serving."""
    service, pods = manifest(world, SERVICE), runtime.pods(world.lab)
    for family in world.lab.plan.families:
        piece = controller.endpoint_slice(service, pods, family)
        for found in piece["endpoints"]:
            if found["targetRef"]["name"] == pod.spec.name:
                found["conditions"] = {"ready": False, "serving": True, "terminating": True}
        state.write_manifest(world.lab, piece)


@contextmanager
def knocking(namespace: str, address: str, port: int) -> Iterator[list[Result]]:
    """Make new connections, about a hundred a second, until the end of the block; yield their results."""
    results: list[Result] = []
    stop = threading.Event()

    def knock() -> None:
        while not stop.wait(EVERY):
            results.extend(probe.fetch(namespace, address, port))

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(knock)
        try:
            yield results
        finally:
            stop.set()
        work.result()


@contextmanager
def connection_to(world: World, front: Front, server: str) -> Iterator[socket.socket]:
    """Hold a connection through the balancer that has reached this server."""
    for _ in range(50):
        where = (front.address, front.port)
        with netns.run(world.namespace("client"), socket.create_connection, where, SECONDS) as found:
            if server_of(ask(found)) == server:
                yield found
                return
    pytest.fail(f"no connection reached {server}")


def ask(connection: socket.socket) -> Result:
    """Make a request on a connection that stays open."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: front\r\n\r\n")
    received = b""
    while not received.endswith(b"}\n"):
        chunk = connection.recv(4096)
        assert chunk, "the connection was closed"
        received += chunk
    return probe.answer(received.partition(b"\r\n\r\n")[2])


def server_of(result: Result) -> str:
    return result.server if isinstance(result, Answer) else ""


def reaches(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    pace = threading.Event()
    return any(condition() or pace.wait(0.02) for _ in range(500))
