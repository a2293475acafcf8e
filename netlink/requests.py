"""Requests to change links, addresses, routes and neighbours, as values.

Each function is a verb; it encodes one message and does nothing. `Rtnl.commit` sends any number of them in
one write. Every ADD needs about ten, so they are packed here: pyroute2's classes take 0.1 to 0.2 ms each.
Source of all numbers: linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h, veth.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network

from netlink.attributes import attribute, nested, text
from netlink.family import Family
from netlink.messages import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

IFF_UP = 1
IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80
NTF_PROXY = 0x08
RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTNH_F_ONLINK = 4

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER, IFLA_BRPORT_MODE = 1, 4
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
NDA_DST, NDA_LLADDR = 1, 2

_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBi")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family to type as below, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type

ROUTE_PROTOCOL = 112
"""The number our routes carry (`ip route show proto 112`), so that a diff never sees anybody else's."""

LAST = 4096
"""The metric of unreachable routes: whatever else leads to that range comes first, be it the route of another
program's bridge that was made later. The kernel puts a route behind others of the same metric."""


def _number(kind: int, value: int) -> bytes:
    """Encode a 32-bit number in host order, as route netlink has them all."""
    return attribute(kind, struct.pack("=I", value))


ONE_QUEUE = _number(IFLA_NUM_TX_QUEUES, 1) + _number(IFLA_NUM_RX_QUEUES, 1)
"""A veth uses one queue unless told otherwise, but the kernel makes one for each CPU: 0.1 ms on two CPUs."""


