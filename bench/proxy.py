"""How long services take to get into the kernel, all and one by one, and what they cost to keep."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench import layout as shapes
from bench.figures import ms, p50, quantile, show
from bench.layout import Pair, pair, pairs, piece
from bench.plot import Curve, save
from bench.plugins import resident
from lab.probe import wait_status
from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from node.dataplanes import NFTABLES, opened
from proxy.dataplane import NodeRanges
from proxy.frontends import frontends
from proxy.table import Change, FrontendTable
from proxy.topology import Place

HERE = Place("node0")
RANGES = NodeRanges((shapes.PODS,), ("10.128.0.0/24",), (shapes.PODS,))
SIZES = ((100, 10), (1000, 10), (5000, 10), (10_000, 10), (44_000, 10), (5000, 50))
CHANGES, ROLLING, MANY = 200, 1000, 500
SLOW_CHANGES = 5
READY_SECONDS = 120.0

LOAD, ADOPT = "load all", "adopt all after a restart"
REPLACE, FEWER, MORE = "replace an endpoint", "an endpoint fewer", "an endpoint more"
ADD, REMOVE = "add a service", "remove a service"
REPLACE_MANY, ROLL = f"replace {MANY} endpoints of one service", "rolling update, each change"
PLOTTED = (REPLACE, FEWER, ADD)
STEPS = (FEWER, MORE, ADD, REMOVE)
IPTABLES_TARGETS = {LOAD: 3000.0, REPLACE: 100.0}
"""The most that these may take with the legacy variant and 1,000 x 10, in ms."""
FLAT = 1.5
"""How much longer than at the smallest size it may take to replace an endpoint at the largest."""
DAEMON_MB = 150


class Target(NamedTuple):
    """The most that something may take, in ms; `size` is (services, endpoints), None for every size."""

    size: tuple[int, int] | None
    what: str
    share: float
    limit: float


TARGETS = (
    Target((10_000, 10), LOAD, 0.5, 1000),
    Target((44_000, 10), LOAD, 0.5, 5000),
    Target(None, REPLACE, 0.5, 1),
    Target(None, REPLACE, 0.99, 10),
    *(Target((10_000, 10), what, 0.5, 2) for what in STEPS),
    *(Target((44_000, 10), what, 0.5, 8) for what in STEPS),
)


@dataclass(slots=True)
class Found:
    """What was measured at one size: wall times and processor times in ms by what was done, memory in MB."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    memory: float = 0.0

    def time(self, what: str, work: Callable[[], object]) -> None:
        """Do something once, and note what it took."""
        cpu, start = time.process_time(), time.perf_counter()
        work()
        self.wall.setdefault(what, []).append((time.perf_counter() - start) * 1e3)
        self.cpu.setdefault(what, []).append((time.process_time() - cpu) * 1e3)


def add_parser(commands: Any) -> None:
    """Add `proxy` to the bench's command line."""
    parser = commands.add_parser("proxy", help="load and change services in the kernel")
    parser.add_argument("--sizes", nargs="+", default=SIZES, type=_size, metavar="SERVICESxENDPOINTS")
    parser.add_argument(
        "--chains-up-to",
        type=int,
        default=10_000,
        metavar="SERVICES",
        help="measure the layout of a chain per service and endpoint up to this size; "
        "its load takes minutes at 10,000 (default: %(default)s)",
    )
    parser.add_argument(
        "--iptables-up-to",
        type=int,
        default=1000,
        metavar="SERVICES",
        help="measure the iptables dataplane, in both variants, up to this size (default: %(default)s)",
    )
    parser.add_argument("--no-chains", action="store_true", help="leave that layout out")
    parser.add_argument("--daemon", type=_size, default=(10_000, 10), help="the daemon's memory at this size")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write change latency over size there")
    parser.set_defaults(run=run)


