"""A node with the installed binary and a real daemon, a runtime that dies, and what a node holds of pods.

What podwire recorded is read from the file itself, not by podwire's own code.
"""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cni.install import install_binary
from netlink import netns
from netlink.errors import NetlinkError
from netlink.requests import link_delete
from netlink.rtnl import Rtnl
from tests.cni import world as kernel
from tests.cni.world import request_env, stdin
from tests.node.world import World

IFNAME = "eth0"
PATIENCE = 30.0
TRY_AGAIN = 11
SAMPLE = 0.05
KILLED = 0.08
"""How many executions of the binary are killed, and how many pods are forgotten by their runtime."""
FORGOTTEN = 0.04
WISHING = 0.25
"""How many pods want host ports and a bandwidth limit."""
FIRST_HOST_PORT = 20000
HELD = 3
"""Pods that a worker keeps when it deletes older ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an execution ended with; `code` is None when it was killed."""

    code: int | None
    out: dict[str, Any]
    err: str

    @classmethod
    def of(cls, process: subprocess.Popen[bytes], out: bytes, err: bytes) -> Answer:
        return cls(process.returncode, json.loads(out) if out else {}, err.decode())

    @property
    def error(self) -> int:
        """The specification's error code, 0 without."""
        return int(self.out.get("code", 0)) if self.code else 0

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(ip["address"].split("/")[0] for ip in self.out.get("ips", ()))


@dataclass(frozen=True, slots=True)
class Held:
    """Everything on a node that a pod can leave behind: two of these tell what was leaked."""

    links: frozenset[str]
    routes: frozenset[str]
    rules: dict[str, tuple[str, ...]]
    attachments: frozenset[str]
    addresses: int


