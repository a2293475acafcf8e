"""What the kernel's rules and HAProxy agree on: where proxied connections go, and whose the proxy's own are.

The addresses are the node's own, on `lo`, never announced and the same on every node: HAProxy listens nowhere
else, so that it takes no port of the host's. Others for each protocol, as a listener of HAProxy is for one.
"""

from __future__ import annotations

import hashlib
from ipaddress import ip_address, ip_network

from netlink.family import Family
from proxy.l7.policy import Protocol

PORT = 10000
"""Where HAProxy listens, if nothing else is configured."""

RANGES: dict[Protocol, dict[Family, str]] = {
    Protocol.HTTP: {Family.V4: "169.254.112.1/32", Family.V6: "fd9d:7077:6c37:1::/64"},
    Protocol.TCP: {Family.V4: "169.254.112.2/32", Family.V6: "fd9d:7077:6c37:2::/64"},
}
"""Link-local (RFC 3927), and unique local with a random global ID (RFC 4193).

Of IPv4 connections HAProxy asks the kernel where they went before they were translated, of IPv6 ones it does
not (2.6). So all services share an IPv4 address, and in IPv6 each service port has one of its own.
"""

_NETWORKS = {
    protocol: {family: ip_network(text) for family, text in found.items()}
    for protocol, found in RANGES.items()
}


def address(protocol: Protocol, family: Family, title: str) -> str:
    """Return where connections for a service port go; `title` is the port's ("namespace/name:port")."""
    network = _NETWORKS[protocol][family]
    host = int.from_bytes(hashlib.sha256(title.encode()).digest()) & int(network.hostmask)
    return str(network[host])


def protocol_at(text: str) -> Protocol | None:
    """Return the protocol that HAProxy listens for at an address; None where it does not."""
    found = ip_address(text)
    return next((p for p, each in _NETWORKS.items() if any(found in n for n in each.values())), None)


OWNER = 61000
"""User and group that HAProxy runs as; of no user database. What its group sends is never proxied again."""

TRANSPARENT_MARK = 0x2000
"""The packet mark of answers to connections that HAProxy made with a client's own address."""

TRANSPARENT_TABLE = 113
"""The routing table that brings these answers to HAProxy, and the preference of the rule that leads there."""
