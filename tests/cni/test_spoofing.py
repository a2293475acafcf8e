"""A pod speaks for itself and for nobody else: frames on real links, with the guard and without.

Each forgery is sent twice. Without the tables it must arrive, or the test would prove nothing; with them not.
After each frame comes an honest one to the same place, so that nobody waits for what does not come.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum

import pytest

from netlink import announce, netns
from netlink.family import Family
from netlink.rtnl import Rtnl
from tests.cni import frames, guarded
from tests.cni.guarded import (
    BRIDGE,
    BRIDGE_MAC,
    CLIENT,
    CLIENT6,
    GATEWAY,
    GATEWAY6,
    NODE,
    NODE6,
    Pod,
    World,
    ask,
    eventually,
)

EVERYTHING = 0x0003  # ETH_P_ALL
RESERVED_GROUP = "01:80:c2:00:00:0e"  # IEEE 802.1Q: never forwarded by a bridge, so LLDP uses it
_numbers = itertools.count()


class At(Enum):
    """Where one looks for what a pod sent."""

    CLIENT = "client"
    POD = "pod b"
    NODE = "node"
    NODE_ICMPV6 = "node, ICMPv6"


Build = Callable[["Sender", bytes], list[bytes]]


@dataclass(frozen=True, slots=True)
class Sender:
    """Pod a, which sends, and pod b; `gateway`: the MAC that a's packets go to."""

    a: Pod
    b: Pod
    gateway: str

    def ip(self, packet: bytes, source: str = "", destination: str = "") -> bytes:
        """Return a frame with an IP packet, from a's MAC to the gateway's unless told otherwise."""
        kind = frames.IPV6 if packet[0] >> 4 == 6 else frames.IPV4
        return frames.ethernet(destination or self.gateway, source or self.a.rules.mac, kind, packet)

    def icmpv6(self, source: str, message: bytes, *, destination: str = frames.ALL_NODES) -> bytes:
        """Return a frame with an ICMPv6 message to everybody on the link."""
        packet = frames.ipv6(source, destination, frames.ICMPV6, message)
        return self.ip(packet, destination=frames.ALL_NODES_MAC)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that a pod sends, and where it would be seen. `alone`: it arrives if nothing forbids it."""

    name: str
    at: At
    build: Build
    alone: bool = True

    def __str__(self) -> str:
        return self.name


def link_local(pod: Pod) -> str:
    return f"fe80::ff:fe00:{int(pod.rules.mac[-2:], 16):x}"


def forged_v4(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.udp("10.1.0.3", CLIENT, 9, marker))]


def forged_v6(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.udp("fd00:1::3", CLIENT6, 9, marker))]


def to_loopback(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.udp("10.1.0.2", "127.0.0.1", 9, marker))]


def link_local_to_global(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.ipv6("fe80::77", NODE6, frames.ICMPV6, echo("fe80::77", NODE6, marker)))]


def echo(source: str, destination: str, marker: bytes) -> bytes:
    return frames.icmpv6(source, destination, frames.ECHO, bytes(4) + marker)


def advertised_router(s: Sender, marker: bytes) -> list[bytes]:
    source = link_local(s.a)
    return [s.icmpv6(source, frames.router_advertisement(source, marker))]


def redirected(s: Sender, marker: bytes) -> list[bytes]:
    source = link_local(s.a)
    return [s.icmpv6(source, frames.redirect(source, CLIENT6, marker))]


def router_behind(*headers: int) -> Build:
    """Return a builder of router advertisements behind extension headers."""

    def build(s: Sender, marker: bytes) -> list[bytes]:
        source = link_local(s.a)
        body, following = frames.router_advertisement(source, marker), frames.ICMPV6
        for kind in reversed(headers):
            header = frames.fragment(following, 0, False) if kind == frames.FRAGMENT else None
            body, following = (header or frames.extension(following)) + body, kind
        packet = frames.ipv6(source, frames.ALL_NODES, following, body)
        return [s.ip(packet, destination=frames.ALL_NODES_MAC)]

    return build


def router_in_fragments(s: Sender, marker: bytes) -> list[bytes]:
    """Build a first fragment that ends before the ICMPv6 header, and a second with all of it."""
    source = link_local(s.a)
    options = frames.extension(frames.ICMPV6, marker)
    parts = (
        frames.fragment(frames.DESTINATION_OPTIONS, 0, True) + options,
        frames.fragment(frames.DESTINATION_OPTIONS, len(options), False)
        + frames.router_advertisement(source, bytes(14)),
    )
    return [
        s.ip(frames.ipv6(source, frames.ALL_NODES, frames.FRAGMENT, p), destination=frames.ALL_NODES_MAC)
        for p in parts
    ]


def other_mac(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.udp("10.1.0.2", "10.1.0.3", 9, marker), s.b.rules.mac[:-2] + "77", s.b.rules.mac)]


def forged_to_pod(source: str, destination: str) -> Build:
    return lambda s, marker: [s.ip(frames.udp(source, destination, 9, marker), destination=s.b.rules.mac)]


def arp(sender: str, mac: str = "") -> Build:
    """Return a builder of ARP announcements of an address, with a's MAC in the frame."""

    def build(s: Sender, marker: bytes) -> list[bytes]:
        own = s.a.rules.mac
        body = frames.arp(1, (mac or own, sender), ("00:00:00:00:00:00", sender), marker)
        return [frames.ethernet(frames.BROADCAST, own, frames.ARP, body)]

    return build


