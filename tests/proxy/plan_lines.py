"""How a line of the packet-trace table is written, and the groups that lines are in.

A case is written "source > destination:port" with the names of plan.py: places, services for their cluster
address, SERVICE/external and SERVICE/balancer for their other addresses. It may end at "drop", "reject", or
at endpoints (port 8080 if none is written), all of which must be possible, and no other. "masq" says that
the client's address is replaced, the name of an endpoint that it is on the way to that one.
A line stands for both IP families unless it says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from netlink.family import Family
from proxy.frontends import title_of
from proxy.l7 import places
from proxy.l7.places import OWNER
from proxy.model import Protocol
from tests.proxy.plan import PLACES, PROXIES, SCTP, SERVICES, TCP, UDP, place

ENDPOINT_PORT = 8080
FAMILIES = tuple(Family)


@dataclass(frozen=True, slots=True)
class Case:
    """One packet of a family, what it may end at, and at which of these ends the client is masqueraded.

    `sticky`: after the first connection all others of this client end where it did. `group`: that of the
    program which sends it.
    """

    name: str
    family: Family
    source: str
    destination: str
    port: int
    protocol: Protocol
    expected: frozenset[str]
    masqueraded: frozenset[str]
    sticky: bool = False
    group: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.family.name})"


Twins = tuple[Case, ...]
"""One line: a case in each family that it is for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Cases of one kind, and the documentation that their expectations come from."""

    title: str
    documentation: str
    cases: tuple[Case, ...]


def group(title: str, documentation: str, *lines: Twins) -> Group:
    """Return a group of lines; it is part of their names."""
    cases = (replace(one, name=f"{title}: {one.name}") for twins in lines for one in twins)
    return Group(title, documentation, tuple(cases))


def tcp(name: str, way: str, ends: str, masq: str = "", families: tuple[Family, ...] = FAMILIES) -> Twins:
    """Write a case over TCP in each of its families."""
    return tuple(_case(name, way, ends, masq, TCP, family) for family in families)


def udp(name: str, way: str, ends: str, masq: str = "") -> Twins:
    """Write a case over UDP."""
    return tuple(_case(name, way, ends, masq, UDP, family) for family in FAMILIES)


def sctp(name: str, way: str, ends: str, masq: str = "") -> Twins:
    """Write a case over SCTP."""
    return tuple(_case(name, way, ends, masq, SCTP, family) for family in FAMILIES)


def sticky(twins: Twins) -> Twins:
    """Return cases with session affinity."""
    return tuple(replace(one, sticky=True) for one in twins)


def proxys_own(twins: Twins) -> Twins:
    """Return cases whose packets the L7 proxy itself sends."""
    return tuple(replace(one, group=OWNER) for one in twins)


def _case(name: str, way: str, ends: str, masq: str, protocol: Protocol, family: Family) -> Case:
    source, target = way.split(" > ")
    destination, port = target.split(":")
    title = _title(destination, int(port))
    expected = frozenset(_end(e, family, title) for e in ends.split())
    masqueraded = expected if masq == "masq" else frozenset(_end(e, family, title) for e in masq.split())
    assert masqueraded <= expected, name
    ends_at = place(source, family), address(destination, family), int(port)
    return Case(name, family, *ends_at, protocol, expected, masqueraded)


def _end(text: str, family: Family, title: str) -> str:
    """Write where a packet ends; `title` is the service port's that it is addressed to."""
    if text in ("drop", "reject"):
        return text
    name, _, port = text.partition(":")
    there = places.address(PROXIES[name], family, title) if name in PROXIES else address(name, family)
    return where(there, int(port or ENDPOINT_PORT))


def _title(destination: str, number: int) -> str:
    """Return the TCP port of a service that is addressed, by one of its addresses or as a node port."""
    name = destination.partition("/")[0]
    for service in SERVICES:
        for port in service.ports:
            named = service.name.name == name and port.port == number
            if port.protocol is TCP and (named or port.node_port == number):
                return title_of(service, port)
    return ""


def where(host: str, port: int) -> str:
    """Write an address and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address(name: str, family: Family) -> str:
    """Return the address of a place or of a service in a family that it has."""
    if name in PLACES:
        return place(name, family)
    title, _, kind = name.partition("/")
    found = next(s for s in SERVICES if s.name.name == title)
    several = {"": found.cluster_ips, "external": found.external_ips, "balancer": found.balancer_ips}[kind]
    return next(a for a in several if (":" in a) == (family is Family.V6))
