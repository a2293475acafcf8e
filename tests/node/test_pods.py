"""The daemon and the installed binary: what the options mean for pods, and what the daemon sets right."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from netlink import netns
from netlink.requests import address_add
from netlink.rtnl import Rtnl
from tests.cni.endurance import Pod, Site
from tests.node.kernel import listening
from tests.node.world import NODE, NODES, World, build, ended, wait_until

HTTP = {"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}
DUAL_STACK = NODES.replace("[10.244.1.0/24]", "[10.244.1.0/24, 'fd00:244:1::/64']")
OUTSIDE = "198.51.100.1"
"""An address of the peer that is no node's and no pod's."""
POOLS = """
quarantine: 0s
exclude: [10.244.1.2-10.244.1.19]
reserve: [10.244.1.77]
pools:
  - {name: edge, ranges: [10.244.1.64/28], namespaces: ["edge-*"]}
"""


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    """A node without a daemon yet."""
    world = build(namespaces, tmp_path)
    world.write("nodes.yaml", NODES)
    with ended(world):
        yield world


@pytest.fixture
def start(world: World, namespaces: Callable[[], str]) -> Callable[..., Site]:
    """A function that starts the daemon with options."""

    def with_options(*options: str) -> Site:
        world.options = options
        world.start()
        site = Site(world, namespaces)
        site.install()
        return site

    return with_options


def add(site: Site, name: str, namespace: str = "shop", **config: Any) -> tuple[Pod, tuple[str, ...]]:
    """Attach a pod; return it and its addresses."""
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"
    pod = Pod(name, site.make_namespace(), config, args)
    answer = netns.run(site.world.node, site.execute, "ADD", pod)
    assert answer.code == 0, answer
    return pod, answer.addresses


def serve(pod: Pod) -> socket.socket:
    return netns.run(pod.namespace, socket.create_server, ("", 80))


def reaches(world: World, port: int) -> bool:
    """Whether the peer, outside, gets a connection to a port of the node."""

    def connect() -> bool:
        try:
            socket.create_connection((NODE, port), 0.5).close()
        except OSError:
            return False
        return True

    return netns.run(world.peer, connect)


@pytest.mark.parametrize("damage", ["flush ruleset", "delete table ip podwire_pods"])
def test_host_ports_are_gone_after_a_firewall_reload_and_come_back(
    world: World, start: Callable[..., Site], damage: str
) -> None:
    site = start()
    pod, _ = add(site, "web", **HTTP)
    with serve(pod):
        assert reaches(world, 8080)
        before = site.held().rules
        world.run("nft", *damage.split())
        wait_until(lambda: reaches(world, 8080), "the host port is back")
        wait_until(lambda: site.held().rules == before, "all tables are back")
    assert netns.run(world.node, site.execute, "CHECK", pod, **checked(site, pod)).code == 0


def checked(site: Site, pod: Pod) -> dict[str, Any]:
    """Return the configuration of a CHECK: with the result of the ADD."""
    ((result,),) = site.rows(f"SELECT result FROM attachment WHERE container_id = '{pod.container}'")
    return {"prevResult": json.loads(result), **pod.config}


def test_pools_exclusions_and_reservations_are_those_of_the_file(
    world: World, start: Callable[..., Site], tmp_path: Path
) -> None:
    file = tmp_path / "ipam.yaml"
    file.write_text(POOLS)
    site = start("--ipam-config", str(file))
    assert add(site, "web")[1] == ("10.244.1.20",)
    assert add(site, "gate", "edge-1")[1] == ("10.244.1.64",)
    args = {"args": {"cni": {"ips": ["10.244.1.77"]}}}
    assert add(site, "asks", "edge-1", **args)[1] == ("10.244.1.77",)


def test_in_flat_mode_a_pod_has_an_address_of_the_nodes_own_subnet_and_neighbours_reach_it(
    world: World, start: Callable[..., Site]
) -> None:
    site = start("--mode", "flat", "--flat-addresses", "192.168.50.64/29")
    pod, addresses = add(site, "web")
    assert addresses == ("192.168.50.64",)

    def reach() -> None:
        socket.create_connection((addresses[0], 80), 2).close()

    with serve(pod):
        netns.run(world.peer, reach)
    assert "192.168.50.64" in world.run("ip", "neighbour", "show", "proxy")
    assert netns.run(world.node, site.execute, "DEL", pod).code == 0
    site.settle(0)
    assert "192.168.50.64" not in world.run("ip", "neighbour", "show", "proxy")


@pytest.mark.parametrize("families", ["both", "ipv6"])
def test_pods_are_masqueraded_in_the_families_that_were_asked_for(
    world: World, start: Callable[..., Site], families: str
) -> None:
    pod, (address,) = add(start("--masquerade", families), "client")

    def listen_outside() -> socket.socket:
        with Rtnl() as rtnl:
            rtnl.commit(address_add(1, f"{OUTSIDE}/32"))
        return socket.create_server((OUTSIDE, 9000))

    with netns.run(world.peer, listen_outside) as server:
        server.settimeout(2)
        with netns.run(pod.namespace, socket.create_connection, (OUTSIDE, 9000), 2):
            connection, (source, _) = server.accept()
            connection.close()
    assert source == (NODE if families == "both" else address)


def test_the_conflist_appears_when_pods_can_be_added(world: World, start: Callable[..., Site]) -> None:
    folder = world.root / "net.d"
    start("--cni-conf-dir", str(folder))
    wait_until(lambda: any(folder.glob("*.conflist")), "the conflist")


def test_a_dual_stack_node_gives_pods_an_address_of_each_family(
    world: World, start: Callable[..., Site]
) -> None:
    world.write("nodes.yaml", DUAL_STACK)
    site = start()
    _, addresses = add(site, "web")
    assert addresses == ("10.244.1.2", "fd00:244:1::2")
    _, metrics = world.get(10249, "/metrics")
    assert 'range="fd00:244:1::/64"' in metrics


def test_our_own_changes_are_not_taken_for_somebody_elses(start: Callable[..., Site], world: World) -> None:
    """Else every element of the services would be compared, once a minute on a busy node."""
    config = world.root / "ipam.yaml"
    config.write_text("exclude: [10.244.1.10]")  # which the node's own pod has
    site = start("--ipam-config", str(config), "--log-level", "debug")
    with listening(world.node) as events:
        deadline = time.monotonic() + 2.5  # the tables are looked at once a second
        number = 0
        while time.monotonic() < deadline:
            number += 1
            pod, _ = add(site, f"web-{number}")
            assert netns.run(world.node, site.execute, "DEL", pod).code == 0
        wait_until(lambda: world.json("pods") == [], "everything is taken back")
        assert events.take()
    world.stop()
    assert "somebody" not in world.log
