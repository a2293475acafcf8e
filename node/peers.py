"""Every hop of this node, kept by what changed: Nodes and Site → hops. Pure: no kernel, no clock.

One node's change costs the same among 10 nodes and among 5,000: only its own hops are planned again, unless
what it changed concerns others too, as a podCIDR or a MAC that two nodes claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

from netlink.requests import Route
from node.backends import CHOICES
from node.backends.hops import Hop, Site, tunnel_address, version_of
from node.backends.vxlan import mac_of
from node.backends.wireguard import closed
from node.ranges import Ranges
from proxy.model import Node


class Moved(NamedTuple):
    """What one step changed: hops that are no more as they were, and those there are instead."""

    gone: tuple[Hop, ...]
    new: tuple[Hop, ...]


class Peers:
    """The hops to all other nodes' pods, and the route that keeps packets to our own range here."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._nodes: Mapping[str, Node] = {}
        self._site = Site(Node(me))
        self._ranges = Ranges(me)
        self._holders: dict[str, set[str]] = {}
        """Nodes by what only one may have: the MAC of their tunnels, their keys."""
        self._hops: dict[str, tuple[Hop, ...]] = {}
        self._problems: dict[str, tuple[str, ...]] = {}
        self._tunnels: dict[str, set[str]] = {}
        self._addresses: dict[int, Counter[str]] = {4: Counter(), 6: Counter()}
        self._limited = 0
        self._shared: Counter[str] = Counter()
        self.changed: frozenset[str] = frozenset()
        """The nodes of which the last step changed the Node object or the ranges that count."""

    @property
    def hops(self) -> Iterator[Hop]:
        """All hops."""
        return (hop for hops in tuple(self._hops.values()) for hop in hops)

    @property
    def accepted(self) -> Mapping[str, tuple[str, ...]]:
        """The podCIDRs that count, by node."""
        return self._ranges.accepted

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences."""
        found = (sentence for name in sorted(self._problems) for sentence in self._problems[name])
        return (*self._ranges.problems, *found)

    @property
    def unreached(self) -> bool:
        """Whether there is no way to some node."""
        return bool(self._problems)

    @property
    def tunnels(self) -> frozenset[str]:
        """The tunnel devices that some hop needs."""
        return frozenset(device for device, names in self._tunnels.items() if names)

    @property
    def limited(self) -> bool:
        """Whether less fits through to some node than through the interface."""
        return self._limited > 0

    def tunnel_addresses(self, version: int) -> frozenset[str]:
        """Return where tunnelled packets may come from over an IP version: from every other node.

        Also from those that we reach directly: a node with another prefix length on its address may see that
        differently.
        """
        return frozenset(self._addresses[version])

    def of(self, name: str) -> tuple[Hop, ...]:
        """Return the hops to one node."""
        return self._hops.get(name, ())

    def shares(self, destination: str) -> bool:
        """Whether some node still has this address, as a host route's destination: two may for a while."""
        return destination in self._shared

    def take(self, nodes: Mapping[str, Node], site: Site, touched: Set[str] | None = None) -> Moved:
        """Take other nodes, or another site, and return what that changed.

        No other nodes than the `touched` ones differ; None: it may be any.
        """
        before = self._nodes
        if touched is None:
            touched = {name for name, node in nodes.items() if before.get(name) is not node}
            touched |= before.keys() - nodes.keys()
        changed = {n for n in touched if nodes.get(n) != before.get(n)}
        self._nodes = nodes
        self._take_addresses(before, changed)
        self.changed = frozenset(changed | self._ranges.take(nodes, changed))
        affected = self.changed | self._take_claims(before, nodes, changed)
        if site != self._site:
            self._site, affected = site, frozenset(nodes.keys() | before.keys())
        gone: list[Hop] = []
        new: list[Hop] = []
        for name in sorted(affected):
            old, now = self._hops.pop(name, ()), self._plan(name)
            if now:
                self._hops[name] = now
            for hop in old:
                self._tunnels.get(hop.tunnel, set()).discard(name)
            for hop in filter(lambda hop: hop.tunnel, now):
                self._tunnels.setdefault(hop.tunnel, set()).add(name)
            self._limited += sum(hop.route.mtu > 0 for hop in now) - sum(hop.route.mtu > 0 for hop in old)
            for hops, step in ((old, -1), (now, 1)):
                for route in (route for hop in hops for route in hop.routes[1:]):
                    self._shared[route.destination] += step
                    if not self._shared[route.destination]:
                        del self._shared[route.destination]
            gone += [hop for hop in old if hop not in now]
            new += [hop for hop in now if hop not in old]
        return Moved(tuple(gone), tuple(new))

    def _take_addresses(self, before: Mapping[str, Node], changed: Set[str]) -> None:
        """Note where tunnelled packets may come from; two nodes may have one address for a while."""
        for version, counts in self._addresses.items():
            for nodes, step in ((before, -1), (self._nodes, 1)):
                found = (nodes[name] for name in changed if name in nodes and name != self._me)
                for address in filter(None, (tunnel_address(node, version) for node in found)):
                    counts[address] += step
                    if not counts[address]:
                        del counts[address]

    def _take_claims(
        self, before: Mapping[str, Node], after: Mapping[str, Node], changed: Set[str]
    ) -> set[str]:
        """Note who has which MAC and keys; return the nodes whose right to theirs may have changed."""
        affected: set[str] = set()
        for name in changed:
            old, new = before.get(name), after.get(name)
            was, is_ = _claims(old) if old else set(), _claims(new) if new else set()
            for claim in was - is_:
                self._holders[claim].discard(name)
                affected |= self._holders[claim]
                if not self._holders[claim]:
                    del self._holders[claim]
            for claim in is_ - was:
                affected |= self._holders.setdefault(claim, set())
                self._holders[claim].add(name)
        return affected

    def _plan(self, name: str) -> tuple[Hop, ...]:
        """Return the hops of one node; note what is wrong with them."""
        node, found, problems = self._nodes.get(name), [], []
        self._problems.pop(name, None)
        for cidr in self._ranges.accepted.get(name, ()) if node else ():
            assert node
            if name == self._me:
                found.append(Hop(name, cidr, "local", "", (Route(cidr),)))
                continue
            ways = (way(self._site, node, cidr) for way in CHOICES[self._site.backend])
            hop = next((hop for hop in ways if hop), None)
            rivalry = self._rivalry(hop) if hop else ""
            if hop is None or rivalry:
                why = rivalry or self._obstacle(node, cidr)
                problems.append(f"node {name}: no way to its pods in {cidr}: {why}")
                if self._site.backend == "wireguard":
                    found.append(closed(node, cidr))
                continue
            if hop.problem:
                problems.append(f"node {name}: pods in {cidr}: {hop.problem}")
            found.append(hop)
        if problems:
            self._problems[name] = tuple(problems)
        return tuple(found)

    def _rivalry(self, hop: Hop) -> str:
        """Return what another node has as well and counts for; "" when it is this one that counts."""
        for claim in hop.claims:
            holders = self._holders.get(claim, {hop.node})
            first = self._me if self._me in holders else min(holders)
            if first != hop.node:
                what = "tunnel MAC" if claim == mac_of(self._nodes[hop.node]) else "WireGuard key"
                return f"its {what} {claim} is that of node {first}"
        return ""

    def _obstacle(self, node: Node, cidr: str) -> str:
        """Return why no backend leads to a node."""
        version, site = version_of(cidr), self._site
        if not node.addresses:
            return "it has no InternalIP"
        if site.backend == "wireguard" and not node.wireguard_keys:
            return "its Node object has no keys for WireGuard (annotation podwire.io/wireguard-keys)"
        direct = site.backend == "direct"
        far = [a for a in node.addresses if not direct or version_of(a) == version]
        if not far:
            return f"it has no IPv{version} InternalIP, which backend direct needs"
        unknown = [a for a in far if not site.underlay.way(a)]
        if len(unknown) == len(far):
            return f"{', '.join(unknown)} is on no subnet of ours, and there is no default route"
        if not direct and version not in site.ranges:
            return f"this node has no IPv{version} podCIDR"
        if not direct and not site.node.addresses:
            return "this node has no InternalIP"
        return f"none of its addresses can be reached from ours ({', '.join(site.node.addresses) or 'none'})"


def _claims(node: Node) -> set[str]:
    """Return what only this node may have."""
    return {mac_of(node), *node.wireguard_keys}
