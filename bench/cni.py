"""How long ADD and DEL take: our binary and daemon, beside the Go bridge and host-local plugins."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.figures import ms, p50, quantile, show, timed
from lab import network
from lab.topology import Mode, Topology, plan
from netlink import netns

GO_PLUGINS = Path("/usr/lib/cni")
WARM_UP = 3


class Plugin(NamedTuple):
    """A plugin binary, the configuration it is given, and where it finds further plugins."""

    binary: Path
    config: bytes


def add_parser(commands: Any) -> None:
    """Add `cni` to the bench's command line."""
    parser = commands.add_parser("cni", help="attach and detach pods")
    parser.add_argument("--pods", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument(
        "--parallel", type=int, default=8, help="at once, in the second part (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Attach and detach pods on a node of its own, the plugins by turns."""
    with _node() as (lab, node), tempfile.TemporaryDirectory() as scratch, _namespaces(args.pods * 2) as pods:
        conflist = json.loads((lab.node_dir(node.name) / "cni/net.d/10-podwire.conflist").read_text())
        ours = json.dumps(conflist["plugins"][0] | {"cniVersion": "1.0.0", "name": "podwire"}).encode()
        plugins = {
            "podwire": Plugin(lab.node_dir(node.name) / "cni/bin/podwire", ours),
            "bridge + host-local": Plugin(GO_PLUGINS / "bridge", _go_config(scratch)),
        }
        half = args.pods
        places = {name: pods[i * half : (i + 1) * half] for i, name in enumerate(plugins)}
        show("Interpreter start alone (python3 -IS -c pass), ms", ("p50", "p90"), [_interpreter()])
        rows, parallel = [], []
        for command in ("ADD", "DEL"):
            samples = _by_turns(node.namespace, plugins, places, command)
            base = p50([wall for wall, _ in samples["bridge + host-local"]])
            rows += [_row(command, name, found, base) for name, found in samples.items()]
        for command in ("ADD", "DEL"):
            totals = {
                n: _at_once(node.namespace, p, places[n], command, args.parallel) for n, p in plugins.items()
            }
            base = totals["bridge + host-local"]
            parallel += [
                (command, name, f"{half / total * 1e3:.0f}", f"{base / total:.2f}")
                for name, total in totals.items()
            ]
    columns = ("command", "plugin", "p50 ms", "p90 ms", "ratio of p50", "cpu ms")
    show(f"One after the other, {half} pods each, by turns (cpu without the daemon's)", columns, rows)
    show(f"{args.parallel} at once, {half} pods", ("command", "plugin", "pods per second", "ratio"), parallel)


@contextmanager
def _node() -> Iterator[tuple[Any, Any]]:
    """Yield a lab of one node, with its daemon."""
    topology: Topology = plan(f"bench{os.getpid()}", nodes=1, far=0, mode=Mode.ROUTED)
    try:
        lab = network.up(topology)
        yield lab, topology.nodes[0]
    finally:
        network.remove(topology.name)


@contextmanager
def _namespaces(count: int) -> Iterator[list[str]]:
    """Yield network namespaces for pods."""
    names = [f"pwbench-{os.getpid()}-{i}" for i in range(count)]
    try:
        for name in names:
            netns.create(name)
        yield names
    finally:
        for name in names:
            netns.delete(name)


def _go_config(scratch: str) -> bytes:
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.250.0.0/16"}]], "dataDir": scratch}
    config = {"cniVersion": "1.0.0", "name": "go", "type": "bridge", "bridge": "cni0", "isGateway": True}
    return json.dumps(config | {"ipam": ipam}).encode()


def _execute(plugin: Plugin, command: str, pod: str) -> None:
    env = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod,
        "CNI_NETNS": str(netns.path(pod)),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(plugin.binary.parent),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    done = subprocess.run([plugin.binary], input=plugin.config, env=env, capture_output=True, check=False)
    if done.returncode or b"without the daemon" in done.stderr:
        raise SystemExit(f"bench: {plugin.binary.name} {command}: {(done.stdout + done.stderr).decode()}")


def _by_turns(
    node: str, plugins: dict[str, Plugin], places: dict[str, list[str]], command: str
) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, cpu) milliseconds of each execution."""

    def work() -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in plugins}
        for turn in range(len(next(iter(places.values())))):
            for name, plugin in plugins.items():
                before = _children_cpu()
                wall = timed(lambda p=plugin, pod=places[name][turn]: _execute(p, command, pod))  # type: ignore[misc]
                found[name].append((wall, _children_cpu() - before))
        return {name: samples[WARM_UP:] for name, samples in found.items()}

    return netns.run(node, work)


def _at_once(node: str, plugin: Plugin, pods: list[str], command: str, workers: int) -> float:
    """Return the milliseconds for all pods."""

    def work() -> None:
        with ThreadPoolExecutor(workers) as pool:  # its threads start in this thread's namespace
            list(pool.map(lambda pod: _execute(plugin, command, pod), pods))

    return timed(lambda: netns.run(node, work))


def _interpreter() -> tuple[str, str]:
    run: Callable[[], object] = lambda: subprocess.run(["/usr/bin/python3", "-IS", "-c", "pass"], check=True)  # noqa: E731
    samples = [timed(run) for _ in range(30)]
    return ms(p50(samples)), ms(quantile(samples, 0.9))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def _row(command: str, name: str, samples: list[tuple[float, float]], base: float) -> tuple[str, ...]:
    walls = [wall for wall, _ in samples]
    cpu = p50([used for _, used in samples])
    return (command, name, ms(p50(walls)), ms(quantile(walls, 0.9)), f"{p50(walls) / base:.2f}", ms(cpu))
