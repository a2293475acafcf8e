"""Which way the pods of each node are reached, and what one node's change touches."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from netlink.requests import Route
from node.backends.hops import (
    NODE_TABLE,
    Forwarding,
    Hop,
    Neighbour,
    Site,
    TunnelConfig,
    Underlay,
    Way,
    metric_of,
)
from node.backends.vxlan import device, mac_of, tunnel_mac
from node.peers import Peers
from proxy.model import Node

ETH0, TUNNEL, TUNNEL6 = 2, 7, 8
ME = Node("node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11"))
NEAR = Node("node2", ("10.244.2.0/24", "fd00:2::/64"), ("192.168.50.12", "fd00:50::12"))
FAR = Node("node3", ("10.244.3.0/24", "fd00:3::/64"), ("192.168.60.13", "fd00:60::13"))
LAN = Underlay(
    (
        Way(ip_network("192.168.50.0/24"), ETH0),
        Way(ip_network("fd00:50::/64"), ETH0),
        Way(ip_network("0.0.0.0/0"), ETH0, "192.168.50.1"),
        Way(ip_network("::/0"), ETH0, "fe80::1"),
    )
)
HERE = Site(
    ME, LAN, "auto", None, {4: "10.244.1.0", 6: "fd00:1::"}, {"pwvxlan4": TUNNEL, "pwvxlan6": TUNNEL6}
)


def named(*nodes: Node) -> dict[str, Node]:
    return {node.name: node for node in nodes}


def planned(*nodes: Node, site: Site = HERE) -> Peers:
    peers = Peers("node1")
    peers.take(named(*nodes), site)
    return peers


def hops(*nodes: Node, site: Site = HERE) -> dict[str, Hop]:
    return {hop.cidr: hop for hop in planned(*nodes, site=site).hops}


def plain(hop: Hop) -> Route:
    """Return the route without the number that only spreads the kernel's table."""
    return replace(hop.route, metric=0)


@pytest.mark.parametrize(("backend", "near", "far"), [
    ("auto", "direct", "vxlan"), ("direct", "direct", "gateway"), ("vxlan", "vxlan", "vxlan")
])  # fmt: skip
def test_the_backend_decides_for_each_peer(backend: str, near: str, far: str) -> None:
    found = hops(ME, NEAR, FAR, site=replace(HERE, backend=backend))
    assert {cidr: hop.backend for cidr, hop in found.items()} == {
        "10.244.1.0/24": "local", "fd00:1::/64": "local",
        "10.244.2.0/24": near, "fd00:2::/64": near,
        "10.244.3.0/24": far, "fd00:3::/64": far,
    }  # fmt: skip


def test_our_own_range_is_unreachable_where_no_pod_is() -> None:
    found = hops(ME)["10.244.1.0/24"]
    assert found.routes == (Route("10.244.1.0/24"),)
    assert found.route.unreachable


def test_a_peer_on_our_subnet_is_reached_by_its_own_address() -> None:
    found = hops(ME, NEAR)
    assert plain(found["10.244.2.0/24"]) == Route("10.244.2.0/24", "192.168.50.12", ETH0)
    assert plain(found["fd00:2::/64"]) == Route("fd00:2::/64", "fd00:50::12", ETH0)


def test_a_peer_elsewhere_is_reached_directly_by_the_gateway_even_a_link_local_one() -> None:
    found = hops(ME, FAR, site=replace(HERE, backend="direct"))
    assert plain(found["10.244.3.0/24"]) == Route("10.244.3.0/24", "192.168.50.1", ETH0)
    assert plain(found["fd00:3::/64"]) == Route("fd00:3::/64", "fe80::1", ETH0)


def test_ipv4_pods_are_reached_by_an_ipv6_address_where_there_is_no_other() -> None:
    peer = structs.replace(NEAR, addresses=("fd00:50::12",))
    assert plain(hops(ME, peer)["10.244.2.0/24"]) == Route("10.244.2.0/24", "fd00:50::12", ETH0)


def test_ipv6_pods_go_through_a_tunnel_over_ipv4_where_there_is_no_ipv6() -> None:
    peer = structs.replace(NEAR, addresses=("192.168.50.12",))
    found = hops(ME, peer)
    assert found["10.244.2.0/24"].backend == "direct"
    assert (found["fd00:2::/64"].backend, found["fd00:2::/64"].tunnel) == ("vxlan", "pwvxlan4")


