"""Options that `daemon` and `render` share: whose address is replaced, and where node ports are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.options import add, given, refuse
from node.config import ConfigError, options
from node.config_keys import PRIMARY, Configuration

if TYPE_CHECKING:
    from netlink.family import Family


class Ranges(NamedTuple):
    """What the options say; no node port CIDRs are the addresses in the Node object."""

    masquerade: frozenset[Family]
    no_masquerade: tuple[str, ...]
    node_ports: tuple[str, ...]
    egress: tuple[str, ...]


def add_masquerade(group: Any) -> None:
    """Add the options on masquerade."""
    add(group, options()["pods.masquerade"])
    add(group, options()["pods.noMasqueradeCIDRs"])
    add(group, options()["pods.egressAddresses"])


def add_node_ports(group: Any) -> None:
    """Add the option on node ports."""
    add(group, options()["services.nodePortAddresses"])


def chosen(args: argparse.Namespace) -> Ranges:
    """Check and return what was given. Raises CommandError."""
    from node.config_file import load

    try:
        return ranges(load(None, given(args)))
    except ConfigError as error:
        raise refuse(error) from None


def ranges(configuration: Configuration) -> Ranges:
    """Return what a configuration says of them."""
    ports = configuration.services.node_port_addresses
    return Ranges(
        frozenset(families(configuration.pods.masquerade)),
        configuration.pods.no_masquerade_cidrs,
        tuple(cidr for cidr in ports if cidr != PRIMARY),
        configuration.pods.egress_addresses,
    )


def families(word: str) -> tuple[Family, ...]:
    """Return the IP families that a word stands for: both, ipv4, ipv6 or none."""
    from netlink.family import Family

    return {"both": (Family.V4, Family.V6), "ipv4": (Family.V4,), "ipv6": (Family.V6,), "none": ()}[word]
