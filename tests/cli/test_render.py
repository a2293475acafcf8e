"""`podwire render`: the daemon's frontends and ruleset of a folder, without a daemon or a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from node import masquerade
from node.sources.manifests import ManifestFolder
from node.store import Store
from proxy.frontends import frontends
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import TABLE
from proxy.topology import Place
from tests.netlink.nft import nft
from tests.node.world import NODES, podwire, service

DUAL_STACK = """
kind: Node
metadata: {name: node1, labels: {topology.kubernetes.io/zone: here}}
spec: {podCIDRs: [10.244.1.0/24, "fd44:0:0:1::/64"]}
status: {addresses: [{type: InternalIP, address: 192.168.50.11}, {type: InternalIP, address: "fd50::11"}]}
---
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd96::1"]
  externalTrafficPolicy: Local
  ports: [{port: 80, nodePort: 30080}]
---
kind: EndpointSlice
metadata: {name: web-4, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- {addresses: [10.244.1.10], nodeName: node1, hints: {forZones: [{name: here}]}}
- {addresses: [10.244.2.10], nodeName: node2, hints: {forZones: [{name: there}]}}
---
kind: EndpointSlice
metadata: {name: web-6, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{port: 8080}]
endpoints: [{addresses: ["fd44:0:0:1::a"], nodeName: node1}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "all.yaml").write_text(DUAL_STACK)
    return tmp_path


def render(folder: Path, *words: str) -> tuple[int, str, str]:
    return podwire("render", str(folder), "--node-name", "node1", *words)


def elements(ruleset: str, name: str) -> list[str]:
    """The elements of a set or map, as they are printed."""
    block = ruleset.split(f" {name} {{\n")[1].split("\n\t}")[0]
    _, _, found = block.partition("elements = {")
    return [e.strip() for e in found.strip(" }").split(",")] if found else []


def test_the_frontends_then_the_ruleset(folder: Path) -> None:
    status, out, err = render(folder)
    assert (status, err) == (0, "")
    rows, rulesets = out.split("\n\n", 1)
    assert [line.split() for line in rows.splitlines()[:4]] == [
        ["SERVICE", "MATCH", "PROTOCOL", "PORT", "ORIGIN", "ACTION", "MASQUERADE", "ENDPOINTS"],
        ["shop/web", "10.96.0.1", "TCP", "80", "any", "balance", "off-cluster", "10.244.1.10:8080"],
        ["shop/web", "nodeport", "TCP", "30080", "any", "balance", "never", "10.244.1.10:8080"],
        ["shop/web", "nodeport", "TCP", "30080", "internal", "balance", "off-node", "10.244.1.10:8080"],
    ]
    assert "[fd44:0:0:1::a]:8080" in rows
    assert rulesets.startswith("table ip podwire {\n")
    assert "\n}\n\ntable ip6 podwire {\n" in rulesets


def test_nft_makes_of_the_ruleset_what_the_daemon_makes_of_the_folder(
    folder: Path, namespaces: Callable[[], str]
) -> None:
    status, out, err = render(folder, "-o", "nft")
    assert (status, err) == (0, "")

    def from_text() -> str:
        nft("-f", "-", stdin=out)
        return nft("list", "ruleset")

    def from_objects() -> str:
        store = Store()
        store.replace(ManifestFolder(folder).read().objects)
        pending = store.take(0)
        assert pending
        snapshot = pending.snapshot
        (name,) = snapshot.services
        found = frontends(snapshot.services[name], snapshot.slices[name], Place("node1", "here"))
        for family in Family:
            with Nft(family, TABLE) as kernel:
                own = [f for f in found if f.key.family is family]
                Dataplane(kernel).load(own, masquerade.ranges(snapshot.nodes, "node1"))
        return nft("list", "ruleset")

    printed = netns.run(namespaces(), from_text)
    assert printed == netns.run(namespaces(), from_objects)
    assert "".join(printed.split()) == "".join(out.split())


def test_json_has_everything(folder: Path) -> None:
    status, out, _ = render(folder, "-o", "json", "--family", "ipv6")
    found = json.loads(out)
    assert (status, found["node"], found["problems"]) == (0, "node1", [])
    assert found["frontends"][0] == {
        "service": "shop/web",
        "match": "fd96::1",
        "protocol": "TCP",
        "port": 80,
        "origin": "any",
        "action": "balance",
        "masquerade": "off-cluster",
        "endpoints": ["[fd44:0:0:1::a]:8080"],
        "affinity_seconds": 0,
        "restricted": False,
        "sources": [],
    }
    assert len(found["frontends"]) == 3
    assert list(found["ruleset"]) == ["ipv6"]
    assert found["ruleset"]["ipv6"] == render(folder, "-o", "nft", "--family", "ipv6")[1]


def test_an_ipv4_node_has_an_ipv4_table_unless_both_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(NODES + "---" + service())
    assert render(tmp_path, "-o", "nft")[1].count("table ") == 1
    assert render(tmp_path, "-o", "nft", "--family", "both")[1].count("table ") == 2


def test_options_are_those_of_the_daemon(folder: Path) -> None:
    _, plain, _ = render(folder, "-o", "nft", "--family", "ipv4")
    assert elements(plain, "node_port_addresses") == ["192.168.50.11"]
    assert elements(plain, "local_pod_cidrs") == ["10.244.1.0/24"]
    more = (
        "--no-masquerade-cidr",
        "10.0.0.0/8",
        "--masquerade",
        "ipv6",
        "--nodeport-addresses",
        "10.9.0.0/16,::/0",
    )
    _, out, _ = render(folder, "-o", "nft", "--family", "ipv4", *more)
    assert elements(out, "node_port_addresses") == ["10.9.0.0/16"]
    assert elements(out, "local_pod_cidrs") == []
    assert "10.0.0.0/8" in elements(out, "no_masquerade")
    assert render(folder, "-o", "nft", "--family", "ipv4", "--nodeport-addresses", "primary")[1] == plain
    assert elements(plain, "egress") == []
    egress = ("--egress-address", "203.0.113.7", "--egress-address", "2001:db8::7")
    _, out, _ = render(folder, "-o", "nft", "--family", "ipv4", *egress)
    assert elements(out, "egress") == ["10.244.1.0/24 : 203.0.113.7"]


def test_the_same_folder_is_printed_the_same_each_time(tmp_path: Path) -> None:
    many = "---".join(service(f"web{n}", f"10.96.1.{n}", f"10.244.2.{n}") for n in range(1, 40))
    (tmp_path / "all.yaml").write_text(f"{NODES}---{many}")
    command = [sys.executable, "-m", "cli.main", "render", str(tmp_path), "--node-name", "node1"]
    found = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.add(done.stdout)
    assert len(found) == 1


def test_what_is_wrong_is_said_and_the_rest_is_rendered(folder: Path) -> None:
    (folder / "half.yaml").write_text("kind: Service\nmetadata: {name: half}\nspec: {clusterIP: nonsense}\n")
    (folder / "twin.yaml").write_text(service("twin", "10.96.0.1"))
    (folder / "torn.yaml").write_text("kind: [")
    status, out, err = render(folder, "-o", "json", "--family", "ipv4")
    said = err.splitlines()
    assert status == 1
    assert [line.split()[1] for line in said] == ["half.yaml:", "torn.yaml:", "service"]
    assert said[2] == ("podwire: service shop/web gets no 10.96.0.1 port 80/TCP: service shop/twin has it")
    found = json.loads(out)
    assert [f"podwire: {problem}" for problem in found["problems"]] == said
    assert {f["service"] for f in found["frontends"]} == {"shop/web", "shop/twin"}


def test_a_node_that_is_not_in_the_folder_is_said(folder: Path) -> None:
    status, out, err = podwire("render", str(folder), "--node-name", "node9", "-o", "nft")
    assert (status, elements(out, "local_pod_cidrs")) == (1, [])
    assert err == (
        "podwire: no Node is named node9 (--node-name): node ports, masquerade and locality lack it\n"
    )


def test_a_node_without_a_pod_range_and_overlapping_ranges_are_said(tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text("kind: Node\nmetadata: {name: node1}\n")
    assert render(tmp_path)[::2] == (1, "podwire: node node1 has no podCIDR yet: pods cannot be added\n")
    both = "---\n".join(
        f"kind: Node\nmetadata: {{name: node{n}}}\nspec: {{podCIDR: 10.1.0.0/24}}\n" for n in (1, 2)
    )
    (tmp_path / "nodes.yaml").write_text(both)
    status, _, err = render(tmp_path)
    assert status == 1
    assert "node node2: podCIDR 10.1.0.0/24 overlaps 10.1.0.0/24 of node node1" in err


def test_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    assert render(tmp_path / "none") == (1, "", f"podwire: {tmp_path / 'none'} is not a folder\n")


@pytest.mark.parametrize("words", [("--family", "ipx"), ("-o", "yaml")], ids=" ".join)
def test_wrong_usage(folder: Path, words: tuple[str, ...]) -> None:
    status, out, err = render(folder, *words)
    assert (status, out) == (2, "")
    assert words[0] in err


@pytest.mark.parametrize(
    "words",
    [
        ("--no-masquerade-cidr", "10.0.0.1/8"),
        ("--nodeport-addresses", "nonsense"),
        ("--nodeport-addresses", "primary,10.0.0.0/8"),
    ],
    ids=" ".join,
)
def test_a_wrong_range_is_a_sentence(folder: Path, words: tuple[str, ...]) -> None:
    status, out, err = render(folder, *words)
    assert (status, out) == (1, "")
    assert err.startswith(f"podwire: {words[0]} ")


def test_primary_stands_alone(folder: Path) -> None:
    status, _, err = render(folder, "--nodeport-addresses", "primary", "--nodeport-addresses", "10.0.0.0/8")
    assert (status, err) == (1, "podwire: --nodeport-addresses primary stands alone: it is no range\n")


def test_it_loads_neither_pyroute2_nor_grpc(folder: Path) -> None:
    script = (
        "import argparse, sys\n"
        "from cli import render\n"
        "top = argparse.ArgumentParser()\n"
        "render.add_parser(top.add_subparsers())\n"
        "args = top.parse_args(['render', sys.argv[1], '--node-name', 'node1', '-o', 'nft'])\n"
        "assert args.run(args) == 0\n"
        "assert not {'pyroute2', 'grpc'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("table ip podwire {")
