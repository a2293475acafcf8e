"""What makes packets for service addresses end up on this node, where IPVS sees them; one family at a time.

- Addresses that have no other use are those of a dummy interface.
- Other addresses (`routes`) are local only for packets with a mark: a policy rule leads these to a table that
  has nothing but local routes to such addresses. All else that is sent there goes its way.

The interface has no link-local address, and its addresses are never chosen as a source by themselves. Rule
and routes carry a protocol number of their own. Source: linux/rtnetlink.h, fib_rules.h, if_link.h.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from netlink.attributes import attribute, nested, parsed, text
from netlink.conntrack import Conntrack, Flow
from netlink.family import Family
from netlink.messages import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE
from netlink.requests import (
    ADDRESS,
    FR_ACT_TO_TBL,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    FRA_TABLE,
    IFA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    LINK,
    ROUTE,
    RT_SCOPE_HOST,
    RT_SCOPE_UNIVERSE,
    RTA_DST,
    RTA_OIF,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETADDR,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RULE,
    Request,
    address_add,
    address_delete,
    address_query,
    link_delete,
    link_up,
    routes_query,
)
from netlink.rtnl import RTN_LOCAL, Rtnl

FRA_FWMARK, FRA_FWMASK = 10, 16
IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, NO_LINK_LOCAL = 26, 8, 1
LOOPBACK = 1
BODY = 16  # where a message's own header begins, behind nlmsghdr


class Ground(Protocol):
    """Where packets are delivered to: what the kernel and the fake both do. Addresses are canonical texts."""

    def addresses(self) -> frozenset[str]:
        """Return what is on the interface, of the family."""
        ...

    def routes(self) -> frozenset[str]:
        """Return what is local for marked packets, of the family."""
        ...

    def whole(self) -> bool:
        """Whether the interface is there and up, and the rule."""
        ...

    def add(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have more addresses, and what they need; those that are there are fine. Raises NetlinkError."""
        ...

    def drop(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have addresses no longer; those that are gone are fine. Raises NetlinkError."""
        ...

    def remove(self) -> None:
        """Take away all of the family, and the interface with the last address. Raises NetlinkError."""
        ...

    def forget(self, which: Callable[[Flow], bool]) -> None:
        """Remove connection tracking entries of the family. Raises NetlinkError."""
        ...


@dataclass(frozen=True, slots=True)
class Marked:
    """The packets that a rule is about, and where it leads: `number` is table, preference and protocol."""

    mark: int
    mask: int
    number: int


class Delivery:
    """The kernel's, in the network namespace of the thread that opens the socket."""

    def __init__(self, rtnl: Rtnl, family: Family, device: str, marked: Marked) -> None:
        self._rtnl = rtnl
        self._family = family
        self._device = device
        self._marked = marked

    def addresses(self) -> frozenset[str]:
        """Return what is on the interface, of the family."""
        index = self._index()
        return frozenset(a for f, a in self._held(index) if f is self._family) if index else frozenset()

    def routes(self) -> frozenset[str]:
        """Return what is local for marked packets, of the family."""
        found = set()
        number = self._marked.number
        for message in self._rtnl.dump(RTM_GETROUTE, routes_query(number, number)):
            af, _, _, _, _, protocol, _, kind, _ = ROUTE.unpack_from(message, BODY)
            if (af, protocol, kind) == (self._family.af, number, RTN_LOCAL):
                found.add(socket.inet_ntop(af, parsed(message, BODY + ROUTE.size)[RTA_DST]))
        return frozenset(found)

    def whole(self) -> bool:
        """Whether the interface is there and up, and the rule."""
        link = self._rtnl.link(self._device)
        return link is not None and link.up and self._has_rule()

    def add(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have more addresses, and what they need; those that are there are fine. Raises NetlinkError."""
        index, bits = self._index() or self._make(), self._family.bits
        if not self._rtnl.passes(index):
            self._do(link_up(index))
        self._do(*(address_add(index, f"{a}/{bits}", passive=True) for a in addresses))
        self._do(*(self._route(a, add=True) for a in routes))
        if not self._has_rule():
            self._do(self._rule(add=True))

    def drop(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have addresses no longer; those that are gone are fine. Raises NetlinkError."""
        index = self._index()
        if index:
            self._do(*(address_delete(index, f"{a}/{self._family.bits}") for a in addresses))
        self._do(*(self._route(a, add=False) for a in routes))

    def remove(self) -> None:
        """Take away all of the family, and the interface with the last address. Raises NetlinkError."""
        if self._has_rule():
            self._do(self._rule(add=False))
        self.drop((), self.routes())
        index = self._index()
        if index and any(family is not self._family for family, _ in self._held(index)):
            self.drop(self.addresses(), ())
        elif index:
            self._do(link_delete(self._device))

    def forget(self, which: Callable[[Flow], bool]) -> None:
        """Remove connection tracking entries of the family. Raises NetlinkError."""
        with Conntrack() as conntrack:
            conntrack.delete_where(which, self._family)

    def _index(self) -> int:
        with contextlib.suppress(OSError):
            return socket.if_nametoindex(self._device)
        return 0

    def _held(self, index: int) -> list[tuple[Family, str]]:
        """Return the addresses of the interface; without pyroute2, as there can be thousands."""
        found = []
        for message in self._rtnl.dump(RTM_GETADDR, address_query(index)):
            af, _, _, _, at = ADDRESS.unpack_from(message, BODY)
            if at == index:
                packed = parsed(message, BODY + ADDRESS.size)[IFA_ADDRESS]
                found.append((Family.V6 if af == Family.V6.af else Family.V4, socket.inet_ntop(af, packed)))
        return found

    def _make(self) -> int:
        """Make the interface; down, so that it gets no link-local address."""
        body = LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, self._device)
        body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "dummy"))
        self._do(Request(f"add the interface {self._device}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body))
        index = socket.if_nametoindex(self._device)
        mode = nested(socket.AF_INET6, attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([NO_LINK_LOCAL])))
        body = LINK.pack(0, 0, index, 0, 0) + nested(IFLA_AF_SPEC, mode)
        self._rtnl.attempt(
            Request(f"keep {self._device} without an address", RTM_NEWLINK, 0, body)
        )  # IPv6 off
        return index

    def _do(self, *requests: Request) -> None:
        """Apply requests; what is there already, or gone, is as it is to be."""
        for request, failure in self._rtnl.attempt(*requests).items() if requests else ():
            if not (failure.exists if request.flags else failure.gone):
                raise failure

    def _has_rule(self) -> bool:
        wanted = parsed(self._rule_attributes()).items()
        rules = (m for m in self._rtnl.dump(RTM_GETRULE) if m[BODY] == self._family.af)
        return any(wanted <= parsed(m, BODY + RULE.size).items() for m in rules)

    def _rule(self, *, add: bool) -> Request:
        body = RULE.pack(self._family.af, 0, 0, 0, 0, FR_ACT_TO_TBL, 0) + self._rule_attributes()
        what = f"{'add' if add else 'remove'} the {self._family.keyword} rule for mark {self._marked.mark:#x}"
        flags = NLM_F_CREATE | NLM_F_EXCL
        return Request(what, RTM_NEWRULE if add else RTM_DELRULE, flags if add else 0, body)

    def _rule_attributes(self) -> bytes:
        number = struct.pack("=I", self._marked.number)
        return (
            attribute(FRA_PRIORITY, number)
            + attribute(FRA_FWMARK, struct.pack("=I", self._marked.mark))
            + attribute(FRA_FWMASK, struct.pack("=I", self._marked.mask))
            + attribute(FRA_TABLE, number)
            + attribute(FRA_PROTOCOL, bytes([self._marked.number]))
        )

    def _route(self, address: str, *, add: bool) -> Request:
        family, number = self._family, self._marked.number
        scope = RT_SCOPE_HOST if family is Family.V4 else RT_SCOPE_UNIVERSE
        body = ROUTE.pack(family.af, family.bits, 0, 0, number, number, scope, RTN_LOCAL, 0)
        body += attribute(RTA_DST, socket.inet_pton(family.af, address))
        body += attribute(RTA_OIF, struct.pack("=I", LOOPBACK))
        what = f"{'add' if add else 'remove'} the local route to {address} in table {number}"
        flags = NLM_F_CREATE | NLM_F_REPLACE
        return Request(what, RTM_NEWROUTE if add else RTM_DELROUTE, flags if add else 0, body)
