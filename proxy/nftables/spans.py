"""CIDRs in interval sets: which of them the kernel holds, and what differs from before. Pure.

With thousands of nodes, one node's change must cost as much as among ten: nothing here looks at what did not
change.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator

from netlink.family import Family
from netlink.nftables.objects import Data

BUCKETS = 256

Pairs = list[tuple[bytes, Data]]
Span = tuple[int, int]
"""A CIDR as prefix length and first address."""


class Members(Collection[str]):
    """A set of texts that never changes, and tells quickly in what it differs from the one it was made from.

    The texts are in buckets by their hash; both sets share the buckets in which nothing changed.
    """

    __slots__ = ("_buckets",)

    def __init__(self, texts: Iterable[str] = ()) -> None:
        found: list[set[str]] = [set() for _ in range(BUCKETS)]
        for text in texts:
            found[hash(text) % BUCKETS].add(text)
        self._buckets = tuple(map(frozenset, found))

    def changed(self, gone: Iterable[str] = (), come: Iterable[str] = ()) -> Members:
        """Return a set without some texts, which need not be there, and with others, which may be."""
        opened: dict[int, set[str]] = {}
        for texts, update in ((gone, set.discard), (come, set.add)):
            for text in texts:
                place = hash(text) % BUCKETS
                if place not in opened:
                    opened[place] = set(self._buckets[place])
                update(opened[place], text)
        buckets = list(self._buckets)
        for place, bucket in opened.items():
            buckets[place] = frozenset(bucket)
        found = Members.__new__(Members)
        found._buckets = tuple(buckets)
        return found

    def __sub__(self, other: Members) -> set[str]:
        found: set[str] = set()
        for here, there in zip(self._buckets, other._buckets, strict=True):
            if here is not there:
                found |= here - there
        return found

    def __contains__(self, text: object) -> bool:
        return text in self._buckets[hash(text) % BUCKETS]

    def __iter__(self) -> Iterator[str]:
        return (text for bucket in self._buckets for text in bucket)

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Members) and self._buckets == other._buckets

    def __hash__(self) -> int:
        return hash(self._buckets)

    def __repr__(self) -> str:
        return f"Members({sorted(self)})"


def difference(old: Collection[str], new: Collection[str]) -> tuple[set[str], set[str]]:
    """Return what is only in the old collection, and what is only in the new one."""
    if isinstance(old, Members) and isinstance(new, Members):
        return old - new, new - old
    was, now = set(old), set(new)
    return was - now, now - was


class Spans:
    """The CIDRs of one family that an interval set stands for.

    The kernel refuses ranges that overlap. Of two CIDRs that do, one holds the other, and only that one is in
    the kernel; neighbours are not joined, so that each can go by itself.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._firsts: dict[int, set[int]] = {}  # first addresses by prefix length

    def change(self, gone: Iterable[str], come: Iterable[str]) -> tuple[Pairs, Pairs]:
        """Take CIDRs out and others in; return the elements to remove and to add.

        CIDRs of the other family do not count. Ranges are removed and added whole, each start before its end,
        in order of address: recent kernels look for the start just before when an end is removed or added.
        """
        away, new = self._parsed(gone), self._parsed(come)
        touched = away | new
        touched |= self._inside(touched)
        before = {span for span in touched if self._outermost(span)}
        for length, first in away:
            firsts = self._firsts[length]
            firsts.remove(first)
            if not firsts:
                del self._firsts[length]
        for length, first in new:
            self._firsts.setdefault(length, set()).add(first)
        after = {span for span in touched if self._outermost(span)}
        return self._elements(before - after), self._elements(after - before)

    def _parsed(self, cidrs: Iterable[str]) -> set[Span]:
        wanted, af = self._family is Family.V6, self._family.af
        found: set[Span] = set()
        for cidr in cidrs:
            address, _, length = cidr.partition("/")
            if (":" in address) is wanted:
                found.add((int(length), int.from_bytes(socket.inet_pton(af, address), "big")))
        return found

    def _start(self, address: int, length: int) -> int:
        """Return the first address of the CIDR of a prefix length that an address is in."""
        host_bits = self._family.bits - length
        return address >> host_bits << host_bits

    def _outermost(self, span: Span) -> bool:
        """Whether a CIDR is here, and in no other one."""
        length, first = span
        return first in self._firsts.get(length, ()) and not any(
            shorter < length and self._start(first, shorter) in firsts
            for shorter, firsts in self._firsts.items()
        )

    def _inside(self, spans: set[Span]) -> set[Span]:
        """Return the CIDRs here that are in one of these; longer prefixes than theirs are looked at only."""
        lengths = {length for length, _ in spans}
        return {
            (longer, first)
            for longer, firsts in self._firsts.items()
            if any(length < longer for length in lengths)
            for first in firsts
            if any(length < longer and (length, self._start(first, length)) in spans for length in lengths)
        }

    def _elements(self, spans: set[Span]) -> Pairs:
        """Return starts and ends; the end is the address after a range, and missing after the last one."""
        size, bits = self._family.size, self._family.bits
        found: Pairs = []
        for length, first in sorted(spans, key=lambda span: span[1]):
            end = first + (1 << bits - length)
            found.append((first.to_bytes(size, "big") + b"\0", None))
            if end >> bits == 0:
                found.append((end.to_bytes(size, "big") + b"\1", None))
        return found