def advertised(source: str, target: str) -> Build:
    return lambda s, marker: [s.icmpv6(source, frames.advertisement(source, target, marker))]


def tagged(s: Sender, marker: bytes) -> list[bytes]:
    packet = frames.vlan(frames.IPV4, frames.udp("10.1.0.3", CLIENT, 9, marker))
    return [frames.ethernet(s.b.rules.mac, s.a.rules.mac, frames.VLAN, packet)]


def other_type(s: Sender, marker: bytes) -> list[bytes]:
    return [frames.ethernet(s.b.rules.mac, s.a.rules.mac, 0x88B5, marker)]


def past_the_bridge(s: Sender, marker: bytes) -> list[bytes]:
    return [s.ip(frames.udp("10.1.0.3", NODE, 9, marker), destination=RESERVED_GROUP)]


ROUTERS = (
    Case("a router advertisement", At.NODE_ICMPV6, advertised_router),
    Case("a redirect", At.NODE_ICMPV6, redirected),
    Case(
        "a router advertisement behind hop-by-hop options", At.NODE_ICMPV6, router_behind(frames.HOP_BY_HOP)
    ),
    Case(
        "a router advertisement behind four headers",
        At.NODE_ICMPV6,
        router_behind(
            frames.HOP_BY_HOP, frames.DESTINATION_OPTIONS, frames.FRAGMENT, frames.DESTINATION_OPTIONS
        ),
    ),
    # Linux itself takes no first fragment without the upper-layer header (RFC 7112); others may.
    Case("a router advertisement in a second fragment", At.NODE_ICMPV6, router_in_fragments, alone=False),
)
ROUTED = (
    Case("another pod's IPv4 address", At.CLIENT, forged_v4),
    Case("another pod's IPv6 address", At.CLIENT, forged_v6),
    Case("to 127.0.0.1 of the node, route_localnet set", At.NODE, to_loopback),
    Case("from a link-local address to a global one", At.NODE_ICMPV6, link_local_to_global),
    *ROUTERS,
)
BRIDGED = (
    Case("another pod's IPv4 address", At.CLIENT, forged_v4),
    Case("another pod's IPv6 address", At.CLIENT, forged_v6),
    Case("the gateway's IPv4 address, to a pod", At.POD, forged_to_pod(GATEWAY, "10.1.0.3")),
    Case("the gateway's IPv6 address, to a pod", At.POD, forged_to_pod(GATEWAY6, "fd00:1::3")),
    Case("another link-local address, to a pod", At.POD, forged_to_pod("fe80::77", "fd00:1::3")),
    Case("no IPv6 address, to a pod", At.POD, forged_to_pod("::", "fd00:1::3")),
    Case("to 127.0.0.1 of the node, route_localnet set", At.NODE, to_loopback),
    Case("another MAC", At.POD, other_mac),
    Case("ARP for another pod's address", At.POD, arp("10.1.0.3")),
    Case("ARP for the gateway's address", At.POD, arp(GATEWAY)),
    Case("ARP for its own address with another MAC", At.POD, arp("10.1.0.2", BRIDGE_MAC)),
    Case("a neighbour advertisement from another address", At.POD, advertised(GATEWAY6, GATEWAY6)),
    Case("a neighbour advertisement for another address", At.POD, advertised("fd00:1::2", GATEWAY6)),
    Case("a VLAN tag around a forged packet", At.POD, tagged),
    Case("neither IP nor ARP", At.POD, other_type),
    Case("past the bridge, by a group address that it does not forward", At.NODE, past_the_bridge),
    *ROUTERS,
    *(Case(f"{c.name}, to a pod", At.POD, c.build) for c in ROUTERS),
)


