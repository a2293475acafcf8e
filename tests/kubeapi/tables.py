"""Tables, as `kubectl get` asks for them (meta.k8s.io/v1 Table), with the columns of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from tests.kubeapi.resources import Resource

Json = dict[str, Any]
Cell = Callable[[Json], Any]
Column = tuple[str, int, Cell]
"""Name, priority (1: with `-o wide` only), what stands in it."""

NONE = "<none>"


def wanted(accept: str) -> bool:
    """Whether a client would rather have a Table."""
    return any("as=Table" in part and "application/json" in part for part in accept.split(",")[:1])


def table(resource: Resource, version: str, objects: Iterable[Json], *, head: bool = True) -> Json:
    """Return a Table of objects."""
    columns = (*COLUMNS.get(resource.plural, (("Name", 0, _name), ("Age", 0, _age))),)
    definitions = [
        {
            "name": name,
            "type": "string",
            "format": "name" if name == "Name" else "",
            "description": "",
            "priority": priority,
        }
        for name, priority, _ in columns
    ]
    rows = [
        {
            "cells": [cell(obj) for _, _, cell in columns],
            "object": {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": obj["metadata"],
            },
        }
        for obj in objects
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": definitions if head else [],
        "rows": rows,
    }


class Renderer:
    """Turns a watch's objects into Tables; only the first has the columns' definitions."""

    def __init__(self, resource: Resource) -> None:
        self._resource = resource
        self._first = True

    def __call__(self, body: bytes) -> bytes:
        obj = msgspec.json.decode(body)
        first, self._first = self._first, False
        version = obj["metadata"]["resourceVersion"]
        return msgspec.json.encode(table(self._resource, version, [obj], head=first))


def _name(obj: Json) -> str:
    return str(obj["metadata"]["name"])


def _age(obj: Json) -> str:
    try:
        created = datetime.fromisoformat(obj["metadata"]["creationTimestamp"])
    except (KeyError, ValueError, TypeError):
        return "<unknown>"
    seconds = int((datetime.now(UTC) - created).total_seconds())
    for unit, size, least in (("d", 86400, 2 * 86400), ("h", 3600, 3 * 3600), ("m", 60, 120)):
        if seconds >= least:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _selector(obj: Json) -> str:
    selector = obj.get("spec", {}).get("selector") or {}
    return ",".join(f"{k}={v}" for k, v in sorted(selector.items())) or NONE


def _external(obj: Json) -> str:
    spec = obj.get("spec", {})
    ingress = obj.get("status", {}).get("loadBalancer", {}).get("ingress") or ()
    found = [i.get("ip") or i.get("hostname") for i in ingress] + list(spec.get("externalIPs") or ())
    return ",".join(found) or ("<pending>" if spec.get("type") == "LoadBalancer" else NONE)


def _service_ports(obj: Json) -> str:
    ports = obj.get("spec", {}).get("ports") or ()
    texts = [
        f"{p.get('port')}{':' + str(p['nodePort']) if p.get('nodePort') else ''}/{p.get('protocol')}"
        for p in ports
    ]
    return ",".join(texts) or NONE


def _spec(name: str) -> Cell:
    return lambda obj: str(obj.get("spec", {}).get(name) or NONE)


def _info(name: str) -> Cell:
    return lambda obj: str(obj.get("status", {}).get("nodeInfo", {}).get(name) or "<unknown>")


def _ready(obj: Json) -> str:
    conditions = {c.get("type"): c.get("status") for c in obj.get("status", {}).get("conditions") or ()}
    text = {"True": "Ready", "False": "NotReady"}.get(conditions.get("Ready") or "", "Unknown")
    return text + (",SchedulingDisabled" if obj.get("spec", {}).get("unschedulable") else "")


def _roles(obj: Json) -> str:
    prefix = "node-role.kubernetes.io/"
    labels = obj["metadata"].get("labels") or {}
    return ",".join(sorted(k.removeprefix(prefix) for k in labels if k.startswith(prefix))) or NONE


def _address(kind: str) -> Cell:
    def cell(obj: Json) -> str:
        addresses = obj.get("status", {}).get("addresses") or ()
        return next((a["address"] for a in addresses if a.get("type") == kind), NONE)

    return cell


def _slice_ports(obj: Json) -> str:
    return ",".join(str(p.get("port", "*")) for p in obj.get("ports") or ()) or "<unset>"


def _endpoints(obj: Json) -> str:
    found = [a for e in obj.get("endpoints") or () for a in e.get("addresses") or ()]
    more = f" + {len(found) - 3} more..." if len(found) > 3 else ""
    return ",".join(found[:3]) + more or "<unset>"


def _about(obj: Json) -> str:
    about = obj.get("involvedObject", {})
    return f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}"


COLUMNS: dict[str, tuple[Column, ...]] = {
    "services": (
        ("Name", 0, _name),
        ("Type", 0, _spec("type")),
        ("Cluster-IP", 0, _spec("clusterIP")),
        ("External-IP", 0, _external),
        ("Port(s)", 0, _service_ports),
        ("Age", 0, _age),
        ("Selector", 1, _selector),
    ),
    "nodes": (
        ("Name", 0, _name),
        ("Status", 0, _ready),
        ("Roles", 0, _roles),
        ("Age", 0, _age),
        ("Version", 0, _info("kubeletVersion")),
        ("Internal-IP", 1, _address("InternalIP")),
        ("External-IP", 1, _address("ExternalIP")),
        ("OS-Image", 1, _info("osImage")),
        ("Kernel-Version", 1, _info("kernelVersion")),
        ("Container-Runtime", 1, _info("containerRuntimeVersion")),
    ),
    "endpointslices": (
        ("Name", 0, _name),
        ("AddressType", 0, lambda obj: obj.get("addressType")),
        ("Ports", 0, _slice_ports),
        ("Endpoints", 0, _endpoints),
        ("Age", 0, _age),
    ),
    "events": (
        ("Last Seen", 0, _age),
        ("Type", 0, lambda obj: obj.get("type", "")),
        ("Reason", 0, lambda obj: obj.get("reason", "")),
        ("Object", 0, _about),
        ("Message", 0, lambda obj: obj.get("message", "")),
        ("Name", 1, _name),
    ),
    "leases": (
        ("Name", 0, _name),
        ("Holder", 0, _spec("holderIdentity")),
        ("Age", 0, _age),
    ),
    "namespaces": (
        ("Name", 0, _name),
        ("Status", 0, lambda obj: obj.get("status", {}).get("phase", "")),
        ("Age", 0, _age),
    ),
}
