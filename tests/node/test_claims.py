"""Nodes give themselves pod ranges, through the API, and never the same one twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kube import claims
from node.kube.api import Api, ApiError, Credentials
from node.kube.claims import (
    Allocator,
    Claim,
    RangeError,
    abandoned,
    block_of,
    cluster_ranges,
    complaints,
    free,
    name_of,
    order,
)
from node.sources.objects import parse
from proxy.model import Node
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi, Refused

DUAL = cluster_ranges(("10.244.0.0/16", "fd00:10:244::/48"), (24, 64))
SMALL = cluster_ranges(("10.244.0.0/22",), (24, 64))  # four blocks
NAMESPACE = "kube-system"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with running.start(tls=False) as server:
        yield server


@pytest.fixture
def cluster(server: KubeApi) -> Iterator[KubeApi]:
    """The server without nodes and claims."""
    yield server
    server.clear()
    for plural, namespace in (("nodes", "default"), ("leases", NAMESPACE)):
        for item in server.list(plural)["items"]:
            server.delete(plural, item["metadata"]["name"], namespace=namespace)


@pytest.fixture(scope="module")
def api(server: KubeApi, tmp_path_factory: pytest.TempPathFactory) -> Api:
    return connected(server, tmp_path_factory.mktemp("api"))


def connected(server: KubeApi, directory: Path) -> Api:
    return Api(Credentials(server.kubeconfig(directory / "kubeconfig")))


def join(cluster: KubeApi, name: str, *cidrs: str) -> Node:
    spec = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
    found = parse(
        cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec})
    )
    assert isinstance(found, Node)
    return found


def nodes(cluster: KubeApi) -> dict[str, Node]:
    found = (parse({"kind": "Node", **item}) for item in cluster.list("nodes")["items"])
    return {node.name: node for node in found if isinstance(node, Node)}


def ranges_of(cluster: KubeApi, name: str) -> list[str]:
    found: list[str] = cluster.get("nodes", name)["spec"].get("podCIDRs", [])
    return found


def leases(cluster: KubeApi) -> dict[str, str]:
    """Names and holders of all claims."""
    items = cluster.list("leases", namespace=NAMESPACE)["items"]
    return {i["metadata"]["name"]: i["spec"]["holderIdentity"] for i in items}


def lease(name: str, holder: str, uid: str) -> dict[str, Any]:
    owner = {"apiVersion": "v1", "kind": "Node", "name": holder, "uid": uid}
    labels = {"podwire.io/pod-cidr": name.removeprefix("podwire-")}
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels, "ownerReferences": [owner]}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {"holderIdentity": holder},
    }


def insist(step: Callable[[], object], tries: int = 30) -> None:
    """Do what the loop of the daemon does: again after each error."""
    for _ in range(tries):
        try:
            step()
        except ApiError:
            continue
        return
    raise AssertionError(f"not in {tries} tries")


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("10.244.3.0/24", "10-244-3-0-24"),
        ("fd00:10:244:3::/64", "fd00-10-244-3---64"),
        ("fd00::/64", "fd00---64"),
        ("fd00:1:2:3:4:5:6:0/112", "fd00-1-2-3-4-5-6-0-112"),
    ],
)
def test_a_block_is_written_as_a_name_and_read_back(block: str, name: str) -> None:
    assert name_of(ip_network(block)) == name
    assert block_of(name) == ip_network(block)


@given(st.ip_addresses(v=6), st.integers(1, 128))
def test_every_block_is_read_back(address: Any, length: int) -> None:
    block = ip_network((address, length), strict=False)
    assert block_of(name_of(block)) == block


@pytest.mark.parametrize("name", ["", "web", "10-244-3-24", "10-244-3-7-24", "10-244-3-0-33", "leader--1"])
def test_a_lease_of_another_name_is_no_block(name: str) -> None:
    assert block_of(name) is None


@pytest.mark.parametrize(
    ("cidrs", "masks", "sentence"),
    [
        (("10.244.0.0",), (24, 64), "cluster range '10.244.0.0': blocks of /24 are not in /32 to /30"),
        (("10.244.0.1/16",), (24, 64), "cluster range '10.244.0.1/16': 10.244.0.1/16 has host bits set"),
        (("all",), (24, 64), "cluster range 'all': 'all' does not appear to be an IPv4 or IPv6 network"),
        (("10.244.0.0/16", "10.9.0.0/16"), (24, 64), "cluster range '10.9.0.0/16' is a second one of IPv4"),
        (("10.244.0.0/16",), (15, 64), "cluster range '10.244.0.0/16': blocks of /15 are not in /16 to /30"),
        (("10.0.0.0/8",), (25, 64), "cluster range '10.0.0.0/8': blocks of /25 are not in /8 to /24"),
        (("fd00::/40",), (24, 64), "cluster range 'fd00::/40': blocks of /64 are not in /40 to /56"),
        (("224.0.0.0/8",), (24, 64), "cluster range '224.0.0.0/8' has no addresses that pods can have"),
        (("fe80::/48",), (24, 64), "cluster range 'fe80::/48' has no addresses that pods can have"),
    ],
)  # fmt: skip
def test_a_wrong_cluster_range_is_one_sentence(
    cidrs: tuple[str, ...], masks: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(RangeError) as caught:
        cluster_ranges(cidrs, masks)
    assert str(caught.value) == sentence


@given(st.text(max_size=20), st.integers(0, 9))
def test_every_node_comes_to_every_block_once(node: str, bits: int) -> None:
    assert sorted(order(node, 1 << bits)) == list(range(1 << bits))


def test_nodes_begin_at_different_blocks() -> None:
    first = {next(order(f"node{i}", 65536)) for i in range(1000)}
    assert len(first) > 980


@given(st.lists(st.tuples(st.integers(0, 2**18 - 1), st.integers(20, 32)), max_size=6))
def test_a_free_block_overlaps_nothing_that_is_taken(others: list[tuple[int, int]]) -> None:
    (range_,) = cluster_ranges(("10.244.0.0/16",), (24, 64))
    base = int(ip_network("10.243.0.0/16").network_address)
    taken = [ip_network((base + offset, length), strict=False) for offset, length in others]
    found = list(free(range_, "node1", taken))
    assert not any(b.overlaps(t) for b in found for t in taken)
    rest = {
        b for b in ip_network("10.244.0.0/16").subnets(new_prefix=24) if not any(b.overlaps(t) for t in taken)
    }
    assert set(found) == rest


@pytest.mark.parametrize(
    ("holder", "given_up"),
    [
        (None, True),
        (Node("node1", uid="u1"), False),
        (Node("node1", uid="u2"), True),
        (Node("node1", ("10.244.3.0/24",), uid="u1"), False),
        (Node("node1", ("10.244.4.0/24",), uid="u1"), True),
    ],
)
def test_a_claim_is_given_up_with_its_node(holder: Node | None, given_up: bool) -> None:
    assert abandoned(Claim(ip_network("10.244.3.0/24"), "node1", "u1", "l", "1"), holder) is given_up


def test_a_node_gets_a_range_of_each_family_and_claims_for_them(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1")
    assert Allocator(api, NAMESPACE, "node1", DUAL).settle(nodes(cluster)) == ()
    first, second = map(ip_network, ranges_of(cluster, "node1"))
    assert first.subnet_of(DUAL[0].network) and first.prefixlen == 24  # type: ignore[arg-type]
    assert second.subnet_of(DUAL[1].network) and second.prefixlen == 64  # type: ignore[arg-type]
    assert cluster.get("nodes", "node1")["spec"]["podCIDR"] == str(first)
    assert leases(cluster) == {f"podwire-{name_of(b)}": "node1" for b in (first, second)}
    (owner,) = cluster.get("leases", f"podwire-{name_of(first)}", namespace=NAMESPACE)["metadata"][
        "ownerReferences"
    ]
    assert owner["uid"] == cluster.get("nodes", "node1")["metadata"]["uid"]


def test_a_node_that_has_a_range_is_left_alone(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1", "10.244.9.0/24")
    cluster.reset_counters()
    assert Allocator(api, NAMESPACE, "node1", DUAL[:1]).settle(nodes(cluster)) == ()
    assert not leases(cluster)
    assert cluster.counters().verbs.keys() == {"list"}  # the test's own


def test_a_range_outside_of_the_clusters_is_told() -> None:
    sentences = complaints(Node("node1", ("192.168.4.0/24",)), DUAL)
    assert sentences == (
        "node node1: podCIDR 192.168.4.0/24 is not inside the cluster range 10.244.0.0/16: it counts, but "
        "what is set up for that range (firewalls, masquerade elsewhere) leaves it out",
        "node node1: podCIDRs 192.168.4.0/24 have no IPv6 range, in spite of cluster range fd00:10:244::/48; "
        "that cannot be changed: drain the node and delete its Node object",
    )


def test_sixty_nodes_at_once_get_sixty_ranges(cluster: KubeApi, api: Api) -> None:
    ranges = cluster_ranges(
        ("10.244.0.0/18", "fd00:10:244::/58"), (24, 64)
    )  # 64 blocks: hardly any left over
    names = [f"node{i}" for i in range(60)]
    for name in names:
        join(cluster, name)
    known = nodes(cluster)  # which nobody hears any news of

    def settle(name: str) -> None:
        allocator = Allocator(api, NAMESPACE, name, ranges)
        insist(lambda: allocator.settle(known) == () or pytest.fail("no range"))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(settle, names))
    given = [c for n in names for c in ranges_of(cluster, n)]
    assert len(given) == len(set(given)) == 120
    assert len(leases(cluster)) == 120


def test_ranges_stay_distinct_while_the_server_refuses_and_breaks_off(cluster: KubeApi, api: Api) -> None:
    names = [f"node{i}" for i in range(24)]
    for name in names:
        join(cluster, name)
    known = nodes(cluster)
    for verb in ("create", "patch"):
        cluster.fail(409, times=4, verb=verb)
        cluster.fail(500, times=4, verb=verb)
        cluster.half(times=6, verb=verb)
        cluster.close(times=4, verb=verb)

    def settle(name: str) -> None:
        allocator = Allocator(api, NAMESPACE, name, DUAL)
        for _ in range(40):
            insist(lambda: allocator.settle(known))
            if ranges_of(cluster, name):
                return
        raise AssertionError(f"{name} has no range")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(settle, names))
    given = [c for n in names for c in ranges_of(cluster, n)]
    assert len(given) == len(set(given)) == 48
    assert {n for n, holder in leases(cluster).items() if holder in names} >= {
        f"podwire-{name_of(ip_network(c))}" for c in given
    }


def test_a_node_takes_its_own_claim_after_a_crash_in_between(cluster: KubeApi, api: Api) -> None:
    me = join(cluster, "node1")
    cluster.create(lease("podwire-10-244-77-0-24", "node1", me.uid))
    Allocator(api, NAMESPACE, "node1", DUAL).settle(nodes(cluster))
    assert ranges_of(cluster, "node1")[0] == "10.244.77.0/24"
    assert len(leases(cluster)) == 2


def test_a_node_made_again_takes_its_old_range_again(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1")
    allocator = Allocator(api, NAMESPACE, "node1", DUAL)
    allocator.settle(nodes(cluster))
    before = ranges_of(cluster, "node1")
    cluster.delete("nodes", "node1")
    join(cluster, "node1")
    allocator.settle(nodes(cluster))
    assert ranges_of(cluster, "node1") == before
    uid = cluster.get("nodes", "node1")["metadata"]["uid"]
    for name in leases(cluster):
        owners = cluster.get("leases", name, namespace=NAMESPACE)["metadata"]["ownerReferences"]
        assert [o["uid"] for o in owners] == [uid]


def test_a_node_made_again_while_its_range_is_chosen_is_not_patched(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1")
    stale = nodes(cluster)
    cluster.delete("nodes", "node1")
    join(cluster, "node1")
    allocator = Allocator(api, NAMESPACE, "node1", DUAL)
    allocator.settle(stale)
    assert ranges_of(cluster, "node1") == []
    assert leases(cluster) == {}
    allocator.settle(nodes(cluster))
    assert len(ranges_of(cluster, "node1")) == 2


def test_somebody_elses_podcidr_is_respected_and_our_claim_released(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1")
    before = nodes(cluster)
    spec = {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]}
    cluster.patch("nodes", "node1", {"spec": spec})
    Allocator(api, NAMESPACE, "node1", DUAL[:1]).settle(before)
    assert ranges_of(cluster, "node1") == ["10.244.9.0/24"]
    assert leases(cluster) == {}


def test_the_claim_of_a_node_that_is_gone_is_taken_over(cluster: KubeApi, api: Api) -> None:
    for number in range(3):
        join(cluster, f"other{number}", f"10.244.{number}.0/24")
    cluster.create(lease("podwire-10-244-3-0-24", "gone", "u"))
    join(cluster, "node1")
    assert Allocator(api, NAMESPACE, "node1", SMALL).settle(nodes(cluster)) == ()
    assert ranges_of(cluster, "node1") == ["10.244.3.0/24"]
    assert leases(cluster) == {"podwire-10-244-3-0-24": "node1"}


def test_the_claim_of_a_node_that_we_have_not_heard_of_yet_is_not_taken(cluster: KubeApi, api: Api) -> None:
    for number in range(3):
        join(cluster, f"other{number}", f"10.244.{number}.0/24")
    join(cluster, "node1")
    before = nodes(cluster)
    new = join(cluster, "new")
    cluster.create(lease("podwire-10-244-3-0-24", "new", new.uid))
    with pytest.raises(ApiError, match="others were quicker"):
        Allocator(api, NAMESPACE, "node1", SMALL).settle(before)
    assert leases(cluster) == {"podwire-10-244-3-0-24": "new"}


def test_a_claim_stays_while_it_is_open_whether_the_node_has_it(cluster: KubeApi, api: Api) -> None:
    join(cluster, "node1")
    cluster.fail(409, verb="patch", times=1)
    allocator = Allocator(api, NAMESPACE, "node1", DUAL)
    with pytest.raises(ApiError):
        allocator.settle(nodes(cluster))
    before = leases(cluster)
    assert len(before) == 2
    allocator.settle(nodes(cluster))
    assert leases(cluster) == before
    assert {f"podwire-{name_of(ip_network(c))}" for c in ranges_of(cluster, "node1")} == before.keys()


def test_nodes_that_are_made_again_all_the_time_never_share_a_range(cluster: KubeApi, api: Api) -> None:
    ranges = cluster_ranges(("10.244.0.0/20",), (24, 64))  # 16 blocks for 12 nodes
    names = [f"node{i}" for i in range(12)]
    for name in names:
        join(cluster, name)

    def live(name: str) -> None:
        allocator = Allocator(api, NAMESPACE, name, ranges)
        for turn in range(4):
            stale = nodes(cluster)
            if turn and int(name.removeprefix("node")) % 3 == 0:
                cluster.delete("nodes", name)
                join(cluster, name)
            for known in (stale, nodes(cluster)):
                with contextlib.suppress(ApiError):
                    allocator.settle(known)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(live, names))
    for name in names:  # what was left half done
        allocator = Allocator(api, NAMESPACE, name, ranges)
        insist(lambda: allocator.settle(nodes(cluster)))  # noqa: B023 (called at once)
    given = [c for n in names for c in ranges_of(cluster, n)]
    assert len(given) == len(set(given)) == 12


def test_a_range_that_is_used_up_is_told_with_numbers(cluster: KubeApi, api: Api) -> None:
    for number in range(3):
        join(cluster, f"other{number}", f"10.244.{number}.0/24")
    other = join(cluster, "other3")
    cluster.create(lease("podwire-10-244-3-0-24", "other3", other.uid))
    join(cluster, "node1")
    (sentence,) = Allocator(api, NAMESPACE, "node1", SMALL).settle(nodes(cluster))
    assert sentence == (
        "node node1 gets no podCIDR: of the 4 /24 blocks in cluster range 10.244.0.0/22 Nodes have 3, and 1 "
        "more are claimed; delete Node objects of nodes that are gone, or use a larger range"
    )
    assert ranges_of(cluster, "node1") == []


def test_no_block_with_a_service_or_of_a_nodes_range_of_another_size_is_taken(
    cluster: KubeApi, api: Api
) -> None:
    join(cluster, "other", "10.244.0.0/23")
    join(cluster, "node1")
    (sentence,) = Allocator(api, NAMESPACE, "node1", SMALL).settle(nodes(cluster), ["10.244.2.10", "fd00::1"])
    assert sentence == (
        "cluster range 10.244.0.0/22 overlaps that of Services: 1 have addresses in it, such as 10.244.2.10; "
        "their blocks are left out, and the ranges must not overlap"
    )
    assert ranges_of(cluster, "node1") == ["10.244.3.0/24"]


def test_neither_family_is_set_without_the_other(cluster: KubeApi, api: Api) -> None:
    ranges = cluster_ranges(("10.244.0.0/16", "fd00:10:244::/64"), (24, 64))
    join(cluster, "other", "fd00:10:244::/64")
    join(cluster, "node1")
    (sentence,) = Allocator(api, NAMESPACE, "node1", ranges).settle(nodes(cluster))
    assert "of the 1 /64 blocks in cluster range fd00:10:244::/64 Nodes have 1" in sentence
    assert ranges_of(cluster, "node1") == []
    assert leases(cluster) == {}


def test_a_node_without_an_object_waits(cluster: KubeApi, api: Api) -> None:
    assert Allocator(api, NAMESPACE, "node1", DUAL).settle({}) == ()
    with pytest.raises(Refused):
        cluster.get("nodes", "node1")


def test_claims_beyond_the_first_page_count_too(
    cluster: KubeApi, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PAGE", 1)
    other = join(cluster, "other")
    for number in range(3):
        cluster.create(lease(f"podwire-10-244-{number}-0-24", "other", other.uid))
    join(cluster, "node1")
    Allocator(api, NAMESPACE, "node1", SMALL).settle(nodes(cluster))
    assert ranges_of(cluster, "node1") == ["10.244.3.0/24"]
    assert cluster.requests("list", "continue=")
