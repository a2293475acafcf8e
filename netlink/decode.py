"""What route netlink answers with, as values; pyroute2 has the formats.

Only reading needs pyroute2: `Rtnl` imports this module at its first question, so that a CNI binary that has
to work without the daemon, which only writes, does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from netlink.family import Family
from netlink.pyroute2_parts import ifaddrmsg, ifinfmsg, ndmsg, rtmsg
from netlink.requests import IFF_UP, RT_TABLE_MAIN, RTNH_F_ONLINK, Route


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `peer_index` is a veth's other end, in its own namespace's numbering."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    kind: str
    master: int | None
    peer_index: int | None


@dataclass(frozen=True, slots=True)
class Address:
    """An address on an interface; `cidr` has the prefix length of its subnet."""

    index: int
    cidr: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour entry."""

    index: int
    address: str
    mac: str
    state: int


def link(data: bytes) -> Link:
    """Decode RTM_NEWLINK."""
    message = _decoded(ifinfmsg, data)
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
        master=message.get_attr("IFLA_MASTER"),
        peer_index=message.get_attr("IFLA_LINK"),
    )


def address(data: bytes) -> Address:
    """Decode RTM_NEWADDR."""
    message = _decoded(ifaddrmsg, data)
    ip = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    return Address(message["index"], f"{ip}/{message['prefixlen']}")


def neighbour(data: bytes) -> Neighbour | None:
    """Decode RTM_NEWNEIGH; None for a bridge's forwarding entry."""
    message = _decoded(ndmsg, data)
    if message["family"] not in {family.af for family in Family}:
        return None
    mac = message.get_attr("NDA_LLADDR") or ""
    return Neighbour(message["ifindex"], message.get_attr("NDA_DST"), mac, message["state"])


def route(data: bytes) -> Route | None:
    """Decode RTM_NEWROUTE; None for a route of another table than main."""
    message = _decoded(rtmsg, data)
    if (message.get_attr("RTA_TABLE") or message["table"]) != RT_TABLE_MAIN:
        return None
    anywhere = "0.0.0.0" if message["family"] == Family.V4.af else "::"
    return Route(
        destination=f"{message.get_attr('RTA_DST') or anywhere}/{message['dst_len']}",
        gateway=message.get_attr("RTA_GATEWAY"),
        oif=message.get_attr("RTA_OIF"),
        onlink=bool(message["flags"] & RTNH_F_ONLINK),
        protocol=message["proto"],
    )


def _decoded(cls: Any, data: bytes) -> Any:
    message = cls(data)
    message.decode()
    return message
