"""How a packet gets into a tunnel between nodes, and whether it gets out of it there. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from netlink.decode import Link
from netlink.family import Family, with_port
from netlink.wireguard import NAME as WIREGUARD
from node.backends import vxlan, wireguard
from node.trace.hooks import Place
from node.trace.packet import Packet
from node.trace.state import Secured, State

UDP = 17


class Entered(NamedTuple):
    """A packet between nodes with another one in it: in VXLAN's network of that number, or (`secured`) by
    which keys of WireGuard.
    """

    outer: Packet
    text: str
    title: str
    vni: int = 0
    secured: Secured | None = None


class Refused(NamedTuple):
    """Why a packet does not get into a tunnel or out of it, and where to look."""

    reason: str
    look: str


def is_tunnel(link: Link) -> bool:
    """Whether an interface is a tunnel that packets can be followed through."""
    return link.vxlan is not None or link.kind == WIREGUARD


def enter(
    place: Place, under: Callable[[Family], Place | None], packet: Packet, link: Link, toward: str
) -> Entered | Refused:
    """Put a packet into a tunnel; `under` is the place as outer packets of a family meet it, if known."""
    if link.kind == WIREGUARD:
        return _encrypt(place, under, packet, link)
    assert link.vxlan is not None
    remote = place.remote(link, toward)
    if not remote:
        look = f"bridge fdb show dev {link.name}"
        return Refused(f"{link.name} has no forwarding entry that leads to {toward}", look)
    made = link.vxlan
    outer = Packet(_family(remote), UDP, made.local, remote, made.port)
    text = _text(link, f"VXLAN id {made.vni}", outer, vxlan.OVERHEAD[outer.family.value])
    return Entered(outer, text, "VXLAN", made.vni)


def leave(there: State, name: str, entered: Entered, packet: Packet) -> Link | Refused:
    """Return the device by which a packet arrives on another node."""
    if entered.secured is None:
        vni = entered.vni
        into = next((link for link in there.links if link.vxlan and link.vxlan.vni == vni), None)
        look = f"ip -d link show on {name}"
        return into or Refused(f"{name} has no VXLAN device with id {vni}", look)
    used, look = entered.secured, f"podwire wireguard on {name}"
    known = [s for s in there.secured if s.own == used.key and s.port == used.to]
    if not known:
        return Refused(f"{name} has no WireGuard device with the key that is known here", look)
    sender = _longest(known, packet.source)
    into = next((link for link in there.links if link.index == known[0].index), None)
    if sender is None or sender.key != used.own or into is None:
        device = into.name if into else "its device"
        return Refused(f"{device} of {name} takes no packets from {packet.source} of this node", look)
    return into


def _encrypt(
    place: Place, under: Callable[[Family], Place | None], packet: Packet, link: Link
) -> Entered | Refused:
    found = _longest([s for s in place.state.secured if s.index == link.index], packet.destination)
    look = "podwire wireguard"
    if found is None:
        return Refused(f"{link.name} has no peer for {packet.destination}", look)
    if not found.address:
        return Refused(f"{link.name} does not know where its peer for {packet.destination} is", look)
    outer = Packet(_family(found.address), UDP, "", found.address, found.to, found.port)
    there = under(outer.family)
    way = there.routing.find(outer, output=True).way if there else None
    if there and way:
        source = way.source or there.routing.source_for(way.oif, way.gateway, outer.destination)
        outer = replace(outer, source=source)
    text = _text(link, "WireGuard", outer, wireguard.OVERHEAD[outer.family.value])
    return Entered(outer, text, "WireGuard", secured=found)


def _text(link: Link, title: str, outer: Packet, overhead: int) -> str:
    """Say what becomes of the packet."""
    plain = f"{outer.source or 'this node'} → {with_port(outer.destination, outer.dport)}"
    return f"{link.name}: {title}, outer {plain} udp, mtu {link.mtu} inside, {overhead} bytes more outside"


def _longest(ranges: list[Secured], address: str) -> Secured | None:
    """Return the range that an address is in; of several the smallest."""
    ip = ip_address(address)
    found = [(ip_network(s.cidr), s) for s in ranges if (":" in s.cidr) == (ip.version == 6)]
    inside = [(network.prefixlen, s) for network, s in found if ip in network]
    return max(inside, key=lambda pair: pair[0])[1] if inside else None


def _family(address: str) -> Family:
    return Family.V6 if ":" in address else Family.V4
