"""Links and addresses as the kernel tells them; pyroute2 has the formats. The rest is in `entries`.

Only reading these needs pyroute2: `Rtnl` imports this module when first asked for one, so that a CNI binary
that has to work without the daemon, which only writes, does without.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from netlink.attributes import parsed
from netlink.pyroute2_parts import ifaddrmsg, ifinfmsg
from netlink.requests import (
    IFF_UP,
    IFLA_INFO_DATA,
    IFLA_LINKINFO,
    IFLA_VXLAN_DF,
    IFLA_VXLAN_ID,
    IFLA_VXLAN_LEARNING,
    IFLA_VXLAN_LOCAL,
    IFLA_VXLAN_LOCAL6,
    IFLA_VXLAN_PORT,
    IFLA_VXLAN_TTL,
    LINK,
    RT_SCOPE_HOST,
    RT_SCOPE_UNIVERSE,
    VXLAN_DF_SET,
    Vxlan,
)

_ATTRIBUTES = 16 + LINK.size  # where a link's begin
IFA_F_DEPRECATED = 0x20
VXLAN_OTHERS = frozenset({2, 3, 6, 9, 10, 11, 12, 13, 14, 16, 19, 20, 21, 22, 25, 26, 28, 30})
"""IFLA_VXLAN_* that are 0 or missing on a plain device: GROUP, LINK, TOS, LIMIT, PORT_RANGE, PROXY, RSC,
L2MISS, L3MISS, GROUP6, UDP_ZERO_CSUM6_*, REMCSUM_*, COLLECT_METADATA, LABEL, TTL_INHERIT, VNIFILTER."""
VXLAN_FLAGS = frozenset({23, 24, 27})
"""Those that are missing: GBP, REMCSUM_NOPARTIAL, GPE."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `peer_index` is a veth's other end, in its own namespace's numbering.

    `vxlan` is what a VXLAN device was made by.
    """

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    kind: str
    master: int | None
    peer_index: int | None
    vxlan: Vxlan | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """An address on an interface; `cidr` has the prefix length of its subnet, `scope` is an RT_SCOPE_*."""

    index: int
    cidr: str
    scope: int = RT_SCOPE_UNIVERSE
    deprecated: bool = False

    @property
    def passive(self) -> bool:
        """Whether the kernel answers for it and never chooses it as a source by itself."""
        return self.deprecated or self.scope == RT_SCOPE_HOST


def link(data: bytes) -> Link:
    """Decode RTM_NEWLINK."""
    message = _decoded(ifinfmsg, data)
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    name, mac, mtu = (message.get_attr(f"IFLA_{key}") for key in ("IFNAME", "ADDRESS", "MTU"))
    return Link(
        index=message["index"],
        name=name,
        mac=mac or "",
        mtu=mtu,
        up=bool(message["flags"] & IFF_UP),
        kind=kind,
        master=message.get_attr("IFLA_MASTER"),
        peer_index=message.get_attr("IFLA_LINK"),
        vxlan=_vxlan(data, name, mac or "", mtu) if kind == "vxlan" else None,
    )


def _vxlan(data: bytes, name: str, mac: str, mtu: int) -> Vxlan:
    info = parsed(parsed(data, _ATTRIBUTES)[IFLA_LINKINFO])
    found = parsed(info.get(IFLA_INFO_DATA, b""))

    def number(kind: int) -> int:
        return int.from_bytes(found.get(kind, b""), "big" if kind == IFLA_VXLAN_PORT else sys.byteorder)

    local = found.get(IFLA_VXLAN_LOCAL) or found.get(IFLA_VXLAN_LOCAL6)
    return Vxlan(
        name,
        vni=number(IFLA_VXLAN_ID),
        port=number(IFLA_VXLAN_PORT),
        local=str(ip_address(local)) if local else "",
        mac=mac,
        mtu=mtu,
        ttl=number(IFLA_VXLAN_TTL),
        learning=bool(number(IFLA_VXLAN_LEARNING)),
        df=number(IFLA_VXLAN_DF) == VXLAN_DF_SET,
        plain=not VXLAN_FLAGS & found.keys() and not any(number(kind) for kind in VXLAN_OTHERS),
    )


def address(data: bytes) -> Address:
    """Decode RTM_NEWADDR."""
    message = _decoded(ifaddrmsg, data)
    ip = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    return Address(
        message["index"], f"{ip}/{message['prefixlen']}", message["scope"], bool(flags & IFA_F_DEPRECATED)
    )


def _decoded(cls: Any, data: bytes) -> Any:
    message = cls(data)
    message.decode()
    return message
