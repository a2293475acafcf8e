"""The check `routes`: does the kernel hold what the daemon wants, routes and the entries of tunnels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from netlink.errors import NetlinkError
from netlink.requests import ROUTE_PROTOCOL, Route, Vxlan
from netlink.rtnl import Rtnl
from netlink.wireguard import Device, WireGuard
from node.backends import DEVICES, wireguard
from node.backends.hops import NODE_TABLE
from node.backends.vxlan import NAMES
from node.doctor.findings import Check, Finding, Severity, few
from node.doctor.view import LOCAL, VXLAN, WIREGUARD, Context, PeerRoute, View

NAME = "routes"
MENDS = "the daemon sets it within 30 s; if it stays, see its log"
PERMANENT, LOOPBACK = 0x80, 1


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A VXLAN device and its entries: MAC by inner address, outer address by MAC."""

    name: str
    up: bool
    made: Vxlan | None
    neighbours: Mapping[str, str] = field(default_factory=dict)
    forwarding: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Secured:
    """A WireGuard device, whether it is up; `made` is None for what is none."""

    name: str
    up: bool
    made: Device | None


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel holds of our routes, but those to pods: in the main table, and in that of nodes."""

    routes: tuple[Route, ...]
    nodes: tuple[Route, ...] = ()
    tunnels: tuple[Tunnel, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    secured: tuple[Secured, ...] = ()


def judge(view: View, seen: Observed) -> Check:
    """Return where the kernel differs from what the daemon wants."""
    findings = [*_routes(view, seen), *_nodes(view, seen), *_tunnels(view, seen), *_secured(view, seen)]
    return Check(NAME, few(findings, "differences"))


def _routes(view: View, seen: Observed) -> Iterator[Finding]:
    # Behind a route into WireGuard is one that refuses what must not leave as it is.
    there = {r.destination: r for r in sorted(seen.routes, key=lambda r: not r.unreachable)}
    wanted = {r.destination: r for r in view.routes if not (view.mode == "bridge" and r.node == view.node)}
    for destination, want in wanted.items():
        route = there.get(destination)
        if route is None:
            yield Finding(f"the route to {destination} of node {want.node} is missing", MENDS)
            continue
        if want.via and route.gateway != want.via:
            words = f"the route to {destination} of node {want.node} is by {route.gateway}, not by {want.via}"
            yield Finding(words, MENDS)
        elif want.device and want.backend != LOCAL and seen.names.get(route.oif or 0) != want.device:
            words = f"the route to {destination} of node {want.node} is over {seen.names.get(route.oif or 0)}"
            yield Finding(f"{words}, not over {want.device}", MENDS)
        elif want.mtu and route.mtu != want.mtu:
            words = f"the route to {destination} of node {want.node} has the MTU {route.mtu}, not {want.mtu}"
            yield Finding(words, MENDS)
    for destination, route in there.items():
        if destination not in wanted:
            words = f"a stale route of podwire's leads to {destination}, which is of no node"
            yield Finding(words, _removal(route), Severity.WARNING)


def _nodes(view: View, seen: Observed) -> Iterator[Finding]:
    """Yield stale routes from pods to nodes."""
    known = {r.peer for r in view.peers if r.peer}
    for route in seen.nodes:
        if route.destination.split("/")[0] not in known:
            words = f"a stale route of podwire's in table {NODE_TABLE} leads to {route.destination}, no node"
            yield Finding(words, f"{_removal(route)} table {NODE_TABLE}", Severity.WARNING)


def _removal(route: Route) -> str:
    return f"ip route del {route.destination} proto {ROUTE_PROTOCOL}"


def _tunnels(view: View, seen: Observed) -> Iterator[Finding]:
    known = {tunnel.name: tunnel for tunnel in seen.tunnels}
    ways: dict[str, list[PeerRoute]] = {}
    for route in view.peers:
        if route.backend == VXLAN:
            ways.setdefault(route.device, []).append(route)
    for name, routes in ways.items():
        tunnel = known.get(name)
        if tunnel is None:
            yield Finding(
                f"the VXLAN device {name or '(unnamed)'} is missing, for {len(routes)} ranges", MENDS
            )
            continue
        yield from _device(view, tunnel)
        for route in routes:
            yield from _entries(tunnel, route)
    for tunnel in seen.tunnels:
        yield from _stale(tunnel, ways.get(tunnel.name, []))


def _secured(view: View, seen: Observed) -> Iterator[Finding]:
    """Yield what is wrong with WireGuard's devices; which keys their peers have only the daemon knows."""
    known = {device.name: device for device in seen.secured}
    routes = [route for route in view.peers if route.backend == WIREGUARD]
    for slot, name in enumerate(wireguard.NAMES if view.secured else ()):
        device = known.get(name)
        if device is None:
            yield Finding(f"the WireGuard device {name} is missing", MENDS)
            continue
        if not device.up:
            yield Finding(f"the WireGuard device {name} is down", f"ip link set {name} up")
        if device.made is None:
            words = f"{name} is there, but is no WireGuard device"
            yield Finding(words, f"ip link del {name}: the daemon makes it anew")
            continue
        if device.made.port != view.wireguard_port + slot:
            words = f"the WireGuard device {name} has UDP port {device.made.port}"
            yield Finding(f"{words}, not {view.wireguard_port + slot}", MENDS)
        ranges = {cidr for known in device.made.peers.values() for cidr in known.peer.allowed}
        for route in routes:
            if route.destination not in ranges:
                words = f"{name} has no peer for {route.destination}, which is of node {route.node}"
                yield Finding(words, MENDS)


