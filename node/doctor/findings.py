"""What checks hand back, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """An error breaks traffic, now or at the next pod; a warning may."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, in a sentence that names the thing and its value; and the command or setting for it."""

    sentence: str
    remedy: str
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, slots=True)
class Check:
    """What one look at the node has found.

    Notes are sentences on what was left out, or looks like a finding and is none. `skipped` says why nothing
    was looked at at all.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: str = ""


FEW = 10


def shown(names: Iterable[str]) -> str:
    """Return names in a sentence: all of a few, else the first ones and how many more there are."""
    known = list(dict.fromkeys(names))
    more = len(known) - FEW
    return ", ".join(known[:FEW]) + (f" and {more} more" if more > 0 else "")


def few(findings: list[Finding], what: str) -> tuple[Finding, ...]:
    """Return findings, of very many of one kind the first, and how many more there are."""
    more = len(findings) - 2 * FEW
    if more <= 0:
        return tuple(findings)
    last = Finding(f"and {more} more {what}", "the same", findings[0].severity)
    return (*findings[: 2 * FEW], last)
