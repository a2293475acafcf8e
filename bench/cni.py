"""How long ADD and DEL take: our binary and daemon, beside the Go plugins that do the same.

Two comparisons, each on a node of its own: a plain pod (`bridge` and `host-local`), and one with two host
ports and a bandwidth limit, for which a runtime executes `bridge`, `portmap` and `bandwidth` in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from bench.figures import ms, p50, quantile, show, timed
from bench.plugins import (
    CNI_VERSION,
    Chain,
    Plugin,
    Pod,
    answers,
    bridge,
    children_cpu,
    execute,
    go,
    pods,
    process_cpu,
    resident,
)
from cni.wiring import HOST_PREFIX
from lab import network
from lab.topology import plan
from netlink import netns
from netlink.family import Family
from netlink.qdisc import tbfs
from netlink.rtnl import Rtnl

WARM_UP = 3
BLOCK = 25
FIXED_RUNS = 30
SETTLE_SECONDS = 30.0
COMMANDS = ("ADD", "DEL")
IN_TURN = ("command", "plugins", "p50 ms", "p90 ms", "ratio", "target", "cpu ms", "ratio", "target")
AT_ONCE = ("command", "plugins", "pods per second", "ratio", "target", "cpu ms", "ratio")


@dataclass(frozen=True, slots=True)
class Targets:
    """What the ratios to the Go plugins are to be: times and CPU at most, pods a second at least."""

    wall: dict[str, float]
    cpu: dict[str, float]
    parallel: dict[str, float]


PLAIN = Targets({"ADD": 1.0, "DEL": 0.5}, {"ADD": 1.1}, {"ADD": 1.0, "DEL": 1.0})
CHAINED = Targets({"ADD": 0.3, "DEL": 0.1}, {}, {"ADD": 3.0, "DEL": 3.0})


@dataclass(frozen=True, slots=True)
class Node:
    """A node of its own: its namespace, address, plugin binary, and the daemon's process."""

    namespace: str
    address: str
    binary: Path
    daemon: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One command of one chain: milliseconds of each execution, and of CPU for each, all processes."""

    walls: list[float]
    cpu: float


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cni` to the bench's command line."""
    parser = commands.add_parser("cni", help="attach and detach pods")
    parser.add_argument(
        "--pods", type=int, default=100, help="in each part, 125 at most (default: %(default)s)"
    )
    parser.add_argument("--parallel", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument(
        "--memory", type=int, default=250, help="pods for the daemon's memory; 0: none (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("fixed", "plain", "chain", "memory"), help="one part alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Attach and detach pods, the plugins by turns."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "fixed": _fixed,
        "plain": _plain,
        "chain": _chain,
        "memory": _memory,
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part(args)


@contextmanager
def _node() -> Iterator[Node]:
    """Yield a lab of one node, with its daemon."""
    topology = plan(f"bench{os.getpid()}", nodes=1, far=0)
    try:
        lab, node = network.up(topology), topology.nodes[0]
        process = network.daemon(lab, node.name)
        assert process
        binary = lab.node_dir(node.name) / "cni/bin/podwire"
        yield Node(node.namespace, node.address(Family.V4), binary, process.pid)
    finally:
        network.remove(topology.name)


def _ours(node: Node, *capabilities: str, first_port: int = 0) -> Chain:
    config = {"type": "podwire", "capabilities": dict.fromkeys(capabilities, True)}
    return Chain("podwire", (Plugin(node.binary, config, capabilities),), first_port)


def _plain(args: argparse.Namespace) -> None:
    with _node() as node, tempfile.TemporaryDirectory() as scratch:
        theirs = Chain("bridge + host-local", (bridge(scratch),))
        _compare(args, node, (_ours(node), theirs), PLAIN)


def _chain(args: argparse.Namespace) -> None:
    with _node() as node, tempfile.TemporaryDirectory() as scratch:
        wishes = ("portMappings", "bandwidth")
        chained = (bridge(scratch), go("portmap", wishes[0], snat=True), go("bandwidth", wishes[1]))
        theirs = Chain("bridge + host-local, portmap, bandwidth", chained, 20000)
        _compare(args, node, (_ours(node, *wishes, first_port=10000), theirs), CHAINED)


def _compare(args: argparse.Namespace, node: Node, chains: Sequence[Chain], targets: Targets) -> None:
    """Measure two chains, ours first, one pod after the other and then several at once."""
    with pods(args.pods * 2) as made:
        places = {chain.name: made[at :: len(chains)] for at, chain in enumerate(chains)}
        rows: list[tuple[str, ...]] = []
        parallel: list[tuple[str, ...]] = []
        for command in COMMANDS:
            found = netns.run(node.namespace, _by_turns, node, chains, places, command)
            rows += _rows(command, found, targets)
            if command == "ADD" and len(chains[1].plugins) > 1:
                _show_effects(node, chains, places)
        for command in COMMANDS:
            at_once = netns.run(node.namespace, _parallel, args.parallel, node, chains, places, command)
            parallel += _parallel_rows(command, args.pods, at_once, targets)
    show(f"One after the other, {args.pods} pods each, by turns", IN_TURN, rows)
    show(f"{args.parallel} at once, {args.pods} pods each, {BLOCK} by turns", AT_ONCE, parallel)


def _by_turns(
    node: Node, chains: Sequence[Chain], places: dict[str, list[Pod]], command: str
) -> dict[str, Measured]:
    """Execute for one pod after the other. What the daemon does after DEL's answer counts as its CPU."""
    walls: dict[str, list[float]] = {chain.name: [] for chain in chains}
    cpu: dict[str, list[float]] = {chain.name: [] for chain in chains}
    daemon = process_cpu(node.daemon)
    for turn in range(len(places[chains[0].name])):
        for chain in chains:
            before = children_cpu()
            walls[chain.name].append(timed(partial(chain.execute, command, places[chain.name][turn])))
            cpu[chain.name].append(children_cpu() - before)
    if command == "DEL":
        settle()
    spent = (process_cpu(node.daemon) - daemon) / len(walls[chains[0].name])
    return {
        chain.name: Measured(
            walls[chain.name][WARM_UP:], fmean(cpu[chain.name]) + spent * (chain is chains[0])
        )
        for chain in chains
    }


def settle(left: int = 0) -> None:
    """Wait, in the node, until the daemon has removed the interfaces of deleted pods and `left` remain."""
    deadline = time.monotonic() + SETTLE_SECONDS
    with Rtnl() as rtnl:
        while sum(link.name.startswith(HOST_PREFIX) for link in rtnl.links()) > left:
            if time.monotonic() > deadline:
                raise SystemExit(f"bench: the daemon left interfaces for {SETTLE_SECONDS:.0f} s")
            time.sleep(0.01)


def _rows(command: str, found: dict[str, Measured], targets: Targets) -> list[tuple[str, ...]]:
    base = list(found.values())[-1]
    rows: list[tuple[str, ...]] = []
    for name, measured in found.items():
        theirs = measured is base
        wall, cpu = p50(measured.walls) / p50(base.walls), measured.cpu / base.cpu
        rows.append(
            (
                command,
                name,
                ms(p50(measured.walls)),
                ms(quantile(measured.walls, 0.9)),
                "" if theirs else f"{wall:.2f}",
                "" if theirs else _at_most(targets.wall.get(command)),
                ms(measured.cpu),
                "" if theirs else f"{cpu:.2f}",
                "" if theirs else _at_most(targets.cpu.get(command)),
            )
        )
    return rows


def _parallel(
    workers: int, node: Node, chains: Sequence[Chain], places: dict[str, list[Pod]], command: str
) -> dict[str, Measured]:
    """Execute for several pods at once, the chains by turns of a block: `walls` has each block's time."""
    walls: dict[str, list[float]] = {chain.name: [] for chain in chains}
    cpu = dict.fromkeys(walls, 0.0)
    left = len(places[chains[0].name])
    for at in range(0, left, BLOCK):
        for chain in chains:
            block = places[chain.name][at : at + BLOCK]
            before = children_cpu() + process_cpu(node.daemon)
            walls[chain.name].append(timed(partial(_at_once, chain, command, block, workers)))
            if command == "DEL" and chain is chains[0]:
                left -= len(block)
                settle(left)
            cpu[chain.name] += children_cpu() + process_cpu(node.daemon) - before
    return {name: Measured(walls[name], cpu[name] / len(places[name])) for name in walls}


def _at_once(chain: Chain, command: str, block: Sequence[Pod], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:  # its threads start in this thread's namespace
        list(pool.map(partial(chain.execute, command), block))


def _parallel_rows(
    command: str, count: int, found: dict[str, Measured], targets: Targets
) -> list[tuple[str, ...]]:
    base = list(found.values())[-1]
    rows: list[tuple[str, ...]] = []
    for name, measured in found.items():
        ratios = (
            f"{sum(base.walls) / sum(measured.walls):.2f}",
            f">= {targets.parallel[command]:g}",
            ms(measured.cpu),
            f"{measured.cpu / base.cpu:.2f}",
        )
        per_second = f"{count / sum(measured.walls) * 1e3:.0f}"
        rows.append(
            (command, name, per_second, *(("", "", ms(base.cpu), "") if measured is base else ratios))
        )
    return rows


def _at_most(target: float | None) -> str:
    return "" if target is None else f"<= {target:g}"


def _show_effects(node: Node, chains: Sequence[Chain], places: dict[str, list[Pod]]) -> None:
    """Print whether what was asked for is there: a plugin that does nothing is fast."""
    limited = netns.run(node.namespace, _limited)
    rows: list[tuple[str, ...]] = []
    for chain in chains:
        last = places[chain.name][-1]
        port = chain.host_port(last)
        reached = answers(node.namespace, node.address, port, last.namespace)
        count = sum(name.startswith(HOST_PREFIX) == (chain is chains[0]) for name in limited)
        rows.append((chain.name, f"{port} {'answers' if reached else 'does not answer'}", str(count)))
    show("What is there", ("plugins", "last pod's host port", "limited interfaces of the node"), rows)


def _limited() -> list[str]:
    """Return the names of the interfaces here that have a token bucket filter."""
    with Rtnl() as rtnl:
        names = {link.index: link.name for link in rtnl.links()}
        return [names[index] for index in tbfs(rtnl)]


def _fixed(args: argparse.Namespace) -> None:
    """Measure what attaches nothing: STATUS and VERSION, beside a bare interpreter's start."""
    config = {"name": "bench", "type": "podwire", "cniVersion": "1.1.0"}
    with _node() as node:
        interpreter = ["/usr/bin/python3", "-IS", "-c", "pass"]
        runs: dict[str, Callable[[], object]] = {
            "python3 -IS -c pass": partial(subprocess.run, interpreter, check=True),
            "STATUS": partial(execute, node.binary, "STATUS", config),
            "VERSION": partial(execute, node.binary, "VERSION", {"cniVersion": CNI_VERSION}),
        }
        walls: dict[str, list[float]] = {name: [] for name in runs}
        cpu = dict.fromkeys(runs, 0.0)
        for _ in range(FIXED_RUNS):
            for name, work in runs.items():
                before = children_cpu() + process_cpu(node.daemon)
                walls[name].append(timed(work))
                cpu[name] += children_cpu() + process_cpu(node.daemon) - before
    base = p50(next(iter(walls.values())))
    rows = [
        (
            name,
            ms(p50(found)),
            ms(quantile(found, 0.9)),
            f"{p50(found) - base:+.1f}",
            ms(cpu[name] / FIXED_RUNS),
        )
        for name, found in walls.items()
    ]
    show("What attaches nothing", ("what", "p50 ms", "p90 ms", "beside the interpreter", "cpu ms"), rows)


def _memory(args: argparse.Namespace) -> None:
    """Measure the daemon's resident memory with many pods, and after they are gone."""
    if not args.memory:
        return
    with _node() as node, pods(args.memory) as made:
        chain, rows = _ours(node), [("after start", f"{resident(node.daemon):.1f}")]
        for command in COMMANDS:
            netns.run(node.namespace, _at_once, chain, command, made, args.parallel)
            rows.append((f"after {command} of {len(made)}", f"{resident(node.daemon):.1f}"))
    show("The daemon's resident memory", ("when", "MB"), rows)
