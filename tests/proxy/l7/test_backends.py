"""Which frontends of a service may be proxied, and what HAProxy has to do for them."""

from __future__ import annotations

from netlink.family import Family
from proxy.frontends import Action, Frontend, Origin, frontends
from proxy.l7.backends import backend_name, with_proxied
from proxy.l7.model import Backend, Route, Server
from proxy.l7.policy import Policy
from proxy.l7.policy import Protocol as L7Protocol
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)
from proxy.topology import Place

WEB = ObjectName("shop", "web")
PORTS = (ServicePort("http", Protocol.TCP, 80, 30080), ServicePort("dns", Protocol.UDP, 53))
ENDPOINTS = (Endpoint("10.0.0.1", "me"), Endpoint("10.0.0.2", "you"))


def service(
    policy: Policy | None,
    external: TrafficPolicy = TrafficPolicy.CLUSTER,
    internal: TrafficPolicy = TrafficPolicy.CLUSTER,
) -> Service:
    return Service(
        WEB, ("10.96.0.1",), PORTS, internal, external, external_ips=("198.51.100.1",), policy=policy
    )


def found(
    which: Service, *endpoints: Endpoint, served: bool = True
) -> tuple[tuple[Frontend, ...], tuple[Backend, ...]]:
    ports = tuple(EndpointPort(p.name, p.protocol, 8080) for p in PORTS)
    piece = EndpointSlice(WEB, WEB, Family.V4, ports, endpoints)
    return with_proxied(which, frontends(which, [piece], Place("me", "")), lambda *_: served)


def proxied(those: tuple[Frontend, ...]) -> set[tuple[str, int, Protocol]]:
    return {(f.key.address, f.key.port, f.key.protocol) for f in those if f.proxied}


def test_cluster_addresses_of_tcp_ports_are_proxied_and_nothing_else_unless_asked_for() -> None:
    those, backends = found(service(Policy()), *ENDPOINTS)
    assert proxied(those) == {("10.96.0.1", 80, Protocol.TCP)}
    assert backends == (
        Backend(
            "shop_web_http_http4",
            "shop/web:http",
            Family.V4,
            Policy(),
            (Route(Family.V4, "10.96.0.1", 80),),
            (Server("10.0.0.1", 8080), Server("10.0.0.2", 8080)),
        ),
    )


def test_external_addresses_and_node_ports_have_the_same_backend_where_the_policies_agree() -> None:
    those, (backend,) = found(service(Policy(external=True)), *ENDPOINTS)
    tcp = {("10.96.0.1", 80), ("198.51.100.1", 80), ("", 30080)}
    assert proxied(those) == {(*to, Protocol.TCP) for to in tcp}
    assert {route[1:] for route in backend.routes} == tcp


def test_where_the_policies_differ_external_addresses_stay_with_the_kernel() -> None:
    those, (backend,) = found(service(Policy(external=True), TrafficPolicy.LOCAL), *ENDPOINTS)
    assert [s.address for s in backend.servers] == ["10.0.0.1", "10.0.0.2"]
    assert proxied(those) == {("10.96.0.1", 80, Protocol.TCP)}
    assert not any(f.proxied for f in those if f.key.origin is Origin.INTERNAL)


def test_both_local_policies_share_a_backend() -> None:
    _, (backend,) = found(
        service(Policy(external=True), TrafficPolicy.LOCAL, TrafficPolicy.LOCAL), *ENDPOINTS
    )
    assert [s.address for s in backend.servers] == ["10.0.0.1"]


def test_without_endpoints_the_kernel_refuses_and_the_backend_waits_for_some() -> None:
    those, (backend,) = found(service(Policy()))
    assert {f.action for f in those if f.key.protocol is Protocol.TCP} == {Action.REJECT}
    assert not proxied(those)
    assert backend.servers == ()


def test_what_the_proxy_does_not_serve_yet_is_balanced_without_it() -> None:
    those, backends = found(service(Policy()), *ENDPOINTS, served=False)
    assert not proxied(those)
    assert len(backends) == 1


def test_a_service_that_asks_for_nothing_has_no_backends() -> None:
    those, backends = found(service(None), *ENDPOINTS)
    assert (proxied(those), backends) == (set(), ())


def test_another_protocol_is_another_backend_so_that_none_is_led_to_the_wrong_listener() -> None:
    names = {
        backend_name(service(Policy(protocol=protocol)), found(service(Policy()), *ENDPOINTS)[0][0])
        for protocol in L7Protocol
    }
    assert names == {"shop_web_http_http4", "shop_web_http_tcp4"}
