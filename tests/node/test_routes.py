"""Which routes the pods of other nodes need, whatever the nodes look like."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from netlink.requests import Route
from node.routes import Gateway, NodeRoute, Underlay, accepted_ranges, plan
from proxy.model import Node

ME = Node("node1", ("10.244.1.0/24",), ("192.168.50.11",))
NEAR = Node("node2", ("10.244.2.0/24",), ("192.168.50.12",))
FAR = Node("node3", ("10.244.3.0/24",), ("192.168.60.13",))
LAN = Underlay((ip_network("192.168.50.0/24"), ip_network("fd00:50::/64")), {4: Gateway("192.168.50.1")})


def planned(*nodes: Node, underlay: Underlay = LAN) -> tuple[list[NodeRoute], list[str]]:
    routes, problems = plan({n.name: n for n in nodes}, "node1", underlay)
    return list(routes), list(problems)


def test_a_peer_on_our_subnet_is_reached_directly() -> None:
    routes, problems = planned(ME, NEAR)
    assert NodeRoute(Route("10.244.2.0/24", gateway="192.168.50.12"), "node2") in routes
    assert problems == []


def test_a_peer_elsewhere_is_reached_by_the_gateway() -> None:
    routes, _ = planned(ME, FAR)
    assert NodeRoute(Route("10.244.3.0/24", gateway="192.168.50.1"), "node3") in routes


def test_our_own_range_is_unreachable_where_no_pod_is() -> None:
    routes, problems = planned(ME)
    assert routes == [NodeRoute(Route("10.244.1.0/24"), "node1")]
    assert routes[0].route.unreachable
    assert problems == []


def test_each_family_goes_its_own_way() -> None:
    peer = Node("node2", ("10.244.2.0/24", "fd00:2::/64"), ("192.168.60.12", "fd00:50::12"))
    routes, problems = planned(peer)
    assert [r.route for r in routes] == [
        Route("10.244.2.0/24", gateway="192.168.50.1"),
        Route("fd00:2::/64", gateway="fd00:50::12"),
    ]
    assert problems == []


def test_a_gateway_with_a_link_local_address_is_used_on_its_interface() -> None:
    advertised = Underlay((ip_network("fd00:50::/64"),), {6: Gateway("fe80::1", 2)})
    peer = Node("node2", ("fd00:2::/64",), ("fd00:60::12",))
    routes, problems = planned(peer, underlay=advertised)
    assert [r.route for r in routes] == [Route("fd00:2::/64", gateway="fe80::1", oif=2)]
    assert problems == []


def test_a_peer_without_address_is_a_problem_and_the_others_go_on() -> None:
    routes, problems = planned(Node("node2", ("10.244.2.0/24",)), FAR)
    assert [r.node for r in routes] == ["node3"]
    assert problems == ["node node2: no way to its pods in 10.244.2.0/24: it has no IPv4 InternalIP"]


def test_a_peer_elsewhere_without_a_gateway_is_a_problem() -> None:
    routes, problems = planned(FAR, underlay=Underlay())
    assert routes == []
    assert problems == [
        "node node3: no way to its pods in 10.244.3.0/24: "
        "192.168.60.13 is on no subnet of ours, and there is no default route"
    ]


def test_a_node_without_pod_cidr_needs_no_route() -> None:
    assert planned(Node("node2", (), ("192.168.50.12",))) == ([], [])


def test_of_two_nodes_with_one_range_the_first_name_counts() -> None:
    routes, problems = planned(FAR, Node("node2", ("10.244.3.0/25",), ("192.168.50.12",)))
    assert [r.node for r in routes] == ["node2"]
    assert problems == [
        "node node3: podCIDR 10.244.3.0/24 overlaps 10.244.3.0/25 of node node2, which counts; "
        "it gets no route"
    ]


def test_our_own_range_counts_before_any_name() -> None:
    routes, problems = planned(ME, Node("a", ("10.244.0.0/16",), ("192.168.50.12",)))
    assert [r.node for r in routes] == ["node1"]
    assert len(problems) == 1


cidrs = st.builds(
    lambda bits, length: str(ip_network((bits << 20, length), strict=False)),
    st.integers(0, 4095),
    st.integers(8, 14),
)
nodes = st.lists(
    st.builds(
        Node,
        st.sampled_from([f"node{i}" for i in range(9)]),
        st.lists(cidrs, max_size=2).map(tuple),
        st.just(("192.168.50.12",)),
    ),
    unique_by=lambda n: n.name,
    max_size=9,
)


@given(nodes.flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))))
def test_overlaps_end_the_same_whatever_the_order(orders: tuple[list[Node], list[Node]]) -> None:
    first, second = (plan({n.name: n for n in order}, "node1", LAN) for order in orders)
    assert first == second


@given(nodes)
def test_accepted_ranges_are_disjoint_and_every_other_has_a_sentence(found: list[Node]) -> None:
    accepted, problems = accepted_ranges({n.name: n for n in found}, "node1")
    networks = [ip_network(cidr) for _, cidr in accepted]
    assert not any(a.overlaps(b) for i, a in enumerate(networks) for b in networks[:i])
    assert len(accepted) + len(problems) == sum(len(n.pod_cidrs) for n in found)
    # First come, first served, in order of name with ourselves first: no range is left out without a reason.
    claims = sorted((n.name != "node1", n.name, cidr) for n in found for cidr in n.pod_cidrs)
    expected: list[tuple[str, str]] = []
    for _, name, cidr in claims:
        if not any(ip_network(cidr).overlaps(ip_network(other)) for _, other in expected):
            expected.append((name, cidr))
    assert accepted == expected
