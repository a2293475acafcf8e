"""The bridge goes when the mode is another and nobody is on it, and not before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from netaddr import IPAddress, IPNetwork

from cni.attachments import Wired
from cni.settings import Mode
from cni.wiring import BRIDGE, ensure_bridge
from ipam.ledger import Attachment, Key, State
from netlink import netns
from netlink.requests import Veth, link_set, veth_add
from netlink.rtnl import Rtnl
from node.bridge import leftover_bridge

CIDRS = (IPNetwork("10.244.1.0/24"), IPNetwork("fd00:244:1::/64"))
PORT = "pwpod0123456789"


def on(mode: Mode, pod: str = "shop/web") -> Attachment:
    return Attachment(
        key=Key("c1", "eth0"),
        network="podwire",
        netns="/ns",
        host_ifname=PORT,
        addresses=(IPAddress("10.244.1.2"),),
        state=State.ATTACHED,
        request_id="",
        result="",
        boot_id="boot",
        created=1.0,
        pod=pod,
        wiring=Wired(mode).text(),
    )


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A node that was in mode bridge."""
    name = namespaces()
    netns.run(name, ensure_bridge, CIDRS)
    return name


def asked(node: str, mode: Mode, *attachments: Attachment) -> tuple[list[str], bool]:
    """Return what is told, and whether the bridge is there then."""

    def inside() -> tuple[list[str], bool]:
        with Rtnl() as rtnl:
            return leftover_bridge(mode, rtnl, attachments), rtnl.link(BRIDGE) is not None

    return netns.run(node, inside)


def test_it_goes_with_its_addresses_when_the_mode_is_another(node: str) -> None:
    assert asked(node, Mode.BRIDGE) == ([], True)
    assert asked(node, Mode.ROUTED, on(Mode.ROUTED)) == ([], False)
    assert asked(node, Mode.FLAT) == ([], False), "a second time there is nothing to be done"


def test_it_stays_while_a_pod_is_on_it_and_that_is_told(node: str) -> None:
    told = f"the bridge {BRIDGE} of mode bridge stays until these are made again: shop/web"
    assert asked(node, Mode.ROUTED, on(Mode.BRIDGE)) == ([told], True)


def test_it_stays_while_anything_else_is_on_it(node: str) -> None:
    def plug() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(veth_add(Veth("theirs", "other")))
            link, bridge = rtnl.link("theirs"), rtnl.link(BRIDGE)
            assert link and bridge
            rtnl.commit(link_set(link.index, master=bridge.index))

    netns.run(node, plug)
    told, there = asked(node, Mode.ROUTED)
    assert (told[0].endswith(": theirs"), there) == (True, True)
