"""Decode Kubernetes documents into the frozen model; what is wrong is said in one sentence.

Only the fields that matter here are read, as the Kubernetes API defines them; unknown ones are ignored.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from ipaddress import ip_address, ip_network
from socket import AF_INET, inet_ntop, inet_pton
from typing import Any, NamedTuple

import msgspec

from ipam.ranges import RangeError, parse_pod_cidrs
from netlink.family import Family
from node.sources.annotations import TUNNEL_MAC as TUNNEL_MAC
from node.sources.annotations import WIREGUARD_DETOUR, WIREGUARD_KEYS, tunnel_mac, wireguard_keys
from node.sources.wire import (
    SOURCE_RANGES,
    WireConditions,
    WireEndpoint,
    WireEndpointSlice,
    WireHint,
    WireListed,
    WireMeta,
    WireNode,
    WireNodeSpec,
    WireNodeStatus,
    WireService,
    WireServiceAnnotations,
    WireServicePort,
    WireServiceSpec,
    WireServiceStatus,
)
from proxy.l7.annotation import asked_for
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
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
ZONE = "topology.kubernetes.io/zone"
TUNNEL_ADDRESS = "podwire.io/tunnel-address"
EGRESS_ADDRESS = "podwire.io/egress-address"
CLUSTER_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"

AFFINITY_SECONDS, LONGEST_AFFINITY = 10800, 86400
"""How long a client stays with an endpoint where a service does not say, and at most."""

PLAIN = re.compile(r"[A-Za-z0-9._-]+")
BROADCAST = "255.255.255.255"
PREFIX = re.compile(r"[^/%]+/[0-9]{1,3}")
PATH_STEP = re.compile(r"\.(\w+)|\[(?:(\d+)|\.\.\.)\]")

Object = Service | EndpointSlice | Node


class Decoded(NamedTuple):
    """What an object of the API says.

    `value` is None for what is none of the proxy's business, and when the object is `wrong`: what it said
    before counts then. `problems` are sentences.
    """

    name: tuple[str, str]
    version: str
    value: Object | None
    problems: tuple[str, ...] = ()
    wrong: bool = False


class ObjectError(ValueError):
    """A document is not what the Kubernetes API defines; names the object, the field and the value."""


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


def parse(document: Any, left_out: list[str] | None = None) -> Object | None:
    """Return the model value of a decoded document.

    None for kinds and services that are none of the proxy's business (headless, ExternalName, another
    proxy's). What the object can do without is left out of it, with a sentence added to `left_out`: an
    external address that cannot be served must not cost a service its cluster address. Raises ObjectError.
    """
    kind, name = identity(document)
    if kind not in KINDS:
        return None
    wire, build = KINDS[kind]
    problems: list[str] = []
    try:
        found: Object | None = build(msgspec.convert(document, wire), problems)
    except msgspec.ValidationError as error:
        raise ObjectError(f"{kind} {name}: {_mismatch(str(error), document)}") from error
    except (RangeError, ValueError) as error:
        raise ObjectError(f"{kind} {name}: {error}") from error
    if left_out is not None:
        left_out += [f"{kind} {name}: {problem}" for problem in problems]
    return found


def decode(kind: str, data: bytes | msgspec.Raw) -> Decoded:
    """Return what an object of that kind, in the API's JSON, says; it has no kind of its own in a list.

    20,000 objects are decoded at the start: straight into what is read of them, in a third of the time of
    `parse`. Raises msgspec.DecodeError for what is no JSON, or has no metadata.
    """
    problems: list[str] = []
    try:
        wire = DECODERS[kind].decode(data)
        value = KINDS[kind][1](wire, problems)
        meta = wire.metadata
        text = meta.name if kind == "Node" else f"{meta.namespace or 'default'}/{meta.name}"
        said = tuple(f"{kind} {text}: {problem}" for problem in problems)
        return Decoded((kind, text), meta.resource_version, value, said)
    except (msgspec.ValidationError, RangeError, ValueError):
        document = {"kind": kind, **DOCUMENT.decode(data)}
    name, version = identity(document), LISTED.decode(data).metadata.resource_version
    try:
        return Decoded(name, version, parse(document, problems), tuple(problems))
    except ObjectError as error:
        return Decoded(name, version, None, (str(error),), wrong=True)


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


def _not_ours(labels: dict[str, str]) -> bool:
    """Whether kube-proxy's label selector leaves an object out, be it a Service or an EndpointSlice."""
    return OTHER_PROXY in labels or HEADLESS in labels


