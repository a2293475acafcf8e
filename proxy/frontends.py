"""What each service looks like to a packet on this node: Service and EndpointSlices → Frontends.

Every traffic policy is decided here, once for all dataplanes. Pure.
Source: Kubernetes documentation, "Virtual IPs and Service Proxies".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from netlink.family import Family
from proxy.model import EndpointSlice, Protocol, Service, ServicePort, Struct, TrafficPolicy


class Origin(Enum):
    """Whose packets a frontend is for: anybody's, or only pods' and nodes' (it then comes before ANY)."""

    ANY = "any"
    INTERNAL = "internal"


class Masquerade(Enum):
    """Whose source address is replaced: nobody's, that of sources outside the pod ranges, or everybody's."""

    NEVER = "never"
    OFF_CLUSTER = "off-cluster"
    ALWAYS = "always"


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
    """One thing a packet can be addressed to, and all that is decided about it."""

    key: FrontendKey
    service: str
    action: Action
    masquerade: Masquerade
    endpoints: tuple[Backend, ...]


class Candidates(NamedTuple):
    """The usable endpoints of a service port in one family: all, and those on this node."""

    all: tuple[Backend, ...]
    local: tuple[Backend, ...]


def frontends(service: Service, slices: Sequence[EndpointSlice], node: str) -> tuple[Frontend, ...]:
    """Return the frontends of a service on a node, given its EndpointSlices."""
    found: list[Frontend] = []
    for family, addresses in _families(service):
        for port in service.ports:
            title = f"{service.name}:{port.name}" if port.name else str(service.name)
            candidates = _candidates(slices, port, family, node)
            for address in addresses:
                found.append(_cluster_ip(service, port, title, (family, address), candidates))
            if port.node_port:
                found.extend(_node_port(service, port, title, family, candidates))
    return tuple(found)


def _families(service: Service) -> Iterator[tuple[Family, list[str]]]:
    for family in Family:
        addresses = [a for a in service.cluster_ips if (":" in a) == (family is Family.V6)]
        if addresses:
            yield family, addresses


def _cluster_ip(
    service: Service, port: ServicePort, title: str, at: tuple[Family, str], candidates: Candidates
) -> Frontend:
    local = service.internal_policy is TrafficPolicy.LOCAL
    return Frontend(
        key=FrontendKey(at[0], at[1], port.protocol, port.port, Origin.ANY),
        service=title,
        action=_action(candidates, local),
        masquerade=Masquerade.OFF_CLUSTER,
        endpoints=candidates.local if local else candidates.all,
    )


def _node_port(
    service: Service, port: ServicePort, title: str, family: Family, candidates: Candidates
) -> Iterator[Frontend]:
    """Yield the node port's frontends.

    Under externalTrafficPolicy Local outside clients keep their address and reach only endpoints of this
    node, while clients inside the cluster are served as if the policy were Cluster.
    """
    key = FrontendKey(family, "", port.protocol, port.node_port, Origin.ANY)
    if service.external_policy is TrafficPolicy.CLUSTER:
        yield Frontend(key, title, _action(candidates, False), Masquerade.ALWAYS, candidates.all)
        return
    yield Frontend(key, title, _action(candidates, True), Masquerade.NEVER, candidates.local)
    inside = key._replace(origin=Origin.INTERNAL)
    yield Frontend(inside, title, _action(candidates, False), Masquerade.OFF_CLUSTER, candidates.all)


def _action(candidates: Candidates, local_only: bool) -> Action:
    """Reject where a service has no endpoint at all; drop where only policy Local leaves none here."""
    if not candidates.all:
        return Action.REJECT
    if local_only and not candidates.local:
        return Action.DROP
    return Action.BALANCE


def _candidates(slices: Sequence[EndpointSlice], port: ServicePort, family: Family, node: str) -> Candidates:
    """Return the endpoints of a port: the ready ones, or, when there is none, those still serving.

    An endpoint that is terminating but serving is better than none (KEP-1669). The order is that of
    addresses, so that the same endpoints always look the same, whatever happened before.
    """
    ready: set[Backend] = set()
    fallback: set[Backend] = set()
    for piece in slices:
        if piece.family is not family:
            continue
        for target in piece.ports:
            if target.name != port.name or target.protocol is not port.protocol:
                continue
            number = target.port
            for endpoint in piece.endpoints:
                if endpoint.ready:
                    ready.add(Backend(endpoint.address, number, endpoint.node == node))
                elif endpoint.serving and endpoint.terminating:
                    fallback.add(Backend(endpoint.address, number, endpoint.node == node))
    everywhere = tuple(sorted(ready or fallback))
    local_ready = tuple(b for b in everywhere if b.local)
    return Candidates(everywhere, local_ready or tuple(sorted(b for b in fallback if b.local)))
