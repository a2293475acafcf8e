"""`podwire status`, `pods`, `frontends`, `routes`: what the daemon knows."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from api import podwire_pb2 as pb
from cli.daemon_client import TIMEOUT_SECONDS, connected, fields
from cli.host import SOCKET
from cli.output import CommandError, show


def add_parser(commands: Any) -> None:
    """Add the commands to the parser."""
    for name, run, summary in (
        ("status", status, "whether this node's network works, and what is wrong"),
        ("pods", pods, "the pods attached to this node and their addresses"),
        ("frontends", frontends, "what packets can be addressed to, and where they go"),
        ("routes", routes, "the routes to the pods of other nodes"),
    ):
        parser = commands.add_parser(name, help=summary, description=f"Show {summary}.")
        parser.add_argument("--socket", default=SOCKET, help="the daemon's socket (default: %(default)s)")
        parser.add_argument(
            "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
        )
        if name == "frontends":
            parser.add_argument("service", nargs="?", default="", help="only this service (namespace/name)")
        parser.set_defaults(run=run)


def status(args: argparse.Namespace) -> int:
    """Print the daemon's health; exit status 1 when the node is not ready."""
    with connected(args.socket) as stub:
        health = stub.Health(pb.HealthRequest(), timeout=TIMEOUT_SECONDS)
    if args.output == "json":
        print(json.dumps(fields(health), indent=2))
        return 0 if health.ready else 1
    age = f"{time.time() - health.last_sync:.0f} s ago" if health.last_sync else "never"
    print(f"node {health.node}: {'ready' if health.ready else 'NOT READY'} (podwire {health.version})")
    print(f"  source     {health.source}")
    print(f"  pods       mode {health.mode}, podCIDRs {', '.join(health.pod_cidrs) or 'none yet'}")
    print(f"  services   {health.services} with {health.frontends} frontends, {health.elements} map elements")
    print(f"  dataplane  {health.dataplane}, last synced {age}")
    if health.l7:
        print(f"  L7 proxy   {health.l7}")
    for problem in health.problems:
        print(f"  problem    {problem}")
    return 0 if health.ready else 1


def pods(args: argparse.Namespace) -> int:
    """Print the attachments in the ledger."""
    with connected(args.socket) as stub:
        found = stub.Pods(pb.PodsRequest(), timeout=TIMEOUT_SECONDS).pods
    show(
        args.output,
        ("container_id", "ifname", "addresses", "host_ifname", "state"),
        [fields(p) for p in found],
    )
    return 0


def frontends(args: argparse.Namespace) -> int:
    """Print the frontends."""
    with connected(args.socket) as stub:
        found = stub.Frontends(pb.FrontendsRequest(service=args.service), timeout=TIMEOUT_SECONDS).frontends
    if args.service and not found:
        raise CommandError(
            f"service {args.service} has no frontend on this node (or there is no such service)"
        )
    columns = ("service", "match", "protocol", "port", "origin", "action", "masquerade", "endpoints")
    rows = [fields(f) for f in found]
    for row in rows:
        del row["connections"]  # which only `services` counts
    show(args.output, columns, rows)
    return 0


def routes(args: argparse.Namespace) -> int:
    """Print the routes."""
    with connected(args.socket) as stub:
        found = stub.Routes(pb.RoutesRequest(), timeout=TIMEOUT_SECONDS).routes
    show(
        args.output,
        ("destination", "node", "backend", "peer", "via", "device", "mtu"),
        [fields(r) for r in found],
    )
    return 0
