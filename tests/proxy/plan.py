"""The packet-trace table: a fixed address plan, services, and what each packet must meet.

    pods of node1 (this node)   10.244.1.10  10.244.1.11  10.244.1.12 (no endpoint)
    pods of node2               10.244.2.10  10.244.2.11
    node1 192.168.50.11         node2 192.168.50.12
    outside client              198.51.100.10
    cluster addresses           10.96.0.0/16

A case says what a packet may end at: endpoints ("address:port", all of them must be possible and no
other), "drop" or "reject"; and whether its source address is replaced.
Source of the expectations: Kubernetes documentation, "Virtual IPs and Service Proxies" and "Service".
"""

from __future__ import annotations

from dataclasses import dataclass

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
    Snapshot,
    TrafficPolicy,
)

ME = "node1"
POD1, POD1B, POD1C = "10.244.1.10", "10.244.1.11", "10.244.1.12"
POD2, POD2B = "10.244.2.10", "10.244.2.11"
NODE1, NODE2 = "192.168.50.11", "192.168.50.12"
NODE1_ALIAS = "192.168.50.111"
CLIENT = "198.51.100.10"
TCP, UDP = Protocol.TCP, Protocol.UDP
LOCAL, CLUSTER = TrafficPolicy.LOCAL, TrafficPolicy.CLUSTER
HOME = {POD1: "node1", POD1B: "node1", POD2: "node2", POD2B: "node2", NODE1: "node1", NODE2: "node2"}


@dataclass(frozen=True, slots=True)
class Case:
    """One packet: (source, destination, port) → what it may end at, and whether it is masqueraded."""

    name: str
    source: str
    destination: str
    port: int
    expected: frozenset[str]
    masqueraded: bool = False
    protocol: Protocol = TCP


def case(name: str, way: str, expected: str, masqueraded: str = "", protocol: Protocol = TCP) -> Case:
    """Write a case in a line: way is "source > destination:port", expected is blank-separated."""
    source, target = way.split(" > ")
    destination, port = target.split(":")
    return Case(
        name, source, destination, int(port), frozenset(expected.split()), masqueraded == "masq", protocol
    )


def service(
    name: str,
    ip: str,
    *ports: ServicePort,
    internal: TrafficPolicy = CLUSTER,
    external: TrafficPolicy = CLUSTER,
) -> Service:
    return Service(ObjectName("test", name), (ip,), ports, internal, external)


def endpoints(
    name: str, port: int, *addresses: str | Endpoint, port_name: str = "", protocol: Protocol = TCP
) -> EndpointSlice:
    found = tuple(a if isinstance(a, Endpoint) else Endpoint(a, HOME[a]) for a in addresses)
    owner = ObjectName("test", name)
    ports = (EndpointPort(port_name, protocol, port),)
    return EndpointSlice(
        ObjectName("test", f"{name}-{port_name}-{protocol.name}"), owner, Family.V4, ports, found
    )


def unready(address: str, *, serving: bool = False, terminating: bool = False) -> Endpoint:
    return Endpoint(address, HOME[address], False, serving, terminating)


PORTS = (ServicePort("http", TCP, 80), ServicePort("dns", UDP, 53), ServicePort("dns-tcp", TCP, 53))

SERVICES = (
    service("one", "10.96.0.1", ServicePort("", TCP, 80)),
    service("two", "10.96.0.2", ServicePort("", TCP, 80, 30002)),
    service("four", "10.96.0.4", ServicePort("", TCP, 80)),
    service("none", "10.96.0.5", ServicePort("", TCP, 80, 30005), ServicePort("dns", UDP, 53, 30053)),
    service("ports", "10.96.0.6", *PORTS),
    service("inside", "10.96.0.7", ServicePort("", TCP, 80), internal=LOCAL),
    service("inside-away", "10.96.0.8", ServicePort("", TCP, 80), internal=LOCAL),
    service("outside", "10.96.0.9", ServicePort("", TCP, 80, 30009), external=LOCAL),
    service("outside-away", "10.96.0.10", ServicePort("", TCP, 80, 30010), external=LOCAL),
    service("draining", "10.96.0.11", ServicePort("", TCP, 80)),
    service("half-ready", "10.96.0.12", ServicePort("", TCP, 80)),
    service("host", "10.96.0.13", ServicePort("", TCP, 80, 30013)),
    service("outside-none", "10.96.0.14", ServicePort("", TCP, 80, 30014), external=LOCAL),
    service("slices", "10.96.0.15", ServicePort("", TCP, 80)),
)  # fmt: skip

SLICES = (
    endpoints("one", 8080, POD2),
    endpoints("two", 8080, POD1, POD2),
    endpoints("four", 8080, POD1, POD1B, POD2, POD2B),
    endpoints("ports", 8080, POD1, port_name="http"),
    endpoints("ports", 5353, POD2, port_name="dns", protocol=UDP),
    endpoints("ports", 5354, POD2B, port_name="dns-tcp"),
    endpoints("inside", 8080, POD1, POD2),
    endpoints("inside-away", 8080, POD2),
    endpoints("outside", 8080, POD1, POD2),
    endpoints("outside-away", 8080, POD2, POD2B),
    endpoints("draining", 8080, unready(POD1), unready(POD2, serving=True, terminating=True)),
    endpoints("half-ready", 8080, POD1, unready(POD1B), unready(POD2, serving=True, terminating=True)),
    endpoints("host", 8080, NODE2),
    endpoints("slices", 8080, POD1, POD2),
    EndpointSlice(
        ObjectName("test", "slices-more"), ObjectName("test", "slices"), Family.V4,
        (EndpointPort("", TCP, 9090),), (Endpoint(POD2B, "node2"), Endpoint(POD2, "node2")),
    ),
)  # fmt: skip

