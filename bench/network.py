"""How fast pods reach each other: throughput, the time of a request, and connections.

Beside ours the same by the Go bridge plugin, and by static routes and a VXLAN made by hand. What is compared
is measured by turns, and a ratio is the median of the turns' ratios. The others are measured bare and with
services, as ours always have: connection tracking and address translation, here by rules as kube-proxy's.

Both ends of the one stream, of requests and of connections are on one processor, so that their time is that
of the packet's path: an idle processor takes longer to wake, on a virtual machine much longer, and whether it
has to changes from run to run. Several streams have all processors.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from bench.figures import p50, show
from bench.sites import REQUEST, SERVICE_REQUEST, STREAM, Way, by_hand, go_bridge, ours, until
from lab.topology import Backend, Mode
from netlink import netns

SOURCE = Path(__file__).with_name("pingpong.c")
PROCESSOR = "0"
MANY = 4
WARM_UP = 100_000_000  # bytes
TRIES, TRY_SECONDS = 50, 0.02
THROUGHPUT = (
    "from pod to pod",
    "1 stream, Gbit/s",
    "ratio",
    "target",
    f"{MANY} streams, Gbit/s",
    "ratio",
    "target",
    "1 stream, Gbit a CPU second",
    "ratio",
)
LATENCY = (
    "from pod to pod",
    "requests/s",
    "p50 us",
    "p99 us",
    "p50",
    "mean",
    "target",
    "connections/s",
    "p50 us",
    "ratio",
)
Found = dict[str, dict[str, list[float]]]
"""By case, and by what was measured."""


@dataclass(frozen=True, slots=True)
class Case:
    """A way under its name; `beside` names the case that it is compared with, `targets` are that ratio's.

    Throughput is to be at least, the time of a request at most so many times the other's.
    """

    name: str
    way: Way
    beside: str = ""
    targets: tuple[float | None, float | None] = (None, None)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `network` to the bench's command line."""
    parser = commands.add_parser("network", help="throughput and latency from pod to pod")
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="about what a measurement takes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="of all by turns (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure the parts one after the other."""
    if args.rounds < 1 or not 0 < args.seconds <= 60:
        raise SystemExit("bench: --rounds must be 1 or more, --seconds more than 0 and up to 60")
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tool = _compiled(scratch)
            for name, part in PARTS.items():
                if args.only in (None, name):
                    with ExitStack() as stack:
                        _measure(args, part(stack), tool, stack)
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(number: int, _: FrameType | None) -> None:
    """End in a way that takes down what was built."""
    sys.exit(128 + number)


def _compiled(scratch: str) -> Path:
    tool = Path(scratch) / "pingpong"
    subprocess.run(["gcc", "-O2", "-o", tool, SOURCE], check=True)
    return tool


def _same_node(stack: ExitStack) -> list[Case]:
    (routed,) = ours(stack, "r", 1)
    (bridged,) = ours(stack, "b", 1, Mode.BRIDGE)
    go, go_services = go_bridge(stack, "g"), go_bridge(stack, "k", services=True)
    return [
        Case("Go bridge", go),
        Case("Go bridge, services", go_services, "Go bridge"),
        Case("routed", routed, "Go bridge", (1.0, 1.0)),
        Case("bridge", bridged, "Go bridge"),
        Case("routed, by ClusterIP", routed.by_service(), "routed"),
    ]


def _direct(stack: ExitStack) -> list[Case]:
    way = ours(stack, "d", 2)[-1]
    return [
        Case("static routes", by_hand(stack, "s")),
        Case("static routes, services", by_hand(stack, "p", services=True), "static routes"),
        Case("direct", way, "static routes", (0.95, None)),
        Case("direct, by ClusterIP", way.by_service(), "direct"),
    ]


def _vxlan(stack: ExitStack) -> list[Case]:
    way = ours(stack, "v", 2, backend=Backend.VXLAN)[-1]
    return [
        Case("VXLAN by hand", by_hand(stack, "h", vxlan=True)),
        Case("VXLAN by hand, services", by_hand(stack, "q", vxlan=True, services=True), "VXLAN by hand"),
        Case("vxlan", way, "VXLAN by hand", (0.95, None)),
        Case("vxlan, by ClusterIP", way.by_service(), "vxlan"),
    ]


PARTS: dict[str, Callable[[ExitStack], list[Case]]] = {
    "node": _same_node,
    "direct": _direct,
    "vxlan": _vxlan,
}


def _measure(args: argparse.Namespace, cases: Sequence[Case], tool: Path, stack: ExitStack) -> None:
    """Measure every case once a round, forwards and backwards by turns, and print the tables."""
    for client in {case.way.client for case in cases}:
        netns.run(client, _forget_peers)
    for server in {case.way.server for case in cases}:
        stack.enter_context(_serving(server, tool))
    for case in cases:
        until(partial(_reached, case.way, tool), f"{case.name}: nobody answered")
    rate = min(_streams(case.way, 1, WARM_UP)["one"] for case in cases)
    amount = int(rate * 1e9 / 8 * args.seconds)
    found: Found = {case.name: {} for case in cases}
    for number in range(args.rounds):
        for case in reversed(cases) if number % 2 else cases:
            for figures in _figures(case.way, amount, tool, args.seconds):
                for name, value in figures.items():
                    found[case.name].setdefault(name, []).append(value)
    rounds = f"{args.rounds} rounds, of {amount / 1e6:.0f} MB or {args.seconds:g} s each"
    show(f"Throughput, {rounds}", THROUGHPUT, [_throughput_row(case, found) for case in cases])
    show(f"Requests of one byte, {rounds}", LATENCY, [_latency_row(case, found) for case in cases])


@contextmanager
def _serving(namespace: str, tool: Path) -> Iterator[None]:
    """Answer in a namespace on all ports."""
    answer = ["taskset", "-c", PROCESSOR, str(tool), "serve"]
    commands = (
        ["iperf3", "-s", "-p", str(STREAM)],
        *([*answer, str(port)] for port in (REQUEST, SERVICE_REQUEST)),
    )
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            start = partial(subprocess.Popen, command, stdout=subprocess.DEVNULL)
            processes.append(netns.run(namespace, start))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _forget_peers() -> None:
    """Start every connection alike: the kernel would keep what congestion it met for the next one."""
    Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")


def _run(way: Way, *command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    work = partial(subprocess.run, words, capture_output=True, text=True, check=False)
    return netns.run(way.client, work)


def _pingpong(way: Way, tool: Path, what: str, seconds: float) -> subprocess.CompletedProcess[str]:
    words = (tool, what, way.address, REQUEST, seconds)
    return _run(way, "taskset", "-c", PROCESSOR, *words)


def _reached(way: Way, tool: Path) -> bool:
    return not _pingpong(way, tool, "connect", 0).returncode and not _iperf3(way, 1, 1).returncode


def _figures(way: Way, amount: int, tool: Path, seconds: float) -> Iterator[dict[str, float]]:
    """Measure all once."""
    yield _streams(way, 1, amount)
    yield _streams(way, MANY, amount)
    for what in ("request", "connect"):
        done = _pingpong(way, tool, what, seconds)
        if done.returncode:
            raise SystemExit(f"bench: {done.stderr.strip() or what}")
        yield {f"{what} {key}": value for key, value in json.loads(done.stdout).items()}


def _streams(way: Way, streams: int, amount: int) -> dict[str, float]:
    """Return Gbit a second that arrived, and Gbit for each second that a processor worked at both ends."""
    for _ in range(TRIES):
        done = _iperf3(way, streams, amount)
        if not done.returncode:
            break
        time.sleep(TRY_SECONDS)  # the server is not through with the client before
    else:
        raise SystemExit(f"bench: iperf3 to {way.address}: {done.stdout}{done.stderr}")
    end = json.loads(done.stdout)["end"]
    received, used = end["sum_received"], end["cpu_utilization_percent"]
    rate = received["bits_per_second"] / 1e9
    name = "many" if streams > 1 else "one"
    return {name: rate, f"{name} per cpu": rate / (used["host_total"] + used["remote_total"]) * 100}


def _iperf3(way: Way, streams: int, amount: int) -> subprocess.CompletedProcess[str]:
    """Send so many bytes. Not by a congestion control that paces itself: it measures its own guess."""
    pinned = ("-A", f"{PROCESSOR},{PROCESSOR}") if streams == 1 else ("-P", streams)
    return _run(way, "iperf3", "-J", "-C", "cubic", "-c", way.address, "-p", STREAM, "-n", amount, *pinned)


def _ratio(case: Case, found: Found, key: str) -> str:
    """Return the median of the turns' ratios to the case beside: what is next to each other in time."""
    if not case.beside:
        return ""
    pairs = zip(found[case.name][key], found[case.beside][key], strict=True)
    return f"{p50([mine / theirs for mine, theirs in pairs]):.2f}"


def _throughput_row(case: Case, found: Found) -> tuple[str, ...]:
    mine, target = found[case.name], _limit(">=", case.targets[0])
    row = [_words(case)]
    for key in ("one", "many"):
        row += [f"{p50(mine[key]):.1f}", _ratio(case, found, key), target]
    return (*row, f"{p50(mine['one per cpu']):.1f}", _ratio(case, found, "one per cpu"))


def _latency_row(case: Case, found: Found) -> tuple[str, ...]:
    mine = found[case.name]
    return (
        _words(case),
        f"{1e6 / p50(mine['request mean']):.0f}",
        *(f"{p50(mine[f'request {key}']):.1f}" for key in ("p50", "p99")),
        *(_ratio(case, found, f"request {key}") for key in ("p50", "mean")),
        _limit("<=", case.targets[1]),
        f"{1e6 / p50(mine['connect mean']):.0f}",
        f"{p50(mine['connect p50']):.1f}",
        _ratio(case, found, "connect p50"),
    )


def _words(case: Case) -> str:
    return f"{case.name} (to {case.beside})" if case.beside else case.name


def _limit(sign: str, target: float | None) -> str:
    return "" if target is None else f"{sign} {target:g}"
