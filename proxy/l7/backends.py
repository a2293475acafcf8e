"""Which backends of HAProxy a service has on a node, and which of its frontends lead there. Pure.

A service port has one backend for each family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import structs

from proxy.frontends import Action, Frontend, Origin
from proxy.l7.model import Backend, Route, Server
from proxy.model import Protocol, Service


def route_of(frontend: Frontend) -> Route:
    """Return what leads a client to a frontend."""
    return Route(frontend.key.family, frontend.key.address, frontend.key.port)


def backend_name(service: Service, frontend: Frontend) -> str:
    """Return the backend that may serve a frontend; "" where the service does not ask for that.

    Only TCP is proxied, and external addresses only on request. Where the traffic policies differ, these stay
    with the kernel: policy Local is there to keep the client's address, and only for clients outside.
    """
    policy, key = service.policy, frontend.key
    if policy is None or key.protocol is not Protocol.TCP or key.origin is Origin.INTERNAL:
        return ""
    alike = service.internal_policy is service.external_policy
    if not frontend.exclusive and not (policy.external and alike):
        return ""
    port = frontend.service.partition(":")[2] or "-"
    name, kind = service.name, f"{policy.protocol.value}{key.family.value}"
    return f"{name.namespace}_{name.name}_{port}_{kind}"


def with_proxied(
    service: Service, frontends: Iterable[Frontend], leads: Callable[[Backend, Route], bool]
) -> tuple[tuple[Frontend, ...], tuple[Backend, ...]]:
    """Return a service's frontends, those proxied that `leads` says so of, and its backends."""
    found = tuple(frontends)
    made = {b.name: b for b in backends(service, found)}

    def decided(frontend: Frontend) -> Frontend:
        backend = made.get(backend_name(service, frontend))
        if backend is None or frontend.action is not Action.BALANCE or not leads(backend, route_of(frontend)):
            return frontend
        return structs.replace(frontend, proxied=backend.protocol)

    return tuple(map(decided, found)), tuple(made.values())


def backends(service: Service, frontends: Iterable[Frontend]) -> tuple[Backend, ...]:
    """Return the backends of a service, with what its frontends are addressed by and lead to."""
    groups: dict[str, list[Frontend]] = {}
    for frontend in frontends:
        if name := backend_name(service, frontend):
            groups.setdefault(name, []).append(frontend)
    return tuple(_backend(service, name, group) for name, group in groups.items())


def _backend(service: Service, name: str, group: list[Frontend]) -> Backend:
    assert service.policy
    first = group[0]
    servers = dict.fromkeys(Server(e.address, e.port) for f in group for e in f.endpoints)
    routes = dict.fromkeys(map(route_of, group))
    return Backend(
        name,
        first.service,
        first.key.family,
        service.policy,
        tuple(sorted(routes, key=_order)),
        tuple(servers),
    )


def _order(route: Route) -> tuple[str, int]:
    return route.address, route.port