NODES = {
    "node1": Node("node1", ("10.244.1.0/24",), (NODE1,)),
    "node2": Node("node2", ("10.244.2.0/24",), (NODE2,)),
}


def snapshot() -> Snapshot:
    """Return the plan as a snapshot."""
    slices: dict[ObjectName, tuple[EndpointSlice, ...]] = {}
    for piece in SLICES:
        slices[piece.service] = (*slices.get(piece.service, ()), piece)
    return Snapshot({s.name: s for s in SERVICES}, slices, NODES)


P1, P1B, P2, P2B = (f"{a}:8080" for a in (POD1, POD1B, POD2, POD2B))

MORE = f"{POD2B}:9090 {POD2}:9090"

CASES = (
    # Cluster addresses
    case("a pod reaches a pod of another node", f"{POD1} > 10.96.0.1:80", P2),
    case("the client's address is kept between pods", f"{POD1B} > 10.96.0.2:80", f"{P1} {P2}"),
    case("a pod of another node by this one", f"{POD2B} > 10.96.0.1:80", P2),
    case("four endpoints, each possible", f"{POD1C} > 10.96.0.4:80", f"{P1} {P1B} {P2} {P2B}"),
    case("the node itself, masqueraded as no pod", f"{NODE1} > 10.96.0.2:80", f"{P1} {P2}", "masq"),
    case("another node, masqueraded", f"{NODE2} > 10.96.0.1:80", P2, "masq"),
    case("an outside client, masqueraded", f"{CLIENT} > 10.96.0.2:80", f"{P1} {P2}", "masq"),
    case("an endpoint in the host network", f"{POD1} > 10.96.0.13:80", f"{NODE2}:8080"),
    case("a pod without service is not touched", f"{POD1} > {POD2}:8080", P2),
    case("another protocol on the port is refused", f"{POD1} > 10.96.0.2:80", "reject", "", UDP),
    # Ports and protocols
    case("a named port", f"{POD1B} > 10.96.0.6:80", P1),
    case("the same number for UDP", f"{POD1B} > 10.96.0.6:53", f"{POD2}:5353", "", UDP),
    case("the same number for TCP", f"{POD1B} > 10.96.0.6:53", f"{POD2B}:5354"),
    case("slices of one service with different ports", f"{POD1B} > 10.96.0.15:80", f"{P1} {P2} {MORE}"),
    # No endpoints
    case("no endpoints: TCP is refused", f"{POD1} > 10.96.0.5:80", "reject"),
    case("no endpoints: UDP is refused", f"{POD1} > 10.96.0.5:53", "reject", "", UDP),
    case("no endpoints: refused for the node", f"{NODE1} > 10.96.0.5:80", "reject"),
    case("no endpoints: refused at the node port", f"{CLIENT} > {NODE1}:30005", "reject"),
    case("no endpoints: UDP refused at the node port", f"{CLIENT} > {NODE1}:30053", "reject", "", UDP),
    case("no endpoints anywhere under policy Local: refused", f"{CLIENT} > {NODE1}:30014", "reject"),
    # Readiness
    case("nobody ready: serving terminating endpoints", f"{POD1B} > 10.96.0.11:80", P2),
    case("somebody ready: only ready endpoints", f"{POD1B} > 10.96.0.12:80", P1),
    # internalTrafficPolicy
    case("internal Local: endpoints of this node", f"{POD1B} > 10.96.0.7:80", P1),
    case("internal Local without one here: dropped", f"{POD1B} > 10.96.0.8:80", "drop"),
    case("internal Local for the node itself", f"{NODE1} > 10.96.0.7:80", P1, "masq"),
    # Node ports
    case("a node port is masqueraded", f"{CLIENT} > {NODE1}:30002", f"{P1} {P2}", "masq"),
    case("on any address of the node", f"{CLIENT} > {NODE1_ALIAS}:30002", f"{P1} {P2}", "masq"),
    case("from a pod of this node", f"{POD1B} > {NODE1}:30002", f"{P1} {P2}", "masq"),
    case("from another node", f"{NODE2} > {NODE1}:30002", f"{P1} {P2}", "masq"),
    case("from the node itself", f"{NODE1} > {NODE1}:30002", f"{P1} {P2}", "masq"),
    case("to an endpoint in another node's network", f"{CLIENT} > {NODE1}:30013", f"{NODE2}:8080", "masq"),
    # externalTrafficPolicy
    case("external Local: endpoints of this node, address kept", f"{CLIENT} > {NODE1}:30009", P1),
    case("external Local without one here: dropped", f"{CLIENT} > {NODE1}:30010", "drop"),
    case("external Local from a pod: all, address kept", f"{POD1B} > {NODE1}:30009", f"{P1} {P2}"),
    case("external Local from a pod, none here: all", f"{POD1B} > {NODE1}:30010", f"{P2} {P2B}"),
    case("external Local from the node: all", f"{NODE1} > {NODE1}:30010", f"{P2} {P2B}", "masq"),
    case("external Local does not touch the cluster address", f"{POD1B} > 10.96.0.9:80", f"{P1} {P2}"),
    # Hairpin
    case("a pod that reaches itself is masqueraded", f"{POD1} > 10.96.0.6:80", P1, "masq"),
    # Egress
    case("a pod to the outside is masqueraded", f"{POD1} > {CLIENT}:80", f"{CLIENT}:80", "masq"),
    case("a pod to another node keeps its address", f"{POD1} > {NODE2}:80", f"{NODE2}:80"),
    case("the node to the outside keeps its address", f"{NODE1} > {CLIENT}:80", f"{CLIENT}:80"),
    case("somebody else's traffic through the node", f"{CLIENT} > {NODE2}:80", f"{NODE2}:80"),
)  # fmt: skip