def _size(text: str) -> tuple[int, int]:
    services, _, endpoints = text.partition("x")
    if not services.isdecimal() or not endpoints.isdecimal() or not int(services) or not int(endpoints):
        raise argparse.ArgumentTypeError(f"{text!r} is not SERVICESxENDPOINTS")
    return int(services), int(endpoints)


def run(args: argparse.Namespace) -> None:
    """Measure each size in a process and a namespace of its own."""
    rows: list[tuple[str, ...]] = []
    curves: list[Curve] = []
    found: dict[tuple[int, int], Found] = {}
    for services, endpoints in args.sizes:
        _say(f"{services} services x {endpoints} endpoints")
        ours = found[services, endpoints] = _apart(_measure, services, endpoints)
        theirs = Found()
        if services <= args.chains_up_to and endpoints <= 10 and not args.no_chains:
            _say(f"{services} x {endpoints} as chains, by nft -f")
            theirs = _apart(_measure_chains, services, endpoints)
        rows += [(f"{services} x {endpoints}", *row) for row in _rows(ours, theirs)]
        if endpoints == 10:
            curves += _curves(services, ours, theirs)
    columns = ("size", "what", "p50 ms", "p99 ms", "cpu ms", "as chains, nft -f, ms", "ratio")
    show("Service proxy: from a parsed snapshot to the kernel", columns, rows)
    _iptables([size for size in args.sizes if size[0] <= args.iptables_up_to], found)
    services, endpoints = args.daemon
    _say(f"a daemon with {services} x {endpoints}")
    checks = [
        *_checks(found),
        _check(args.daemon, "the daemon's resident memory, MB", _daemon(services, endpoints), DAEMON_MB),
    ]
    show("What must hold", ("size", "what", "measured", "at most", "holds"), checks)
    if args.plot:
        for path in save(curves, args.plot / "change-latency"):
            print(f"wrote {path}")


def _checks(found: dict[tuple[int, int], Found]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each target that a size was measured for, and for how flat the change is."""
    for size, measured in found.items():
        for target in TARGETS:
            if target.size in (None, size):
                samples = measured.wall[target.what]
                value = p50(samples) if target.share == 0.5 else quantile(samples, target.share)
                yield _check(size, f"{target.what}, p{target.share * 100:.0f}, ms", value, target.limit)
    alike = sorted(size for size in found if size[1] == 10)
    if len(alike) > 1:
        first, last = (p50(found[size].wall[REPLACE]) for size in (alike[0], alike[-1]))
        yield _check(alike[-1], f"{REPLACE}, beside {alike[0][0]} services", last / first, FLAT)


def _check(size: tuple[int, int], what: str, value: float, limit: float) -> tuple[str, ...]:
    return f"{size[0]} x {size[1]}", what, ms(value), f"{limit:g}", "yes" if value <= limit else "NO"


def _iptables(sizes: Sequence[tuple[int, int]], found: dict[tuple[int, int], Found]) -> None:
    """Measure the iptables dataplane, and show it beside the other."""
    rows, checks = [], []
    for size, variant in itertools.product(sizes, Variant):
        _say(f"{size[0]} x {size[1]} by iptables-{variant.value}")
        measured = _apart(partial(_measure_iptables, f"iptables-{variant.value}"), *size)
        for what, samples in measured.wall.items():
            nftables = p50(found[size].wall[what])
            other = (ms(nftables), f"{p50(samples) / nftables:.3g}")
            rows.append((f"{size[0]} x {size[1]}", variant.value, what, ms(p50(samples)), *other))
        if variant is Variant.LEGACY:
            for what, limit in IPTABLES_TARGETS.items():
                checks.append(_check(size, f"iptables-legacy: {what}", p50(measured.wall[what]), limit))
    show("The iptables dataplane", ("size", "variant", "what", "p50 ms", "nftables, ms", "ratio"), rows)
    show("What must hold of it", ("size", "what", "measured", "at most", "holds"), checks)


def _rows(ours: Found, theirs: Found) -> Iterator[tuple[str, ...]]:
    for what, samples in ours.wall.items():
        other = theirs.wall.get(what)
        yield (
            what,
            ms(p50(samples)),
            ms(quantile(samples, 0.99)) if len(samples) >= 100 else "",
            ms(p50(ours.cpu[what])),
            ms(p50(other)) if other else "-",
            f"{p50(samples) / p50(other):.4f}" if other else "-",
        )
    rolled = ours.wall.get(ROLL, [])
    yield (
        f"rolling update, {len(rolled)} services",
        ms(sum(rolled)),
        "",
        ms(sum(ours.cpu.get(ROLL, []))),
        "-",
        "-",
    )
    yield "memory of this process", f"{ours.memory:.0f} MB", "", "", "-", "-"


def _curves(services: int, ours: Found, theirs: Found) -> list[Curve]:
    return [
        Curve(f"{name}: {what}", services, p50(found.wall[what]))
        for name, found in (("podwire", ours), ("chain per service, nft -f", theirs))
        for what in PLOTTED
        if what in found.wall
    ]


def _apart(work: Callable[[list[Pair]], Found], services: int, endpoints: int) -> Found:
    """Measure in a child, whose memory holds nothing else, in a namespace of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_inside, (work, services, endpoints))


