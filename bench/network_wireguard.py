"""Throughput between pods of two nodes: WireGuard beside VXLAN and plain routes, in one run.

    python -m bench.network_wireguard

Two namespaces are nodes, joined by a cable, each with a pod's namespace behind it; what is between them is
set by the daemon's own Network. It needs a kernel with WireGuard; that of an emulated machine will do, as
what counts is one beside the other. Encryption takes processors of both sides, which here are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import structs

from bench.figures import quantile, show
from netlink import netns
from netlink.rtnl import Rtnl
from node.network import Network, NetworkConfig
from node.settings import Settings
from node.wireguard_keys import Keys
from proxy.model import Node

BACKENDS = ("direct", "vxlan", "wireguard")
PORT = 5201
PATIENCE = 30.0
PLAN = {
    4: ("192.168.50.1{n}/24", "10.244.{n}.2/32", "169.254.1.1"),
    6: ("fd00:50::1{n}/64", "fd00:{n}::2/128", "fe80::1"),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="throughput of WireGuard beside VXLAN and plain routes")
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    rates: dict[tuple[str, int], list[float]] = {}
    mtus: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch, _pair(Path(scratch)) as pair:
        for _ in range(args.rounds):
            for backend in BACKENDS:
                mtus[backend] = pair.lead(backend)
                for version in PLAN:
                    rates.setdefault((backend, version), []).append(pair.stream(version, args.seconds))
    plain = {version: quantile(rates["direct", version], 0.5) for version in PLAN}
    rows = [
        (
            f"{backend}, IPv{version}",
            str(mtus[backend] or 1500),
            f"{quantile(found, 0.5) / 1e6:.0f}",
            f"{min(found) / 1e6:.0f} to {max(found) / 1e6:.0f}",
            f"{quantile(found, 0.5) / plain[version]:.2f}",
        )
        for (backend, version), found in rates.items()
    ]
    columns = ("pods of two nodes", "MTU", "Mbit/s (median)", "range", "of direct")
    show(f"One TCP stream, {args.rounds} rounds of {args.seconds} s each", columns, rows)


class _Pair:
    """Two nodes, by their numbers."""

    def __init__(self, names: dict[int, str], pods: dict[int, str], networks: dict[int, Network]) -> None:
        self._names, self._pods, self._networks = names, pods, networks
        self._keys: dict[int, Keys] = {}
        self.nodes = {n: _node(n) for n in names}

    def know(self, keys: dict[int, Keys]) -> None:
        """Have the devices made, and both nodes know each other's keys."""
        self._keys = keys
        self.lead("wireguard")
        for number, node in self.nodes.items():
            public = tuple(keys[number].public[slot] for slot in (0, 1))
            self.nodes[number] = structs.replace(node, wireguard_keys=public)

    def lead(self, backend: str) -> int:
        """Connect the nodes by a backend; return the MTU of the route, 0: the interface's."""
        nodes = {node.name: node for node in self.nodes.values()}
        for number, network in self._networks.items():
            netns.run(self._names[number], network.compare, nodes, NetworkConfig(backend))
        return max((hop.route.mtu for hop in self._networks[1].hops if hop.node == "node2"), default=0)

    def stream(self, version: int, seconds: int) -> float:
        """Send TCP from one pod to the other; return bits per second."""
        to = PLAN[version][1].format(n=2).partition("/")[0]
        server = netns.run(self._pods[2], _started, "iperf3", "-s", "-1", "-p", str(PORT))
        try:
            deadline = time.monotonic() + PATIENCE
            while not netns.run(self._pods[2], _listens):
                if time.monotonic() > deadline:
                    raise TimeoutError("iperf3 does not listen")
                time.sleep(0.05)
            words = ("iperf3", "-c", to, "-p", str(PORT), "-t", str(seconds), "-O", "1", "-J")
            text, _ = netns.run(self._pods[1], _started, *words).communicate(timeout=seconds + PATIENCE)
        finally:
            server.kill()
            server.wait()
        return float(json.loads(text)["end"]["sum_received"]["bits_per_second"])


def _started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def _listens() -> bool:
    """Whether the server's port is open in this namespace, without a connection that it would take."""
    tables = (Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6"))
    return any(f":{PORT:04X} " in line and " 0A " in line for t in tables for line in t.open())


def _node(number: int) -> Node:
    addresses = tuple(plan[0].format(n=number).partition("/")[0] for plan in PLAN.values())
    return Node(f"node{number}", (f"10.244.{number}.0/24", f"fd00:{number}::/64"), addresses)


@contextmanager
def _pair(root: Path) -> Iterator[_Pair]:
    """Yield both nodes, which are gone afterwards."""
    names, pods = ({n: f"pwbench-{os.getpid()}-{kind}{n}" for n in (1, 2)} for kind in ("n", "p"))
    with ExitStack() as stack:
        for name in (*names.values(), *pods.values()):
            netns.create(name)
            stack.callback(netns.delete, name)
        _ip(names[1], [f"link add eth0 type veth peer name eth0 netns {names[2]}"])
        for number, name in names.items():
            _ip(name, _lines(number, pods[number]))
            _ip(pods[number], _inside(number))
        keys = {n: Keys(root / str(n)) for n in names}
        networks = {
            n: Network(
                netns.run(names[n], lambda: stack.enter_context(Rtnl())), f"node{n}", Settings(), keys[n]
            )
            for n in names
        }
        pair = _Pair(names, pods, networks)
        pair.know(keys)
        yield pair


def _lines(number: int, pod: str) -> list[str]:
    own = (f"addr add {plan[0].format(n=number)} dev eth0" for plan in PLAN.values())
    routes = (f"route add {plan[1].format(n=number)} dev pod0" for plan in PLAN.values())
    return [
        "link set lo up",
        "link set eth0 up",
        *(f"{line} nodad" if ":" in line else line for line in own),
        f"link add pod0 type veth peer name eth0 netns {pod}",
        "link set pod0 up",
        "addr add 169.254.1.1/32 dev pod0",
        "addr add fe80::1/64 dev pod0 nodad",
        *routes,
    ]


def _inside(number: int) -> list[str]:
    four, six = (PLAN[version][1].format(n=number) for version in (4, 6))
    return [
        "link set lo up",
        "link set eth0 up",
        f"addr add {four} dev eth0",
        f"addr add {six} dev eth0 nodad",
        "route add 169.254.1.1 dev eth0 scope link",
        "route add default via 169.254.1.1",
        "route add ::/0 via fe80::1 dev eth0",
    ]


def _ip(name: str, lines: list[str]) -> None:
    words = ("ip", "-batch", "-")
    netns.run(name, lambda: subprocess.run(words, input="\n".join(lines), text=True, check=True))


if __name__ == "__main__":
    socket.setdefaulttimeout(PATIENCE)
    main()
