"""What kube-apiserver fills in and refuses, for the kinds and fields that podwire reads or writes."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator
from typing import Any

from tests.kubeapi.resources import EVENTS, LEASES, NAMESPACES, NODES, SERVICES, SLICES, Resource
from tests.kubeapi.status import ApiError, invalid

Json = dict[str, Any]

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""RFC 1123 subdomain."""

MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
"""metav1.MicroTime: six digits, neither fewer nor more."""

SERVICE_RANGE = ipaddress.ip_network("10.96.0.0/12")
NODE_PORTS = (30000, 32767)


class Allocator:
    """Cluster addresses and node ports for Services that ask for none. None is given twice, or taken back."""

    def __init__(self) -> None:
        self._addresses: Iterator[Any] = itertools.islice(SERVICE_RANGE.hosts(), 524_288, None)
        self._ports = itertools.cycle(range(NODE_PORTS[0] + 1000, NODE_PORTS[1] + 1))

    def address(self) -> str:
        """Return the next cluster address, of the upper half: generated clusters use the lower."""
        return str(next(self._addresses))

    def port(self) -> int:
        """Return the next node port."""
        return next(self._ports)


def prepare(resource: Resource, obj: Json, allocator: Allocator) -> None:
    """Fill in defaults, as the kind has them."""
    if resource is SERVICES:
        _prepare_service(obj.setdefault("spec", {}), allocator)
        obj.setdefault("status", {}).setdefault("loadBalancer", {})
    elif resource is NODES:
        _prepare_node(obj.setdefault("spec", {}))
    elif resource is NAMESPACES:
        obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        obj.setdefault("status", {}).setdefault("phase", "Active")
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
    elif resource is SLICES:
        for port in obj.get("ports") or ():
            port.setdefault("name", "")
            port.setdefault("protocol", "TCP")


def _prepare_service(spec: Json, allocator: Allocator) -> None:
    kind = spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["sessionAffinity"] == "ClientIP":
        spec.setdefault("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": 10800}})
    for port in spec.get("ports") or ():
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port.get("port"))
    if kind == "ExternalName":
        return
    spec.setdefault("internalTrafficPolicy", "Cluster")
    if not spec.get("clusterIP"):
        spec["clusterIP"] = (spec.get("clusterIPs") or [allocator.address()])[0]
    spec.setdefault("clusterIPs", [spec["clusterIP"]])
    spec.setdefault("ipFamilies", _families(spec["clusterIPs"]))
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    if kind in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")
        if kind == "LoadBalancer":
            spec.setdefault("allocateLoadBalancerNodePorts", True)
        if spec.get("allocateLoadBalancerNodePorts", True):
            for port in spec.get("ports") or ():
                if not port.get("nodePort"):
                    port["nodePort"] = allocator.port()


def _families(addresses: list[str]) -> list[str]:
    if addresses == ["None"]:
        return ["IPv4"]
    return [f"IPv{ipaddress.ip_address(a).version}" for a in addresses]


def _prepare_node(spec: Json) -> None:
    """Keep podCIDR the first of podCIDRs, as the conversion of v1 does; podCIDR wins."""
    first, ranges = spec.get("podCIDR"), spec.get("podCIDRs")
    if first and (not ranges or ranges[0] != first):
        spec["podCIDRs"] = [first]
    elif ranges:
        spec["podCIDR"] = ranges[0]


def check(resource: Resource, obj: Json) -> None:
    """Refuse an object that may not be created or written so (422), or cannot be decoded (400)."""
    _check_types(resource, obj)
    name = obj["metadata"].get("name") or ""
    kind = resource.kind
    if not name:
        problem = "Required value: name or generateName is required"
        raise invalid(kind, name, "metadata.name", problem, "FieldValueRequired")
    if not NAME.fullmatch(name) or len(name) > 253:
        raise invalid(
            kind,
            name,
            "metadata.name",
            f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
            "alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
        )
    spec = obj.get("spec") or {}
    if resource is SERVICES and not spec.get("ports") and spec.get("clusterIP") not in (None, "", "None"):
        raise invalid(kind, name, "spec.ports", "Required value", "FieldValueRequired")
    if resource is SLICES and obj.get("addressType") not in ("IPv4", "IPv6", "FQDN"):
        problem = "Required value" if not obj.get("addressType") else "Unsupported value"
        cause = "FieldValueRequired" if not obj.get("addressType") else "FieldValueNotSupported"
        raise invalid(kind, name, "addressType", problem, cause)
    if resource is NODES:
        _check_pod_ranges(name, spec)
    if resource is EVENTS:
        _check_event(obj)