def _inside(work: Callable[[list[Pair]], Found], services: int, endpoints: int) -> Found:
    with _namespace() as name:
        return netns.run(name, work, pairs(services, endpoints))


@contextmanager
def _namespace() -> Iterator[str]:
    name = f"pwbench-{os.getpid()}"
    netns.create(name)
    try:
        yield name
    finally:
        netns.delete(name)


class Proxy:
    """What the daemon does with a change, without its threads: frontends, table, dataplane."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._stack = ExitStack()
        self._table = FrontendTable()
        self._dataplane = self._stack.enter_context(opened(kind, Family.V4))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, layout: Sequence[Pair]) -> None:
        """Load all, from nothing."""
        for service, found in layout:
            self._table.replace(service.name, frontends(service, (found,), HERE))
        self._dataplane.load(self._table, RANGES)

    def adopt(self) -> None:
        """Do what a daemon does that finds everything in the kernel."""
        with opened(self._kind, Family.V4) as dataplane:
            dataplane.load(self._table, RANGES)

    def set(self, number: int, pods: Sequence[int]) -> None:
        """Set the pods of a service, which is new if it was not there."""
        service, found = pair(number, pods)
        self._apply(self._table.replace(service.name, frontends(service, (found,), HERE)))

    def remove(self, number: int) -> None:
        """Take a service out."""
        self._apply(self._table.replace(pair(number, ())[0].name, ()))

    def _apply(self, changes: list[Change]) -> None:
        self._dataplane.apply(changes)


def _measure(layout: list[Pair]) -> Found:
    found = Found()
    services, count = len(layout), len(layout[0][1].endpoints)
    fresh = services * count  # numbers of pods that no service has yet
    with Proxy(NFTABLES) as proxy:
        gc.disable()  # as the daemon does until its first sync is done
        found.time(LOAD, lambda: proxy.load(layout))
        gc.enable()
        gc.collect()
        gc.freeze()
        found.memory = resident(os.getpid())
        found.time(ADOPT, proxy.adopt)
        for i in range(CHANGES):
            number = i % services
            own = range(number * count, number * count + count)
            found.time(REPLACE, lambda n=number, o=own, i=i: proxy.set(n, [*o[1:], fresh + i]))  # type: ignore[misc]
            proxy.set(number, own)
            found.time(FEWER, lambda n=number, o=own: proxy.set(n, o[1:]))  # type: ignore[misc]
            found.time(MORE, lambda n=number, o=own: proxy.set(n, o))  # type: ignore[misc]
        for i in range(CHANGES):
            number = services + i
            found.time(ADD, lambda n=number: proxy.set(n, range(fresh, fresh + count)))  # type: ignore[misc]
            found.time(REMOVE, lambda n=number: proxy.remove(n))  # type: ignore[misc]
        for i in range(SLOW_CHANGES):
            many = range(fresh + i * MANY, fresh + (i + 1) * MANY)
            if not i:
                proxy.set(0, range(fresh - MANY, fresh))
            found.time(REPLACE_MANY, lambda m=many: proxy.set(0, m))  # type: ignore[misc]
        for i in range(min(ROLLING, services - 1)):
            own = range((i + 1) * count, (i + 2) * count)
            found.time(ROLL, lambda i=i, o=own: proxy.set(i + 1, [*o[1:], fresh + i]))  # type: ignore[misc]
    return found


def _measure_iptables(kind: str, layout: list[Pair]) -> Found:
    found = Found()
    services, count = len(layout), len(layout[0][1].endpoints)
    fresh = services * count
    with Proxy(kind) as proxy:
        found.time(LOAD, lambda: proxy.load(layout))
        found.time(ADOPT, proxy.adopt)
        for i in range(SLOW_CHANGES):
            own = range(i * count, i * count + count)
            found.time(REPLACE, lambda i=i, o=own: proxy.set(i, [*o[1:], fresh + i]))  # type: ignore[misc]
            found.time(FEWER, lambda i=i, o=own: proxy.set(i, o[1:]))  # type: ignore[misc]
            found.time(ADD, lambda i=i, o=own: proxy.set(services + i, o))  # type: ignore[misc]
            found.time(REMOVE, lambda i=i: proxy.remove(services + i))  # type: ignore[misc]
    return found


def _measure_chains(layout: list[Pair]) -> Found:
    found = Found()
    text = shapes.chains(layout)
    found.time(LOAD, lambda: _nft(text))
    count = len(layout[0][1].endpoints)
    for i in range(min(SLOW_CHANGES, len(layout))):
        own = [i * count + j for j in range(count)]
        service = layout[i][0]
        one = shapes.chains_changed(service, piece(i, [*own[1:], len(layout) * count + i]))
        less = shapes.chains_changed(service, piece(i, own[1:]))
        new = shapes.chains_added(*pair(len(layout) + i, own))
        found.time(REPLACE, lambda text=one: _nft(text))  # type: ignore[misc]
        found.time(FEWER, lambda text=less: _nft(text))  # type: ignore[misc]
        found.time(ADD, lambda text=new: _nft(text))  # type: ignore[misc]
    return found


def _nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def _daemon(services: int, endpoints: int) -> float:
    """Return the resident memory of a daemon with so many services, in MB."""
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as scratch, _namespace() as name:
        root, manifests = Path(scratch), Path(scratch) / "manifests"
        manifests.mkdir()
        node = {"kind": "Node", "metadata": {"name": HERE.node}, "spec": {"podCIDRs": ["10.128.0.0/24"]}}
        objects = [node, *shapes.documents(services, endpoints)]
        for start in range(0, len(objects), 200):
            text = json.dumps({"kind": "List", "items": objects[start : start + 200]})
            (manifests / f"{start}.json").write_text(text)
        command = [sys.executable, "-m", "cli.main", "daemon", "--node-name", HERE.node]
        command += ["--source", str(manifests), "--state-dir", str(root), "--socket", str(root / "socket")]
        log = (root / "log").open("wb")
        with log, subprocess.Popen(["ip", "netns", "exec", name, *command], stderr=log) as daemon:
            try:
                netns.run(name, _loopback_up)
                if not wait_status(name, 10256, "/healthz", time.monotonic() + READY_SECONDS):
                    raise SystemExit(
                        f"bench: the daemon did not get ready: {(root / 'log').read_text()[-500:]}"
                    )
                time.sleep(1)  # what follows the first sync
                return resident(daemon.pid)
            finally:
                daemon.kill()


def _loopback_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)
