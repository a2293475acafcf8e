"""Packets into WireGuard and out of it: by whose key, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from netlink.decode import Link
from netlink.family import Family
from node.trace.hooks import Place
from node.trace.packet import Packet
from node.trace.state import Secured, State
from node.trace.tunnels import Entered, Refused, enter, is_tunnel, leave

WG0 = Link(7, "pwwg0", "", 1440, True, "wireguard", None, None)
WG1 = replace(WG0, index=8, name="pwwg1")
ETH0 = replace(WG0, index=2, name="eth0", kind="")
PACKET = Packet(Family.V4, 6, "10.244.1.2", "10.244.2.2", 80)
HERE = State(
    "node1",
    Family.V4,
    (ETH0, WG0, WG1),
    secured=(
        Secured(7, "OWN0", 51820, "PEER0", "10.244.2.0/24", "192.168.50.12", 51820),
        Secured(7, "OWN0", 51820, "SPECIAL", "10.244.2.128/25", "", 0),
        Secured(8, "OWN1", 51821, "PEER1", "10.244.2.0/24", "fd00:50::12", 51821),
    ),
)
THERE = State(
    "node2",
    Family.V4,
    (WG0, WG1),
    secured=(
        Secured(7, "PEER0", 51820, "OWN0", "10.244.1.0/24", "192.168.50.11", 51820),
        Secured(8, "PEER1", 51821, "OWN1", "10.244.1.0/24", "192.168.50.11", 51821),
    ),
)


def entered(link: Link = WG0, destination: str = "10.244.2.2", state: State = HERE) -> Entered | Refused:
    packet = replace(PACKET, destination=destination)
    return enter(Place(state), lambda _: None, packet, link, destination)


def test_a_packet_goes_to_the_peer_of_its_range_and_comes_out_there() -> None:
    assert (is_tunnel(WG0), is_tunnel(ETH0)) == (True, False)
    for link, device, outer, overhead in (
        (WG0, "pwwg0", ("192.168.50.12", 51820), 60), (WG1, "pwwg1", ("fd00:50::12", 51821), 80)
    ):  # fmt: skip
        found = entered(link)
        assert isinstance(found, Entered)
        assert (found.outer.destination, found.outer.dport) == outer
        assert f"{link.name}: WireGuard, outer this node → " in found.text
        assert f"{overhead} bytes more outside" in found.text
        into = leave(THERE, "node2", found, PACKET)
        assert isinstance(into, Link) and into.name == device


@pytest.mark.parametrize(("destination", "reason"), [
    ("10.244.3.2", "pwwg0 has no peer for 10.244.3.2"),
    ("10.244.2.200", "pwwg0 does not know where its peer for 10.244.2.200 is"),
])  # fmt: skip
def test_what_no_peer_has_goes_nowhere(destination: str, reason: str) -> None:
    assert entered(destination=destination) == Refused(reason, "podwire wireguard")


@pytest.mark.parametrize(("there", "source", "reason"), [
    (replace(THERE, secured=()), "10.244.1.2",
     "node2 has no WireGuard device with the key that is known here"),
    (THERE, "10.244.9.2", "pwwg0 of node2 takes no packets from 10.244.9.2 of this node"),
    (replace(THERE, secured=tuple(replace(s, key="OLD") for s in THERE.secured)), "10.244.1.2",
     "pwwg0 of node2 takes no packets from 10.244.1.2 of this node"),
])  # fmt: skip
def test_what_the_other_side_does_not_know_is_dropped_there(there: State, source: str, reason: str) -> None:
    found = entered()
    assert isinstance(found, Entered)
    left = leave(there, "node2", found, replace(PACKET, source=source))
    assert left == Refused(reason, "podwire wireguard on node2")
