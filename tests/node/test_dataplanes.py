"""A node changes what its services are made of, and serves them all the while."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netlink import netns
from netlink.xtables import Variant
from node import dataplanes
from tests.node.world import CLUSTER_IP, NODES, SERVERS, World, build, ended, podwire, service, wait_until
from tests.proxy.world import answering


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    made = build(namespaces, tmp_path)
    made.write("nodes.yaml", NODES)
    made.write("web.yaml", service())
    listeners = netns.run(made.peer, _listen)
    with ended(made), answering(listeners):
        made.start()
        wait_until(lambda: made.connect() == SERVERS[0], "the service")
        yield made


def _listen() -> list[socket.socket]:
    return [socket.create_server((address, 8080), backlog=128) for address in SERVERS]


SAVED = "iptables-legacy-save -t nat; iptables-nft-save -t nat"


def saved(world: World) -> str:
    return world.run("sh", "-c", SAVED)


def tables(world: World) -> str:
    return world.run("nft", "list", "tables")


@pytest.mark.parametrize("variant", [v.value for v in Variant])
def test_it_serves_by_iptables_and_goes_back_without_a_connection_that_fails(
    world: World, variant: str
) -> None:
    """The daemon is restarted with the other mode; the hint is kubelet's, as on a node."""
    hint = f"iptables-{variant} -t mangle -N KUBE-IPTABLES-HINT"
    world.run("sh", "-c", hint)
    assert "table ip podwire\n" in tables(world)
    stop, failures = threading.Event(), list[str]()

    def knock() -> None:
        while not stop.is_set():
            answer = world.connect()
            if answer != SERVERS[0]:
                failures.append(answer)

    client = threading.Thread(target=knock)
    client.start()
    try:
        for options, mode in ((("--proxy-mode", "iptables"), "iptables"), ((), "nftables")):
            world.stop()
            world.options = options
            world.start()
            assert world.get(10249, "/proxyMode") == (200, mode)
            ours = "KUBE-SVC-" in saved(world)
            assert ours == (mode == "iptables")
            assert ("table ip podwire\n" in tables(world)) == (mode == "nftables")
            if ours:
                assert world.json("status")["dataplane"] == f"iptables-{variant}"
                assert "KUBE-SVC-" in world.run(f"iptables-{variant}-save")
    finally:
        stop.set()
        client.join()
    assert failures == []
    assert "PODWIRE" not in saved(world)
    assert "KUBE-" not in saved(world)


def test_changes_of_services_reach_iptables(world: World) -> None:
    world.stop()
    world.options = ("--proxy-mode", "iptables")
    world.start()
    assert world.connect() == SERVERS[0]
    world.write("web.yaml", service(server=SERVERS[1]))
    wait_until(lambda: world.connect() == SERVERS[1], "the other server")
    world.write("more.yaml", service("more", "10.96.0.2"))
    wait_until(lambda: world.connect("10.96.0.2") == SERVERS[0], "the new service")
    (world.manifests / "more.yaml").unlink()
    wait_until(lambda: world.connect("10.96.0.2") != SERVERS[0], "the service gone")


def test_kube_proxys_chains_are_none_of_ours_while_services_are_made_of_nftables(world: World) -> None:
    world.run(
        "sh", "-c", "iptables-nft -t nat -N KUBE-SERVICES; iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES"
    )
    world.stop()
    world.start()
    assert "-A PREROUTING -j KUBE-SERVICES" in saved(world)
    assert netns.run(world.node, dataplanes.kind_of, "nftables") == "nftables"
    assert world.connect(CLUSTER_IP) == SERVERS[0]


def test_a_program_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", missing)
    assert dataplanes.kind_of("iptables").startswith("iptables-")
    assert not list(tmp_path.iterdir())


def test_doctor_and_cleanup_of_kube_proxy_leave_our_chains_and_our_own_cleanup_takes_them(
    world: World,
) -> None:
    world.stop()
    world.options = ("--proxy-mode", "iptables")
    world.start()
    assert netns.run(world.node, podwire, "doctor", "--check", "kube-proxy")[0] == 0
    assert netns.run(world.node, podwire, "cleanup", "--kube-proxy")[0] == 0
    assert world.connect() == SERVERS[0]
    world.stop()
    words = ("cleanup", "--podwire", "--yes", "--with-pods", "--state-dir", str(world.root / "state"))
    status, out, err = netns.run(world.node, podwire, *words)
    assert (status, err) == (0, "")
    assert "removed chains of services in iptables-" in out
    assert "KUBE-" not in saved(world)
    assert "PODWIRE" not in saved(world)
