"""PodCIDRs as ranges of pod addresses: parse them, size them."""

from __future__ import annotations

from collections.abc import Iterable

from netaddr import AddrFormatError, IPAddress, IPNetwork, IPRange

# An IPv6 podCIDR is usually a /64. No node runs this many pods, and the allocator remembers every address it
# has given, so a bound here keeps the ledger small however long the node lives.
LARGEST_POOL = 2**16


class RangeError(ValueError):
    """A podCIDR that cannot be used; the message is a sentence with the field and the value."""


def parse_pod_cidrs(values: Iterable[str]) -> tuple[IPNetwork, ...]:
    """Parse a node's podCIDRs, in the order given.

    At most one per family, each with room for a pod address (IPv4 to /30, IPv6 to /126) and without host
    bits. No values is no ranges: the node has none yet. Raises RangeError.
    """
    cidrs: list[IPNetwork] = []
    for value in values:
        cidr = _parse(value)
        for other in cidrs:
            if other.version == cidr.version:
                raise RangeError(f"podCIDRs: {value!r} is a second IPv{cidr.version} range beside '{other}'")
        cidrs.append(cidr)
    return tuple(cidrs)


def _parse(value: str) -> IPNetwork:
    length = value.rpartition("/")[2]
    try:
        # netaddr would also take a netmask, or no length at all (a single host).
        if not (length.isascii() and length.isdigit()):
            raise AddrFormatError
        cidr = IPNetwork(value)
    except (AddrFormatError, ValueError):
        raise RangeError(f"podCIDRs: {value!r} is not a CIDR such as 10.1.0.0/24 or fd00:1::/64") from None
    if cidr.ip != cidr.network:
        raise RangeError(f"podCIDRs: {value!r} has host bits set; write '{cidr.cidr}'")
    if capacity(cidr) < 1:
        raise RangeError(
            f"podCIDRs: {value!r} has no room for a pod address; use IPv4 up to /30, IPv6 up to /126"
        )
    return cidr


def gateway(cidr: IPNetwork) -> IPAddress:
    """Return the first host address of the range."""
    return IPAddress(cidr.first + 1, cidr.version)


def capacity(cidr: IPNetwork) -> int:
    """Return how many addresses of the range pods may have; at most LARGEST_POOL, 0 in a tiny range."""
    broadcast = 1 if cidr.version == 4 else 0
    return int(min(LARGEST_POOL, max(0, cidr.size - 2 - broadcast)))


def pod_addresses(cidr: IPNetwork) -> IPRange:
    """Return the addresses pods may have: all but network, gateway and (IPv4) broadcast address.

    The range must have a capacity of at least 1.
    """
    first = cidr.first + 2
    return IPRange(IPAddress(first, cidr.version), IPAddress(first + capacity(cidr) - 1, cidr.version))
