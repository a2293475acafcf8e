"""VXLAN (RFC 7348): pods' packets travel in UDP packets between the nodes' own addresses.

For each peer there is one forwarding entry, its MAC → its tunnel address, and for each of its podCIDRs a
permanent neighbour, an address of the peer → its MAC, and a route by that neighbour:

    10.244.2.0/24 via 10.244.2.0 dev pwvxlan4 onlink ── 10.244.2.0 lladdr MAC ── MAC dst 192.168.50.12
    fd00:2::/64   via fe80::MAC  dev pwvxlan4        ── fe80::MAC  lladdr MAC ┘

All of it comes from the Node object, so no packet asks for anything and none is flooded. A device has peers
of one underlay family and carries pods of both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv6Address

from cni.wiring import mac_of as mac_from
from netlink.requests import Route, Vxlan
from node.backends.hops import (
    IPV6_MTU,
    Forwarding,
    Hop,
    Neighbour,
    Site,
    TunnelConfig,
    destinations,
    inside,
    metric_of,
    range_address,
    source,
    tunnel_address,
    version_of,
)
from proxy.model import Node

NAMES: Mapping[int, str] = {4: "pwvxlan4", 6: "pwvxlan6"}
"""The devices, by the IP version of the underlay."""

OVERHEAD: Mapping[int, int] = {4: 20 + 8 + 8 + 14, 6: 40 + 8 + 8 + 14}
"""Bytes around a packet: outer IP and UDP headers, the VXLAN header, the inner Ethernet header."""

LINK_LOCAL = 0xFE80 << 112


def hop(site: Site, peer: Node, cidr: str) -> Hop | None:
    """Reach a peer through a tunnel over the family of the pods, or else over the other."""
    # A Node without uid is from a manifest; of others the annotation tells that they run podwire.
    own = source(site, version_of(cidr), bool(site.node.tunnel_mac or not site.node.uid))
    if not own:  # we have no pods of that family
        return None
    for version in dict.fromkeys((version_of(cidr), 4, 6)):
        address = tunnel_address(peer, version)
        way = site.underlay.way(address) if address and version in site.tunnel_versions else None
        if not way:
            continue
        name, mac, metric = NAMES[version], mac_of(peer), metric_of(cidr)
        device, via = site.tunnels.get(name, 0), _neighbour(cidr, mac)
        mtu, problem = inside(site, way, OVERHEAD[version], cidr, address)
        onlink = ":" not in via
        routes = tuple(
            Route(to, via, device, onlink, mtu=mtu, source=own, table=table, metric=metric)
            for to, table in destinations(peer, cidr, bool(peer.tunnel_mac or not peer.uid))
        )
        return Hop(
            peer.name,
            cidr,
            "vxlan",
            address,
            routes,
            (Neighbour(device, via, mac),),
            (Forwarding(device, mac, address),),
            name,
            problem,
            claims=(mac,),
        )
    return None


def overhead(node: Node, versions: Collection[int]) -> int:
    """Return the most that a tunnel takes (bytes) of packets of pods with these IP versions."""
    outer = (v if tunnel_address(node, v) else 10 - v for v in versions)
    return max((OVERHEAD[version] for version in outer), default=OVERHEAD[4])


def device(site: Site, version: int, config: TunnelConfig) -> Vxlan | None:
    """Return the device that tunnels over an IP version need; None when this node cannot have it."""
    local = tunnel_address(site.node, version)
    if not local:
        return None
    sizes = [site.fits(way) for way in site.underlay.ways if way.network.version == version]
    mtu = max(sizes, default=1500) - OVERHEAD[version]
    return Vxlan(NAMES[version], config.vni, config.port, local, mac_of(site.node), max(mtu, IPV6_MTU))


def first_addresses(node: Node) -> tuple[str, ...]:
    """Return the first of a node's addresses of each family."""
    found: dict[int, str] = {}
    for address in node.addresses:
        found.setdefault(version_of(address), address)
    return tuple(found.values())


def tunnel_mac(name: str, uid: str) -> str:
    """Return the MAC address of a node's tunnel devices: the same as long as the Node object lives."""
    return mac_from(f"{name}/{uid}")


def mac_of(node: Node) -> str:
    """Return the MAC of a node's tunnel devices: what its Node object says, or what it is going to say."""
    return node.tunnel_mac or tunnel_mac(node.name, node.uid)


def _neighbour(cidr: str, mac: str) -> str:
    """Return the address by which a peer is the next hop to its podCIDR.

    For IPv6 a link-local one, of its MAC: the kernel refuses one on which another interface's route leads,
    as an organisation's fd00::/8 does (ip6_route_check_nh_onlink).
    """
    if version_of(cidr) == 4:
        return range_address(cidr)
    return str(IPv6Address(LINK_LOCAL | int(mac.replace(":", ""), 16)))
