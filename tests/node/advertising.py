"""A node with two interfaces to a router that sends router advertisements."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from netlink import netns
from netlink.requests import Veth, link_up, veth_add
from netlink.rtnl import Rtnl
from tests.node.world import wait_until


def cabled(make: Callable[[], str]) -> tuple[str, str]:
    """Make a node with eth0 and eth1 to a router; return the names of their namespaces."""
    node, router = make(), make()

    def cables() -> None:
        with Rtnl() as rtnl, netns.opened(router) as other:
            for name in ("eth0", "eth1"):
                rtnl.commit(veth_add(Veth(name, name, peer_netns=other)))

    def up() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(*(link_up(socket.if_nametoindex(name)) for name in ("lo", "eth0", "eth1")))

    def usable() -> bool:
        with Rtnl() as rtnl:
            return any(a.cidr.startswith("fe80:") for a in rtnl.addresses(socket.if_nametoindex("eth0")))

    for name in (node, router):
        netns.run(name, Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text, "0")
    netns.run(node, cables)
    netns.run(router, up)
    netns.run(node, up)
    for name in (node, router):
        wait_until(partial(netns.run, name, usable), "a link-local address")
    return node, router


def advertise(router: str, lifetime: int) -> None:
    """Send a router advertisement on eth0 (RFC 4861, 4.2 and 4.6.2): a default route, and fd00:50::/64."""
    head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, lifetime, 0, 0)
    on_link_and_for_addresses = 0xC0
    prefix = struct.pack("!BBBBIII", 3, 4, 64, on_link_and_for_addresses, 3600, 1800, 0)
    prefix += socket.inet_pton(socket.AF_INET6, "fd00:50::")

    def send() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            raw.sendto(head + prefix, ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))

    netns.run(router, send)
