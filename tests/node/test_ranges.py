"""Of podCIDRs that overlap the same ones count, in whatever order the nodes come and go."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from node.ranges import Ranges, accepted_ranges
from proxy.model import Node

ME = Node("node1", ("10.244.1.0/24",), ("192.168.50.11",))
FAR = Node("node3", ("10.244.3.0/24",), ("192.168.60.13",))


def named(*nodes: Node) -> dict[str, Node]:
    return {node.name: node for node in nodes}


def test_of_two_nodes_with_one_range_the_first_name_counts() -> None:
    accepted, problems = accepted_ranges(named(FAR, Node("node2", ("10.244.3.0/25",))), "node1")
    assert accepted == {"node2": ("10.244.3.0/25",)}
    assert problems == (
        "node node3: podCIDR 10.244.3.0/24 overlaps 10.244.3.0/25 of node node2, which counts; "
        "it gets no route",
    )


def test_our_own_range_counts_before_any_name() -> None:
    accepted, problems = accepted_ranges(named(ME, Node("a", ("10.244.0.0/16",))), "node1")
    assert accepted == {"node1": ("10.244.1.0/24",)}
    assert len(problems) == 1


cidrs = st.builds(
    lambda bits, length: str(ip_network((bits << 20, length), strict=False)),
    st.integers(0, 4095),
    st.integers(8, 14),
)
names = st.sampled_from([f"node{i}" for i in range(9)])
ranges = st.lists(cidrs, max_size=2, unique=True).map(tuple)
nodes = st.dictionaries(names, ranges, max_size=9).map(
    lambda found: {name: Node(name, cidrs) for name, cidrs in found.items()}
)


@given(nodes)
def test_accepted_ranges_are_disjoint_and_every_other_has_a_sentence(found: dict[str, Node]) -> None:
    accepted, problems = accepted_ranges(found, "node1")
    # First come, first served, in order of name with ourselves first: no range is left out without a reason.
    expected: list[tuple[str, str]] = []
    for _, name, cidr in sorted((n.name != "node1", n.name, c) for n in found.values() for c in n.pod_cidrs):
        if not any(ip_network(cidr).overlaps(ip_network(other)) for _, other in expected):
            expected.append((name, cidr))
    assert sorted((name, cidr) for name, cidrs in accepted.items() for cidr in cidrs) == sorted(expected)
    assert len(expected) + len(problems) == sum(len(n.pod_cidrs) for n in found.values())


steps = st.lists(st.tuples(names, st.none() | ranges), max_size=12)


@given(nodes, steps)
def test_step_by_step_ends_as_all_at_once(
    found: dict[str, Node], changes: list[tuple[str, tuple[str, ...] | None]]
) -> None:
    kept = Ranges("node1")
    kept.take(found, found.keys())
    for name, cidrs in changes:
        before = dict(kept.accepted)
        found = {n: node for n, node in found.items() if n != name}
        if cidrs is not None:
            found[name] = Node(name, cidrs)
        moved = kept.take(found, {name})
        after, problems = accepted_ranges(found, "node1")
        assert (kept.accepted, kept.problems) == (after, problems)
        assert {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)} <= moved
