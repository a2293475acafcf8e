"""The node's own network: what routes and pods have to fit to."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path

from cni import sysctls
from netlink.errors import NetlinkError
from netlink.requests import ROUTE_PROTOCOL, Route, route_delete, route_replace
from netlink.rtnl import Rtnl
from node.routes import Gateway, Underlay

log = logging.getLogger("podwire.underlay")

FORWARDING_V6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
FORWARDING = (Path("/proc/sys/net/ipv4/ip_forward"), FORWARDING_V6)
CONF_V6 = Path("/proc/sys/net/ipv6/conf")
TCP_BE_LIBERAL = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
ACCEPT, ACCEPT_WHILE_FORWARDING = "1", "2"  # Documentation/networking/ip-sysctl: accept_ra
ROUTER_ADVERTISEMENT = 9
"""RTPROT_RA: a route that the kernel made from a router advertisement. Whoever handles these itself, as
systemd-networkd does, uses the same number but has turned accept_ra off."""
ANYWHERE = ("0.0.0.0/0", "::/0")
DEFAULT_MTU = 1500
OWN_INTERFACE = re.compile(r"pwpod[0-9a-f]{10}|podwire0|lo")


def forward_packets() -> list[str]:
    """Let the kernel forward packets; return a sentence for each family where it cannot be set.

    A host that forwards IPv6 ignores router advertisements and drops the default route that it has from one,
    unless the interface is told otherwise before: so that is done first, where such a route is.
    """
    problems = []
    for path in FORWARDING:
        if not path.exists() or path.read_text().strip() == "1":
            continue
        try:
            if path == FORWARDING_V6:
                _keep_advertised_routes()
            sysctls.put(path, "1", _beside(path))
        except OSError as error:
            problems.append(f"{path} cannot be set to 1: {error.strerror}; pods will not reach other nodes")
    return problems


def _beside(path: Path) -> tuple[Path, ...]:
    """Return what the kernel sets along with a switch for forwarding (devinet.c, addrconf.c)."""
    conf = CONF_V6 if path == FORWARDING_V6 else path.parent / "conf"
    interfaces = (file for file in sorted(conf.glob("*/forwarding")) if file.parent.name != "all")
    return (*interfaces, *(conf.glob("all/accept_redirects") if path != FORWARDING_V6 else ()))


def be_liberal() -> list[str]:
    """Let connection tracking pass TCP packets that it takes for out of window; a sentence if it cannot.

    It calls what it cannot place invalid, and no translation is done on that: the client sees an answer from
    the endpoint's own address, and resets the connection (kubernetes#74839).
    """
    try:
        sysctls.put(TCP_BE_LIBERAL, "1")
    except OSError as error:
        return [f"{TCP_BE_LIBERAL} cannot be set to 1: {error.strerror}"]
    return []


def _keep_advertised_routes() -> None:
    """Set accept_ra to 2 on interfaces that have routes from router advertisements, and on those only.

    On any other it would let whoever is behind it, a container say, steer this node (CVE-2020-13401).
    """
    with Rtnl() as rtnl:
        advertised = {route.oif for route in rtnl.routes(ROUTER_ADVERTISEMENT)}
        names = [link.name for link in rtnl.links() if link.index in advertised]
    for name in names:
        path = CONF_V6 / name / "accept_ra"
        if not OWN_INTERFACE.fullmatch(name) and path.read_text().strip() == ACCEPT:
            sysctls.put(path, ACCEPT_WHILE_FORWARDING)
            log.info("%s set to 2: router advertisements count there while this node forwards", path)


def observe(rtnl: Rtnl) -> Underlay:
    """Return the subnets that this node is on, and its default gateways.

    The routes say what a node is on, not the prefix lengths of its addresses: one from DHCPv6 is a /128,
    and its subnet is known by router advertisement.
    """
    own = {link.index for link in rtnl.links() if OWN_INTERFACE.fullmatch(link.name)}
    routes = [route for route in rtnl.routes() if route.oif is not None and route.oif not in own]
    subnets = (ip_network(r.destination) for r in routes if not r.gateway and r.destination not in ANYWHERE)
    gateways: dict[int, Gateway] = {
        ip_address(route.gateway).version: Gateway(route.gateway, _zone(route))
        for route in reversed(routes)  # the kernel lists the preferred one first; here the last counts
        if route.gateway and route.destination in ANYWHERE
    }
    return Underlay(tuple(dict.fromkeys(subnets)), gateways)


def egress_mtu(rtnl: Rtnl) -> int:
    """Return the MTU of the interface that leads out (bytes), or Ethernet's where there is none."""
    default = next((r for r in rtnl.routes() if r.destination in ANYWHERE), None)
    links = {link.index: link for link in rtnl.links()}
    if default and default.oif in links:
        return links[default.oif].mtu
    physical = [k.mtu for k in links.values() if not OWN_INTERFACE.fullmatch(k.name)]
    return min(physical, default=DEFAULT_MTU)


