"""The check `peers`: do other nodes answer, and do their pods' ranges.

Every node has the network address of each of its podCIDRs, and answers there; no pod has it. So an answer
shows that packets to pods of that node get there and back, and an answer of the node's own address beside
it which part is broken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from node.doctor.findings import Check, Finding, Severity, few, shown
from node.doctor.icmp import SILENCE, Answer, Kind, Probe, Prober
from node.doctor.view import VXLAN, WIREGUARD, Context, PeerRoute, TunnelPorts

NAME = "peers"


def targets(routes: Iterable[PeerRoute]) -> tuple[str, ...]:
    """Return the addresses that tell of peers: their own, and those of their ranges."""
    found = (address for r in routes for address in (r.peer, r.range_address) if address)
    return tuple(dict.fromkeys(found))


def judge(routes: tuple[PeerRoute, ...], answers: Mapping[str, Answer], tunnel: TunnelPorts) -> Check:
    """Return what is wrong with each node, and how long those that answer take."""
    findings: list[Finding] = []
    small = [f"{r.destination} of node {r.node}" for r in routes if not r.range_address]
    gone = _silent_nodes(routes, answers)
    lost: dict[str, list[str]] = {}
    for route in routes:
        if route.node in gone and route.range_address:
            lost.setdefault(route.node, []).append(route.destination)
    for node, addresses in gone.items():
        ranges = lost.get(node)
        words = f"node {node} does not answer on its address {shown(addresses)}"
        if ranges:
            words += f", nor do its pods' ranges {shown(ranges)}"
        remedy = f"see whether the node runs, and what is between: ping {addresses[0]}"
        findings.append(Finding(words, remedy))
    for route in routes:
        if route.node not in gone and route.range_address:
            answer = answers.get(route.range_address, SILENCE)
            if answer.kind is not Kind.REPLY:
                findings.append(_broken(route, answers.get(route.peer, SILENCE), answer, tunnel))
    notes = []
    if small:
        notes.append(f"not probed, as too small for an address that no pod gets: {shown(small)}")
    return Check(
        NAME, few(findings, "nodes or ranges that do not answer"), (*notes, *_times(routes, answers))
    )


def _silent_nodes(routes: tuple[PeerRoute, ...], answers: Mapping[str, Answer]) -> dict[str, list[str]]:
    """Return the nodes of which nothing answers, and their addresses."""
    found: dict[str, list[str]] = {}
    for route in routes:
        if route.peer and route.peer not in found.setdefault(route.node, []):
            found[route.node].append(route.peer)
    alive = {
        r.node
        for r in routes
        for address in (r.peer, r.range_address)
        if address and answers.get(address, SILENCE).kind is Kind.REPLY
    }
    told = {  # one that says "no such host" itself is there as well
        r.node for r in routes if r.peer and answers.get(r.range_address, SILENCE).sender == r.peer
    }
    return {node: some for node, some in found.items() if some and node not in alive | told}


def _broken(route: PeerRoute, own: Answer, answer: Answer, tunnel: TunnelPorts) -> Finding:
    """Return what is said of a range that does not answer while its node does."""
    name, cidr = route.node, route.destination
    if answer.kind is Kind.NO_ROUTE:
        words = f"node {name}: packets to its pods' range {cidr} are refused on this node: {answer.detail}"
        return Finding(words, f"ip route get {route.range_address}; nft list ruleset, for what drops output")
    if answer.kind is Kind.UNREACHABLE and answer.sender == route.peer:
        words = (
            f"node {name} gets packets for its pods' range {cidr}, but does not know {route.range_address}"
        )
        remedy = f"see on node {name} whether its podwire runs and is of this version: podwire status"
        return Finding(words, remedy, Severity.WARNING)
    if own.kind is Kind.REPLY:
        words = f"node {name} answers on {route.peer}, but its pods' range {cidr} does not"
    else:
        words = f"pods' range {cidr} of node {name} does not answer"
    if answer.kind is not Kind.SILENCE:
        words += f": {answer.sender or 'this node'} says {answer.kind.value}"
    if route.backend == VXLAN:
        words += f"; {tunnel} may be blocked on the way"
        remedy = f"let {tunnel.ports} pass between this node and {route.peer}, both ways, in every firewall"
    elif route.backend == WIREGUARD:
        words += f"; {tunnel} may be blocked on the way, or one of both nodes does not know the other's keys"
        remedy = f"podwire wireguard, here and on node {name}; let {tunnel.ports} pass in every firewall"
    elif route.via and route.via != route.peer:
        words += f"; its route is by the gateway {route.via}"
        remedy = f"have {route.via} route {cidr} to {route.peer or name}, or set network.backend to auto"
    else:
        remedy = (
            f"podwire doctor on node {name}: does it forward, and does a firewall there drop pods' packets"
        )
    return Finding(words, remedy)


def _times(routes: tuple[PeerRoute, ...], answers: Mapping[str, Answer]) -> list[str]:
    """Return a sentence on how long answers of ranges took."""
    took = sorted(
        (answer.seconds, r.node)
        for r in routes
        if (answer := answers.get(r.range_address, SILENCE)).kind is Kind.REPLY
    )
    if not took:
        return []
    nodes = len({node for _, node in took})
    middle, (slowest, name) = took[len(took) // 2][0], took[-1]
    words = f"pods' ranges of {nodes} {'node answers' if nodes == 1 else 'nodes answer'}"
    return [f"{words} after {middle * 1000:.1f} ms (median), {slowest * 1000:.1f} ms at most (node {name})"]


def check(context: Context) -> Check:
    """Probe the nodes and the ranges of their pods."""
    if context.view is None:
        return Check(NAME, skipped="which nodes there are is not known, as the daemon does not answer")
    routes = context.probed()
    addresses = targets(routes)
    if not addresses:
        return Check(NAME, notes=("there is no other node",))
    context.progress(f"probing {len({r.node for r in routes})} nodes")
    try:
        with Prober() as prober:
            answers = prober.ask([Probe(address) for address in addresses], context.timeout)
    except PermissionError:
        return Check(NAME, skipped="probes need CAP_NET_RAW")
    return judge(routes, dict(zip(addresses, answers, strict=True)), context.view.tunnel_ports)
