"""podwire-uninstall: a node is as it was, and what others have there stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cni import install
from cni.wiring import ensure_bridge
from netlink import netns
from netlink.requests import ROUTE_PROTOCOL
from tests.cni.world import BRIDGED, CIDRS, CONFIG, Node, links, routes

SCRIPT = Path(__file__).parents[2] / "deploy/image/podwire-uninstall"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OTHERS = """
nft add table ip someone
nft add table ip podwire
nft add table ip6 podwire
ip link add name other0 type bridge
ip link set lo up
ip route add unreachable 10.9.0.0/16 proto 112
ip -6 route add unreachable fd00:9::/64 proto 112
ip route add unreachable 10.8.0.0/16 proto 200
"""


def inside(node: Node, *command: str) -> str:
    """Run a command in the node's network, with the /sys of that."""
    words = ["ip", "netns", "exec", node.namespace, *command]
    done = subprocess.run(words, env={"PATH": PATH}, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_takes_all_of_podwire_and_nothing_of_others_and_can_be_repeated(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node = Node(namespaces, tmp_path / "var/lib/podwire", BRIDGED)
    netns.run(node.namespace, ensure_bridge, CIDRS)
    code, result = node.cni("ADD", "c1")
    assert code == 0, result
    inside(node, "sh", "-ec", OTHERS)
    conflist = install.install_conflist(tmp_path / "etc/cni/net.d")
    other = conflist.with_name("99-other.conflist")
    other.touch()
    install.write_binary(tmp_path / "opt/cni/bin", f"#!/bin/sh\n# {CONFIG}\n")
    (tmp_path / "opt/podwire/lib" / f"plugin-{'0' * 16}").mkdir(parents=True)
    (tmp_path / "run/podwire").mkdir(parents=True)

    told = inside(node, str(SCRIPT), str(tmp_path))
    assert {"table ip podwire", "table ip podwire_pods", "interface podwire0"} <= {*told.splitlines()}
    assert {link.name for link in netns.run(node.namespace, links)} == {"lo", "other0"}
    assert inside(node, "nft", "list", "tables") == "table ip someone\n"
    assert netns.run(node.namespace, routes, ROUTE_PROTOCOL) == ()
    assert [r.destination for r in netns.run(node.namespace, routes, 200)] == ["10.8.0.0/16"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    assert list(tmp_path.rglob("*podwire*")) == []
    assert inside(node, str(SCRIPT), str(tmp_path)) == ""
