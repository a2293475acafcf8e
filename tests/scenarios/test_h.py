"""Scenario H: the walk through the chains of a service by hand, and the same walk by `podwire trace`."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lab.world import World
from netlink import netns
from tests.scenarios.forms import IPTABLES, MAIN, view_id, views

on_iptables = pytest.mark.parametrize("world", views(IPTABLES)[:1], ids=view_id, indirect=True)
on_both = pytest.mark.parametrize(
    "world", [views(MAIN[0])[0], views(IPTABLES)[0]], ids=view_id, indirect=True
)

# As kube-proxy computes them, for yaobank/summary:http and the two pods that the lab gives these addresses.
SUMMARY = "KUBE-SVC-OIQIZJVJK6E34BR4"
ENDPOINTS = {"10.244.2.2": "KUBE-SEP-ZYXN2K4Y2E27AI2R", "10.244.3.2": "KUBE-SEP-YPZ222Y7XRYNZDXY"}
CUSTOMER = "PX5FENG4GZJTCELT"
RANGES = "7MRROI2KZ67NZSAC"
LAST = (
    "kubernetes service nodeports; NOTE: this must be the last rule in this chain",
    "ADDRTYPE match dst-type LOCAL",
)


def output(world: World, place: str, *command: str) -> str:
    def run() -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    return netns.run(world.namespace(place), run)


def listed(world: World, chain: str, table: str = "nat") -> list[str]:
    """Return a chain's rules on node1 as `iptables -L` shows them, blanks made one."""
    lines = output(world, "node1", "iptables", "-w", "-t", table, "-n", "-L", chain).splitlines()
    assert lines[0].startswith(f"Chain {chain} (")
    return [" ".join(line.split()) for line in lines[2:]]


def traced(world: World, *words: str) -> str:
    command = [sys.executable, "-m", "cli.main", "trace", "--lab", world.lab.plan.name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@on_iptables
def test_a_cluster_address_leads_to_its_services_chain(world: World) -> None:
    rules = listed(world, "KUBE-SERVICES")
    (rule,) = [rule for rule in rules if " 10.96.0.20 " in rule]
    assert rule.split()[0] == SUMMARY
    assert rule.endswith("/* yaobank/summary:http cluster IP */ tcp dpt:80")


@on_iptables
def test_a_services_chain_chooses_one_of_its_endpoints_by_chance(world: World) -> None:
    rules = listed(world, SUMMARY)
    first, second = [rule for rule in rules if rule.startswith("KUBE-SEP-")]
    (one, first_chain), (other, second_chain) = ENDPOINTS.items()
    assert first.startswith(f"{first_chain} ")
    assert first.endswith(
        f"/* yaobank/summary:http -> {one}:80 */ statistic mode random probability 0.50000000000"
    )
    assert second.startswith(f"{second_chain} ")
    assert second.endswith(f"/* yaobank/summary:http -> {other}:80 */")


@on_iptables
@pytest.mark.parametrize("pod", ["summary-1", "summary-2"])
def test_an_endpoints_chain_marks_the_endpoint_itself_and_translates(world: World, pod: str) -> None:
    address = world.address(pod)
    mark, translate = listed(world, ENDPOINTS[address])
    assert mark.split()[0] == "KUBE-MARK-MASQ"
    assert f" {address} 0.0.0.0/0 " in mark
    assert translate.split()[0] == "DNAT"
    assert translate.endswith(f"/* yaobank/summary:http */ tcp to:{address}:80")


@on_iptables
def test_what_is_marked_is_masqueraded(world: World) -> None:
    assert re.search(r"^MARK .* MARK or 0x4000$", listed(world, "KUBE-MARK-MASQ")[0])
    unmarked, _, masquerade = listed(world, "KUBE-POSTROUTING")
    assert re.search(r"^RETURN .* mark match ! 0x4000/0x4000$", unmarked)
    assert masquerade.startswith("MASQUERADE ")


@on_iptables
def test_node_ports_are_looked_up_last_and_the_comment_says_so(world: World) -> None:
    last = listed(world, "KUBE-SERVICES")[-1]
    assert last.split()[0] == "KUBE-NODEPORTS"
    assert all(words in last for words in LAST), last
    (rule,) = [rule for rule in listed(world, "KUBE-NODEPORTS") if rule.endswith(" tcp dpt:30180")]
    assert rule.split()[0] == f"KUBE-EXT-{CUSTOMER}"
    chains = [rule.split()[0] for rule in listed(world, f"KUBE-EXT-{CUSTOMER}")]
    assert chains == ["KUBE-MARK-MASQ", f"KUBE-SVC-{CUSTOMER}"]


@on_iptables
def test_a_balancers_address_with_source_ranges_has_a_firewall_chain(world: World) -> None:
    (rule,) = [r for r in listed(world, "KUBE-SERVICES") if r.endswith("loadbalancer IP */ tcp dpt:80")]
    assert rule.split()[0] == f"KUBE-FW-{RANGES}"
    assert " 192.0.2.11 " in rule
    allowed = listed(world, f"KUBE-FW-{RANGES}")[0]
    assert allowed.split()[0] == f"KUBE-EXT-{RANGES}"
    assert " 198.51.100.0/24 " in allowed
    dropped = [r for r in listed(world, "KUBE-PROXY-FIREWALL", "filter") if r.endswith(" tcp dpt:80")]
    assert [(r.split()[0], f"KUBE-FW-{RANGES}" in r) for r in dropped] == [("DROP", True)]


@on_both
def test_the_trace_walks_from_the_pod_to_each_endpoint_and_back(world: World) -> None:
    text = traced(world, "yaobank/customer", "yaobank/summary")
    client = world.address("customer")
    assert text.startswith(
        f"pod yaobank/customer ({client}) → service yaobank/summary:http (10.96.0.20:80/tcp)\n"
    )
    assert "by chance, one of 2 ways:" in text
    for pod, node in (("summary-1", "node2"), ("summary-2", "node3")):
        address = world.address(pod)
        end = f"delivered: pod yaobank/{pod} on {node}"
        assert re.search(rf"1/2 +{address}:80 +{client} +{end}", text)
        assert f"destination 10.96.0.20:80 → {address}:80" in text
        assert f"undoes it: {address}:80 → {client} becomes 10.96.0.20:80 → {client}" in text


@on_iptables
def test_the_trace_names_the_chains_of_the_walk_in_order(world: World) -> None:
    for address, chain in ENDPOINTS.items():
        text = traced(world, "yaobank/customer", "yaobank/summary", "--endpoint", address)
        steps = [
            '-d 10.96.0.20/32 -p tcp -m comment --comment "yaobank/summary:http cluster IP"',
            f"-j {SUMMARY}",
            f"-j {chain}",
            f"-j DNAT --to-destination {address}:80",
        ]
        found = [text.find(step) for step in steps]
        assert -1 not in found, text
        assert found == sorted(found), text
