"""How long a changed manifest takes to be in the kernel, through a real daemon."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from bench.figures import ms, p50, quantile, show
from lab import network
from lab.topology import plan
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from proxy.nftables.ruleset import SERVICES, TABLE

ADDRESS = "10.96.0.99"
DEADLINE_SECONDS = 5.0


def add_parser(commands: Any) -> None:
    """Add `live` to the bench's command line."""
    parser = commands.add_parser("live", help="from a manifest written to the kernel changed")
    parser.add_argument("--changes", type=int, default=50, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write, one after the other, endpoints that the kernel must then have."""
    topology = plan(f"live{os.getpid()}", nodes=1, far=0)
    try:
        lab = network.up(topology)
        samples = netns.run(topology.nodes[0].namespace, _measure, lab.manifests, args.changes)
    finally:
        network.remove(topology.name)
    row = (str(args.changes), ms(p50(samples)), ms(quantile(samples, 0.99)), ms(max(samples)))
    show("From a file's last byte to the kernel's map, polled, ms", ("changes", "p50", "p99", "max"), [row])


def _measure(folder: Path, changes: int) -> list[float]:
    _write(folder / "service.json", _service())
    samples = []
    with Nft(Family.V4, TABLE) as nft:
        for number in range(changes):
            _write(folder / "slice.json", _slice(f"10.244.1.{number + 1}"))
            start = time.perf_counter()
            wanted = bytes((10, 244, 1, number + 1))
            while not any(
                isinstance(d, bytes) and d.startswith(wanted)
                for d in nft.elements(SERVICES.endpoints).values()
            ):
                if time.perf_counter() - start > DEADLINE_SECONDS:
                    raise SystemExit(f"bench: the change did not arrive within {DEADLINE_SECONDS:.0f} s")
            samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _write(path: Path, document: object) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(document))
    scratch.replace(path)


def _service() -> object:
    return {
        "kind": "Service",
        "metadata": {"name": "live"},
        "spec": {"clusterIP": ADDRESS, "ports": [{"port": 80}]},
    }


def _slice(address: str) -> object:
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": "live-1", "labels": {"kubernetes.io/service-name": "live"}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": [address]}],
    }
