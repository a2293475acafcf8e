"""The node's own network: what routes and pods have to fit to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_network
from typing import TYPE_CHECKING

from netlink.requests import ROUTE_PROTOCOL, Route
from node.backends.hops import Underlay, Way

if TYPE_CHECKING:
    from netlink.decode import Link

DEFAULT_MTU = 1500
OWN_INTERFACE = re.compile(r"pwpod[0-9a-f]{10}|podwire0|pwvxlan[46]|pwwg[01]|pwipvs0|lo")


def ways(links: Iterable[Link], routes: Iterable[Route]) -> Underlay:
    """Return the node's own network: the main table's routes that are not about pods of its own.

    The routes say what a node is on, not the prefix lengths of its addresses: one from DHCPv6 is a /128,
    and its subnet is known by router advertisement.
    """
    mtus = {link.index: link.mtu for link in links if not OWN_INTERFACE.fullmatch(link.name)}
    return Underlay(
        tuple(
            Way(ip_network(r.destination), r.oif, r.gateway, r.mtu or mtus[r.oif], mtus[r.oif])
            for r in routes
            if r.protocol != ROUTE_PROTOCOL and r.oif in mtus
        )
    )


def egress_mtu(network: Underlay) -> int:
    """Return what fits through the way out (bytes), or through all ways where there is none."""
    out = way_out(network)
    return out.mtu if out else min((way.mtu for way in network.ways), default=DEFAULT_MTU)


def way_out(network: Underlay) -> Way | None:
    """Return the way to everywhere: IPv4's, or IPv6's where there is no such."""
    return network.way("0.0.0.0") or network.way("::")