def test_a_tunnelled_range_has_a_route_a_neighbour_and_a_forwarding_entry() -> None:
    found, mac = hops(ME, FAR), tunnel_mac("node3", "")
    wanted = Route(
        "10.244.3.0/24", "10.244.3.0", TUNNEL, True, mtu=1450, source="192.168.50.11",
        metric=metric_of("10.244.3.0/24"),
    )  # fmt: skip
    hop = found["10.244.3.0/24"]
    assert hop.peer == "192.168.60.13"
    assert hop.routes == (wanted, replace(wanted, destination="192.168.60.13/32", table=NODE_TABLE))
    assert hop.neighbours == (Neighbour(TUNNEL, "10.244.3.0", mac),)
    assert hop.forwarding == (Forwarding(TUNNEL, mac, "192.168.60.13"),)
    six = found["fd00:3::/64"]
    assert (six.tunnel, six.route.oif, six.route.mtu) == ("pwvxlan6", TUNNEL6, 1430)
    assert six.forwarding == (Forwarding(TUNNEL6, mac, "fd00:60::13"),)


def test_packets_to_a_far_node_go_through_the_tunnel_only_if_it_is_known_to_run_podwire() -> None:
    """A control plane node may have no daemon: pods reach it as before then, with the node's address."""
    silent = structs.replace(FAR, uid="u-3")
    assert [len(h.routes) for h in hops(ME, silent).values() if h.node == "node3"] == [1, 1]
    known = structs.replace(silent, tunnel_mac="02:00:00:00:00:03")
    assert [len(h.routes) for h in hops(ME, known).values() if h.node == "node3"] == [2, 2]


def test_a_node_that_peers_may_not_know_sends_from_its_range_address() -> None:
    for me, source in (
        (structs.replace(ME, uid="u"), "10.244.1.0"),
        (structs.replace(ME, uid="u", tunnel_mac="02:00:00:00:00:01"), "192.168.50.11"),
        (structs.replace(ME, addresses=("fd00:50::11",)), "10.244.1.0"),
    ):
        found = hops(me, FAR, site=replace(HERE, node=me))
        assert found["10.244.3.0/24"].route.source == source


def test_what_the_node_says_of_its_tunnel_counts() -> None:
    peer = structs.replace(FAR, uid="u", tunnel_addresses=("192.168.70.3",), tunnel_mac="02:ab:00:00:00:01")
    found = hops(ME, peer)["10.244.3.0/24"]
    assert found.forwarding == (Forwarding(TUNNEL, "02:ab:00:00:00:01", "192.168.70.3"),)


def test_the_mtu_is_that_of_the_way_less_the_overhead_once() -> None:
    narrow = Underlay((*LAN.ways, Way(ip_network("192.168.60.0/24"), ETH0, "192.168.50.9", 1400, 1500)))
    site = replace(HERE, underlay=narrow)
    assert hops(ME, FAR, site=site)["10.244.3.0/24"].route.mtu == 1350
    assert hops(ME, FAR, site=replace(site, mtu=1300))["10.244.3.0/24"].route.mtu == 1250
    direct = replace(site, backend="direct")
    assert hops(ME, FAR, site=direct)["10.244.3.0/24"].route.mtu == 1400
    assert hops(ME, NEAR, site=direct)["10.244.2.0/24"].route.mtu == 0, "what the interface says is enough"


def test_ipv6_has_its_least_mtu_and_a_sentence_where_the_tunnel_cannot_carry_it() -> None:
    peers = planned(ME, FAR, site=replace(HERE, mtu=1300))
    assert {h.cidr: h.route.mtu for h in peers.hops}["fd00:3::/64"] == 1280
    assert peers.problems == (
        "node node3: pods in fd00:3::/64: 1230 bytes fit into the tunnel to fd00:60::13, IPv6 needs 1280",
    )


@pytest.mark.parametrize(("peer", "backend", "why"), [
    (Node("node2", ("10.244.2.0/24",)), "auto", "it has no InternalIP"),
    (Node("node2", ("fd00:2::/64",), ("192.168.50.12",)), "direct",
     "it has no IPv6 InternalIP, which backend direct needs"),
    (FAR, "direct", "192.168.60.13 is on no subnet of ours, and there is no default route"),
    (FAR, "auto", "192.168.60.13, fd00:60::13 is on no subnet of ours, and there is no default route"),
])  # fmt: skip
def test_a_peer_without_a_way_is_a_problem_and_the_others_go_on(peer: Node, backend: str, why: str) -> None:
    lonely = replace(HERE, underlay=Underlay(LAN.ways[:2]), backend=backend)
    other = Node("node4", ("10.244.4.0/24",), ("192.168.50.14",))
    peers = planned(ME, peer, other, site=lonely)
    assert "10.244.4.0/24" in {hop.cidr for hop in peers.hops}
    assert peers.problems[0] == f"node {peer.name}: no way to its pods in {peer.pod_cidrs[0]}: {why}"
    assert peers.unreached


