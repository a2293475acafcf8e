"""`podwire ipam`: shown, checked and released with and without a daemon."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPNetwork

from cni.plugin import Plugin, ledger_of
from cni.settings import Mode, NodeSettings
from ipam.pools import IpamConfig
from netlink import netns
from tests.cni.world import Node, assert_consistent, stdin
from tests.node.world import podwire

CONFIG = IpamConfig.parse(
    {
        "pools": [{"name": "dmz", "ranges": ["10.1.0.64/28"], "namespaces": ["edge"]}],
        "exclude": ["10.1.0.3"],
        "reserve": ["10.1.0.4"],
    }
)
SETTINGS = NodeSettings(Mode.ROUTED, 1400, (IPNetwork("10.1.0.0/24"),), CONFIG)
KEEP = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"podwire.io/sticky": "1h"}}}


@pytest.fixture
def node(namespaces: Callable[[], str], tmp_path: Path) -> Node:
    return Node(namespaces, tmp_path, SETTINGS)


def ipam(node: Node, *words: str) -> tuple[int, str, str]:
    more = ["--cri", ""] if words[0] == "check" else []
    return netns.run(node.namespace, podwire, "ipam", *words, *more, "--state-dir", str(node.state_dir))


def add(node: Node, pod: str, container: str, **config: Any) -> None:
    namespace, name = pod.split("/")
    env = node.env("ADD", container, ARGS=f"K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}")
    with ledger_of(node.state_dir) as ledger:
        code, answer = node.handle(Plugin(ledger, node.state_dir), env, stdin(**config))
    assert code == 0, answer


def test_show_tells_how_full_each_range_is_and_who_has_what(node: Node) -> None:
    add(node, "shop/web-0", "c1")
    add(node, "edge/proxy", "c2")
    code, out, _ = ipam(node, "show")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["RANGE", "FAMILY", "CAPACITY", "USED", "FREE"]
    assert lines[1] == ["10.1.0.0/24", "IPv4", "235", "1", "234", "0", "0", "0", "1", "1"]
    assert lines[2] == ["dmz", "IPv4", "16", "1", "15", "0", "0", "0", "0", "0"]
    assert lines[5][:5] == ["10.1.0.2", "attached", "shop/web-0", "eth0", "c1"]
    assert lines[6][:5] == ["10.1.0.64", "attached", "edge/proxy", "eth0", "c2"]


def test_show_as_json_has_ranges_and_addresses(node: Node) -> None:
    add(node, "db/pg-0", "c1", **KEEP)
    node.cni("DEL", "c1")
    code, out, _ = ipam(node, "show", "-o", "json")
    found = json.loads(out)
    assert (code, found["ranges"][0]["kept"], found["ranges"][0]["used"]) == (0, 1, 0)
    (address,) = found["addresses"]
    assert (address["address"], address["pod"]) == ("10.1.0.2", "db/pg-0")
    assert address["state"].startswith("kept until ")


def test_check_is_quiet_about_a_node_in_order_and_fails_otherwise(node: Node) -> None:
    add(node, "shop/web-0", "c1")
    assert ipam(node, "check") == (0, "1 attachments: ledger and kernel agree\n", "")
    netns.delete(node.pods.pop("c1"))
    code, out, _ = ipam(node, "check")
    assert code == 1
    assert out.startswith("shop/web-0 (10.1.0.2): its network namespace ")
    code, out, _ = ipam(node, "check", "-o", "json")
    assert (code, [row["pod"] for row in json.loads(out)]) == (1, ["shop/web-0"])


@pytest.mark.parametrize("what", ["c1", "10.1.0.2"])
def test_release_takes_everything_of_the_pod_back(node: Node, what: str) -> None:
    add(node, "shop/web-0", "c1")
    code, out, _ = ipam(node, "release", what)
    assert (code, out) == (0, "released 10.1.0.2 of interface 'eth0' of container 'c1'\n")
    assert_consistent(node, set())


def test_release_ends_the_claim_to_a_kept_address(node: Node) -> None:
    add(node, "db/pg-0", "c1", **KEEP)
    node.cni("DEL", "c1")
    assert ipam(node, "release", "10.1.0.2") == (0, "10.1.0.2 is kept for nobody any more\n", "")
    code, _, err = ipam(node, "release", "10.1.0.2")
    assert (code, err) == (1, "podwire: nothing in the ledger has the address or container id '10.1.0.2'\n")


def test_without_a_ledger_every_command_says_so(tmp_path: Path) -> None:
    for words in (("show",), ("check", "--cri", ""), ("release", "x")):
        code, _, err = podwire("ipam", *words, "--state-dir", str(tmp_path))
        assert code == 1
        assert (
            err
            == f"podwire: {tmp_path / 'ledger.db'} is not there: no daemon has run with this --state-dir\n"
        )


def test_before_the_first_sync_there_is_no_range(namespaces: Callable[[], str], tmp_path: Path) -> None:
    node = Node(namespaces, tmp_path, settings=None)
    node.cni("DEL", "c1")
    assert ipam(node, "show")[:2] == (0, "no range is known: the daemon has not synced yet\n")


def test_a_runtime_that_does_not_answer_is_a_sentence(node: Node, tmp_path: Path) -> None:
    add(node, "shop/web-0", "c1")
    words = ("check", "--cri", str(tmp_path / "none.sock"), "--state-dir", str(node.state_dir))
    code, _, err = podwire("ipam", *words)
    assert (code, err) == (1, f"podwire: no container runtime answers on {tmp_path / 'none.sock'}\n")


def test_a_mode_that_was_changed_does_not_matter(node: Node) -> None:
    add(node, "shop/web-0", "c1")
    with ledger_of(node.state_dir) as ledger:
        ledger.save_settings(replace(SETTINGS, mode=Mode.BRIDGE).to_mapping())
    assert ipam(node, "check")[0] == 0
