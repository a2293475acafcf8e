"""The real daemon on an API server: the server's faults reach neither the kernel nor any connection."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from netlink import netns
from tests.cni.endurance import Pod, Site
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi
from tests.node.kernel import listening
from tests.node.world import NODE, NODES, PEER, SERVERS, World, build, ended, podwire, service, wait_until
from tests.proxy.world import answering

PORT = 6443
GROWTH_MB = 3.0
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    """A node without a daemon yet, and servers on the other one."""
    world = build(namespaces, tmp_path)
    world.source = "kubernetes"
    listeners = netns.run(world.peer, lambda: [socket.create_server((a, 8080)) for a in SERVERS])
    with ended(world), answering(listeners):
        yield world


@pytest.fixture
def api(world: World) -> Iterator[KubeApi]:
    """The API server, on the other node: what it is told is one service."""
    with running.start(world.peer, listen=f"{PEER}:{PORT}", bookmark_seconds=0.5) as server:
        world.options = ("--kubeconfig", str(server.kubeconfig(world.root / "kubeconfig")))
        create(server, NODES + "---" + service())
        yield server


def create(api: KubeApi, documents: str) -> None:
    """Create the objects of manifests; they lack what only the API wants."""
    groups = {"EndpointSlice": "discovery.k8s.io/v1"}
    for document in yaml.safe_load_all(documents):
        document["apiVersion"] = groups.get(document["kind"], "v1")
        for port in document.get("spec", {}).get("ports", []):
            port.setdefault("protocol", "TCP")
        api.create(document)


def serve_from(api: KubeApi, address: str) -> None:
    api.patch("endpointslices", "web-1", {"endpoints": [{"addresses": [address]}]}, namespace="shop")


def resident(world: World) -> float:
    """Return the daemon's resident memory (MB)."""
    assert world.daemon
    lines = Path(f"/proc/{world.daemon.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def problems(world: World) -> list[str]:
    found: list[str] = world.json("status")["problems"]
    return found


def test_what_the_api_says_is_in_the_kernel_and_changes_soon(world: World, api: KubeApi) -> None:
    world.start()
    assert world.connect() == SERVERS[0]
    serve_from(api, SERVERS[1])
    wait_until(lambda: world.connect() == SERVERS[1], "the other server")
    api.delete("services", "web", namespace="shop")
    wait_until(lambda: world.json("services") == [], "no service")
    assert problems(world) == []
    assert f"API server https://{PEER}:{PORT}, heard" in world.ask("status")


def test_no_rule_flaps_and_no_memory_is_lost_whatever_the_server_does(world: World, api: KubeApi) -> None:
    world.start()
    with listening(world.node) as events:
        for number in range(30):  # until memory is what it is
            api.cut_watches()
            serve_from(api, SERVERS[number % 2])
        wait_until(lambda: world.connect() == SERVERS[1], "the last change")
        events.take(0.2)
        before = resident(world)
        faults: list[Callable[[], object]] = [
            api.restart,
            lambda: api.restart(forget=True),
            lambda: api.fail(429, times=3, retry_after=0),
            lambda: api.fail(500, times=3),
            lambda: api.fail(410, verb="watch", times=3),
            lambda: api.half(times=3),
            lambda: api.close(times=3),
            api.new_certificate,
        ]
        for fault in faults:
            fault()
            api.cut_watches()
            api.wait_for(lambda c: c.open_watches == 3)
            assert events.take(1.0) == [], "the cluster has not changed, so the kernel must not"
        watches = api.counters().verbs["watch"]
        api.watch_life(1.0)
        api.wait_for(lambda c: c.verbs["watch"] > watches + 3 * 5)
        assert events.take(0.2) == []
        assert resident(world) - before < GROWTH_MB
        serve_from(api, SERVERS[0])
        wait_until(lambda: world.connect() == SERVERS[0], "a change after all that")
        changed = {event.what for event in events.take()}
        assert changed <= {"new element", "lost element"}


def test_a_node_that_boots_without_the_api_server_works_by_what_it_knew(
    world: World, api: KubeApi, namespaces: Callable[[], str]
) -> None:
    world.start()
    wait_until(lambda: bool(world.json("services")), "the service")
    world.stop()
    world.run("nft", "flush", "ruleset")
    api.down()
    world.start()
    assert world.connect() == SERVERS[0], "by the state of before"
    assert any("counts until the API server answers" in p for p in problems(world))
    site = Site(world, namespaces)
    site.install()
    pod = Pod("web", site.make_namespace())
    answer = netns.run(world.node, site.execute, "ADD", pod)
    assert answer.code == 0, answer
    assert netns.run(world.node, site.execute, "DEL", pod).code == 0
    with listening(world.node) as events:
        api.up()
        serve_from(api, SERVERS[1])
        wait_until(lambda: world.connect() == SERVERS[1], "what it missed")
        assert {event.what for event in events.take()} <= {"new element", "lost element"}, "a diff, no flush"
    wait_until(lambda: problems(world) == [], "no problems")


def test_while_the_api_server_is_away_everything_goes_on(world: World, api: KubeApi) -> None:
    world.start()
    api.down()
    assert world.connect() == SERVERS[0]
    assert world.get(10256, "/healthz")[0] == 200
    world.stop(signal.SIGKILL)
    assert world.connect() == SERVERS[0]
    api.up()
    serve_from(api, SERVERS[1])
    world.start()
    wait_until(lambda: world.connect() == SERVERS[1], "the change")


def test_a_daemon_that_knows_nothing_says_so_and_still_removes_pods(
    world: World, api: KubeApi, namespaces: Callable[[], str]
) -> None:
    world.start()
    site = Site(world, namespaces)
    site.install()
    pod = Pod("web", site.make_namespace())
    assert netns.run(world.node, site.execute, "ADD", pod).code == 0
    world.stop()
    (world.root / "state/cluster-state").unlink()
    api.down()
    with spawned(world) as log:
        wait_until(lambda: "nothing is known of the cluster" in log.read_text(), "a sentence")
        _, out, _ = podwire("status", "--socket", str(world.socket), "-o", "json")
        assert "nothing is known of the cluster" in out
        assert world.get(10256, "/healthz")[0] == 503
        assert netns.run(world.node, site.execute, "DEL", pod).code == 0
        assert netns.run(world.node, site.execute, "ADD", pod).code == 0, "by the range of before"


@contextlib.contextmanager
def spawned(world: World) -> Iterator[Path]:
    """Start the daemon without waiting for it to be healthy; yield where it logs."""
    with (world.root / "log").open("wb") as log:
        world.daemon = netns.run(
            world.node, lambda: subprocess.Popen(world.command(), stdout=log, stderr=log)
        )
    try:
        yield world.root / "log"
    finally:
        world.stop(signal.SIGKILL)


def test_a_reload_takes_over_what_needs_no_restart(world: World, api: KubeApi) -> None:
    config = world.root / "config.yaml"
    config.write_text("pods: {noMasqueradeCIDRs: [10.9.0.0/16]}\n")
    world.options = (*world.options, "--config", str(config))
    world.start()
    assert "10.9.0.0/16" in world.run("nft", "list", "table", "ip", "podwire")
    config.write_text("pods: {noMasqueradeCIDRs: [10.8.0.0/16], mode: bridge}\n")
    assert world.daemon
    world.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "10.8.0.0/16" in world.run("nft", "list", "table", "ip", "podwire"), "the new range")
    assert "10.9.0.0/16" not in world.run("nft", "list", "table", "ip", "podwire")
    assert "need a restart: pods.mode" in world.log
    config.write_text("pods: {noMasqueradeCIDR: []}\n")
    world.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "did you mean" in world.log, "a sentence")
    assert "10.8.0.0/16" in world.run("nft", "list", "table", "ip", "podwire")
    assert world.connect() == SERVERS[0]


