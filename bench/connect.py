"""How long a TCP connect through a cluster address takes, beside one to the endpoint itself."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.figures import p50, quantile, show
from bench.layout import pairs
from bench.proxy import HERE, RANGES
from cni.wiring import HOST_PREFIX, Mode, PodAddress, PodLink, attach, mac_of
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from proxy.frontends import frontends
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import TABLE
from proxy.table import FrontendTable

CLIENT, SERVER, PORT = "10.128.0.10", "10.128.0.11", 8080
CLUSTER_IP = "10.95.0.1"
TARGET = 1.12
IP_LOCAL_PORT_RANGE = 51  # linux/in.h, Linux 6.3
PORTS = ((32768, 46883), (46884, 60999))
"""Source ports of direct connects and of the others: connection tracking remembers a port for seconds,
and one that both used would be translated to another for the second."""
WARM_UP = 100
ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER: a close that resets, so that no port waits for two minutes."""


def add_parser(commands: Any) -> None:
    """Add `connect` to the bench's command line."""
    parser = commands.add_parser("connect", help="TCP connects through a cluster address and without")
    parser.add_argument("--services", type=int, default=10_000, help="in the kernel (default: %(default)s)")
    parser.add_argument("--connects", type=int, default=5000, help="of each sort (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Connect from one pod to another on the same node, directly and by a service, by turns."""
    names = [f"pwbench-{os.getpid()}-{who}" for who in ("node", "client", "server")]
    with contextlib.ExitStack() as stack:
        for name in names:
            netns.create(name)
            stack.callback(netns.delete, name)
        node, client, server = names
        netns.run(node, _build, client, server)
        netns.run(node, _program, args.services)
        stack.enter_context(_serving(server))
        direct, service = netns.run(client, _measure, args.connects)
    rows = [
        (what, f"{p50(samples) * 1e6:.1f}", f"{quantile(samples, 0.9) * 1e6:.1f}", ratio)
        for what, samples, ratio in (
            ("to the endpoint", direct, ""),
            ("by the cluster address", service, f"{p50(service) / p50(direct):.3f}"),
        )
    ]
    columns = ("connect", "p50 us", "p90 us", "ratio")
    show(
        f"{args.services} services in the kernel, {args.connects} connects each; target {TARGET}",
        columns,
        rows,
    )


def _build(client: str, server: str) -> None:
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")
    for number, (name, address) in enumerate(((client, CLIENT), (server, SERVER))):
        ends = (PodAddress(f"{address}/32", address, Family.V4, Family.V4.gateway),)
        host = f"{HOST_PREFIX}{number}"
        link = PodLink(Mode.ROUTED, "eth0", host, mac_of(host), mac_of(address), 1500, ends)
        attach(link, str(netns.path(name)))


def _program(services: int) -> None:
    """Load the services, and one that leads to the server."""
    owner = ObjectName("bench", "server")
    service = Service(owner, (CLUSTER_IP,), (ServicePort("", Protocol.TCP, PORT),))
    ports, endpoints = (EndpointPort("", Protocol.TCP, PORT),), (Endpoint(SERVER, HERE.node),)
    layout = [*pairs(services, 10), (service, EndpointSlice(owner, owner, Family.V4, ports, endpoints))]
    table = FrontendTable()
    for some, found in layout:
        table.replace(some.name, frontends(some, (found,), HERE))
    with Nft(Family.V4, TABLE) as nft:
        Dataplane(nft).load(table, RANGES)


@contextlib.contextmanager
def _serving(namespace: str) -> Iterator[None]:
    """Accept and close, in a process of its own."""
    listener = netns.run(namespace, partial(socket.create_server, (SERVER, PORT), backlog=1024))
    process = multiprocessing.get_context("fork").Process(target=_accept, args=(listener,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
        listener.close()


def _accept(listener: socket.socket) -> None:
    while True:
        listener.accept()[0].close()


def _measure(connects: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each connect, direct ones and those by the service; who is first alternates."""
    found: tuple[list[float], list[float]] = ([], [])
    sorts = list(zip((SERVER, CLUSTER_IP), PORTS, found, strict=True))
    for turn in range(WARM_UP + connects):
        for address, ports, samples in sorts if turn % 2 else reversed(sorts):
            samples.append(_connect(address, ports))
    return found[0][WARM_UP:], found[1][WARM_UP:]


def _connect(address: str, ports: tuple[int, int]) -> float:
    """Return how many seconds a connect takes."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        client.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", *ports))
        start = time.perf_counter()
        client.connect((address, PORT))
        return time.perf_counter() - start