def own_duplicate_detection(s: Sender, marker: bytes) -> list[bytes]:
    return [s.icmpv6("::", frames.solicitation("::", frames.ALL_NODES, "fd00:1::2", marker))]


def own_solicitation(s: Sender, marker: bytes) -> list[bytes]:
    return [s.icmpv6("fd00:1::2", frames.solicitation("fd00:1::2", frames.ALL_NODES, "fd00:1::3", marker))]


def own_report(s: Sender, marker: bytes) -> list[bytes]:
    source = link_local(s.a)
    report = frames.icmpv6(
        source, frames.ALL_NODES, 143, bytes(4) + marker
    )  # RFC 3810, in its usual wrapping
    packet = frames.ipv6(
        source, frames.ALL_NODES, frames.HOP_BY_HOP, frames.extension(frames.ICMPV6) + report
    )
    return [s.ip(packet, destination=frames.ALL_NODES_MAC)]


def own_link_local_echo(s: Sender, marker: bytes) -> list[bytes]:
    return [s.icmpv6(link_local(s.a), echo(link_local(s.a), frames.ALL_NODES, marker))]


def own_fragmented_echo(s: Sender, marker: bytes) -> list[bytes]:
    whole = frames.icmpv6("fd00:1::2", frames.ALL_NODES, frames.ECHO, bytes(20) + marker)
    parts = (
        frames.fragment(frames.ICMPV6, 0, True) + whole[:16],
        frames.fragment(frames.ICMPV6, 16, False) + whole[16:],
    )
    return [
        s.ip(frames.ipv6("fd00:1::2", frames.ALL_NODES, frames.FRAGMENT, p), destination=frames.ALL_NODES_MAC)
        for p in parts
    ]


HONEST_ICMPV6 = (
    ("duplicate address detection", own_duplicate_detection),
    ("a neighbour solicitation", own_solicitation),
    ("a neighbour advertisement", advertised("fd00:1::2", "fd00:1::2")),
    ("a multicast listener report", own_report),
    ("a link-local echo request", own_link_local_echo),
    ("a fragmented echo request", own_fragmented_echo),
)
HONEST_ROUTED = tuple(Case(name, At.NODE_ICMPV6, build) for name, build in HONEST_ICMPV6)
HONEST_BRIDGED = (
    *HONEST_ROUTED,
    *(Case(f"{name}, to a pod", At.POD, build) for name, build in HONEST_ICMPV6),
    Case("ARP for its own address", At.POD, arp("10.1.0.2")),
    Case("its own IPv4 address", At.POD, forged_to_pod("10.1.0.2", "10.1.0.3")),
    Case("its own IPv6 address", At.POD, forged_to_pod("fd00:1::2", "fd00:1::3")),
)


@pytest.fixture(scope="module")
def routed(namespaces: Callable[[], str]) -> Iterator[World]:
    with guarded.world(namespaces, bridge=False) as made:
        made.set_route_localnet()
        yield made


