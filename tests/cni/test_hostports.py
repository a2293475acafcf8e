"""Host ports on the kernel: real connections from everywhere, to routed pods and to pods on a bridge."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest

from cni.tables import PodRules
from ipam.records import HostPort
from netlink import netns
from netlink.family import Family
from tests.cni import frames, guarded
from tests.cni.guarded import CLIENT, CLIENT6, LAN_MAC, NODE, NODE6, NODE_ALIAS, PATIENCE, PORT, World, ask

TCP, UDP, SCTP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP
LOOPBACK = "127.0.0.1"
NOBODY = ("", "")


@pytest.fixture(scope="module", params=["routed", "bridged"])
def lab(request: pytest.FixtureRequest, namespaces: Callable[[], str]) -> Iterator[World]:
    with guarded.world(namespaces, bridge=request.param == "bridged") as made:
        made.set_route_localnet()
        yield made


@pytest.fixture
def world(lab: World) -> Iterator[World]:
    """The node, whose pods lose their host ports afterwards."""
    yield lab
    for name in lab.pods:
        lab.publish(name)


def quiet(where: str, destination: str, port: int = 80, protocol: int = TCP) -> bool:
    return netns.run(where, ask, destination, port, protocol, patience=PATIENCE) == NOBODY


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_client_outside_reaches_every_address_and_is_seen_as_itself(world: World, protocol: int) -> None:
    world.publish("a", HostPort(protocol, 80, PORT))
    for address, client in ((NODE, CLIENT), (NODE_ALIAS, CLIENT), (NODE6, CLIENT6)):
        assert netns.run(world.client, ask, address, 80, protocol) == ("a", client)
        assert quiet(world.client, address, 81, protocol)
        assert quiet(world.client, address, 80, UDP if protocol == TCP else TCP)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("address", [NODE, NODE_ALIAS, NODE6])
def test_another_pod_reaches_it_and_is_seen_as_itself(world: World, address: str, protocol: int) -> None:
    world.publish("a", HostPort(protocol, 80, PORT))
    b = world.pods["b"]
    own = b.address(Family.V6 if ":" in address else Family.V4)
    assert netns.run(b.namespace, ask, address, 80, protocol) == ("a", own)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("address", [NODE, NODE_ALIAS, NODE6])
def test_a_pod_reaches_itself(world: World, address: str, protocol: int) -> None:
    world.publish("a", HostPort(protocol, 80, PORT))
    a = world.pods["a"]
    name, seen = netns.run(a.namespace, ask, address, 80, protocol)
    assert name == "a"
    assert seen not in a.rules.addresses  # masqueraded: it would answer itself directly otherwise


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("address", [NODE, NODE_ALIAS, NODE6, LOOPBACK])
def test_the_node_reaches_it(world: World, address: str, protocol: int) -> None:
    world.publish("a", HostPort(protocol, 80, PORT))
    name, seen = netns.run(world.node, ask, address, 80, protocol)
    assert name == "a"
    assert seen != LOOPBACK


def test_the_node_is_refused_at_once_by_its_ipv6_loopback_address(world: World) -> None:
    """The kernel routes nothing from ::1 to a pod; without a rule for it the client would wait in vain."""
    world.publish("a", HostPort(TCP, 80, PORT))

    def connect() -> None:
        with socket.create_connection(("::1", 80), timeout=guarded.DEADLINE):
            pass

    with pytest.raises(ConnectionRefusedError):
        netns.run(world.node, connect)


def test_pods_share_a_port_on_different_protocols_and_addresses(world: World) -> None:
    """As in the conformance test of Kubernetes: same hostPort, but different hostIP and protocol."""
    world.publish("a", HostPort(TCP, 80, PORT, LOOPBACK), HostPort(TCP, 80, PORT, NODE_ALIAS))
    world.publish("b", HostPort(TCP, 80, PORT, NODE), HostPort(UDP, 80, PORT, NODE_ALIAS))
    assert netns.run(world.node, ask, LOOPBACK, 80)[0] == "a"
    assert netns.run(world.node, ask, NODE, 80)[0] == "b"
    for where in (world.client, world.node):
        assert netns.run(where, ask, NODE_ALIAS, 80)[0] == "a"
        assert netns.run(where, ask, NODE_ALIAS, 80, UDP)[0] == "b"
        assert quiet(where, NODE, 80, UDP)
        assert quiet(where, NODE6)


@pytest.mark.parametrize(
    ("host_ip", "reached", "not_reached"), [("0.0.0.0", NODE, NODE6), ("::", NODE6, NODE)]
)
def test_an_unspecified_host_ip_is_every_address_of_its_family(
    world: World, host_ip: str, reached: str, not_reached: str
) -> None:
    world.publish("a", HostPort(TCP, 80, PORT, host_ip))
    assert netns.run(world.client, ask, reached, 80)[0] == "a"
    assert quiet(world.client, not_reached)


def test_a_port_on_one_ipv6_address(world: World) -> None:
    world.publish("a", HostPort(TCP, 80, PORT, NODE6))
    assert netns.run(world.client, ask, NODE6, 80) == ("a", CLIENT6)
    assert quiet(world.client, NODE)


def test_a_host_ip_that_is_not_the_nodes_takes_nothing_from_whoever_has_it(world: World) -> None:
    world.publish("a", HostPort(TCP, 7777, PORT, CLIENT))
    with guarded.answering({"client": netns.run(world.client, guarded.listen, 7777, CLIENT)}):
        for where in (world.node, world.pods["b"].namespace):
            assert netns.run(where, ask, CLIENT, 7777)[0] == "client"


def test_a_neighbour_cannot_reach_what_is_published_on_loopback(world: World) -> None:
    """CVE-2020-8558: a host on the node's network sends to 127.0.0.1."""
    world.publish("a", HostPort(UDP, 80, PORT, LOOPBACK))
    marker, honest = b"from the lan", b"from the pod"
    lie = frames.ethernet(LAN_MAC, guarded.CLIENT_MAC, frames.IPV4, frames.udp(CLIENT, LOOPBACK, 80, marker))
    truth = frames.udp(CLIENT, world.pods["a"].address(Family.V4), 9, honest)
    frame = frames.ethernet(LAN_MAC, guarded.CLIENT_MAC, frames.IPV4, truth)
    a = world.pods["a"].namespace
    with netns.run(a, guarded.bound, socket.AF_PACKET, 3, "eth0") as sniffer:
        sniffer.settimeout(guarded.DEADLINE)
        netns.run(world.client, guarded.transmit, [lie, frame])
        while honest not in (data := sniffer.recv(1 << 16)):
            assert marker not in data


