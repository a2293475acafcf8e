"""The lab's share of a control plane: run the pods of a file, and say which pods are behind which Service."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from lab import runtime, state
from lab.runtime import Pod, PodSpec
from lab.state import Json, Lab
from lab.topology import LabError, title, titles
from netlink.family import Family

WORKERS = 4


@dataclass(frozen=True, slots=True)
class Applied:
    """A pod of a file and what `apply` did for it: made, replaced (its spec has changed) or unchanged."""

    pod: Pod
    what: str


def apply(lab: Lab, path: Path) -> list[Applied]:
    """Put a file's Services into the manifests, bring its Pods about, then publish their endpoints.

    A pod that runs as the file says stays as it is, so that a file can be applied again. Raises LabError
    for a file that cannot be read, and for a pod that cannot be run: then the others of the file stay.
    """
    documents = state.documents_of(path)
    specs = [pod_spec(document) for document in documents if document.get("kind") == "Pod"]
    services = [
        service_object(document, lab.plan.families)
        for document in documents
        if document.get("kind") == "Service"
    ]
    for service in services:
        state.write_manifest(lab, service)
    wanted = {_identity(spec): spec for spec in specs}
    there = [pod for pod in runtime.pods(lab) if _identity(pod.spec) in wanted]
    kept = {
        _identity(pod.spec): pod
        for pod in there
        if pod.spec == wanted[_identity(pod.spec)] and pod.addresses  # without any its ADD never finished
    }
    outdated = [pod for pod in there if pod not in kept.values()]
    for pod in outdated:
        remove(lab, pod)
    made = run(lab, [spec for spec in wanted.values() if _identity(spec) not in kept])
    replaced = {_identity(pod.spec) for pod in outdated}
    found = {identity: Applied(pod, "unchanged") for identity, pod in kept.items()}
    for pod in made:
        identity = _identity(pod.spec)
        found[identity] = Applied(pod, "replaced" if identity in replaced else "made")
    return [found[identity] for identity in wanted]


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
    """Write the EndpointSlices of every Service with a selector, one per family, from the pods' labels."""
    pods = [pod for pod in runtime.pods(lab) if pod != without and pod.addresses]
    for service in state.manifests(lab, "Service"):
        if service["spec"].get("selector"):
            for family in cluster_addresses(service):
                state.write_manifest(lab, endpoint_slice(service, pods, family))


def cluster_addresses(service: Json) -> dict[Family, str]:
    """Return a Service's cluster addresses by family; none for a headless one."""
    spec = service.get("spec", {})
    given = spec.get("clusterIPs") or [spec.get("clusterIP") or "None"]
    if given == ["None"]:
        return {}
    try:
        return {Family(ip_address(address).version): address for address in given}
    except ValueError as error:
        raise LabError(f"service {service['metadata'].get('name')!r}: clusterIPs: {error}") from None


def balancer_addresses(service: Json) -> dict[Family, str]:
    """Return the addresses that a load balancer has for a Service, by family; none for most."""
    found = ((_family(entry), entry.get("ip", "")) for entry in _ingress(service))
    return {family: address for family, address in found if family is not None}


def service_object(document: Json, families: Collection[Family]) -> Json:
    """Return a Service as the lab's control plane keeps it: with addresses of the lab's families.

    ipFamilyPolicy as Kubernetes has it: with PreferDualStack a family that the lab lacks is left out, else
    LabError is raised.
    """
    given = cluster_addresses(document)
    served = [family for family in given if family in families]
    if len(served) == len(given):
        return document
    spec = document["spec"]
    if not served or spec.get("ipFamilyPolicy") != "PreferDualStack":
        lacking = titles(family for family in given if family not in served)
        raise LabError(f"service {document['metadata'].get('name')!r} needs {lacking}, which the lab has not")
    addresses = [given[family] for family in served]
    changed = {
        "clusterIP": addresses[0],
        "clusterIPs": addresses,
        "ipFamilies": [title(family) for family in served],
    }
    kept = document | {"spec": spec | changed}
    if _ingress(document):
        ingress = [entry for entry in _ingress(document) if _family(entry) in (None, *served)]
        kept |= {"status": document["status"] | {"loadBalancer": {"ingress": ingress}}}
    return kept


def endpoint_slice(service: Json, pods: Iterable[Pod], family: Family) -> Json:
    """Return the EndpointSlice of one family of a Service over those of the pods that it selects.

    A pod without an address of the family is not in it.
    """
    meta, spec = service["metadata"], service["spec"]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{meta['name']}-{title(family).lower()}",
            "namespace": meta.get("namespace", "default"),
            "labels": {"kubernetes.io/service-name": meta["name"]},
        },
        "addressType": title(family),
        "ports": [_port(meta["name"], port) for port in spec["ports"]],
        "endpoints": [
            _endpoint(pod, address)
            for pod in pods
            if _selects(service, pod)
            for address in pod.addresses
            if ip_address(address).version == family.value
        ],
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


def _ingress(service: Json) -> list[Json]:
    """Return what a Service's status says of its load balancer."""
    found: list[Json] = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    return found


def _family(ingress: Json) -> Family | None:
    """Return the family of a load balancer's address; None when it goes by a host name."""
    return Family(ip_address(ingress["ip"]).version) if "ip" in ingress else None


def _identity(spec: PodSpec) -> tuple[str, str]:
    return spec.namespace, spec.name


def _selects(service: Json, pod: Pod) -> bool:
    if service["metadata"].get("namespace", "default") != pod.spec.namespace:
        return False
    return all(pod.spec.labels.get(key) == value for key, value in service["spec"]["selector"].items())


def _port(service: str, port: Json) -> Json:
    target = port.get("targetPort", port["port"])
    if not isinstance(target, int):
        raise LabError(f"service {service!r}: targetPort {target!r} must be a number in a lab")
    return {"name": port.get("name", ""), "protocol": port.get("protocol", "TCP"), "port": target}


def _endpoint(pod: Pod, address: str) -> Json:
    return {
        "addresses": [address],
        "nodeName": pod.spec.node,
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {"kind": "Pod", "namespace": pod.spec.namespace, "name": pod.spec.name},
    }
