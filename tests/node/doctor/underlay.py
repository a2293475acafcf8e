"""Two nodes with a router between them, and what their pods' ranges need; no daemon."""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from netlink import netns
from netlink.requests import (
    Request,
    Route,
    Veth,
    Vxlan,
    address_add,
    fdb_replace,
    link_up,
    neighbour_replace,
    route_replace,
    veth_add,
    vxlan_add,
)
from netlink.rtnl import Rtnl
from tests.netlink.joined import wait_until

NEAR, FAR = ("192.0.2.2", "2001:db8:1::2"), ("198.51.100.2", "2001:db8:2::2")
ROUTERS = (("192.0.2.1", "2001:db8:1::1"), ("198.51.100.1", "2001:db8:2::1"))
RANGES = ("10.244.2.0/24", "fd00:10:244:2::/64")
OWN = ("10.244.1.0/24", "fd00:10:244:1::/64")
MACS = "02:00:00:00:01:00", "02:00:00:00:02:00"
MTU = 1500
STATIC = 4
DEVICE = "pwvxlan4"


@dataclass(frozen=True, slots=True)
class Underlay:
    """Namespaces of this node, the router, and the other node."""

    near: str
    router: str
    far: str

    def nft(self, where: str, rules: str) -> None:
        """Load rules into a namespace."""
        netns.run(where, lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))


def commit(name: str, *requests: Callable[[], Request]) -> None:
    """Apply requests in a namespace, in which interfaces are looked up."""

    def work() -> None:
        with Rtnl() as rtnl:
            for request in requests:
                rtnl.commit(request())

    netns.run(name, work)


def put(name: str, value: str) -> None:
    """Set a sysctl of the calling thread's namespace."""
    Path("/proc/sys/net", name).write_text(value)


def on(interface: str, address: str) -> Callable[[], Request]:
    return lambda: address_add(socket.if_nametoindex(interface), address)


def up(interface: str) -> Callable[[], Request]:
    return lambda: link_up(socket.if_nametoindex(interface))


def to(destination: str, gateway: str) -> Callable[[], Request]:
    return lambda: route_replace(Route(destination, gateway=gateway, protocol=STATIC))


def join(left: str, name: str, right: str, peer: str, mtu: int) -> None:
    """Make a veth pair between two namespaces, both ends up."""
    with netns.opened(right) as fd:
        commit(left, lambda: veth_add(Veth(name, peer, peer_netns=fd, mtu=mtu)))
    commit(right, up(peer))


def build(namespaces: Callable[[], str], mtu: int = MTU) -> Underlay:
    """Make it; `mtu` is that between the router and the far node. Both have the ranges' addresses."""
    near, router, far = namespaces(), namespaces(), namespaces()
    for name in (
        near,
        router,
        far,
    ):  # a router asks by its link-local address, which is not to be checked first
        netns.run(name, put, "ipv6/conf/all/accept_dad", "0")
        netns.run(name, put, "ipv6/conf/default/accept_dad", "0")
    netns.run(router, put, "ipv4/ip_forward", "1")
    netns.run(router, put, "ipv6/conf/all/forwarding", "1")
    join(near, "eth0", router, "near", MTU)
    join(router, "far", far, "eth0", mtu)
    for name in (near, router, far):
        commit(name, up("lo"))
    for place, addresses, own, other in ((near, NEAR, OWN, 0), (far, FAR, RANGES, 1)):
        for v, bits in enumerate((24, 64)):
            gateway = ROUTERS[other][v]
            commit(router, on("far" if other else "near", f"{gateway}/{bits}"))
            commit(place, on("eth0", f"{addresses[v]}/{bits}"))
            commit(place, on("lo", own[v].split("/")[0] + ("/128" if v else "/32")))
            commit(place, to("::/0" if v else "0.0.0.0/0", gateway))
    for v in (0, 1):
        commit(router, to(OWN[v], NEAR[v]), to(RANGES[v], FAR[v]))
    for name, addresses in ((near, (*NEAR, *map(first, OWN))), (far, (*FAR, *map(first, RANGES)))):
        netns.run(name, wait_until, functools.partial(owned, addresses), f"{name} has its addresses")
    return Underlay(near, router, far)


def first(cidr: str) -> str:
    return cidr.split("/")[0]


def owned(addresses: tuple[str, ...]) -> bool:
    """Whether packets to addresses arrive here: the kernel adds the routes of IPv6 ones later."""
    with Rtnl() as rtnl:
        return all(map(rtnl.owns, addresses))


def tunnel(made: Underlay, mtu: int = MTU - 50) -> None:
    """Put a VXLAN device on both nodes, and lead IPv4 pods' ranges through it."""
    sides = ((made.near, NEAR, MACS[0], OWN[0]), (made.far, FAR, MACS[1], RANGES[0]))
    for (name, here, mac, own), (_, there, other, cidr) in (sides, sides[::-1]):
        far, source = cidr.split("/")[0], own.split("/")[0]
        commit(
            name,
            lambda here=here, mac=mac: vxlan_add(Vxlan(DEVICE, 112, 8472, here[0], mac, mtu)),
            lambda there=there, other=other: fdb_replace(socket.if_nametoindex(DEVICE), other, there[0]),
            lambda far=far, other=other: neighbour_replace(socket.if_nametoindex(DEVICE), far, other),
            lambda cidr=cidr, far=far, source=source: route_replace(
                Route(
                    cidr,
                    gateway=far,
                    oif=socket.if_nametoindex(DEVICE),
                    onlink=True,
                    mtu=mtu,
                    source=source,
                )
            ),
        )
