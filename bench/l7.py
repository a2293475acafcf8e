"""Requests by the L7 proxy, beside plain balancing, a bare HAProxy and a bare nginx; and many services in it.

wrk asks from a pod. The endpoints are two pods of the same node, one process each, and the same for all. What
is compared is measured by turns, and a ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from ipaddress import IPv4Address
from pathlib import Path
from types import FrameType

from bench import servers
from bench.figures import ms, p50, quantile, show
from bench.plugins import resident
from bench.servers import PORT, SEEN, Tools, running
from bench.sites import until
from lab import network, process, runtime, state
from lab.runtime import PodSpec
from lab.state import Json, Lab
from lab.topology import plan
from netlink import netns
from netlink.family import Family

PLAIN_IP, PROXIED_IP = "10.96.200.1", "10.96.200.2"
CHANGED_PLAIN_IP, CHANGED_IP = "10.96.200.3", "10.96.200.4"
FIRST_IP, MOST_SERVICES = int(IPv4Address("10.96.0.1")), 50_000
HAPROXY_PORT, NGINX_PORT = 8001, 8002
ASKED = json.dumps({"load-balancing-mode": "round-robin", "flags": {"x-forwarded-for": True}})
RATE_TARGET, P99_TARGET = ">= 0.95", "<= 1.1"
SERVED_TARGET = "<= 2"
ANSWER_SECONDS, CHANGE_SECONDS = 0.1, 5.0
SAMPLE, IN_A_ROW = 10, 4
SETTINGS = ("net/ipv4/tcp_tw_reuse", "net/netfilter/nf_conntrack_tcp_timeout_time_wait")
PLAIN, PROXIED, HAPROXY, NGINX = "plain", "l7", "haproxy", "nginx"
NAMES = {PLAIN: "plain ClusterIP", PROXIED: "podwire L7", HAPROXY: "bare HAProxy", NGINX: "bare nginx"}
REQUESTS = (
    "connections, bytes",
    "by",
    "requests/s",
    "p50 us",
    "p99 us",
    "requests/s ratio",
    "target",
    "p99 ratio",
    "target",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Site:
    """A node with a client pod, of that namespace and address, and with endpoints."""

    lab: Lab
    client: str
    address: str
    servers: tuple[str, ...]
    tools: Tools

    @property
    def node(self) -> str:
        """The node's namespace."""
        return self.lab.plan.nodes[0].namespace


@dataclass(frozen=True, slots=True)
class Series:
    """What is asked for: so many connections at a time, with `close` new ones for each request."""

    connections: int
    body: str
    close: bool = False

    @property
    def title(self) -> str:
        """How a table names it."""
        words = f"{self.connections}, {servers.SIZES[self.body]}"
        return f"{words}, one request each" if self.close else words