@dataclass(frozen=True, slots=True)
class Site:
    """The node: namespaces, daemon, installed binary."""

    world: World
    make_namespace: Callable[[], str]

    @property
    def state_dir(self) -> Path:
        return self.world.root / "state"

    def install(self) -> None:
        directory = self.world.root / "bin"
        install_binary(directory, socket=str(self.world.socket), state_dir=str(self.state_dir))

    def start(self, command: str, container: str, namespace: str, args: str = "") -> subprocess.Popen[bytes]:
        """Start the binary; it waits for its configuration. Call it inside the node."""
        where = str(netns.path(namespace)) if namespace else ""
        env = request_env(command, container, where, IFNAME=IFNAME, ARGS=args)
        pipe = subprocess.PIPE
        binary = self.world.root / "bin/podwire"
        return subprocess.Popen([binary], env=env, stdin=pipe, stdout=pipe, stderr=pipe)

    def execute(
        self, command: str, pod: Pod | None = None, kill_after: float | None = None, **config: Any
    ) -> Answer:
        """Execute the binary inside the node, which the caller's thread must be in.

        It is killed when it runs for longer than `kill_after` seconds.
        """
        config = config | (pod.config if pod else {})
        with self.start(
            command, pod.container if pod else "", pod.namespace if pod else "", pod.args if pod else ""
        ) as process:
            try:
                out, err = process.communicate(stdin(**config), kill_after or PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                assert kill_after, f"{command}: no answer in {PATIENCE:.0f} s"
                return Answer(None, {}, "")
        return Answer.of(process, out, err)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the ledger's file."""
        with closing(sqlite3.connect(self.state_dir / "ledger.db", timeout=PATIENCE)) as db, db:
            return db.execute(sql).fetchall()

    def held(self) -> Held:
        """Return what there is now."""

        def here() -> tuple[frozenset[str], frozenset[str]]:
            links = frozenset(link.name for link in kernel.links())
            return links, frozenset(route.destination for route in kernel.routes())

        links, routes = netns.run(self.world.node, here)
        attachments = self.rows("SELECT container_id FROM attachment")
        addresses = self.rows("SELECT count(*) FROM address WHERE freed IS NULL")
        names = frozenset(row[0] for row in attachments)
        return Held(links, routes, self._rules(), names, addresses[0][0])

    def _rules(self) -> dict[str, tuple[str, ...]]:
        """Return the node's nftables tables, without counters, each as its lines in alphabetical order."""
        tables: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in self.world.run("nft", "-s", "list", "ruleset").splitlines():
            if line.startswith("table "):
                lines = tables.setdefault(line, [])
            lines.append(line.strip())
        return {name: tuple(sorted(found)) for name, found in tables.items()}

    def settle(self, count: int) -> None:
        """Wait until the daemon has taken back what was deleted, and `count` attachments are left."""
        self.wait_until(lambda: self.rows("SELECT count(*) FROM attachment") == [(count,)])

    def wait_until(self, good: Callable[[], bool], what: str = "") -> None:
        """Wait for a condition: as long as a busy machine may take to remove many interfaces."""
        deadline = time.monotonic() + PATIENCE
        while not good():
            states = self.rows("SELECT state, count(*) FROM attachment GROUP BY state")
            assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what} {states}"
            time.sleep(0.01)

    def assert_consistent(self, empty: Held, pods: set[str]) -> None:
        """Ledger and kernel hold these pods and nothing else; `empty` is what there is without pods."""
        self.settle(len(pods))
        rows = self.rows("SELECT container_id, state, host_ifname, addresses FROM attachment")
        addresses = [address for row in rows for address in row[3].split()]
        now = self.held()
        assert {row[:2] for row in rows} == {(pod, "attached") for pod in pods}
        assert len(set(addresses)) == len(addresses) == now.addresses
        assert now.links - empty.links == {row[2] for row in rows}
        assert now.routes - empty.routes == {f"{a}/{128 if ':' in a else 32}" for a in addresses}

    def reboot(self) -> None:
        """Let the node, its daemon stopped, be as after a reboot: no pods, no rules, another boot id."""
        names = self.rows("SELECT host_ifname, netns FROM attachment")
        for _, namespace in names:
            netns.delete(Path(namespace).name)
        netns.run(self.world.node, _remove, [name for name, _ in names])
        self.world.run("nft", "flush", "ruleset")
        self.rows("UPDATE attachment SET boot_id = 'of an earlier boot'")

    def memory(self) -> float:
        """Return the daemon's resident memory in MB."""
        assert self.world.daemon
        lines = Path(f"/proc/{self.world.daemon.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024

    def open_files(self) -> list[str]:
        """Return what the daemon has open."""
        assert self.world.daemon
        return [str(file.readlink()) for file in Path(f"/proc/{self.world.daemon.pid}/fd").iterdir()]


def _remove(names: list[str]) -> None:
    with Rtnl() as rtnl:
        for name in names:
            try:
                rtnl.commit(link_delete(name))
            except NetlinkError as error:
                assert error.gone, error


@dataclass(frozen=True, slots=True)
class Pod:
    """A container as a runtime knows it: its namespace, and what its plugin is told besides."""

    container: str
    namespace: str
    config: dict[str, Any] = field(default_factory=dict)
    args: str = ""


@dataclass(slots=True)
class Runtime:
    """What the workers that play the container runtime share.

    `lost` are the pods that one of them forgot; `holders` has the pod of each address that is in use,
    forgotten ones included.
    """

    site: Site
    pods: dict[str, Pod] = field(default_factory=dict)
    lost: dict[str, Pod] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    cycles: int = 0
    added: int = 0
    killed: int = 0
    progress: threading.Condition = field(default_factory=threading.Condition)

    def new(self, rng: random.Random, number: int) -> Pod:
        """Make a namespace for a pod; some want host ports and a limited bandwidth."""
        container = f"c{number}"
        wishes: dict[str, Any] = {}
        if rng.random() < WISHING:
            port = FIRST_HOST_PORT + number
            mappings = [
                {"hostPort": port, "containerPort": 80, "protocol": protocol} for protocol in ("tcp", "udp")
            ]
            limit = {"ingressRate": 10**8, "ingressBurst": 10**7, "egressRate": 10**8, "egressBurst": 10**7}
            wishes = {"runtimeConfig": {"portMappings": mappings, "bandwidth": limit}}
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=stress;K8S_POD_NAME={container}"
        pod = Pod(container, self.site.make_namespace(), wishes, args)
        with self.progress:
            self.pods[container] = pod
        return pod

    def add(self, pod: Pod, rng: random.Random) -> bool:
        """ADD; False when the pod has to be deleted, because the binary was killed or had an error."""
        answer = self.site.execute("ADD", pod, _death(rng))
        with self.progress:
            if answer.code is None:
                self.killed += 1
                return False
            if answer.code:
                if answer.error != TRY_AGAIN:
                    self.problems.append(f"ADD {pod.container}: {answer}")
                return False
            self.added += 1
            for address in answer.addresses:
                other = self.holders.setdefault(address, pod.container)
                if other != pod.container:
                    self.problems.append(f"{address} of {other} was given to {pod.container} too")
        if rng.random() < SAMPLE:
            inside = {a.split("/")[0] for a in netns.run(pod.namespace, kernel.addresses)}
            if not inside >= set(answer.addresses):
                self.problems.append(f"{pod.container} has {inside}, not {answer.addresses}")
        return True

    def delete(self, pod: Pod, rng: random.Random) -> None:
        """DEL until it succeeds, as a runtime does."""
        self._let_go(pod)
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self.site.execute("DEL", pod, _death(rng))
            if answer.code == 0:
                break
            with self.progress:
                self.killed += answer.code is None
                if answer.code and answer.error != TRY_AGAIN:
                    self.problems.append(f"DEL {pod.container}: {answer}")
            if time.monotonic() > deadline:
                self.problems.append(f"DEL {pod.container}: no success in {PATIENCE:.0f} s")
                break
        netns.delete(pod.namespace)
        with self.progress:
            del self.pods[pod.container]

    def forget(self, pod: Pod) -> None:
        """Die as a runtime: from now on nobody knows of the pod."""
        with self.progress:
            self.lost[pod.container] = self.pods.pop(pod.container)

    def work(self, worker: int, cycles: range, seed: str) -> None:
        """Add pods and delete them, in the node: one worker of several."""
        rng = random.Random(f"{seed}-{worker}-{cycles.start}")
        mine: list[Pod] = []
        for number in cycles:
            pod = self.new(rng, number)
            finished = self.add(pod, rng)
            if rng.random() < FORGOTTEN:
                self.forget(pod)
            elif finished:
                mine.append(pod)
            else:
                self.delete(pod, rng)
            if len(mine) > HELD:
                self.delete(mine.pop(rng.randrange(len(mine))), rng)
            with self.progress:
                self.cycles += 1
                self.progress.notify_all()
        for pod in mine[1:]:
            self.delete(pod, rng)

    def collect_garbage(self) -> None:
        """Do what a runtime that starts does: name the pods it knows. Nobody else may be at work."""
        for at, pod in enumerate(self.lost.values()):
            self._let_go(pod)
            if at % 2:
                netns.delete(pod.namespace)
        valid = [{"containerID": container, "ifname": IFNAME} for container in self.pods]
        config: dict[str, Any] = {"cni.dev/valid-attachments": valid}
        answer = self.site.execute("GC", **config)
        if answer.code:
            self.problems.append(f"GC: {answer}")
        for pod in self.lost.values():
            netns.delete(pod.namespace)
        self.lost.clear()

    def lose_all(self) -> None:
        """Know of no pod any more, as after a reboot."""
        self.pods.clear()
        self.lost.clear()
        self.holders.clear()

    def _let_go(self, pod: Pod) -> None:
        """Count the pod's addresses as free, which they are as soon as a DEL or GC begins."""
        with self.progress:
            for address in [a for a, holder in self.holders.items() if holder == pod.container]:
                del self.holders[address]


def _death(rng: random.Random) -> float | None:
    """Return after how many seconds an execution is killed, if it is; without a daemon it takes longer."""
    return rng.uniform(0.001, rng.choice((0.008, 0.02, 0.15))) if rng.random() < KILLED else None