def test_sctp_is_translated_too(world: World) -> None:
    """The first packet of an association comes out translated; there may be no SCTP sockets to try more."""
    world.publish("a", HostPort(SCTP, 80, PORT))
    a = world.pods["a"]
    packet = frames.ipv4(CLIENT, NODE, SCTP, frames.sctp_init(5000, 80))
    frame = frames.ethernet(LAN_MAC, guarded.CLIENT_MAC, frames.IPV4, packet)
    with netns.run(a.namespace, guarded.bound, socket.AF_PACKET, 3, "eth0") as sniffer:
        sniffer.settimeout(guarded.DEADLINE)
        netns.run(world.client, guarded.transmit, [frame])
        while (data := sniffer.recv(1 << 16))[23] != SCTP:
            pass
    assert socket.inet_ntoa(data[30:34]) == a.address(Family.V4)
    assert struct.unpack(">HH", data[34:38]) == (5000, PORT)


def test_a_flushed_ruleset_loses_host_ports_and_reconcile_brings_them_back(world: World) -> None:
    """rke2#10469, plugins#512: what firewalld does when it is reloaded."""
    world.publish("a", HostPort(TCP, 80, PORT))
    before = world.rules.generation()[0]
    netns.run(world.node, subprocess.run, ["nft", "flush", "ruleset"], check=True)
    assert world.rules.generation()[0] != before
    assert quiet(world.client, NODE)
    assert world.rules.reconcile() > 0
    assert netns.run(world.client, ask, NODE, 80) == ("a", CLIENT)
    assert world.rules.reconcile() == 0


def test_the_newest_holder_of_a_host_port_has_it(world: World) -> None:
    """plugins#683: the host port of a pod that is gone without a DEL leads to its address for ever."""
    dead = PodRules(
        "pwpoddeaddeadde", "02:00:00:00:00:09", ("10.1.0.9", "fd00:1::9"), (HostPort(TCP, 80, PORT),)
    )
    others = dict(world.live)
    world.live.clear()
    world.live |= {"dead": dead} | others
    world.rules.add(dead)
    assert quiet(world.client, NODE)
    world.publish("b", HostPort(TCP, 80, PORT))
    for address in (NODE, NODE6):
        assert netns.run(world.client, ask, address, 80)[0] == "b"
    # What is removed late takes nothing from the new holder.
    del world.live["dead"]
    world.rules.remove(dead)
    for address in (NODE, NODE6):
        assert netns.run(world.client, ask, address, 80)[0] == "b"
