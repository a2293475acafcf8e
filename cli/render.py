"""`podwire render`: what the daemon would make of a folder of manifests, without a daemon or a kernel."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.output import CommandError, complain, show
from cli.ranges import add_masquerade, add_node_ports, chosen, families
from netlink.family import with_port

if TYPE_CHECKING:
    from netlink.family import Family
    from proxy.frontends import Frontend
    from proxy.model import Node, Snapshot

COLUMNS = ("service", "match", "protocol", "port", "origin", "action", "masquerade", "endpoints")

DESCRIPTION = """
Show what a node's service proxy makes of a folder of manifests: what packets can be addressed to (its
frontends), and the exact nftables ruleset, as `nft list table` prints it. Works anywhere: it needs no root,
no kernel and no daemon, and changes nothing.

What is wrong with the manifests is said on standard error, and what is right is shown all the same. The exit
status is 0 when nothing is wrong, 1 when something is, and 2 for wrong usage.

Services and EndpointSlices are all in the ruleset; of Nodes, the node's own zone, addresses and podCIDRs, and
the others' addresses and podCIDRs. Pools of --ipam-config and flat mode are not known here. Services that ask
for the L7 proxy are in the ruleset as they are while that serves them, at its usual port.
"""

EXAMPLES = """
examples:
  podwire render /etc/podwire/manifests --node-name node1
  podwire render manifests --node-name node1 --family ipv6 -o nft
  podwire render manifests --node-name node1 -o json --no-masquerade-cidr 10.0.0.0/8

  diff <(podwire render before -o nft) <(podwire render after -o nft)
      what a change of manifests changes in the ruleset
  ip netns exec trial nft -f <(podwire render manifests -o nft)
      the tables, in a network namespace that has none of them
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "render",
        help="frontends and ruleset of a folder of manifests",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of Kubernetes manifests")
    parser.add_argument(
        "--node-name",
        default=socket.gethostname().lower(),
        help="the node to render for, by its Node object (default: host name)",
    )
    parser.add_argument(
        "--family",
        choices=("ipv4", "ipv6", "both"),
        help="only these (default: what the node serves, which is IPv4, and IPv6 if it has such a podCIDR)",
    )
    add_masquerade(parser)
    add_node_ports(parser)
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "nft", "json"),
        default="table",
        help="frontends and ruleset, for people; only the ruleset; or all of it as JSON (default: table)",
    )
    parser.set_defaults(run=run_render)


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a node makes of manifests; rulesets by the name of their IP family."""

    frontends: tuple[Frontend, ...]
    rulesets: dict[str, str]
    problems: tuple[str, ...]


def run_render(args: argparse.Namespace) -> int:
    """Print frontends and ruleset; exit status 1 when the manifests have problems."""
    if not args.folder.is_dir():
        raise CommandError(f"{args.folder} is not a folder")
    found = _render(args)
    for problem in found.problems:
        complain(problem)
    rows = [_row(f) for f in found.frontends]
    if args.output == "json":
        answer = {
            "node": args.node_name,
            "frontends": rows,
            "problems": found.problems,
            "ruleset": found.rulesets,
        }
        print(json.dumps(answer, indent=2))
        return 1 if found.problems else 0
    if args.output == "table":
        show("table", COLUMNS, rows)
        print()
    print("\n".join(found.rulesets.values()), end="")
    return 1 if found.problems else 0


def _render(args: argparse.Namespace) -> Rendering:
    """Go the daemon's way from the folder to a table of each family."""
    from netlink.nftables.fake import FakeNft
    from netlink.nftables.objects import Table
    from netlink.nftables.text import listing
    from node import masquerade
    from node.ranges import accepted_ranges
    from node.sources.manifests import ManifestFolder
    from proxy.model import Node
    from proxy.nftables.dataplane import Dataplane
    from proxy.nftables.ruleset import TABLE
    from proxy.topology import Place

    options = chosen(args)
    content = ManifestFolder(args.folder).read()
    snapshot = _snapshot(content.objects)
    me = snapshot.nodes.get(args.node_name, Node(args.node_name))
    _, overlaps = accepted_ranges(snapshot.nodes, me.name)
    served, conflicts = _frontends(snapshot, Place(me.name, me.zone))
    ranges = masquerade.ranges(
        snapshot.nodes,
        me.name,
        options.no_masquerade,
        options.masquerade,
        options.node_ports,
        options.egress,
    )
    rulesets: dict[str, str] = {}
    wanted = families(args.family) if args.family else _served(me)
    for family in wanted:
        nft = FakeNft(family)
        Dataplane(nft).load((f for f in served if f.key.family is family), ranges)
        assert nft.state
        rulesets[f"ipv{family.value}"] = listing(Table(family, TABLE), nft.state)
    return Rendering(
        tuple(f for f in served if f.key.family in wanted),
        rulesets,
        (*content.problems, *_missing(snapshot, me), *overlaps, *conflicts),
    )


def _snapshot(objects: Mapping[Any, Any]) -> Snapshot:
    from node.store import Store

    store = Store()
    store.replace(objects)
    pending = store.take(0)
    assert pending  # the first objects are a change, even if there are none
    return pending.snapshot


def _frontends(snapshot: Snapshot, place: Any) -> tuple[list[Frontend], list[str]]:
    """Return the frontends in order of service, and a sentence for each that two services claim."""
    from proxy.frontends import frontends
    from proxy.l7.backends import with_proxied
    from proxy.table import FrontendTable

    table = FrontendTable()
    for name in sorted(snapshot.services):
        service = snapshot.services[name]
        found = frontends(service, snapshot.slices.get(name, ()), place)
        table.replace(name, with_proxied(service, found, lambda backend, route: True)[0])
    return list(table), table.conflicts()


def _missing(snapshot: Snapshot, me: Node) -> list[str]:
    """Return a sentence if the manifests do not say what the node rules need."""
    if me.name not in snapshot.nodes:
        return [f"no Node is named {me.name} (--node-name): node ports, masquerade and locality lack it"]
    if not me.pod_cidrs:
        return [f"node {me.name} has no podCIDR yet: pods cannot be added"]
    return []


def _served(me: Node) -> tuple[Family, ...]:
    """Return the IP families that a node serves: IPv4, and what its pods' ranges have."""
    has_ipv6 = any(":" in cidr for cidr in me.pod_cidrs)
    return families("both" if has_ipv6 else "ipv4")


def _row(frontend: Frontend) -> dict[str, Any]:
    """Return a frontend's fields, as `podwire frontends` has them of a daemon."""
    return {
        "service": frontend.service,
        "match": frontend.key.address or "nodeport",
        "protocol": frontend.key.protocol.name,
        "port": frontend.key.port,
        "origin": frontend.key.origin.value,
        "action": frontend.action.value,
        "masquerade": frontend.masquerade.value,
        "endpoints": [with_port(b.address, b.port) for b in frontend.endpoints],
        "affinity_seconds": frontend.affinity,
        "restricted": frontend.sources is not None,
        "sources": list(frontend.sources or ()),
    }
