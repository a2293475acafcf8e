"""The packet-trace table's world: an address plan in both IP families, services and their endpoints.

    pods of node1 (this node)   pod1 10.244.1.10   pod1b 10.244.1.11   pod1c 10.244.1.12 (no endpoint)
    pods of node2               pod2 10.244.2.10   pod2b 10.244.2.11
    node1                       192.168.50.11 (InternalIP), second1 192.168.60.11, alias1 192.168.50.111
    node2                       192.168.50.12 (InternalIP), second2 192.168.60.12
    outside clients             client 198.51.100.10, stranger 203.0.113.10 (pods keep their address to there)
    service number N            10.96.0.N, external address 198.18.0.N, load balancer 198.19.0.N,
                                node port 30000 + N

Addresses are written in IPv4. IPv6 has the same numbers: 10.244.1.10 is fd00:10:244:1::10.
The node's L7 proxy listens on addresses that no numbers stand for: l7-http and l7-tcp (proxy.l7.places).

This node is in zone a. Its node ports are on its InternalIP and on 192.168.60.0/24, not on alias1.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from msgspec.structs import replace

from netlink.family import Family
from node import masquerade
from proxy.dataplane import NodeRanges
from proxy.frontends import Action, Frontend, frontends, title_of
from proxy.l7 import places
from proxy.l7.backends import with_proxied
from proxy.l7.policy import Policy
from proxy.l7.policy import Protocol as L7Protocol
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
from proxy.table import FrontendTable
from proxy.topology import Place

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
LOCAL = TrafficPolicy.LOCAL
HERE = Place("node1", "a")
PLACES = {
    "pod1": "10.244.1.10",
    "pod1b": "10.244.1.11",
    "pod1c": "10.244.1.12",
    "pod2": "10.244.2.10",
    "pod2b": "10.244.2.11",
    "node1": "192.168.50.11",
    "second1": "192.168.60.11",
    "alias1": "192.168.50.111",
    "loopback": "127.0.0.1",
    "node2": "192.168.50.12",
    "second2": "192.168.60.12",
    "client": "198.51.100.10",
    "stranger": "203.0.113.10",
    "upstream": "192.0.2.1",
    "nobody": "10.96.255.1",
}
"""Who has which address. No service has nobody's, although it is a cluster address; the default route leads
upstream."""
OWN = ("node1", "second1", "alias1", "loopback")
"""What this node itself has."""
PROXIES = {f"l7-{protocol.value}": protocol for protocol in L7Protocol}
"""Where the node's L7 proxy listens for what a case is addressed to; something that answers stands for it."""
PROXIED_PORT = 10000
HOME = dict.fromkeys(("pod1", "pod1b", "node1"), "node1") | dict.fromkeys(("pod2", "pod2b", "node2"), "node2")


def twin(text: str) -> str:
    """Return the IPv6 address or range that stands for an IPv4 one: the same numbers, in groups.

    A range's prefix must end at a byte. Loopback is a single address in IPv6.
    """
    address, _, length = text.partition("/")
    if address.startswith("127."):
        found = "::1"
    elif address == "0.0.0.0":
        found = "::"
    else:
        a, b, c, d = address.split(".")
        found = str(ip_address(f"fd00:{a}:{b}:{c}::{d}"))
    if not length:
        return found
    bits = {0: 0, 8: 32, 16: 48, 24: 64, 32: 128}[int(length)]
    return str(ip_network(f"{found}/{128 if found == '::1' else bits}"))


def both(*texts: str) -> tuple[str, ...]:
    """Return addresses or ranges and their twins."""
    return (*texts, *map(twin, texts))


def service(
    name: str, number: int, *ports: ServicePort, families: tuple[Family, ...] = tuple(Family), **fields: Any
) -> Service:
    """Return a service with a cluster address for each of its families; `fields` are those of Service."""
    address = f"10.96.0.{number}"
    cluster_ips = tuple(address if f is Family.V4 else twin(address) for f in families)
    return Service(ObjectName("test", name), cluster_ips, ports, **fields)


def port(node_port: int = 0, number: int = 80, protocol: Protocol = TCP, name: str = "") -> ServicePort:
    """Return a service's port."""
    return ServicePort(name, protocol, number, node_port)


def external(number: int) -> dict[str, tuple[str, ...]]:
    """Return the externalIPs and the load balancer's addresses of a service by its number."""
    return {"external_ips": both(f"198.18.0.{number}"), "balancer_ips": both(f"198.19.0.{number}")}


