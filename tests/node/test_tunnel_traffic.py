"""What tunnel rules do to packets: VXLAN is not tracked nor forged, TCP segments fit their route."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from netlink import netns
from netlink.family import Family
from tests.netlink.joined import wait_until
from tests.node import tunnels
from tests.node.tunnels import (
    PORT,
    TUNNEL_SOURCE_PORT,
    World,
    build,
    dropped,
    exchange,
    mss,
    nothing_waits,
    overlay,
    run,
    seen,
    sniffer,
    udp,
    underlay,
    vxlan,
)

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
INPUT, POSTROUTING = "input", "postrouting"
TRACKING = "chain track { type filter hook prerouting priority filter; ct state invalid counter; }"
"""Connection tracking works where something asks for it."""
SERVER_PORT = 5300


@pytest.fixture(scope="module")
def world(namespaces: Callable[[], str]) -> Iterator[World]:
    made = build(namespaces)
    with ExitStack() as stack:
        for name in (made.left, made.right):
            for family in Family:
                stack.enter_context(made.nft(name, f"{family.keyword} tracking", TRACKING))
        yield made


@pytest.fixture(params=Family, ids=lambda f: f"over IPv{f.value}")
def outer(request: pytest.FixtureRequest) -> Family:
    assert isinstance(request.param, Family)
    return request.param


@pytest.fixture(params=Family, ids=lambda f: f"IPv{f.value}")
def family(request: pytest.FixtureRequest) -> Family:
    assert isinstance(request.param, Family)
    return request.param


def talk(world: World, family: Family, outer: Family) -> None:
    """Send a datagram through a tunnel and another one back."""
    with udp(world.right, family, SERVER_PORT) as server, udp(world.left, family) as client:
        exchange(server, client, overlay(family, outer, "right"))


def test_vxlan_of_peers_is_not_tracked_on_either_side(world: World, family: Family, outer: Family) -> None:
    talk(world, family, outer)
    assert world.tracked(world.left, outer)
    assert world.tracked(world.right, outer)
    with world.rules(world.left) as left, world.rules(world.right) as right:
        left.apply(world.everybody("right"))
        right.apply(world.everybody("left"))
        for name in (world.left, world.right):
            world.forget(name)
        talk(world, family, outer)
        assert world.tracked(world.left, outer) == world.tracked(world.right, outer) == ()
        assert dropped(world.left, outer, INPUT) == dropped(world.right, outer, INPUT) == 0
        assert dropped(world.left, outer, POSTROUTING) == 0


def test_only_peers_put_packets_into_the_tunnel(world: World, outer: Family) -> None:
    """Who is one is changed under way, and the port with it."""
    forged = vxlan(outer, "right", b"forged", SERVER_PORT)
    with (
        world.rules(world.right) as rules,
        udp(world.right, Family.V4, SERVER_PORT) as server,
        udp(world.stranger, outer) as stranger,
    ):
        rules.apply(world.everybody("left", "stranger"))
        stranger.sendto(forged, (underlay(outer, "right"), PORT))
        assert server.recv(100) == b"forged"
        rules.apply(world.everybody("left"))
        stranger.sendto(forged, (underlay(outer, "right"), PORT))
        wait_until(lambda: dropped(world.right, outer, INPUT) == 1, "the forged packet is dropped")
        assert nothing_waits(server)
        rules.apply({})
        stranger.sendto(forged, (underlay(outer, "right"), PORT))
        assert server.recv(100) == b"forged"


def test_addresses_of_many_are_no_way_around(world: World, outer: Family) -> None:
    """The kernel gives the tunnel's socket what comes by broadcast and multicast too."""
    forged = vxlan(outer, "right", b"forged", SERVER_PORT)
    ways = ("10.0.0.255", "255.255.255.255", "224.0.0.1") if outer is Family.V4 else ("ff02::1%eth0",)
    with (
        world.rules(world.right) as rules,
        udp(world.right, Family.V4, SERVER_PORT) as server,
        udp(world.stranger, outer) as stranger,
    ):
        netns.run(world.stranger, stranger.setsockopt, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        for way in ways:
            netns.run(world.stranger, stranger.sendto, forged, (way, PORT))
            assert server.recv(100) == b"forged"
        rules.apply(world.everybody("left"))
        for count, way in enumerate(ways, start=1):
            netns.run(world.stranger, stranger.sendto, forged, (way, PORT))
            wait_until(lambda: dropped(world.right, outer, INPUT) >= count, f"{way} is counted")  # noqa: B023
        assert nothing_waits(server)


def test_a_pod_does_not_pass_for_its_node(world: World, outer: Family) -> None:
    """Masqueraded, its VXLAN would come from the address of a peer."""
    forged = vxlan(outer, "right", b"forged", SERVER_PORT)
    source = f"{outer.keyword} saddr {pod(outer)}"
    masquerade = f"chain c {{ type nat hook postrouting priority srcnat; {source} masquerade; }}"
    with (
        world.rules(world.left) as left,
        world.rules(world.right) as right,
        world.nft(world.left, f"{outer.keyword} cloud", masquerade),
        udp(world.right, Family.V4, SERVER_PORT) as server,
        udp(world.pod, outer) as bad,
    ):
        right.apply(world.everybody("left"))
        bad.sendto(forged, (underlay(outer, "right"), PORT))
        assert server.recv(100) == b"forged"
        left.apply(world.everybody("right"))
        world.forget(world.left)
        bad.sendto(forged, (underlay(outer, "right"), PORT))
        wait_until(lambda: dropped(world.left, outer, POSTROUTING) == 1, "the pod's packet is dropped")
        assert nothing_waits(server)


def test_pods_may_use_the_port_among_themselves(world: World, outer: Family) -> None:
    with (
        world.rules(world.left) as rules,
        udp(world.stranger, outer, PORT) as server,
        udp(world.pod, outer, PORT) as client,
    ):
        rules.apply(world.everybody("right", clamp=True))
        exchange(server, client, underlay(outer, "stranger"))


def test_a_masqueraded_flow_may_be_given_the_port(world: World, outer: Family) -> None:
    """Its answers come to the node's address and that port, and go on to the pod."""
    masquerade = (
        f"chain c {{ type nat hook postrouting priority srcnat; meta l4proto udp"
        f" {outer.keyword} saddr {pod(outer)} masquerade to :{PORT}; }}"
    )
    with (
        world.rules(world.left) as rules,
        world.nft(world.left, f"{outer.keyword} cloud", masquerade),
        udp(world.stranger, outer, SERVER_PORT) as server,
        udp(world.pod, outer) as client,
    ):
        rules.apply(world.everybody("right"))
        world.forget(world.left)
        exchange(server, client, underlay(outer, "stranger"))
        assert dropped(world.left, outer, INPUT) == 0


def test_a_mark_on_the_inner_packet_does_not_translate_the_outer(world: World, outer: Family) -> None:
    """Linux leaves the mark on the packet, and a rule that masquerades by it sees both (kubernetes#88986)."""
    by_mark = (
        "chain m { type filter hook forward priority mangle; iifname pod0 meta mark set 0x4000; }\n"
        "chain c { type nat hook postrouting priority srcnat; meta mark 0x4000 masquerade fully-random; }"
    )

    def outer_ports(answer: bool) -> tuple[int, int]:
        """Return the ports of the outer packet that carries a pod's datagram."""
        with (
            sniffer(world.right) as sniffed,
            udp(world.right, Family.V4, SERVER_PORT) as server,
            udp(world.pod, Family.V4) as client,
        ):
            client.sendto(b"there", (overlay(Family.V4, outer, "right"), SERVER_PORT))
            if answer:
                data, peer = server.recvfrom(100)
                assert (data, peer[0]) == (b"there", overlay(Family.V4, outer, "left"))
            packets = seen(sniffed, outer, UDP)
            return next((sport, dport) for sport, dport, data in packets if b"there" in data)

    with ExitStack() as stack:
        for each in {outer, Family.V4}:
            stack.enter_context(world.nft(world.left, f"{each.keyword} by_mark", by_mark))
        talk(world, Family.V4, outer)  # both know each other's MAC addresses

        def translated() -> bool:
            world.forget(world.left)  # a packet of the kernel's own, without the mark, may come in between
            return outer_ports(answer=False)[0] != TUNNEL_SOURCE_PORT

        assert any(translated() for _ in range(10))
        rules = stack.enter_context(world.rules(world.left))
        rules.apply(world.everybody("right"))
        world.forget(world.left)
        assert outer_ports(answer=True) == (TUNNEL_SOURCE_PORT, PORT)
        assert world.tracked(world.left, outer) == ()


@pytest.mark.parametrize("own", [0, 1000], ids=["", "a smaller segment"])
def test_a_segment_fits_the_route_in_both_directions_and_is_never_raised(
    world: World, family: Family, own: int
) -> None:
    headers = 40 if family is Family.V4 else 60
    target = underlay(family, "stranger")
    run(world.left, "ip", "route", "add", f"{target}/{family.bits}", "dev", "eth0", "mtu", "1400")
    try:
        assert handshake(world, family, own) == (own or 1500 - headers, 1500 - headers)
        with world.rules(world.left) as rules:
            rules.apply(world.everybody(clamp=True))
            assert handshake(world, family, own) == (own or 1400 - headers, 1400 - headers)
    finally:
        run(world.left, "ip", "route", "delete", f"{target}/{family.bits}")


def handshake(world: World, family: Family, own: int) -> tuple[int, int]:
    """Let the pod connect to the stranger; return the segments that arrive in the SYN and the SYN-ACK."""
    with ExitStack() as stack:
        at_server = stack.enter_context(sniffer(world.stranger))
        at_client = stack.enter_context(sniffer(world.pod))
        server = stack.enter_context(netns.run(world.stranger, socket.socket, family.af))
        client = stack.enter_context(netns.run(world.pod, socket.socket, family.af))
        server.bind(("", 0))
        server.listen()
        if own:
            client.setsockopt(TCP, socket.TCP_MAXSEG, own)
        client.settimeout(tunnels.DEADLINE)
        client.connect((underlay(family, "stranger"), server.getsockname()[1]))
        syn = next(data for *_, data in seen(at_server, family, TCP) if data[13] == 0x02)
        answer = next(data for *_, data in seen(at_client, family, TCP) if data[13] == 0x12)
    return mss(syn), mss(answer)


def pod(family: Family) -> str:
    """The pod's address."""
    return "10.1.0.2" if family is Family.V4 else "fd01::2"
