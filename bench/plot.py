"""Change latency over the number of services, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """A point of a curve: its name, the number of services, and the median in ms."""

    name: str
    services: int
    milliseconds: float


def by_name(points: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Return the points of each curve, in order of size."""
    found: dict[str, list[Curve]] = {}
    for point in sorted(points, key=lambda p: p.services):
        found.setdefault(point.name, []).append(point)
    return found


def save(points: Sequence[Curve], path: Path) -> list[Path]:
    """Draw the curves into PATH.svg and PATH.png; return both."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "podwire"  # the same picture, the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, curve in by_name(points).items():
        style = "o-" if name.startswith("podwire") else "s--"
        axes.plot([p.services for p in curve], [p.milliseconds for p in curve], style, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("services, 10 endpoints each")
    axes.set_ylabel("one change, from snapshot to kernel, median, ms")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for one in written:
        figure.savefig(one, metadata={"Date": None} if one.suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
    return written
