"""Whose address is replaced on the way out, and where node ports are: Nodes → what the rules need. Pure."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Generic, TypeVar

from netlink.family import Family
from node.ranges import accepted_ranges
from proxy.dataplane import NodeRanges
from proxy.model import Node
from proxy.nftables.spans import Members

T = TypeVar("T")

ALWAYS_KEPT = ("169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8")
"""Link-local and multicast destinations: they never leave a link, so nobody translates back."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says.

    In a family that is not in `masquerade` pods keep their address everywhere: the network outside must know
    the way back. Service traffic is masqueraded all the same, where its replies would go astray without.

    Node ports are on those of the node's addresses that are in `node_ports`; none given: on the addresses in
    its Node object (kube-proxy's --nodeport-addresses primary). `egress` are addresses that pods get towards
    the outside, at most one of each family. `pools` have addresses of this node's pods beside its podCIDRs,
    which are the outside's own where `pools_are_outside` (flat mode): pods keep them.
    """

    no_masquerade: Sequence[str] = ()
    masquerade: Set[Family] = frozenset(Family)
    node_ports: Sequence[str] = ()
    egress: Sequence[str] = ()
    pools: tuple[str, ...] = ()
    pools_are_outside: bool = False


class Cluster:
    """The pod ranges and addresses of all nodes, kept by what changed."""

    def __init__(self) -> None:
        self._ranges = _Tally[tuple[str, ...]](lambda cidrs: cidrs)
        self._addresses = _Tally[Node](lambda node: node.addresses)

    def take(
        self,
        nodes: Mapping[str, Node],
        accepted: Mapping[str, tuple[str, ...]],
        changed: Collection[str] | None = None,
    ) -> None:
        """Take what became of the nodes, and of the podCIDRs that count, by node.

        `changed` are those of which a Node object or a podCIDR is another one than at the last call; None:
        whoever it is.
        """
        self._addresses.take(nodes, changed)
        self._ranges.take(accepted, changed)

    def ranges(self, me: Node, policy: Policy) -> NodeRanges:
        """Return what the rules on a node need; the node may be one that no Node object tells of."""
        own = self._ranges.held.get(me.name, ())
        leaving = own if policy.pools_are_outside else (*own, *policy.pools)
        return NodeRanges(
            pod_cidrs=self._ranges.members.changed(come=policy.pools),
            node_addresses=self._addresses.members,
            local_pod_cidrs=tuple(c for c in leaving if _family(c) in policy.masquerade),
            no_masquerade=(*ALWAYS_KEPT, *map(_canonical, policy.no_masquerade)),
            node_ports=tuple(map(_canonical, policy.node_ports)) or _hosts(me.addresses),
            node_pods=(*own, *policy.pools),
            egress=egress(me, policy.egress),
        )


class _Tally(Generic[T]):
    """The set of what nodes have, where several can have the same; the same object is no change."""

    def __init__(self, texts: Callable[[T], Collection[str]]) -> None:
        self._texts = texts
        self._counts: Counter[str] = Counter()
        self.held: dict[str, T] = {}
        self.members = Members()

    def take(self, now: Mapping[str, T], changed: Collection[str] | None) -> None:
        """Take what nodes have now, by their names."""
        held = self.held
        if changed is None:
            changed = {name for name, value in now.items() if held.get(name) is not value}
            changed |= held.keys() - now.keys()
        ended = [text for name in changed if name in held for text in self._texts(held.pop(name))]
        come = {name: now[name] for name in changed if name in now}
        held.update(come)
        begun = [text for value in come.values() for text in self._texts(value)]
        self._counts.update(begun)
        self._counts.subtract(ended)
        away = {text for text in ended if not self._counts[text]}
        for text in away:
            del self._counts[text]
        self.members = self.members.changed(away, begun)


def ranges(
    nodes: Mapping[str, Node],
    me: str,
    extra: Sequence[str] = (),
    masquerade: Set[Family] = frozenset(Family),
    node_ports: Sequence[str] = (),
    egress: Sequence[str] = (),
) -> NodeRanges:
    """Return what the rules on a node need, from all nodes at once; `Policy` has what the others mean."""
    accepted, _ = accepted_ranges(nodes, me)
    cluster = Cluster()
    cluster.take(nodes, accepted)
    return cluster.ranges(nodes.get(me, Node(me)), Policy(extra, masquerade, node_ports, egress))


def egress(me: Node, configured: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses that a node's pods get towards the outside: its annotation counts first."""
    chosen: dict[Family, str] = {}
    for address in (*me.egress_addresses, *map(_address, configured)):
        chosen.setdefault(_family(address), address)
    return tuple(chosen[family] for family in Family if family in chosen)


def egress_problems(chosen: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Return a sentence for each chosen address that none of the node's interfaces has."""
    return tuple(
        f"pods' egress address {address} is on no interface of this node: answers come back only if the "
        "network routes it to this node"
        for address in chosen
        if address not in own
    )


def _family(text: str) -> Family:
    return Family.V6 if ":" in text else Family.V4


def _address(text: str) -> str:
    return str(ip_address(text))


@functools.lru_cache
def _canonical(cidr: str) -> str:
    return str(ip_network(cidr))


def _hosts(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{address}/{_family(address).bits}" for address in addresses)
