"""The lab's share of a control plane: run the pods of a file, and say which pods are behind which Service."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import runtime, state
from lab.runtime import Pod, PodSpec
from lab.state import Json, Lab
from lab.topology import LabError

WORKERS = 4


def apply(lab: Lab, path: Path) -> list[Pod]:
    """Put a file's Services into the manifests, run its Pods, then publish their endpoints.

    Raises LabError for a file that cannot be read, and for a pod that cannot be run: then the others
    of the file stay.
    """
    documents = state.documents_of(path)
    specs = [pod_spec(document) for document in documents if document.get("kind") == "Pod"]
    for document in documents:
        if document.get("kind") == "Service":
            state.write_manifest(lab, document)
    return run(lab, specs)


def run(lab: Lab, specs: Iterable[PodSpec]) -> list[Pod]:
    """Run several pods at once, then publish."""
    with ThreadPoolExecutor(WORKERS) as pool:
        made = list(pool.map(lambda spec: runtime.add(lab, spec), specs))
    publish(lab)
    return made


def remove(lab: Lab, pod: Pod) -> None:
    """Take a pod out of its Services, then remove it: no new connection meets a dying pod."""
    publish(lab, without=pod)
    runtime.remove(lab, pod)


def publish(lab: Lab, without: Pod | None = None) -> None:
    """Write the EndpointSlice of every Service that has a selector, from the pods' labels."""
    pods = [pod for pod in runtime.pods(lab) if pod != without and pod.addresses]
    for service in state.manifests(lab, "Service"):
        if service["spec"].get("selector"):
            state.write_manifest(lab, endpoint_slice(service, pods))


def endpoint_slice(service: Json, pods: Iterable[Pod]) -> Json:
    """Return the EndpointSlice of a Service over those of the pods that it selects."""
    meta, spec = service["metadata"], service["spec"]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": meta["name"],
            "namespace": meta.get("namespace", "default"),
            "labels": {"kubernetes.io/service-name": meta["name"]},
        },
        "addressType": "IPv4",
        "ports": [_port(meta["name"], port) for port in spec["ports"]],
        "endpoints": [_endpoint(pod) for pod in pods if _selects(service, pod)],
    }


def pod_spec(document: Json) -> PodSpec:
    """Return what the lab runs for a Pod object: an echo server on its containers' ports."""
    meta, spec = document["metadata"], document.get("spec", {})
    if "nodeName" not in spec:
        raise LabError(f"pod {meta.get('name')!r}: spec.nodeName is missing, and a lab has no scheduler")
    ports = (port["containerPort"] for c in spec.get("containers", ()) for port in c.get("ports", ()))
    return PodSpec(
        name=meta["name"],
        node=spec["nodeName"],
        namespace=meta.get("namespace", "default"),
        labels=dict(meta.get("labels", {})),
        ports=tuple(ports),
    )


def _selects(service: Json, pod: Pod) -> bool:
    if service["metadata"].get("namespace", "default") != pod.spec.namespace:
        return False
    return all(pod.spec.labels.get(key) == value for key, value in service["spec"]["selector"].items())


def _port(service: str, port: Json) -> Json:
    target = port.get("targetPort", port["port"])
    if not isinstance(target, int):
        raise LabError(f"service {service!r}: targetPort {target!r} must be a number in a lab")
    return {"name": port.get("name", ""), "protocol": port.get("protocol", "TCP"), "port": target}


def _endpoint(pod: Pod) -> Json:
    return {
        "addresses": list(pod.addresses),
        "nodeName": pod.spec.node,
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {"kind": "Pod", "namespace": pod.spec.namespace, "name": pod.spec.name},
    }