@pytest.fixture(scope="module")
def bridged(namespaces: Callable[[], str]) -> Iterator[World]:
    with guarded.world(namespaces, bridge=True) as made:
        made.set_route_localnet()
        yield made


def arrives(world: World, case: Case) -> bool:
    """Send what the case says, then an honest frame; return whether the first was seen before the second."""
    marker, honest = (f"{'mh'[i]}{next(_numbers):013d}".encode() for i in range(2))
    a, b = world.pods["a"], world.pods["b"]
    s = Sender(a, b, BRIDGE_MAC if world.bridge else a.rules.mac.replace("02:00", "02:01"))
    opened: dict[At, Callable[[], socket.socket]] = {
        At.CLIENT: lambda: netns.run(world.client, guarded.bound, socket.AF_PACKET, EVERYTHING, "eth0"),
        At.POD: lambda: netns.run(b.namespace, guarded.bound, socket.AF_PACKET, EVERYTHING, "eth0"),
        At.NODE: lambda: netns.run(world.node, socket.socket, socket.AF_INET, socket.SOCK_RAW, frames.UDP),
        At.NODE_ICMPV6: lambda: netns.run(
            world.node,
            guarded.bound,
            socket.AF_INET6,
            frames.ICMPV6,
            BRIDGE if world.bridge else a.rules.host_ifname,
        ),
    }
    control = {
        At.CLIENT: lambda: s.ip(frames.udp("10.1.0.2", CLIENT, 9, honest)),
        At.POD: lambda: s.ip(frames.udp("10.1.0.2", "10.1.0.3", 9, honest), destination=b.rules.mac),
        At.NODE: lambda: s.ip(frames.udp("10.1.0.2", NODE, 9, honest)),
        At.NODE_ICMPV6: lambda: s.ip(
            frames.ipv6("fd00:1::2", NODE6, frames.ICMPV6, echo("fd00:1::2", NODE6, honest))
        ),
    }
    with opened[case.at]() as sniffer:
        sniffer.settimeout(guarded.DEADLINE)
        netns.run(a.namespace, guarded.transmit, [*case.build(s, marker), control[case.at]()])
        seen = False
        while True:
            data = sniffer.recv(1 << 16)
            seen = seen or marker in data
            if honest in data:
                return seen


@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_a_routed_pod_cannot_send(routed: World, case: Case) -> None:
    check_forgery(routed, case)


@pytest.mark.parametrize("case", BRIDGED, ids=str)
def test_a_bridged_pod_cannot_send(bridged: World, case: Case) -> None:
    check_forgery(bridged, case)


@pytest.mark.parametrize("case", ROUTERS, ids=str)
def test_a_bridged_pod_cannot_send_without_br_netfilter(bridged: World, case: Case) -> None:
    """With it the kernel puts fragments together behind the guard, and drops some that the guard let pass."""
    netns.run(bridged.node, guarded.sysctl, "bridge/bridge-nf-call-ip6tables", "0")
    try:
        check_forgery(bridged, replace(case, at=At.POD, alone=True))
    finally:
        netns.run(bridged.node, guarded.sysctl, "bridge/bridge-nf-call-ip6tables", "1")


def check_forgery(world: World, case: Case) -> None:
    world.forget()
    try:
        assert arrives(world, case) == case.alone, "without the tables"
    finally:
        world.rules.reconcile()
        world.correct_neighbours()
    assert not arrives(world, case)


@pytest.mark.parametrize("case", HONEST_ROUTED, ids=str)
def test_a_routed_pod_can_send(routed: World, case: Case) -> None:
    assert arrives(routed, case)


@pytest.mark.parametrize("case", HONEST_BRIDGED, ids=str)
def test_a_bridged_pod_can_send(bridged: World, case: Case) -> None:
    assert arrives(bridged, case)