def test_the_service_manager_hears_when_it_is_ready_and_when_it_stops(world: World, api: KubeApi) -> None:
    path = world.root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10)
        world.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "600000"}
        world.start()
        heard = manager.recv(1000)
        while b"READY=1" not in heard:
            heard = manager.recv(1000)
        assert world.get(10256, "/healthz")[0] == 200
        alive = sum(manager.recv(1000) == b"WATCHDOG=1" for _ in range(3))
        assert alive >= 2
        world.stop()
        manager.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                heard = manager.recv(1000)
        assert heard == b"STOPPING=1"


def test_json_logs_are_a_json_object_a_line(world: World, api: KubeApi) -> None:
    world.options = (*world.options, "--log-format", "json")
    world.start()
    for line in world.log.splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()


def test_a_clock_that_jumps_there_and_back_changes_nothing(world: World, api: KubeApi) -> None:
    """What libfaketime moves is the wall clock of the daemon's process; waits go by the monotonic one."""
    clock = world.root / "clock"
    clock.write_text("+0")
    settings = {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
    world.environment = {"LD_PRELOAD": FAKETIME, **settings}
    world.start()
    for number, jump in enumerate(("+3600", "+0", "+86400", "+0")):
        clock.write_text(jump)
        api.cut_watches()
        serve_from(api, SERVERS[(number + 1) % 2])
        wait_until(lambda server=SERVERS[(number + 1) % 2]: world.connect() == server, f"a change at {jump}")  # type: ignore[misc]
        assert world.get(10256, "/healthz")[0] == 200
    assert problems(world) == []


def test_nodes_without_a_controller_agree_on_their_ranges_and_say_where_they_are(
    world: World, namespaces: Callable[[], str]
) -> None:
    with running.start(world.peer, listen=f"{PEER}:{PORT}") as api:
        world.options = ("--kubeconfig", str(api.kubeconfig(world.root / "kubeconfig")))
        world.options += ("--cluster-cidr", "10.244.0.0/16")
        for name, address in (("node1", NODE), ("node2", PEER)):
            unavailable = {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}
            status = {
                "addresses": [{"type": "InternalIP", "address": address}],
                "conditions": [unavailable, {"type": "Ready", "status": "True"}],
            }
            api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status})
        world.start()
        wait_until(lambda: podwire("status", "--socket", str(world.socket))[0] == 0, "a range")
        node = api.get("nodes", "node1")
        assert node["spec"]["podCIDRs"] == world.json("status")["pod_cidrs"]
        (lease,) = api.list("leases")["items"]
        assert lease["spec"]["holderIdentity"] == "node1"
        wait_until(lambda: "podwire.io/tunnel-mac" in annotations(api), "annotations")
        assert annotations(api)["podwire.io/tunnel-address"] == NODE
        site = Site(world, namespaces)
        site.install()
        pod = Pod("web", site.make_namespace())
        assert netns.run(world.node, site.execute, "ADD", pod).code == 0
        wait_until(lambda: condition(api)["reason"] == "PodwireIsUp", "the condition")
        assert condition(api)["status"] == "False"
        assert len(api.get("nodes", "node1")["status"]["conditions"]) == 2, "the other one is kubelet's"


