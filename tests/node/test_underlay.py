"""The node's network in a namespace of its own: addresses seen, routes made exactly ours."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from ipaddress import ip_network

import pytest

from netlink import netns
from netlink.requests import (
    Route,
    Veth,
    address_add,
    link_set,
    link_up,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl
from node import underlay
from node.network import Network, NetworkConfig
from proxy.model import Node
from tests.node.advertising import advertise, cabled
from tests.node.world import wait_until

STATIC = 4
POD_LINK = "pwpod0123456789"


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A namespace with eth0 on two subnets, and a pod's interface."""
    name = namespaces()
    netns.run(name, _configure)
    return name


def _configure() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1), veth_add(Veth("eth0", "wire", mtu=1400)), veth_add(Veth(POD_LINK, "pod")))
        index = {link.name: link.index for link in rtnl.links()}
        rtnl.commit(
            link_up(index["wire"]),
            link_up(index["pod"]),
            address_add(index["eth0"], "192.168.50.11/24"),
            address_add(index["eth0"], "fd00:50::11/64"),
        )


def looked(rtnl: Rtnl) -> underlay.Underlay:
    return underlay.ways(rtnl.links(), rtnl.routes())


def gateways(found: underlay.Underlay) -> dict[int, str]:
    ways = (found.way(anywhere) for anywhere in ("0.0.0.0", "::"))
    return {way.network.version: way.gateway for way in ways if way and way.gateway}


def subnets(found: underlay.Underlay) -> set[object]:
    return {way.network for way in found.ways if way.gateway is None}


def set_routes(*routes: Route) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(*(route_replace(r) for r in routes))


def test_the_node_sees_its_subnets_but_not_the_pods_and_its_preferred_gateway(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(address_add(socket.if_nametoindex(POD_LINK), "10.244.1.1/24"))
            assert gateways(looked(rtnl)) == {}
        set_routes(
            Route("0.0.0.0/0", gateway="192.168.50.1", protocol=STATIC),
            Route("::/0", gateway="fd00:50::1", protocol=STATIC),
        )
        worse = "ip route add default via 192.168.50.2 metric 600"
        subprocess.run(worse.split(), check=True)
        with Rtnl() as rtnl:
            found = looked(rtnl)
        assert {s for s in subnets(found) if not s.is_link_local} == {
            ip_network("192.168.50.0/24"),
            ip_network("fd00:50::/64"),
        }
        assert gateways(found) == {4: "192.168.50.1", 6: "fd00:50::1"}

    netns.run(node, inside)


def test_the_mtu_is_that_of_the_way_out(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_set(socket.if_nametoindex(POD_LINK), mtu=1280))
            assert underlay.egress_mtu(looked(rtnl)) == 1400, (
                "without a default route: the smallest that is no pod's"
            )
            rtnl.commit(veth_add(Veth("eth1", "wire1", mtu=9000)))
            rtnl.commit(address_add(socket.if_nametoindex("eth1"), "192.168.60.11/24"))
            rtnl.commit(link_up(socket.if_nametoindex("wire1")))
            rtnl.commit(route_replace(Route("0.0.0.0/0", gateway="192.168.60.1", protocol=STATIC)))
            assert underlay.egress_mtu(looked(rtnl)) == 9000

    netns.run(node, inside)


def test_without_any_interface_the_mtu_is_ethernets(namespaces: Callable[[], str]) -> None:
    def inside() -> int:
        with Rtnl() as rtnl:
            return underlay.egress_mtu(looked(rtnl))

    assert netns.run(namespaces(), inside) == 1500


@pytest.fixture
def advertised(namespaces: Callable[[], str]) -> tuple[str, str]:
    return cabled(namespaces)


def observed(node: str) -> underlay.Underlay:
    def inside() -> underlay.Underlay:
        with Rtnl() as rtnl:
            return looked(rtnl)

    return netns.run(node, inside)


def test_far_pods_are_reached_by_a_gateway_that_has_a_link_local_address_only(
    advertised: tuple[str, str],
) -> None:
    node, router = advertised
    advertise(router, 1800)
    wait_until(lambda: 6 in gateways(observed(node)), "the default route")
    me = Node("node1", ("fd00:1::/64",), ("fd00:50::11",))
    near, far = (
        Node("near", ("fd00:2::/64",), ("fd00:50::12",)),
        Node("far", ("fd00:3::/64",), ("fd00:60::13",)),
    )

    def inside() -> None:
        with Rtnl() as rtnl:
            network = Network(rtnl, "node1")
            network.compare({n.name: n for n in (me, near, far)}, NetworkConfig("direct"))
            assert network.problems == ()
            assert {hop.node: hop.route.gateway for hop in network.hops} == {
                "node1": None, "near": "fd00:50::12", "far": gateways(looked(rtnl))[6]
            }  # fmt: skip

    netns.run(node, inside)


def test_an_address_of_a_host_is_on_the_subnet_that_a_route_names(node: str) -> None:
    """DHCPv6 gives an address alone; which subnet it is on, the router advertises."""

    def inside() -> None:
        eth0 = socket.if_nametoindex("eth0")
        with Rtnl() as rtnl:
            rtnl.commit(address_add(eth0, "fd00:70::11/128"))
            assert ip_network("fd00:70::/64") not in subnets(looked(rtnl))
            rtnl.commit(route_replace(Route("fd00:70::/64", oif=eth0, protocol=STATIC)))
            assert ip_network("fd00:70::/64") in subnets(looked(rtnl))

    netns.run(node, inside)
