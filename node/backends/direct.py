"""Plain routes: the network between the nodes carries pods' own addresses."""

from __future__ import annotations

from netlink.requests import Route
from node.backends.hops import Hop, Site, Way, metric_of, version_of
from proxy.model import Node


def on_link(site: Site, peer: Node, cidr: str) -> Hop | None:
    """Reach a peer on a subnet of ours by its own address.

    IPv4 pods can be reached by an IPv6 address (RFC 5549, Linux 5.2); IPv6 pods need an IPv6 address.
    """
    for version in dict.fromkeys((version_of(cidr), 6)):
        for address in peer.addresses:
            if version_of(address) != version:
                continue
            way = site.underlay.way(address)
            if way and way.gateway is None:
                return Hop(peer.name, cidr, "direct", address, (_route(site, cidr, address, way),))
    return None


def gateway(site: Site, peer: Node, cidr: str) -> Hop | None:
    """Reach a peer elsewhere by the way to its address: the router knows podCIDRs, as in a cloud."""
    for address in peer.addresses:
        if version_of(address) != version_of(cidr):
            continue
        way = site.underlay.way(address)
        if way and way.gateway:
            return Hop(peer.name, cidr, "gateway", address, (_route(site, cidr, way.gateway, way),))
    return None


def _route(site: Site, cidr: str, via: str, way: Way) -> Route:
    mtu = site.fits(way)
    return Route(cidr, via, way.oif, mtu=mtu if mtu < way.link_mtu else 0, metric=metric_of(cidr))