SERIES = (
    Series(1, "small"),
    Series(1, "large"),
    Series(64, "small"),
    Series(64, "large"),
    Series(64, "small", close=True),
)
Found = dict[tuple[Series, str], list[dict[str, float]]]
"""What the turns have found, by series and way."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `l7` to the bench's command line."""
    parser = commands.add_parser("l7", help="requests by the L7 proxy, and many services in it")
    for name, default, words in (
        ("--seconds", 1, "that a measurement takes"),
        ("--rounds", 6, "of all by turns; 0 for none"),
        ("--services", 1000, "that come to ask for the proxy at once; 0 for none"),
        ("--changes", 50, "of an endpoint among these"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{words} (default: %(default)s)")
    parser.add_argument("--by", choices=NAMES, nargs="+", default=[*NAMES], help="these alone (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure requests, then services."""
    if args.rounds < 0 or not 1 <= args.seconds <= 60:
        raise SystemExit("bench: --rounds must be 0 or more, --seconds 1 to 60")
    if args.changes < 1 or not 0 <= args.services <= MOST_SERVICES:
        raise SystemExit(f"bench: --changes must be 1 or more, --services 0 to {MOST_SERVICES}")
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            site = _site(stack, servers.tools(scratch))
            if args.rounds:
                _requests(args, site)
            if args.services:
                _services(args, site)
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(number: int, _: FrameType | None) -> None:
    """End in a way that takes down what was built."""
    sys.exit(128 + number)


def _site(stack: ExitStack, tools: Tools) -> Site:
    """Make a node, its daemon and pods, and the two services that requests go to."""
    topology = plan(f"l7x{os.getpid()}", nodes=1, far=0)
    stack.callback(network.remove, topology.name)
    lab = network.up(topology)
    stack.callback(_end_daemon, lab)
    node = topology.nodes[0]
    client, *pods = (runtime.add(lab, PodSpec(name, node.name)) for name in ("client", "first", "second"))
    for namespace in (client.netns, node.namespace):
        netns.run(namespace, _forget_connections)
    for pod in pods:
        stack.enter_context(running(pod.netns, servers.endpoint(tools)))
    addresses = tuple(pod.address(Family.V4) for pod in pods)
    site = Site(lab, client.netns, client.address(Family.V4), addresses, tools)
    for address in addresses:
        until(partial(_is_seen, site, f"{address}:{PORT}"), f"{address}: no endpoint answered")
    plain = _service("plain", PLAIN_IP, addresses, proxied=False)
    _write(site, "measured", (*plain, *_service("proxied", PROXIED_IP, addresses)))
    return site


def _forget_connections() -> None:
    """Keep no closed connections for minutes: a round would meet those of the rounds before it."""
    for setting in SETTINGS:
        path = Path("/proc/sys") / setting
        if path.exists():
            path.write_text("1")


def _end_daemon(lab: Lab) -> None:
    """End the daemon, then the HAProxy that it leaves running, which would keep the namespace."""
    node = lab.plan.nodes[0]
    process.stop([lab.node_dir(node.name) / "daemon.pid"])
    for pid in _haproxies(node.namespace):
        os.kill(pid, signal.SIGKILL)


def _service(name: str, address: str, endpoints: Sequence[str], *, proxied: bool = True) -> tuple[Json, Json]:
    """Return a service and its slice as Kubernetes objects."""
    metadata: Json = {"name": name, "namespace": "bench"}
    piece = metadata | {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}}
    asking = {"annotations": {"podwire.io/proxy": ASKED}} if proxied else {}
    return (
        {
            "kind": "Service",
            "metadata": metadata | asking,
            "spec": {"clusterIP": address, "ports": [{"name": "http", "port": 80}]},
        },
        {
            "kind": "EndpointSlice",
            "metadata": piece,
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": PORT}],
            "endpoints": [{"addresses": [e], "conditions": {"ready": True}} for e in endpoints],
        },
    )


def _write(site: Site, name: str, documents: Sequence[Json]) -> None:
    text = json.dumps({"kind": "List", "apiVersion": "v1", "items": documents})
    state.write(site.lab.manifests / f"{name}.json", text)


def _seen(site: Site, address: str) -> tuple[str, str]:
    """Ask at an address from the client; return which endpoint answers and the client that it is told of.

    Both are "" when nobody answers, the client also where nobody forwards.
    """
    return netns.run(site.client, _answer, address)


def _answer(address: str) -> tuple[str, str]:
    connection = HTTPConnection(address, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", SEEN)
        answer = connection.getresponse()
        endpoint, _, client = answer.read().decode().partition(" ")
    except (OSError, HTTPException):
        return "", ""
    finally:
        connection.close()
    return (endpoint, client.strip()) if answer.status == 200 else ("", "")


def _is_seen(site: Site, address: str) -> bool:
    return bool(_seen(site, address)[0])


def _is_forwarded(site: Site, address: str) -> bool:
    return _seen(site, address)[1] == site.address


def _requests(args: argparse.Namespace, site: Site) -> None:
    """Measure every way once a round, forwards and backwards by turns, and print the table."""
    with ExitStack() as stack:
        ways = {PLAIN: PLAIN_IP, PROXIED: PROXIED_IP, **_bare(stack, site)}
        ways = {name: address for name, address in ways.items() if name in args.by}
        for name, address in ways.items():
            is_there = partial(_is_seen if name == PLAIN else _is_forwarded, site, address)
            until(is_there, f"{NAMES[name]}: no request came through")
        found: Found = {(series, name): [] for series in SERIES for name in ways}
        for number in range(args.rounds):
            for series in SERIES:
                for name in reversed(ways) if number % 2 else ways:
                    found[series, name].append(_measured(site, ways[name], series, args.seconds))
    rows = [_row(series, name, found) for series, name in found]
    rounds = f"{args.rounds} rounds of {args.seconds} s each, ratios to {NAMES[HAPROXY]}"
    show(f"Requests to two endpoints, {rounds}", REQUESTS, rows)


def _bare(stack: ExitStack, site: Site) -> dict[str, str]:
    """Start the proxies to compare with on the node; return where they listen."""
    address = site.lab.plan.nodes[0].address(Family.V4)
    targets = [f"{server}:{PORT}" for server in site.servers]
    ways = {HAPROXY: f"{address}:{HAPROXY_PORT}"}
    stack.enter_context(running(site.node, servers.haproxy(site.tools, ways[HAPROXY], targets)))
    if site.tools.nginx:
        ways[NGINX] = f"{address}:{NGINX_PORT}"
        stack.enter_context(running(site.node, servers.nginx(site.tools, ways[NGINX], targets)))
    return ways


def _measured(site: Site, address: str, series: Series, seconds: int) -> dict[str, float]:
    options = ["-d", f"{seconds}s", *(["-H", "Connection: close"] if series.close else [])]
    url = f"http://{address}/{series.body}"
    return servers.ask(site.tools, site.client, url, series.connections, *options)


def _row(series: Series, name: str, found: Found) -> tuple[str, ...]:
    turns, beside = found[series, name], found.get((series, HAPROXY), [])

    def ratio(key: str) -> str:
        if name == HAPROXY or not beside:
            return ""
        return f"{p50([mine[key] / its[key] for mine, its in zip(turns, beside, strict=True)]):.2f}"

    targets = (RATE_TARGET, P99_TARGET) if name == PROXIED else ("", "")
    return (
        series.title,
        NAMES[name],
        *(f"{p50([turn[key] for turn in turns]):.0f}" for key in ("rate", "p50", "p99")),
        ratio("rate"),
        targets[0],
        ratio("p99"),
        targets[1],
        f"{sum(turn['failed'] for turn in turns):.0f}",
    )


def _services(args: argparse.Namespace, site: Site) -> None:
    """Have many services proxied, then change an endpoint of one more; print how long, and the memory."""
    until(partial(_is_forwarded, site, PROXIED_IP), f"{NAMES[PROXIED]}: no request came through")
    before = _memory(site)
    addresses = [str(IPv4Address(FIRST_IP + number)) for number in range(args.services)]
    pairs = (_service(f"s{number}", address, site.servers) for number, address in enumerate(addresses))
    _write(site, "many", [document for pair in pairs for document in pair])
    began = time.monotonic()
    # The last and some in between: to ask all of them each time would take longer than what is measured.
    balanced, served = _served(site, addresses[:: -max(1, args.services // SAMPLE)])
    if missing := [address for address in addresses if not _is_forwarded(site, address)]:
        raise SystemExit(f"bench: {len(missing)} services do not come by the proxy: {missing[0]}")
    memory = _memory(site)
    changes = {False: _changes(site, args.changes, proxied=False), True: _changes(site, args.changes)}
    count = f"{args.services} services with two endpoints each"
    columns: tuple[str, ...] = ("from the manifest's last byte", "s", "target")
    rows = [("balanced by the kernel", f"{balanced - began:.2f}", "")]
    rows.append(("served by the proxy", f"{served - began:.2f}", SERVED_TARGET))
    show(f"{count} ask for the proxy", columns, rows)
    columns = ("services", "HAProxy's processes", "resident memory, MB", "the daemon's, MB")
    show("Memory", columns, [("1", *before), (f"{args.services + 1}", *memory)])
    columns = (f"{args.changes} changes", "p50", "p90", "max")
    rows = [
        (NAMES[PROXIED if proxied else PLAIN], ms(p50(took)), ms(quantile(took, 0.9)), ms(max(took)))
        for proxied, took in changes.items()
    ]
    show(
        "An endpoint replaced, from the manifest's last byte until requests go there only, ms", columns, rows
    )


def _served(site: Site, addresses: Sequence[str]) -> tuple[float, float]:
    """Return when all of these were balanced, and when all came by the proxy, on the monotonic clock."""
    silent, plain, balanced = set(addresses), set(addresses), 0.0

    def all_served() -> bool:
        nonlocal balanced
        for address in tuple(plain):
            endpoint, client = _seen(site, address)
            silent.difference_update([address] if endpoint else [])
            plain.difference_update([address] if client else [])
        balanced = balanced or (0.0 if silent else time.monotonic())
        return not plain

    until(all_served, "not all services came by the proxy")
    return balanced, time.monotonic()


def _changes(site: Site, changes: int, *, proxied: bool = True) -> list[float]:
    """Replace a service's only endpoint again and again; return how long each time, in ms."""
    samples = []
    name, address = ("changed", CHANGED_IP) if proxied else ("changed-plain", CHANGED_PLAIN_IP)
    service, _ = _service(name, address, (), proxied=proxied)
    _write(site, name, [service])
    for number in range(changes + 1):
        server = site.servers[number % len(site.servers)]
        _, piece = _service(name, address, [server])
        _write(site, f"{name}-endpoints", [piece])
        began = time.perf_counter()
        at = _moved(site, address, (server, site.address if proxied else ""), began + CHANGE_SECONDS)
        samples.append((at - began) * 1e3)
    return samples[1:]  # the first made the service


def _moved(site: Site, address: str, wanted: tuple[str, str], deadline: float) -> float:
    """Return when requests began to go there only: while old and new both get some, they take turns."""
    at, times = 0.0, 0
    while times < IN_A_ROW:
        if _seen(site, address) == wanted:
            at, times = at if times else time.perf_counter(), times + 1
        else:
            times = 0
        if time.perf_counter() > deadline:
            raise SystemExit(f"bench: requests to {address} did not move to {wanted[0]} in time")
    return at


def _memory(site: Site) -> tuple[str, str, str]:
    """Return the number of HAProxy's processes, their memory together, and the daemon's."""
    node = site.lab.plan.nodes[0].name
    daemon, found = network.daemon(site.lab, node), _haproxies(site.node)
    if daemon is None:
        raise SystemExit(f"bench: the daemon has ended; {site.lab.log(node).read_text()[-2000:]}")
    return str(len(found)), f"{sum(map(resident, found)):.1f}", f"{resident(daemon.pid):.1f}"


def _haproxies(namespace: str) -> list[int]:
    """Return the processes of HAProxy in a namespace; without the bare one they are the daemon's."""
    home, found = netns.path(namespace), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text() == "haproxy\n" and (folder / "ns/net").samefile(home):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found
