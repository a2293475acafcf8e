"""The check `mtu`: does the network carry what the routes promise, and where does it end.

Probes are never fragmented. One that is lost at the size of the route is followed by smaller ones (bisection)
and, on the way to the node itself, by large ones that expire at each router in turn: the last one that
answers these is where large packets still got. Neither needs the routers to say that a packet was too big,
which many firewalls drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from netlink.decode import Link
from netlink.requests import Route
from netlink.rtnl import Rtnl
from node.backends import vxlan, wireguard
from node.doctor.findings import Check, Finding, Severity, few, shown
from node.doctor.icmp import Answer, Kind, Probe, Prober
from node.doctor.view import VXLAN, WIREGUARD, Context, PeerRoute

NAME = "mtu"
OVERHEAD = {VXLAN: vxlan.OVERHEAD, WIREGUARD: wireguard.OVERHEAD}
"""Bytes that tunnels add, by the IP version of the network between nodes."""
TITLES = {VXLAN: "VXLAN", WIREGUARD: "WireGuard"}
LEAST = {4: 576, 6: 1280}
"""What every network has to carry (RFC 791, RFC 8200)."""
ROUNDS = 17
"""Of bisection: more than 65535 sizes need."""
SEARCHED = 8
"""Paths that are searched at most; others are said to be lost, as often all are for the same reason."""
HOPS = 12
SHORTEST_SECONDS, TRIPS = 0.15, 6.0
"""How long later probes wait: some round trips of the first, which was answered."""


@dataclass(frozen=True, slots=True)
class Path:
    """A way to probe: to an address, with packets of `promised` bytes.

    `outer`: to the node itself, as the packets of a `tunnel` go; `overhead` is what is added around these.
    """

    node: str
    address: str
    promised: int
    outer: bool = False
    overhead: int = 0
    tunnel: str = "VXLAN"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of a path whose promise is not kept.

    `passes` is the largest size that came through, 0 if that was not searched; `router` said that packets are
    too big, of more than `router_mtu` bytes; `last_hop` is the last router that large packets reached.
    """

    path: Path
    passes: int = 0
    router: str = ""
    router_mtu: int = 0
    last_hop: str = ""
    here: bool = False


def paths(routes: Iterable[PeerRoute], mtu_of: Mapping[str, int]) -> tuple[Path, ...]:
    """Return what is to be probed: each range and, of tunnelled ones, the way of the outer packets.

    `mtu_of` has what the kernel promises for ranges whose route says nothing itself.
    """
    found: dict[tuple[str, bool], Path] = {}
    for route in routes:
        promised = route.mtu or mtu_of.get(route.range_address, 0)
        if not route.range_address or not promised:
            continue
        tunnelled = route.backend in OVERHEAD and route.peer
        overhead = OVERHEAD[route.backend][ip_address(route.peer).version] if tunnelled else 0
        inner = Path(route.node, route.range_address, promised, overhead=overhead)
        found[route.range_address, False] = inner
        if tunnelled:
            found[route.peer, True] = Path(
                route.node, route.peer, promised + overhead, True, 0, TITLES[route.backend]
            )
    return tuple(found.values())


def judge(measured: Sequence[Measured], lost: Sequence[Path] = ()) -> tuple[Finding, ...]:
    """Return a finding for each path that does not carry what it should.

    `lost` are those that were not searched. Of a tunnel whose outer packets are lost, that says it all.
    """
    outer = {m.path.node for m in measured if m.path.outer}
    findings = []
    for found in measured:
        if found.path.outer or found.path.node not in outer:
            findings.append(_finding(found))
    more = [p for p in lost if p.outer or p.node not in outer]
    if more:
        names = shown(p.node for p in more)
        remedy = "the same as of the nodes above; network.mtu counts for all"
        findings.append(Finding(f"large packets to nodes {names} are lost as well", remedy))
    return few(findings, "paths")


def _finding(found: Measured) -> Finding:
    path = found.path
    whom = f"to node {path.node} ({path.address})" if path.outer else f"to pods of node {path.node}"
    words = f"packets of {path.promised} bytes {whom} are lost"
    if path.outer:
        words = f"{path.tunnel}'s {words}"
    if found.passes:
        words += f"; up to {found.passes} pass"
    if found.here:
        words += "; the interface that they leave by carries no larger ones"
    elif found.router:
        limit = f" than {found.router_mtu} bytes" if found.router_mtu else ""
        words += f"; {found.router} refuses larger ones{limit}"
    elif found.last_hop:
        words += f"; behind {found.last_hop} nothing large comes back"
    else:
        words += "; no router says where"
    if not found.passes:
        return Finding(words, f"network.mtu is what passes: ping -M do -s SIZE {path.address}")
    remedy = f"set network.mtu to {found.passes + path.overhead} on all nodes, or let the network carry more"
    return Finding(words, remedy)


