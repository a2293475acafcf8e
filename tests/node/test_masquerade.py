"""Whose address is replaced on the way out: nobody's inside the cluster."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from node.masquerade import ALWAYS_KEPT, Cluster, Policy, egress_problems, ranges
from node.ranges import accepted_ranges
from proxy.dataplane import NodeRanges
from proxy.model import Node
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.spans import Members

NODES = {
    "node1": Node("node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11")),
    "node2": Node("node2", ("10.244.2.0/24",), ("192.168.50.12",)),
}
ME = NODES["node1"]


def test_pods_and_nodes_are_exempt_and_so_is_what_the_user_names() -> None:
    assert ranges(NODES, "node1", ("10.0.0.0/8", "FD00::/8")) == NodeRanges(
        pod_cidrs=Members(("10.244.1.0/24", "fd00:1::/64", "10.244.2.0/24")),
        local_pod_cidrs=("10.244.1.0/24", "fd00:1::/64"),
        no_masquerade=(*ALWAYS_KEPT, "10.0.0.0/8", "fd00::/8"),
        node_ports=("192.168.50.11/32", "fd00:50::11/128"),
        node_pods=("10.244.1.0/24", "fd00:1::/64"),
        node_addresses=Members(("192.168.50.11", "fd00:50::11", "192.168.50.12")),
    )


def test_without_nodes_only_link_local_and_multicast_are_exempt() -> None:
    empty = NodeRanges(
        pod_cidrs=Members(), node_addresses=Members(), no_masquerade=ALWAYS_KEPT, node_ports=()
    )
    assert ranges({}, "node1") == empty


def test_node_ports_are_on_the_nodes_own_addresses_unless_the_user_names_ranges() -> None:
    assert ranges(NODES, "node2").node_ports == ("192.168.50.12/32",)
    assert ranges(NODES, "node2", node_ports=("10.0.0.0/8", "::/0")).node_ports == ("10.0.0.0/8", "::/0")


def test_where_a_family_is_not_masqueraded_no_pod_of_this_node_is_and_nothing_else_changes() -> None:
    both = ranges(NODES, "node1")
    only_v4 = ranges(NODES, "node1", masquerade={Family.V4})
    assert only_v4.local_pod_cidrs == ("10.244.1.0/24",)
    assert ranges(NODES, "node1", masquerade={Family.V6}).local_pod_cidrs == ("fd00:1::/64",)
    assert ranges(NODES, "node1", masquerade=frozenset()).local_pod_cidrs == ()
    assert (only_v4.pod_cidrs, only_v4.no_masquerade) == (both.pod_cidrs, both.no_masquerade)
    assert only_v4.node_pods == both.node_pods, "services need to know them all the same"


def test_a_range_that_counts_for_nobody_is_not_exempt() -> None:
    wrong = Node("node9", ("10.244.0.0/16",), ())
    assert ranges(NODES | {"node9": wrong}, "node1") == ranges(NODES, "node1")


def test_pools_have_pods_of_this_node() -> None:
    cluster = Cluster()
    cluster.take(NODES, accepted_ranges(NODES, "node1")[0])
    policy = Policy(masquerade=frozenset({Family.V4}), pools=("10.9.0.0/28", "fd00:9::/64"))
    found = cluster.ranges(ME, policy)
    assert found.local_pod_cidrs == ("10.244.1.0/24", "10.9.0.0/28")
    assert found.node_pods == (*ME.pod_cidrs, "10.9.0.0/28", "fd00:9::/64")
    assert set(found.pod_cidrs) == {*found.node_pods, "10.244.2.0/24"}


def test_pools_that_are_the_outsides_own_keep_their_addresses() -> None:
    cluster = Cluster()
    cluster.take(NODES, accepted_ranges(NODES, "node1")[0])
    found = cluster.ranges(ME, Policy(pools=("10.9.0.0/28",), pools_are_outside=True))
    assert found.local_pod_cidrs == ME.pod_cidrs
    assert "10.9.0.0/28" in found.pod_cidrs


def test_the_annotation_counts_over_the_configuration_in_each_family() -> None:
    def chosen(*annotated: str) -> tuple[str, ...]:
        nodes = NODES | {"node1": Node("node1", egress_addresses=annotated)}
        return ranges(nodes, "node1", egress=("FD00:60::7", "203.0.113.7")).egress

    assert chosen() == ("203.0.113.7", "fd00:60::7")
    assert chosen("203.0.113.9") == ("203.0.113.9", "fd00:60::7")
    assert chosen("fd00:60::9", "203.0.113.9") == ("203.0.113.9", "fd00:60::9")


def test_another_nodes_annotation_is_its_own_business() -> None:
    nodes = NODES | {"node2": Node("node2", egress_addresses=("203.0.113.9",))}
    assert ranges(nodes, "node1").egress == ()


def test_an_address_that_only_the_network_can_lead_here_is_told_of() -> None:
    assert egress_problems(("192.168.50.11", "fd00:60::7"), ["192.168.50.11", "127.0.0.1"]) == (
        "pods' egress address fd00:60::7 is on no interface of this node: answers come back only if the "
        "network routes it to this node",
    )
    assert egress_problems((), []) == ()


def test_one_nodes_change_moves_its_own_elements_only() -> None:
    nodes = {
        f"n{i}": Node(f"n{i}", (f"10.1.{i}.0/24", f"fd00:1:{i:x}::/64"), (f"192.0.2.{i}",))
        for i in range(250)
    }
    cluster, dataplane = Cluster(), Dataplane(FakeNft(Family.V4))
    cluster.take(nodes, accepted_ranges(nodes, "n0")[0])
    dataplane.load((), cluster.ranges(nodes["n0"], Policy()))
    moved = []
    for after in (
        {n: v for n, v in nodes.items() if n != "n9"},
        nodes,
        nodes | {"n9": Node("n9")},
        nodes,
        nodes,
    ):
        cluster.take(after, {n: v.pod_cidrs for n, v in after.items()})
        moved.append(dataplane.apply((), cluster.ranges(after["n0"], Policy())))
    assert moved == [3, 3, 3, 3, 0], "start and end of a range, and an address"


addresses = st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2", "fd00::1"]), max_size=2, unique=True)
cidrs = st.lists(st.sampled_from(["10.1.0.0/24", "10.1.1.0/24", "10.1.0.0/16", "fd00:1::/64"]), max_size=2)
names = st.sampled_from(["node1", "node2", "node3"])
clusters = st.dictionaries(names, st.tuples(cidrs.map(tuple), addresses.map(tuple)))


@given(st.lists(clusters, max_size=6), st.booleans())
def test_joins_leaves_and_changes_end_as_if_all_had_been_told_at_once(
    sequence: list[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]], told: bool
) -> None:
    """Whether it is told who has changed or not; several nodes may have one address for a while."""
    cluster, before = Cluster(), dict[str, Node]()
    for step in sequence:
        nodes = {name: Node(name, *has) for name, has in step.items()}
        cluster.take(nodes, accepted_ranges(nodes, "node1")[0], {*before, *nodes} if told else None)
        before = nodes
        assert cluster.ranges(nodes.get("node1", Node("node1")), Policy()) == ranges(nodes, "node1")
