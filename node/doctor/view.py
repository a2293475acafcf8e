"""What the daemon says, as checks use it, and what else they are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

from node.backends.hops import Network

VXLAN, WIREGUARD, LOCAL = "vxlan", "wireguard", "local"
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """A route that the daemon wants: to a podCIDR of a node.

    `backend` is local, direct, gateway, vxlan or wireguard ("" from an older daemon); `mtu` is in bytes, 0
    that of the device; `peer` is the node's address in the network between nodes, "" if unknown.
    """

    destination: str
    node: str
    via: str = ""
    backend: str = ""
    device: str = ""
    mtu: int = 0
    peer: str = ""

    @property
    def network(self) -> Network:
        """The podCIDR."""
        return ip_network(self.destination)

    @property
    def range_address(self) -> str:
        """The address in the range that its node itself has; "" where the range is too small for one."""
        network = self.network
        spare = network.max_prefixlen - network.prefixlen
        return str(network.network_address) if spare > 1 else ""


class TunnelPorts(NamedTuple):
    """What tunnels are made of, and the ports that this needs, in words."""

    title: str
    ports: str

    def __str__(self) -> str:
        return f"{self.title} ({self.ports})"


@dataclass(frozen=True, slots=True)
class View:
    """What the daemon knows and says of itself. `last_sync` is seconds since the epoch; 0 = never."""

    node: str
    mode: str = "routed"
    version: str = ""
    pod_cidrs: tuple[str, ...] = ()
    ready: bool = True
    last_sync: float = 0.0
    problems: tuple[str, ...] = ()
    source: str = ""
    routes: tuple[PeerRoute, ...] = ()
    service_addresses: tuple[tuple[str, str], ...] = ()
    vxlan_port: int = 8472
    vxlan_id: int = 112
    backend: str = ""
    wireguard_port: int = 51820

    @property
    def secured(self) -> bool:
        """Whether packets to other nodes' pods are encrypted."""
        return self.backend == WIREGUARD

    @property
    def tunnel_ports(self) -> TunnelPorts:
        """The tunnels' UDP ports."""
        if self.secured:
            return TunnelPorts("WireGuard", f"UDP ports {self.wireguard_port} and {self.wireguard_port + 1}")
        return TunnelPorts("VXLAN", f"UDP port {self.vxlan_port}")

    @property
    def peers(self) -> tuple[PeerRoute, ...]:
        """Routes to the pods of other nodes."""
        return tuple(r for r in self.routes if r.node != self.node)


def view_of(health: Any, routes: Iterable[Any], services: Iterable[Any] = ()) -> View:
    """Return the daemon's answers (api/podwire.proto) as a view."""
    known = tuple(
        PeerRoute(
            destination=r.destination,
            node=r.node,
            via=r.via,
            backend=getattr(r, "backend", ""),
            device=getattr(r, "device", ""),
            mtu=getattr(r, "mtu", 0),
            peer=getattr(r, "peer", "") or _direct(r.via),
        )
        for r in routes
    )
    addresses = tuple((s.name, a) for s in services for a in s.cluster_ips)
    return View(
        node=health.node,
        mode=health.mode,
        version=health.version,
        pod_cidrs=tuple(health.pod_cidrs),
        ready=health.ready,
        last_sync=health.last_sync,
        problems=tuple(health.problems),
        source=health.source,
        routes=known,
        service_addresses=addresses,
        vxlan_port=getattr(health, "vxlan_port", 0) or 8472,
        vxlan_id=getattr(health, "vxlan_id", 0) or 112,
        backend=getattr(health, "backend", ""),
        wireguard_port=getattr(health, "wireguard_port", 0) or 51820,
    )


def _direct(via: str) -> str:
    return via if via and not ip_address(via).is_link_local else ""


def _quiet(words: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Context:
    """What checks are told. `view` is None without a daemon; `absence` says why.

    `timeout` is in seconds, of one round of probes; `peers` how many nodes are probed (None: all);
    `progress` is told what a long check is at.
    """

    view: View | None = None
    absence: str = ""
    timeout: float = 2.0
    peers: int | None = None
    version: str = ""
    progress: Callable[[str], None] = _quiet
    clock: Callable[[], float] = time.time
    root: Path = field(default=Path("/"))

    def proc(self, *parts: str) -> Path:
        """Return a path in /proc."""
        return self.root.joinpath("proc", *parts)

    def etc(self, *parts: str) -> Path:
        """Return a path in /etc."""
        return self.root.joinpath("etc", *parts)

    def probed(self) -> tuple[PeerRoute, ...]:
        """Return the routes to the nodes that are probed: the first ones by name, if not all."""
        if self.view is None:
            return ()
        names = sorted({r.node for r in self.view.peers})[: self.peers]
        wanted = set(names)
        return tuple(sorted((r for r in self.view.peers if r.node in wanted), key=lambda r: r.node))