def search(prober: Prober, path: Path, seconds: float, full: Answer) -> Measured:
    """Find what a path carries, by a bounded number of probes.

    `seconds` is how long a small one takes, `full` what became of the first large one: a router says only
    now and then that one was too big.
    """
    wait = max(SHORTEST_SECONDS, TRIPS * seconds)
    least = LEAST[ip_address(path.address).version]
    low, high = least - 1, path.promised
    found = told(Measured(path), full)
    guess = found.router_mtu
    for _ in range(ROUNDS):
        if high - low <= 1:
            break
        size = guess if low < guess < high else (low + high) // 2
        answer = prober.ask([Probe(path.address, size)], wait)[0]
        if answer.kind is Kind.REPLY:
            low, guess = size, size + 1 if size == guess else 0
        else:
            high, found = size, told(found, answer)
            guess = answer.mtu
    found = replace(found, passes=low if low >= least else 0)
    if found.router or found.here:
        return found
    return replace(found, last_hop=_last_hop(prober, path, wait))


def told(found: Measured, answer: Answer) -> Measured:
    """Return what is known after an answer: somebody may have said that a packet was too big."""
    if answer.kind is not Kind.TOO_BIG:
        return found
    if not answer.sender:
        return replace(found, here=True)
    return replace(found, router=answer.sender, router_mtu=answer.mtu)


def _last_hop(prober: Prober, path: Path, wait: float) -> str:
    """Return the last router that packets of the promised size reached, "" if none says so."""
    walk = [Probe(path.address, path.promised, ttl) for ttl in range(1, HOPS + 1)]
    return next(
        (a.sender for a in reversed(prober.ask(walk, wait)) if a.kind is Kind.EXPIRED),
        "",
    )


def pods(links: Iterable[Link], routes: Iterable[Route], prefix: str) -> tuple[Finding, ...]:
    """Return what is wrong with the MTU of pods' interfaces, which begin with `prefix`."""
    known = {link.index: link for link in links}
    default = next(
        (r for r in routes if r.gateway and ip_address(r.destination.split("/")[0]).is_unspecified), None
    )
    egress = known.get(default.oif or 0) if default else None
    if egress is None:
        return ()
    large = [k.name for k in known.values() if k.name.startswith(prefix) and k.mtu > egress.mtu]
    if not large:
        return ()
    most = max(k.mtu for k in known.values() if k.name in large)
    words = (
        f"pods send packets of up to {most} bytes, but {egress.name}, which leads out, carries {egress.mtu}"
    )
    remedy = (
        f"set pods.mtu to {egress.mtu}; it counts for pods that come from then on ({shown(large)} are there)"
    )
    return (Finding(words, remedy, Severity.WARNING),)


def check(context: Context) -> Check:
    """Probe each way at the size that its route promises."""
    with Rtnl() as rtnl:
        found = pods(rtnl.links(), rtnl.routes(), "pwpod")
    if context.view is None:
        return Check(NAME, found, skipped="which nodes there are is not known, as the daemon does not answer")
    ways = paths(context.probed(), promised(context.probed()))
    context.progress(f"probing {len(ways)} paths with large packets")
    try:
        with Prober() as prober:
            measured, lost, silent = measure(prober, ways, context)
    except PermissionError:
        return Check(NAME, found, skipped="probes need CAP_NET_RAW")
    notes = [f"not probed, as they do not answer small packets: {shown(silent)}"] if silent else []
    return Check(NAME, (*found, *judge(measured, lost)), tuple(notes))


def measure(
    prober: Prober, ways: Sequence[Path], context: Context
) -> tuple[list[Measured], list[Path], list[str]]:
    """Return the paths that do not keep their promise: some searched, others not; and who does not answer."""
    small = prober.ask([Probe(p.address) for p in ways], context.timeout)
    good = [(p, a) for p, a in zip(ways, small, strict=True) if a.kind is Kind.REPLY]
    silent = [
        f"{p.address} of node {p.node}" for p, a in zip(ways, small, strict=True) if a.kind is not Kind.REPLY
    ]
    slowest = max((a.seconds for _, a in good), default=0.0)
    wait = min(context.timeout, max(2 * SHORTEST_SECONDS, TRIPS * slowest))
    full = prober.ask([Probe(p.address, p.promised) for p, _ in good], wait)
    bad = [(p, s, a) for (p, s), a in zip(good, full, strict=True) if a.kind is not Kind.REPLY]
    bad.sort(key=lambda each: not each[0].outer)
    measured = []
    for at, (path, first, whole) in enumerate(bad[:SEARCHED], start=1):
        context.progress(f"searching what passes to node {path.node} ({at} of {min(len(bad), SEARCHED)})")
        measured.append(search(prober, path, first.seconds, whole))
    return measured, [path for path, _, _ in bad[SEARCHED:]], silent


def promised(routes: Iterable[PeerRoute]) -> dict[str, int]:
    """Return the size in bytes that the kernel promises, for range addresses whose route does not say."""
    unsaid = [r.range_address for r in routes if r.range_address and not r.mtu]
    with Rtnl() as rtnl:
        known = {link.index: link.mtu for link in rtnl.links()} if unsaid else {}
        ways = ((address, rtnl.route_to(address)) for address in unsaid)
        return {a: known[w.oif] for a, w in ways if w and w.oif in known}
