"""What kube-proxy left on a node: found without changing anything, removed without touching anything else.

- `survey` returns the `Leftover`s, `remarks` on what stays or was not looked at and why, and whether it runs.
- A `Leftover` is one thing that goes at once or not at all: `Chains` in a table of iptables, its `NftTable`,
  the interface and virtual servers of `Ipvs`, its `Sets`.
- `remove` takes leftovers away, in the order in which they were found. It can be repeated.

    iptables, legacy and nft, IPv4 and IPv6 ──leftover_chains──┐
    nftables                                ───────────────────┼─▶ Survey ──remove──▶ Removal
    IPVS, kube-ipvs0, ipsets                ──leftover_ipvs────┘

All of it is about the network namespace of the calling thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.objects import Table
from netlink.nftables.operations import DeleteTable
from netlink.xtables import Variant, XtablesError, read
from node.dataplanes import is_ours
from node.leftover_chains import counted, select
from node.leftover_ipvs import find_ipvs, find_sets

PROC = Path("/proc")
NFT_TABLE = "kube-proxy"


class Leftover(Protocol):
    """What can be told and taken away; str() says what and where."""

    @property
    def kind(self) -> str:
        """iptables, nftables, ipvs or ipset."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all that goes with it."""
        ...

    def remove(self) -> None:
        """Take it away; XtablesError or NetlinkError if that cannot be. Can be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class NftTable:
    """The table of kube-proxy's nftables mode."""

    table: Table
    names: tuple[str, ...]
    kind = "nftables"

    def __str__(self) -> str:
        return f"table {self.table} of nftables with {counted(len(self.names), 'chain')}"

    def remove(self) -> None:
        """Take the table away, with all in it."""
        with NftSocket() as nft:
            if nft.table_comment(self.table) is not None:
                nft.commit((self.table, [DeleteTable()]))


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, in the order in which it can be removed; remarks are sentences; running processes."""

    leftovers: tuple[Leftover, ...]
    remarks: tuple[str, ...]
    running: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Removal:
    """What is gone, and a sentence for each that is not."""

    removed: tuple[Leftover, ...]
    failures: tuple[str, ...]


def survey(proc: Path = PROC, *, exact: bool = False) -> Survey:
    """Find what kube-proxy left here, and whether it runs.

    `exact` is needed to remove what is found: legacy tables are then read by iptables-legacy-save, which has
    the text of rules; otherwise by python-iptables where that works, which needs no program of iptables.
    """
    remarks: list[str] = []
    found: list[Leftover] = []
    for variant, family in itertools.product(Variant, Family):
        states = read(variant, family, proc, remarks, exact=exact)
        for state in () if is_ours(states) else states:
            if chains := select(state, remarks):
                found.append(chains)
    found += _nft_tables()
    found += find_ipvs(proc, remarks)
    found += find_sets()  # last: the kernel keeps a set that a rule names
    return Survey(tuple(found), tuple(dict.fromkeys(remarks)), running(proc))


def remove(leftovers: Iterable[Leftover]) -> Removal:
    """Remove what an exact survey found. One that cannot be removed does not keep the others."""
    removed: list[Leftover] = []
    failures: list[str] = []
    for leftover in leftovers:
        try:
            leftover.remove()
            removed.append(leftover)
        except (XtablesError, NetlinkError) as error:
            failures.append(f"{leftover}: {error}")
    return Removal(tuple(removed), tuple(failures))


def running(proc: Path = PROC) -> tuple[int, ...]:
    """Return the processes named kube-proxy in this network namespace.

    One that is part of another program (k3s) is not seen.
    """
    found = []
    here = proc / "thread-self/ns/net"
    for path in proc.glob("[0-9]*/comm"):
        try:
            if path.read_text() == "kube-proxy\n" and (path.parent / "ns/net").samefile(here):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return tuple(sorted(found))


def _nft_tables() -> Iterator[NftTable]:
    with NftSocket() as nft:
        for table in (Table(family, NFT_TABLE) for family in Family):
            if nft.table_comment(table) is not None:
                yield NftTable(table, tuple(sorted(nft.chains(table))))
