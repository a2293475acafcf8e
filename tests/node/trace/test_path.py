"""The walk over handmade states: where packets end, and why."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from netlink.attributes import attribute
from netlink.conntrack import Flow, Tuple
from node.trace.nft import ACCEPT, DROP, Expr
from node.trace.packet import Branch, Kind, Packet, Verdict
from node.trace.path import Tracer
from node.trace.state import UNREACHABLE, Policy, State, Way
from tests.node.trace.states import (
    NODE1,
    NODE2,
    POLICIES,
    ROUTER,
    V4,
    do,
    link,
    packet,
    route,
    rule,
    table,
    with_tables,
    world,
)

PREROUTING, FORWARD, OUTPUT, POSTROUTING = 0, 2, 3, 4


def _one(state: State, sent: Packet, *others: State) -> Branch:
    """Return the only way of a packet that arrives at a node."""
    (branch,) = Tracer(world(state, *(others or (NODE2, ROUTER)))).received(state.node, sent)
    return branch


def _hooks(branch: Branch) -> list[str]:
    return [f"{s.place} {s.hook}" for s in branch.steps]


def test_a_packet_to_a_pod_of_this_node_is_delivered_by_its_interface() -> None:
    branch = _one(NODE1, packet())
    assert branch.end.verdict is Verdict.DELIVERED
    assert branch.end.who == "pod shop/b on node1, 10.244.1.3:80"
    assert [s.text for s in branch.steps if s.kind is Kind.INTERFACE] == [
        "pwpoda (of pod shop/a): 10.244.1.2 → 10.244.1.3:80",
        "pwpodb → eth0 of pod shop/b",
    ]


def test_a_packet_to_a_far_pod_goes_through_the_tunnel_and_the_router_to_its_node() -> None:
    branch = _one(NODE1, packet(destination="10.244.2.2"))
    assert branch.end.who == "pod shop/c on node2, 10.244.2.2:80"
    (tunnel,) = (s for s in branch.steps if s.kind is Kind.TUNNEL)
    assert "outer 192.168.50.11 → 192.168.60.12:8472" in tunnel.text
    assert next(h for h in _hooks(branch) if h.startswith("router")) == "router (in)"
    assert _hooks(branch)[-1] == "node2 end"


def test_a_tunnel_without_a_forwarding_entry_leads_nowhere() -> None:
    branch = _one(replace(NODE1, remotes=()), packet(destination="10.244.2.2"))
    assert branch.end.verdict is Verdict.UNROUTABLE
    assert branch.end.look == "bridge fdb show dev pwvxlan4"


def test_what_cannot_be_asked_is_said() -> None:
    branch = _one(NODE1, packet(destination="10.244.2.2"), ROUTER)
    assert branch.end.verdict is Verdict.UNKNOWN
    assert branch.end.reason == "it continues on node2, which could not be asked"


def test_what_goes_beyond_all_that_is_known_has_left() -> None:
    branch = _one(NODE1, packet(destination="203.0.113.9"), NODE2)
    assert (branch.end.verdict, branch.end.place) == (Verdict.UNKNOWN, "router")
    nobodys = replace(NODE1, ways=(*NODE1.ways, route("203.0.113.0/24", 2)))
    assert _one(nobodys, packet(destination="203.0.113.9")).end.verdict is Verdict.LEFT


@pytest.mark.parametrize(
    ("state", "sent", "reason"),
    [
        (replace(NODE1, sysctls={"ipv4/ip_forward": "0"}), packet(), "node1 does not forward packets"),
        (
            replace(NODE1, sysctls={"ipv4/conf/pwpoda/forwarding": "0"}),
            packet(),
            "node1 does not forward packets",
        ),
        (NODE1, packet("192.168.50.11"), "192.168.50.11 is an address of node1 itself (a martian)"),
        (NODE1, packet(destination="127.0.0.1"), "a loopback address cannot come by pwpoda (a martian)"),
        (
            replace(NODE1, sysctls={"ipv4/ip_forward": "1", "ipv4/conf/all/rp_filter": "1"}),
            packet("10.244.1.3"),
            "the way back to 10.244.1.3 is not by pwpoda but by pwpodb (rp_filter)",
        ),
        (
            replace(NODE1, links=(*NODE1.links[:3], link(4, "pwpodb", up=False))),
            packet(),
            "interface pwpodb is down",
        ),
        (
            NODE1,
            packet("10.244.1.3", iif="eth0"),
            "it comes back to its sender with 10.244.1.3, its own address",
        ),
    ],
)
def test_why_a_packet_is_dropped_is_a_sentence(state: State, sent: Packet, reason: str) -> None:
    end = _one(state, sent).end
    assert end.verdict is Verdict.DROPPED
    assert end.reason.startswith(reason)


def test_no_route_and_routes_that_lead_nowhere_are_unroutable() -> None:
    none = _one(replace(NODE1, ways=NODE1.ways[:3]), packet())
    assert (none.end.verdict, none.end.reason) == (Verdict.UNROUTABLE, "node1 has no route to 10.244.1.3")
    nowhere = replace(NODE1, ways=(*NODE1.ways[:5], Way("10.244.1.3/32", UNREACHABLE, 254)))
    assert "leads nowhere: unreachable 10.244.1.3/32, table main" in _one(nowhere, packet()).end.reason


def test_a_policy_rule_chooses_the_table_and_is_named() -> None:
    state = replace(
        NODE1,
        ways=(*NODE1.ways, Way("0.0.0.0/0", 1, 100, "", 2)),
        policies=(*POLICIES, Policy(50, 100, source="10.244.1.0/24")),
    )
    (step,) = (s for s in _one(state, packet()).steps if s.kind is Kind.ROUTE)
    assert step.text == "default dev eth0, table 100 (rule 50)"


def test_what_a_node_sends_has_the_address_of_the_interface_it_leaves_by() -> None:
    (branch,) = Tracer(world()).sent("node1", Packet(V4, 6, "", "10.244.1.3", 80))
    assert branch.end.packet.source == "192.168.50.11"
    assert branch.steps[0].text == "node1 sends 192.168.50.11 → 10.244.1.3:80"


def test_what_a_node_sends_itself_comes_in_by_loopback() -> None:
    (branch,) = Tracer(world()).sent("node1", Packet(V4, 6, "", "192.168.50.11", 80))
    assert branch.end.who == "node1 itself, 192.168.50.11:80"
    assert any(s.text.startswith("lo: ") for s in branch.steps)


def test_a_rule_that_drops_ends_the_way_with_its_chain_and_comment() -> None:
    state = with_tables(NODE1, table("fw", FORWARD, rule(do(DROP), comment="nobody may")))
    end = _one(state, packet()).end
    assert end.reason == "chain ip fw c of node1 drops it: nobody may"
    assert end.look == "nft list chain ip fw c"


def test_accept_ends_a_chain_only_so_that_a_later_one_decides() -> None:
    state = with_tables(
        NODE1, table("b", FORWARD, rule(do(DROP)), priority=10), table("a", FORWARD, rule(do(ACCEPT)))
    )
    assert [s.chain for s in _one(state, packet()).steps if s.chain] == ["ip a c", "ip b c"]


def test_a_policy_drops_what_no_rule_accepts() -> None:
    branch = _one(with_tables(NODE1, table("fw", FORWARD, drops=True)), packet())
    assert branch.end.verdict is Verdict.DROPPED
    assert branch.steps[-2].text == "no rules: policy drop"


def test_what_is_not_known_leaves_a_rule_undecided_and_the_way_goes_on() -> None:
    unknown = rule(Expr("socket", {1: bytes(4), 2: (8).to_bytes(4, "big")}), _compare(b"\1"), do(DROP))
    odd = rule(Expr("match", {1: b"recent\0"}), do(DROP))
    branch = _one(with_tables(NODE1, table("fw", FORWARD, unknown, odd)), packet())
    assert branch.end.verdict is Verdict.DELIVERED
    assert [s.text for s in branch.steps if s.kind is Kind.UNDECIDED] == [
        "not followed (socket transparent is not known beforehand)",
        "not followed (match recent)",
    ]


def _compare(value: bytes) -> Expr:
    return Expr("cmp", {1: (8).to_bytes(4, "big"), 2: bytes(4), 3: attribute(1, value)})


def test_masquerade_takes_an_address_of_the_interface_and_replies_undo_it() -> None:
    state = with_tables(
        replace(NODE1, ways=(*NODE1.ways, route("203.0.113.0/24", 2))),
        table("nat", POSTROUTING, rule(Expr("masq")), kind="nat", priority=100),
    )
    branch = _one(state, packet(destination="203.0.113.9"))
    assert branch.masqueraded
    assert branch.end.packet.source == "192.168.50.11"
    (undone,) = (s for s in branch.back if s.kind is Kind.NAT)
    assert undone.after == "203.0.113.9:80 → 10.244.1.2"


def test_a_connection_that_is_known_goes_on_past_the_rules_that_translate() -> None:
    flow = Flow(
        V4, 6, Tuple("10.244.1.2", "10.96.0.1", 4000, 80), Tuple("10.244.1.3", "10.244.1.2", 8080, 4000)
    )
    nat = table("nat", PREROUTING, rule(do(DROP)), kind="nat", priority=-100)
    state = replace(with_tables(NODE1, nat), flows=(flow,))
    known = _one(state, packet(destination="10.96.0.1", sport=4000))
    assert known.end.who == "pod shop/b on node1, 10.244.1.3:8080"
    new = _one(state, packet(destination="10.96.0.1"))
    assert new.end.verdict is Verdict.DROPPED
    assert any("1 connections like this one are known" in s.text for s in new.steps)


def test_an_untracked_packet_is_not_translated() -> None:
    raw = table("raw", PREROUTING, rule(Expr("notrack")), priority=-300)
    nat = table("nat", PREROUTING, rule(do(DROP)), kind="nat", priority=-100)
    assert _one(with_tables(NODE1, raw, nat), packet()).end.verdict is Verdict.DELIVERED


def test_pods_on_one_bridge_are_switched_unless_rules_for_ip_see_it() -> None:
    bridge = link(5, "podwire0", "bridge")
    state = replace(
        NODE1,
        links=(*NODE1.links[:2], link(3, "pwpoda", master=5), link(4, "pwpodb", master=5), bridge),
        ways=(*NODE1.ways[:1], route("10.244.1.0/24", 5)),
    )
    switched = _one(state, packet())
    assert switched.end.who == "pod shop/b on node1, 10.244.1.3:80"
    assert "not routed" in switched.steps[-2].text
    seen = _one(replace(state, sysctls={**state.sysctls, "bridge/bridge-nf-call-iptables": "1"}), packet())
    assert any(s.kind is Kind.ROUTE for s in seen.steps)
    assert seen.end.verdict is Verdict.DELIVERED


def test_a_way_in_circles_ends() -> None:
    state = replace(ROUTER, ways=(route("0.0.0.0/0", 2, "192.168.50.11"), *ROUTER.ways[:2]))
    branch = _one(NODE1, packet(destination="203.0.113.9"), state)
    assert branch.end.reason == "it goes round in circles: its hop limit ends"


def test_replies_that_would_miss_the_node_that_translated_are_told() -> None:
    """The sender is elsewhere, and its address is kept: the receiver's node answers it directly."""
    to_pod = Expr("nat", _to("10.244.2.2"))
    state = with_tables(
        NODE1,
        table("nat", PREROUTING, rule(*_load("10.244.2.2"), to_pod), kind="nat", priority=-100),
    )
    tracer = Tracer(world(state, NODE2, ROUTER))
    (branch,) = tracer.received("node1", packet("198.51.100.10", "192.168.50.11", iif="eth0"))
    assert branch.end.who.startswith("pod shop/c on node2")
    assert branch.notes == (
        "replies go from node2 to 198.51.100.10 past node1, which alone could turn them back: "
        "the client would not know them",
    )
    (at_home,) = tracer.received("node1", packet(destination="192.168.50.11"))
    assert at_home.notes == ()


def _to(_: str) -> dict[int, bytes]:
    return {1: (1).to_bytes(4, "big"), 2: (2).to_bytes(4, "big"), 3: (8).to_bytes(4, "big")}


def _load(address: str) -> tuple[Expr, ...]:
    return (Expr("immediate", {1: (8).to_bytes(4, "big"), 2: attribute(1, ip_address(address).packed)}),)
