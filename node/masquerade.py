"""Whose address is replaced on the way out, and where node ports are: Nodes → what the rules need. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from ipaddress import ip_address, ip_network

from netlink.family import Family
from node.routes import accepted_ranges
from proxy.model import Node
from proxy.nftables.dataplane import NodeRanges

ALWAYS_KEPT = ("169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8")
"""Link-local and multicast destinations: they never leave a link, so nobody translates back."""


def ranges(
    nodes: Mapping[str, Node],
    me: str,
    extra: Sequence[str] = (),
    masquerade: Set[Family] = frozenset(Family),
    node_ports: Sequence[str] = (),
) -> NodeRanges:
    """Return the pod ranges and where pods keep their own address: all pods, all nodes, `extra` CIDRs.

    In a family that is not in `masquerade` pods keep it everywhere: the network outside must know the way
    back. Service traffic is masqueraded all the same, where its replies would go astray without.

    Node ports are on those of the node's addresses that are in `node_ports`; none given: on the addresses
    in its Node object (kube-proxy's --nodeport-addresses primary).
    """
    accepted, _ = accepted_ranges(nodes, me)
    own = nodes[me].addresses if me in nodes else ()
    pod_cidrs = tuple(cidr for _, cidr in accepted)
    hosts = _hosts(address for node in nodes.values() for address in node.addresses)
    return NodeRanges(
        pod_cidrs=pod_cidrs,
        local_pod_cidrs=tuple(
            cidr for name, cidr in accepted if name == me and Family(ip_network(cidr).version) in masquerade
        ),
        no_masquerade=(*pod_cidrs, *hosts, *ALWAYS_KEPT, *extra),
        node_ports=tuple(node_ports) or _hosts(own),
        node_pods=tuple(cidr for name, cidr in accepted if name == me),
    )


def _hosts(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{address}/{ip_address(address).max_prefixlen}" for address in addresses)
