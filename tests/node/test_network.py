"""The network in a namespace of its own: the kernel has exactly what nodes say, and others' things stay."""

from __future__ import annotations

import random
import select
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from netlink import netns
from netlink.requests import (
    ROUTE_PROTOCOL,
    RT_TABLE_MAIN,
    Route,
    Veth,
    Vxlan,
    address_add,
    link_set,
    link_up,
    route_delete,
    route_replace,
    veth_add,
    vxlan_add,
)
from netlink.rtnl import Rtnl
from node.backends.hops import NODE_TABLE, TunnelConfig
from node.network import HostRoute, Network, NetworkConfig
from node.wireguard_keys import Keys
from node.wireguard_tunnels import MISSING
from proxy.model import Node

STATIC = 4
POD_LINK = "pwpod0123456789"
HOME = ("fe80", "127.", "::1/")
ME = Node("node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11"), uid="u1")
NEAR = Node("node2", ("10.244.2.0/24", "fd00:2::/64"), ("192.168.50.12", "fd00:50::12"), uid="u2")
FAR = Node("node3", ("10.244.3.0/24", "fd00:3::/64"), ("192.168.60.13", "fd00:60::13"))
AUTO, DIRECT = NetworkConfig("auto"), NetworkConfig("direct")


def named(*nodes: Node) -> dict[str, Node]:
    return {node.name: node for node in nodes}


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A namespace with eth0 on two subnets, default routes, and a pod's interface."""
    name = namespaces()
    netns.run(name, _configure)
    return name


def _configure() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1), veth_add(Veth("eth0", "wire")), veth_add(Veth(POD_LINK, "pod")))
        index = {link.name: link.index for link in rtnl.links()}
        rtnl.commit(
            link_up(index["wire"]),
            link_up(index["pod"]),
            address_add(index["eth0"], "192.168.50.11/24"),
            address_add(index["eth0"], "fd00:50::11/64"),
            route_replace(Route("0.0.0.0/0", gateway="192.168.50.1", protocol=STATIC)),
            route_replace(Route("::/0", gateway="fd00:50::1", protocol=STATIC)),
        )


def inside(node: str, work: Callable[[Rtnl], Any]) -> Any:
    def run() -> Any:
        with Rtnl() as rtnl:
            return work(rtnl)

    return netns.run(node, run)


def kernel(rtnl: Rtnl) -> dict[str, object]:
    """Return everything of ours that the kernel has."""
    tunnels = {link.name: link for link in rtnl.links() if link.name.startswith("pwvxlan")}
    indexes = {link.index for link in tunnels.values()} | {1}
    routes = (*rtnl.routes(ROUTE_PROTOCOL), *rtnl.routes(ROUTE_PROTOCOL, NODE_TABLE))
    return {
        "devices": {name: (link.vxlan, link.up) for name, link in tunnels.items()},
        "addresses": {a.cidr for a in rtnl.addresses() if a.index in indexes and not a.cidr.startswith(HOME)},
        "routes": {
            (r.destination, r.table, r.gateway, r.mtu, r.source, r.metric, r.unreachable) for r in routes
        },
        "neighbours": {
            (n.address, n.mac)
            for link in tunnels.values()
            for n in rtnl.neighbours(link.index)
            if n.state == 0x80
        },
        "forwarding": {
            (n, f.mac, f.address) for n, link in tunnels.items() for f in rtnl.forwarding(link.index)
        },
        "rules": set(rtnl.rules()),
    }


def via(rtnl: Rtnl) -> dict[str, str | None]:
    return {r.destination: r.gateway for r in rtnl.routes(ROUTE_PROTOCOL)}


