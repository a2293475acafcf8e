"""Ranges of addresses: parse them, size them, take one from another.

netaddr reads and prints addresses; a range itself is two numbers, because plain integers are what the
arithmetic and the ledger need, and an ADD does some of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from netaddr import AddrFormatError, IPAddress, IPNetwork

# An IPv6 range is usually a /64. No node runs this many pods, and the allocator remembers every address it
# has given, so a bound here keeps the ledger small however long the node lives.
LARGEST_POOL = 2**16


class RangeError(ValueError):
    """A range that cannot be used; the message is a sentence with the field and the value."""


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """The addresses from `first` to `last`, both included, of IP version 4 or 6."""

    version: int
    first: int
    last: int

    def __str__(self) -> str:
        first, last = address_of(self.version, self.first), address_of(self.version, self.last)
        return str(first) if self.size == 1 else f"{first}-{last}"

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.version and self.first <= int(address) <= self.last

    @property
    def size(self) -> int:
        """How many addresses it has; not `len()`, which cannot say 2**64."""
        return self.last - self.first + 1

    def overlaps(self, other: AddressRange) -> bool:
        """Say whether some address is in both."""
        return self.version == other.version and self.first <= other.last and other.first <= self.last


def address_of(version: int, value: int) -> IPAddress:
    """Return the address of a number."""
    return IPAddress(value, 4 if version == 4 else 6)


def parse_range(text: str, field: str = "range") -> AddressRange:
    """Parse "10.1.0.5", "10.1.0.0/28" (every address of it) or "10.1.0.5-10.1.0.9".

    Raises RangeError, which names the field.
    """
    try:
        if "/" in text:
            cidr = _parse_cidr(text)
            if cidr.ip != cidr.network:
                raise RangeError(f"{field}: {text!r} has host bits set; write '{cidr.cidr}'")
            return whole(cidr)
        first, dash, last = (part.strip() for part in text.partition("-"))
        one, other = IPAddress(first), IPAddress(last if dash else first)
    except RangeError:
        raise
    except (AddrFormatError, ValueError):
        raise RangeError(
            f"{field}: {text!r} is not an address, a CIDR or a range such as 10.1.0.5-10.1.0.9"
        ) from None
    if one.version != other.version or one > other:
        raise RangeError(f"{field}: {text!r} does not go upwards from one address to another of its family")
    return AddressRange(one.version, int(one), int(other))


def single(address: IPAddress) -> AddressRange:
    """Return the range that is this one address."""
    return AddressRange(address.version, int(address), int(address))


def whole(cidr: IPNetwork) -> AddressRange:
    """Return every address of a CIDR."""
    return AddressRange(cidr.version, cidr.first, cidr.last)


def subtract(ranges: Iterable[AddressRange], without: Iterable[AddressRange]) -> tuple[AddressRange, ...]:
    """Return what is left of the ranges, in their order, when the addresses of `without` are taken out."""
    holes = sorted(without)
    left: list[AddressRange] = []
    for range_ in ranges:
        start = range_.first
        for hole in holes:
            if not hole.overlaps(range_):
                continue
            if hole.first > start:
                left.append(AddressRange(range_.version, start, hole.first - 1))
            start = max(start, hole.last + 1)
        if start <= range_.last:
            left.append(AddressRange(range_.version, start, range_.last))
    return tuple(left)


def limit(ranges: Iterable[AddressRange], size: int = LARGEST_POOL) -> tuple[AddressRange, ...]:
    """Return the first `size` addresses of the ranges."""
    kept: list[AddressRange] = []
    for range_ in ranges:
        if size <= 0:
            break
        kept.append(AddressRange(range_.version, range_.first, min(range_.last, range_.first + size - 1)))
        size -= kept[-1].size
    return tuple(kept)


def total(ranges: Iterable[AddressRange]) -> int:
    """Return how many addresses ranges have that do not overlap."""
    return sum(range_.size for range_ in ranges)


def overlapping(ranges: Sequence[AddressRange]) -> tuple[AddressRange, AddressRange] | None:
    """Return two of the ranges that share an address; None when no two do."""
    ordered = sorted(ranges)
    for one, other in itertools.pairwise(ordered):
        if one.overlaps(other):
            return one, other
    return None


def parse_pod_cidrs(values: Iterable[str]) -> tuple[IPNetwork, ...]:
    """Parse a node's podCIDRs, in the order given.

    At most one per family, each with room for a pod address (IPv4 to /30, IPv6 to /126) and without host
    bits. No values is no ranges: the node has none yet. Raises RangeError.
    """
    cidrs: list[IPNetwork] = []
    for value in values:
        cidr = _parse_pod_cidr(value)
        for other in cidrs:
            if other.version == cidr.version:
                raise RangeError(f"podCIDRs: {value!r} is a second IPv{cidr.version} range beside '{other}'")
        cidrs.append(cidr)
    return tuple(cidrs)


def _parse_pod_cidr(value: str) -> IPNetwork:
    try:
        cidr = _parse_cidr(value)
    except (AddrFormatError, ValueError):
        raise RangeError(f"podCIDRs: {value!r} is not a CIDR such as 10.1.0.0/24 or fd00:1::/64") from None
    if cidr.ip != cidr.network:
        raise RangeError(f"podCIDRs: {value!r} has host bits set; write '{cidr.cidr}'")
    if capacity(cidr) < 1:
        raise RangeError(
            f"podCIDRs: {value!r} has no room for a pod address; use IPv4 up to /30, IPv6 up to /126"
        )
    return cidr


def _parse_cidr(text: str) -> IPNetwork:
    length = text.rpartition("/")[2]
    # netaddr would also take a netmask, or no length at all (a single host).
    if not (length.isascii() and length.isdigit()):
        raise AddrFormatError
    return IPNetwork(text)


def gateway(cidr: IPNetwork) -> IPAddress:
    """Return the first host address of the range."""
    return IPAddress(cidr.first + 1, cidr.version)


def special(cidr: IPNetwork) -> tuple[AddressRange, ...]:
    """Return the addresses of a podCIDR that no pod gets: network, gateway and (IPv4) broadcast address."""
    start = AddressRange(cidr.version, cidr.first, cidr.first + 1)
    end = AddressRange(cidr.version, cidr.last, cidr.last)
    return (start, end) if cidr.version == 4 else (start,)


def pod_addresses(cidr: IPNetwork) -> tuple[AddressRange, ...]:
    """Return the addresses of a CIDR that pods may have; all of them, however many."""
    return subtract([whole(cidr)], special(cidr))


def capacity(cidr: IPNetwork) -> int:
    """Return how many addresses of the CIDR pods may have; at most LARGEST_POOL, 0 in a tiny range."""
    return total(limit(pod_addresses(cidr)))
