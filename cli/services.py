"""`podwire services`: what the services are on this node, and why each endpoint is used or not."""

from __future__ import annotations

import argparse
import json
from typing import Any

from api import podwire_pb2 as pb
from cli.daemon_client import TIMEOUT_SECONDS, connected, fields
from cli.host import SOCKET
from cli.output import CommandError, table

DESCRIPTION = """
Show the services that this node's proxy serves. With a name, show all about one: what packets can be
addressed to (its frontends), what happens to them, every endpoint with whether it is used on this node and
why, and how many connections there are now, as connection tracking knows them. Services that no proxy serves
(headless ones, ExternalName, those labelled for another proxy) are not here.

columns of a service's endpoints:
  USED         yes: by all of its port's frontends; partly: by some, as where only externalTrafficPolicy is
               Local; no: by none
  WHY          its conditions, and what kept it out: hints for other zones or nodes, a policy Local
  CONNECTIONS  of TCP those not yet forgotten too: closed ones stay in connection tracking for two minutes
"""

EXAMPLES = """
examples:
  podwire services
  podwire services default/web
  podwire services default/web -o json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "services",
        help="services on this node, their endpoints, and why these are used or not",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("service", nargs="?", default="", metavar="NAME", help="one service (namespace/name)")
    parser.add_argument("--socket", default=SOCKET, help="the daemon's socket (default: %(default)s)")
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    parser.set_defaults(run=services)


def services(args: argparse.Namespace) -> int:
    """Print the services, or one."""
    name = args.service if "/" in args.service or not args.service else f"default/{args.service}"
    with connected(args.socket) as stub:
        found = stub.Services(pb.ServicesRequest(service=name), timeout=TIMEOUT_SECONDS).services
    if name and not found:
        raise CommandError(
            f"no service {name} is served on this node: there is none, or it is none of a proxy's business "
            "(headless, ExternalName, labelled for another proxy)"
        )
    if args.output == "json":
        shown = [fields(s) for s in found]
        print(json.dumps(shown[0] if name else shown, indent=2))
    elif name:
        print(_one(found[0]))
    else:
        print(table(("service", "addresses", "ports", "endpoints", "problems"), [_row(s) for s in found]))
    return 0


def _row(service: pb.Service) -> list[str]:
    addresses = (*service.cluster_ips, *service.external_ips, *service.balancer_ips)
    return [
        service.name,
        ", ".join(addresses),
        ", ".join(map(_port, service.ports)) or "-",
        f"{service.endpoints_used} of {service.endpoints_known}",
        "; ".join(service.problems) or "-",
    ]


def _port(port: pb.ServicePort) -> str:
    return f"{port.port}{f':{port.node_port}' if port.node_port else ''}/{port.protocol}"


def _one(service: pb.Service) -> str:
    traits = {
        "cluster addresses": ", ".join(service.cluster_ips),
        "external addresses": ", ".join(service.external_ips),
        "load balancer": ", ".join(service.balancer_ips),
        "for sources in": ", ".join(service.source_ranges),
        "traffic policies": f"internal {service.internal_policy}, external {service.external_policy}",
        "session affinity": f"{service.affinity_seconds} s" if service.affinity_seconds else "",
        "health check port": str(service.health_port or ""),
    }
    lines = [f"service {service.name}", *(f"  {name:<18} {text}" for name, text in traits.items() if text)]
    lines += [f"  {'problem':<18} {problem}" for problem in service.problems]
    frontends = [
        [
            f"{f.match} {f.port}/{f.protocol}",
            "inside the cluster" if f.origin == "internal" else "anybody",
            f.action,
            f.masquerade,
            str(len(f.endpoints)),
            str(f.connections),
        ]
        for f in service.frontends
    ]
    endpoints = [
        [
            e.port or "-",
            e.address,
            f"{e.node or '-'}{' (here)' if e.local else ''}",
            e.used,
            e.why,
            str(e.connections),
        ]
        for e in service.endpoints
    ]
    return "\n".join(
        [
            *lines,
            "",
            table(("frontend", "for", "action", "masquerade", "endpoints", "connections"), frontends),
            "",
            table(("port", "endpoint", "node", "used", "why", "connections"), endpoints)
            if endpoints
            else "no endpoints",
        ]
    )


def _node(endpoint: pb.Endpoint) -> str:
    return f"{endpoint.node or '-'}{' (here)' if endpoint.local else ''}"
