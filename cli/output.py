"""How commands print: aligned tables for people, JSON for programs, one sentence for what went wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class CommandError(Exception):
    """A command cannot do what was asked; the text is one sentence. Exit status 1."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under column titles, aligned by spaces."""
    lines = [[c.upper() for c in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def show(format: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table of the named columns, or as a JSON list of all their fields."""
    if format == "json":
        print(json.dumps(list(rows), indent=2))
        return
    print(table(columns, [[_cell(row[c]) for c in columns] for row in rows]))


def complain(sentence: str) -> None:
    """Say what went wrong, on standard error."""
    print(f"podwire: {sentence}", file=sys.stderr)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) if value not in ("", None) else "-"
