"""Run the benchmarks."""

from __future__ import annotations

import argparse

from bench import cluster, cni, connect, l7, live, network, peers, proxy

PARTS = (proxy, connect, cni, network, l7, peers, live, cluster)


def main() -> None:
    """Run the one that is named, or all."""
    parser = argparse.ArgumentParser(
        prog="make bench", description="Measure podwire beside its alternatives."
    )
    commands = parser.add_subparsers(metavar="WHAT")
    for part in PARTS:
        part.add_parser(commands)
    args = parser.parse_args()
    names = [part.__name__.rpartition(".")[2] for part in PARTS]
    for chosen in [args] if hasattr(args, "run") else [parser.parse_args([name]) for name in names]:
        chosen.run(chosen)


if __name__ == "__main__":
    main()
