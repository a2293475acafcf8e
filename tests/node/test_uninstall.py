"""A node that podwire leaves is as it was: compared as a whole, beside things of others that look alike."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni.plugin import Plugin, ledger_of
from cni.wiring import HOST_PREFIX
from ipam.ledger import State
from netlink import netns
from netlink.conntrack import IPS_DST_NAT, Conntrack, Flow, Tuple
from netlink.family import Family
from netlink.requests import Route, proxy_add, route_replace
from netlink.rtnl import Rtnl
from node.uninstall_flows import ours
from tests.cni.world import request_env, stdin
from tests.node.whole import FLAT, cleanup, differences, everything, launch, shell, untouched
from tests.node.world import (
    CLUSTER_IP,
    NODE,
    PEER,
    SERVERS,
    STATIC,
    World,
    service,
)
from tests.proxy.world import answering

VXLAN = ("--backend", "vxlan")
MODES = {
    "routed": (),
    "bridge": ("--mode", "bridge"),
    "flat": FLAT,
    "tunnelled": VXLAN,
    "tunnelled-bridge": ("--mode", "bridge", *VXLAN),
}


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    with untouched(namespaces, tmp_path) as made:
        yield made


def cni(world: World, command: str, container: str, namespace: str, **config: Any) -> None:
    """Do what a runtime does while the daemon is away."""
    state = world.root / "state"
    env = request_env(command, container, str(netns.path(namespace)))
    with ledger_of(state) as ledger:
        code, out = netns.run(world.node, Plugin(ledger, state).handle, env, stdin(**config))
    assert code == 0, out


def host_port(port: int) -> dict[str, Any]:
    mapping = {"hostPort": port, "containerPort": 80, "protocol": "tcp"}
    return {"runtimeConfig": {"portMappings": [mapping]}}


@pytest.mark.parametrize("mode", MODES)
def test_the_node_is_as_it_was(world: World, namespaces: Callable[[], str], mode: str) -> None:
    before = everything(world)
    launch(world, *MODES[mode])
    pods = [namespaces() for _ in range(3)]
    for number, pod in enumerate(pods[:2]):
        cni(world, "ADD", f"c{number}", pod, **host_port(8000 + number))
    cni(world, "DEL", "c0", pods[0])
    assert world.stop() == 0
    cni(world, "ADD", "c2", pods[2], **host_port(8002))
    assert len(differences(before, everything(world))) > 5, "there is something to be compared"
    assert ("dev pwvxlan4" in world.run("ip", "route")) == mode.startswith("tunnelled")

    status, out, err = cleanup(world, "--state", "--with-pods", "--stop-forwarding", "--yes")
    assert (status, err) == (0, "")
    assert differences(before, everything(world)) == {}
    assert not (world.root / "state").exists()
    assert len([line for line in out.splitlines() if line.startswith("removed pod ")]) == 2
    assert cleanup(world, "--all", "--stop-forwarding", "--yes") == (
        0,
        "nothing of podwire's was found\n",
        "",
    )
    assert differences(before, everything(world)) == {}


def test_a_dry_run_says_the_same_and_changes_nothing(world: World, namespaces: Callable[[], str]) -> None:
    launch(world)
    world.stop()
    cni(world, "ADD", "c1", namespaces())
    before = everything(world)
    options = ("--state", "--with-pods", "--stop-forwarding")
    status, dry, err = cleanup(world, *options, "--dry-run")
    assert (status, err) == (0, "")
    assert differences(before, everything(world)) == {}
    with ledger_of(world.root / "state") as ledger:
        assert len(ledger.attachments(State.ATTACHED)) == 1
    assert cleanup(world, *options, "--yes")[1] == dry.replace("would remove ", "removed ")


def test_while_the_daemon_runs_it_refuses_but_with_force(world: World) -> None:
    launch(world)
    before = everything(world)
    sentence = f"the daemon runs (it answers on {world.socket}) and would make it all again"
    assert cleanup(world, "--yes") == (1, "", f"podwire: {sentence}: stop it, or use --force\n")
    assert differences(before, everything(world)) == {}
    assert "note: the daemon runs; without --force nothing is removed\n" in cleanup(world, "--dry-run")[1]
    status, out, _ = cleanup(world, "--yes", "--force")
    assert (status, "removed table ip podwire of nftables" in out) == (0, True)


def test_while_pods_are_attached_it_refuses_and_says_which(
    world: World, namespaces: Callable[[], str]
) -> None:
    launch(world)
    world.stop()
    cni(world, "ADD", "c1", namespaces())
    before = everything(world)
    status, out, err = cleanup(world, "--all", "--yes")
    assert (status, out) == (1, "")
    told = "podwire: pods are attached and would lose their network: c1 (10.244.1.2, fd00:244:1::2)"
    assert err == f"{told}; take them off first (kubectl drain), or use --with-pods\n"
    assert differences(before, everything(world)) == {}


def test_a_pod_that_the_ledger_does_not_know_counts_as_well(world: World) -> None:
    name = f"{HOST_PREFIX}0123456789"
    shell(world, f"ip link add {name} type veth peer name inside")
    status, _, err = cleanup(world, "--yes")
    assert (status, name in err) == (1, True)
    assert cleanup(world, "--yes", "--with-pods") == (0, f"removed interface {name}\n", "")


def test_a_ledger_that_cannot_be_read_keeps_nothing_from_going(
    world: World, namespaces: Callable[[], str]
) -> None:
    launch(world)
    world.stop()
    cni(world, "ADD", "c1", namespaces())
    (world.root / "state/ledger.db").write_bytes(b"no database" * 1000)
    assert cleanup(world, "--yes")[0] == 1
    status, out, err = cleanup(world, "--yes", "--with-pods", "--state")
    assert (status, err) == (0, "")
    assert "note: which pods there are is told by interfaces only: ledger " in out
    assert not (world.root / "state").exists()
    assert HOST_PREFIX not in world.run("ip", "link")


def test_what_flat_mode_answers_for_without_a_pod_goes_too(world: World) -> None:
    launch(world, *FLAT)
    world.stop()
    before = everything(world)

    def crash() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(proxy_add(socket.if_nametoindex("eth0"), "192.168.50.101"))

    netns.run(world.node, crash)
    assert "removed answers for 192.168.50.101 on eth0\n" in cleanup(world, "--yes")[1]
    assert before["-4 neigh show proxy"] == everything(world)["-4 neigh show proxy"]


def flows(where: str) -> tuple[Flow, ...]:
    def read() -> tuple[Flow, ...]:
        with Conntrack() as entries:
            return entries.flows(Family.V4)

    return netns.run(where, read)


def test_flows_without_an_end_are_forgotten_and_tcp_connections_go_on(
    world: World, namespaces: Callable[[], str]
) -> None:
    listeners = netns.run(world.peer, lambda: [socket.create_server((a, 8080)) for a in (*SERVERS, PEER)])
    dns = service("dns", "10.96.0.53").replace("port: 80}", "port: 53, protocol: UDP}")
    world.write("dns.yaml", dns.replace("port: 8080}", "port: 53, protocol: UDP}"))
    with answering(listeners), contextlib.ExitStack() as stack:
        launch(world)
        shell(
            world, "nft add table ip mine; nft 'add chain ip mine o { type nat hook output priority -110 ; }'"
        )
        shell(world, f"nft add rule ip mine o ip daddr 10.99.0.1 tcp dport 80 dnat to {PEER}:8080")

        def connect() -> None:
            for address, port in ((CLUSTER_IP, 80), ("10.99.0.1", 80), (PEER, 8080)):
                stack.enter_context(socket.create_connection((address, port), 2))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"?", ("10.96.0.53", 53))

        netns.run(world.node, connect)
        there = {CLUSTER_IP, "10.99.0.1", PEER}
        assert {f.original.destination for f in flows(world.node)} >= {"10.96.0.53", *there}
        world.stop()
        out = cleanup(world, "--yes")[1]
        assert "removed 1 tracked flow to services and host ports\n" in out
        left = {f.original.destination for f in flows(world.node)}
        assert "10.96.0.53" not in left
        assert left >= there


def test_whose_connections_are_ours() -> None:
    targets = frozenset(
        {(Family.V4, 6, "10.96.0.1", 80), (Family.V4, 17, "10.96.0.1", 53), (Family.V4, 17, "", 30053)}
    )

    def flow(protocol: int, destination: str, port: int) -> Flow:
        there = Tuple("192.0.2.1", destination, 40000, port)
        back = Tuple("10.244.2.10", "192.0.2.1", 8080, 40000)
        return Flow(Family.V4, protocol, there, back, status=IPS_DST_NAT)

    local = frozenset({NODE})
    mine = [(17, "10.96.0.1", 53), (17, NODE, 30053), (17, "127.0.0.1", 30053)]
    theirs = [(17, "10.96.0.1", 80), (6, "10.96.0.1", 80), (17, "192.0.2.9", 30053), (6, NODE, 30053)]
    assert [ours(flow(*some), targets, local) for some in mine] == [True] * 3
    assert [ours(flow(*some), targets, local) for some in theirs] == [False] * 4
    assert not ours(replace(flow(*mine[0]), status=0), targets, local)
    assert not ours(replace(flow(*mine[0]), zone=7), targets, local)


def test_a_folder_with_something_else_in_it_stays(world: World) -> None:
    launch(world)
    world.stop()
    mine = world.root / "state/mine"
    mine.touch()
    assert cleanup(world, "--yes", "--state")[0] == 0
    assert [*(world.root / "state").iterdir()] == [mine]


def test_a_route_of_others_with_a_destination_of_ours_stays(world: World) -> None:
    """The same destination, another number and metric; and ours to the same."""

    def both() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(route_replace(Route("10.66.0.0/16", gateway=PEER)))
            rtnl.commit(route_replace(Route("10.67.0.0/16", gateway=PEER, protocol=STATIC)))

    netns.run(world.node, both)
    shell(world, f"ip route add 10.66.0.0/16 via {PEER} metric 7 proto 200")
    assert cleanup(world, "--yes") == (0, f"removed route to 10.66.0.0/16 via {PEER}\n", "")
    assert world.run("ip", "route", "show", "10.66.0.0/16").split()[-2:] == ["metric", "7"]
    assert world.run("ip", "route", "show", "10.67.0.0/16")


def test_nobody_to_ask_is_a_sentence_and_the_answer_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(world, "nft add table ip podwire")
    status, out, err = cleanup(world)
    assert (status, out) == (1, "")
    assert err.startswith("podwire: nobody can be asked here whether to remove it: use --yes")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, expected in (("", 1), ("n", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert cleanup(world)[0] == expected
        assert ("table ip podwire\n" in world.run("nft", "list", "tables")) == bool(expected)


TUNNELLED = """
ip link add name pwvxlan4 address 02:00:00:00:0a:01 type vxlan id 112 dstport 8472 local 192.168.50.11
ip link set pwvxlan4 up
ip address add 10.244.1.0/32 dev pwvxlan4
bridge fdb append 02:00:00:00:0a:02 dev pwvxlan4 dst 192.168.50.12
ip neigh add 10.244.2.0 lladdr 02:00:00:00:0a:02 dev pwvxlan4 nud permanent
ip route add 10.244.2.0/24 via 10.244.2.0 dev pwvxlan4 onlink src 10.244.1.0 proto 112
ip route add 192.168.50.12 via 10.244.2.0 dev pwvxlan4 onlink table 112 proto 112
ip rule add from 10.244.1.0/24 lookup 112 pref 112 protocol 112
ip -6 rule add from fd00:244:1::/64 lookup 112 pref 112 protocol 112
ip route add 192.168.60.0/24 via 192.168.50.12 table 112 proto 112
ip route add unreachable 10.244.1.0/24 metric 4278198272 proto 112
ip -6 route add unreachable fd00:244:1::/64 metric 4278198272 proto 112
ip address add 10.244.1.0/32 dev lo scope host
ip address add fd00:244:1::/128 dev lo preferred_lft 0 nodad
nft add table ip podwire_tunnels
nft add table ip6 podwire_tunnels
"""
"""What a daemon leaves behind, by hand: whichever version made it, and whatever became of its ledger."""


def test_what_is_left_of_tunnels_goes_without_a_ledger_and_what_looks_alike_stays(world: World) -> None:
    alike = """
        ip address add 10.244.1.1/32 dev lo; ip address add 10.244.9.0/32 dev lo
        ip link add name pwvxlan41 type veth peer name theirs3; nft add table inet podwire_tunnels
        ip rule add from 10.244.1.0/24 lookup 112 pref 113
    """
    shell(world, alike)
    before = everything(world)
    shell(world, TUNNELLED)
    status, out, err = cleanup(world, "--yes")
    assert (status, err) == (0, "")
    assert differences(before, everything(world)) == {}
    assert out.splitlines() == [
        "removed table ip podwire_tunnels of nftables with 0 chains",
        "removed table ip6 podwire_tunnels of nftables with 0 chains",
        "removed policy rule from 10.244.1.0/24 to table 112",
        "removed policy rule from fd00:244:1::/64 to table 112",
        "removed route to 10.244.1.0/24",
        "removed route to fd00:244:1::/64",
        "removed route to 192.168.60.0/24 via 192.168.50.12 in table 112",
        "removed address 10.244.1.0/32 of lo",
        "removed address fd00:244:1::/128 of lo",
        "removed interface pwvxlan4",
    ]


def test_it_is_quick_with_many_pods_worth_of_routes(world: World) -> None:
    lines = "\n".join(f"route add unreachable 10.{n // 250}.{n % 250}.0/24 proto 112" for n in range(1000))
    netns.run(world.node, lambda: subprocess.run(["ip", "-b", "-"], input=lines, text=True, check=True))
    start = time.monotonic()
    assert cleanup(world, "--yes")[0] == 0
    assert time.monotonic() - start < 5.0
