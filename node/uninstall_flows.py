"""Flows that podwire's tables translate and that have no end: who uses UDP would be led there for ever.

TCP connections go on, as to an endpoint on another node they can: connection tracking translates them without
the tables, and they end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from cni import tables
from netlink.conntrack import IPS_DST_NAT, Conntrack, Flow
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.objects import Map, Table
from netlink.rtnl import Rtnl
from node.leftover_chains import counted
from proxy.nftables.ruleset import KINDS, TABLE

TCP = 6
Target = tuple[Family, int, str, int]
"""What clients address: family, protocol number, address ("" is any of the node's), port."""


@dataclass(frozen=True, slots=True)
class Flows:
    """Tracked flows to services and host ports."""

    targets: frozenset[Target]
    local: frozenset[str]
    count: int
    kind = "conntrack"
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{counted(self.count, 'tracked flow')} to services and host ports"

    def remove(self) -> None:
        """Have them forgotten, also those that came since they were counted."""
        with Conntrack() as entries:
            for family in Family:
                entries.delete_where(self.ours, family)

    def ours(self, flow: Flow) -> bool:
        """Whether podwire's tables gave a connection its destination."""
        return ours(flow, self.targets, self.local)


def ours(flow: Flow, targets: frozenset[Target], local: frozenset[str]) -> bool:
    """Whether a connection was translated, and addressed to what podwire's tables translate. Pure."""
    if flow.zone or not flow.status & IPS_DST_NAT or flow.protocol == TCP:
        return False
    destination, port = flow.original.destination, flow.original.dport
    if (flow.family, flow.protocol, destination, port) in targets:
        return True
    mine = destination in local or ip_address(destination).is_loopback
    return mine and (flow.family, flow.protocol, "", port) in targets


def find_flows(remarks: list[str]) -> Iterator[Flows]:
    """Yield the connections, if there are any; the tables, which say what is ours, must still be there."""
    targets = frozenset(_targets(remarks))
    if not targets:
        return
    with Rtnl() as rtnl:
        local = frozenset(a.cidr.split("/")[0] for a in rtnl.addresses())
    with Conntrack() as entries:
        found = sum(ours(flow, targets, local) for family in Family for flow in entries.flows(family))
    if found:
        yield Flows(targets, local, found)


def _targets(remarks: list[str]) -> Iterator[Target]:
    with NftSocket() as nft:
        for family in Family:
            for table, maps in (
                (Table(family, TABLE), [kind.shapes for kind in KINDS]),
                (tables.TABLES[family], [tables.BY_ADDRESS, tables.BY_PORT]),
            ):
                if nft.table_comment(table) is None:
                    continue
                try:
                    for which in maps:
                        yield from (_target(family, which, key) for key in nft.elements(table, which))
                except (NetlinkError, ValueError):
                    remarks.append(f"connections of table {table} stay: it is of another version of podwire")


def _target(family: Family, which: Map, key: bytes) -> Target:
    """Decode a key: an address if the map has them, protocol, port, each in whole registers."""
    size = len(key) - 8
    if size not in (0, family.size):
        raise ValueError(f"a key of {which.name} has {len(key)} bytes")
    address = str(ip_address(key[:size])) if size else ""
    return family, key[size], address, int.from_bytes(key[size + 4 : size + 6], "big")
