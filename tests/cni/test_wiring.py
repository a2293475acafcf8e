"""Pod interfaces between real namespaces."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPAddress

from cni import wiring
from cni.checks import check
from cni.settings import NodeSettings
from cni.spec import Result
from cni.spec import Route as ResultRoute
from cni.wiring import InterfaceExists, NoNamespace, PodLink, WiringError, ensure_bridge
from netlink import netns
from netlink.errors import NetlinkError
from netlink.requests import (
    NUD_PERMANENT,
    Request,
    Route,
    address_add,
    link_delete,
    link_set,
    route_delete,
    route_replace,
)
from netlink.rtnl import Rtnl
from tests.cni.world import BRIDGED, CIDRS, ROUTED, address_delete, addresses, commit, link, link_down, routes

ADDRESSES = (IPAddress("10.1.0.2"), IPAddress("fd00:1::2"))
STEPS = ("link made", "host configured", "pod configured")


class Pair:
    """A node and a pod, not wired yet."""

    def __init__(self, namespaces: Callable[[], str]) -> None:
        self.node, self.pod = namespaces(), namespaces()
        self.path = str(netns.path(self.pod))

    def attach(self, link: PodLink, step: Callable[[str], None] = lambda _: None) -> None:
        netns.run(self.node, wiring.attach, link, self.path, step)

    def check(self, link: PodLink) -> None:
        """Compare the interface with the plan and an answer that has its default routes."""
        routes = tuple(ResultRoute(a.default, a.gateway) for a in link.addresses)
        netns.run(self.node, check, link, self.path, Result(routes=routes))

    def assert_nothing_is_left(self, link_: PodLink) -> None:
        assert netns.run(self.node, link, link_.host_ifname) is None
        assert netns.run(self.node, routes, 112) == ()
        assert netns.run(self.pod, link, link_.ifname) is None


@pytest.fixture
def pair(namespaces: Callable[[], str]) -> Pair:
    return Pair(namespaces)


def planned(settings: NodeSettings = ROUTED, container: str = "c1") -> PodLink:
    return wiring.plan(container, "eth0", ADDRESSES, settings)


def neighbours() -> dict[str, tuple[str, int]]:
    with Rtnl() as rtnl:
        return {n.address: (n.mac, n.state) for n in rtnl.neighbours()}


@given(st.text(), st.text())
def test_names_and_macs_are_valid_for_any_text_and_depend_on_nothing_else(one: str, other: str) -> None:
    name = wiring.host_ifname(one, other)
    assert name == wiring.host_ifname(one, other)
    assert len(name) == 15
    first = int(wiring.mac_of(one)[:2], 16)
    assert first & 0b11 == 0b10  # locally administered, not multicast
    assert len(wiring.mac_of(one)) == 17


def test_the_same_plan_comes_of_the_same_request() -> None:
    assert planned() == planned()
    assert planned().host_ifname != planned(container="c2").host_ifname
    assert planned().pod_mac == planned(container="c2").pod_mac  # the next pod on this address


def test_each_mode_has_its_gateways_and_prefix_lengths() -> None:
    assert [(a.cidr, a.gateway) for a in planned().addresses] == [
        ("10.1.0.2/32", "169.254.1.1"),
        ("fd00:1::2/128", "fe80::1"),
    ]
    assert [(a.cidr, a.gateway) for a in planned(BRIDGED).addresses] == [
        ("10.1.0.2/24", "10.1.0.1"),
        ("fd00:1::2/64", "fd00:1::1"),
    ]


@pytest.mark.parametrize("settings", [ROUTED, BRIDGED])
def test_settings_survive_the_ledger(settings: NodeSettings) -> None:
    assert NodeSettings.from_mapping(settings.to_mapping()) == settings


def test_no_settings_are_none() -> None:
    assert NodeSettings.from_mapping({}) is None


def test_a_routed_pod_has_all_that_is_planned(pair: Pair) -> None:
    plan = planned()
    pair.attach(plan)
    pair.check(plan)
    host, inside = netns.run(pair.node, link, plan.host_ifname), netns.run(pair.pod, link, "eth0")
    assert host
    assert inside
    assert (host.mac, host.mtu, host.up) == (plan.host_mac, 1400, True)
    assert (inside.mac, inside.mtu, inside.up) == (plan.pod_mac, 1400, True)
    assert {"10.1.0.2/32", "fd00:1::2/128"} <= set(netns.run(pair.pod, addresses))
    assert [(r.destination, r.oif) for r in netns.run(pair.node, routes, 112)] == [
        ("10.1.0.2/32", host.index),
        ("fd00:1::2/128", host.index),
    ]
    defaults = {r.destination: (r.gateway, r.oif) for r in netns.run(pair.pod, routes)}
    assert defaults["0.0.0.0/0"] == ("169.254.1.1", inside.index)
    assert defaults["::/0"] == ("fe80::1", inside.index)
    known = netns.run(pair.node, neighbours)
    assert {known[a.ip] for a in plan.addresses} == {(plan.pod_mac, NUD_PERMANENT)}
    known = netns.run(pair.pod, neighbours)
    assert {known[a.gateway] for a in plan.addresses} == {(plan.host_mac, NUD_PERMANENT)}


@pytest.mark.parametrize("settings", [ROUTED, BRIDGED])
def test_router_advertisements_are_refused_at_both_ends(pair: Pair, settings: NodeSettings) -> None:
    def accepts(name: str) -> str:
        return Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").read_text().strip()

    netns.run(pair.node, ensure_bridge, CIDRS)
    plan = planned(settings)
    pair.attach(plan)
    assert netns.run(pair.node, accepts, plan.host_ifname) == "0"
    assert netns.run(pair.pod, accepts, "eth0") == "0"


def test_removing_takes_everything_and_twice_is_fine(pair: Pair) -> None:
    plan = planned()
    pair.attach(plan)
    for _ in range(2):
        netns.run(pair.node, wiring.remove, plan.host_ifname)
        pair.assert_nothing_is_left(plan)


def test_a_bridged_pod_is_a_hairpin_port_and_uses_the_bridges_gateway(pair: Pair) -> None:
    for _ in range(2):  # the second time there is nothing to do
        assert netns.run(pair.node, ensure_bridge, CIDRS) == []
    plan = planned(BRIDGED)
    pair.attach(plan)
    pair.check(plan)
    bridge, host = netns.run(pair.node, link, wiring.BRIDGE), netns.run(pair.node, link, plan.host_ifname)
    assert bridge
    assert host
    assert host.master == bridge.index
    assert {"10.1.0.1/24", "fd00:1::1/64"} <= set(netns.run(pair.node, addresses))
    assert {"10.1.0.2/24", "fd00:1::2/64"} <= set(netns.run(pair.pod, addresses))
    gateways = {r.destination: r.gateway for r in netns.run(pair.pod, routes)}
    assert (gateways["0.0.0.0/0"], gateways["::/0"]) == ("10.1.0.1", "fd00:1::1")
    shown = netns.run(
        pair.node, subprocess.check_output, ["ip", "-detail", "-json", "link", "show", plan.host_ifname]
    )
    assert json.loads(shown)[0]["linkinfo"]["info_slave_data"]["hairpin"] is True


def test_the_bridge_keeps_its_mac_when_ports_come_and_go(pair: Pair) -> None:
    """A bridge without a MAC of its own takes its lowest port's: its pods would lose their gateway."""
    netns.run(pair.node, ensure_bridge, CIDRS)
    before = netns.run(pair.node, link, wiring.BRIDGE)
    pair.attach(planned(BRIDGED))
    after = netns.run(pair.node, link, wiring.BRIDGE)
    assert before
    assert after
    assert before.mac == after.mac == wiring.mac_of(str(CIDRS[0]))


