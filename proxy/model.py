"""The frozen model: what a node needs to know of Kubernetes objects, parsed once at the edge.

Addresses are canonical text; whoever makes a model value has checked them. Field meanings are those of
the Kubernetes API (Service v1, EndpointSlice discovery.k8s.io/v1, Node v1).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from netlink.family import Family
from proxy.l7.policy import Policy
from proxy.struct import Struct


class ObjectName(Struct, frozen=True, order=True):
    """`namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Protocol(Enum):
    """A transport protocol, by its IANA number."""

    TCP = 6
    UDP = 17
    SCTP = 132

    __hash__ = object.__hash__  # in Python, Enum's own costs more than the look-up that it is for


class TrafficPolicy(Enum):
    """Which endpoints traffic may go to: any, or those on the node it reaches."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class ServicePort(Struct, frozen=True):
    """One port of a service; `node_port` is 0 when it has none."""

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0


class Service(Struct, frozen=True):
    """A Service with cluster addresses (headless and ExternalName services never get here).

    `balancer_ips` are those that a load balancer leaves in the packet (ipMode VIP); only sources in
    `source_ranges` (CIDRs; none given: all) may use them. `affinity_seconds` is how long a client's next
    connection goes where its last one went (0: no affinity). `health_port` is healthCheckNodePort, or 0.
    `policy` is what it asks of the L7 proxy; None: nothing.
    """

    name: ObjectName
    cluster_ips: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_ips: tuple[str, ...] = ()
    balancer_ips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()
    affinity_seconds: int = 0
    health_port: int = 0
    policy: Policy | None = None


class EndpointPort(Struct, frozen=True):
    """A port of an EndpointSlice: the number that the service port of that name means there."""

    name: str
    protocol: Protocol
    port: int


class Endpoint(Struct, frozen=True):
    """A pod behind a service. Only the first address counts, as the API says.

    The hints are the zones and nodes whose clients it should serve (EndpointSlice hints); none: no opinion.
    """

    address: str
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class EndpointSlice(Struct, frozen=True):
    """A part of a service's endpoints, of one IP family.

    `triggered` is when the change happened that it tells of (seconds since the epoch), 0 if it does not say.
    """

    name: ObjectName
    service: ObjectName
    family: Family
    ports: tuple[EndpointPort, ...]
    endpoints: tuple[Endpoint, ...]
    triggered: float = 0.0


class Node(Struct, frozen=True):
    """A node: its pod ranges, its own addresses (InternalIP), its zone, and whether it is on its way out.

    `tunnel_addresses` (at most one per family) and `tunnel_mac` are what it wants packets in tunnels sent to.
    `egress_addresses` (at most one per family) are what its pods get towards the outside.
    `wireguard_keys` are the public keys (base64) of its two WireGuard devices, none or both;
    `wireguard_detour`: packets to and from it take the second one, as the first one's key is changing.
    """

    name: str
    pod_cidrs: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    deleting: bool = False
    zone: str = ""
    uid: str = ""
    tunnel_addresses: tuple[str, ...] = ()
    tunnel_mac: str = ""
    egress_addresses: tuple[str, ...] = ()
    wireguard_keys: tuple[str, ...] = ()
    wireguard_detour: bool = False


class Snapshot(Struct, frozen=True):
    """All that is known at one moment. The mappings are never changed after they are in a snapshot."""

    services: Mapping[ObjectName, Service]
    slices: Mapping[ObjectName, tuple[EndpointSlice, ...]]
    nodes: Mapping[str, Node]


EMPTY = Snapshot(services={}, slices={}, nodes={})