def annotations(api: KubeApi) -> dict[str, str]:
    found: dict[str, str] = api.get("nodes", "node1")["metadata"].get("annotations", {})
    return found


def condition(api: KubeApi) -> dict[str, str]:
    conditions: list[dict[str, str]] = api.get("nodes", "node1")["status"]["conditions"]
    return next(c for c in conditions if c["type"] == "NetworkUnavailable")


def test_a_node_that_was_made_again_with_another_range_says_what_to_do(
    world: World, api: KubeApi, namespaces: Callable[[], str]
) -> None:
    world.start()
    site = Site(world, namespaces)
    site.install()
    pod = Pod("web", site.make_namespace())
    assert netns.run(world.node, site.execute, "ADD", pod).code == 0
    api.delete("nodes", "node1")
    create(api, NODES.split("---")[0].replace("10.244.1.0/24", "10.244.9.0/24"))
    wait_until(lambda: world.json("status")["pod_cidrs"] == ["10.244.9.0/24"], "the new range")
    said = ("10.244.1.0/24", "1 pod", "drain")
    wait_until(lambda: any(all(word in p for word in said) for p in problems(world)), "a sentence")
    assert netns.run(world.node, site.execute, "DEL", pod).code == 0
    other = Pod("web2", site.make_namespace())
    answer = netns.run(world.node, site.execute, "ADD", other)
    assert answer.addresses[0].startswith("10.244.9.")


def test_what_a_user_must_mend_is_an_event(world: World, api: KubeApi) -> None:
    create(api, service("twin", "10.96.0.9").replace("clusterIP:", "externalIPs: [10.96.0.1], clusterIP:"))
    world.start()
    wait_until(lambda: any("10.96.0.1" in p for p in problems(world)), "a conflict")
    deadline = 30.0  # what may pass by itself is not told at once
    api.wait_for(lambda c: any("events" in path for path in c.paths), deadline)
    (event,) = api.list("events")["items"]
    assert event["involvedObject"]["kind"] == "Service"
    assert event["involvedObject"]["name"] in ("twin", "web")
    assert event["type"] == "Warning"
    assert "10.96.0.1" in event["message"]
