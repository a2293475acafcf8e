"""The real daemon in a namespace: what it does, what it says, and what its restart does not disturb."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netlink import netns
from netlink.requests import Route, route_replace
from netlink.rtnl import Rtnl
from tests.node.world import (
    CLUSTER_IP,
    NODES,
    PEER,
    POD,
    SERVERS,
    STATIC,
    World,
    build,
    ended,
    podwire,
    service,
    wait_until,
)
from tests.proxy.world import answering

FOREIGN = """
table ip other {
    set seen { type ipv4_addr; elements = { 10.1.1.1 } }
    chain forward {
        type filter hook forward priority 0;
        ip daddr 10.9.9.9 drop
    }
}
table inet podwire {
    chain mine {
        tcp dport 80 accept
    }
}
"""


@pytest.fixture(scope="module")
def built(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The node, everything around it, things of other people on it, and its daemon."""
    world = build(namespaces, tmp_path_factory.mktemp("node"))
    world.write("nodes.yaml", NODES)
    world.write("web.yaml", service())
    netns.run(world.node, _foreign)
    listeners = netns.run(world.peer, _listen)
    with ended(world), answering(listeners):
        world.start()
        yield world


def _foreign() -> None:
    subprocess.run(["nft", "-f", "-"], input=FOREIGN, text=True, check=True)
    with Rtnl() as rtnl:
        rtnl.commit(route_replace(Route("10.100.0.0/16", gateway=PEER, protocol=STATIC)))


def _listen() -> list[socket.socket]:
    return [socket.create_server((address, 8080), backlog=128) for address in SERVERS]


@pytest.fixture
def world(built: World) -> World:
    """The node with its daemon, and the manifests as they were in the beginning."""
    for path in built.manifests.iterdir():
        if path.name not in ("nodes.yaml", "web.yaml"):
            path.unlink()
    built.write("nodes.yaml", NODES)
    built.write("web.yaml", service())
    if built.daemon is None:
        built.start()
    wait_until(lambda: not problems(built) and built.connect() == SERVERS[0], "the beginning")
    return built


def problems(world: World) -> list[str]:
    found = world.json("status")["problems"]
    assert isinstance(found, list)
    return found


def wait_for_problem(world: World, sentence: str) -> None:
    wait_until(lambda: sentence in problems(world), f"{sentence!r} in the status")


def tables(world: World) -> dict[str, Any]:
    """Everything in our table that a restart must not touch: handles, and rules with their counters."""
    entries = json.loads(world.run("nft", "-j", "-a", "list", "table", "ip", "podwire"))["nftables"]
    return {json.dumps(e, sort_keys=True): e for e in entries if "metainfo" not in e}


def foreign(world: World) -> tuple[str, str, str]:
    return (
        world.run("nft", "-a", "list", "table", "ip", "other"),
        world.run("nft", "-a", "list", "table", "inet", "podwire"),
        world.run("ip", "route", "show", "proto", "static"),
    )


def our_routes(world: World) -> set[str]:
    return set(world.run("ip", "route", "show", "proto", "112").splitlines())


def test_it_brings_services_and_routes_to_the_kernel(world: World) -> None:
    assert world.connect() == SERVERS[0]
    assert {line.strip() for line in our_routes(world)} == {
        f"{POD} dev pod0 scope link",
        "unreachable 10.244.1.0/24 metric 4096",
        f"10.244.2.0/24 via {PEER} dev eth0 metric 2",
    }
    assert world.run("cat", "/proc/sys/net/ipv4/ip_forward") == "1\n"
    assert "made a new table" in (world.root / "log1").read_text()


def test_proxy_mode(world: World) -> None:
    assert world.get(10249, "/proxyMode") == (200, "nftables")


@pytest.mark.parametrize("port", [10249, 10256])
def test_healthz(world: World, port: int) -> None:
    status, body = world.get(port, "/healthz?verbose")
    found = json.loads(body)
    assert status == 200
    assert found["nodeEligible"] is True
    assert found["lastUpdated"] <= found["currentTime"]
    assert world.get(port, "/livez") == (200, "ok\n")


def test_an_unknown_page(world: World) -> None:
    assert world.get(10249, "/nothing")[0] == 404


def test_metrics_tell_how_full_the_range_is(world: World) -> None:
    _, text = world.get(10249, "/metrics")
    assert 'podwire_pod_addresses{family="IPv4",kind="capacity",range="10.244.1.0/24"} 253.0' in text


