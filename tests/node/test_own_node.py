"""A node says in its Node object where tunnels find it, and that its network is up."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPAddress, IPNetwork

from node.backends.vxlan import tunnel_mac
from node.kube.api import Api, ApiError, Credentials
from node.kube.own_node import Patches, moved, settle, wanted
from node.sources.objects import ObjectError, parse
from proxy.model import Node
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi

NOW = datetime(2026, 5, 1, 10, 0, 0, tzinfo=UTC)
ADDRESSES = [
    {"type": "ExternalIP", "address": "203.0.113.7"},
    {"type": "InternalIP", "address": "192.168.50.11"},
    {"type": "InternalIP", "address": "192.168.60.11"},
    {"type": "InternalIP", "address": "FD00:50::11"},
]
OURS = {
    "podwire.io/tunnel-address": "192.168.50.11,fd00:50::11",
    "podwire.io/tunnel-mac": tunnel_mac("node1", "u-1"),
}
UP = {
    "type": "NetworkUnavailable",
    "status": "False",
    "reason": "PodwireIsUp",
    "message": "podwire can add pods on this node",
    "lastHeartbeatTime": "2026-05-01T10:00:00Z",
    "lastTransitionTime": "2026-05-01T10:00:00Z",
}


def document(annotations: Any = None, conditions: Any = None, addresses: Any = ADDRESSES) -> dict[str, Any]:
    return {
        "metadata": {"name": "node1", "uid": "u-1", "annotations": annotations},
        "spec": {},
        "status": {"addresses": addresses, "conditions": conditions},
    }


def condition(status: str) -> dict[str, str]:
    return {"type": "NetworkUnavailable", "status": status, "reason": "NoRouteCreated"}


def test_a_new_node_gets_annotations_and_then_its_condition() -> None:
    annotate = {"metadata": {"uid": "u-1", "annotations": OURS}}
    clear = {"metadata": {"uid": "u-1"}, "status": {"conditions": [UP]}}
    assert wanted(document(), False, NOW) == Patches(annotate)
    assert wanted(document(), True, NOW) == Patches(annotate, clear)


def test_a_node_that_says_all_this_is_left_alone() -> None:
    others = {"kubeadm.alpha.kubernetes.io/cri-socket": "unix:///run/containerd.sock"}
    assert wanted(document({**others, **OURS}, [condition("False")]), True, NOW) == Patches()


@pytest.mark.parametrize("status", ["True", "Unknown"])
def test_a_network_said_to_be_unavailable_is_cleared_once_pods_can_be_added(status: str) -> None:
    said = document(OURS, [{"type": "Ready", "status": "True"}, condition(status)])
    assert wanted(said, False, NOW) == Patches()
    assert wanted(said, True, NOW).status == {"metadata": {"uid": "u-1"}, "status": {"conditions": [UP]}}


def test_only_the_annotation_that_differs_is_patched() -> None:
    said = document(OURS | {"podwire.io/tunnel-address": "10.0.0.1"}, [condition("False")])
    patch = {"podwire.io/tunnel-address": OURS["podwire.io/tunnel-address"]}
    assert wanted(said, True, NOW).node == {"metadata": {"uid": "u-1", "annotations": patch}}


def test_other_annotations_are_set_and_taken_away_with_these() -> None:
    more = {"podwire.io/wireguard-keys": "a,b", "podwire.io/wireguard-detour": None}
    first = wanted(document(OURS), False, NOW, more).node
    assert first == {"metadata": {"uid": "u-1", "annotations": {"podwire.io/wireguard-keys": "a,b"}}}
    said = document({**OURS, "podwire.io/wireguard-keys": "a,b", "podwire.io/wireguard-detour": "true"})
    then = wanted(said, False, NOW, more).node
    assert then == {"metadata": {"uid": "u-1", "annotations": {"podwire.io/wireguard-detour": None}}}
    assert wanted(document({**OURS, "podwire.io/wireguard-keys": "a,b"}), False, NOW, more) == Patches()


def test_a_node_without_addresses_says_where_it_was() -> None:
    assert wanted(document(OURS, addresses=[]), False, NOW) == Patches()


def test_the_mac_is_one_nodes_and_locally_administered() -> None:
    mac = tunnel_mac("node1", "u-1")
    assert mac == tunnel_mac("node1", "u-1")
    assert len({mac, tunnel_mac("node1", "u-2"), tunnel_mac("node2", "u-1")}) == 3
    assert int(mac[:2], 16) & 3 == 2
    said = parse({"kind": "Node", **document(OURS)})
    assert isinstance(said, Node) and said.tunnel_mac == mac


def test_a_node_that_is_wrong_is_not_touched() -> None:
    with pytest.raises(ObjectError):
        wanted({"metadata": {"name": "node1", "uid": "u-1"}, "spec": {"podCIDRs": ["all"]}}, True, NOW)


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        (["10.244.1.0/24"], ["10.244.7.0/24"], 2),
        (["10.244.1.0/24", "fd00:1::/64"], ["10.244.7.0/24", "fd00:1::/64"], 2),
        (["10.244.1.0/24", "fd00:1::/64"], ["10.244.1.0/24"], 1),
        (["10.244.1.0/24"], ["10.244.1.0/24"], 0),
        (["10.244.5.0/24"], ["10.244.7.0/24"], 0),
    ],
)
def test_pods_with_addresses_of_the_former_range_are_counted(
    old: list[str], new: list[str], count: int
) -> None:
    pods = [("10.244.1.2", "fd00:1::2"), ("10.244.1.3",), ("10.244.7.2",), ("172.20.0.9",)]
    attachments = [tuple(map(IPAddress, p)) for p in pods]
    sentence = moved("node1", [*map(IPNetwork, old)], [*map(IPNetwork, new)], attachments)
    assert sentence.startswith(
        f"node node1: its podCIDR was {', '.join(old)} and is {', '.join(new)}" * bool(count)
    )
    assert (f"{count} pods still have" in sentence) == bool(count)


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with running.start(tls=False) as server:
        yield server


@pytest.fixture
def api(server: KubeApi, tmp_path: Path) -> Iterator[Api]:
    yield Api(Credentials(server.kubeconfig(tmp_path / "kubeconfig")))
    server.clear()
    for item in server.list("nodes")["items"]:
        server.delete("nodes", item["metadata"]["name"])


def test_the_api_has_it_after_one_round_and_nothing_is_written_in_the_next(server: KubeApi, api: Api) -> None:
    conditions = [{"type": "Ready", "status": "True"}, condition("True")]
    status = {"addresses": ADDRESSES, "conditions": conditions}
    server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}, "status": status})
    server.patch("nodes", "node1", {"status": status}, part="status")
    assert settle(api, "node1", ready=True, now=NOW) == ()
    found = server.get("nodes", "node1")
    assert found["metadata"]["annotations"]["podwire.io/tunnel-address"] == "192.168.50.11,fd00:50::11"
    assert found["metadata"]["annotations"]["podwire.io/tunnel-mac"] == tunnel_mac(
        "node1", found["metadata"]["uid"]
    )
    assert {c["type"]: c["status"] for c in found["status"]["conditions"]} == {
        "Ready": "True",
        "NetworkUnavailable": "False",
    }
    server.reset_counters()
    assert settle(api, "node1", ready=True, now=NOW) == ()
    assert server.counters().verbs == {"get": 1}


def test_a_node_that_is_gone_is_the_apis_answer(server: KubeApi, api: Api) -> None:
    with pytest.raises(ApiError) as caught:
        settle(api, "node1", ready=True, now=NOW)
    assert caught.value.status == 404
