"""The plan of a lab: which namespaces there are, how they are cabled, and every address. Pure.

    node1 node2 … ── lan0 ─┐                 ┌─ internet  203.0.113.10
    neighbour ───── lan0 ──┤ router (bridges │
    far node(s) ─── lan1 ──┘ live inside it) └─ client    198.51.100.10

The router carries one route per pod range, as a cloud's route table does, so that a far node is a
node across a router. It has no route to the service range: a service address that leaves a node
unhandled dies there and is counted. The neighbour is a machine on lan0 that is no node and reaches
the service range through node1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

SERVICE_CIDR = "10.96.0.0/16"
POD_CIDR = "10.244.0.0/16"
MAX_NODES = 80

# No dash: the namespaces of lab "a" can then never be taken for those of another lab.
LAB_NAME = re.compile(r"[a-z0-9]{1,20}")


class LabError(Exception):
    """Something about a lab that its user can act on, as one sentence."""


class Mode(Enum):
    """How the daemons wire pods: see `podwire daemon --mode`."""

    ROUTED = "routed"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with one cable to the router; `address` is on its eth0, `gateway` is the router."""

    name: str
    namespace: str
    address: str
    gateway: str
    segment: str  # the bridge in the router it hangs on, or "" for a cable of its own

    @property
    def interface(self) -> str:
        """The address with its prefix length, as eth0 carries it."""
        return f"{self.address}/24"


@dataclass(frozen=True, slots=True)
class Node(Host):
    """A host that runs a daemon. `second` is another local address of eth0, to show that any will do."""

    pod_cidr: str
    second: str

    @property
    def pod_gateway(self) -> str:
        """The first address of the pod range: the bridge's own in bridge mode."""
        return self.pod_cidr.replace(".0/24", ".1")


@dataclass(frozen=True, slots=True)
class RouterPort:
    """An interface of the router that carries an address: a segment's bridge, or a cable's end."""

    name: str
    address: str
    bridge: bool


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole lab as a value; make it with `plan`."""

    name: str
    mode: Mode
    nodes: tuple[Node, ...]
    others: tuple[Host, ...]  # neighbour, internet, client

    @property
    def prefix(self) -> str:
        """What the names of all namespaces of this lab begin with."""
        return namespace_prefix(self.name)

    @property
    def router(self) -> str:
        """The router's namespace."""
        return f"{self.prefix}router"

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Every namespace but the router's and the pods'."""
        return (*self.nodes, *self.others)

    @property
    def router_ports(self) -> tuple[RouterPort, ...]:
        """The router's addressed interfaces, segments first."""
        ports = {
            host.segment or host.name: RouterPort(
                host.segment or host.name, f"{host.gateway}/24", bool(host.segment)
            )
            for host in self.hosts
        }
        return tuple(sorted(ports.values(), key=lambda port: (not port.bridge, port.name)))

    @property
    def far_nodes(self) -> int:
        """How many nodes are across the router from node1."""
        return sum(node.segment != self.nodes[0].segment for node in self.nodes)

    def host(self, name: str) -> Host:
        """Return the node or other host of that name, or raise LabError naming those there are."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabError(
            f"lab {self.name} has no host {name!r}; it has {', '.join(h.name for h in self.hosts)}"
        )

    def node(self, name: str) -> Node:
        """Return the node of that name, or raise LabError naming those there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(
            f"lab {self.name} has no node {name!r}; it has {', '.join(n.name for n in self.nodes)}"
        )

    def pod_namespace(self, node: str, pod: str) -> str:
        """The network namespace of a pod."""
        return f"{self.prefix}{node}-{pod}"


def namespace_prefix(lab: str) -> str:
    """What the names of all namespaces of the lab begin with, whether it exists or not."""
    return f"pw-{lab}-"


def plan(name: str, nodes: int = 3, far: int | None = None, mode: Mode = Mode.ROUTED) -> Topology:
    """Return the plan of a lab of `nodes` nodes of which the last `far` are across the router.

    `far` None means one when there are three nodes or more. Raises LabError for what cannot be built.
    """
    if not LAB_NAME.fullmatch(name):
        raise LabError(f"lab name {name!r} must be 1 to 20 lower-case letters and digits")
    if not 1 <= nodes <= MAX_NODES:
        raise LabError(f"--nodes {nodes} must be from 1 to {MAX_NODES}")
    if far is None:
        far = 1 if nodes >= 3 else 0
    if not 0 <= far < nodes:
        raise LabError(f"--far {far} must be from 0 to {nodes - 1}: node1 is on the near segment")
    return Topology(name, mode, tuple(_nodes(name, nodes, far)), tuple(_others(name)))


def _nodes(lab: str, count: int, far: int) -> Iterator[Node]:
    for i in range(1, count + 1):
        segment, subnet = ("lan1", "192.168.60") if i > count - far else ("lan0", "192.168.50")
        yield Node(
            name=f"node{i}",
            namespace=f"{namespace_prefix(lab)}node{i}",
            address=f"{subnet}.{10 + i}",
            gateway=f"{subnet}.1",
            segment=segment,
            pod_cidr=f"10.244.{i}.0/24",
            second=f"{subnet}.{110 + i}",
        )


def _others(lab: str) -> Iterator[Host]:
    prefix = namespace_prefix(lab)
    yield Host("neighbour", f"{prefix}neighbour", "192.168.50.250", "192.168.50.1", "lan0")
    yield Host("internet", f"{prefix}internet", "203.0.113.10", "203.0.113.1", "")
    yield Host("client", f"{prefix}client", "198.51.100.10", "198.51.100.1", "")
