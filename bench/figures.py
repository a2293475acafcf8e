"""Medians, and how they are printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from cli.output import table


def timed(work: Callable[[], object]) -> float:
    """Return how long a call takes, in milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def quantile(samples: Sequence[float], share: float) -> float:
    """Return a quantile of samples."""
    return sorted(samples)[min(int(len(samples) * share), len(samples) - 1)]


def p50(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def ms(value: float) -> str:
    """Write milliseconds in three significant figures."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table under a title."""
    print(f"\n{title}\n\n{table(columns, rows)}", flush=True)
