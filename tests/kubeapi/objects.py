"""Small objects for tests, and what their answers are held to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kubeapi.client import Refused

Json = dict[str, Any]


def service(name: str, space: str, **labels: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": space, "labels": labels},
        "spec": {"ports": [{"port": 80}]},
    }


def piece(name: str, space: str, *addresses: str) -> Json:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": space, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a]} for a in addresses],
        "ports": [{"port": 8080}],
    }


def lease(name: str, space: str, holder: str = "node-1") -> Json:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": space},
        "spec": {"holderIdentity": holder},
    }


def version(obj: Json) -> int:
    return int(obj["metadata"]["resourceVersion"])


def names(objects: Json) -> list[str]:
    return [o["metadata"]["name"] for o in objects["items"]]


def refused(code: int, reason: str, call: Any, *args: Any, **kwargs: Any) -> Json:
    """Hold an answer to be a Status with this code and reason; return it."""
    with pytest.raises(Refused) as caught:
        call(*args, **kwargs)
    status = caught.value.status
    assert (status["kind"], status["status"]) == ("Status", "Failure"), status
    assert (status["code"], status.get("reason", "")) == (code, reason), status
    return status


def event(space: str, **more: Any) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "something", "namespace": space},
        "involvedObject": {"apiVersion": "v1", "kind": "Service", "name": "web", "namespace": space},
        "reason": "Unusable",
        "message": "a port has no number",
        "type": "Warning",
        "count": 1,
        **more,
    }
