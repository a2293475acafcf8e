"""Load balancers' stand-ins on the lab's router: both send only to nodes whose health check says 200.

    client ── router ─┬─ node1:node port    200 at its healthCheckNodePort: it has endpoints
                      └─ node2:node port    503: it has none, and policy Local would drop what came

- `Balancer` translates the destination with nftables, as a network load balancer does: servers see the
  client's address, and the router, being on the way back, undoes the translation.
- `proxying` runs HAProxy, as an application load balancer does: servers see the router's address, and the
  client's in X-Forwarded-For.

Source: Kubernetes documentation, "Create an External Load Balancer", and Service `healthCheckNodePort`.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from lab import probe, process
from lab.state import Lab, write
from lab.topology import LabError
from netlink import netns
from netlink.family import Family, with_port

INTERVAL_SECONDS = 0.2
CHECK_SECONDS = 0.2
START_SECONDS = 5.0
TABLE = "balancer"


@dataclass(frozen=True, slots=True)
class Front:
    """What is balanced: connections to `address`:`port` go to `node_port` of the nodes."""

    family: Family
    address: str
    port: int
    nodes: tuple[tuple[str, str], ...]  # name and address
    node_port: int
    health_port: int


def rules(front: Front, targets: Sequence[str]) -> str:
    """Return the nft commands that make the router choose among the nodes of these names, in turn.

    The chain is emptied, never removed: a transaction without any NAT chain would stop translating what is
    established. With no target the packets are dropped.
    """
    table, addresses = f"{front.family.keyword} {TABLE}", dict(front.nodes)
    choice = ", ".join(f"{i} : {addresses[name]}" for i, name in enumerate(targets))
    port = front.node_port
    verdict = f"dnat to numgen inc mod {len(targets)} map {{ {choice} }} : {port}" if targets else "drop"
    match = f"{front.family.keyword} daddr {front.address} tcp dport {front.port}"
    return "\n".join(
        [
            f"add table {table}",
            f"add chain {table} prerouting {{ type nat hook prerouting priority dstnat; }}",
            f"flush chain {table} prerouting",
            f'add rule {table} prerouting {match} {verdict} comment "the nodes whose health check says 200"',
            "",
        ]
    )


class Balancer:
    """A balancer in a namespace: asks every node each INTERVAL_SECONDS, and rewrites its choice on a change.

    Use it in a `with` block. It leaves nothing behind; what went wrong in its thread is raised at the end.
    """

    def __init__(self, namespace: str, front: Front) -> None:
        self.front = front
        self._namespace = namespace
        self._targets: tuple[str, ...] = ()
        self._rounds = 0
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "balancer")
        self._work: Future[None] | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The nodes that new connections are sent to."""
        return self._targets

    def __enter__(self) -> Balancer:
        self._work = self._pool.submit(netns.run, self._namespace, self._follow)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()
        if self._work is not None and error is None:
            self._work.result()

    def wait_for(self, targets: Sequence[str], seconds: float) -> bool:
        """Wait until exactly these nodes are the targets; False when that takes too long."""
        with self._news:
            return self._news.wait_for(lambda: self._targets == tuple(targets), seconds)

    def wait_round(self, seconds: float) -> bool:
        """Wait until all nodes were asked once more, from now on, and the choice is made."""
        with self._news:
            after = self._rounds + 2  # the one that is under way may have asked already
            return self._news.wait_for(lambda: self._rounds >= after, seconds)

    def _follow(self) -> None:
        """Keep the choice as the health checks say, until stopped. Runs in the namespace."""
        loaded: tuple[str, ...] | None = None
        try:
            while not self._stop.is_set():
                targets = tuple(name for name, address in self.front.nodes if self._healthy(address))
                if targets != loaded:
                    load(rules(self.front, targets))
                    loaded = targets
                with self._news:
                    self._targets, self._rounds = targets, self._rounds + 1
                    self._news.notify_all()
                self._stop.wait(INTERVAL_SECONDS)
        finally:
            table = f"{self.front.family.keyword} {TABLE}"
            load(f"add table {table}\ndelete table {table}\n")

    def _healthy(self, address: str) -> bool:
        return probe.status(address, self.front.health_port, "/healthz", CHECK_SECONDS)[0] == 200


def haproxy_config(front: Front) -> str:
    """Return the configuration of a proxying balancer; at `/targets` it says how many nodes it uses."""
    servers = [f"    server {name} {with_port(address, front.node_port)}" for name, address in front.nodes]
    check = f"check port {front.health_port} inter {round(INTERVAL_SECONDS * 1000)}ms fall 1 rise 1"
    return "\n".join(
        [
            "defaults",
            "    mode http",
            "    timeout connect 2s",
            "    timeout client 10s",
            "    timeout server 10s",
            "frontend front",
            f"    bind {with_port(front.address, front.port)}",
            "    http-request return status 200 content-type text/plain lf-string %[nbsrv(nodes)]"
            " if { path /targets }",
            "    default_backend nodes",
            "backend nodes",
            "    balance roundrobin",
            "    option forwardfor",
            "    option httpchk GET /healthz",
            "    http-check expect status 200",
            f"    default-server {check}",
            *servers,
            "",
        ]
    )


@contextmanager
def proxying(lab: Lab, front: Front) -> Iterator[Callable[[], int]]:
    """Run HAProxy on the lab's router; yield a function that returns how many nodes it uses at the moment.

    Raises LabError when HAProxy is not installed, or does not serve within START_SECONDS.
    """
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        raise LabError("the proxying balancer needs HAProxy: `apt-get install haproxy`")
    pid_file = lab.root / "hosts" / "haproxy.pid"
    config, log = pid_file.with_suffix(".cfg"), pid_file.with_suffix(".log")
    write(config, haproxy_config(front))

    def targets() -> int:
        where = front.address, front.port
        _, body = netns.run(lab.plan.router, probe.status, *where, "/targets", CHECK_SECONDS)
        return int(body) if body.isdigit() else -1

    try:
        server = process.start(lab.plan.router, [program, "-db", "-f", str(config)], pid_file, log)
        deadline = time.monotonic() + START_SECONDS
        while targets() < 0:
            if not server.alive or time.monotonic() > deadline:
                raise LabError(f"HAProxy does not serve: {log.read_text(errors='replace')}")
            time.sleep(0.02)
        yield targets
    finally:
        process.stop([pid_file])


def load(commands: str) -> None:
    """Run nft commands in the namespace of this thread, as one transaction; LabError when refused."""
    done = subprocess.run(["nft", "-f", "-"], input=commands, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"the balancer's rules are refused: {done.stderr.strip()}")
