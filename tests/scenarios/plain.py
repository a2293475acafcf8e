"""A lab without the sample application: some pods, and what the kernel of a node has of the network."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lab import controller, network
from lab.runtime import Pod, PodSpec
from lab.state import Lab
from lab.topology import Topology
from netlink import netns

PORT = 80
SHOWN = """
ip -4 route show table all proto 112
ip -6 route show table all proto 112
ip rule show
ip -6 rule show
ip neigh show nud permanent
for device in pwvxlan4 pwvxlan6; do
    ip -6 neigh show nud permanent dev $device
    bridge fdb show dev $device
    ip -o address show dev $device scope global | sed 's/^[0-9]*: //'
    ip -o -details link show $device | sed 's/^[0-9]*: //'
done
nft --stateless list table ip podwire_tunnels
nft --stateless list table ip6 podwire_tunnels
"""


@contextmanager
def running(plan: Topology) -> Iterator[tuple[Lab, dict[str, Pod]]]:
    """Have a lab with an echo server in a pod on each node, which has the node's name."""
    network.remove(plan.name)
    lab = network.up(plan)
    try:
        pods = controller.run(lab, [PodSpec(node.name, node.name, ports=(PORT,)) for node in plan.nodes])
        yield lab, {pod.spec.name: pod for pod in pods}
    finally:
        network.remove(plan.name)


def shell(namespace: str, script: str) -> str:
    """Run a script in a namespace and return what it prints; what is not there is no error."""

    def run() -> str:
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        return done.stdout

    return netns.run(namespace, run)


def held(namespace: str) -> list[str]:
    """Return what the kernel has of the network between nodes: routes, rules, neighbours, tunnels, tables."""
    return sorted(" ".join(line.split()) for line in shell(namespace, SHOWN).splitlines())


def difference(before: list[str], now: list[str]) -> str:
    """Return what is gone and what has come, line by line."""
    gone = [f"- {line}" for line in before if line not in now]
    return "\n".join(["", *gone, *(f"+ {line}" for line in now if line not in before)])


def reaches(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    pace, deadline = threading.Event(), time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        pace.wait(0.02)
    return reached
