"""Services for measuring, and the same ones in the shape that kube-proxy's nftables mode gives them.

That is a chain per service port and a chain per endpoint, and maps from addresses to chains (KEP-3866). It is
written for `nft -f`, as text, so that both are measured on the same data in the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

from netlink.family import Family
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort

FIRST_SERVICE = int(IPv4Address("10.96.0.1"))
FIRST_POD = int(IPv4Address("10.128.0.1"))
PODS = "10.128.0.0/9"
NODES = 100

Pair = tuple[Service, EndpointSlice]


def pairs(services: int, endpoints: int) -> list[Pair]:
    """Return services with one TCP port and one slice each; a hundredth of the endpoints is local."""
    return [pair(i, [i * endpoints + j for j in range(endpoints)]) for i in range(services)]


def pair(number: int, pods: Sequence[int]) -> Pair:
    """Return a service and its slice with the pods of these numbers."""
    address = str(IPv4Address(FIRST_SERVICE + number))
    return Service(_name(number), (address,), (ServicePort("http", Protocol.TCP, 80),)), piece(number, pods)


def piece(service: int, pods: Sequence[int]) -> EndpointSlice:
    """Return a service's slice with the pods of these numbers."""
    found = tuple(Endpoint(str(IPv4Address(FIRST_POD + n)), f"node{n % NODES}") for n in pods)
    ports = (EndpointPort("http", Protocol.TCP, 8080),)
    return EndpointSlice(ObjectName("bench", f"s{service}-1"), _name(service), Family.V4, ports, found)


def documents(services: int, endpoints: int) -> Iterator[dict[str, object]]:
    """Yield the same services as Kubernetes objects."""
    for service, found in pairs(services, endpoints):
        meta = {"name": service.name.name, "namespace": service.name.namespace}
        yield {
            "kind": "Service",
            "metadata": meta,
            "spec": {"clusterIP": service.cluster_ips[0], "ports": [{"name": "http", "port": 80}]},
        }
        yield {
            "kind": "EndpointSlice",
            "metadata": {
                "name": found.name.name,
                "namespace": found.name.namespace,
                "labels": {"kubernetes.io/service-name": service.name.name},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [
                {"addresses": [e.address], "nodeName": e.node, "conditions": {"ready": True}}
                for e in found.endpoints
            ],
        }


def chains(layout: Sequence[Pair]) -> str:
    """Return the layout as nft input, from nothing."""
    return "\n".join(_table(layout))


def chains_changed(service: Service, piece: EndpointSlice) -> str:
    """Return the input that replaces the endpoints of one service."""
    name = service.name.name
    return "\n".join(
        [
            "table ip chains {",
            *_endpoint_chains(name, piece),
            "}",
            f"flush chain ip chains service-{name}",
            *(f"add rule ip chains service-{name} {rule}" for rule in _service_rules(service, piece)),
        ]
    )


def chains_added(service: Service, piece: EndpointSlice) -> str:
    """Return the input that adds a service."""
    name = service.name.name
    return "\n".join(
        [
            "table ip chains {",
            *_endpoint_chains(name, piece),
            *_service_chain(service, piece),
            "}",
            f"add element ip chains cluster-ips {{ {service.cluster_ips[0]} }}",
            f"add element ip chains service-ips {{ {_element(service)} }}",
        ]
    )


def _table(layout: Sequence[Pair]) -> Iterator[str]:
    yield "table ip chains {"
    yield "chain mark-for-masquerade {\nmeta mark set mark or 0x4000\n}"
    yield "chain reject-chain {\nreject\n}"
    for service, found in layout:
        yield from _endpoint_chains(service.name.name, found)
        yield from _service_chain(service, found)
    addresses = ", ".join(s.cluster_ips[0] for s, _ in layout)
    yield f"set cluster-ips {{ type ipv4_addr\nelements = {{ {addresses} }}\n}}"
    elements = ", ".join(_element(s) for s, _ in layout)
    yield "map service-ips { type ipv4_addr . inet_proto . inet_service : verdict"
    yield f"elements = {{ {elements} }}\n}}"
    yield "chain services {"
    yield "ip daddr . meta l4proto . th dport vmap @service-ips\n}"
    yield "chain cluster-ips-check {\nip daddr @cluster-ips reject\n}"
    for hook in ("prerouting", "output"):
        yield f"chain nat-{hook} {{ type nat hook {hook} priority -100;\njump services\n}}"
    for hook in ("forward", "output"):
        yield f"chain filter-{hook} {{ type filter hook {hook} priority 0;"
        yield "ct state new jump cluster-ips-check\n}"
    yield "chain masquerading {\nmeta mark & 0x4000 == 0 return\nmeta mark set mark xor 0x4000"
    yield "masquerade fully-random\n}"
    yield "chain nat-postrouting { type nat hook postrouting priority 100;\njump masquerading\n}\n}"


def _element(service: Service) -> str:
    return f"{service.cluster_ips[0]} . tcp . 80 : goto service-{service.name.name}"


def _endpoint_chains(name: str, found: EndpointSlice) -> Iterator[str]:
    for endpoint in found.endpoints:
        yield f"chain endpoint-{name}-{endpoint.address} {{"
        yield f"ip saddr {endpoint.address} jump mark-for-masquerade"
        yield f"meta l4proto tcp dnat to {endpoint.address}:8080\n}}"


def _service_chain(service: Service, found: EndpointSlice) -> Iterator[str]:
    yield f"chain service-{service.name.name} {{"
    yield from _service_rules(service, found)
    yield "}"


def _service_rules(service: Service, found: EndpointSlice) -> Iterator[str]:
    name, address = service.name.name, service.cluster_ips[0]
    yield f"ip daddr {address} tcp dport 80 ip saddr != {PODS} jump mark-for-masquerade"
    ways = ", ".join(f"{i} : goto endpoint-{name}-{e.address}" for i, e in enumerate(found.endpoints))
    yield f"numgen random mod {len(found.endpoints)} vmap {{ {ways} }}"


def _name(number: int) -> ObjectName:
    return ObjectName("bench", f"s{number}")
