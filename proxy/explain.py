"""Why each endpoint of a service is used on a node, or is not. Pure.

What is used is read off the frontends themselves; only the words are found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from netlink.family import Family
from proxy.frontends import Backend, Frontend, behind, frontends, title_of
from proxy.model import Endpoint, EndpointSlice, Service, ServicePort, TrafficPolicy
from proxy.topology import Place, narrowing


class Used(Enum):
    """How many of a service port's frontends lead to an endpoint."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"


class Explained(NamedTuple):
    """An endpoint of a service port; `port` is the service port's name, `why` a clause."""

    port: str
    backend: Backend
    node: str
    used: Used
    why: str


def explain(service: Service, slices: Sequence[EndpointSlice], place: Place) -> tuple[Explained, ...]:
    """Return all endpoints of a service, in order of port, family and address."""
    decided = frontends(service, slices, place)
    found = []
    for port in service.ports:
        for family in Family:
            title = title_of(service, port)
            own = [f for f in decided if f.service == title and f.key.family is family]
            if own:
                behind_port = list(behind(slices, port, family))
                explained = set(_of_port(service, port, behind_port, own, place))
                found += sorted(explained, key=lambda e: (e.backend, e.why))
    return tuple(found)


def _of_port(
    service: Service,
    port: ServicePort,
    endpoints: list[tuple[int, Endpoint]],
    own: list[Frontend],
    place: Place,
) -> Iterator[Explained]:
    is_near = narrowing([e for _, e in endpoints if e.ready], place)
    for number, endpoint in endpoints:
        backend = Backend(endpoint.address, number, endpoint.node == place.node)
        count = sum(backend in frontend.endpoints for frontend in own)
        used = Used.NO if not count else Used.YES if count == len(own) else Used.PARTLY
        reasons = [_condition(endpoint)]
        if used is not Used.YES:
            if is_near is not None and not is_near(endpoint):
                reasons.append(f"its hints are for {_places(endpoint)}")
            local = _local_policies(service, own)
            if local and not backend.local:
                reasons.append(f"not on this node, as {local} Local asks for")
        yield Explained(port.name, backend, endpoint.node, used, "; ".join(reasons))


def _condition(endpoint: Endpoint) -> str:
    if endpoint.ready:
        return "ready"
    if not endpoint.terminating:
        return "not ready"
    return "terminating, serves while none is ready" if endpoint.serving else "terminating, serves no more"


def _places(endpoint: Endpoint) -> str:
    nodes = [f"node {name}" for name in endpoint.node_hints]
    return ", ".join([*nodes, *(f"zone {name}" for name in endpoint.zone_hints)]) or "nobody"


def _local_policies(service: Service, own: list[Frontend]) -> str:
    """Return the names of those policies of a service that are Local and have a frontend."""
    external = service.external_policy is TrafficPolicy.LOCAL and not all(f.exclusive for f in own)
    internal = service.internal_policy is TrafficPolicy.LOCAL
    names = [
        *(["internalTrafficPolicy"] if internal else []),
        *(["externalTrafficPolicy"] if external else []),
    ]
    return " and ".join(names)
