"""Requests to change links, addresses, routes and neighbours, as values.

Each function is a verb; it builds one message with pyroute2's classes and does nothing. `Rtnl.commit`
sends any number of them in one write. Source of all numbers: linux/rtnetlink.h, if_link.h, neighbour.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from netlink.family import Family

NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30

IFF_UP = 1
IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80
RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTNH_F_ONLINK = 4

ROUTE_PROTOCOL = 112
"""The number our routes carry (`ip route show proto 112`), so that a diff never sees anybody else's."""


@dataclass(frozen=True, slots=True)
class Request:
    """One change: the message, and the sentence fragment that an error names it by."""

    what: str
    kind: int
    flags: int
    message: Any


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


def _message(cls: Any, fields: dict[str, Any], attrs: list[tuple[str, Any]]) -> Any:
    message = cls()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = [(name, value) for name, value in attrs if value is not None]
    return message


def veth_add(veth: Veth) -> Request:
    """Make a veth pair, this end up, with MAC addresses set at creation (systemd rewrites later ones)."""
    peer: list[tuple[str, Any]] = [
        ("IFLA_IFNAME", veth.peer),
        ("IFLA_ADDRESS", veth.peer_mac),
        ("IFLA_MTU", veth.mtu),
        ("IFLA_NET_NS_FD", veth.peer_netns),
    ]
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": [(k, v) for k, v in peer if v is not None]})]}
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
    attrs = [
        ("IFLA_IFNAME", veth.name),
        ("IFLA_ADDRESS", veth.mac),
        ("IFLA_MTU", veth.mtu),
        ("IFLA_LINKINFO", info),
    ]
    message = _message(ifinfmsg, {"flags": IFF_UP, "change": IFF_UP}, attrs)
    return Request(
        f"add the veth pair {veth.name}, {veth.peer}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, message
    )


def bridge_add(name: str, mac: str | None = None) -> Request:
    """Make a bridge and bring it up."""
    info = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
    attrs = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), ("IFLA_LINKINFO", info)]
    message = _message(ifinfmsg, {"flags": IFF_UP, "change": IFF_UP}, attrs)
    return Request(f"add the bridge {name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, message)


def link_up(index: int) -> Request:
    """Bring an interface up."""
    message = _message(ifinfmsg, {"index": index, "flags": IFF_UP, "change": IFF_UP}, [])
    return Request(f"bring up interface {index}", RTM_NEWLINK, 0, message)


def link_set(
    index: int, *, master: int | None = None, mtu: int | None = None, name: str | None = None
) -> Request:
    """Set what is given: the bridge it belongs to (index, 0 for none), the MTU in bytes, the name."""
    attrs = [("IFLA_MASTER", master), ("IFLA_MTU", mtu), ("IFLA_IFNAME", name)]
    return Request(f"change interface {index}", RTM_NEWLINK, 0, _message(ifinfmsg, {"index": index}, attrs))


def bridge_port(index: int, bridge: int) -> Request:
    """Make an interface a port of a bridge, one that also sends a frame back to where it came from.

    That is what a pod needs which reaches itself through a service (hairpin mode, IFLA_BRPORT_MODE).
    """
    slave = {"attrs": [("IFLA_BRPORT_MODE", 1)]}
    info = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", slave)]}
    attrs = [("IFLA_MASTER", bridge), ("IFLA_LINKINFO", info)]
    return Request(
        f"make interface {index} a bridge port", RTM_NEWLINK, 0, _message(ifinfmsg, {"index": index}, attrs)
    )


def link_delete(name: str) -> Request:
    """Remove an interface by name."""
    return Request(
        f"remove interface {name}", RTM_DELLINK, 0, _message(ifinfmsg, {}, [("IFLA_IFNAME", name)])
    )


def address_add(index: int, address: str) -> Request:
    """Give an interface an address (CIDR). IPv6 without duplicate address detection, which costs 1-2 s."""
    value = ip_interface(address)
    family = Family(value.version)
    broadcast = None
    if family is Family.V4 and value.network.prefixlen < family.bits - 1:
        broadcast = str(value.network.broadcast_address)
    attrs = [
        ("IFA_ADDRESS", str(value.ip)),
        ("IFA_LOCAL", str(value.ip) if family is Family.V4 else None),
        ("IFA_BROADCAST", broadcast),
        ("IFA_FLAGS", IFA_F_NODAD if family is Family.V6 else None),
    ]
    fields = {"family": family.af, "prefixlen": value.network.prefixlen, "index": index}
    return Request(
        f"add address {address} to interface {index}", RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL,
        _message(ifaddrmsg, fields, attrs),
    )  # fmt: skip


def route_replace(route: Route) -> Request:
    """Add a route, or replace the one to the same destination."""
    return Request(
        f"set the route to {route.destination}", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route)
    )


def route_delete(route: Route) -> Request:
    """Remove a route."""
    return Request(f"remove the route to {route.destination}", RTM_DELROUTE, 0, _route(route))


def _route(route: Route) -> Any:
    network = ip_network(route.destination)
    fields = {
        "family": Family(network.version).af,
        "dst_len": network.prefixlen,
        "table": RT_TABLE_MAIN,
        "proto": route.protocol,
        "type": RTN_UNREACHABLE if route.unreachable else RTN_UNICAST,
        "scope": RT_SCOPE_LINK if route.gateway is None and route.oif is not None else RT_SCOPE_UNIVERSE,
        "flags": RTNH_F_ONLINK if route.onlink else 0,
    }
    destination = str(network.network_address) if network.prefixlen else None
    attrs = [("RTA_DST", destination), ("RTA_GATEWAY", route.gateway), ("RTA_OIF", route.oif)]
    return _message(rtmsg, fields, attrs)


def neighbour_replace(index: int, address: str, mac: str) -> Request:
    """Fix which MAC an address on an interface has, for good: no ARP or ND, nothing to go stale."""
    fields = {"family": Family(ip_interface(address).version).af, "ifindex": index, "state": NUD_PERMANENT}
    message = _message(ndmsg, fields, [("NDA_DST", address), ("NDA_LLADDR", mac)])
    return Request(f"set neighbour {address}", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, message)
