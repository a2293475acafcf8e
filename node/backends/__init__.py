"""How the pods of other nodes are reached. Each backend is a module with one pure function and its device.

    hop(site, peer, cidr) ─▶ Hop: routes, neighbours and forwarding entries of one podCIDR; None: not this way

    direct.on_link   the peer is on a subnet of ours: by its own address
    direct.gateway   it is elsewhere, and the network in between knows the podCIDRs: by the way to its address
    vxlan.hop        in UDP packets to its tunnel address
    wireguard.hop    likewise, encrypted

`CHOICES` says which are asked, in turn; the first one that has an answer counts. To add a backend, write its
module and name it there. Everything that a hop says depends on the two Node objects and the `Site` alone, so
there is nothing to learn and nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from node.backends import direct, vxlan, wireguard
from node.backends.hops import Hop, Site
from proxy.model import Node

Backend = Callable[[Site, Node, str], Hop | None]

CHOICES: Mapping[str, tuple[Backend, ...]] = {
    "auto": (direct.on_link, vxlan.hop),
    "direct": (direct.on_link, direct.gateway),
    "vxlan": (vxlan.hop,),
    "wireguard": (wireguard.hop,),
}
"""By the value of network.backend."""

OVERHEADS: Mapping[str, Callable[[Node, Collection[int]], int]] = {
    "vxlan": vxlan.overhead,
    "wireguard": wireguard.overhead,
}
"""What the tunnels take of every packet (bytes), of those that have no other way."""

DEVICES: tuple[str, ...] = (*vxlan.NAMES.values(), *wireguard.NAMES)
"""The names of all tunnel devices."""
