"""A cluster that is followed in this process, and what is checked at every step: nothing flaps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.kube.api import Api, Credentials
from node.sources.kubernetes import Cluster
from node.sources.objects import parse
from node.sources.reflector import Reflector, Timing
from node.store import Store
from proxy.model import EMPTY, ObjectName, Snapshot
from tests.kubeapi.running import KubeApi

DEADLINE = 15.0
QUICK = Timing(silence=1.0, backoff=(0.01, 0.1), steady=0.05)
KINDS = ("services", "endpointslices", "nodes")
Json = dict[str, Any]


def service(name: str, ip: str = "", **spec: Any) -> Json:
    """Return a Service document; the server allocates an address where none is given."""
    given = {"clusterIP": ip} if ip else {}
    ports = [{"name": "http", "port": 80}]
    metadata = {"name": name, "namespace": "shop"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"ports": ports, **given, **spec},
    }


def piece(name: str, owner: str, *addresses: str) -> Json:
    """Return an EndpointSlice document."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }


def node(name: str, cidr: str, address: str) -> Json:
    """Return a Node document."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def truth(api: KubeApi) -> Snapshot:
    """Return what the server has, asked for plainly: everything in one list of each kind."""
    store = Store()
    found = {}
    for kind, plural in zip(("Service", "EndpointSlice", "Node"), KINDS, strict=True):
        for document in api.list(plural)["items"]:
            value = parse({"kind": kind, **document})
            if value is not None:
                found[kind, str(value.name)] = value
    store.replace(found)
    pending = store.take(0)
    assert pending
    return pending.snapshot


@dataclass
class Follower:
    """What a node knows of the cluster; `stable` are names that must be in every snapshot from now on."""

    api: KubeApi
    store: Store
    cluster: Cluster
    snapshot: Snapshot = EMPTY
    taken: int = 0
    stable: set[ObjectName] = field(default_factory=set)

    def look(self, timeout: float = 0.05) -> Snapshot:
        """Take what is new, and check that what did not change in the cluster is there as before."""
        before = self.snapshot
        if pending := self.store.take(timeout):
            self.snapshot = pending.snapshot
            self.taken += 1
            for name in self.stable:
                assert self.snapshot.services[name] == before.services[name], "a rule has flapped"
                assert self.snapshot.slices[name] == before.slices[name], "a rule has flapped"
        return self.snapshot

    def keep_stable(self, *names: str) -> None:
        """From now on these services must neither change nor go."""
        self.stable = {ObjectName("shop", name) for name in names}

    def wait(self, good: Callable[[Snapshot], bool], what: str) -> None:
        """Take changes until the snapshot is good."""
        deadline = time.monotonic() + DEADLINE
        while not good(self.look()):
            assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}: {self.cluster.problems}"

    def converges(self, wanted: Snapshot | None = None) -> None:
        """Wait until what is known is what the server has, or had."""
        wanted = wanted or truth(self.api)
        self.wait(lambda found: found == wanted, "the state is the API's")

    @property
    def reflectors(self) -> dict[str, Reflector]:
        """The three of them, by kind."""
        return {r._resource.kind: r for r in self.cluster._reflectors}

    def lists(self) -> int:
        """How many lists were read so far."""
        return sum(r.state.lists for r in self.reflectors.values())


@contextlib.contextmanager
def following(
    api: KubeApi, folder: Path, credentials: Credentials | None = None, timing: Timing = QUICK
) -> Iterator[Follower]:
    """Follow the cluster until the end of the block."""
    credentials = credentials or Credentials(api.kubeconfig(folder / "kubeconfig"))
    store, stop = Store(), threading.Event()
    cluster = Cluster(Api(credentials, "test"), store, "node1", folder, timing)
    thread = threading.Thread(target=cluster.run, args=(stop.wait,))
    thread.start()
    try:
        yield Follower(api, store, cluster)
    finally:
        stop.set()
        thread.join(DEADLINE)
        assert not thread.is_alive()