def test_direct_routes_lead_to_the_peers_and_nothing_else_is_made(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        network = Network(rtnl, "node1")
        network.compare(named(ME, NEAR, FAR), DIRECT)
        assert network.problems == ()
        assert via(rtnl) == {
            "10.244.1.0/24": None, "10.244.2.0/24": "192.168.50.12", "10.244.3.0/24": "192.168.50.1",
            "fd00:1::/64": None, "fd00:2::/64": "fd00:50::12", "fd00:3::/64": "fd00:50::1",
        }  # fmt: skip
        assert rtnl.route_to("10.244.1.5") is None, "our own range is unreachable"
        found = kernel(rtnl)
        assert (found["devices"], found["rules"], found["forwarding"]) == ({}, set(), set())
        assert {"10.244.1.0/32", "fd00:1::/128"} <= set(found["addresses"])  # type: ignore[call-overload]
        chosen = rtnl.route_to("fd00:2::5")
        assert chosen and chosen.source != "fd00:1::", "the range address is never chosen as a source here"

    inside(node, work)


def test_a_second_time_changes_nothing(node: str, caplog: pytest.LogCaptureFixture) -> None:
    def work(rtnl: Rtnl) -> None:
        nodes = named(ME, NEAR, FAR)
        Network(rtnl, "node1").compare(nodes, AUTO)
        before = kernel(rtnl)
        assert before["devices"] and before["forwarding"] and before["rules"]
        with caplog.at_level("INFO", "podwire.network"):
            Network(rtnl, "node1").compare(nodes, AUTO)  # as a daemon that starts anew
        assert "changed" not in caplog.text
        assert kernel(rtnl) == before

    inside(node, work)


def test_a_change_that_goes_at_once_ends_as_a_comparison_does(
    node: str, namespaces: Callable[[], str]
) -> None:
    """Random nodes near and far come, move, change ranges and go; two want one MAC, address or range."""
    chance = random.Random(6)

    def anybody(name: str) -> Node:
        number = chance.randrange(2, 12)
        address = (f"192.168.{chance.choice((50, 60))}.{number}", f"fd00:{chance.choice((50, 60))}::{number}")
        cidrs = (f"10.244.{number}.0/24", f"fd00:{number}::/64")
        mac = chance.choice(("", "", "02:00:00:00:00:09"))
        return Node(
            name, cidrs[: chance.randrange(3)], address[: chance.randrange(1, 3)], uid="", tunnel_mac=mac
        )

    names = [f"node{i}" for i in range(2, 9)]

    def work(rtnl: Rtnl) -> dict[str, Node]:
        network, nodes = Network(rtnl, "node1"), named(ME, FAR)
        network.compare(nodes, AUTO)
        for _ in range(100):
            name = chance.choice(names)
            nodes = {n: found for n, found in nodes.items() if n != name}
            if chance.random() < 0.7:
                nodes[name] = anybody(name)
            if not network.change(nodes, {name}):
                network.compare(nodes, AUTO)
        return nodes

    nodes = inside(node, work)
    fresh = namespaces()
    netns.run(fresh, _configure)
    inside(fresh, lambda rtnl: Network(rtnl, "node1").compare(nodes, AUTO))
    found, expected = inside(node, kernel), inside(fresh, kernel)
    for part, content in expected.items():
        if part == "devices":  # one that nobody needs any more goes with the next comparison
            assert content.items() <= found[part].items()
        elif part != "addresses" and part != "rules":
            assert found[part] == content, part
    inside(node, lambda rtnl: Network(rtnl, "node1").compare(nodes, AUTO))
    assert inside(node, kernel) == expected


def test_only_the_entries_of_the_node_that_changed_are_written(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        network, others = Network(rtnl, "node1"), [
            Node(f"n{i}", (f"10.9.{i}.0/24",), (f"192.168.61.{i}",)) for i in range(1, 30)
        ]  # fmt: skip
        network.compare(named(ME, NEAR, FAR, *others), AUTO)
        monitor = subprocess.Popen(
            ["ip", "-o", "monitor", "route", "neigh"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert monitor.stdout
            # What comes while it lists the interfaces, `ip` drops; so say something until it is heard.
            while not select.select([monitor.stdout], [], [], 0.1)[0]:
                rtnl.commit(route_replace(Route("203.0.113.0/24", gateway="192.168.50.1", protocol=STATIC)))
            moved = structs.replace(FAR, addresses=("192.168.60.99", "fd00:60::13"))
            assert network.change(named(ME, NEAR, moved, *others), {"node3"})
            rtnl.commit(route_replace(Route("198.51.100.0/24", gateway="192.168.50.1", protocol=STATIC)))
            told: list[str] = []
            while not told or "198.51.100.0" not in told[-1]:
                told.append(monitor.stdout.readline())
        finally:
            monitor.kill()
            monitor.wait()
            assert monitor.stdout
            monitor.stdout.close()
        assert not any("10.9." in line or "10.244.2." in line for line in told)
        assert any("192.168.60.99" in line for line in told)

    inside(node, work)


def test_a_node_replaced_under_its_name_is_reached_at_its_new_place(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        network = Network(rtnl, "node1")
        network.compare(named(ME, FAR), AUTO)
        assert {network.names[hop.route.oif] for hop in network.hops if hop.route.oif} == {
            "pwvxlan4",
            "pwvxlan6",
        }
        new = Node("node3", ("10.244.77.0/24",), ("192.168.70.13",), uid="another")
        assert network.change(named(ME, new), {"node3"})
        found = kernel(rtnl)
        assert set(via(rtnl)) == {"10.244.1.0/24", "fd00:1::/64", "10.244.77.0/24"}
        assert {address for _, _, address in found["forwarding"]} == {"192.168.70.13"}  # type: ignore[attr-defined]
        assert [address for address, _ in found["neighbours"]] == ["10.244.77.0"]  # type: ignore[attr-defined]

    inside(node, work)


def test_our_own_address_range_and_name_of_the_tunnel_change(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        network = Network(rtnl, "node1")
        network.compare(named(ME, FAR), AUTO)
        me = structs.replace(
            ME, addresses=("192.168.50.22", "fd00:50::22"), uid="u9", pod_cidrs=("10.244.9.0/24",)
        )
        assert not network.change(named(me, FAR), {"node1"}), "what concerns ourselves is compared as a whole"
        network.compare(named(me, FAR), AUTO)
        found = kernel(rtnl)
        assert found["addresses"] == {"10.244.9.0/32"}
        device = rtnl.link("pwvxlan4")
        assert device and device.vxlan
        assert (device.vxlan.local, device.vxlan.mac) == ("192.168.50.22", network.hops and device.mac)
        assert [r.source for r in found["rules"]] == ["10.244.9.0/24"]  # type: ignore[attr-defined]
        fresh = Network(rtnl, "node1")
        fresh.compare(named(me, FAR), AUTO)
        assert kernel(rtnl) == found

    inside(node, work)


@pytest.mark.parametrize("after", [
    DIRECT, NetworkConfig("vxlan"), NetworkConfig("auto", 1400),
    NetworkConfig("auto", tunnel=TunnelConfig(4789, 7)),
])  # fmt: skip
def test_another_configuration_leaves_nothing_of_the_one_before(
    node: str, namespaces: Callable[[], str], after: NetworkConfig
) -> None:
    nodes = named(ME, NEAR, FAR)

    def work(rtnl: Rtnl) -> None:
        network = Network(rtnl, "node1")
        network.compare(nodes, AUTO)
        network.compare(nodes, after)

    inside(node, work)
    fresh = namespaces()
    netns.run(fresh, _configure)
    inside(fresh, lambda rtnl: Network(rtnl, "node1").compare(nodes, after))
    assert inside(node, kernel) == inside(fresh, kernel)


def test_nothing_wanted_removes_only_ours(node: str) -> None:
    """Pod routes, which lead to an interface, and everybody else's routes, rules and devices stay."""

    def work(rtnl: Rtnl) -> None:
        pod = Route("10.244.1.5/32", oif=socket.if_nametoindex(POD_LINK))
        static = Route("10.100.0.0/16", gateway="192.168.50.1", protocol=STATIC)
        theirs = Vxlan("flannel.1", 1, 8472, "192.168.50.11", "02:00:00:00:00:01", 1450)
        rtnl.commit(route_replace(pod), route_replace(static), vxlan_add(theirs))
        subprocess.run(["ip", "rule", "add", "from", "10.1.0.0/16", "lookup", "77", "pref", "50"], check=True)
        before = (set(rtnl.routes()), rtnl.links(), subprocess.getoutput("ip rule; ip -6 rule"))
        network = Network(rtnl, "node1")
        network.compare(named(ME, NEAR, FAR), AUTO)
        network.compare({}, AUTO)
        assert (set(rtnl.routes()), rtnl.links(), subprocess.getoutput("ip rule; ip -6 rule")) == before

    inside(node, work)


def test_somebody_elses_route_to_a_destination_of_ours_stays(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        theirs = Route("10.244.2.0/24", gateway="192.168.50.77", protocol=STATIC)
        rtnl.commit(route_replace(theirs))
        network = Network(rtnl, "node1")
        network.compare(named(ME, NEAR), DIRECT)
        sentence = (
            "no route to 10.244.2.0/24 via 192.168.50.12: one of route protocol 4 is there, which stays"
        )
        assert network.problems == (sentence,)
        assert network.incomplete
        assert rtnl.route_to("10.244.2.5").gateway == "192.168.50.77"  # type: ignore[union-attr]
        rtnl.commit(route_delete(theirs))
        network.compare(named(ME, NEAR), DIRECT)
        assert network.problems == ()
        assert via(rtnl)["10.244.2.0/24"] == "192.168.50.12"

    inside(node, work)


def test_what_the_kernel_refuses_is_a_sentence_and_the_rest_is_there(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        theirs = Vxlan("theirs", 112, 8472, "192.168.50.11", "02:00:00:00:00:01", 1450)
        rtnl.commit(vxlan_add(theirs))
        network = Network(rtnl, "node1")
        network.compare(named(ME, NEAR, FAR), AUTO)
        assert network.problems == ("no tunnel device pwvxlan4 (UDP port 8472, VNI 112): File exists",)
        assert via(rtnl)["10.244.2.0/24"] == "192.168.50.12"
        assert via(rtnl)["fd00:3::/64"] is not None, "over IPv6 there is a device"
        assert not network.change(named(ME, NEAR), {"node3"}) or network.incomplete

    inside(node, work)


def test_a_route_and_neighbour_of_a_pod_that_somebody_removed_are_set_again(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        oif = socket.if_nametoindex(POD_LINK)
        pods = (
            HostRoute(POD_LINK, "10.244.1.5", "02:00:00:00:00:05"),
            HostRoute("pwpodgone", "10.244.1.6", ""),
        )
        network = Network(rtnl, "node1")
        network.compare(named(ME), AUTO, pods)
        assert Route("10.244.1.5/32", oif=oif) in rtnl.routes()
        assert "10.244.1.5" in {n.address for n in rtnl.neighbours(oif)}
        assert network.problems == ()

    inside(node, work)


def test_the_mtu_of_the_underlay_is_followed(node: str) -> None:
    def work(rtnl: Rtnl) -> None:
        network, nodes = Network(rtnl, "node1"), named(ME, NEAR, FAR)
        network.compare(nodes, AUTO)
        rtnl.commit(link_set(socket.if_nametoindex("eth0"), mtu=1400))
        network.compare(nodes, AUTO)
        mtus = {r.destination: r.mtu for r in rtnl.routes(ROUTE_PROTOCOL)}
        assert (mtus["10.244.3.0/24"], mtus["fd00:3::/64"], mtus["10.244.2.0/24"]) == (1350, 1330, 0)
        assert rtnl.link("pwvxlan4").mtu == 1350  # type: ignore[union-attr]
        wide = Route("192.168.60.0/24", gateway="192.168.50.9", mtu=1300, protocol=STATIC)
        rtnl.commit(route_replace(wide))
        network.compare(nodes, AUTO)
        assert {r.destination: r.mtu for r in rtnl.routes(ROUTE_PROTOCOL)}["10.244.3.0/24"] == 1250
        assert RT_TABLE_MAIN == 254

    inside(node, work)


def test_without_wireguard_in_the_kernel_nothing_leaves_as_it_is(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netlink.wireguard.NAME", "no-such-family")
    peer = structs.replace(NEAR, wireguard_keys=(f"{'a' * 42}A=", f"{'b' * 42}A="))

    def work(rtnl: Rtnl) -> None:
        network = Network(rtnl, "node1", keys=Keys(tmp_path))
        network.compare(named(ME, peer, FAR), NetworkConfig("wireguard"))
        unknown = "node node3: no way to its pods in 10.244.3.0/24: its Node object has no keys"
        assert any(problem.startswith(unknown) for problem in network.problems)
        assert MISSING in network.problems
        assert network.incomplete
        refused = ("10.244.2.5", "10.244.3.5", "fd00:2::5", "fd00:3::5")
        assert [rtnl.route_to(address) for address in refused] == [None] * 4
        assert kernel(rtnl)["devices"] == {}
        before = kernel(rtnl)
        network.compare(named(ME, peer, FAR), NetworkConfig("wireguard"))
        assert kernel(rtnl) == before
        network.compare(named(ME, peer, FAR), DIRECT)
        assert network.problems == ()
        assert via(rtnl)["10.244.2.0/24"] == "192.168.50.12"
        refusing = {r.destination for r in rtnl.routes(ROUTE_PROTOCOL) if r.unreachable}
        assert refusing == {"10.244.1.0/24", "fd00:1::/64"}, "our own ranges"

    inside(node, work)
