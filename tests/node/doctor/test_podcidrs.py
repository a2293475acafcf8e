"""Ranges of pods: everybody has some, and nothing else is in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from netlink import netns
from netlink.requests import Veth, address_add, link_up, veth_add
from netlink.rtnl import Rtnl
from node.doctor import podcidrs
from node.doctor.podcidrs import Local, judge
from node.doctor.view import Context, PeerRoute, View

ROUTES = (PeerRoute("10.244.1.0/24", "node1", backend="local"), PeerRoute("10.244.2.0/24", "node2"))
VIEW = View("node1", pod_cidrs=("10.244.1.0/24",), routes=ROUTES)
NOTHING = Local((), ())

CASES: list[tuple[str, View, Local, str]] = [
    ("all is well", VIEW, Local((("eth0", "192.0.2.2/24"),), (("172.16.0.0/12", "eth0"),)), ""),
    ("no range", replace(VIEW, pod_cidrs=()), NOTHING, "node node1 has no podCIDR"),
    ("none in flat mode", replace(VIEW, pod_cidrs=(), mode="flat"), NOTHING, ""),
    (
        "what the daemon says",
        replace(VIEW, problems=("node x: podCIDR a overlaps b of node y",)),
        NOTHING,
        "node x: podCIDR a overlaps b",
    ),
    (
        "ranges that overlap",
        replace(VIEW, routes=(*ROUTES, PeerRoute("10.244.2.128/25", "node3"))),
        NOTHING,
        "podCIDR 10.244.2.128/25 of node node3 overlaps 10.244.2.0/24 of node node2",
    ),
    (
        "the node's own subnet",
        VIEW,
        Local((("eth0", "10.244.0.5/16"),), ()),
        "podCIDR 10.244.1.0/24 of node node1 overlaps 10.244.0.0/16, the subnet of eth0",
    ),
    (
        "a route of somebody's",
        VIEW,
        Local((), (("10.244.2.0/24", "tun0"),)),
        "podCIDR 10.244.2.0/24 of node node2 overlaps the route to 10.244.2.0/24 (tun0)",
    ),
    (
        "a service among pods",
        replace(VIEW, service_addresses=(("shop/web", "10.244.2.9"), ("shop/db", "10.96.0.1"))),
        NOTHING,
        "service shop/web has the address 10.244.2.9, which is in podCIDR 10.244.2.0/24 of node node2",
    ),
]


@pytest.mark.parametrize(("view", "local", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_said_of_ranges(view: View, local: Local, said: str) -> None:
    found = [finding.sentence for finding in judge(view, local).findings]
    assert bool(found) == bool(said)
    assert not found or found[0].startswith(said)


def test_a_bridge_that_another_network_left_is_found(namespaces: Callable[[], str]) -> None:
    def work() -> list[str]:
        with Rtnl() as rtnl:
            rtnl.commit(veth_add(Veth("cni0", "other")))
            link = rtnl.link("cni0")
            assert link
            rtnl.commit(link_up(link.index), address_add(link.index, "10.244.1.1/24"))
        return [f.sentence for f in podcidrs.check(Context(VIEW)).findings]

    assert netns.run(namespaces(), work) == [
        "podCIDR 10.244.1.0/24 of node node1 overlaps 10.244.1.0/24, the subnet of cni0 here"
    ]


def test_without_the_daemon_it_is_skipped() -> None:
    assert podcidrs.check(Context()).skipped
