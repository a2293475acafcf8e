"""Decode Kubernetes documents into the frozen model; what is wrong is said in one sentence.

Only the fields that matter here are read, as the Kubernetes API defines them; unknown ones are ignored.
"""

from __future__ import annotations

import re
import reprlib
from ipaddress import ip_address
from typing import Any

import msgspec

from ipam.ranges import RangeError, parse_pod_cidrs
from netlink.family import Family
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)

SERVICE_OF_SLICE = "kubernetes.io/service-name"
OTHER_PROXY = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
CLUSTER_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"

PLAIN = re.compile(r"[A-Za-z0-9._-]+")
PATH_STEP = re.compile(r"\.(\w+)|\[(?:(\d+)|\.\.\.)\]")

Object = Service | EndpointSlice | Node


class ObjectError(ValueError):
    """A document is not what the Kubernetes API defines; names the object, the field and the value."""


class Wire(msgspec.Struct, rename="camel"):
    """A part of a document as the API has it; null stands for absent."""


class WireMeta(Wire):
    """ObjectMeta."""

    name: str
    namespace: str | None = None
    labels: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class WireServicePort(Wire):
    """ServicePort."""

    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class WireServiceSpec(Wire):
    """ServiceSpec."""

    type: str | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    ports: list[WireServicePort] | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None


class WireService(Wire):
    """Service v1."""

    metadata: WireMeta
    spec: WireServiceSpec


class WireConditions(Wire):
    """EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class WireEndpoint(Wire):
    """An endpoint of a slice."""

    addresses: list[str]
    conditions: WireConditions | None = None
    node_name: str | None = None


class WireEndpointPort(Wire):
    """EndpointPort."""

    port: int | None = None
    name: str | None = None
    protocol: str | None = None


class WireEndpointSlice(Wire):
    """EndpointSlice discovery.k8s.io/v1."""

    metadata: WireMeta
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


class WireNode(Wire):
    """Node v1."""

    metadata: WireMeta
    spec: WireNodeSpec | None = None
    status: WireNodeStatus | None = None


def identity(document: Any) -> tuple[str, str]:
    """Return (kind, "namespace/name") of a document, as far as it says."""
    if not isinstance(document, dict):
        return type(document).__name__, "?"
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    kind, name = _word(document.get("kind")), _word(metadata.get("name"))
    return kind, name if kind == "Node" else f"{_word(metadata.get('namespace') or 'default')}/{name}"


def _word(value: Any) -> str:
    """Return a name as it can stand in a sentence, whatever the document has there."""
    return value if isinstance(value, str) and value.isprintable() else "?"


def parse(document: Any) -> Object | None:
    """Return the model value of a decoded document.

    None for kinds and services that are none of the proxy's business (headless, ExternalName, another
    proxy's). Raises ObjectError.
    """
    kind, name = identity(document)
    parsers = {"Service": _service, "EndpointSlice": _slice, "Node": _node}
    if kind not in parsers:
        return None
    try:
        return parsers[kind](document)
    except msgspec.ValidationError as error:
        raise ObjectError(f"{kind} {name}: {_mismatch(str(error), document)}") from error
    except (RangeError, ValueError) as error:
        raise ObjectError(f"{kind} {name}: {error}") from error


def _mismatch(message: str, document: Any) -> str:
    """Return msgspec's message as "field value: what is wrong"."""
    what, _, path = message.partition(" - at ")
    path = path.removesuffix("`").rpartition("`$")[2]
    value = document
    for name, index in PATH_STEP.findall(path):
        value = value[int(index)] if index else value.get(name) if name else None
        if value is None:  # inside a mapping with keys of any kind, which msgspec shows as [...]
            break
    field = path.lstrip(".")
    short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    shown = f" {reprlib.repr(value)}" if short else ""
    return f"{field}{shown}: {what}" if field else what


def _name(meta: WireMeta) -> ObjectName:
    namespace = _plain("metadata.namespace", meta.namespace or "default")
    return ObjectName(namespace, _plain("metadata.name", meta.name))


def _plain(field: str, value: str) -> str:
    """Return a name if it has only characters that a Kubernetes name can have: it becomes part of others."""
    if not PLAIN.fullmatch(value):
        raise ValueError(f"{field} {value!r} is not a name of letters, digits, '-', '_' and '.'")
    return value


