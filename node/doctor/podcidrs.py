"""The check `podcidrs`: does every node have ranges of its own, and is nothing else in them."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network
from typing import NamedTuple

from netlink.requests import ROUTE_PROTOCOL, Route
from netlink.rtnl import Rtnl
from node.backends.hops import Network
from node.doctor.findings import Check, Finding, Severity, few
from node.doctor.view import Context, PeerRoute, View
from node.underlay import OWN_INTERFACE

NAME = "podcidrs"
TUNNELS = ("pwvxlan", "pwwg")


class Local(NamedTuple):
    """What this node has: addresses as (interface, CIDR), and other programs' routes as (CIDR, interface)."""

    addresses: tuple[tuple[str, str], ...]
    routes: tuple[tuple[str, str], ...]


def judge(view: View, local: Local) -> Check:
    """Return what is wrong with ranges."""
    findings = []
    if not view.pod_cidrs and view.mode != "flat":
        words = f"node {view.node} has no podCIDR: no pod can be added"
        remedy = (
            "have the controller manager allocate them (--allocate-node-cidrs), or kubernetes.clusterCIDRs"
        )
        findings.append(Finding(words, remedy))
    findings += _overlaps(view)
    findings += _near(view, local)
    findings += _services(view)
    versions = {ip_network(c).version for c in view.pod_cidrs}
    notes = []
    if lacking := sorted({r.node for r in view.peers if r.network.version not in versions}):
        notes.append(f"pods here have no address of the family of some ranges of: {', '.join(lacking[:10])}")
    return Check(NAME, few(findings, "findings about ranges"), tuple(notes) if view.pod_cidrs else ())


def _overlaps(view: View) -> list[Finding]:
    """Return a finding for each range that overlaps another, of those that the daemon goes by.

    Ranges that it leaves out, as they overlap, are among its own problems.
    """
    findings = [
        Finding(
            p, "give one of the nodes another podCIDR: kubectl delete node NAME, then let it register anew"
        )
        for p in view.problems
        if "overlaps" in p
    ]
    spans = sorted(
        (
            (r.network.version, int(r.network.network_address), int(r.network.broadcast_address), r)
            for r in view.routes
        ),
        key=lambda span: span[:3],
    )
    before: tuple[int, int, int, PeerRoute] | None = None
    for span in spans:
        if before and span[0] == before[0] and span[1] <= before[2] and span[3].node != before[3].node:
            words = f"podCIDR {span[3].destination} of node {span[3].node} overlaps {before[3].destination}"
            findings.append(Finding(f"{words} of node {before[3].node}", "give one of them another podCIDR"))
        before = span if before is None or before[0] != span[0] or span[2] > before[2] else before
    return findings


def _near(view: View, local: Local) -> list[Finding]:
    """Return a finding for each range that has to do with what this node is connected to."""
    findings = []
    ranges = [(r.network, r.node) for r in view.routes]
    for name, cidr in local.addresses:
        address = ip_interface(cidr)
        for network, node in _holding(ranges, address.network):
            words = f"podCIDR {network} of node {node} overlaps {address.network}, the subnet of {name} here"
            findings.append(
                Finding(words, f"give node {node} a podCIDR outside of the network that nodes are on")
            )
    for destination, name in local.routes:
        for network, node in _holding(ranges, ip_network(destination)):
            where = f" ({name})" if name else ""
            words = f"podCIDR {network} of node {node} overlaps the route to {destination}{where}"
            remedy = f"ip route show {destination}: take it away if it is a leftover, or use other podCIDRs"
            findings.append(Finding(words, remedy, Severity.WARNING))
    return list(dict.fromkeys(findings))


def _holding(ranges: Iterable[tuple[Network, str]], network: Network) -> list[tuple[Network, str]]:
    return [(r, node) for r, node in ranges if r.version == network.version and r.overlaps(network)]


def _services(view: View) -> list[Finding]:
    """Return a finding for each service's address that is in a range of pods."""
    ranges = {r.network: r.node for r in view.routes}
    lengths = sorted({(network.version, network.prefixlen) for network in ranges})
    findings = []
    for name, text in view.service_addresses:
        version = ip_address(text).version
        for bits in (bits for known, bits in lengths if known == version):
            network = ip_network(f"{text}/{bits}", strict=False)
            if network in ranges:
                words = f"service {name} has the address {text}, which is in podCIDR {network}"
                remedy = "the ranges of services and of pods must not overlap"
                findings.append(Finding(f"{words} of node {ranges[network]}", remedy))
    return findings


def local(rtnl: Rtnl) -> Local:
    """Return what the node is connected to by others than podwire: no default routes, no single addresses."""
    names = {link.index: link.name for link in rtnl.links()}
    others = {i: n for i, n in names.items() if not OWN_INTERFACE.fullmatch(n) and not n.startswith(TUNNELS)}
    addresses = tuple(
        (others[a.index], a.cidr)
        for a in rtnl.addresses()
        if a.index in others and not ip_interface(a.cidr).is_link_local
    )
    routes = tuple((r.destination, others.get(r.oif or 0, "")) for r in rtnl.routes() if _foreign(r, others))
    return Local(addresses, routes)


def _foreign(route: Route, others: dict[int, str]) -> bool:
    """Whether a route is somebody else's, and neither a default one nor that of an address (the kernel's)."""
    network = ip_network(route.destination)
    wide = network.prefixlen > 0 and not network.is_link_local and not network.is_multicast
    return wide and route.protocol not in (ROUTE_PROTOCOL, 2) and (route.oif is None or route.oif in others)


def check(context: Context) -> Check:
    """Compare ranges with each other, with this node's networks, and with services."""
    if context.view is None:
        return Check(NAME, skipped="which ranges there are is not known, as the daemon does not answer")
    with Rtnl() as rtnl:
        return judge(context.view, local(rtnl))
