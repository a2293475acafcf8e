"""Tables of iptables in memory, which refuse what the programs refuse: tests and rendering need no kernel.

The tests of the dataplane run here and, with the programs of both variants, in a network namespace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from netlink.family import Family
from proxy.iptables.live import LEGACY, TablesError
from proxy.iptables.walk import UnknownRule, parse

BUILTIN = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}
TARGETS = frozenset({"", "ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "DNAT", "SNAT", "MASQUERADE"})


class FakeRule(NamedTuple):
    """A rule as it is."""

    target: str
    line: str


@dataclass(slots=True)
class FakeTable:
    """A table as it is."""

    name: str
    builtin: tuple[str, ...]
    chains: dict[str, list[FakeRule]]


@dataclass(slots=True)
class FakeTables:
    """The tables of a variant and family; `texts` are those it was given, `failures` how many it refuses."""

    family: Family
    variant: str = LEGACY
    tables: dict[str, FakeTable] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    failures: int = 0

    def read(self) -> Iterator[FakeTable]:
        """Yield the tables that are there."""
        yield from self.tables.values()

    def edit(self, text: str) -> None:
        """Do what iptables-restore --noflush does; each table at its COMMIT. Raises TablesError."""
        self.texts.append(text)
        if self.failures:
            self.failures -= 1
            raise TablesError("made to fail", text)
        table: FakeTable | None = None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if line.startswith("*"):
                    name = line[1:]
                    fresh = FakeTable(name, BUILTIN[name], {chain: [] for chain in BUILTIN[name]})
                    table = copy.deepcopy(self.tables.get(name, fresh))
                elif line == "COMMIT":
                    assert table
                    self._check(table)
                    self.tables[table.name] = table
                else:
                    assert table
                    _edit(table, line)
            except (KeyError, ValueError, UnknownRule) as error:
                raise TablesError(f"line {number} failed: {error}", text) from None

    def _check(self, table: FakeTable) -> None:
        """Refuse rules that lead to no chain."""
        for rules in table.chains.values():
            for rule in rules:
                if rule.target not in TARGETS and rule.target not in table.chains:
                    raise ValueError(f"no chain {rule.target}")


def _edit(table: FakeTable, line: str) -> None:
    """Do what one line says."""
    if line.startswith(":"):
        table.chains[line[1:].split(" ", 1)[0]] = []
        return
    command, chain, *rest = line.split(" ", 2)
    if command == "-X":
        if table.chains[chain] or any(r.target == chain for rules in table.chains.values() for r in rules):
            raise ValueError(f"chain {chain} is in use")
        del table.chains[chain]
        return
    rule = FakeRule(parse(rest[0]).target, f"-A {chain} {rest[0]}")
    if command == "-A":
        table.chains[chain].append(rule)
    elif command == "-I":
        table.chains[chain].insert(0, rule)
    elif command == "-D":
        table.chains[chain].remove(rule)
    else:
        raise ValueError(f"unknown command {command}")