def _service(wire: WireService, problems: list[str]) -> Service | None:
    spec = wire.spec
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    if (
        spec.type == "ExternalName"
        or addresses in ([], ["None"], [""])
        or _not_ours(wire.metadata.labels or {})
    ):
        return None
    external_policy = _policy("spec.externalTrafficPolicy", spec.external_traffic_policy)
    balanced = spec.type == "LoadBalancer"
    checked = balanced and external_policy is TrafficPolicy.LOCAL and spec.health_check_node_port
    external = [(f"spec.externalIPs[{i}]", value) for i, value in enumerate(spec.external_ips or [])]
    ports = tuple(_service_port(f"spec.ports[{i}]", p) for i, p in enumerate(spec.ports or []))
    annotations = wire.metadata.annotations or WireServiceAnnotations()
    return Service(
        name=_name(wire.metadata),
        cluster_ips=tuple(_service_ip("spec.clusterIPs", a) for a in addresses),
        ports=ports,
        internal_policy=_policy("spec.internalTrafficPolicy", spec.internal_traffic_policy),
        external_policy=external_policy,
        external_ips=_usable(external, problems),
        balancer_ips=_usable(_ingress(wire.status, problems), problems) if balanced else (),
        source_ranges=_source_ranges(spec, annotations.source_ranges or "") if balanced else (),
        affinity_seconds=_affinity(spec),
        health_port=_port("spec.healthCheckNodePort", spec.health_check_node_port) if checked else 0,
        policy=asked_for(annotations.proxy, any(p.protocol is Protocol.TCP for p in ports), problems),
    )


def _usable(fields: Iterable[tuple[str, str]], problems: list[str]) -> tuple[str, ...]:
    """Return those addresses that a service can have, once each."""
    found: dict[str, None] = {}
    for field, value in fields:
        try:
            found[_service_ip(field, value)] = None
        except ValueError as error:
            problems.append(f"{error}: left out")
    return tuple(found)


