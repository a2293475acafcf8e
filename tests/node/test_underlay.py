"""The node's network in a namespace of its own: addresses seen, routes made exactly ours."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from ipaddress import ip_network
from pathlib import Path

import pytest

from netlink import netns
from netlink.requests import (
    ROUTE_PROTOCOL,
    Route,
    Veth,
    address_add,
    link_set,
    link_up,
    route_delete,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl
from node import underlay
from node.routes import Gateway, plan
from proxy.model import Node
from tests.node.world import wait_until

STATIC = 4
NEAR = Route("10.244.2.0/24", gateway="192.168.50.12")
FAR = Route("10.244.3.0/24", gateway="192.168.50.1")
OWN = Route("10.244.1.0/24")
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


def ours() -> dict[str, str | None]:
    with Rtnl() as rtnl:
        return {r.destination: r.gateway for r in rtnl.routes(ROUTE_PROTOCOL)}


def sync(*wanted: Route) -> tuple[int, list[str]]:
    with Rtnl() as rtnl:
        return underlay.sync_routes(rtnl, wanted)


def set_routes(*routes: Route) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(*(route_replace(r) for r in routes))


def test_the_start_makes_our_routes_exactly_these(node: str) -> None:
    def inside() -> None:
        set_routes(Route("10.9.0.0/24", gateway="192.168.50.9"), Route("10.8.0.0/24"), NEAR)
        assert sync(NEAR, FAR, OWN, Route("fd00:2::/64", gateway="fd00:50::12"), Route("fd00:1::/64")) == (
            6,
            [],
        )
        assert ours() == {
            "10.244.1.0/24": None,
            "10.244.2.0/24": "192.168.50.12",
            "10.244.3.0/24": "192.168.50.1",
            "fd00:1::/64": None,
            "fd00:2::/64": "fd00:50::12",
        }
        with Rtnl() as rtnl:
            assert rtnl.route_to("10.244.1.5") is None, "our own range is unreachable"
            found = rtnl.route_to("10.244.2.5")
            assert found
            assert found.gateway == "192.168.50.12"

    netns.run(node, inside)


def test_a_second_time_changes_nothing(node: str) -> None:
    def inside() -> None:
        wanted = (NEAR, OWN, Route("fd00:1::/64"))
        sync(*wanted)
        assert sync(*wanted) == (0, [])

    netns.run(node, inside)


def test_a_new_gateway_replaces_the_route(node: str) -> None:
    def inside() -> None:
        sync(NEAR, Route("fd00:2::/64", gateway="fd00:50::12"))
        sync(Route("10.244.2.0/24", gateway="192.168.50.99"), Route("fd00:2::/64", gateway="fd00:50::99"))
        assert ours() == {"10.244.2.0/24": "192.168.50.99", "fd00:2::/64": "fd00:50::99"}

    netns.run(node, inside)


def test_nothing_wanted_removes_only_ours(node: str) -> None:
    """Pod routes, which lead to an interface, and everybody else's routes stay."""

    def inside() -> None:
        pod = Route("10.244.1.5/32", oif=socket.if_nametoindex(POD_LINK))
        static = Route("10.100.0.0/16", gateway="192.168.50.1", protocol=STATIC)
        set_routes(pod, static, NEAR, OWN)
        with Rtnl() as rtnl:
            before = set(rtnl.routes())
        assert sync() == (2, [])
        with Rtnl() as rtnl:
            gone = before - set(rtnl.routes())
        assert {r.destination for r in gone} == {NEAR.destination, OWN.destination}

    netns.run(node, inside)


def test_somebody_elses_route_to_a_destination_of_ours_stays(node: str) -> None:
    def inside() -> None:
        set_routes(Route(NEAR.destination, gateway="192.168.50.77", protocol=STATIC))
        sentence = (
            "no route to 10.244.2.0/24 via 192.168.50.12: one of route protocol 4 is there, which stays"
        )
        assert sync(NEAR, FAR) == (1, [sentence])
        assert ours() == {FAR.destination: FAR.gateway}
        with Rtnl() as rtnl:
            found = rtnl.route_to("10.244.2.5")
            assert found
            assert found.gateway == "192.168.50.77"
            rtnl.commit(route_delete(Route(NEAR.destination, gateway="192.168.50.77", protocol=STATIC)))
        assert sync(NEAR, FAR) == (1, [])

    netns.run(node, inside)