def _device(view: View, tunnel: Tunnel) -> Iterator[Finding]:
    """Yield what is wrong with a device itself."""
    again = f"ip link del {tunnel.name}: the daemon makes it anew"
    if not tunnel.up:
        yield Finding(f"the VXLAN device {tunnel.name} is down", f"ip link set {tunnel.name} up")
    made = tunnel.made
    if made is None:
        yield Finding(f"{tunnel.name} is there, but is no VXLAN device", again)
        return
    for what, is_, wanted in (
        ("UDP port", made.port, view.vxlan_port),
        ("VNI", made.vni, view.vxlan_id),
        ("learning", made.learning, False),
    ):
        if is_ != wanted:
            yield Finding(f"the VXLAN device {tunnel.name} has {what} {is_}, not {wanted}", again)
    if not made.plain:
        yield Finding(f"the VXLAN device {tunnel.name} has options that podwire does not set", again)


def _entries(tunnel: Tunnel, route: PeerRoute) -> Iterator[Finding]:
    """Yield what lacks on the way from a range to its node: a neighbour, then a forwarding entry."""
    mac = tunnel.neighbours.get(route.via)
    if mac is None:
        yield Finding(
            f"{tunnel.name} has no neighbour {route.via}, by which node {route.node} is reached", MENDS
        )
        return
    address = tunnel.forwarding.get(mac)
    if address is None:
        words = f"{tunnel.name} has no forwarding entry for {mac}, which is of node {route.node}"
        yield Finding(words, MENDS)
    elif route.peer and address != route.peer:
        words = f"{tunnel.name} sends packets for node {route.node} to {address}, not to {route.peer}"
        yield Finding(words, MENDS)


def _stale(tunnel: Tunnel, routes: list[PeerRoute]) -> Iterator[Finding]:
    """Yield entries that are of no node."""
    vias, peers = {r.via for r in routes}, {r.peer for r in routes}
    for address, mac in tunnel.neighbours.items():
        if address not in vias:
            words = f"a stale neighbour {address} ({mac}) on {tunnel.name} is of no node"
            yield Finding(words, f"ip neigh del {address} dev {tunnel.name}", Severity.WARNING)
    for mac, address in tunnel.forwarding.items():
        if address not in peers:
            words = f"a stale forwarding entry on {tunnel.name} leads to {address}, which is no node's"
            yield Finding(words, f"bridge fdb del {mac} dev {tunnel.name} dst {address}", Severity.WARNING)


def look(rtnl: Rtnl) -> Observed:
    """Read routes and tunnels from the kernel."""
    links = rtnl.links()
    # Those to an interface and to no gateway lead to pods of this node. IPv6 shows an unreachable one on lo.
    ways = {None, LOOPBACK, *(k.index for k in links if k.name in DEVICES)}
    routes = tuple(r for r in rtnl.routes(ROUTE_PROTOCOL) if r.gateway or r.oif in ways)
    tunnels = tuple(
        Tunnel(
            k.name,
            k.up,
            k.vxlan,
            {n.address: n.mac for n in rtnl.neighbours(k.index) if n.state & PERMANENT},
            {f.mac: f.address for f in rtnl.forwarding(k.index)},
        )
        for k in links
        if k.name in NAMES.values()
    )
    names = {k.index: k.name for k in links}
    secured = tuple(Secured(k.name, k.up, _read(k.name)) for k in links if k.name in wireguard.NAMES)
    return Observed(routes, rtnl.routes(ROUTE_PROTOCOL, NODE_TABLE), tunnels, names, secured)


def _read(name: str) -> Device | None:
    """Return a WireGuard device; None if it is none."""
    try:
        with WireGuard() as kernel:
            return kernel.device(name)
    except NetlinkError:
        return None


def check(context: Context) -> Check:
    """Compare the kernel with what the daemon wants."""
    if context.view is None:
        return Check(NAME, skipped="what there should be is not known, as the daemon does not answer")
    with Rtnl() as rtnl:
        return judge(context.view, look(rtnl))
