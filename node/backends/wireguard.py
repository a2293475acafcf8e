"""WireGuard: pods' packets travel encrypted, in UDP packets between the nodes' own addresses.

A node has two devices, each with keys of its own; each knows every peer, by the public keys in its Node
object, and carries pods of both families over either family of the underlay:

    10.244.2.0/24 dev pwwg0 ── whose is that range? ── peer KEY0 ── 192.168.50.12 port 51820
                  pwwg1        the same, while a key of pwwg0 changes ── peer KEY1 ── port 51821

Behind each route is one that refuses the same packets: where there is no tunnel, be it that a device or a
peer's key is missing, pods' packets do not leave as they are.

What is not of a peer's ranges and addresses is dropped on arrival, whoever has the key. Everybody takes
what comes by either device; which one a node sends by is its own choice, so it does not matter in which
order nodes learn of changes. What the steps of a change are: node.backends.rotation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from netlink.requests import Route
from netlink.wireguard import Change, Known, Peer
from node.backends.hops import (
    GUARD,
    IPV6_MTU,
    Hop,
    Peering,
    Site,
    Way,
    destinations,
    inside,
    metric_of,
    source,
    tunnel_address,
    version_of,
)
from proxy.model import Node

NAMES: tuple[str, str] = ("pwwg0", "pwwg1")
"""The devices: the usual way, and the detour."""

OVERHEAD: Mapping[int, int] = {4: 20 + 8 + 32, 6: 40 + 8 + 32}
"""Bytes around a packet, by the IP version of the underlay: IP and UDP headers; 16 of WireGuard's header and
16 of the tag. It pads packets to 16 bytes, but never beyond the route's MTU."""

PREFERRED = (4, 6)
"""The IP versions of the underlay, the one with the smaller headers first: a peer has one place, whatever
family its pods are."""

SESSION_SECONDS = 180.0
"""So long after a handshake its keys are good (REJECT_AFTER_TIME of the protocol)."""


def hop(site: Site, peer: Node, cidr: str) -> Hop | None:
    """Reach a peer that has published its keys, over the first family of the underlay that leads to it."""
    # That our own addresses are led through the tunnel is no question: peers know us by our annotation.
    own, found = source(site, version_of(cidr), True), place(site, peer)
    if not own or not found or not peer.wireguard_keys:
        return None
    version, address, way = found
    mtu, problem = inside(site, way, OVERHEAD[version], cidr, address)
    name = NAMES[site.turning.detour or peer.wireguard_detour]
    reached = tuple(destinations(peer, cidr, hosts=True))
    device, metric = site.tunnels.get(name, 0), metric_of(cidr)
    routes = tuple(
        Route(to, oif=device, mtu=mtu, source=own, table=table, metric=metric) for to, table in reached
    )
    keys = peer.wireguard_keys
    peering = Peering(keys, address, tuple(to for to, _ in reached))
    guards = tuple(Route(to, table=table, metric=GUARD) for to, table in reached)
    return Hop(
        peer.name,
        cidr,
        "wireguard",
        address,
        routes,
        tunnel=name,
        problem=problem,
        claims=keys,
        peering=peering,
        guards=guards,
    )


def closed(peer: Node, cidr: str) -> Hop:
    """Refuse packets to a podCIDR that no tunnel leads to."""
    return Hop(peer.name, cidr, "wireguard", "", (Route(cidr, metric=GUARD),))


def place(site: Site, peer: Node) -> tuple[int, str, Way] | None:
    """Return where a peer takes encrypted packets: IP version, address, and the way there."""
    for version in PREFERRED:
        address = tunnel_address(peer, version)
        way = site.underlay.way(address) if address and version in site.tunnel_versions else None
        if way:
            return version, address, way
    return None


def overhead(node: Node, versions: Collection[int]) -> int:
    """Return what a tunnel takes (bytes) to a peer that has addresses as we have."""
    return OVERHEAD[next((v for v in PREFERRED if tunnel_address(node, v)), 4)]


def device_mtu(site: Site) -> int:
    """Return the MTU of the devices; routes say what fits to each peer."""
    fits = (site.fits(way) - OVERHEAD[way.network.version] for way in site.underlay.ways)
    return max((*fits, IPV6_MTU))


class Entry(NamedTuple):
    """What both devices know of a node."""

    keys: tuple[str, ...]
    address: str
    allowed: frozenset[str]


def entries(hops: Iterable[Hop]) -> tuple[dict[str, Entry], bool]:
    """Return what the devices are to know, by node, and whether two nodes claim the same range or address.

    One peer of a device can have a range: of several nodes the first by name counts, as with routes.
    """
    found: dict[str, Entry] = {}
    holders: dict[str, str] = {}
    contested = False
    for hop in sorted((hop for hop in hops if hop.peering), key=lambda hop: hop.node):
        assert hop.peering
        keys, address, ranges = hop.peering
        own = {cidr for cidr in ranges if holders.setdefault(cidr, hop.node) == hop.node}
        contested = contested or len(own) < len(ranges)
        before = found.get(hop.node)
        found[hop.node] = Entry(keys, address, frozenset(own | (before.allowed if before else set())))
    return found, contested


def peers(found: Iterable[Entry], slot: int, site: Site) -> dict[str, Peer]:
    """Return the peers of a device by their keys."""
    port, keepalive = site.config.wireguard_port + slot, site.turning.keepalive[slot]
    return {e.keys[slot]: Peer(e.keys[slot], (e.address, port), e.allowed, keepalive) for e in found}


def difference(there: Mapping[str, Known], wanted: Mapping[str, Peer], now: float) -> tuple[Change, ...]:
    """Return what turns the peers that are there into the wanted ones; those that go come last.

    A peer that sends from another address than its tunnel address is answered there, as it has proved to have
    the key: that endpoint stays as long as the session lives.
    """
    changes: list[Change] = []
    for key, peer in wanted.items():
        known = there.get(key)
        if known is None:
            changes.append(Change(key, peer.endpoint, peer.allowed, peer.keepalive))
            continue
        moved = known.peer.endpoint != peer.endpoint and now - known.handshake > SESSION_SECONDS
        change = Change(
            key,
            peer.endpoint if moved else None,
            peer.allowed if known.peer.allowed != peer.allowed else None,
            peer.keepalive if known.peer.keepalive != peer.keepalive else None,
        )
        if change != Change(key):
            changes.append(change)
    return (*changes, *(Change(key, remove=True) for key in there.keys() - wanted.keys()))
