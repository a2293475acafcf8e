"""Numbers and addresses that the IPVS dataplane has for itself on every node."""

from __future__ import annotations

from netlink.delivery import Marked
from netlink.family import Family

TABLE = "podwire_ipvs"
"""Not the table of the nftables dataplane: while one takes the other's place, both are there."""

DEVICE = "pwipvs0"
"""The dummy interface that has the cluster addresses (kube-proxy's is kube-ipvs0)."""

MARK, MARK_MASK = 0x7000_0000, 0xF000_0000
"""Packets for virtual servers that are known by a mark have this in their mark's highest bits, and a number
in the others; the number 0 is for whoever only has to be delivered here.

The marks of others are made of single bits, and this is three at once. Of the bits that we and kube-proxy use
elsewhere (0x2000, 0x4000, 0x8000) none is ever set.
"""

NUMBER = 114
"""Of the policy rule, its table, and the protocol number that both carry (`ip rule show proto 114`)."""

MARKED = Marked(MARK, MARK_MASK, NUMBER)

LOW_BITS = 13
MOST_MARKS = 1 << 25

MADE_ADDRESSES = {Family.V4: "169.254.112.3", Family.V6: "fd9d:7077:6c37:3::1"}
"""Where connections go that keep their real server and have no cluster address to go to: a port for each.

Beside those of the L7 proxy (proxy.l7.places): link-local, and unique local with the same random global ID.
"""
MOST_PORTS = 1 << 16


def mark_of(number: int) -> int:
    """Return the mark that stands for a number below MOST_MARKS."""
    return MARK | number >> LOW_BITS << 16 | number & (1 << LOW_BITS) - 1


def number_of(mark: int) -> int:
    """Return the number that a mark of ours stands for."""
    return (mark & ~MARK_MASK) >> 16 << LOW_BITS | mark & (1 << LOW_BITS) - 1


def is_ours(mark: int) -> bool:
    """Whether a virtual server known by a mark is ours."""
    return bool(mark) and mark & MARK_MASK == MARK