def test_a_missing_bridge_is_named_and_leaves_nothing(pair: Pair) -> None:
    plan = planned(BRIDGED)
    with pytest.raises(WiringError, match="bridge podwire0 is missing"):
        pair.attach(plan)
    pair.assert_nothing_is_left(plan)


Sabotage = Callable[[Pair, PodLink], None]


def on_host(make: Callable[[int], Request]) -> Sabotage:
    """Do something to the host's end, given its index."""

    def work(pair: Pair, plan: PodLink) -> None:
        found = netns.run(pair.node, link, plan.host_ifname)
        assert found
        netns.run(pair.node, commit, make(found.index))

    return work


def in_pod(*make: Callable[[int], Request]) -> Sabotage:
    """Do something to the pod's end, given its index."""

    def work(pair: Pair, _: PodLink) -> None:
        found = netns.run(pair.pod, link, "eth0")
        assert found
        netns.run(pair.pod, commit, *(m(found.index) for m in make))

    return work


HOST = wiring.host_ifname("c1", "eth0")
FAULTS: dict[str, tuple[Sabotage, str]] = {
    "host link gone": (on_host(lambda _: link_delete(HOST)), f"the host interface {HOST} is missing"),
    "host link down": (on_host(link_down), f"the host interface {HOST} is down"),
    "pod link gone": (
        in_pod(link_down, lambda i: link_set(i, name="other")),
        "the pod's interface eth0 is missing",
    ),
    "pod link down": (in_pod(link_down), "the pod's interface eth0 is down"),
    "host route": (
        on_host(lambda i: route_delete(Route("10.1.0.2/32", oif=i))),
        "the host route to 10.1.0.2 is missing",
    ),
    "host route, IPv6": (
        on_host(lambda i: route_delete(Route("fd00:1::2/128", oif=i))),
        "the host route to fd00:1::2 is missing",
    ),
    "address": (
        in_pod(lambda i: address_delete(i, "10.1.0.2/32")),
        "the address 10.1.0.2/32 is missing on the pod's interface eth0",
    ),
    "address, IPv6": (
        in_pod(lambda i: address_delete(i, "fd00:1::2/128")),
        "the address fd00:1::2/128 is missing on the pod's interface eth0",
    ),
    "default route": (
        in_pod(lambda i: route_delete(Route("0.0.0.0/0", gateway="169.254.1.1", oif=i))),
        "the route to 0.0.0.0/0 by 169.254.1.1 is missing in the pod",
    ),
    "default route, IPv6": (
        in_pod(lambda i: route_delete(Route("::/0", gateway="fe80::1", oif=i))),
        "the route to ::/0 by fe80::1 is missing in the pod",
    ),
    "another default route": (
        in_pod(
            lambda i: address_add(i, "10.7.0.1/24"),
            lambda i: route_replace(Route("0.0.0.0/0", gateway="10.7.0.9", oif=i)),
        ),
        "the route to 0.0.0.0/0 by 169.254.1.1 is missing in the pod",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_is_missing_of_a_routed_pod(pair: Pair, fault: str) -> None:
    sabotage, sentence = FAULTS[fault]
    plan = planned()
    pair.attach(plan)
    sabotage(pair, plan)
    with pytest.raises(WiringError) as failure:
        pair.check(plan)
    assert str(failure.value) == sentence


@pytest.mark.parametrize(
    "sabotage",
    [
        on_host(lambda i: link_set(i, master=0)),
        on_host(lambda _: link_delete(wiring.BRIDGE)),
    ],
    ids=["port", "bridge"],
)
def test_check_names_a_missing_bridge_port(pair: Pair, sabotage: Sabotage) -> None:
    netns.run(pair.node, ensure_bridge, CIDRS)
    plan = planned(BRIDGED)
    pair.attach(plan)
    sabotage(pair, plan)
    with pytest.raises(WiringError, match=f"^the host interface {HOST} is not a port of podwire0$"):
        pair.check(plan)


def test_check_of_a_pod_whose_namespace_is_gone_says_so(pair: Pair) -> None:
    plan = planned()
    pair.attach(plan)
    with pytest.raises(NoNamespace, match="CNI_NETNS /run/netns/missing cannot be opened: No such file"):
        netns.run(pair.node, check, plan, "/run/netns/missing", Result())


@pytest.mark.parametrize("settings", [ROUTED, BRIDGED])
@pytest.mark.parametrize("at", STEPS)
def test_a_failure_in_the_middle_leaves_nothing(pair: Pair, settings: NodeSettings, at: str) -> None:
    def fail(step: str) -> None:
        if step == at:
            raise KeyboardInterrupt

    netns.run(pair.node, ensure_bridge, CIDRS)
    plan = planned(settings)
    with pytest.raises(KeyboardInterrupt):
        pair.attach(plan, fail)
    pair.assert_nothing_is_left(plan)
    pair.attach(plan)
    pair.check(plan)


def test_a_request_that_the_kernel_refuses_leaves_nothing(pair: Pair) -> None:
    wrong = replace(planned(), addresses=(replace(planned().addresses[0], cidr="0.0.0.0/32"),))
    with pytest.raises((NetlinkError, WiringError)):
        pair.attach(wrong)
        pair.check(wrong)
    netns.run(pair.node, wiring.remove, wrong.host_ifname)
    pair.assert_nothing_is_left(wrong)


def test_an_interface_name_that_the_pod_has_is_refused_and_untouched(pair: Pair) -> None:
    pair.attach(planned())
    other = wiring.plan("c2", "eth0", (IPAddress("10.1.0.3"),), ROUTED)
    with pytest.raises(InterfaceExists, match="CNI_IFNAME eth0 exists already: the pod has one"):
        pair.attach(other)
    assert netns.run(pair.node, link, other.host_ifname) is None
    pair.check(planned())


def test_a_host_interface_that_is_there_already_is_refused_and_untouched(
    pair: Pair, namespaces: Callable[[], str]
) -> None:
    pair.attach(planned())
    with pytest.raises(InterfaceExists, match=f"the host has {HOST}"):
        netns.run(pair.node, wiring.attach, planned(), str(netns.path(namespaces())))
    pair.check(planned())


def test_a_namespace_that_is_gone_is_named(pair: Pair) -> None:
    with pytest.raises(NoNamespace, match="CNI_NETNS /run/netns/missing cannot be opened: No such file"):
        netns.run(pair.node, wiring.attach, planned(), "/run/netns/missing")
    pair.assert_nothing_is_left(planned())


def test_a_plain_file_is_not_a_namespace(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NoNamespace, match="is not a network namespace"):
        netns.run(pair.node, wiring.attach, planned(), str(file))
    pair.assert_nothing_is_left(planned())
