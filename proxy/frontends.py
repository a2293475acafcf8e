"""What each service looks like to a packet on this node: Service and EndpointSlices → Frontends.

Every traffic policy is decided here, once for all dataplanes. Pure.
Source: Kubernetes documentation, "Virtual IPs and Service Proxies".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from netlink.family import Family
from proxy.l7.policy import Protocol as L7Protocol
from proxy.model import (
    Endpoint,
    EndpointSlice,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)
from proxy.struct import Struct
from proxy.topology import Place, narrowing


class Origin(Enum):
    """Whose packets a frontend is for: anybody's, or only pods' and nodes' (it then comes before ANY)."""

    ANY = "any"
    INTERNAL = "internal"

    __hash__ = object.__hash__


class Masquerade(Enum):
    """Whose source address is replaced: nobody's, that of no pod, of no pod of this node, or everybody's."""

    NEVER = "never"
    OFF_CLUSTER = "off-cluster"
    OFF_NODE = "off-node"
    ALWAYS = "always"

    __hash__ = object.__hash__


class Action(Enum):
    """What happens to the packet."""

    BALANCE = "balance"
    REJECT = "reject"
    DROP = "drop"


class FrontendKey(NamedTuple):
    """What a packet is addressed to. An empty address is every address of the node: a node port."""

    family: Family
    address: str
    protocol: Protocol
    port: int
    origin: Origin


class Backend(NamedTuple):
    """Where a connection can go; `local` means on this node. Ordered by address and port."""

    address: str
    port: int
    local: bool


class Frontend(Struct, frozen=True):
    """One thing a packet can be addressed to, and all that is decided about it.

    `affinity`: seconds for which a client's next connection goes where its last one went; 0 none. `sources`:
    the CIDRs whose packets may come; None all. `exclusive`: the address has no other use than this
    service's ports, so that packets to its other ports are refused. `proxied`: what it balances goes to the
    node's L7 proxy, which chooses among the endpoints; None: to one of them, by the kernel.
    """

    key: FrontendKey
    service: str
    action: Action
    masquerade: Masquerade
    endpoints: tuple[Backend, ...]
    affinity: int = 0
    sources: tuple[str, ...] | None = None
    exclusive: bool = False
    proxied: L7Protocol | None = None


class Candidates(NamedTuple):
    """The usable endpoints of a service port in one family: all, and those on this node."""

    all: tuple[Backend, ...]
    local: tuple[Backend, ...]


def frontends(service: Service, slices: Sequence[EndpointSlice], place: Place) -> tuple[Frontend, ...]:
    """Return the frontends of a service on a node, given its EndpointSlices."""
    found: list[Frontend] = []
    for family in Family:
        addresses = _of(family, service.cluster_ips)
        if not addresses:
            continue
        outside = (*_of(family, service.external_ips), *_of(family, service.balancer_ips))
        for port in service.ports:
            title = title_of(service, port)
            usable = candidates(slices, port, family, place)
            for address in addresses:
                key = FrontendKey(family, address, port.protocol, port.port, Origin.ANY)
                found.append(_cluster_ip(service, key, title, usable))
            for address in dict.fromkeys(outside):
                key = FrontendKey(family, address, port.protocol, port.port, Origin.ANY)
                found.extend(_external(service, key, title, usable))
            if port.node_port:
                key = FrontendKey(family, "", port.protocol, port.node_port, Origin.ANY)
                found.extend(_external(service, key, title, usable))
    return tuple(found)


def title_of(service: Service, port: ServicePort) -> str:
    """Return "namespace/name:port"; an unnamed port is the service itself."""
    return f"{service.name}:{port.name}" if port.name else str(service.name)


def owner_of(title: str) -> ObjectName:
    """Return whose service port has a title."""
    return ObjectName(*title.partition(":")[0].split("/"))


def _of(family: Family, addresses: Sequence[str]) -> tuple[str, ...]:
    return tuple(a for a in addresses if (":" in a) == (family is Family.V6))


def _cluster_ip(service: Service, key: FrontendKey, title: str, usable: Candidates) -> Frontend:
    local = service.internal_policy is TrafficPolicy.LOCAL
    return Frontend(
        key,
        title,
        _action(usable, local),
        Masquerade.OFF_CLUSTER,
        usable.local if local else usable.all,
        affinity=service.affinity_seconds,
        exclusive=True,
    )


def _external(service: Service, key: FrontendKey, title: str, usable: Candidates) -> Iterator[Frontend]:
    """Yield the frontends of a node port, an external or a load balancer's address.

    Under externalTrafficPolicy Local outside clients keep their address and reach only endpoints of this
    node, while clients inside the cluster are served as if the policy were Cluster.
    """
    local = service.external_policy is TrafficPolicy.LOCAL
    affinity, sources = service.affinity_seconds, None
    if service.source_ranges and key.address in service.balancer_ips:
        sources = tuple(r for r in service.source_ranges if (":" in r) == (key.family is Family.V6))
    yield Frontend(
        key,
        title,
        _action(usable, local),
        Masquerade.NEVER if local else Masquerade.ALWAYS,
        usable.local if local else usable.all,
        affinity,
        sources,
    )
    if local:
        yield Frontend(
            key._replace(origin=Origin.INTERNAL),
            title,
            _action(usable, False),
            # A pod of another node would be answered by the endpoint directly, past this node.
            Masquerade.OFF_NODE,
            usable.all,
            affinity,
            sources,
        )


def _action(usable: Candidates, local_only: bool) -> Action:
    """Reject where a service has no endpoint at all; drop where only policy Local leaves none here."""
    if not usable.all and not usable.local:
        return Action.REJECT
    if local_only and not usable.local:
        return Action.DROP
    return Action.BALANCE


def candidates(
    slices: Sequence[EndpointSlice], port: ServicePort, family: Family, place: Place
) -> Candidates:
    """Return the endpoints of a port: the ready ones, or, when there is none, those still serving.

    An endpoint that is terminating but serving is better than none (KEP-1669). The order is that of
    addresses, so that the same endpoints always look the same, whatever happened before. Hints narrow what
    is used from everywhere, never what is used of this node.
    """
    ready: dict[Backend, Endpoint] = {}
    fallback: set[Backend] = set()
    for number, endpoint in behind(slices, port, family):
        if endpoint.ready:
            backend = Backend(endpoint.address, number, endpoint.node == place.node)
            ready[backend] = endpoint
        elif endpoint.serving and endpoint.terminating:
            fallback.add(Backend(endpoint.address, number, endpoint.node == place.node))
    usable = sorted(ready) or sorted(fallback)
    here = [b for b in usable if b.local] or sorted(b for b in fallback if b.local)
    is_near = narrowing(ready.values(), place)
    if is_near is not None:
        usable = [b for b in usable if is_near(ready[b])]
    return Candidates(tuple(usable), tuple(here))


def behind(
    slices: Sequence[EndpointSlice], port: ServicePort, family: Family
) -> Iterator[tuple[int, Endpoint]]:
    """Yield all endpoints of a service port in a family, whatever their state, each with its port number."""
    for piece in slices:
        if piece.family is not family:
            continue
        for target in piece.ports:
            if target.name == port.name and target.protocol is port.protocol:
                for endpoint in piece.endpoints:
                    yield target.port, endpoint
