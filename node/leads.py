"""Who says which frontends are for the L7 proxy of this node."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

from netlink.family import Family
from proxy.l7.model import Backend, Backends, Route


class Leads(Protocol):
    """What decides whether the kernel leads a frontend to the L7 proxy."""

    def leads(self, backend: Backend, route: Route) -> bool:
        """Whether packets for a route of a backend are for the proxy now."""


class L7Proxy(Leads, Protocol):
    """What serves them, once the kernel leads them there."""

    def take(self, backends: Backends, families: Set[Family]) -> None:
        """Let the proxy have these; what the kernel no longer leads there may end in it from now on."""


class NoProxy:
    """The L7 proxy is switched off: the kernel balances all services, whatever they ask for."""

    def __init__(self) -> None:
        self.problems: tuple[str, ...] = ()

    def leads(self, backend: Backend, route: Route) -> bool:
        """Return False."""
        return False

    def take(self, backends: Backends, families: Set[Family]) -> None:
        """Note who asks in vain."""
        asking = sorted({b.service for b in backends.values()})
        self.problems = tuple(
            f"service {title} asks for the L7 proxy, which is off (l7.enabled): plain balancing"
            for title in asking
        )
