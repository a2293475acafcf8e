"""How long services take to get into the kernel, all and one by one."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
from typing import Any

from bench.figures import ms, p50, quantile, show, timed
from bench.layout import Pair, chain_of, chain_per_service, pairs, piece
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from proxy.frontends import frontends
from proxy.nftables.dataplane import Dataplane, NodeRanges
from proxy.nftables.ruleset import TABLE
from proxy.table import Change, FrontendTable
from proxy.topology import Place

NODE = "node0"
RANGES = NodeRanges(("10.128.0.0/9",), ("10.128.0.0/24",), ("10.128.0.0/9",))
CHANGES = 200
SLOW_CHANGES = 5


def add_parser(commands: Any) -> None:
    """Add `proxy` to the bench's command line."""
    parser = commands.add_parser("proxy", help="load and change services in the kernel")
    parser.add_argument("--services", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--endpoints", type=int, default=10, help="per service (default: %(default)s)")
    parser.add_argument("--no-chains", action="store_true", help="leave out the chain-per-service layout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure each size in a namespace of its own."""
    rows = []
    for services in args.services:
        layout = pairs(services, args.endpoints)
        ours = _in_namespace(_measure, layout)
        theirs = {} if args.no_chains else _in_namespace(_measure_chains, layout)
        rows += [(f"{services} x {args.endpoints}", *row) for row in _rows(ours, theirs)]
    columns = ("size", "what", "podwire ms", "p99", "chain per service, nft -f, ms", "ratio")
    show("Service proxy: from a parsed snapshot to the kernel", columns, rows)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nlargest resident memory of this process, which also holds the other layout: {memory:.0f} MB")


def _rows(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for what, samples in ours.items():
        other = theirs.get(what)
        rows.append(
            (
                what,
                ms(p50(samples)),
                ms(quantile(samples, 0.99)) if len(samples) > 1 else "",
                ms(p50(other)) if other else "-",
                f"{p50(samples) / p50(other):.4f}" if other else "-",
            )
        )
    return rows


def _in_namespace(work: Any, layout: list[Pair]) -> dict[str, list[float]]:
    name = f"pwbench-{os.getpid()}"
    netns.create(name)
    try:
        found: dict[str, list[float]] = netns.run(name, work, layout)
        return found
    finally:
        netns.delete(name)


def _measure(layout: list[Pair]) -> dict[str, list[float]]:
    with Nft(Family.V4, TABLE) as nft:
        table, dataplane = FrontendTable(), Dataplane(nft)

        def load() -> None:
            for service, found in layout:
                table.replace(service.name, frontends(service, (found,), Place(NODE)))
            dataplane.load(table, RANGES)

        def update(number: int, pods: list[int]) -> list[Change]:
            service = layout[number % len(layout)][0]
            return table.replace(
                service.name, frontends(service, (piece(number % len(layout), pods),), Place(NODE))
            )

        count = len(layout[0][1].endpoints)
        fresh = len(layout) * count
        found = {"load all": [timed(load)]}
        found["adopt all after a restart"] = [timed(lambda: Dataplane(nft).load(table, RANGES))]
        replaced, fewer = [], []
        for i in range(CHANGES):
            own = [i % len(layout) * count + j for j in range(count)]
            replaced.append(timed(lambda i=i, own=own: dataplane.apply(update(i, [*own[1:], fresh + i]))))  # type: ignore[misc]
            fewer.append(timed(lambda i=i, own=own: dataplane.apply(update(i, own[1:]))))  # type: ignore[misc]
            dataplane.apply(update(i, own))
        return found | {"replace one endpoint": replaced, "remove one endpoint": fewer}


def _measure_chains(layout: list[Pair]) -> dict[str, list[float]]:
    text = chain_per_service(layout)
    found = {"load all": [timed(lambda: _nft(text))]}
    count = len(layout[0][1].endpoints)
    replaced, fewer = [], []
    for i in range(min(SLOW_CHANGES, len(layout))):
        own = [i * count + j for j in range(count)]
        one = chain_of(layout[i][0], piece(i, [*own[1:], len(layout) * count + i]))
        less = chain_of(layout[i][0], piece(i, own[1:]))
        replaced.append(timed(lambda one=one: _nft(one)))  # type: ignore[misc]
        fewer.append(timed(lambda less=less: _nft(less)))  # type: ignore[misc]
    return found | {"replace one endpoint": replaced, "remove one endpoint": fewer}


def _nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
