"""Kubernetes objects as the API has them: those fields that a node needs, and nothing decided.

Source: Kubernetes API reference; Service v1, EndpointSlice discovery.k8s.io/v1, Node v1.
"""

from __future__ import annotations

import msgspec

from proxy.l7.policy import ANNOTATIONS

SOURCE_RANGES = "service.beta.kubernetes.io/load-balancer-source-ranges"


class Wire(msgspec.Struct, rename="camel"):
    """A part of a document as the API has it; null stands for absent."""


class WireMeta(Wire):
    """ObjectMeta."""

    name: str
    namespace: str | None = None
    labels: dict[str, str] | None = None
    deletion_timestamp: str | None = None
    resource_version: str = ""


class WireAnnotated(WireMeta):
    """ObjectMeta with all annotations."""

    annotations: dict[str, str] | None = None


class WireListed(Wire):
    """What any object has."""

    metadata: WireMeta


class WireListMeta(Wire):
    """ListMeta; `continue_` is where the next page begins."""

    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class WireList(Wire):
    """A page of a list; its items are decoded one by one, so that one that is wrong costs no other."""

    metadata: WireListMeta
    items: list[msgspec.Raw] | None = None


class WireBookmark(Wire):
    """The object of a BOOKMARK: its kind and a resourceVersion, and nothing else."""

    metadata: WireListMeta


class WireEvent(Wire):
    """A line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR (whose object is a Status)."""

    type: str
    object: msgspec.Raw


class WireServiceAnnotations(Wire):
    """Those annotations of a Service that count; `proxy` are those in `proxy.l7.policy.ANNOTATIONS`."""

    source_ranges: str | None = msgspec.field(name=SOURCE_RANGES, default=None)
    podwire_proxy: str | None = msgspec.field(name=ANNOTATIONS[0], default=None)
    f5_proxy: str | None = msgspec.field(name=ANNOTATIONS[1], default=None)

    @property
    def proxy(self) -> tuple[str | None, ...]:
        """What is asked of the L7 proxy."""
        return self.podwire_proxy, self.f5_proxy


class WireServiceMeta(WireMeta):
    """ObjectMeta of a Service."""

    annotations: WireServiceAnnotations | None = None


class WireServicePort(Wire):
    """ServicePort."""

    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class WireClientIP(Wire):
    """ClientIPConfig."""

    timeout_seconds: int | None = None


class WireAffinity(Wire):
    """SessionAffinityConfig."""

    client_ip: WireClientIP | None = msgspec.field(name="clientIP", default=None)


class WireServiceSpec(Wire):
    """ServiceSpec."""

    type: str | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    ports: list[WireServicePort] | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    external_ips: list[str] | None = msgspec.field(name="externalIPs", default=None)
    load_balancer_source_ranges: list[str] | None = None
    session_affinity: str | None = None
    session_affinity_config: WireAffinity | None = None
    health_check_node_port: int | None = None


class WireIngress(Wire):
    """LoadBalancerIngress."""

    ip: str | None = None
    ip_mode: str | None = None


class WireLoadBalancer(Wire):
    """LoadBalancerStatus."""

    ingress: list[WireIngress] | None = None


class WireServiceStatus(Wire):
    """ServiceStatus."""

    load_balancer: WireLoadBalancer | None = None


class WireService(Wire):
    """Service v1."""

    metadata: WireServiceMeta
    spec: WireServiceSpec
    status: WireServiceStatus | None = None


class WireConditions(Wire):
    """EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class WireHint(Wire):
    """ForZone or ForNode."""

    name: str


class WireHints(Wire):
    """EndpointHints."""

    for_zones: list[WireHint] | None = None
    for_nodes: list[WireHint] | None = None


class WireEndpoint(Wire):
    """An endpoint of a slice."""

    addresses: list[str]
    conditions: WireConditions | None = None
    node_name: str | None = None
    hints: WireHints | None = None


class WireEndpointPort(Wire):
    """EndpointPort."""

    port: int | None = None
    name: str | None = None
    protocol: str | None = None


class WireEndpointSlice(Wire):
    """EndpointSlice discovery.k8s.io/v1."""

    metadata: WireAnnotated
    address_type: str
    endpoints: list[WireEndpoint] | None = None
    ports: list[WireEndpointPort] | None = None


class WireAddress(Wire):
    """NodeAddress."""

    type: str
    address: str


class WireNodeStatus(Wire):
    """NodeStatus."""

    addresses: list[WireAddress] | None = None


class WireTaint(Wire):
    """Taint."""

    key: str


class WireNodeSpec(Wire):
    """NodeSpec."""

    pod_cidr: str | None = msgspec.field(name="podCIDR", default=None)
    pod_cidrs: list[str] | None = msgspec.field(name="podCIDRs", default=None)
    taints: list[WireTaint] | None = None


class WireNodeMeta(WireAnnotated):
    """ObjectMeta of a Node, which is told from one of the same name by its uid."""

    uid: str | None = None


class WireNode(Wire):
    """Node v1."""

    metadata: WireNodeMeta
    spec: WireNodeSpec | None = None
    status: WireNodeStatus | None = None
