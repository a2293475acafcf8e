"""What WireGuard's devices are to know of peers, and what that asks of the kernel; pure."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest
from msgspec import structs

from netlink.requests import Route
from netlink.wireguard import Change, Known, Peer
from node.backends import DEVICES, wireguard
from node.backends.hops import GUARD, NODE_TABLE, Hop, Peering, Site, Turning, Underlay, Way, metric_of
from node.backends.wireguard import SESSION_SECONDS, Entry, device_mtu, difference, entries, overhead, peers
from node.peers import Peers
from node.sources.objects import parse
from proxy.model import Node

ETH0, WG0, WG1 = 2, 7, 8
NOW = 1_000_000.0
KEYS = tuple(f"{letter * 42}A=" for letter in "abcdefgh")
ME = Node(
    "node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11"), wireguard_keys=KEYS[:2]
)
PEER = Node(
    "node2", ("10.244.2.0/24", "fd00:2::/64"), ("192.168.50.12", "fd00:50::12"), wireguard_keys=KEYS[2:4]
)
LAN = Underlay(
    (
        Way(ip_network("192.168.50.0/24"), ETH0),
        Way(ip_network("fd00:50::/64"), ETH0, mtu=1400),
        Way(ip_network("0.0.0.0/0"), ETH0, "192.168.50.1"),
    )
)
HERE = Site(ME, LAN, "wireguard", None, {4: "10.244.1.0", 6: "fd00:1::"}, {"pwwg0": WG0, "pwwg1": WG1})


def planned(*nodes: Node, site: Site = HERE) -> Peers:
    found = Peers("node1")
    found.take({node.name: node for node in (ME, *nodes)}, site)
    return found


def hop(peer: Node, cidr: str, site: Site = HERE) -> Hop:
    found = wireguard.hop(site, peer, cidr)
    assert found
    return found


def test_a_range_and_its_nodes_addresses_are_behind_the_device_and_no_gateway() -> None:
    found = hop(PEER, "10.244.2.0/24")
    wanted = Route("10.244.2.0/24", oif=WG0, mtu=1440, source="192.168.50.11", metric=metric_of(found.cidr))
    assert found.routes == (wanted, replace(wanted, destination="192.168.50.12/32", table=NODE_TABLE))
    assert found.guards == tuple(Route(r.destination, table=r.table, metric=GUARD) for r in found.routes)
    assert found.peering == Peering(KEYS[2:4], "192.168.50.12", ("10.244.2.0/24", "192.168.50.12/32"))
    six = hop(PEER, "fd00:2::/64")
    assert (six.peer, six.tunnel, six.problem) == ("192.168.50.12", "pwwg0", "")
    assert [r.destination for r in six.routes] == ["fd00:2::/64", "fd00:50::12/128"]


def test_over_ipv6_more_is_taken() -> None:
    far = structs.replace(PEER, addresses=("fd00:50::12",))
    assert hop(far, "10.244.2.0/24").route.mtu == 1400 - 80
    small = replace(HERE, underlay=Underlay((Way(ip_network("fd00:50::/64"), ETH0, mtu=1300),)))
    found = hop(far, "fd00:2::/64", small)
    assert (found.route.mtu, found.problem) == (
        1280,
        "1220 bytes fit into the tunnel to fd00:50::12, IPv6 needs 1280",
    )
    assert device_mtu(HERE) == 1440
    assert (overhead(ME, [4, 6]), overhead(structs.replace(ME, addresses=("fd00::1",)), [4])) == (60, 80)


@pytest.mark.parametrize(("own", "peers_", "device"), [
    (False, False, "pwwg0"), (True, False, "pwwg1"), (False, True, "pwwg1"), (True, True, "pwwg1")
])  # fmt: skip
def test_the_detour_is_taken_if_either_side_says_so(own: bool, peers_: bool, device: str) -> None:
    peer = structs.replace(PEER, wireguard_detour=peers_)
    found = hop(peer, "10.244.2.0/24", replace(HERE, turning=Turning(own)))
    assert (found.tunnel, found.route.oif) == (device, WG1 if device == "pwwg1" else WG0)


def test_a_node_without_keys_is_named_and_others_are_reached() -> None:
    other = Node("node3", ("10.244.3.0/24",), ("192.168.50.13",))
    found = planned(PEER, other)
    assert found.problems == (
        "node node3: no way to its pods in 10.244.3.0/24: its Node object has no keys for WireGuard "
        "(annotation podwire.io/wireguard-keys)",
    )
    assert {h.node for h in found.hops if h.tunnel} == {"node2"}
    assert [h.routes for h in found.hops if h.node == "node3"] == [(Route("10.244.3.0/24", metric=GUARD),)]
    assert found.tunnels == {"pwwg0"}


def test_of_two_nodes_with_one_key_the_first_counts() -> None:
    twin = Node("node0", ("10.244.3.0/24",), ("192.168.50.13",), wireguard_keys=(KEYS[5], KEYS[3]))
    found = planned(PEER, twin)
    assert {h.node for h in found.hops if h.tunnel} == {"node0"}
    assert found.problems[0].endswith(f"its WireGuard key {KEYS[3]} is that of node node0")
    copy = structs.replace(PEER, wireguard_keys=KEYS[:2])
    assert planned(copy).problems[0].endswith(f"its WireGuard key {KEYS[0]} is that of node node1")


def test_both_devices_know_all_of_a_node_each_by_its_own_key() -> None:
    found, contested = entries(planned(PEER).hops)
    allowed = frozenset({"10.244.2.0/24", "192.168.50.12/32", "fd00:2::/64", "fd00:50::12/128"})
    assert (found, contested) == ({"node2": Entry(KEYS[2:4], "192.168.50.12", allowed)}, False)
    site = replace(HERE, turning=Turning(True, (0, 10)))
    assert peers(found.values(), 0, site) == {KEYS[2]: Peer(KEYS[2], ("192.168.50.12", 51820), allowed)}
    assert peers(found.values(), 1, site) == {KEYS[3]: Peer(KEYS[3], ("192.168.50.12", 51821), allowed, 10)}


def test_an_address_that_two_nodes_have_is_the_first_ones() -> None:
    other = Node("node3", ("10.244.3.0/24",), ("192.168.50.12",), wireguard_keys=KEYS[4:6])
    found, contested = entries(planned(PEER, other).hops)
    assert contested
    assert "192.168.50.12/32" in found["node2"].allowed
    assert found["node3"].allowed == {"10.244.3.0/24"}


def test_a_difference_is_told_and_no_more() -> None:
    one, two, three = (Peer(KEYS[n], ("192.0.2.1", 51820), frozenset({f"10.244.{n}.0/24"})) for n in range(3))
    there = {one.key: Known(one, NOW), two.key: Known(two._replace(keepalive=10), NOW)}
    assert difference({one.key: Known(one)}, {one.key: one}, NOW) == ()
    more = two._replace(allowed=two.allowed | {"192.0.2.1/32"})
    assert difference(there, {two.key: more, three.key: three}, NOW) == (
        Change(two.key, allowed=more.allowed, keepalive=0),
        Change(three.key, three.endpoint, three.allowed, 0),
        Change(one.key, remove=True),
    )


def test_where_a_peer_sends_from_stays_as_long_as_its_session_lives() -> None:
    peer = Peer(KEYS[2], ("192.168.50.12", 51820))
    moved = peer._replace(endpoint=("203.0.113.5", 4500))
    wanted = {peer.key: peer}
    assert difference({peer.key: Known(moved, NOW - SESSION_SECONDS)}, wanted, NOW) == ()
    (change,) = difference({peer.key: Known(moved, NOW - SESSION_SECONDS - 1)}, wanted, NOW)
    assert change == Change(peer.key, endpoint=peer.endpoint)


def test_the_names_of_all_tunnels_are_known() -> None:
    assert DEVICES == ("pwvxlan4", "pwvxlan6", "pwwg0", "pwwg1")


@pytest.mark.parametrize(("text", "keys"), [
    (f"{KEYS[0]},{KEYS[1]}", KEYS[:2]),
    (f" {KEYS[0]} , {KEYS[1]} ", KEYS[:2]),
    ("", ()),
])  # fmt: skip
def test_keys_are_read_from_the_node_object(text: str, keys: tuple[str, ...]) -> None:
    found = parse(_document(text))
    assert isinstance(found, Node)
    assert (found.wireguard_keys, found.wireguard_detour) == (keys, False)


@pytest.mark.parametrize("text", [
    KEYS[0], f"{KEYS[0]},", f"{KEYS[0]},{KEYS[0]}", ",".join(KEYS[:3]), f"{KEYS[0]},{'b' * 43}=",
    f"{KEYS[0]},{KEYS[1][:-1]}", "key0,key1",
])  # fmt: skip
def test_a_wrong_annotation_is_a_sentence_and_that_node_has_no_keys(text: str) -> None:
    left_out: list[str] = []
    found = parse(_document(text), left_out)
    assert isinstance(found, Node)
    assert found.wireguard_keys == ()
    assert len(left_out) == 1
    assert "metadata.annotations[podwire.io/wireguard-keys] " in left_out[0]
    assert left_out[0].endswith(
        "is not two different keys of 32 bytes in base64, with a comma between them: left out"
    )


def test_the_detour_is_read_from_the_node_object() -> None:
    document = _document("")
    document["metadata"]["annotations"] = {"podwire.io/wireguard-detour": "true"}
    found = parse(document)
    assert isinstance(found, Node) and found.wireguard_detour


def _document(text: str) -> dict[str, dict[str, object]]:
    annotations = {"podwire.io/wireguard-keys": text}
    return {"kind": "Node", "metadata": {"name": "node2", "annotations": annotations}}  # type: ignore[dict-item]