def _check_types(resource: Resource, obj: Json) -> None:
    """Refuse what Go's types do not take, where it is easily got wrong."""
    for field in ("labels", "annotations"):
        for value in (obj["metadata"].get(field) or {}).values():
            if not isinstance(value, str):
                path = f"ObjectMeta.metadata.{field}"
                raise _undecodable(
                    resource, f"json: cannot unmarshal into Go struct field {path} of type string"
                )
    spec = obj.get("spec") or {}
    times = {EVENTS: (obj.get("eventTime"),), LEASES: (spec.get("acquireTime"), spec.get("renewTime"))}
    for text in times.get(resource, ()):
        if text is not None and not MICRO_TIME.fullmatch(str(text)):
            problem = f'parsing time "{text}" as "2006-01-02T15:04:05.000000Z07:00": cannot parse it'
            raise _undecodable(resource, problem)


def _undecodable(resource: Resource, problem: str) -> ApiError:
    kind, version = resource.kind, resource.api_version.rpartition("/")[2]
    return ApiError(400, f'{kind} in version "{version}" cannot be handled as a {kind}: {problem}')


def _check_event(event: Json) -> None:
    """Hold an Event to its namespace and, one with eventTime, to the fields that it then has to have."""
    metadata, about = event["metadata"], event.get("involvedObject") or {}
    name, own, its = metadata["name"], metadata.get("namespace", ""), about.get("namespace") or ""
    new = bool(event.get("eventTime"))
    allowed = ("default", "kube-system") if new else ("default",)
    if (not its and own not in allowed) or (its and its != own and not new):
        problem = f'Invalid value: "{its}": does not match event.namespace'
        raise invalid("Event", name, "involvedObject.namespace", problem)
    for field in ("reportingComponent", "reportingInstance", "action", "reason") if new else ():
        if not event.get(field):
            raise invalid("Event", name, field, "Required value", "FieldValueRequired")
    if new and len(event.get("message") or "") > 1024:
        raise invalid("Event", name, "message", "can have at most 1024 characters")


def _check_pod_ranges(name: str, spec: Json) -> None:
    for index, text in enumerate(spec.get("podCIDRs") or ()):
        try:
            ipaddress.ip_network(text)
        except ValueError:
            field = f"spec.podCIDRs[{index}]"
            problem = (
                f'Invalid value: "{text}": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)'
            )
            raise invalid("Node", name, field, problem) from None
    if len(spec.get("podCIDRs") or ()) > 2:
        problem = f"Invalid value: {spec['podCIDRs']}: may specify no more than one CIDR for each IP family"
        raise invalid("Node", name, "spec.podCIDRs", problem)


def check_update(resource: Resource, old: Json, new: Json) -> None:
    """Refuse a change of what may not change (422)."""
    check(resource, new)
    name = new["metadata"]["name"]
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if resource is NODES and before.get("podCIDRs") and before["podCIDRs"] != after.get("podCIDRs"):
        problem = 'Forbidden: node updates may not change podCIDR except from "" to valid'
        raise invalid("Node", name, "spec.podCIDRs", problem, "FieldValueForbidden")
    if (
        resource is SERVICES
        and before.get("clusterIP")
        and "ExternalName"
        not in (
            before.get("type"),
            after.get("type"),
        )
    ):
        for field in ("clusterIP", "clusterIPs"):
            if before.get(field) != after.get(field) and field == "clusterIP":
                problem = f'Invalid value: "{after.get(field)}": field is immutable'
                raise invalid("Service", name, "spec.clusterIPs[0]", problem)
    if resource is SLICES and old.get("addressType") != new.get("addressType"):
        problem = f'Invalid value: "{new.get("addressType")}": field is immutable'
        raise invalid("EndpointSlice", name, "addressType", problem)
