"""Which routes lead to the pods of other nodes: Nodes → routes. Pure."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from netlink.requests import Route
from proxy.model import Node

Network = IPv4Network | IPv6Network


class Gateway(NamedTuple):
    """A router, and the interface (index) it is on, without which a link-local address says nothing."""

    address: str
    oif: int | None = None


class Underlay(NamedTuple):
    """How this node is connected: the subnets it is on, and its default gateway by IP version."""

    subnets: tuple[Network, ...] = ()
    gateways: Mapping[int, Gateway] = {}


class NodeRoute(NamedTuple):
    """A route and the node whose pods it leads to."""

    route: Route
    node: str


def plan(
    nodes: Mapping[str, Node], me: str, underlay: Underlay
) -> tuple[tuple[NodeRoute, ...], tuple[str, ...]]:
    """Return the routes that this node needs, and what is wrong, in sentences.

    A peer on a subnet of ours is reached directly; any other by the default gateway, whose network must
    know the pod ranges then (a cloud's route table). Our own range is unreachable where no pod has the
    address, so that packets to it do not travel between us and the gateway until they die.
    """
    routes: list[NodeRoute] = []
    problems: list[str] = []
    ranges, conflicts = accepted_ranges(nodes, me)
    for name, cidr in ranges:
        if name == me:
            routes.append(NodeRoute(Route(cidr), name))
            continue
        via = _next_hop(nodes[name], ip_network(cidr).version, underlay)
        if via:
            routes.append(NodeRoute(Route(cidr, gateway=via.address, oif=via.oif), name))
        else:
            problems.append(f"node {name}: no way to its pods in {cidr}: {_obstacle(nodes[name], cidr)}")
    return tuple(routes), (*conflicts, *problems)


def accepted_ranges(nodes: Mapping[str, Node], me: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (node, podCIDR) pairs without overlaps, and a sentence for each range that was left out.

    Our own range counts first, then the nodes by name, so that every order of events ends the same.
    """
    accepted: list[tuple[str, str]] = []
    problems: list[str] = []
    claims = sorted((name != me, name, cidr) for name, node in nodes.items() for cidr in node.pod_cidrs)
    taken: list[tuple[int, int, int, str]] = []  # (version, first, last, owner), disjoint and in order
    for _, name, cidr in claims:
        network = ip_network(cidr)
        span = (network.version, int(network.network_address), int(network.broadcast_address))
        position = bisect(taken, span)
        around = taken[max(position - 1, 0) : position + 1]
        holder = next((t for t in around if t[0] == span[0] and t[1] <= span[2] and span[1] <= t[2]), None)
        if holder:
            problems.append(
                f"node {name}: podCIDR {cidr} overlaps {holder[3]}, which counts; it gets no route"
            )
        else:
            taken.insert(position, (*span, f"{cidr} of node {name}"))
            accepted.append((name, cidr))
    return accepted, problems


def _obstacle(node: Node, cidr: str) -> str:
    version = ip_network(cidr).version
    far = [a for a in node.addresses if ip_address(a).version == version]
    if not far:
        return f"it has no IPv{version} InternalIP"
    return f"{far[0]} is on no subnet of ours, and there is no default route"


def _next_hop(node: Node, version: int, underlay: Underlay) -> Gateway | None:
    for text in node.addresses:
        address = ip_address(text)
        if address.version == version:
            on_link = any(address in s for s in underlay.subnets if s.version == version)
            return Gateway(text) if on_link else underlay.gateways.get(version)
    return None