def test_a_route_that_the_kernel_refuses_is_a_sentence_and_the_others_are_set(node: str) -> None:
    def inside() -> None:
        wrong = Route("10.244.9.0/24", gateway="172.31.0.1")
        assert sync(NEAR, wrong, FAR) == (
            2, ["no route to 10.244.9.0/24 via 172.31.0.1: Network is unreachable"]
        )  # fmt: skip
        assert ours() == {r.destination: r.gateway for r in (NEAR, FAR)}

    netns.run(node, inside)


def test_the_node_sees_its_subnets_but_not_the_pods_and_its_preferred_gateway(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(address_add(socket.if_nametoindex(POD_LINK), "10.244.1.1/24"))
            assert underlay.observe(rtnl).gateways == {}
        set_routes(
            Route("0.0.0.0/0", gateway="192.168.50.1", protocol=STATIC),
            Route("::/0", gateway="fd00:50::1", protocol=STATIC),
        )
        worse = "ip route add default via 192.168.50.2 metric 600"
        subprocess.run(worse.split(), check=True)
        with Rtnl() as rtnl:
            found = underlay.observe(rtnl)
        subnets = {s for s in found.subnets if not s.is_link_local}
        assert subnets == {ip_network("192.168.50.0/24"), ip_network("fd00:50::/64")}
        assert found.gateways == {4: Gateway("192.168.50.1"), 6: Gateway("fd00:50::1")}

    netns.run(node, inside)


def test_the_mtu_is_that_of_the_way_out(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_set(socket.if_nametoindex(POD_LINK), mtu=1280))
            assert underlay.egress_mtu(rtnl) == 1400, "without a default route: the smallest that is no pod's"
            rtnl.commit(veth_add(Veth("eth1", "wire1", mtu=9000)))
            rtnl.commit(address_add(socket.if_nametoindex("eth1"), "192.168.60.11/24"))
            rtnl.commit(link_up(socket.if_nametoindex("wire1")))
            rtnl.commit(route_replace(Route("0.0.0.0/0", gateway="192.168.60.1", protocol=STATIC)))
            assert underlay.egress_mtu(rtnl) == 9000

    netns.run(node, inside)


def test_without_any_interface_the_mtu_is_ethernets(namespaces: Callable[[], str]) -> None:
    def inside() -> int:
        with Rtnl() as rtnl:
            return underlay.egress_mtu(rtnl)

    assert netns.run(namespaces(), inside) == 1500


def test_forwarding_is_set_for_both_families(namespaces: Callable[[], str]) -> None:
    def inside() -> tuple[list[str], list[str], list[str]]:
        before = [path.read_text().strip() for path in underlay.FORWARDING]
        problems = underlay.forward_packets()
        return before, problems, [path.read_text().strip() for path in underlay.FORWARDING]

    assert netns.run(namespaces(), inside) == (["0", "0"], [], ["1", "1"])


def test_tcp_outside_the_window_is_let_pass_only_if_asked_for(namespaces: Callable[[], str]) -> None:
    """kubernetes#74839: random resets; what connection tracking cannot place is not translated."""

    def inside() -> tuple[str, list[str], str]:
        before = underlay.TCP_BE_LIBERAL.read_text().strip()
        problems = underlay.be_liberal()
        return before, problems, underlay.TCP_BE_LIBERAL.read_text().strip()

    assert netns.run(namespaces(), inside) == ("0", [], "1")


def test_where_forwarding_cannot_be_set_that_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadOnly(type(tmp_path)):  # type: ignore[misc]
        def write_text(self, *_: object, **__: object) -> int:
            raise OSError(30, "Read-only file system")

    file = ReadOnly(tmp_path / "ip_forward")
    Path(file).write_text("0\n")
    monkeypatch.setattr(underlay, "FORWARDING", (file, tmp_path / "absent"))
    assert underlay.forward_packets() == [
        f"{file} cannot be set to 1: Read-only file system; pods will not reach other nodes"
    ]


@pytest.fixture
def advertised(namespaces: Callable[[], str]) -> tuple[str, str]:
    """A node with eth0 and eth1 to a router; the names of the node's and the router's namespaces."""
    node, router = namespaces(), namespaces()

    def cables() -> None:
        with Rtnl() as rtnl, netns.opened(router) as other:
            for name in ("eth0", "eth1"):
                rtnl.commit(veth_add(Veth(name, name, peer_netns=other)))

    def up() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(*(link_up(socket.if_nametoindex(name)) for name in ("lo", "eth0", "eth1")))

    def usable() -> bool:
        with Rtnl() as rtnl:
            return any(a.cidr.startswith("fe80:") for a in rtnl.addresses(socket.if_nametoindex("eth0")))

    for name in (node, router):
        netns.run(name, Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text, "0")
    netns.run(node, cables)
    netns.run(router, up)
    netns.run(node, up)
    for name in (node, router):
        wait_until(partial(netns.run, name, usable), "a link-local address")
    return node, router


def advertise(router: str, lifetime: int) -> None:
    """Send a router advertisement on eth0 (RFC 4861, 4.2 and 4.6.2): a default route, and fd00:50::/64."""
    head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, lifetime, 0, 0)
    on_link_and_for_addresses = 0xC0
    prefix = struct.pack("!BBBBIII", 3, 4, 64, on_link_and_for_addresses, 3600, 1800, 0)
    prefix += socket.inet_pton(socket.AF_INET6, "fd00:50::")

    def send() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            raw.sendto(head + prefix, ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))

    netns.run(router, send)


