"""A large cluster from nothing, and changes in it.

Addresses: node i is `node-i`, 172.16.0.0/12, its podCIDR the i-th /24 of 10.128.0.0/9. Service i is
`service-i` in one of 20 namespaces, its cluster address the i-th of 10.96.0.0/12; its endpoints lie in the
nodes' podCIDRs, round-robin.
"""

from __future__ import annotations

import ipaddress
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from tests.kubeapi.resources import BY_KIND, NAMESPACES, NODES, SERVICES, SLICES, Resource
from tests.kubeapi.store import Entry, Store, entry_of, now

Json = dict[str, Any]

POD_RANGE = int(ipaddress.ip_address("10.128.0.0"))
NODE_RANGE = int(ipaddress.ip_address("172.16.0.10"))
SERVICE_RANGE = int(ipaddress.ip_address("10.96.0.1"))
NAMESPACE_COUNT = 20


class Cluster(msgspec.Struct, forbid_unknown_fields=True):
    """How large. `node_bytes` is about the size of an encoded Node; images fill it up, as on real ones."""

    services: int = 0
    endpoints: int = 10
    nodes: int = 0
    node_bytes: int = 10_000


def parse(text: str) -> Cluster:
    """Return what `services=10000,endpoints=10,nodes=5000` says; raises ValueError in words."""
    values = {}
    for term in filter(None, text.split(",")):
        name, _, number = term.partition("=")
        if name not in Cluster.__struct_fields__ or not number.isdecimal():
            raise ValueError(
                f"--generate: {term!r} is not one of {', '.join(Cluster.__struct_fields__)} =NUMBER"
            )
        values[name] = int(number)
    return Cluster(**values)


def cluster(size: Cluster, version: int) -> Iterator[tuple[Resource, Entry]]:
    """Yield the objects; their versions go on from `version`."""
    for i in range(NAMESPACE_COUNT if size.services else 0):
        version += 1
        yield NAMESPACES, entry_of(_namespace(i), version)
    images: list[Json] = []
    for i in range(size.nodes):
        version += 1
        if not images:
            images = _images(size.node_bytes - len(entry_of(_node(i, []), 0).body))
        yield NODES, entry_of(_node(i, images), version)
    for i in range(size.services):
        version += 2
        yield SERVICES, entry_of(_service(i), version - 1)
        yield SLICES, entry_of(_slice(i, size), version)


def listed(document: Json, version: int) -> Iterator[tuple[Resource, Entry]]:
    """Yield the objects of a `List` of any kinds; raises ValueError in words."""
    for obj in document.get("items") or ():
        resource = BY_KIND.get((obj.get("apiVersion", ""), obj.get("kind", "")))
        if resource is None:
            raise ValueError(f"the server has no kind {obj.get('kind')} in {obj.get('apiVersion')}")
        version += 1
        plain = {k: v for k, v in obj.items() if k not in ("kind", "apiVersion")}
        plain["metadata"] = {**_metadata(""), **obj["metadata"]}
        yield resource, entry_of(plain, version)


def _metadata(name: str, **more: Any) -> Json:
    return {
        "name": name,
        **more,
        "uid": str(uuid.UUID(int=random.getrandbits(128))),
        "creationTimestamp": STARTED,
    }


STARTED = now()


def _namespace(i: int) -> Json:
    name = f"apps-{i}"
    labels = {"kubernetes.io/metadata.name": name}
    return {
        "metadata": _metadata(name, labels=labels),
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    }


def _address(number: int) -> str:
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def pod_range(i: int) -> str:
    """Return the podCIDR of node i."""
    return f"{_address(POD_RANGE + i * 256)}/24"


def _images(size: int) -> list[Json]:
    """Return images of about so many bytes, by digest and by tag, as kubelet reports them."""
    images, used, i = [], 0, 0
    while used < size:
        name = f"registry.example.com/team-{i % 7}/application-{i}"
        names = [f"{name}@sha256:{uuid.UUID(int=i + 1).hex * 2}", f"{name}:v1.{i}.0"]
        images.append({"names": names, "sizeBytes": 50_000_000 + i * 1_234_567})
        used += len(msgspec.json.encode(images[-1])) + 1
        i += 1
    return images


CONDITIONS = (
    ("NetworkUnavailable", "False", "RouteCreated", "RouteController created a route"),
    ("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
)


def _node(i: int, images: list[Json]) -> Json:
    name, resources = f"node-{i}", {"cpu": "16", "memory": "65536000Ki", "pods": "110"}
    labels = {
        "beta.kubernetes.io/arch": "amd64",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "standard-16",
        "topology.kubernetes.io/region": "region-1",
        "topology.kubernetes.io/zone": f"region-1{'abc'[i % 3]}",
    }
    conditions = [
        {
            "type": kind,
            "status": status,
            "lastHeartbeatTime": STARTED,
            "lastTransitionTime": STARTED,
            "reason": reason,
            "message": message,
        }
        for kind, status, reason, message in CONDITIONS
    ]
    address = _address(NODE_RANGE + i)
    return {
        "metadata": _metadata(name, labels=labels, annotations={"node.alpha.kubernetes.io/ttl": "30"}),
        "spec": {"podCIDR": pod_range(i), "podCIDRs": [pod_range(i)], "providerID": f"example://{name}"},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {
                "machineID": f"{i:032x}",
                "systemUUID": str(uuid.UUID(int=i + 1)),
                "bootID": str(uuid.UUID(int=i + 2)),
                "kernelVersion": "6.18.0",
                "osImage": "Debian GNU/Linux 12 (bookworm)",
                "containerRuntimeVersion": "containerd://2.0.1",
                "kubeletVersion": "v1.34.0",
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": "amd64",
            },
            "images": images,
        },
    }


