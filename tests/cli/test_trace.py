"""`podwire trace` as a person uses it."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from cli import trace
from cli.output import CommandError
from netlink import netns
from netlink.family import Family
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from node.trace.state import State

RULES = """
table ip others { chain fw { type filter hook forward priority 0; tcp dport 81 drop comment "not 81"; }; }
"""


@pytest.fixture(scope="module")
def node(namespaces: Callable[[], str]) -> str:
    """A node with 192.0.2.1 on eth0, and a pod's interface to 10.244.1.2; no daemon runs."""
    name = namespaces()

    def configure() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(veth_add(Veth("eth0", "far")), veth_add(Veth("pwpodx", "pod")))
            index = {link.name: link.index for link in rtnl.links()}
            rtnl.commit(*(link_up(i) for i in index.values()), address_add(index["eth0"], "192.0.2.1/24"))
            rtnl.commit(route_replace(Route("10.244.1.2/32", None, index["pwpodx"])))
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)

    netns.run(name, configure)
    return name


def _run(node: str, tmp_path: Path, *words: str) -> int:
    top = argparse.ArgumentParser()
    trace.add_parser(top.add_subparsers())
    places = ["--socket", str(tmp_path / "none.sock"), "--state-dir", str(tmp_path)]
    args = top.parse_args(["trace", *words, *places])
    return int(netns.run(node, args.run, args))


def test_addresses_are_traced_without_the_daemon(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(node, tmp_path, "--from", "192.0.2.9", "10.244.1.2:80") == 0
    said = capsys.readouterr().out
    assert "eth0 (veth): 192.0.2.9 → 10.244.1.2:80" in said or "eth0: 192.0.2.9 → 10.244.1.2:80" in said
    assert "delivered: the pod at 10.244.1.2" in said
    assert "ip others fw: filter hook forward priority 0, policy accept, 1 rules" in said


def test_what_is_dropped_says_why_and_the_status_is_3(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(node, tmp_path, "192.0.2.9", "10.244.1.2:81") == trace.NOT_ALL
    said = capsys.readouterr().out
    assert "drops it: not 81" in said
    assert "look at: nft list chain ip others fw" in said


def test_json_and_a_picture(node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "way.svg"
    assert _run(node, tmp_path, "node", "10.244.1.2:80", "-o", "json", "--svg", str(drawn)) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["branches"][0]["end"]["packet"]["source"] == "192.0.2.1"
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")


def test_a_state_that_was_saved_stands_for_another_node(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "node.state"
    assert _run(node, tmp_path, "--save-state", str(saved)) == 0
    assert capsys.readouterr().out == ""
    from cli.trace_world import load

    assert [s.family for s in load(saved)] == list(Family)
    saved.write_bytes(b"nonsense")
    with pytest.raises(CommandError, match="is no saved network state"):
        _run(node, tmp_path, "node", "10.244.1.2:80", "--state", f"node2={saved}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("node",), "trace needs FROM and TO"),
        (("--from", "192.0.2.9"), "trace needs FROM and TO"),
        (("node", "shop/db"), "the daemon, which knows services, does not answer"),
        (("node", "10.244.1.2"), "'10.244.1.2' needs a port"),
        (("shop/a", "10.244.1.2:80"), "no pod 'shop/a' is known on this node"),
        (("198.51.100.1", "10.244.1.2:80"), "has no route to 198.51.100.1: say with --interface"),
        (("192.0.2.9", "10.244.1.2:80", "--interface", "eth7"), "has no interface eth7"),
        (
            ("node", "10.244.1.2:80", "--endpoint", "10.1.1.1"),
            "they lead to 10.244.1.2:80",
        ),
        (("node", "10.244.1.2:80", "--state", "node2"), "--state 'node2' must be NODE=FILE"),
        (("192.0.2.9", "10.244.1.2:80", "--live"), "--live cannot send from 192.0.2.9"),
        (("node", "10.244.1.2:80", "--lab", "nolab9"), "there is no lab named 'nolab9'"),
    ],
)
def test_what_cannot_be_traced_is_a_sentence(
    node: str, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(CommandError) as refused:
        _run(node, tmp_path, *words)
    assert sentence in str(refused.value)


def test_another_node_is_asked_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ssh` would run `podwire trace --save-state -` there; a node that fails is a sentence."""
    from cli import trace_world

    saved = tmp_path / "node2.state"
    saved.write_bytes(msgspec.msgpack.encode([State("node2", Family.V4)]))
    monkeypatch.setattr(trace_world, "ASK", ())
    (state,) = trace_world.fetch(f"cat {tmp_path}/{{node}}.state", "node2")
    assert state.node == "node2"
    with pytest.raises(CommandError, match=r"node3 answers with exit status 1: .*No such file"):
        trace_world.fetch(f"cat {tmp_path}/{{node}}.state", "node3")
    with pytest.raises(CommandError, match="--over cannot ask node2"):
        trace_world.fetch("/nowhere/ssh {node}", "node2")