@dataclass(frozen=True, slots=True)
class Request:
    """One change: message type, flags and body, and the sentence fragment that an error names it by."""

    what: str
    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Veth:
    """A veth pair: one end here, the other end in the namespace open as `peer_netns` (None: here too)."""

    name: str
    peer: str
    mac: str | None = None
    peer_mac: str | None = None
    peer_netns: int | None = None
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route, or an unreachable one when it has neither gateway nor interface.

    `destination` is a CIDR; `oif` an interface index; `onlink` trusts that the gateway is on `oif`.
    """

    destination: str
    gateway: str | None = None
    oif: int | None = None
    onlink: bool = False
    protocol: int = ROUTE_PROTOCOL

    @property
    def unreachable(self) -> bool:
        """Whether packets to the destination are refused here."""
        return self.gateway is None and self.oif is None


def veth_add(veth: Veth) -> Request:
    """Make a veth pair, this end up, with MAC addresses set at creation (systemd rewrites later ones)."""
    peer = _link(name=veth.peer, mac=veth.peer_mac, mtu=veth.mtu) + ONE_QUEUE
    if veth.peer_netns is not None:
        peer += _number(IFLA_NET_NS_FD, veth.peer_netns)
    info = text(IFLA_INFO_KIND, "veth") + nested(IFLA_INFO_DATA, nested(VETH_INFO_PEER, peer))
    body = _link(up=True, name=veth.name, mac=veth.mac, mtu=veth.mtu) + ONE_QUEUE
    body += nested(IFLA_LINKINFO, info)
    return Request(
        f"add the veth pair {veth.name}, {veth.peer}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body
    )


def bridge_add(name: str, mac: str | None = None) -> Request:
    """Make a bridge and bring it up."""
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"))
    body = _link(up=True, name=name, mac=mac) + info
    return Request(f"add the bridge {name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def link_up(index: int) -> Request:
    """Bring an interface up."""
    return Request(f"bring up interface {index}", RTM_NEWLINK, 0, _link(index, up=True))


def link_set(
    index: int, *, master: int | None = None, mtu: int | None = None, name: str | None = None
) -> Request:
    """Set what is given: the bridge it belongs to (index, 0 for none), the MTU in bytes, the name."""
    body = _link(index, name=name, mtu=mtu)
    if master is not None:
        body += _number(IFLA_MASTER, master)
    return Request(f"change interface {index}", RTM_NEWLINK, 0, body)


def bridge_hairpin(index: int) -> Request:
    """Let a bridge port send a frame back to where it came from (hairpin mode, IFLA_BRPORT_MODE).

    That is what a pod needs which reaches itself through a service. The interface must be a port already.
    """
    mode = nested(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, b"\1"))
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_SLAVE_KIND, "bridge"), mode)
    return Request(f"set hairpin mode on bridge port {index}", RTM_NEWLINK, 0, _link(index) + info)


def link_delete(name: str) -> Request:
    """Remove an interface by name."""
    return Request(f"remove interface {name}", RTM_DELLINK, 0, _link(name=name))


def address_add(index: int, address: str) -> Request:
    """Give an interface an address (CIDR). IPv6 without duplicate address detection, which costs 1-2 s."""
    value = ip_interface(address)
    family = Family(value.version)
    body = _ADDRESS.pack(family.af, value.network.prefixlen, 0, 0, index) + attribute(
        IFA_ADDRESS, value.ip.packed
    )
    if family is Family.V6:
        body += _number(IFA_FLAGS, IFA_F_NODAD)
    else:
        body += attribute(IFA_LOCAL, value.ip.packed)
        if value.network.prefixlen < family.bits - 1:
            body += attribute(IFA_BROADCAST, value.network.broadcast_address.packed)
    what = f"add address {address} to interface {index}"
    return Request(what, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body)


def route_replace(route: Route) -> Request:
    """Add a route, or replace the one to the same destination."""
    what = f"set the route to {route.destination}"
    return Request(what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route) + _metric(route))


def route_add(route: Route) -> Request:
    """Add a route; one to the same destination (and of the same metric) is an error that `exists`."""
    what = f"add the route to {route.destination}"
    return Request(what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _route(route) + _metric(route))


def route_delete(route: Route) -> Request:
    """Remove a route, whatever its metric is."""
    return Request(f"remove the route to {route.destination}", RTM_DELROUTE, 0, _route(route))


def neighbour_replace(index: int, address: str, mac: str) -> Request:
    """Fix which MAC an address on an interface has, for good: no ARP or ND, nothing to go stale."""
    ip = ip_address(address)
    body = _NEIGHBOUR.pack(Family(ip.version).af, index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, ip.packed) + attribute(NDA_LLADDR, _mac(mac))
    return Request(f"set neighbour {address}", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def proxy_add(index: int, address: str) -> Request:
    """Answer ARP or neighbour solicitations for an address on an interface (`ip neigh add proxy`)."""
    return Request(
        f"answer for {address}", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _proxy(index, address)
    )


def proxy_delete(index: int, address: str) -> Request:
    """Answer no more for an address on an interface."""
    return Request(f"stop answering for {address}", RTM_DELNEIGH, 0, _proxy(index, address))


def proxy_query() -> bytes:
    """Return the body that asks for all proxy entries."""
    return _NEIGHBOUR.pack(0, 0, 0, NTF_PROXY, 0)


def _proxy(index: int, address: str) -> bytes:
    ip = ip_address(address)
    return _NEIGHBOUR.pack(Family(ip.version).af, index, NUD_PERMANENT, NTF_PROXY, 0) + attribute(
        NDA_DST, ip.packed
    )


def link_query(index: int) -> bytes:
    """Return the body that asks for one interface."""
    return _link(index)


def route_query(address: str) -> bytes:
    """Return the body that asks which route the kernel takes to an address."""
    ip = ip_address(address)
    family = Family(ip.version)
    return _ROUTE.pack(family.af, family.bits, 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, ip.packed)


def _link(
    index: int = 0,
    *,
    up: bool = False,
    name: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
) -> bytes:
    change = IFF_UP if up else 0
    body = _LINK.pack(0, 0, index, change, change)
    if name is not None:
        body += text(IFLA_IFNAME, name)
    if mac is not None:
        body += attribute(IFLA_ADDRESS, _mac(mac))
    if mtu is not None:
        body += _number(IFLA_MTU, mtu)
    return body


def _route(route: Route) -> bytes:
    network = ip_network(route.destination)
    body = _ROUTE.pack(
        Family(network.version).af,
        network.prefixlen,
        0,
        0,
        RT_TABLE_MAIN,
        route.protocol,
        RT_SCOPE_LINK if route.gateway is None and route.oif is not None else RT_SCOPE_UNIVERSE,
        RTN_UNREACHABLE if route.unreachable else RTN_UNICAST,
        RTNH_F_ONLINK if route.onlink else 0,
    )
    if network.prefixlen:
        body += attribute(RTA_DST, network.network_address.packed)
    if route.gateway is not None:
        body += attribute(RTA_GATEWAY, ip_address(route.gateway).packed)
    if route.oif is not None:
        body += _number(RTA_OIF, route.oif)
    return body


def _metric(route: Route) -> bytes:
    return _number(RTA_PRIORITY, LAST) if route.unreachable else b""


def _mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
