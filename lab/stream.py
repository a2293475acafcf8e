"""A steady stream of requests at a place, each on a connection of its own, while something else happens.

It runs in a thread of the process that makes the place's calls: `begin` starts it under a key, `end` stops it
and says what came of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lab import probe
from lab.probe import Failure
from lab.world import World
from netlink import netns

_streams: dict[str, _Stream] = {}


@dataclass(slots=True)
class _Stream:
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    count: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """How many requests there were, and why some failed, each with the second it was made in."""

    count: int = 0
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"{len(self.failures)} of {self.count} requests failed"
        return f"{said}: {', '.join(self.failures[:3])}" if self.failures else said


def begin(namespace: str, key: str, target: tuple[str, int], pause: float, timeout: float) -> None:
    """Start a stream to an address and port; `pause` is between two requests (seconds)."""
    stream = _streams[key] = _Stream()
    stream.thread = threading.Thread(
        target=netns.run, args=(namespace, _ask, stream, target, pause, timeout), daemon=True
    )
    stream.thread.start()


def end(_: str, key: str) -> tuple[int, tuple[str, ...]]:
    """Stop a stream; return how many requests it made, and the failures."""
    stream = _streams.pop(key)
    stream.stop.set()
    assert stream.thread is not None
    stream.thread.join()
    return stream.count, tuple(stream.failures)


@contextmanager
def streaming(world: World, place: str, target: tuple[str, int], pause: float = 0.1) -> Iterator[Outcome]:
    """Ask a target from a place all through a block; the outcome is filled when the block ends."""
    outcome, key = Outcome(), f"{place} {target}"
    world.at(place, begin, key, target, pause, probe.TIMEOUT_SECONDS * world.patience)
    try:
        yield outcome
    finally:
        outcome.count, outcome.failures = world.at(place, end, key)


def _ask(stream: _Stream, target: tuple[str, int], pause: float, timeout: float) -> None:
    began = time.monotonic()
    while not stream.stop.is_set():
        at = time.monotonic() - began
        (result,) = probe.fetch_here(*target, timeout=timeout)
        stream.count += 1
        if isinstance(result, Failure):
            stream.failures.append(f"{result.reason} at {at:.1f} s")
        stream.stop.wait(pause)
