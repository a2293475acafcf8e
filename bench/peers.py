"""What thousands of other nodes cost: at start, when one of them changes, and in the regular comparison.

In process, on the syncer that the daemon has: routes, neighbours, forwarding entries, the rules about tunnels
and masquerade. The node is a namespace of its own; its peers are Node objects only.
"""

from __future__ import annotations

import argparse
import base64
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from msgspec import structs

from bench.figures import ms, p50, quantile, show, timed
from cni.settings import Mode
from ipam.ledger import Ledger
from netlink import netns
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from node.backends.vxlan import tunnel_mac
from node.store import Pending
from node.syncer import SyncConfig, Syncer
from proxy.model import EMPTY, Node

LOOPBACK = 1
START_MS, CHANGE_MS = 2000.0, 5.0
BACKENDS = ("direct", "vxlan", "wireguard")
"""The last one is measured where it is asked for: not all kernels have it."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peers` to the bench's command line."""
    parser = commands.add_parser("peers", help="thousands of other nodes")
    parser.add_argument("--peers", type=int, default=5000, help="other nodes (default: %(default)s)")
    parser.add_argument("--changes", type=int, default=100, help="changes of one node (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, help="one backend alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure each backend, in one family and in both."""
    rows = []
    for backend in (args.backend,) if args.backend else BACKENDS[:-1]:
        for families in (1, 2):
            with _node() as name:
                row = netns.run(name, _measured, backend, families, args.peers, args.changes)
            rows.append((backend, "IPv4" if families == 1 else "IPv4 and IPv6", *row))
    columns = ("backend", "pods", f"start (target {START_MS:.0f})", "start that adopts", "comparison")
    changes = (f"one change p50 (target {CHANGE_MS:.0f})", "p99")
    show(f"{args.peers} other nodes: milliseconds", (*columns, *changes), rows)


@contextmanager
def _node() -> Iterator[str]:
    """Yield a namespace with a cable, on subnets that hold all peers."""
    name = f"pw-peers{os.getpid()}"
    netns.create(name)
    try:
        netns.run(name, _configure)
        yield name
    finally:
        netns.delete(name)


def _configure() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(LOOPBACK), veth_add(Veth("eth0", "wire")))
        eth0, wire = socket.if_nametoindex("eth0"), socket.if_nametoindex("wire")
        rtnl.commit(link_up(wire), address_add(eth0, "172.16.0.10/12"), address_add(eth0, "fd00:50::10/64"))
        rtnl.commit(route_replace(Route("0.0.0.0/0", gateway="172.16.0.1", protocol=4)))


def _peer(number: int, families: int, address: int | None = None) -> Node:
    """Return the Node of a number; `address` is the number that its addresses have, if another."""
    at = number if address is None else address
    high, low = divmod(number, 250)
    return Node(
        f"node{number}",
        (f"10.{high}.{low}.0/24", f"fd00:{number:x}:1::/64")[:families],
        (f"172.20.{at // 250}.{at % 250 + 1}", f"fd00:50::1:{at:x}")[:families],
        uid=f"uid-{number}",
        tunnel_mac=tunnel_mac(f"node{number}", ""),
        wireguard_keys=tuple(_key(2 * number + slot) for slot in (1, 2)),
    )


def _key(number: int) -> str:
    """Return some public key of WireGuard."""
    return base64.b64encode(number.to_bytes(4, "big") * 8).decode()


def _measured(backend: str, families: int, peers: int, changes: int) -> tuple[str, ...]:
    """Return a row of milliseconds; in the namespace of the node."""
    me = Node(
        "me", ("10.255.0.0/24", "fd00:ffff:1::/64")[:families], ("172.16.0.10", "fd00:50::10")[:families]
    )
    nodes = {node.name: node for node in (me, *(_peer(i, families) for i in range(peers)))}
    with tempfile.TemporaryDirectory() as root, Ledger(Path(root) / "ledger.db", boot_id="b") as ledger:
        config = SyncConfig("me", Mode.ROUTED, backend=backend, key_dir=Path(root) / "wireguard")
        with Syncer(config, ledger) as syncer:
            start = timed(partial(syncer.sync, _pending(nodes, *nodes)))
            compared = timed(partial(syncer.sync, syncer.compare()))
            samples = []
            for number in range(changes):
                name = f"node{number // 3 * 3 % peers}"
                nodes = _changed(nodes, name, number, peers, families)
                samples.append(timed(partial(syncer.sync, _pending(nodes, name))))
        with Syncer(config, ledger) as syncer:
            adopted = timed(partial(syncer.sync, _pending(nodes, *nodes)))
    return tuple(map(ms, (start, adopted, compared, p50(samples), quantile(samples, 0.99))))


def _pending(nodes: Mapping[str, Node], *changed: str) -> Pending:
    return Pending(structs.replace(EMPTY, nodes=nodes), frozenset(), frozenset(changed), since=0.0)


def _changed(nodes: Mapping[str, Node], name: str, number: int, peers: int, families: int) -> dict[str, Node]:
    """Return the nodes after one of them left, came to another address, or moved back: by turns."""
    if number % 3 == 0:
        return {n: node for n, node in nodes.items() if n != name}
    at = int(name.removeprefix("node"))
    return {**nodes, name: _peer(at, families, peers + number if number % 3 == 1 else None)}
