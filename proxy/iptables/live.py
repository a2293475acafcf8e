"""What is there: tables as programs of iptables print them, of the variant that the host uses.

The programs are run by whoever gives a `Tables`; nothing here touches the kernel.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from netlink.errors import NetlinkError
from netlink.family import Family
from proxy.frontends import FrontendKey, Origin
from proxy.iptables.names import EXTERNAL_SERVICES, NAT_NODEPORTS, NAT_SERVICES, SERVICES, ChainId
from proxy.iptables.text import Rules
from proxy.model import Protocol as Transport

LEGACY, NFT = "legacy", "nft"
HINTS = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"})
"""Chains that kubelet makes in the variant it uses, for others to follow."""
_LINE = re.compile(r"\bline:? (\d+)")
_ADDRESSED = re.compile(r"(?:-d ([0-9a-f.:]+)/\d+ )?-p (\w+) .*--dport (\d+) ")


class TablesError(NetlinkError):
    """A program refused its work; `text` is what it was given, `line` which of it was wrong (0 unknown)."""

    def __init__(self, complaint: str, text: str = "") -> None:
        super().__init__(errno.EIO, "cannot change the rules of iptables", complaint)
        self.text = text
        found = _LINE.search(complaint)
        self.line = int(found[1]) if found else 0

    @property
    def refused(self) -> str:
        """The line that was wrong; "" if the program has not said."""
        lines = self.text.splitlines()
        return lines[self.line - 1] if 0 < self.line <= len(lines) else ""


class LiveRule(Protocol):
    """A rule as it is: where it leads, and its line as iptables-save prints it."""

    @property
    def target(self) -> str:
        """The chain or target that it jumps or goes to; "" for none."""

    @property
    def line(self) -> str:
        """The line, "-A CHAIN …"."""


class LiveTable(Protocol):
    """A table as it is. `chains` includes those that are `builtin`."""

    @property
    def name(self) -> str:
        """Its name: nat, filter, …"""

    @property
    def builtin(self) -> Collection[str]:
        """Names of the chains that the kernel enters."""

    @property
    def chains(self) -> Mapping[str, Sequence[LiveRule]]:
        """Its chains by name."""


class Tables(Protocol):
    """The tables of one variant and IP family, read and edited by its programs."""

    @property
    def variant(self) -> str:
        """Return `legacy` or `nft`."""

    @property
    def family(self) -> Family:
        """Return the IP family."""

    def read(self) -> Iterable[LiveTable]:
        """Return the tables that are there, and make none. Raises TablesError."""

    def edit(self, text: str) -> None:
        """Give iptables-restore --noflush a text. Raises TablesError; a table is then changed or not."""


def rules_of(chain: str, found: Iterable[LiveRule]) -> Rules:
    """Return rules of a chain without its name."""
    skip = len(f"-A {chain} ")
    return tuple(one.line[skip:] for one in found)


def choose(there: Mapping[str, Iterable[LiveTable]], on_path: str) -> str:
    """Return the variant that the host's tools use, from both variants' tables of a family.

    kubelet's chains tell it; else the one with more rules has it; else what `iptables --version` prints on
    the PATH (`on_path`). As kubernetes-sigs/iptables-wrappers decides.
    """
    tables = {variant: tuple(there.get(variant, ())) for variant in (NFT, LEGACY)}
    for variant, found in tables.items():
        if any(HINTS & set(t.chains) for t in found if t.name == "mangle"):
            return variant
    counts = {v: sum(len(rules) for t in found for rules in t.chains.values()) for v, found in tables.items()}
    if counts[LEGACY] != counts[NFT]:
        return max(counts, key=lambda v: counts[v])
    return LEGACY if LEGACY in on_path else NFT


def addressed(family: Family, chain: ChainId, rules: Iterable[str]) -> set[FrontendKey]:
    """Return what can be addressed by the rules of a shared chain."""
    found = set()
    if chain in (NAT_SERVICES, NAT_NODEPORTS, SERVICES, EXTERNAL_SERVICES):
        for one in rules:
            match = _ADDRESSED.search(one)
            if match and match[2].upper() in Transport.__members__:
                address = "" if "--dst-type" in one else match[1] or ""
                protocol = Transport[match[2].upper()]
                found.add(FrontendKey(family, address, protocol, int(match[3]), Origin.ANY))
    return found
