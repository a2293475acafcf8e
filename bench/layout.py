"""Services for measuring, and the same ones as a chain per service and a chain per endpoint.

The second form is the shape that proxies with a chain per service use; it is written for `nft -f` here, as
text, so that both are measured on the same data in the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

from netlink.family import Family
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort

FIRST_SERVICE = int(IPv4Address("10.96.0.1"))
FIRST_POD = int(IPv4Address("10.128.0.1"))
NODES = 100

Pair = tuple[Service, EndpointSlice]


def pairs(services: int, endpoints: int) -> list[Pair]:
    """Return services with one TCP port and one slice each; a hundredth of the endpoints is local."""
    return [
        (
            Service(
                _name(i), (str(IPv4Address(FIRST_SERVICE + i)),), (ServicePort("http", Protocol.TCP, 80),)
            ),
            piece(i, [i * endpoints + j for j in range(endpoints)]),
        )
        for i in range(services)
    ]


def piece(service: int, pods: Sequence[int]) -> EndpointSlice:
    """Return a service's slice with the pods of these numbers."""
    found = tuple(Endpoint(str(IPv4Address(FIRST_POD + n)), f"node{n % NODES}") for n in pods)
    ports = (EndpointPort("http", Protocol.TCP, 8080),)
    return EndpointSlice(ObjectName("bench", f"s{service}-1"), _name(service), Family.V4, ports, found)


def chain_per_service(layout: Sequence[Pair]) -> str:
    """Return the layout as nft input: a dispatch map, a chain per service, a chain per endpoint."""
    return "\n".join(["table ip chains {", *_lines(layout), "}"])


def chain_of(service: Service, piece: EndpointSlice) -> str:
    """Return the input that replaces the endpoints of one service."""
    name = service.name.name
    lines = [
        "table ip chains {",
        *_endpoint_chains(name, piece),
        "}",
        f"flush chain ip chains service-{name}",
    ]
    return "\n".join([*lines, f"add rule ip chains service-{name} {_choice(name, piece)}"])


def _lines(layout: Sequence[Pair]) -> Iterator[str]:
    for service, found in layout:
        yield from _endpoint_chains(service.name.name, found)
        yield f"chain service-{service.name.name} {{ {_choice(service.name.name, found)}\n}}"
    elements = ", ".join(f"{s.cluster_ips[0]} . tcp . 80 : goto service-{s.name.name}" for s, _ in layout)
    yield "map services { type ipv4_addr . inet_proto . inet_service : verdict"
    yield f"elements = {{ {elements} }}\n}}"
    for hook in ("prerouting", "output"):
        yield f"chain {hook} {{ type nat hook {hook} priority -100;"
        yield "ip daddr . meta l4proto . th dport vmap @services\n}"


def _endpoint_chains(name: str, found: EndpointSlice) -> Iterator[str]:
    for endpoint in found.endpoints:
        yield f"chain endpoint-{name}-{endpoint.address} {{"
        yield f"ip saddr {endpoint.address} meta mark set mark or 0x4000"
        yield f"meta l4proto tcp dnat to {endpoint.address}:8080\n}}"


def _choice(name: str, found: EndpointSlice) -> str:
    count = len(found.endpoints)
    ways = ", ".join(f"{i} : goto endpoint-{name}-{e.address}" for i, e in enumerate(found.endpoints))
    return f"numgen random mod {count} vmap {{ {ways} }}"


def _name(number: int) -> ObjectName:
    return ObjectName("bench", f"s{number}")