def test_metrics(world: World) -> None:
    status, body = world.get(10249, "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))
    assert status == 200
    assert float(figures["podwire_frontends"]) == 1
    assert float(figures["podwire_map_elements"]) > 2
    assert float(figures["podwire_sync_failures"]) == 0
    assert float(figures["kubeproxy_sync_proxy_rules_duration_seconds_count"]) >= 1


def test_a_node_that_is_being_deleted_is_not_eligible_but_alive(world: World) -> None:
    deleted = NODES.replace("{name: node1}", "{name: node1, deletionTimestamp: 2024-05-01T10:00:00Z}")
    world.write("nodes.yaml", deleted)
    wait_until(lambda: world.get(10256, "/healthz")[0] == 503, "503")
    assert json.loads(world.get(10256, "/healthz")[1])["nodeEligible"] is False
    assert world.get(10256, "/livez")[0] == 200
    assert world.connect() == SERVERS[0]
    world.write("nodes.yaml", NODES)
    wait_until(lambda: world.get(10256, "/healthz")[0] == 200, "200")


def test_status(world: World) -> None:
    lines = world.ask("status").splitlines()
    assert lines[0].startswith("node node1: ready (podwire ")
    assert lines[1] == f"  source     folder {world.manifests}"
    assert lines[2] == "  pods       mode routed, podCIDRs 10.244.1.0/24"
    assert lines[3].startswith("  services   1 with 1 frontends, ")
    assert lines[4].startswith("  dataplane  nftables, last synced ")
    found = world.json("status")
    assert (found["ready"], found["node"], found["pod_cidrs"]) == (True, "node1", ["10.244.1.0/24"])


def test_frontends(world: World) -> None:
    assert world.json("frontends") == [
        {
            "service": "shop/web",
            "match": CLUSTER_IP,
            "protocol": "TCP",
            "port": 80,
            "origin": "any",
            "action": "balance",
            "masquerade": "off-cluster",
            "endpoints": [f"{SERVERS[0]}:8080"],
            "affinity_seconds": 0,
            "restricted": False,
            "sources": [],
        }
    ]
    assert world.json("frontends", "shop/web") == world.json("frontends")
    head, row = world.ask("frontends").splitlines()
    assert head.split()[:3] == ["SERVICE", "MATCH", "PROTOCOL"]
    assert row.split()[0] == "shop/web"


def test_services_in_short_and_one_with_its_live_connections(world: World) -> None:
    (short,) = world.json("services")
    assert (short["name"], short["cluster_ips"]) == ("shop/web", [CLUSTER_IP])
    assert (short["endpoints_used"], short["endpoints_known"], short["frontends"]) == (1, 1, [])
    assert world.ask("services").splitlines()[1].split() == [
        *("shop/web", CLUSTER_IP, "80/TCP", "1", "of", "1", "-")
    ]
    before = world.json("services", "shop/web")
    assert world.connect() == SERVERS[0]
    after = world.json("services", "shop/web")
    (frontend,), (endpoint,) = after["frontends"], after["endpoints"]
    assert frontend["match"] == CLUSTER_IP
    assert frontend["connections"] == before["frontends"][0]["connections"] + 1
    assert endpoint.pop("connections") == frontend["connections"]
    assert endpoint == {
        "port": "",
        "address": f"{SERVERS[0]}:8080",
        "node": "node2",
        "local": False,
        "used": "yes",
        "why": "ready",
    }
    assert "internal Cluster, external Cluster" in world.ask("services", "shop/web")


def test_why_an_endpoint_is_not_used_and_what_is_wrong_with_a_service(world: World) -> None:
    world.write(
        "web.yaml", service().replace("nodeName: node2", "nodeName: node2, conditions: {ready: false}")
    )
    world.write("twin.yaml", service("twin").replace("clusterIP: 10.96.0.1", "clusterIP: 10.96.0.1"))
    wait_until(lambda: len(world.json("services")) == 2, "two services")
    twin, web = world.json("services")
    assert web["problems"] == [f"service shop/web gets no {CLUSTER_IP} port 80/TCP: service shop/twin has it"]
    assert world.json("services", "shop/web")["endpoints"][0]["why"] == "not ready"
    assert twin["endpoints_used"] == 1


def test_a_service_that_is_not_served_is_a_sentence(world: World) -> None:
    status, out, err = podwire("services", "--socket", str(world.socket), "web")
    assert (status, out) == (1, "")
    assert err.startswith("podwire: no service default/web is served on this node")


def test_a_service_that_has_no_frontend(world: World) -> None:
    status, out, err = podwire("frontends", "--socket", str(world.socket), "shop/none")
    assert (status, out) == (1, "")
    assert err.startswith("podwire: service shop/none has no frontend on this node")


def test_routes(world: World) -> None:
    assert world.json("routes") == [
        {
            "destination": "10.244.1.0/24", "node": "node1", "backend": "local",
            "peer": "", "via": "", "device": "", "mtu": 0,
        },
        {
            "destination": "10.244.2.0/24", "node": "node2", "backend": "direct",
            "peer": PEER, "via": PEER, "device": "eth0", "mtu": 0,
        },
    ]  # fmt: skip
    assert world.ask("routes").splitlines()[1].split() == [
        "10.244.1.0/24", "node1", "local", "-", "-", "-", "0"
    ]  # fmt: skip


def test_pods(world: World) -> None:
    assert world.json("pods") == []
    assert world.ask("pods").split() == ["CONTAINER_ID", "IFNAME", "ADDRESSES", "HOST_IFNAME", "STATE"]


def test_only_root_can_use_the_socket(world: World) -> None:
    assert world.socket.stat().st_mode & 0o777 == 0o600


def test_a_changed_manifest_is_in_the_kernel_soon(world: World) -> None:
    world.write("web.yaml", service(server=SERVERS[1]))
    wait_until(lambda: world.connect() == SERVERS[1], "the other server")
    world.write("more.yaml", service("more", "10.96.0.2"))
    wait_until(lambda: world.connect("10.96.0.2") == SERVERS[0], "the new service")
    (world.manifests / "more.yaml").unlink()
    wait_until(lambda: world.connect("10.96.0.2") != SERVERS[0], "the service gone")


def test_a_node_that_comes_and_goes_is_a_route_that_comes_and_goes(world: World) -> None:
    before = our_routes(world)
    node = "kind: Node\nmetadata: {name: node3}\nspec: {podCIDR: 10.244.3.0/24}\n"
    world.write(
        "node3.yaml", f"{node}status: {{addresses: [{{type: InternalIP, address: 192.168.60.13}}]}}\n"
    )
    wait_until(lambda: len(our_routes(world)) == len(before) + 1, "the new route")
    (world.manifests / "node3.yaml").unlink()
    wait_until(lambda: our_routes(world) == before, "the route gone")


def test_wrong_input_is_a_sentence_and_everything_else_goes_on(world: World) -> None:
    bad = service("bad", "10.96.0.999")
    world.write("bad.yaml", bad)
    wait_for_problem(world, "bad.yaml: Service shop/bad: spec.clusterIPs '10.96.0.999' is not an IP address")
    assert world.connect() == SERVERS[0]

    half = service(server=SERVERS[1])[:-30]
    world.write("web.yaml", half)
    wait_until(lambda: any(p.startswith("web.yaml: not readable as YAML") for p in problems(world)), "half")
    assert world.connect() == SERVERS[0], "what the file said before"

    world.write("good.yaml", service("good", "10.96.0.3", SERVERS[1]))
    wait_until(lambda: world.connect("10.96.0.3") == SERVERS[1], "a service beside the wrong ones")
    assert len(problems(world)) == 2
    assert "problem    bad.yaml: Service shop/bad" in world.ask("status")
    assert "WARNING podwire.source: bad.yaml: Service shop/bad" in world.log


def test_overlapping_pod_ranges_are_a_sentence_and_the_first_name_keeps_its_route(world: World) -> None:
    world.write("node3.yaml", NODES.split("---")[1].replace("node2", "node3"))
    wait_for_problem(
        world,
        "node node3: podCIDR 10.244.2.0/24 overlaps 10.244.2.0/24 of node node2, which counts; "
        "it gets no route",
    )
    assert f"10.244.2.0/24 via {PEER} dev eth0 metric 2" in {r.strip() for r in our_routes(world)}
    assert world.connect() == SERVERS[0]


def test_a_route_that_the_kernel_refuses_is_a_sentence_and_everything_else_goes_on(world: World) -> None:
    node = "kind: Node\nmetadata: {name: node3}\nspec: {podCIDR: 10.244.3.0/24}\n"
    world.write(
        "node3.yaml", f"{node}status: {{addresses: [{{type: InternalIP, address: 192.168.50.255}}]}}\n"
    )
    wait_for_problem(world, "the kernel refuses to set the route to 10.244.3.0/24: Invalid argument")
    world.write("web.yaml", service(server=SERVERS[1]))
    wait_until(lambda: world.connect() == SERVERS[1], "a change of a service")
    assert world.get(10256, "/healthz")[0] == 200


def test_two_services_with_one_address_are_a_sentence(world: World) -> None:
    world.write("a.yaml", service("another"))
    wait_for_problem(world, f"service shop/web gets no {CLUSTER_IP} port 80/TCP: service shop/another has it")


def test_a_second_daemon_is_refused_in_a_sentence(world: World) -> None:
    command = world.command()
    second = netns.run(
        world.node, lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith("podwire: cannot listen on 127.0.0.1:10249: ")
    assert "Traceback" not in second.stderr
    assert world.ask("status")


def test_a_stop_leaves_everything_and_a_start_adopts_it(world: World) -> None:
    before = tables(world), our_routes(world), foreign(world)
    assert world.stop() == 0
    assert "stopped; rules, routes and pods stay as they are" in world.log
    assert "Traceback" not in world.log
    assert (tables(world), our_routes(world), foreign(world)) == before
    assert world.connect() == SERVERS[0]
    world.start()
    assert "adopted what the kernel had" in world.log
    assert (tables(world), our_routes(world), foreign(world)) == before


def test_a_start_after_a_kill_adopts_table_and_counters_and_catches_up(world: World) -> None:
    def counted() -> int:
        return sum(
            part["counter"]["packets"]
            for entry in tables(world).values()
            for part in entry.get("rule", {}).get("expr", [])
            if "counter" in part
        )

    def datagram() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"out", ("198.51.100.10", 9))

    netns.run(world.pod, datagram)
    assert counted() > 0, "a pod's packet to the outside is counted"
    before = tables(world)
    assert world.stop(signal.SIGKILL) == -signal.SIGKILL
    world.write("web.yaml", service(server=SERVERS[1]))
    world.write("more.yaml", service("more", "10.96.0.2"))
    world.start()
    assert "adopted what the kernel had" in world.log
    assert "made a new table" not in world.log
    assert world.connect() == SERVERS[1]
    assert world.connect("10.96.0.2") == SERVERS[0]

    def constant(entries: dict[str, Any]) -> set[str]:
        return {text for text, entry in entries.items() if "map" not in entry and "set" not in entry}

    assert constant(tables(world)) == constant(before), "the same table, chains and rules, by handle"


def test_new_connections_do_not_notice_a_restart(world: World) -> None:
    stop = threading.Event()
    answers: list[str] = []

    def client() -> None:
        netns.run(world.pod, lambda: _keep_connecting(answers, stop))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        wait_until(lambda: len(answers) > 100, "connections before")
        assert world.stop() == 0
        stopped = len(answers)
        wait_until(lambda: len(answers) > stopped + 100, "connections without the daemon")
        world.start()
        started = len(answers)
        wait_until(lambda: len(answers) > started + 100, "connections after")
    finally:
        stop.set()
        thread.join()
    assert set(answers) == {SERVERS[0]}


def _keep_connecting(answers: list[str], stop: threading.Event) -> None:
    """Make about 200 connections a second."""
    while not stop.wait(0.005):
        try:
            with socket.create_connection((CLUSTER_IP, 80), 1) as client:
                client.settimeout(1)
                answers.append(client.recv(100).decode().split(":")[0])
        except OSError as error:
            answers.append(repr(error))


def test_a_ledger_that_cannot_be_read_is_a_sentence(world: World) -> None:
    broken = world.root / "broken"
    broken.mkdir(exist_ok=True)
    for file in (world.root / "state").glob("*.db"):
        (broken / file.name).write_bytes(b"no database" * 1000)
    command = world.command("--metrics-bind-address", "", "--healthz-bind-address", "")
    command[command.index("--state-dir") + 1] = str(broken)
    command[command.index("--socket") + 1] = str(broken / "sock")
    ended = netns.run(
        world.node, lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("podwire: ledger ")
    assert len(ended.stderr.splitlines()) == 1


def test_the_things_of_others_are_as_they_were(world: World) -> None:
    """The last test here: after all of the above."""
    now = foreign(world)
    assert "ip daddr 10.9.9.9 drop" in now[0]
    assert "10.1.1.1" in now[0]
    assert "tcp dport 80 accept" in now[1]
    assert {line.split()[0] for line in now[2].splitlines()} == {"default", "10.100.0.0/16"}
