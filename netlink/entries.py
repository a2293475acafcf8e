"""Routes, rules, neighbours and forwarding entries as the kernel tells them, decoded without pyroute2.

With 5,000 peers there are 5,000 of each, and pyroute2 takes 0.1 to 0.2 ms for one. Each function takes a
whole message, and returns None for one that is of another kind or no message of the kernel's: what does not
fit into its length is not read. Source: linux/rtnetlink.h, fib_rules.h, neighbour.h.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop
from typing import NamedTuple

from netlink.attributes import parsed
from netlink.requests import (
    AF_BRIDGE,
    FR_ACT_TO_TBL,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    FRA_SRC,
    FRA_TABLE,
    NDA_DST,
    NDA_LLADDR,
    NEIGHBOUR,
    NTF_PROXY,
    ROUTE,
    ROUTE_PROTOCOL,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_MULTIPATH,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTA_VIA,
    RTAX_MTU,
    RTNH_F_ONLINK,
    RULE,
    Route,
    Rule,
    usual_metric,
)

RTM_F_CLONED = 0x200
RTN_BLACKHOLE, RTN_THROW = 6, 9
"""A route's types; those from blackhole to throw lead nowhere."""

BODY = 16
"""Where a message's own header begins, behind nlmsghdr."""
_ROUTE_END = BODY + ROUTE.size
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
_NUMBER = struct.Struct("=I")
_FAMILIES = {int(AF_INET): "0.0.0.0", int(AF_INET6): "::"}
"""The families with the address that stands for anywhere, which is never said."""
_BITS = {int(AF_INET): 32, int(AF_INET6): 128}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour entry: who has an address on an interface."""

    index: int
    address: str
    mac: str
    state: int


class Forwarding(NamedTuple):
    """Where a VXLAN device sends frames for a MAC; "" where the entry does not say."""

    mac: str
    address: str


def is_cached(message: bytes) -> bool:
    """Whether the kernel made a route of another one, to remember a path MTU or a redirect."""
    return len(message) >= _ROUTE_END and bool(ROUTE.unpack_from(message, BODY)[-1] & RTM_F_CLONED)


def route(message: bytes) -> Route | None:
    """Decode RTM_NEWROUTE or RTM_DELROUTE, of any table.

    One with several next hops is shown with the first. One that leads nowhere, or to a next hop object that
    the kernel does not describe along with it, has neither gateway nor interface.
    """
    try:
        return _route(message)
    except (struct.error, ValueError):
        return None


def _route(message: bytes) -> Route | None:
    family, bits, _, _, table, protocol, _, kind, flags = ROUTE.unpack_from(message, BODY)
    anywhere = _FAMILIES.get(family)
    if anywhere is None or bits > _BITS[family]:
        return None
    found = parsed(message, _ROUTE_END)
    destination = inet_ntop(family, found[RTA_DST]) if RTA_DST in found else anywhere
    gateway, oif = (None, None) if RTN_BLACKHOLE <= kind <= RTN_THROW else _way(family, found)
    if gateway is None and oif is None and RTA_MULTIPATH in found:
        gateway, oif = _first_way(family, found[RTA_MULTIPATH])
    metric = _NUMBER.unpack(found[RTA_PRIORITY])[0] if RTA_PRIORITY in found else 0
    if metric == usual_metric(family == AF_INET6, gateway is None and oif is None):
        metric = 0
    return Route(
        f"{destination}/{bits}",
        gateway,
        oif,
        bool(flags & RTNH_F_ONLINK),
        protocol,
        _mtu(found[RTA_METRICS]) if RTA_METRICS in found else 0,
        inet_ntop(family, found[RTA_PREFSRC]) if RTA_PREFSRC in found else "",
        _NUMBER.unpack(found[RTA_TABLE])[0] if RTA_TABLE in found else table,
        metric,
    )


def _way(family: int, found: dict[int, bytes]) -> tuple[str | None, int | None]:
    """Return gateway and interface."""
    oif = _NUMBER.unpack(found[RTA_OIF])[0] if RTA_OIF in found else None
    if RTA_GATEWAY in found:
        return inet_ntop(family, found[RTA_GATEWAY]), oif
    via = found.get(RTA_VIA)  # the family, and an address of it
    return (inet_ntop(int.from_bytes(via[:2], sys.byteorder), via[2:]) if via else None), oif


def _first_way(family: int, hops: bytes) -> tuple[str | None, int | None]:
    length, _, _, oif = _NEXT_HOP.unpack_from(hops)
    gateway, _ = _way(family, parsed(hops[:length], _NEXT_HOP.size))
    return gateway, oif


def _mtu(metrics: bytes) -> int:
    found = parsed(metrics)
    return int(_NUMBER.unpack(found[RTAX_MTU])[0]) if RTAX_MTU in found else 0


def neighbour(message: bytes) -> Neighbour | None:
    """Decode RTM_NEWNEIGH or RTM_DELNEIGH of IPv4 or IPv6."""
    try:
        family, index, state, _, _ = NEIGHBOUR.unpack_from(message, BODY)
        found = parsed(message, BODY + NEIGHBOUR.size)
        if family not in _FAMILIES or NDA_DST not in found:
            return None
        mac = found[NDA_LLADDR].hex(":") if NDA_LLADDR in found else ""
        return Neighbour(index, inet_ntop(family, found[NDA_DST]), mac, state)
    except (struct.error, ValueError):
        return None


def proxy(message: bytes) -> tuple[int, str] | None:
    """Decode RTM_NEWNEIGH of an address that an interface answers for: (interface index, address)."""
    found = neighbour(message)
    flags = message[BODY + 10] if len(message) > BODY + 10 else 0
    return (found.index, found.address) if found and flags & NTF_PROXY else None


def forwarding(message: bytes) -> tuple[int, Forwarding] | None:
    """Decode RTM_NEWNEIGH or RTM_DELNEIGH of a VXLAN device: (interface index, entry)."""
    try:
        family, index, _, _, _ = NEIGHBOUR.unpack_from(message, BODY)
        found = parsed(message, BODY + NEIGHBOUR.size)
        if family != AF_BRIDGE or NDA_LLADDR not in found:
            return None
        remote = found.get(NDA_DST, b"")
        address = inet_ntop(AF_INET if len(remote) == 4 else AF_INET6, remote) if remote else ""
        return index, Forwarding(found[NDA_LLADDR].hex(":"), address)
    except (struct.error, ValueError):
        return None


def rule(message: bytes) -> Rule | None:
    """Decode RTM_NEWRULE or RTM_DELRULE; None for one that is not of our protocol number."""
    try:
        family, _, bits, _, table, action, _ = RULE.unpack_from(message, BODY)
        found = parsed(message, BODY + RULE.size)
        if family not in _FAMILIES or found.get(FRA_PROTOCOL) != bytes([ROUTE_PROTOCOL]):
            return None
        if action != FR_ACT_TO_TBL or bits > _BITS[family]:
            return None
        source = inet_ntop(family, found[FRA_SRC]) if FRA_SRC in found else _FAMILIES[family]
        (table,) = _NUMBER.unpack(found[FRA_TABLE]) if FRA_TABLE in found else (table,)
        (priority,) = _NUMBER.unpack(found[FRA_PRIORITY]) if FRA_PRIORITY in found else (0,)
        return Rule(f"{source}/{bits}", table, priority)
    except (struct.error, ValueError):
        return None
