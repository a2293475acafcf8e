"""Whose podCIDR counts where nodes claim ranges that overlap. Pure, and cheap for one node of thousands.

Our own range counts first, then the nodes by name, so that every order of events ends the same.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Collection, Mapping
from ipaddress import ip_network

from proxy.model import Node

Span = tuple[int, int, int, str, str]
"""IP version, first and last address, node, podCIDR."""


def accepted_ranges(nodes: Mapping[str, Node], me: str) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return the podCIDRs that count, by node, and a sentence for each that does not."""
    ranges = Ranges(me)
    ranges.take(nodes, nodes.keys())
    return ranges.accepted, ranges.problems


class Ranges:
    """The podCIDRs of all nodes that count."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._spans: list[Span] = []  # disjoint, in order
        self.accepted: dict[str, tuple[str, ...]] = {}
        self.problems: tuple[str, ...] = ()

    def take(self, nodes: Mapping[str, Node], changed: Collection[str]) -> set[str]:
        """Take what became of some nodes; return those of which other ranges count now."""
        if self.problems and changed:  # what goes may have been in the way of others
            return self._anew(nodes)
        moved = {n for n in changed if _claimed(nodes, n) != self.accepted.get(n, ())}
        for name in moved:
            for cidr in self.accepted.pop(name, ()):
                del self._spans[bisect(self._spans, _span(name, cidr)) - 1]
        for name in moved:
            for cidr in _claimed(nodes, name):
                span = _span(name, cidr)
                if self._holder(span):
                    return moved | self._anew(nodes)
                insort(self._spans, span)
            if cidrs := _claimed(nodes, name):
                self.accepted[name] = cidrs
        return moved

    def _anew(self, nodes: Mapping[str, Node]) -> set[str]:
        """Decide on all claims in order; return the nodes of which other ranges count now."""
        before, self.accepted, self._spans = self.accepted, {}, []
        problems = []
        for name in sorted(nodes, key=lambda name: (name != self._me, name)):
            kept = []
            for cidr in sorted(_claimed(nodes, name)):
                span = _span(name, cidr)
                if holder := self._holder(span):
                    there = f"{holder[4]} of node {holder[3]}"
                    problems.append(
                        f"node {name}: podCIDR {cidr} overlaps {there}, which counts; it gets no route"
                    )
                    continue
                insort(self._spans, span)
                kept.append(cidr)
            if kept:
                order = _claimed(nodes, name)
                self.accepted[name] = tuple(sorted(kept, key=order.index))
        self.problems = tuple(problems)
        names = before.keys() | self.accepted.keys()
        return {name for name in names if before.get(name) != self.accepted.get(name)}

    def _holder(self, span: Span) -> Span | None:
        """Return what overlaps a span."""
        position = bisect(self._spans, span)
        around = self._spans[max(position - 1, 0) : position + 1]
        return next((s for s in around if s[0] == span[0] and s[1] <= span[2] and span[1] <= s[2]), None)


def _claimed(nodes: Mapping[str, Node], name: str) -> tuple[str, ...]:
    node = nodes.get(name)
    return node.pod_cidrs if node else ()


def _span(name: str, cidr: str) -> Span:
    network = ip_network(cidr)
    return network.version, int(network.network_address), int(network.broadcast_address), name, cidr
