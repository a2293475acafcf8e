"""Services as the command line shows them: values of the model and live connections → messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from api import podwire_pb2 as pb
from netlink.conntrack import Conntrack
from netlink.family import with_port
from node.l7_stats import NOTHING, Counted, L7View, Seen
from proxy.explain import explain
from proxy.frontends import Action, Frontend, FrontendKey, Origin
from proxy.l7.policy import ANNOTATIONS
from proxy.l7.stats import Totals
from proxy.model import EndpointSlice, Service
from proxy.topology import Place

Connections = Counter[tuple[FrontendKey, str, int]]
"""How many connections each endpoint, an address and port, has by each frontend."""

NAME = re.compile(r"[a-z0-9.-]+/[a-z0-9-]+")
"""Objects named in a sentence."""
L7_TOTALS = tuple(name for name in Totals._fields if name in pb.L7Figures.DESCRIPTOR.fields_by_name)
"""What is told of all that is counted."""


def summary(service: Service, slices: Sequence[EndpointSlice], own: Iterable[Frontend]) -> pb.Service:
    """Return a service in short; `own` are its frontends."""
    used = {e.address for f in own if f.action is Action.BALANCE for e in f.endpoints}
    return pb.Service(
        name=str(service.name),
        cluster_ips=service.cluster_ips,
        external_ips=service.external_ips,
        balancer_ips=service.balancer_ips,
        source_ranges=service.source_ranges,
        ports=(
            pb.ServicePort(name=p.name, protocol=p.protocol.name, port=p.port, node_port=p.node_port)
            for p in service.ports
        ),
        internal_policy=service.internal_policy.value,
        external_policy=service.external_policy.value,
        affinity_seconds=service.affinity_seconds,
        health_port=service.health_port,
        endpoints_used=len(used),
        endpoints_known=len({e.address for piece in slices for e in piece.endpoints}),
    )


def details(
    service: Service, slices: Sequence[EndpointSlice], own: Sequence[Frontend], place: Place
) -> pb.Service:
    """Return all about a service, with the connections that there are at this moment. Raises NetlinkError."""
    connections = count(own)
    found = summary(service, slices, own)
    protocols = {port.name: port.protocol for port in service.ports}
    for one in own:
        message = frontend(one)
        anybodys = one.key._replace(origin=Origin.ANY)
        message.connections = sum(n for (key, *_), n in connections.items() if key == anybodys)
        found.frontends.append(message)
    for endpoint in explain(service, slices, place):
        address, port, local = endpoint.backend
        found.endpoints.append(
            pb.Endpoint(
                port=endpoint.port,
                address=with_port(address, port),
                node=endpoint.node,
                local=local,
                used=endpoint.used.value,
                why=endpoint.why,
                connections=sum(
                    n
                    for (key, *to), n in connections.items()
                    if (key.protocol, *to) == (protocols[endpoint.port], address, port)
                ),
            )
        )
    return found


def frontend(some: Frontend) -> pb.Frontend:
    """Return a frontend."""
    return pb.Frontend(
        service=some.service,
        match=some.key.address or "nodeport",
        protocol=some.key.protocol.name,
        port=some.key.port,
        origin=some.key.origin.value,
        action=some.action.value,
        masquerade=some.masquerade.value,
        endpoints=(with_port(b.address, b.port) for b in some.endpoints),
        affinity_seconds=some.affinity,
        restricted=some.sources is not None,
        sources=some.sources or (),
    )


def proxied(seen: Seen) -> pb.L7Service:
    """Return what the L7 proxy does for a service port in a family."""
    backend, times = seen.backend, seen.times
    endpoints = dict.fromkeys(server.target for server in backend.servers)
    endpoints.update(dict.fromkeys(at for at, (_, now) in seen.servers.items() if now))  # also those leaving
    return pb.L7Service(
        service=backend.service,
        family=f"IPv{backend.family.value}",
        backend=backend.name,
        protocol=backend.protocol.value,
        balance=backend.policy.balance.value,
        state=seen.state.value,
        why=seen.why,
        addresses=(with_port(r.address or "nodeport", r.port) for r in backend.routes),
        figures=l7_figures(seen.own),
        p50=times.quantile(0.5) if times else 0,
        p90=times.quantile(0.9) if times else 0,
        p99=times.quantile(0.99) if times else 0,
        endpoints=(_l7_endpoint(at, seen.servers.get(at, NOTHING)) for at in endpoints),
    )


def in_short(view: L7View) -> str:
    """Return how far the L7 proxy serves what asks for it; "" where nothing does."""
    if not view.backends:
        return ""
    served = len(view.served & view.backends.keys()) if view.up else 0
    words = f"{served} of {len(view.backends)} service ports are served by HAProxy"
    return words if view.up else f"{words}, which does not run"


def _l7_endpoint(address: str, counted: Counted) -> pb.L7Endpoint:
    now = counted.now
    return pb.L7Endpoint(
        address=address,
        state=now.status if now else "",
        check=f"{now.check} {now.checked}".strip() if now else "",
        figures=l7_figures(counted),
    )


def l7_figures(counted: Counted) -> pb.L7Figures:
    """Return what was counted."""
    totals, now = counted
    alike = {name: getattr(totals, name) for name in L7_TOTALS}
    return pb.L7Figures(
        **alike, connections_now=now.connections if now else 0, queued_now=now.queued if now else 0
    )


def refused(problem: str) -> pb.L7Service | None:
    """Return the service whose annotation for the L7 proxy a sentence refuses; None of other sentences."""
    if not any(key in problem for key in ANNOTATIONS):
        return None
    name = NAME.search(problem.partition("annotations[")[0])
    return pb.L7Service(service=name[0] if name else "", state="refused", why=problem)


def sections(configuration: str, backends: Collection[str]) -> str:
    """Return the sections of some backends in HAProxy's configuration."""
    found: list[str] = []
    wanted = False
    for line in configuration.splitlines():
        if line and not line[0].isspace():  # a comment there is about what follows
            kind, _, name = line.partition(" ")
            wanted = kind == "backend" and name.strip() in backends
        if wanted:
            found.append(line)
    return "\n".join(found).rstrip() + "\n" if found else ""


def count(own: Sequence[Frontend]) -> Connections:
    """Count the connections of frontends. Raises NetlinkError.

    Those of clients inside and outside are counted together: what tells them apart is not in the entries.
    """
    found: Connections = Counter()
    wanted = list(_destinations(own))
    with Conntrack() as entries:
        for family, protocol in {(key.family, key.protocol) for key, _ in wanted}:
            alike = [(key, to) for key, to in wanted if (key.family, key.protocol) == (family, protocol)]
            one = alike[0][0].port if len({key.port for key, _ in alike}) == 1 else None
            for flow in entries.flows(family, protocol.value, one):
                to = flow.reply.source, flow.reply.sport
                for key, backends in alike:
                    here = key.port == flow.original.dport and key.address in ("", flow.original.destination)
                    if here and to in backends:
                        found[key, *to] += 1
    return found


def _destinations(own: Iterable[Frontend]) -> Iterator[tuple[FrontendKey, set[tuple[str, int]]]]:
    """Yield what can be addressed, once each, and where that may lead."""
    found: dict[FrontendKey, set[tuple[str, int]]] = {}
    for one in own:
        key = one.key._replace(origin=Origin.ANY)
        found.setdefault(key, set()).update(b[:2] for b in one.endpoints)
    yield from found.items()