def _service(i: int) -> Json:
    name, address = f"service-{i}", _address(SERVICE_RANGE + i)
    return {
        "metadata": _metadata(name, namespace=f"apps-{i % NAMESPACE_COUNT}", labels={"app": name}),
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "selector": {"app": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def _endpoint(i: int, j: int, size: Cluster, shift: int = 0) -> Json:
    number, nodes = i * size.endpoints + j, size.nodes or 100
    node = number % nodes
    host = 2 + (number // nodes + shift) % 253
    name, namespace = f"service-{i}", f"apps-{i % NAMESPACE_COUNT}"
    pod = {
        "kind": "Pod",
        "namespace": namespace,
        "name": f"{name}-{j}",
        "uid": str(uuid.UUID(int=number + 1)),
    }
    return {
        "addresses": [_address(POD_RANGE + node * 256 + host)],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": pod,
        "nodeName": f"node-{node}",
        "zone": f"region-1{'abc'[node % 3]}",
    }


def _slice(i: int, size: Cluster) -> Json:
    service, namespace = f"service-{i}", f"apps-{i % NAMESPACE_COUNT}"
    labels = {
        "app": service,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": service,
    }
    owner = {
        "apiVersion": "v1",
        "kind": "Service",
        "name": service,
        "uid": str(uuid.UUID(int=i + 1)),
        "controller": True,
        "blockOwnerDeletion": True,
    }
    more = {
        "namespace": namespace,
        "generateName": f"{service}-",
        "labels": labels,
        "ownerReferences": [owner],
    }
    return {
        "metadata": {**_metadata(f"{service}-b4x7z", **more), "generation": 1},
        "addressType": "IPv4",
        "endpoints": [_endpoint(i, j, size) for j in range(size.endpoints)],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


class Rate(msgspec.Struct, forbid_unknown_fields=True):
    """How many changes a second, for how many seconds, of which objects; in batches every `tick` seconds."""

    rate: float
    seconds: float
    kind: str = "endpointslices"
    tick: float = 0.01
    seed: int = 0


class Churn:
    """Changes objects at a rate, in a random order, each once before any comes again.

    EndpointSlices: readiness flips, and every fourth time a replacement of an address; the annotation with
    the time of the change is set, as the endpoint slice controller does. Nodes: heartbeats, nothing else.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.made = 0

    @property
    def running(self) -> bool:
        """Whether changes are being made."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, rate: Rate) -> None:
        """Make changes, in a thread of its own; those before it end."""
        if rate.kind not in CHANGES:
            raise ValueError(f"{rate.kind!r} is not one of {', '.join(CHANGES)}")
        self.stop()
        self._stop.clear()
        self.made = 0
        self._thread = threading.Thread(target=self._run, args=(rate,), name="churn", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the changes; what is made stays."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self, rate: Rate) -> None:
        resource, change = CHANGES[rate.kind]
        random_ = random.Random(rate.seed)
        store = self._store
        keys = [e.key for e in store.snapshot(resource).entries]
        random_.shuffle(keys)
        start, total = time.monotonic(), int(rate.rate * rate.seconds)
        while keys and self.made < total and not self._stop.is_set():
            due = min(total, int((time.monotonic() - start) * rate.rate))
            with store.changed:  # watches wake once for a batch
                while self.made < due:
                    if entry := store.find(resource, keys[self.made % len(keys)]):
                        obj = entry.decoded()
                        change(obj, random_)
                        store.overwrite(resource, entry, obj)
                    self.made += 1
            self._stop.wait(rate.tick)


def _change_slice(obj: Json, random_: random.Random) -> None:
    if endpoints := obj.get("endpoints"):
        chosen = random_.choice(endpoints)
        if random_.randrange(4) == 0:
            taken = {e["addresses"][0] for e in endpoints}
            sign = ":" if ":" in chosen["addresses"][0] else "."
            prefix = chosen["addresses"][0].rpartition(sign)[0]
            address = next(iter(taken))
            while address in taken:
                address = f"{prefix}{sign}{random_.randrange(2, 255):{'x' if sign == ':' else 'd'}}"
            chosen["addresses"] = [address]
        else:
            conditions = chosen.setdefault("conditions", {})
            conditions["ready"] = conditions["serving"] = not conditions.get("ready", True)
    metadata = obj["metadata"]
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    metadata.setdefault("annotations", {})["endpoints.kubernetes.io/last-change-trigger-time"] = stamp
    metadata["generation"] = metadata.get("generation", 0) + 1


def _change_node(obj: Json, random_: random.Random) -> None:
    stamp = now()
    for condition in obj.get("status", {}).get("conditions") or ():
        condition["lastHeartbeatTime"] = stamp


Change = Callable[[Json, random.Random], None]
CHANGES: dict[str, tuple[Resource, Change]] = {
    "endpointslices": (SLICES, _change_slice),
    "nodes": (NODES, _change_node),
}