def observed(node: str) -> underlay.Underlay:
    def inside() -> underlay.Underlay:
        with Rtnl() as rtnl:
            return underlay.observe(rtnl)

    return netns.run(node, inside)


def accept_ra(node: str) -> list[str]:
    files = [Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra") for name in ("eth0", "eth1")]
    return netns.run(node, lambda: [file.read_text().strip() for file in files])


def test_a_default_route_from_a_router_advertisement_stays_when_forwarding_begins_and_is_kept_up(
    advertised: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    node, router = advertised
    advertise(router, 1800)
    wait_until(lambda: 6 in observed(node).gateways, "the default route")
    before = observed(node)
    with caplog.at_level("INFO", "podwire.underlay"):
        assert netns.run(node, underlay.forward_packets) == []
    assert "conf/eth0/accept_ra set to 2" in caplog.text
    assert accept_ra(node) == ["2", "1"], "only where such a route is: nobody else may steer the node"
    assert observed(node) == before, "the kernel drops these routes unless told otherwise"
    advertise(router, 0)
    wait_until(lambda: 6 not in observed(node).gateways, "the router to be none any more")
    advertise(router, 1800)
    wait_until(lambda: 6 in observed(node).gateways, "the router to be back")


def test_a_node_that_takes_no_router_advertisements_does_not_begin_to(advertised: tuple[str, str]) -> None:
    node, _ = advertised
    assert netns.run(node, underlay.forward_packets) == []
    assert accept_ra(node) == ["1", "1"]


def test_far_pods_are_reached_by_a_gateway_that_has_a_link_local_address_only(
    advertised: tuple[str, str],
) -> None:
    node, router = advertised
    advertise(router, 1800)
    wait_until(lambda: 6 in observed(node).gateways, "the default route")
    found = observed(node)
    assert ip_network("fd00:50::/64") in found.subnets
    peers = {
        name: Node(name, (f"fd00:{number}::/64",), (address,))
        for number, (name, address) in enumerate({"near": "fd00:50::12", "far": "fd00:60::13"}.items(), 2)
    }
    routes, problems = plan(peers, "node1", found)
    assert problems == ()
    assert {r.node: r.route.gateway for r in routes} == {
        "near": "fd00:50::12", "far": found.gateways[6].address
    }  # fmt: skip

    def inside() -> None:
        wanted = [r.route for r in routes]
        assert sync(*wanted) == (2, [])
        assert sync(*wanted) == (0, [])
        assert sync() == (2, [])
        assert ours() == {}

    netns.run(node, inside)


def test_an_address_of_a_host_is_on_the_subnet_that_a_route_names(node: str) -> None:
    """DHCPv6 gives an address alone; which subnet it is on, the router advertises."""

    def inside() -> None:
        eth0 = socket.if_nametoindex("eth0")
        with Rtnl() as rtnl:
            rtnl.commit(address_add(eth0, "fd00:70::11/128"))
            assert ip_network("fd00:70::/64") not in underlay.observe(rtnl).subnets
            rtnl.commit(route_replace(Route("fd00:70::/64", oif=eth0, protocol=STATIC)))
            assert ip_network("fd00:70::/64") in underlay.observe(rtnl).subnets

    netns.run(node, inside)
