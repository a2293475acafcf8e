"""A node that podwire leaves is as it was: compared as a whole, beside things of others that look alike."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni import sysctls
from cni.plugin import Plugin, ledger_of
from cni.wiring import BRIDGE_FILTERS, HOST_PREFIX
from ipam.ledger import State
from lab.probe import wait_status
from netlink import netns
from netlink.conntrack import IPS_DST_NAT, Conntrack, Flow, Tuple
from netlink.family import Family
from netlink.requests import Route, proxy_add, route_replace
from netlink.rtnl import Rtnl
from node import underlay
from node.uninstall_flows import ours
from tests.cni.world import request_env, stdin
from tests.node.world import (
    CLUSTER_IP,
    NODE,
    NODES,
    PEER,
    SERVERS,
    STATIC,
    World,
    _configure_node,
    _configure_peer,
    ended,
    podwire,
    service,
    wait_until,
)
from tests.proxy.world import answering

BOTH = NODES.replace("[10.244.1.0/24]", "[10.244.1.0/24, 'fd00:244:1::/64']")
FLAT = ("--mode", "flat", "--flat-addresses", "192.168.50.100-192.168.50.110,fd00:50::100-fd00:50::110")
MODES = {"routed": (), "bridge": ("--mode", "bridge"), "flat": FLAT}
OTHERS = """
nft add table inet podwire
nft add table ip podwire_too
nft add table ip6 someone
nft 'add chain ip6 someone c { type nat hook prerouting priority -100 ; }'
ip link add name pwother type veth peer name theirs1
ip link add name podwire00 type veth peer name theirs2
ip link set podwire00 up && ip link set theirs2 up
ip address add 10.77.0.1/24 dev podwire00
ip route add unreachable 10.244.9.0/24 metric 50 proto 200
ip route add 10.88.0.0/16 dev podwire00 proto 200
ip -6 route add unreachable fd00:9::/64 proto 200
ip route add 10.89.0.0/16 dev podwire00 table 112
ip rule add from 10.89.0.0/16 table 112
ip neigh add proxy 192.168.50.200 dev eth0
ip neigh add proxy 192.168.50.105 dev podwire00
ip neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev podwire00 nud permanent
"""
PASSING = "net.netfilter.nf_conntrack_count "
"""What changes by itself."""


def shell(world: World, script: str) -> None:
    world.run("sh", "-ec", script)


def everything(world: World) -> dict[str, Any]:
    """Return all that can be told of a node's network, without what changes by itself."""
    found: dict[str, Any] = {"nft": world.run("nft", "list", "ruleset").splitlines()}
    for family in ("-4", "-6"):
        for what in (
            "address",
            "rule",
            "route show table all",
            "neigh show nud permanent",
            "neigh show proxy",
        ):
            words = what.split()
            answer = json.loads(world.run("ip", family, "-j", *words) or "[]")
            found[f"{family} {what}"] = sorted(json.dumps(entry, sort_keys=True) for entry in answer)
    links = json.loads(world.run("ip", "-j", "link"))
    found["link"] = sorted(json.dumps(entry, sort_keys=True) for entry in links)
    lines = world.run("sh", "-c", "sysctl -a -r '^net' 2>/dev/null").splitlines()
    found["sysctl"] = sorted(line for line in lines if not line.startswith(PASSING))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what is gone and what is new, by kind."""
    return {
        kind: (sorted({*before[kind]} - {*after[kind]}), sorted({*after[kind]} - {*before[kind]}))
        for kind in before
        if before[kind] != after[kind]
    }


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    """A node that has never seen podwire, things of others on it, and a peer with the servers."""
    made = World(namespaces(), namespaces(), namespaces(), tmp_path)
    made.manifests.mkdir()
    for name in (made.node, made.peer):
        netns.run(name, Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text, "0")
    with netns.opened(made.peer) as peer:
        netns.run(made.node, _configure_node, peer)
    netns.run(made.peer, _configure_peer)
    for filter_ in BRIDGE_FILTERS:
        netns.run(made.node, filter_.write_text, "0")
    shell(made, f"ip address add fd00:50::11/64 dev eth0 nodad; {OTHERS}")
    wait_until(
        lambda: made.run("ip", "-6", "route", "show", "table", "local").count("local fe80:") == 3, "DAD"
    )
    made.write("nodes.yaml", BOTH)
    made.write("web.yaml", service())
    with ended(made):
        yield made


def launch(world: World, *options: str) -> None:
    """Start the daemon, noting sysctls."""
    world.options = ("--conntrack-tcp-be-liberal", *options)
    command = world.command()
    world.starts += 1
    with (world.root / f"log{world.starts}").open("wb") as log:
        world.daemon = netns.run(world.node, lambda: subprocess.Popen(command, stdout=log, stderr=log))
    assert wait_status(world.node, 10256, "/healthz", time.monotonic() + 10), world.log


def noting(directory: Path, path: Path, value: str) -> None:
    """Set a sysctl as the daemon does."""
    sysctls.keep_in(directory)
    try:
        sysctls.put(path, value)
    finally:
        sysctls.keep_in(None)


def cni(world: World, command: str, container: str, namespace: str, **config: Any) -> None:
    """Do what a runtime does while the daemon is away."""
    state = world.root / "state"
    env = request_env(command, container, str(netns.path(namespace)))
    with ledger_of(state) as ledger:
        code, out = netns.run(world.node, Plugin(ledger, state).handle, env, stdin(**config))
    assert code == 0, out


def cleanup(world: World, *words: str) -> tuple[int, str, str]:
    places = ["--state-dir", str(world.root / "state"), "--socket", str(world.socket)]
    places += ["--bin-dir", str(world.root / "bin"), "--conf-dir", str(world.root / "conf")]
    return netns.run(world.node, podwire, "cleanup", "--podwire", *places, *words)


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


def test_forwarding_stays_on_and_what_depends_on_it_unless_asked_for(world: World) -> None:
    launch(world)
    world.stop()
    out = cleanup(world, "--yes")[1]
    kept = "stays 1, it was 0: other networks may need that by now; --stop-forwarding sets it back"
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        assert f"note: {name} {kept}\n" in out
        assert world.run("sysctl", "-n", name) == "1\n"
    assert "removed net.netfilter.nf_conntrack_tcp_be_liberal = 1: 0 as before\n" in out
    assert "removed net.ipv4.ip_forward = 1: 0 as before\n" in cleanup(world, "--yes", "--stop-forwarding")[1]
    assert world.run("sysctl", "-n", "net.ipv4.ip_forward") == "0\n"


def test_what_somebody_else_set_meanwhile_stays(world: World) -> None:
    liberal, accept_ra = "net.netfilter.nf_conntrack_tcp_be_liberal", "net.ipv6.conf.eth0.accept_ra"
    redirects = "net.ipv4.conf.all.accept_redirects"
    shell(world, f"sysctl -qw {redirects}=0")
    netns.run(world.node, noting, world.root / "state", Path("/proc/sys/net/ipv6/conf/eth0/accept_ra"), "2")
    launch(world)
    world.stop()
    shell(world, f"sysctl -qw {liberal}=0 {redirects}=1 {accept_ra}=0")
    out = cleanup(world, "--yes", "--stop-forwarding")[1]
    assert liberal not in out, "it is as before anyway"
    assert f"note: {accept_ra} stays 0, it was 1: somebody else set it, podwire had set 2\n" in out
    assert world.run("sysctl", "-n", redirects, accept_ra) == "1\n0\n"


def test_what_the_kernel_sets_along_with_forwarding_is_as_before(world: World) -> None:
    """A hardened node accepts no redirects; the kernel turns them on whenever forwarding goes off."""
    shell(world, "sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv6.conf.pwother.forwarding=1")
    before = everything(world)
    launch(world)
    world.stop()
    assert cleanup(world, "--yes", "--stop-forwarding", "--state")[0] == 0
    assert differences(before, everything(world)) == {}


def test_a_bridge_of_others_keeps_br_netfilter(world: World) -> None:
    shell(world, "ip link add name cni0 type bridge")
    launch(world, "--mode", "bridge")
    world.stop()
    out = cleanup(world, "--yes")[1]
    name = "net.bridge.bridge-nf-call-iptables"
    assert f"note: {name} stays 1, it was 0: the bridge cni0 may need that\n" in out
    assert "removed interface podwire0\n" in out


def test_router_advertisements_count_as_before_when_forwarding_does(world: World) -> None:
    """While the node forwards, the default route that it was advertised needs accept_ra = 2."""
    state = world.root / "state"
    accept_ra = Path("/proc/sys/net/ipv6/conf/eth0/accept_ra")

    def set_both() -> None:
        sysctls.keep_in(state)
        try:
            sysctls.put(accept_ra, "2")
            assert underlay.forward_packets() == []
        finally:
            sysctls.keep_in(None)

    before = everything(world)
    netns.run(world.node, set_both)
    assert "note: net.ipv6.conf.eth0.accept_ra stays 2, it was 1: " in cleanup(world, "--yes")[1]
    told = cleanup(world, "--yes", "--stop-forwarding")[1].splitlines()
    assert told[-1] == "removed net.ipv6.conf.eth0.accept_ra = 2: 1 as before"
    assert "removed net.ipv6.conf.all.forwarding = 1: 0 as before" in told
    assert differences(before, everything(world)) == {}


def test_an_interface_that_is_gone_is_nothing_to_set_back(world: World) -> None:
    path = Path("/proc/sys/net/ipv6/conf/pwother/proxy_ndp")
    netns.run(world.node, noting, world.root / "state", path, "1")
    shell(world, "ip link delete pwother")
    assert cleanup(world, "--yes") == (0, "nothing of podwire's was found\n", "")


def test_notes_of_another_namespace_or_boot_do_not_count(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note() -> None:
        sysctls.keep_in(tmp_path / "notes")
        try:
            assert underlay.be_liberal() == []
        finally:
            sysctls.keep_in(None)

    netns.run(world.node, note)
    assert [*netns.run(world.node, sysctls.noted, tmp_path / "notes")] == [underlay.TCP_BE_LIBERAL]
    assert netns.run(world.peer, sysctls.noted, tmp_path / "notes") == {}
    file = tmp_path / "notes" / sysctls.FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"boot": "another"}))
    assert netns.run(world.node, sysctls.noted, tmp_path / "notes") == {}
    file.write_text("{")
    assert netns.run(world.node, sysctls.noted, tmp_path / "notes") == {}


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


def test_a_second_cleanup_does_not_undo_what_others_set_after_the_first(world: World) -> None:
    name = "net.netfilter.nf_conntrack_tcp_be_liberal"
    launch(world)
    world.stop()
    cleanup(world, "--yes")
    shell(world, f"sysctl -qw {name}=1")
    cleanup(world, "--yes", "--stop-forwarding")
    assert world.run("sysctl", "-n", name) == "1\n"


def test_it_is_quick_with_many_pods_worth_of_routes(world: World) -> None:
    lines = "\n".join(f"route add unreachable 10.{n // 250}.{n % 250}.0/24 proto 112" for n in range(1000))
    netns.run(world.node, lambda: subprocess.run(["ip", "-b", "-"], input=lines, text=True, check=True))
    start = time.monotonic()
    assert cleanup(world, "--yes")[0] == 0
    assert time.monotonic() - start < 5.0