def ready(name: str, *zones: str, nodes: tuple[str, ...] = ()) -> Endpoint:
    """Return a ready endpoint with the hints that it has."""
    return Endpoint(name, HOME[name], zone_hints=zones, node_hints=nodes)


def unready(name: str, *, serving: bool = False, terminating: bool = False) -> Endpoint:
    """Return an endpoint that is not ready."""
    return Endpoint(name, HOME[name], False, serving, terminating)


def draining(name: str) -> Endpoint:
    """Return an endpoint that is terminating, and serving until it has gone."""
    return unready(name, serving=True, terminating=True)


def slices(
    name: str,
    who: str | tuple[Endpoint, ...],
    target: EndpointPort,
    families: tuple[Family, ...] = tuple(Family),
) -> tuple[EndpointSlice, ...]:
    """Return a service's EndpointSlice in each family; `who`: endpoints, or names if all are ready."""
    found = who if isinstance(who, tuple) else tuple(map(ready, who.split()))
    return tuple(
        EndpointSlice(
            ObjectName("test", f"{name}-{target.protocol.name}-{target.port}-{family.keyword}"),
            ObjectName("test", name),
            family,
            (target,),
            tuple(replace(e, address=place(e.address, family)) for e in found),
        )
        for family in families
    )


def place(name: str, family: Family) -> str:
    """Return the address of a place."""
    return PLACES[name] if family is Family.V4 else twin(PLACES[name])


PLAIN_OUTSIDE = Policy()
EVERYWHERE = Policy(protocol=L7Protocol.TCP, external=True)
WEB = EndpointPort("", TCP, 8080)
DNS = EndpointPort("", UDP, 5353)
PORTS = (
    port(30006, name="http"),
    port(30056, 53, UDP, "dns"),
    port(30056, 53, TCP, "dns-tcp"),
)
ONLY_V4, ONLY_V6 = (Family.V4,), (Family.V6,)
DAY = 86400

