"""The daemon on an API server: start, memory, changes one by one and in a storm.

The server is the one of tests/kubeapi, a process of its own on the same two cores.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.cni import BLOCK, settle
from bench.figures import ms, p50, quantile, show, timed
from bench.plugins import Chain, Plugin, Pod, pods, process_cpu, resident
from cni.install import install_binary
from lab.probe import wait_status
from netlink import netns
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi
from tests.node.kernel import listening

ME, SERVER = "172.16.0.10", "172.31.255.254"
NODE = "node-0"
LOOPBACK = 1
DEADLINE = 60.0
EMPTY, SERVICES, LARGE = (
    {"services": 0, "endpoints": 0, "nodes": 1},
    {"services": 10_000, "endpoints": 10, "nodes": 1},
    {"services": 10_000, "endpoints": 10, "nodes": 5_000},
)


@dataclass(slots=True)
class Running:
    """A daemon that is ready; `seconds` is how long that took from its start on."""

    api: KubeApi
    process: subprocess.Popen[bytes]
    namespace: str
    root: Path
    seconds: float

    @property
    def memory(self) -> float:
        """Resident memory (MB)."""
        return resident(self.process.pid)


def add_parser(commands: Any) -> None:
    """Add `cluster` to the bench's command line."""
    parser = commands.add_parser("cluster", help="from the Kubernetes API to the kernel")
    parser.add_argument(
        "--starts", type=int, default=5, help="of each cluster; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--changes", type=int, default=100, help="one by one (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the storm (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1000.0, help="changes a second (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure starts, then changes, then the storm."""
    rows: list[tuple[str, ...]] = []
    for name, layout, seconds, memory in (
        ("empty", EMPTY, 1.0, 90.0),
        ("10k services x 10", SERVICES, 3.0, 0.0),
        ("10k services x 10, 5k nodes", LARGE, 0.0, 250.0),
    ):
        if not args.starts:
            continue
        found = [_start(layout) for _ in range(args.starts)]
        starts = [took for took, _ in found]
        most = max(used for _, used in found)
        at_most = (f"<= {seconds:g}" if seconds else "", f"<= {memory:g}" if memory else "")
        row = (name, f"{p50(starts):.2f}", f"{min(starts):.2f}", f"{max(starts):.2f}", at_most[0])
        rows.append((*row, f"{most:.1f}", at_most[1]))
    if rows:
        _show_starts(args.starts, rows)
    with _daemon(SERVICES) as daemon:
        _changes(daemon, args.changes)
        _storm(daemon, args.rate, args.seconds)


def _show_starts(starts: int, rows: list[tuple[str, ...]]) -> None:
    columns = ("cluster", "ready, s, p50", "min", "max", "target", "memory, MB, max", "target")
    show(f"From the process's start to ready, {starts} starts each", columns, rows)


def _start(layout: dict[str, int]) -> tuple[float, float]:
    with _daemon(layout) as daemon:
        return daemon.seconds, daemon.memory


@contextmanager
def _daemon(layout: dict[str, int]) -> Iterator[Running]:
    """Yield a daemon that is ready, on a node that routes to nobody but the API server."""
    namespace = f"pwbench-{os.getpid()}"
    netns.create(namespace)
    try:
        netns.run(namespace, _connect)
        with (
            tempfile.TemporaryDirectory() as scratch,
            running.start(namespace, generate={k: v for k, v in layout.items() if v}) as api,
        ):
            root = Path(scratch)
            began = time.monotonic()
            process = netns.run(namespace, partial(_spawn, root, api.kubeconfig(root / "kubeconfig")))
            try:
                if not wait_status(namespace, 10256, "/livez", began + DEADLINE):
                    raise SystemExit(f"bench: not ready: {(root / 'log').read_text()[-2000:]}")
                yield Running(api, process, namespace, root, time.monotonic() - began)
            finally:
                process.terminate()
                process.wait()
    finally:
        netns.delete(namespace)


def _connect() -> None:
    """Give the node an interface, so that other nodes are somewhere."""
    with Rtnl() as rtnl:
        rtnl.commit(link_up(LOOPBACK), veth_add(Veth("eth0", "peer")))
        index = socket.if_nametoindex("eth0")
        rtnl.commit(link_up(index), link_up(socket.if_nametoindex("peer")))
        rtnl.commit(address_add(index, f"{ME}/16"))
        rtnl.commit(route_replace(Route("0.0.0.0/0", gateway="172.16.255.1", protocol=4)))


def _spawn(root: Path, kubeconfig: Path) -> subprocess.Popen[bytes]:
    words = ["daemon", "--node-name", NODE, "--source", "kubernetes", "--kubeconfig", str(kubeconfig)]
    words += ["--state-dir", str(root / "state"), "--socket", str(root / "podwire.sock")]
    with (root / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "cli.main", *words], stdout=log, stderr=log)


def _changes(daemon: Running, count: int) -> None:
    """Change one endpoint after the other; each time until the kernel tells of it."""
    pieces = daemon.api.list("endpointslices", limit=count)["items"]
    sent: list[float] = []
    stream: list[float] = []
    with listening(daemon.namespace) as events:
        for number, piece in enumerate(pieces):
            address = f"10.99.{number // 250}.{number % 250 + 1}"
            piece["endpoints"][0]["addresses"] = [address]
            meta = piece["metadata"]
            events.take()
            began = time.monotonic()
            daemon.api.patch(
                "endpointslices", meta["name"], {"endpoints": piece["endpoints"]}, namespace=meta["namespace"]
            )
            answered = time.monotonic()
            found = events.take(DEADLINE)
            if not found:
                raise SystemExit("bench: a change did not arrive")
            sent.append((found[0].at - began) * 1e3)
            stream.append((found[0].at - answered) * 1e3)
    rows = [
        ("from the request", ms(p50(sent)), ms(quantile(sent, 0.99)), ""),
        ("from the server's answer", ms(p50(stream)), ms(quantile(stream, 0.99)), "p50 <= 15"),
    ]
    show(f"{count} changes, one by one, until the kernel has it, ms", ("what", "p50", "p99", "target"), rows)


def _storm(daemon: Running, rate: float, seconds: float) -> None:
    """Attach and detach pods while endpoints change; then wait until all changes are in the kernel."""
    binary = install_binary(
        daemon.root / "bin", socket=str(daemon.root / "podwire.sock"), state_dir=str(daemon.root / "state")
    )
    chain = Chain("podwire", (Plugin(binary, {"type": "podwire"}, ()),), 0)
    with pods(BLOCK) as made:
        quiet = netns.run(daemon.namespace, _attach, chain, made, min(seconds, 10.0))
        memory, cpu, syncs = daemon.memory, process_cpu(daemon.process.pid), _syncs(daemon)
        daemon.api.churn(rate=rate, seconds=seconds)
        loud = netns.run(daemon.namespace, _attach, chain, made, seconds)
        done = daemon.api.wait_for(lambda c: not c.churning, DEADLINE)
        share = (process_cpu(daemon.process.pid) - cpu) / seconds / 10
        syncs = _syncs(daemon) - syncs
    with listening(daemon.namespace) as events:
        storm_end = ended = time.monotonic()
        while found := events.take(1.5):
            ended = found[-1].at
    rows = [
        (what, str(len(walls)), ms(p50(walls)), ms(quantile(walls, 0.99)), at_most)
        for what, walls, at_most in (("quiet", quiet, ""), ("storm", loud, "p99 <= 60"))
    ]
    show("CNI ADD meanwhile, ms", ("when", "pods", "p50", "p99", "target"), rows)
    print(
        f"\n{done.churned} changes in {seconds:.0f} s came to the kernel in {syncs:.0f} syncs; the daemon "
        f"used {share:.0f} % of a core; memory {memory:.1f} MB before, {daemon.memory:.1f} after; the last "
        f"change was in the kernel {max(0.0, ended - storm_end):.2f} s after the storm"
    )


def _syncs(daemon: Running) -> float:
    """Return how many syncs of changes there were."""

    def ask() -> str:
        with urllib.request.urlopen("http://127.0.0.1:10249/metrics") as page:
            return str(page.read().decode())

    lines = netns.run(daemon.namespace, ask).splitlines()
    name = "kubeproxy_sync_partial_proxy_rules_duration_seconds_count"
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def _attach(chain: Chain, made: Sequence[Pod], seconds: float) -> list[float]:
    """Attach pods one after the other, take all away again, and so on; return how long each ADD took."""
    walls, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        for pod in made:
            walls.append(timed(partial(chain.execute, "ADD", pod)))
        for pod in made:
            chain.execute("DEL", pod)
        settle()
    return walls
