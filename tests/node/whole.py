"""A node that has never seen podwire, compared as a whole beside things of others that look alike."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cni import sysctls
from cni.wiring import BRIDGE_FILTERS
from lab.probe import wait_status
from netlink import netns
from tests.node.world import (
    NODES,
    World,
    _configure_node,
    _configure_peer,
    ended,
    podwire,
    service,
    wait_until,
)

BOTH = NODES.replace("[10.244.1.0/24]", "[10.244.1.0/24, 'fd00:244:1::/64']")
FLAT = ("--mode", "flat", "--flat-addresses", "192.168.50.100-192.168.50.110,fd00:50::100-fd00:50::110")
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


@contextlib.contextmanager
def untouched(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    """Make a node that has never seen podwire, things of others on it, and a peer with the servers."""
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


def cleanup(world: World, *words: str) -> tuple[int, str, str]:
    places = ["--state-dir", str(world.root / "state"), "--socket", str(world.socket)]
    places += ["--bin-dir", str(world.root / "bin"), "--conf-dir", str(world.root / "conf")]
    return netns.run(world.node, podwire, "cleanup", "--podwire", *places, *words)
