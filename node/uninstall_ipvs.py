"""What the IPVS dataplane leaves on a node: virtual servers, the interface pwipvs0, tables, rules, routes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.objects import Table
from node import dataplanes
from node.leftovers import Leftover
from proxy.ipvs.places import DEVICE, TABLE

_TABLES = tuple(Table(family, TABLE) for family in Family)


@dataclass(frozen=True, slots=True)
class Balanced:
    """All of it: what there is is known by the interface and the table."""

    names: tuple[str, ...]
    kind = "ipvs"

    def __str__(self) -> str:
        return f"virtual servers of IPVS, with {', '.join(self.names)}"

    def remove(self) -> None:
        """Take it away; virtual servers of others stay. Raises NetlinkError."""
        dataplanes.remove(dataplanes.IPVS)


def find() -> Iterator[Leftover]:
    """Yield what is there. Raises NetlinkError."""
    with NftSocket() as nft:
        there = [f"table {table}" for table in _TABLES if nft.table_comment(table) is not None]
    if DEVICE in {name for _, name in socket.if_nameindex()}:
        there.insert(0, f"interface {DEVICE}")
    if there:
        yield Balanced(tuple(there))
