"""Which part is broken is told by who answers."""

from __future__ import annotations

import pytest

from node.doctor.icmp import SILENCE, Answer, Kind
from node.doctor.peers import check, judge, targets
from node.doctor.view import Context, PeerRoute, View

REPLY = Answer(Kind.REPLY, "x", 0.001)
VXLAN = View("node1").tunnel_ports
FAR = PeerRoute("10.244.3.0/24", "node3", "10.244.3.0", "vxlan", "pwvxlan4", 1450, "198.51.100.3")
DIRECT = PeerRoute("10.244.2.0/24", "node2", "192.0.2.2", "direct", "eth0", 0, "192.0.2.2")
SMALL = PeerRoute("10.244.4.0/31", "node4", "192.0.2.4", "direct", "eth0", 0, "192.0.2.4")

CASES = [
    ("both answer", FAR, REPLY, REPLY, ""),
    ("only the range answers", FAR, SILENCE, REPLY, ""),
    (
        "nothing answers",
        FAR,
        SILENCE,
        SILENCE,
        "node node3 does not answer on its address 198.51.100.3, nor do its pods' ranges 10.244.3.0/24",
    ),
    ("VXLAN is blocked", FAR, REPLY, SILENCE, "node node3 answers on 198.51.100.3, but its pods' range"),
    ("it does not forward", DIRECT, REPLY, SILENCE, "node node2 answers on 192.0.2.2, but its pods' range"),
    (
        "a router knows no way",
        FAR,
        REPLY,
        Answer(Kind.UNREACHABLE, "192.0.2.1"),
        "node node3 answers on 198.51.100.3, but its pods' range 10.244.3.0/24 does not: 192.0.2.1 says un",
    ),
    (
        "an older podwire there",
        DIRECT,
        SILENCE,
        Answer(Kind.UNREACHABLE, "192.0.2.2"),
        "node node2 gets packets for its pods' range 10.244.2.0/24, but",
    ),
    (
        "a firewall here",
        DIRECT,
        REPLY,
        Answer(Kind.NO_ROUTE, detail="Operation not permitted"),
        "node node2: packets to its pods' range 10.244.2.0/24 are refused on this node: Operation not",
    ),
]


@pytest.mark.parametrize(("route", "own", "pods", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_said_of_a_node(route: PeerRoute, own: Answer, pods: Answer, said: str) -> None:
    found = judge((route,), {route.peer: own, route.range_address: pods}, VXLAN).findings
    assert len(found) == bool(said)
    assert all(finding.sentence.startswith(said) for finding in found)


def test_the_port_is_the_configured_one() -> None:
    [finding] = judge((FAR,), {FAR.peer: REPLY}, View("node1", vxlan_port=4789).tunnel_ports).findings
    assert "UDP port 4789" in finding.sentence
    assert "UDP port 4789" in finding.remedy


def test_a_range_that_is_too_small_is_a_note() -> None:
    found = judge((SMALL,), {SMALL.peer: REPLY}, VXLAN)
    assert (found.findings, len(found.notes)) == ((), 1)
    assert "10.244.4.0/31 of node node4" in found.notes[0]
    assert targets((SMALL,)) == ("192.0.2.4",)


def test_of_a_network_that_is_down_the_first_nodes_are_told() -> None:
    many = tuple(
        PeerRoute(f"10.1.{n}.0/24", f"n{n}", f"192.0.2.{n}", peer=f"192.0.2.{n}") for n in range(100)
    )
    found = judge(many, {}, VXLAN).findings
    assert len(found) == 21
    assert found[-1].sentence == "and 80 more nodes or ranges that do not answer"


def test_nodes_to_probe_are_limited_by_name() -> None:
    context = Context(View("node1", routes=(FAR, SMALL, DIRECT)), peers=2)
    assert [r.node for r in context.probed()] == ["node2", "node3"]
    assert check(Context(View("node1"))).notes == ("there is no other node",)
    assert check(Context()).skipped


def test_of_wireguard_the_keys_may_be_it_as_well() -> None:
    ports = View("node1", backend="wireguard").tunnel_ports
    route = PeerRoute("10.244.3.0/24", "node3", "", "wireguard", "pwwg0", 1440, "198.51.100.3")
    [finding] = judge((route,), {"198.51.100.3": REPLY}, ports).findings
    assert "WireGuard (UDP ports 51820 and 51821) may be blocked on the way, or one of" in finding.sentence
    assert finding.remedy.startswith("podwire wireguard, here and on node node3")
