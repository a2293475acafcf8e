"""Whose address is replaced on the way out: nobody's inside the cluster."""

from __future__ import annotations

from netlink.family import Family
from node.masquerade import ALWAYS_KEPT, ranges
from proxy.model import Node
from proxy.nftables.dataplane import NodeRanges

NODES = {
    "node1": Node("node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11")),
    "node2": Node("node2", ("10.244.2.0/24",), ("192.168.50.12",)),
}


def test_pods_and_nodes_are_exempt_and_so_is_what_the_user_names() -> None:
    assert ranges(NODES, "node1", ("10.0.0.0/8",)) == NodeRanges(
        pod_cidrs=("10.244.1.0/24", "fd00:1::/64", "10.244.2.0/24"),
        local_pod_cidrs=("10.244.1.0/24", "fd00:1::/64"),
        no_masquerade=(
            "10.244.1.0/24", "fd00:1::/64", "10.244.2.0/24",
            "192.168.50.11/32", "fd00:50::11/128", "192.168.50.12/32", *ALWAYS_KEPT, "10.0.0.0/8",
        ),
        node_ports=("192.168.50.11/32", "fd00:50::11/128"),
        node_pods=("10.244.1.0/24", "fd00:1::/64"),
    )  # fmt: skip


def test_without_nodes_only_link_local_and_multicast_are_exempt() -> None:
    assert ranges({}, "node1") == NodeRanges(no_masquerade=ALWAYS_KEPT, node_ports=())


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