SERVICES = (
    service("one", 1, port()),
    service("two", 2, port(30002), **external(2)),
    service("udp", 3, port(30003, 53, UDP), **external(3)),
    service("four", 4, port()),
    service("none", 5, port(30005, name="web"), port(30055, 53, UDP, "dns"), **external(5)),
    service("ports", 6, *PORTS),
    service("inside", 7, port(), internal_policy=LOCAL),
    service("inside-away", 8, port(), internal_policy=LOCAL),
    service("outside", 9, port(30009), external_policy=LOCAL, **external(9)),
    service("outside-away", 10, port(30010), external_policy=LOCAL, **external(10)),
    service("draining", 11, port(30011)),
    service("half-ready", 12, port()),
    service("host", 13, port(30013)),
    service("outside-none", 14, port(30014), external_policy=LOCAL, **external(14)),
    service("slices", 15, port()),
    service("self", 16, port(30016), external_policy=LOCAL),
    service("host-here", 17, port(30017)),
    service("unready", 18, port(30018), **external(18)),
    service("gone", 19, port()),
    service("inside-draining", 20, port(), internal_policy=LOCAL),
    service("outside-draining", 21, port(30021), external_policy=LOCAL, **external(21)),
    service("inside-unready", 22, port(), internal_policy=LOCAL),
    service("published", 23, port()),
    service("zone", 24, port(30024)),
    service("zone-missing", 25, port()),
    service("zone-away", 26, port()),
    service("node-hint", 27, port()),
    service("node-hint-away", 28, port()),
    service("zone-local", 29, port(30029), internal_policy=LOCAL, external_policy=LOCAL),
    service("zones", 30, port()),
    service("sticky", 31, port(30031), affinity_seconds=DAY, **external(31)),
    service("sticky-udp", 32, port(30032, 53, UDP), affinity_seconds=DAY),
    service("sticky-local", 33, port(30033), affinity_seconds=DAY, external_policy=LOCAL),
    service("no-node-port", 34, port(), **external(34)),
    service("ranged", 35, port(30035), source_ranges=both("198.51.100.0/24"), **external(35)),
    service("ranged-v4", 36, port(), source_ranges=("198.51.100.0/24",), **external(36)),
    service(
        "ranged-local", 37, port(30037), external_policy=LOCAL,
        source_ranges=both("198.51.100.0/24", "10.244.0.0/16"), **external(37),
    ),
    service("claim-a", 38, port(), external_ips=both("198.18.0.38")),
    service("claim-b", 39, port(), port(0, 81, name="more"), external_ips=both("198.18.0.38")),
    service("only-v4", 40, port(30040), families=ONLY_V4),
    service("only-v6", 41, port(30041), families=ONLY_V6),
    service("half", 42, port(30042)),
    service("alias", 43, port(0, 81), external_ips=both(PLACES["alias1"])),
    service("sctp", 44, port(30044, 80, SCTP), port(30054, 81, SCTP, "none"), **external(44)),
    service("inside-none", 45, port(), internal_policy=LOCAL),
    service("both-local", 46, port(30046), internal_policy=LOCAL, external_policy=LOCAL, **external(46)),
    service("outside-unready", 47, port(30047), external_policy=LOCAL),
    service("outside-draining-away", 48, port(30048), external_policy=LOCAL),
    service("udp-local", 49, port(30049, 53, UDP), internal_policy=LOCAL, external_policy=LOCAL),
    service("zone-draining", 50, port()),
    service("sticky-inside", 51, port(), affinity_seconds=DAY, internal_policy=LOCAL),
    service("ranged-everyone", 52, port(), source_ranges=both("0.0.0.0/0"), **external(52)),
    service(
        "l7", 60, port(30060, name="web"), port(30160, 53, UDP, "dns"), policy=PLAIN_OUTSIDE, **external(60)
    ),
    service(
        "l7-outside", 61, port(30061), policy=EVERYWHERE, source_ranges=both("198.51.100.0/24"),
        **external(61),
    ),
    service("l7-local", 62, port(30062), external_policy=LOCAL, policy=EVERYWHERE, **external(62)),
    service("l7-away", 63, port(30063), external_policy=LOCAL, policy=EVERYWHERE, **external(63)),
    service("l7-sticky", 64, port(30064), affinity_seconds=DAY, policy=PLAIN_OUTSIDE),
    service("l7-none", 65, port(30065), policy=EVERYWHERE),
    service("l7-local-plain", 66, port(30066), external_policy=LOCAL, policy=PLAIN_OUTSIDE),
    service("l7-inside", 67, port(), internal_policy=LOCAL, policy=PLAIN_OUTSIDE),
    service("l7-inside-away", 68, port(), internal_policy=LOCAL, policy=PLAIN_OUTSIDE),
)  # fmt: skip

