"""IP families as values: what differs between IPv4 and IPv6 is data, so code is written once."""

from __future__ import annotations

import socket
from enum import Enum
from pathlib import Path

IPV6 = Path("/proc/net/if_inet6")
"""What only a kernel with IPv6 has."""


class Family(Enum):
    """An IP family with its kernel numbers, sizes and nftables words.

    Source: linux/socket.h (AF_*), linux/netfilter.h (NFPROTO_*), RFC 791 and RFC 8200 (header offsets).
    """

    V4 = 4
    V6 = 6

    __hash__ = object.__hash__  # Enum's own is Python code, and families are in keys of 100,000 elements

    af: int
    """AF_INET or AF_INET6; NFPROTO_IPV4 and NFPROTO_IPV6 have the same numbers (2 and 10)."""
    size: int
    """Bytes in an address."""

    def __init__(self, version: int) -> None:
        self.af = int(socket.AF_INET if version == 4 else socket.AF_INET6)
        self.size = 4 if version == 4 else 16

    @property
    def bits(self) -> int:
        """Bits in an address: the prefix length of a single host."""
        return self.size * 8

    @property
    def keyword(self) -> str:
        """The nftables table family and protocol word: `ip` or `ip6`."""
        return "ip" if self is Family.V4 else "ip6"

    @property
    def source_offset(self) -> int:
        """Offset of the source address in the network header, in bytes."""
        return 12 if self is Family.V4 else 8

    @property
    def destination_offset(self) -> int:
        """Offset of the destination address in the network header, in bytes."""
        return self.source_offset + self.size

    @property
    def port_unreachable(self) -> int:
        """The code of ICMP (RFC 792) or ICMPv6 (RFC 4443) "port unreachable"."""
        return 3 if self is Family.V4 else 4

    @property
    def gateway(self) -> str:
        """The address every routed pod sees as its gateway; no interface carries it."""
        return "169.254.1.1" if self is Family.V4 else "fe80::1"


def with_port(address: str, port: int | str) -> str:
    """Write an address and a port together, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