@pytest.fixture(params=["routed", "bridged"])
def either(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("protocol", [socket.IPPROTO_TCP, socket.IPPROTO_UDP])
def test_a_pod_reaches_everybody_and_is_seen_as_itself(either: World, family: Family, protocol: int) -> None:
    a, b = either.pods["a"], either.pods["b"]
    assert netns.run(a.namespace, ask, b.address(family), protocol=protocol) == ("b", a.address(family))
    for where, addresses in ((either.client, (CLIENT, CLIENT6)), (either.node, (NODE, NODE6))):
        address = addresses[family is Family.V6]
        with guarded.answering({"there": netns.run(where, guarded.listen, 7777, address)}):
            assert netns.run(a.namespace, ask, address, 7777, protocol) == ("there", a.address(family))


@pytest.mark.parametrize("family", Family)
def test_large_datagrams_pass_in_fragments(either: World, family: Family) -> None:
    a, b = either.pods["a"], either.pods["b"]

    def send() -> str:
        kind = socket.AF_INET6 if family is Family.V6 else socket.AF_INET
        with socket.socket(kind, socket.SOCK_DGRAM) as client:
            client.settimeout(2)
            client.sendto(bytes(5000), (b.address(family), guarded.PORT))
            return client.recv(100).decode()

    assert netns.run(a.namespace, send) == f"b {a.address(family)}"


def known(where: str, address: str, ifname: str) -> str:
    """Return the MAC that is known of an address on an interface."""

    def look() -> str:
        index = socket.if_nametoindex(ifname)
        with Rtnl() as rtnl:
            return next(
                (n.mac or "" for n in rtnl.neighbours() if (n.address, n.index) == (address, index)), ""
            )

    return netns.run(where, look)


@pytest.mark.parametrize("address", [GATEWAY, GATEWAY6])
def test_a_bridged_pod_cannot_take_the_gateways_place(bridged: World, address: str) -> None:
    a, b = bridged.pods["a"], bridged.pods["b"]
    lie = [announce.frame(address, a.rules.mac)]
    netns.run(b.namespace, ask, address, 9, patience=guarded.PATIENCE)  # so that b knows the gateway
    bridged.forget()
    try:
        netns.run(a.namespace, guarded.transmit, lie)
        eventually(lambda: known(b.namespace, address, "eth0") == a.rules.mac, "the lie is believed")
        netns.run(bridged.node, guarded.transmit, [announce.frame(address, BRIDGE_MAC)], BRIDGE)
        eventually(lambda: known(b.namespace, address, "eth0") == BRIDGE_MAC, "the truth is back")
    finally:
        bridged.rules.reconcile()
    netns.run(a.namespace, guarded.transmit, lie)
    assert arrives(bridged, HONEST_BRIDGED[-1])  # whatever was sent before is there
    assert known(b.namespace, address, "eth0") == BRIDGE_MAC


@pytest.mark.parametrize("family", Family)
def test_a_pod_cannot_take_another_pods_place_at_the_node(either: World, family: Family) -> None:
    a, b = either.pods["a"], either.pods["b"]
    address = b.address(family)
    ifname = BRIDGE if either.bridge else b.rules.host_ifname
    assert netns.run(either.client, ask, address) == ("b", CLIENT if family is Family.V4 else CLIENT6)
    netns.run(a.namespace, guarded.transmit, [announce.frame(address, a.rules.mac)])
    assert arrives(either, HONEST_ROUTED[1])
    assert known(either.node, address, ifname) == b.rules.mac
    assert netns.run(either.client, ask, address)[0] == "b"


def test_an_interface_that_nobody_wants_may_send_nothing(routed: World) -> None:
    a = routed.pods["a"]
    with ExitStack() as stack:
        routed.live.pop("a")
        stack.callback(routed.rules.reconcile)
        stack.callback(routed.live.__setitem__, "a", a.rules)
        routed.rules.remove(a.rules)
        assert netns.run(a.namespace, ask, CLIENT, 9, patience=guarded.PATIENCE) == ("", "")
        for address in a.rules.addresses:
            assert netns.run(routed.client, ask, address, patience=guarded.PATIENCE) == ("", "")
    assert netns.run(routed.client, ask, "10.1.0.2") == ("a", CLIENT)
