"""A node with a real daemon: its namespace, a pod's, a peer node's with the servers; and its command line."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.main import main
from cni.settings import Mode
from cni.wiring import PodAddress, PodLink, attach, mac_of
from lab.probe import wait_status
from netlink import netns
from netlink.family import Family
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl

DEADLINE = 5.0
NODE, PEER, POD = "192.168.50.11", "192.168.50.12", "10.244.1.10"
SERVERS = ("10.244.2.10", "10.244.2.11")
CLUSTER_IP, PORT = "10.96.0.1", 80
STATIC = 4

NODES = f"""
kind: Node
metadata: {{name: node1}}
spec: {{podCIDRs: [10.244.1.0/24]}}
status: {{addresses: [{{type: InternalIP, address: {NODE}}}]}}
---
kind: Node
metadata: {{name: node2}}
spec: {{podCIDRs: [10.244.2.0/24]}}
status: {{addresses: [{{type: InternalIP, address: {PEER}}}]}}
"""
SERVICE = """
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}
---
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [{server}], nodeName: node2}}]
"""


def service(name: str = "web", ip: str = CLUSTER_IP, server: str = SERVERS[0]) -> str:
    return SERVICE.format(name=name, ip=ip, server=server)


def wait_until(good: Callable[[], bool], what: str) -> None:
    """Wait for a condition, at most until the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not good():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
        time.sleep(0.01)


def podwire(*words: str) -> tuple[int, str, str]:
    """Run a command line here; return exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(words))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    return status, out.getvalue(), err.getvalue()


@dataclass(slots=True)
class World:
    """The namespaces, the folder, and the daemon while it runs; `options` are given to each of its starts.

    `source` is for the daemon's --source; "" is the folder of manifests. `environment` is beside ours.
    """

    node: str
    pod: str
    peer: str
    root: Path
    options: tuple[str, ...] = ()
    source: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    daemon: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def socket(self) -> Path:
        return self.root / "podwire.sock"

    @property
    def log(self) -> str:
        """What the last daemon has logged."""
        return (self.root / f"log{self.starts}").read_text()

    def write(self, name: str, text: str) -> None:
        """Write a manifest as an editor does."""
        temporary = self.manifests / f".{name}"
        temporary.write_text(text)
        temporary.rename(self.manifests / name)

    def command(self, *options: str) -> list[str]:
        words = [sys.executable, "-m", "cli.main", "daemon", "--node-name", "node1"]
        words += ["--source", self.source or str(self.manifests), "--state-dir", str(self.root / "state")]
        return [*words, "--socket", str(self.socket), *self.options, *options]

    def start(self) -> None:
        """Start the daemon and wait until it is healthy."""
        self.starts += 1
        with (self.root / f"log{self.starts}").open("wb") as log:
            environment = {**os.environ, **self.environment}
            self.daemon = netns.run(
                self.node, lambda: subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)
            )
        assert wait_status(self.node, 10256, "/healthz", time.monotonic() + 2 * DEADLINE), self.log

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the daemon; return its exit status."""
        assert self.daemon
        self.daemon.send_signal(number)
        status = self.daemon.wait(2 * DEADLINE)
        self.daemon = None
        return status

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Ask the daemon over HTTP, inside the node."""

        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
            with contextlib.closing(connection):
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()

        return netns.run(self.node, ask)

    def ask(self, command: str, *words: str) -> str:
        """Run a command of `podwire` against the daemon; return what it prints."""
        status, out, err = podwire(command, "--socket", str(self.socket), *words)
        assert (status, err) == (0, "")
        return out

    def json(self, command: str, *words: str) -> Any:
        """Return what a command prints with -o json."""
        return json.loads(self.ask(command, *words, "-o", "json"))

    def run(self, *command: str) -> str:
        """Run a program inside the node; return what it prints."""
        return netns.run(
            self.node, lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )

    def connect(self, address: str = CLUSTER_IP) -> str:
        """Connect from the pod to a port 80; return which server answered, or the error."""

        def work() -> str:
            try:
                with socket.create_connection((address, PORT), 0.5) as client:
                    client.settimeout(0.5)
                    return client.recv(100).decode().split(":")[0]
            except OSError as error:
                return type(error).__name__

        return netns.run(self.pod, work)


def build(make: Callable[[], str], root: Path) -> World:
    """Make the namespaces: node1 with a pod, and node2 beside it, which has the servers' addresses."""
    world = World(make(), make(), make(), root)
    world.manifests.mkdir()
    with netns.opened(world.peer) as peer:
        netns.run(world.node, _configure_node, peer)
    netns.run(world.peer, _configure_peer)
    gateway = PodAddress(f"{POD}/32", POD, Family.V4, Family.V4.gateway)
    link = PodLink(Mode.ROUTED, "eth0", "pod0", mac_of("host"), mac_of(POD), 1500, (gateway,))
    netns.run(world.node, attach, link, str(netns.path(world.pod)))
    return world


def _configure_node(peer: int) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1), veth_add(Veth("eth0", "eth0", peer_netns=peer)))
        rtnl.commit(address_add(socket.if_nametoindex("eth0"), f"{NODE}/24"))
        rtnl.commit(route_replace(Route("0.0.0.0/0", gateway=PEER, protocol=STATIC)))


def _configure_peer() -> None:
    with Rtnl() as rtnl:
        eth0 = socket.if_nametoindex("eth0")
        rtnl.commit(link_up(1), link_up(eth0), address_add(eth0, f"{PEER}/24"))
        rtnl.commit(*(address_add(1, f"{address}/32") for address in SERVERS))
        rtnl.commit(route_replace(Route("0.0.0.0/0", gateway=NODE, protocol=STATIC)))


@contextlib.contextmanager
def ended(world: World) -> Iterator[World]:
    """Make sure that no daemon is left."""
    try:
        yield world
    finally:
        if world.daemon:
            world.daemon.kill()
            world.daemon.wait()