def test_of_two_nodes_with_one_tunnel_mac_the_first_name_counts() -> None:
    """An annotation that was copied along with the rest of a manifest."""
    first, second = (
        structs.replace(FAR, name=name, pod_cidrs=(cidr,), tunnel_mac="02:00:00:00:00:07")
        for name, cidr in (("node3", "10.244.3.0/24"), ("node4", "10.244.4.0/24"))
    )
    peers = planned(ME, second)
    assert not peers.problems
    peers.take(named(ME, second, first), HERE)
    assert {hop.node for hop in peers.hops} == {"node1", "node3"}
    assert peers.problems == (
        "node node4: no way to its pods in 10.244.4.0/24: "
        "its tunnel MAC 02:00:00:00:00:07 is that of node node3",
    )
    peers.take(named(ME, second), HERE)
    assert {hop.node for hop in peers.hops} == {"node1", "node4"}


def test_only_the_hops_of_a_node_that_changed_move() -> None:
    others = [Node(f"n{i}", (f"10.9.{i}.0/24",), (f"192.168.60.{i}",)) for i in range(50)]
    peers = planned(ME, NEAR, FAR, *others)
    moved = peers.take(named(ME, structs.replace(NEAR, addresses=("192.168.50.99",)), FAR, *others), HERE)
    assert {h.node for h in (*moved.gone, *moved.new)} == {"node2"}
    assert peers.take(named(ME, FAR, *others), HERE).new == ()


def test_the_device_goes_by_our_own_node() -> None:
    six = device(HERE, 6, TunnelConfig(4789, 5))
    assert six and (six.name, six.vni, six.port, six.local) == ("pwvxlan6", 5, 4789, "fd00:50::11")
    assert (six.mac, six.mtu) == (mac_of(ME), 1430)
    four = replace(HERE, node=structs.replace(ME, addresses=("192.168.50.11",)))
    assert device(four, 6, TunnelConfig()) is None


addresses = st.sampled_from(
    [("192.168.50.12",), ("192.168.60.13",), ("fd00:50::9",), ("192.168.60.14", "fd00:60::14"), ()]
)
ranges = st.sampled_from([(), ("10.244.7.0/24",), ("10.244.8.0/24", "fd00:8::/64"), ("10.244.0.0/16",)])
macs = st.sampled_from(["", "02:00:00:00:00:01"])
nodes = st.builds(
    lambda name, cidrs, at, mac: Node(name, cidrs, at, uid="u", tunnel_mac=mac),
    st.sampled_from([f"node{i}" for i in range(6)]), ranges, addresses, macs,
)  # fmt: skip


@given(st.lists(nodes | st.sampled_from([f"node{i}" for i in range(6)]), max_size=15))
def test_step_by_step_ends_as_all_at_once(steps: list[Node | str]) -> None:
    kept, found = Peers("node1"), {"node1": ME}
    state = {(hop.node, hop.cidr): hop for hop in kept.take(found, HERE).new}
    for step in steps:
        found = {n: node for n, node in found.items() if n != (step if isinstance(step, str) else step.name)}
        if isinstance(step, Node):
            found[step.name] = step
        moved = kept.take(found, HERE, {step if isinstance(step, str) else step.name})
        for hop in moved.gone:
            del state[hop.node, hop.cidr]
        state |= {(hop.node, hop.cidr): hop for hop in moved.new}
        anew = Peers("node1")
        anew.take(found, HERE)
        assert set(kept.hops) == set(anew.hops) == set(state.values())
        assert (kept.problems, kept.tunnels, kept.limited) == (anew.problems, anew.tunnels, anew.limited)
        assert all(kept.tunnel_addresses(v) == anew.tunnel_addresses(v) for v in (4, 6))
        hosts = {r.destination for hop in kept.hops for r in hop.routes[1:]}
        assert all(kept.shares(destination) for destination in hosts)
