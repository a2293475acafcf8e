import itertools
import os
import subprocess
from collections.abc import Callable
from ipaddress import ip_interface
from pathlib import Path

import pytest

from lab import network, probe, process, runtime, state
from lab.state import Lab
from lab.topology import IpFamily, LabError, plan
from netlink import netns
from netlink.family import Family
from netlink.rtnl import Rtnl


def host_state() -> tuple[object, ...]:
    """What a lab must not touch: the machine's own interfaces, routes and tables."""
    with Rtnl() as rtnl:
        links, routes = rtnl.links(), rtnl.routes()
    ruleset = subprocess.run(["nft", "-s", "list", "ruleset"], capture_output=True, text=True, check=True)
    return links, routes, ruleset.stdout


def serve(lab: Lab, host: str) -> None:
    pid_file = lab.root / "hosts" / f"{host}.pid"
    runtime.serve_in(lab.plan.host(host).namespace, (host, host), [80], pid_file)


def test_every_host_reaches_every_other_with_its_own_address(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    serve(lab, "node2")
    for family, host in itertools.product(lab.plan.families, lab.plan.hosts):
        if host.name != "node2":
            answer = probe.fetch(host.namespace, lab.plan.host("node2").address(family), 80)
            assert answer == [probe.Answer("node2", host.address(family))]


def test_in_a_lab_of_one_family_no_interface_but_lo_has_an_address_of_the_other(tmp_path: Path) -> None:
    six = plan(f"six{os.getpid()}", 1, 0, ip_family=IpFamily.IPV6)
    try:
        network.build(six)
        for namespace in (six.router, *(host.namespace for host in six.hosts)):
            assert {ip_interface(a).version for a in netns.run(namespace, addresses)} == {6}
    finally:
        network.remove(six.name, tmp_path)


def addresses() -> list[str]:
    """The addresses of this namespace, except those of its loopback interface."""
    with Rtnl() as rtnl:
        return [address.cidr for address in rtnl.addresses() if address.index != 1]


def test_the_nodes_are_kubernetes_nodes_with_ranges_and_addresses_of_both_families() -> None:
    (node,) = plan("x", 1, 0, ip_family=IpFamily.DUAL).nodes
    found = network.node_object(node)
    assert found["spec"] == {
        "podCIDR": "10.244.1.0/24",
        "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"],
    }
    internal = [a["address"] for a in found["status"]["addresses"] if a["type"] == "InternalIP"]
    assert internal == ["192.168.50.11", "fd00:192:168:50::11"]


def test_two_labs_run_at_once_and_do_not_meet(make_lab: Callable[[], Lab]) -> None:
    one, other = make_lab(), make_lab()
    serve(one, "internet")
    target = one.plan.host("internet").address(Family.V4)
    assert isinstance(probe.fetch(one.plan.host("client").namespace, target, 80)[0], probe.Answer)
    assert probe.fetch(other.plan.host("client").namespace, target, 80) == [probe.Failure("refused")]
    network.remove(one.plan.name, one.root.parent)
    assert netns.path(other.plan.router).exists()


def test_removing_a_lab_leaves_nothing_and_can_be_repeated(make_lab: Callable[[], Lab]) -> None:
    before = host_state()
    lab = make_lab()
    serve(lab, "client")
    server = process.read(lab.root / "hosts/client.pid")
    assert server is not None
    assert server.alive
    assert host_state() == before
    assert network.remove(lab.plan.name, lab.root.parent)
    assert not server.alive
    assert not lab.root.exists()
    assert list(netns.DIRECTORY.glob(f"{lab.plan.prefix}*")) == []
    assert host_state() == before
    assert not network.remove(lab.plan.name, lab.root.parent)


def test_a_lab_that_exists_is_not_made_again_nor_taken_down_by_trying(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    with pytest.raises(LabError, match="exists already"):
        network.up(plan(lab.plan.name), lab.root.parent)
    assert netns.path(lab.plan.router).exists()


def test_a_daemon_that_ends_at_once_is_reported_with_its_last_words_and_nothing_stays(
    make_lab: Callable[[], Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, name = make_lab().root.parent, "failing"
    monkeypatch.setattr(network, "_install", lambda *_: None)
    monkeypatch.setattr(
        network, "daemon_command", lambda *_: ["/bin/sh", "-c", "echo the disk is on fire; exit 3"]
    )
    with pytest.raises(LabError, match=r"(?s)did not get ready.*the disk is on fire"):
        network.up(plan(name), root)
    assert name not in state.names(root)
    assert list(netns.DIRECTORY.glob(f"pw-{name}-*")) == []


def test_a_process_that_only_has_the_same_pid_is_left_alone(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    with subprocess.Popen(["/bin/sleep", "60"]) as foreign:
        try:
            started = process.start_time(foreign.pid)
            assert started is not None
            state.write(lab.root / "hosts/x.pid", f"{foreign.pid} {started - 1}\n")
            network.remove(lab.plan.name, lab.root.parent)
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_packets_without_a_route_are_counted_at_the_router(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    for family, address in ((Family.V4, "10.96.0.1"), (Family.V6, "fd00:10:96::1")):
        before = probe.unrouted(lab.plan.router, family)
        probe.fetch(lab.plan.host("client").namespace, address, 80, timeout=0.1)
        assert probe.unrouted(lab.plan.router, family) > before