def egress_name(rtnl: Rtnl) -> str:
    """Return the name of the interface that leads out, or nothing where there is no default route."""
    default = next((r for r in rtnl.routes() if r.destination in ANYWHERE), None)
    return next((link.name for link in rtnl.links() if default and link.index == default.oif), "")


def sync_routes(rtnl: Rtnl, wanted: Iterable[Route]) -> tuple[int, list[str]]:
    """Make the kernel's routes with our protocol number exactly these.

    Return how many were changed, and a sentence for each that could not be set: the others are. Pod routes,
    which lead to an interface and not to a gateway, are the CNI plugin's and stay. So does somebody else's
    route to one of the destinations: replacing it would take it from them.
    """
    present = rtnl.routes()
    ours = (r for r in present if r.protocol == ROUTE_PROTOCOL)
    there = {_key(r): r for r in ours if r.gateway or _unreachable(r)}
    foreign = {r.destination: r.protocol for r in present if r.protocol != ROUTE_PROTOCOL}
    for destination, *_ in there:
        foreign.pop(destination, None)
    here = {_key(r): r for r in wanted}
    taken = [r for r in here.values() if r.destination in foreign and not r.unreachable]
    gone = [r for k, r in there.items() if k not in here]
    new = [r for k, r in here.items() if k not in there and r not in taken]
    # A route to a destination is replaced in place; only what nothing replaces is removed.
    kept = {r.destination for r in here.values()}
    for route in gone:
        if route.destination not in kept:
            _forget(rtnl, route)
    refused = _set(rtnl, new)
    problems = [
        f"{_sentence(r)}: one of route protocol {foreign[r.destination]} is there, which stays" for r in taken
    ]
    return len(gone) + len(new) - len(refused), [*problems, *refused]


def _set(rtnl: Rtnl, routes: list[Route]) -> list[str]:
    """Set routes, all in one write; when the kernel refuses, one by one, to say which and why."""
    try:
        rtnl.commit(*(route_replace(r) for r in routes))
        return []
    except NetlinkError:
        refused = []
    for route in routes:
        try:
            rtnl.commit(route_replace(route))
        except NetlinkError as error:
            refused.append(f"{_sentence(route)}: {os.strerror(error.errno or 0)}")
    return refused


def _sentence(route: Route) -> str:
    return f"no route to {route.destination}" + (f" via {route.gateway}" if route.gateway else "")


def _key(route: Route) -> tuple[str, str | None, int | None]:
    return route.destination, route.gateway, _zone(route)


def _zone(route: Route) -> int | None:
    """Return the interface that a link-local gateway is on; for any other the kernel finds it itself."""
    return route.oif if route.gateway and ip_address(route.gateway).is_link_local else None


def _unreachable(route: Route) -> bool:
    return route.oif is None or route.oif == 1  # IPv6 shows the loopback interface


def _forget(rtnl: Rtnl, route: Route) -> None:
    try:
        rtnl.commit(route_delete(Route(route.destination, route.gateway, _zone(route))))
    except NetlinkError as error:
        if not error.gone:
            raise
