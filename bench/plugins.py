"""Execute chains of CNI plugins as a runtime does, and tell what that costs."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netlink import netns

GO_PLUGINS = Path("/usr/lib/cni")
CNI_VERSION = "1.0.0"
CONTAINER_PORT = 8080
MBIT = 1_000_000
CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h: time on a processor, in nanoseconds

Json = dict[str, Any]


@dataclass(slots=True)
class Pod:
    """A pod's namespace, a number for its host ports, and what ADD said of it."""

    namespace: str
    number: int
    result: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A binary with its part of the conflist; it is told of the pod's wishes in `capabilities`."""

    binary: Path
    config: Json
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """The plugins of a conflist, in its order; host ports are counted from `first_port`."""

    name: str
    plugins: tuple[Plugin, ...]
    first_port: int = 0

    def host_port(self, pod: Pod) -> int:
        """Return the first of the pod's two host ports."""
        return self.first_port + 2 * pod.number

    def execute(self, command: str, pod: Pod) -> None:
        """Execute each plugin for a pod: ADD in order, each with the result before it; DEL in reverse."""
        if command == "ADD":
            pod.result = {}
        for plugin in self.plugins if command == "ADD" else reversed(self.plugins):
            config = plugin.config | {"cniVersion": CNI_VERSION, "name": "bench"}
            if wishes := {key: self._wish(key, pod) for key in plugin.capabilities}:
                config["runtimeConfig"] = wishes
            if pod.result:
                config["prevResult"] = pod.result
            out = execute(plugin.binary, command, config, pod.namespace)
            if command == "ADD":
                pod.result = json.loads(out)

    def _wish(self, capability: str, pod: Pod) -> Any:
        first = self.host_port(pod)
        return {
            "portMappings": [
                {"hostPort": first + at, "containerPort": CONTAINER_PORT + at, "protocol": protocol}
                for at, protocol in enumerate(("tcp", "udp"))
            ],
            "bandwidth": {
                "ingressRate": 100 * MBIT,
                "ingressBurst": 8 * MBIT,
                "egressRate": 50 * MBIT,
                "egressBurst": 4 * MBIT,
            },
        }[capability]


def execute(binary: Path, command: str, config: Json, pod: str = "") -> bytes:
    """Execute a plugin once; return what it printed. What fails ends the benchmark."""
    env = {"CNI_COMMAND": command, "CNI_PATH": str(binary.parent), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    if pod:
        env |= {"CNI_CONTAINERID": pod, "CNI_NETNS": str(netns.path(pod)), "CNI_IFNAME": "eth0"}
    done = subprocess.run(
        [binary], input=json.dumps(config).encode(), env=env, capture_output=True, check=False
    )
    if done.returncode or b"without the daemon" in done.stderr:
        raise SystemExit(f"bench: {binary.name} {command}: {(done.stdout + done.stderr).decode()}")
    return done.stdout


def bridge(data_dir: str) -> Plugin:
    """Return the Go bridge plugin with host-local: as podwire's pods, its have a default route."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.250.0.0/16"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": data_dir,
    }
    config = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
    return Plugin(GO_PLUGINS / "bridge", config)


def go(name: str, capability: str, **config: Any) -> Plugin:
    """Return a Go plugin that has one capability."""
    return Plugin(
        GO_PLUGINS / name, config | {"type": name, "capabilities": {capability: True}}, (capability,)
    )


@contextmanager
def pods(count: int) -> Iterator[list[Pod]]:
    """Yield pods that have a network namespace and nothing in it."""
    made = [Pod(f"pwbench-{os.getpid()}-{number}", number) for number in range(count)]
    try:
        for pod in made:
            netns.create(pod.namespace)
        yield made
    finally:
        for pod in made:
            netns.delete(pod.namespace)


def children_cpu() -> float:
    """Return the processor time of all processes that ended and were waited for, and theirs, in ms."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def process_cpu(pid: int) -> float:
    """Return the processor time of a running process, ended threads included, in ms.

    Its CPU clock (clock_getcpuclockid(3)) counts nanoseconds; /proc/PID/stat has ticks of 10 ms.
    """
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED) * 1e3


def resident(pid: int) -> float:
    """Return a process's resident memory (VmRSS) in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def answers(node: str, address: str, port: int, pod: str) -> bool:
    """Whether a TCP host port of the node, asked there, leads into the pod."""

    def listening() -> socket.socket:
        return socket.create_server(("", CONTAINER_PORT))

    def connected() -> bool:
        try:
            with socket.create_connection((address, port), timeout=0.5):
                return True
        except OSError:
            return False

    with netns.run(pod, listening):
        return netns.run(node, connected)
