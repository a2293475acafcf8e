"""The tables that iptables programs write: read and edited, of both variants and families.

- `TableState` is a table as it is: chains, and where each rule leads.
- `read` returns the tables of a variant and family, and makes none that is not there.
- `edit` gives a variant's own iptables-restore a text: each table in it is changed at once or not at all.
- `run` is how programs are run: what goes wrong is one sentence, an `XtablesError`.

python-iptables reads legacy tables where no program of iptables is, but no others, and has no lock to write.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from netlink.family import Family

TABLES = ("nat", "filter", "mangle", "raw")
LOCK_SECONDS = 30
PROGRAM_SECONDS = 120.0
DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where such programs are, if PATH does not say."""

_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
_TARGET = re.compile(r" -[jg] (\S+)")
_INCOMPATIBLE = re.compile(r"# Table `(\w+)' is incompatible")


class XtablesError(Exception):
    """A program is not there or refused its work; one sentence."""


class Variant(Enum):
    """The two sets of tables that iptables programs write; each knows nothing of the other's."""

    LEGACY = "legacy"
    NFT = "nft"

    def program(self, family: Family, verb: str) -> str:
        """Return the name of a program: iptables-legacy-save, ip6tables-nft-restore, …"""
        return f"{family.keyword}tables-{self.value}-{verb}"


def place(variant: Variant, family: Family, table: str) -> str:
    """Return where a table is, in words."""
    return f"table {table} of iptables-{variant.value} (IPv{family.value})"


class Rule(NamedTuple):
    """A rule of iptables: where it jumps or goes to, and its line as iptables-save prints it ("" unknown)."""

    target: str
    line: str = ""


@dataclass(frozen=True, slots=True)
class TableState:
    """A table of iptables. `chains` includes those that are `builtin`."""

    variant: Variant
    family: Family
    name: str
    builtin: frozenset[str]
    chains: Mapping[str, tuple[Rule, ...]]


def parse_save(output: str, variant: Variant, family: Family) -> Iterator[TableState]:
    """Yield the tables in what iptables-save has printed."""
    name, builtin, chains = "", set[str](), dict[str, list[Rule]]()
    for line in output.splitlines():
        if line.startswith("*"):
            name, builtin, chains = line[1:], set(), {}
        elif line.startswith(":"):
            chain, policy, _ = line[1:].rsplit(" ", 2)
            chains[chain] = []
            builtin |= {chain} if policy != "-" else set()
        elif line.startswith("-A "):
            target = _TARGET.search(_QUOTED.sub("", line) if '"' in line else line)
            chain = line.split(" ", 2)[1]
            chains.setdefault(chain, []).append(Rule(target[1] if target else "", line))
        elif line == "COMMIT" and name in TABLES:
            rules = {chain: tuple(found) for chain, found in chains.items()}
            yield TableState(variant, family, name, frozenset(builtin), rules)


def load_iptc() -> Any | None:
    """Return the module of python-iptables, or None where it is missing or finds no libxtables."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            return importlib.import_module("iptc")
    except Exception:  # what is wrong with its libraries, it raises in its own ways
        return None


def read_legacy(iptc: Any, family: Family, name: str) -> TableState:
    """Read a legacy table by python-iptables; the kernel must have it, or would make it.

    Only names are looked at: its `Rule` objects cost 100 times as much. `autocommit` has to be off, or
    closing the table writes it back.
    """
    table = (iptc.Table if family is Family.V4 else iptc.Table6)(name, autocommit=False)
    try:
        table.refresh()  # it keeps tables, maybe one of another network namespace
        chains = {}
        for chain in [c.name for c in table.chains]:
            rules, entry = [], table.first_rule(chain)
            while entry:
                target = table.get_target(entry) or b""
                rules.append(Rule(target.decode() if isinstance(target, bytes) else str(target)))
                entry = table.next_rule(entry)
            chains[chain] = tuple(rules)
        builtin = frozenset(chain for chain in chains if table.builtin_chain(chain))
    finally:
        table.close()
    return TableState(Variant.LEGACY, family, name, builtin, chains)


def read(
    variant: Variant, family: Family, proc: Path, remarks: list[str], *, exact: bool
) -> tuple[TableState, ...]:
    """Return the tables that are there; say in `remarks` what could not be looked at, and why.

    `exact` is with the text of rules; without it, legacy tables are read by python-iptables where that works.
    """
    if variant is Variant.LEGACY:
        try:
            names = (proc / f"thread-self/net/{family.keyword}_tables_names").read_text().split()
        except FileNotFoundError:
            return ()
        wanted = [name for name in TABLES if name in names]
        if not wanted:
            return ()
        if not exact and (found := _by_iptc(family, wanted, remarks)):
            return found
    try:
        output = run(variant.program(family, "save"))
    except XtablesError as error:
        remarks.append(f"iptables-{variant.value} (IPv{family.value}) was not looked at: {error}")
        return ()
    for name in _INCOMPATIBLE.findall(output):
        remarks.append(
            f"{place(variant, family, name)} was not looked at: it holds rules that are not of iptables"
        )
    return tuple(parse_save(output, variant, family))


def edit(variant: Variant, family: Family, lines: str) -> None:
    """Change tables as the input of iptables-restore says; what it does not name stays as it is."""
    run(variant.program(family, "restore"), "--noflush", f"--wait={LOCK_SECONDS}", stdin=lines)


def run(program: str, *words: str, stdin: str = "") -> str:
    """Run a program and return what it prints."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{DIRECTORIES}")
    if not path:
        raise XtablesError(f"the program {program} is not installed")
    try:
        done = subprocess.run(
            [path, *words],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # comments are whatever somebody wrote
            timeout=PROGRAM_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise XtablesError(f"{program}: {error}") from None
    if done.returncode:
        complaint = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise XtablesError(f"{program} failed: {complaint[:500]}")
    return done.stdout


def _by_iptc(family: Family, names: list[str], remarks: list[str]) -> tuple[TableState, ...]:
    """Read legacy tables by python-iptables; return none, and say so, where that does not work."""
    iptc = load_iptc()
    if iptc is None:
        remarks.append("python-iptables is not installed or finds no libxtables: programs read legacy tables")
        return ()
    try:
        return tuple(read_legacy(iptc, family, name) for name in names)
    except iptc.IPTCError as error:
        remarks.append(f"python-iptables cannot read the legacy tables (IPv{family.value}): {error}")
        return ()
