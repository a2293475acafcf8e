"""Which endpoints the hints in EndpointSlices leave to the clients of a node. Pure.

The EndpointSlice controller writes hints for services with trafficDistribution or topology-aware routing; a
proxy follows them only while every endpoint has one, and one of them is for this node or zone.
Source: Kubernetes documentation, "Topology Aware Routing", "Traffic distribution"; KEP-2433, KEP-3015.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from proxy.model import Endpoint


class Place(NamedTuple):
    """Where this proxy runs: the node's name and its zone ("" if it has none)."""

    node: str
    zone: str = ""


def narrowing(ready: Collection[Endpoint], place: Place) -> Callable[[Endpoint], bool] | None:
    """Return what tells the ready endpoints that clients of this place should use; None for all of them.

    Hints for nodes go before those for zones.
    """
    for wanted, hints in ((place.node, _node_hints), (place.zone, _zone_hints)):
        if wanted and ready and all(map(hints, ready)) and any(wanted in hints(e) for e in ready):
            return partial(_hinted, wanted, hints)
    return None


def _hinted(wanted: str, hints: Callable[[Endpoint], tuple[str, ...]], endpoint: Endpoint) -> bool:
    return wanted in hints(endpoint)


def _node_hints(endpoint: Endpoint) -> tuple[str, ...]:
    return endpoint.node_hints


def _zone_hints(endpoint: Endpoint) -> tuple[str, ...]:
    return endpoint.zone_hints
