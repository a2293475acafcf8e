"""What changed from one snapshot to the next, a line of the log each. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from proxy.model import EndpointSlice, Node, ObjectName, Service, Snapshot

MOST = 20
"""Lines for one sync; of more changes only the number is told."""


class Line(NamedTuple):
    """A line of the log; only changes of endpoints, which a cluster has all day, are not `important`."""

    text: str
    fields: Mapping[str, object]
    important: bool = True


def told(
    before: Snapshot,
    after: Snapshot,
    services: Iterable[ObjectName],
    nodes: Iterable[str],
    *,
    endpoints: bool,
) -> list[Line]:
    """Return what to log of a change of the services and nodes named, and of `endpoints` if asked for."""
    found = [
        *(line for name in sorted(services) for line in _service(before, after, name, endpoints)),
        *(
            line
            for name in sorted(nodes)
            for line in _node(name, before.nodes.get(name), after.nodes.get(name))
        ),
    ]
    if len(found) <= MOST:
        return found
    return [*found[:MOST], Line("more changes", {"number": len(found) - MOST})]


def _service(before: Snapshot, after: Snapshot, name: ObjectName, endpoints: bool) -> Iterator[Line]:
    old, new = before.services.get(name), after.services.get(name)
    if old is new and not endpoints:  # as of a thousand changes a second
        return
    if new is None:
        if old is not None:
            yield Line("service removed", {"service": str(name)})
        return
    usable = {"endpoints": _count(after.slices.get(name, ()))}
    if old is None:
        yield Line("service added", {"service": str(name), "addresses": _addresses(new), **usable})
    elif old != new:
        yield Line("service changed", {"service": str(name), "addresses": _addresses(new), **usable})
    elif before.slices.get(name) != after.slices.get(name):
        yield Line("endpoints changed", {"service": str(name), **usable}, important=False)


def _node(name: str, old: Node | None, new: Node | None) -> Iterator[Line]:
    if new is None:
        if old is not None:
            yield Line("node removed", {"node": name})
    elif old != new:
        facts = {"node": name, "podCIDRs": ",".join(new.pod_cidrs), "addresses": ",".join(new.addresses)}
        if new.egress_addresses:
            facts["egress"] = ",".join(new.egress_addresses)
        yield Line("node added" if old is None else "node changed", facts)


def _addresses(service: Service) -> str:
    return ",".join((*service.cluster_ips, *service.external_ips, *service.balancer_ips))


def _count(slices: Iterable[EndpointSlice]) -> int:
    return len({e.address for piece in slices for e in piece.endpoints if e.ready})
