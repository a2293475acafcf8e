"""Options that `daemon` and `render` share: whose address is replaced, and where node ports are."""

from __future__ import annotations

import argparse
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.output import CommandError

if TYPE_CHECKING:
    from netlink.family import Family


class Ranges(NamedTuple):
    """What the options say; no node port CIDRs are the addresses in the Node object."""

    masquerade: frozenset[Family]
    no_masquerade: tuple[str, ...]
    node_ports: tuple[str, ...]


def add_masquerade(group: Any) -> None:
    """Add the options on masquerade."""
    group.add_argument(
        "--masquerade",
        choices=("both", "ipv4", "ipv6", "none"),
        default="both",
        help="in which families pods get the node's address towards the outside (default: %(default)s)",
    )
    group.add_argument(
        "--no-masquerade-cidr",
        action="append",
        default=[],
        metavar="CIDR",
        help="pods keep their address towards this range, as towards pods and nodes; can be repeated",
    )


def add_node_ports(group: Any) -> None:
    """Add the option on node ports."""
    group.add_argument(
        "--nodeport-addresses",
        action="append",
        default=[],
        metavar="CIDR",
        help="node ports are on the node's addresses in this range; can be repeated; `primary`, the default, "
        "are the addresses in its Node object",
    )


def chosen(args: argparse.Namespace) -> Ranges:
    """Check and return what was given. Raises CommandError."""
    node_ports = [part for value in args.nodeport_addresses for part in value.split(",")]
    if "primary" in node_ports and len(node_ports) > 1:
        raise CommandError("--nodeport-addresses primary stands alone: it is no range")
    node_ports = [cidr for cidr in node_ports if cidr != "primary"]
    for option, cidrs in (
        ("--no-masquerade-cidr", args.no_masquerade_cidr),
        ("--nodeport-addresses", node_ports),
    ):
        for cidr in cidrs:
            _check(option, cidr)
    return Ranges(frozenset(families(args.masquerade)), tuple(args.no_masquerade_cidr), tuple(node_ports))


def families(word: str) -> tuple[Family, ...]:
    """Return the IP families that a word stands for: both, ipv4, ipv6 or none."""
    from netlink.family import Family

    return {"both": (Family.V4, Family.V6), "ipv4": (Family.V4,), "ipv6": (Family.V6,), "none": ()}[word]


def _check(option: str, cidr: str) -> None:
    try:
        ip_network(cidr)
    except ValueError as error:
        raise CommandError(f"{option} {cidr}: {error}") from None