SLICES = (
    *slices("one", "pod2", WEB),
    *slices("two", "pod1 pod2", WEB),
    *slices("udp", "pod1 pod2", DNS),
    *slices("four", "pod1 pod1b pod2 pod2b", WEB),
    *slices("ports", "pod1", EndpointPort("http", TCP, 8080)),
    *slices("ports", "pod2", EndpointPort("dns", UDP, 5353)),
    *slices("ports", "pod2b", EndpointPort("dns-tcp", TCP, 5354)),
    *slices("inside", "pod1 pod2", WEB),
    *slices("inside-away", "pod2", WEB),
    *slices("outside", "pod1 pod2", WEB),
    *slices("outside-away", "pod2 pod2b", WEB),
    *slices("draining", (unready("pod1"), unready("pod1b", terminating=True), draining("pod2")), WEB),
    *slices("half-ready", (ready("pod1"), unready("pod1b"), draining("pod2")), WEB),
    *slices("host", "node2", WEB),
    *slices("slices", "pod1 pod2", WEB),
    *slices("slices", "pod2b pod2", EndpointPort("", TCP, 9090)),
    *slices("self", "pod1", WEB),
    *slices("host-here", "node1", WEB),
    *slices("unready", (unready("pod1"), unready("pod2", serving=True)), WEB),
    *slices("gone", (unready("pod1", terminating=True), unready("pod2", terminating=True)), WEB),
    *slices("inside-draining", (draining("pod1"), ready("pod2")), WEB),
    *slices("outside-draining", (draining("pod1"), ready("pod2")), WEB),
    *slices("inside-unready", (unready("pod1"), ready("pod2")), WEB),
    *slices("published", (Endpoint("pod1", "node1", ready=True, serving=False),), WEB),
    *slices("zone", (ready("pod1", "a"), ready("pod2", "b")), WEB),
    *slices("zone-missing", (ready("pod1", "a"), ready("pod2")), WEB),
    *slices("zone-away", (ready("pod1", "b"), ready("pod2", "c")), WEB),
    *slices("node-hint", (ready("pod1", "a", nodes=("node1",)), ready("pod2", "a", nodes=("node2",))), WEB),
    *slices(
        "node-hint-away",
        (ready("pod2", "b", nodes=("node2",)), ready("pod2b", "a", nodes=("node2",))), WEB,
    ),
    *slices("zone-local", (ready("pod1", "b"), ready("pod2", "a")), WEB),
    *slices("zones", (ready("pod1", "a", "b"), ready("pod2", "b"), ready("pod2b", "a")), WEB),
    *slices("sticky", "pod1 pod1b pod2", WEB),
    *slices("sticky-udp", "pod1 pod1b pod2", DNS),
    *slices("sticky-local", "pod1 pod1b pod2", WEB),
    *slices("no-node-port", "pod1 pod2", WEB),
    *slices("ranged", "pod1 pod2", WEB),
    *slices("ranged-v4", "pod2", WEB),
    *slices("ranged-local", "pod1 pod2", WEB),
    *slices("claim-a", "pod1", WEB),
    *slices("claim-b", "pod2", WEB),
    *slices("claim-b", "pod2", EndpointPort("more", TCP, 9090)),
    *slices("only-v4", "pod1", WEB, ONLY_V4),
    *slices("only-v6", "pod2", WEB, ONLY_V6),
    *slices("half", "pod2", WEB, ONLY_V4),
    *slices("alias", "pod2", WEB),
    *slices("sctp", "pod1 pod2", EndpointPort("", SCTP, 8080)),
    *slices("both-local", "pod1 pod2", WEB),
    *slices("outside-unready", (unready("pod1"), ready("pod2")), WEB),
    *slices("outside-draining-away", (draining("pod2"),), WEB),
    *slices("udp-local", "pod2", DNS),
    *slices("zone-draining", (draining("pod1"), ready("pod2", "a")), WEB),
    *slices("sticky-inside", "pod1 pod1b pod2", WEB),
    *slices("ranged-everyone", "pod2", WEB),
    *slices("l7", "pod1 pod2", EndpointPort("web", TCP, 8080)),
    *slices("l7", "pod1 pod2", EndpointPort("dns", UDP, 5353)),
    *slices("l7-outside", "pod1 pod2", WEB),
    *slices("l7-local", "pod1 pod2", WEB),
    *slices("l7-away", "pod2", WEB),
    *slices("l7-sticky", "pod1 pod1b pod2", WEB),
    *slices("l7-local-plain", "pod1 pod2", WEB),
    *slices("l7-inside", "pod1 pod2", WEB),
    *slices("l7-inside-away", "pod2", WEB),
)  # fmt: skip

NODES = {
    "node1": Node("node1", both("10.244.1.0/24"), both(PLACES["node1"]), zone="a"),
    "node2": Node("node2", both("10.244.2.0/24"), both(PLACES["node2"]), zone="b"),
}


def programmed(family: Family) -> tuple[Frontend, ...]:
    """Return the frontends of the plan on this node, in a family."""
    table = FrontendTable()
    for one in SERVICES:
        found = frontends(one, [s for s in SLICES if s.service == one.name], HERE)
        table.replace(one.name, with_proxied(one, found, lambda backend, route: True)[0])
    return tuple(f for f in table if f.key.family is family)


def proxied(service: Service, frontend: Frontend) -> Frontend:
    """Return a frontend as if the L7 proxy served all that is asked of it, whoever the clients are."""
    policy = service.policy
    asked = policy is not None and (frontend.exclusive or policy.external)
    if not policy or not asked or frontend.action is not Action.BALANCE or frontend.key.protocol is not TCP:
        return frontend
    return replace(frontend, proxied=policy.protocol)


def node_ranges() -> NodeRanges:
    """Return the node's ranges. They select loopback for node ports too: the rules know better."""
    selected = both(f"{PLACES['node1']}/32", "192.168.60.0/24", "127.0.0.0/8")
    return masquerade.ranges(NODES, HERE.node, both("203.0.113.0/24"), node_ports=selected)


PROXY_ADDRESSES = frozenset(
    places.address(s.policy.protocol, family, title_of(s, port))
    for s in SERVICES
    if s.policy
    for port in s.ports
    for family in Family
)
"""Where the node's L7 proxy listens for these services."""