def _service(document: Any) -> Service | None:
    wire = msgspec.convert(document, WireService)
    spec, labels = wire.spec, wire.metadata.labels or {}
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    if (
        spec.type == "ExternalName"
        or addresses in ([], ["None"])
        or OTHER_PROXY in labels
        or HEADLESS in labels
    ):
        return None
    return Service(
        name=_name(wire.metadata),
        cluster_ips=tuple(_cluster_ip("spec.clusterIPs", a) for a in addresses),
        ports=tuple(_service_port(f"spec.ports[{i}]", p) for i, p in enumerate(spec.ports or [])),
        internal_policy=_policy("spec.internalTrafficPolicy", spec.internal_traffic_policy),
        external_policy=_policy("spec.externalTrafficPolicy", spec.external_traffic_policy),
    )


def _service_port(field: str, wire: WireServicePort) -> ServicePort:
    node_port = _port(f"{field}.nodePort", wire.node_port) if wire.node_port else 0
    protocol = _protocol(f"{field}.protocol", wire.protocol)
    name = _plain(f"{field}.name", wire.name) if wire.name else ""
    return ServicePort(name, protocol, _port(f"{field}.port", wire.port), node_port)


def _slice(document: Any) -> EndpointSlice | None:
    wire = msgspec.convert(document, WireEndpointSlice)
    labels = wire.metadata.labels or {}
    service = labels.get(SERVICE_OF_SLICE)
    if not service or wire.address_type == "FQDN":
        return None
    families = {"IPv4": Family.V4, "IPv6": Family.V6}
    if wire.address_type not in families:
        raise ValueError(f"addressType {wire.address_type!r} is none of IPv4, IPv6, FQDN")
    family = families[wire.address_type]
    name = _name(wire.metadata)
    ports = tuple(
        EndpointPort(
            p.name or "", _protocol(f"ports[{i}].protocol", p.protocol), _port(f"ports[{i}].port", p.port)
        )
        for i, p in enumerate(wire.ports or [])
        if p.port is not None
    )
    endpoints = tuple(_endpoint(f"endpoints[{i}]", e, family) for i, e in enumerate(wire.endpoints or []))
    return EndpointSlice(name, ObjectName(name.namespace, service), family, ports, endpoints)


def _endpoint(field: str, wire: WireEndpoint, family: Family) -> Endpoint:
    if not wire.addresses:
        raise ValueError(f"{field}.addresses is empty")
    address = _address(f"{field}.addresses[0]", wire.addresses[0], family)
    conditions = wire.conditions or WireConditions()
    ready = conditions.ready is not False
    serving = ready if conditions.serving is None else conditions.serving
    return Endpoint(address, wire.node_name or "", ready, serving, bool(conditions.terminating))


def _node(document: Any) -> Node:
    wire = msgspec.convert(document, WireNode)
    spec, status = wire.spec or WireNodeSpec(), wire.status or WireNodeStatus()
    cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    taints = {t.key for t in spec.taints or []}
    return Node(
        name=_plain("metadata.name", wire.metadata.name),
        pod_cidrs=tuple(str(c) for c in parse_pod_cidrs(cidrs)),
        addresses=tuple(
            _address(f"status.addresses[{i}].address", a.address)
            for i, a in enumerate(status.addresses or [])
            if a.type == "InternalIP"
        ),
        deleting=wire.metadata.deletion_timestamp is not None or CLUSTER_AUTOSCALER_TAINT in taints,
    )


def _address(field: str, value: str, family: Family | None = None) -> str:
    try:
        address = ip_address(value)
        if "%" in value:  # an IPv6 zone means something on one machine only
            raise ValueError
    except ValueError:
        raise ValueError(f"{field} {value!r} is not an IP address") from None
    if family and address.version != family.value:
        raise ValueError(f"{field} {value!r} is not an IPv{family.value} address")
    return str(address)


def _cluster_ip(field: str, value: str) -> str:
    address = ip_address(_address(field, value))
    if address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
        raise ValueError(f"{field} {value!r} is no address that a service can have")
    return str(address)


def _port(field: str, value: int | None) -> int:
    if value is None or not 1 <= value <= 65535:
        raise ValueError(f"{field} {value} is not a port (1 to 65535)")
    return value


def _protocol(field: str, value: str | None) -> Protocol:
    if value is None:
        return Protocol.TCP
    if value not in Protocol.__members__:
        raise ValueError(f"{field} {value!r} is none of TCP, UDP, SCTP")
    return Protocol[value]


def _policy(field: str, value: str | None) -> TrafficPolicy:
    if not value:
        return TrafficPolicy.CLUSTER
    try:
        return TrafficPolicy(value)
    except ValueError:
        raise ValueError(f"{field} {value!r} is none of Cluster, Local") from None
