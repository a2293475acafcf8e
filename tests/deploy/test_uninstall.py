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
from node.uninstall import DROP_INS
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


def run(node: Node, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the node's network, with the /sys of that."""
    words = ["ip", "netns", "exec", node.namespace, *command]
    return subprocess.run(words, env={"PATH": PATH}, capture_output=True, text=True, check=False, timeout=60)


def inside(node: Node, *command: str) -> str:
    """Run a command that succeeds; return what it prints."""
    done = run(node, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(namespaces: Callable[[], str], root: Path) -> tuple[Node, Path]:
    """A node with podwire as a container installs it, a pod, and things of others; a conflist of theirs."""
    node = Node(namespaces, root / "var/lib/podwire", BRIDGED)
    netns.run(node.namespace, ensure_bridge, CIDRS)
    code, result = node.cni("ADD", "c1")
    assert code == 0, result
    inside(node, "sh", "-ec", OTHERS)
    conflist = install.install_conflist(root / "etc/cni/net.d")
    other = conflist.with_name("99-other.conflist")
    other.touch()
    install.write_binary(root / "opt/cni/bin", f"#!/bin/sh\n# {CONFIG}\n")
    (root / "opt/podwire/lib" / f"plugin-{'0' * 16}").mkdir(parents=True)
    (root / "run/podwire").mkdir(parents=True)
    for path in DROP_INS:
        (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to("/")).touch()
    return node, other


def test_it_takes_all_of_podwire_and_nothing_of_others_and_can_be_repeated(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node, other = made(namespaces, tmp_path)
    words = (str(SCRIPT), str(tmp_path), "--with-pods")

    told = inside(node, *words)
    for what in (
        "table ip podwire of nftables",
        "table ip podwire_pods of",
        "interface podwire0",
        "pod c1 with",
    ):
        assert f"removed {what}" in told
    assert f"removed plugin {other.with_name(install.CONFLIST)}, {tmp_path / 'opt/cni/bin/podwire'}, " in told
    assert {link.name for link in netns.run(node.namespace, links)} == {"lo", "other0"}
    assert inside(node, "nft", "list", "tables") == "table ip someone\n"
    assert netns.run(node.namespace, routes, ROUTE_PROTOCOL) == ()
    assert [r.destination for r in netns.run(node.namespace, routes, 200)] == ["10.8.0.0/16"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    assert list(tmp_path.rglob("*podwire*")) == []
    assert inside(node, *words) == "nothing of podwire's was found\n"


def test_while_a_pod_is_attached_it_changes_nothing_and_says_which(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node, _ = made(namespaces, tmp_path)
    before = {*tmp_path.rglob("*")}
    done = run(node, str(SCRIPT), str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "podwire: pods are attached and would lose their network: c1 (10.1.0.2, " in done.stderr
    assert {*tmp_path.rglob("*")} == before
    assert "table ip podwire_pods\n" in inside(node, "nft", "list", "tables")


def test_what_others_have_in_podwire_s_folders_stays(namespaces: Callable[[], str], tmp_path: Path) -> None:
    """A lab, whose folder is in /run/podwire; an environment in /opt/podwire."""
    node, _ = made(namespaces, tmp_path)
    mine = [tmp_path / "run/podwire/lab/demo/lab.json", tmp_path / "opt/podwire/bin/podwire"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    inside(node, str(SCRIPT), str(tmp_path), "--with-pods")
    assert [path.exists() for path in mine] == [True, True]