def _ingress(status: WireServiceStatus | None, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield field and value of the addresses that a load balancer leaves in packets (KEP-1860)."""
    balancer = status.load_balancer if status else None
    for i, entry in enumerate((balancer.ingress if balancer else None) or []):
        field = f"status.loadBalancer.ingress[{i}]"
        if entry.ip_mode not in (None, "VIP", "Proxy"):
            problems.append(f"{field}.ipMode {entry.ip_mode!r} is none of VIP, Proxy: left out")
        elif entry.ip and entry.ip_mode != "Proxy":
            yield f"{field}.ip", entry.ip


def _source_ranges(spec: WireServiceSpec, annotation: str) -> tuple[str, ...]:
    """Return whose packets a load balancer's addresses take; none given: everybody's.

    A wrong range fails the service: without it, it might be open to all. In the annotation, which counts
    where the field is empty, 0.0.0.0/0 stands for everybody; the API server takes white space in both.
    """
    if spec.load_balancer_source_ranges:
        field, texts = "spec.loadBalancerSourceRanges", spec.load_balancer_source_ranges
    else:
        field = f"metadata.annotations[{SOURCE_RANGES}]"
        texts = annotation.split(",") if annotation.strip() else []
        if "0.0.0.0/0" in map(str.strip, texts):
            return ()
    return tuple(dict.fromkeys(_cidr(field, text) for text in texts))


def _affinity(spec: WireServiceSpec) -> int:
    if spec.session_affinity in (None, "", "None"):
        return 0
    if spec.session_affinity != "ClientIP":
        raise ValueError(f"spec.sessionAffinity {spec.session_affinity!r} is none of None, ClientIP")
    client = spec.session_affinity_config.client_ip if spec.session_affinity_config else None
    seconds = client.timeout_seconds if client else None
    if seconds is None:
        return AFFINITY_SECONDS
    if not 1 <= seconds <= LONGEST_AFFINITY:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise ValueError(f"{field} {reprlib.repr(seconds)} is not in 1 to {LONGEST_AFFINITY}")
    return seconds


def _service_port(field: str, wire: WireServicePort) -> ServicePort:
    node_port = _port(f"{field}.nodePort", wire.node_port) if wire.node_port else 0
    protocol = _protocol(f"{field}.protocol", wire.protocol)
    name = _plain(f"{field}.name", wire.name) if wire.name else ""
    return ServicePort(name, protocol, _port(f"{field}.port", wire.port), node_port)


def _slice(wire: WireEndpointSlice, problems: list[str]) -> EndpointSlice | None:
    labels = wire.metadata.labels or {}
    service = labels.get(SERVICE_OF_SLICE)
    if not service or wire.address_type == "FQDN" or _not_ours(labels):
        return None
    _plain(f"metadata.labels[{SERVICE_OF_SLICE}]", service)
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
    endpoints = tuple(
        _plain_endpoint(e, family) or _endpoint(f"endpoints[{i}]", e, family)
        for i, e in enumerate(wire.endpoints or [])
    )
    triggered = _seconds((wire.metadata.annotations or {}).get(TRIGGER_TIME, ""))
    return EndpointSlice(name, ObjectName(name.namespace, service), family, ports, endpoints, triggered)


def _seconds(timestamp: str) -> float:
    """Return a time of the API (RFC 3339) in seconds since the epoch; 0 for one that is none."""
    try:
        return datetime.fromisoformat(timestamp).timestamp() if timestamp else 0.0
    except (ValueError, OverflowError):
        return 0.0


def _plain_endpoint(wire: WireEndpoint, family: Family) -> Endpoint | None:
    """Return an endpoint that is as nearly all are, in half the time; None for what needs a closer look."""
    node, conditions = wire.node_name, wire.conditions
    if family is not Family.V4 or wire.hints is not None or conditions is None or not wire.addresses:
        return None
    address, name = wire.addresses[0], ""
    if node:
        name = _plain_names.get(node) or _remember(node)
    if not _plain_ipv4(address) or (node and not name):
        return None
    ready = conditions.ready is not False
    serving = ready if conditions.serving is None else conditions.serving
    return Endpoint(address, name, ready, serving, bool(conditions.terminating))


_plain_names: dict[str, str] = {}
"""Names of nodes that were checked: the same few in 100,000 endpoints are one string each."""
MOST_NAMES = 20_000


def _remember(name: str) -> str:
    """Note a name and return it, if it is as it should be; else nothing."""
    if not PLAIN.fullmatch(name):
        return ""
    if len(_plain_names) >= MOST_NAMES:  # nodes that come and go are not kept for ever
        _plain_names.clear()
    return _plain_names.setdefault(name, sys.intern(name))


def _endpoint(field: str, wire: WireEndpoint, family: Family) -> Endpoint:
    if not wire.addresses:
        raise ValueError(f"{field}.addresses is empty")
    address = _address(f"{field}.addresses[0]", wire.addresses[0], family)
    conditions = wire.conditions or WireConditions()
    ready = conditions.ready is not False
    serving = ready if conditions.serving is None else conditions.serving
    node = sys.intern(_plain(f"{field}.nodeName", wire.node_name)) if wire.node_name else ""
    found = Endpoint(address, node, ready, serving, bool(conditions.terminating))
    if wire.hints is None:
        return found
    zones = _hints(f"{field}.hints.forZones", wire.hints.for_zones)
    nodes = _hints(f"{field}.hints.forNodes", wire.hints.for_nodes)
    return msgspec.structs.replace(found, zone_hints=zones, node_hints=nodes)


def _hints(field: str, wire: list[WireHint] | None) -> tuple[str, ...]:
    """Return the places that an endpoint is meant for; the empty name, which a label can have, is none."""
    return tuple(_plain(f"{field}[{i}].name", h.name) for i, h in enumerate(wire or []) if h.name)


def _node(wire: WireNode, problems: list[str]) -> Node:
    zone = (wire.metadata.labels or {}).get(ZONE)
    annotations = wire.metadata.annotations or {}
    spec, status = wire.spec or WireNodeSpec(), wire.status or WireNodeStatus()
    cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    taints = {t.key for t in spec.taints or []}
    return Node(
        name=_plain("metadata.name", wire.metadata.name),
        pod_cidrs=tuple(str(c) for c in parse_pod_cidrs(cidrs)),
        addresses=_node_addresses(status, "InternalIP") or _node_addresses(status, "ExternalIP"),
        deleting=wire.metadata.deletion_timestamp is not None or CLUSTER_AUTOSCALER_TAINT in taints,
        zone=_plain(f"metadata.labels[{ZONE}]", zone) if zone else "",
        uid=_plain("metadata.uid", wire.metadata.uid) if wire.metadata.uid else "",
        tunnel_addresses=_annotated(annotations, TUNNEL_ADDRESS, "a tunnel", problems),
        tunnel_mac=tunnel_mac(annotations.get(TUNNEL_MAC, ""), problems),
        egress_addresses=_annotated(annotations, EGRESS_ADDRESS, "pods on their way out", problems),
        wireguard_keys=wireguard_keys(annotations.get(WIREGUARD_KEYS, ""), problems),
        wireguard_detour=annotations.get(WIREGUARD_DETOUR, "") == "true",
    )


def _node_addresses(status: WireNodeStatus, kind: str) -> tuple[str, ...]:
    """Return a node's addresses of a type. ExternalIPs count where it has no other, as with kube-proxy."""
    return tuple(
        _address(f"status.addresses[{i}].address", a.address)
        for i, a in enumerate(status.addresses or [])
        if a.type == kind
    )


def _annotated(annotations: dict[str, str], key: str, whose: str, problems: list[str]) -> tuple[str, ...]:
    """Return the first usable address of each family; a node must not lose its routes for its annotation."""
    field, text = f"metadata.annotations[{key}]", annotations.get(key, "")
    found: dict[bool, str] = {}
    for part in map(str.strip, text.split(",") if text.strip() else ()):
        try:
            address = _service_ip(field, part, whose)
        except ValueError as error:
            problems.append(f"{error}: left out")
            continue
        first = found.setdefault(":" in address, address)
        if first != address:
            problems.append(f"{field} {part!r} is a second address beside {first!r}: left out")
    return tuple(found.values())


def _address(field: str, value: str, family: Family | None = None) -> str:
    if family is not Family.V6 and _plain_ipv4(value):
        return value
    try:
        address = ip_address(value)
        if "%" in value:  # an IPv6 zone means something on one machine only
            raise ValueError
    except ValueError:
        raise ValueError(f"{field} {value!r} is not an IP address") from None
    if family and address.version != family.value:
        raise ValueError(f"{field} {value!r} is not an IPv{family.value} address")
    return str(address)


def _plain_ipv4(value: str) -> bool:
    """Whether this is an IPv4 address in canonical form: in a tenth of the time, for 100,000 endpoints."""
    try:
        return inet_ntop(AF_INET, inet_pton(AF_INET, value)) == value
    except (OSError, ValueError):
        return False


def _service_ip(field: str, value: str, whose: str = "a service") -> str:
    """Return an address of a service, or of what else other nodes reach.

    No packet has an IPv4-mapped one, and on the others nobody but the node itself may be reached.
    """
    address = ip_address(_address(field, value))
    mapped = address.version == 6 and address.ipv4_mapped
    special = address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    if special or mapped or str(address) == BROADCAST:
        raise ValueError(f"{field} {value!r} is no address that {whose} can have")
    return str(address)


def _cidr(field: str, text: str) -> str:
    """Return a range in canonical form: the API server takes white space around it and host bits in it."""
    text = text.strip()
    try:
        if not PREFIX.fullmatch(text):  # Python would take a bare address and a netmask too
            raise ValueError
        found = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{field} {text!r} is not a CIDR") from None
    return str(found)


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


KINDS: dict[str, tuple[Any, Any]] = {
    "Service": (WireService, _service),
    "EndpointSlice": (WireEndpointSlice, _slice),
    "Node": (WireNode, _node),
}
"""What is read of each kind, and what makes a model value of it."""
DECODERS = {kind: msgspec.json.Decoder(wire) for kind, (wire, _) in KINDS.items()}
LISTED = msgspec.json.Decoder(WireListed)
DOCUMENT = msgspec.json.Decoder(dict[str, Any])
