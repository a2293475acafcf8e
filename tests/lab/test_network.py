import subprocess
from collections.abc import Callable

import pytest

from lab import network, probe, process, runtime, state
from lab.state import Lab
from lab.topology import LabError, plan
from netlink import netns
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
    for host in lab.plan.hosts:
        if host.name != "node2":
            answer = probe.fetch(host.namespace, lab.plan.host("node2").address, 80)
            assert answer == [probe.Answer("node2", host.address)]


def test_two_labs_run_at_once_and_do_not_meet(make_lab: Callable[[], Lab]) -> None:
    one, other = make_lab(), make_lab()
    serve(one, "internet")
    target = one.plan.host("internet").address
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
    before = probe.unrouted(lab.plan.router)
    probe.fetch(lab.plan.host("client").namespace, "10.96.0.1", 80)
    assert probe.unrouted(lab.plan.router) > before
