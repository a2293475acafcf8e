"""What a service looks like to a packet: cases beside those of the packet-trace table (plan.py)."""

from __future__ import annotations

import pytest

from netlink.family import Family
from proxy.frontends import Action, Backend, Frontend, FrontendKey, Masquerade, Origin, frontends
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

ME = Place("me", "zone-a")
WEB = ObjectName("shop", "web")
TCP = Protocol.TCP
LOCAL = TrafficPolicy.LOCAL


def piece(*endpoints: Endpoint, name: str = "web-1", family: Family = Family.V4) -> EndpointSlice:
    return EndpointSlice(ObjectName("shop", name), WEB, family, (EndpointPort("", TCP, 8080),), endpoints)


def one(service: Service, *slices: EndpointSlice) -> Frontend:
    (found,) = frontends(service, slices, ME)
    return found


SIMPLE = Service(WEB, ("10.96.0.1",), (ServicePort("", TCP, 80),))


def test_a_cluster_address_balances_over_its_endpoints_in_order_of_address() -> None:
    found = one(SIMPLE, piece(Endpoint("10.0.0.9", "me"), Endpoint("10.0.0.1", "you")))
    assert found == Frontend(
        FrontendKey(Family.V4, "10.96.0.1", TCP, 80, Origin.ANY),
        "shop/web",
        Action.BALANCE,
        Masquerade.OFF_CLUSTER,
        (Backend("10.0.0.1", 8080, False), Backend("10.0.0.9", 8080, True)),
        exclusive=True,
    )


def test_the_order_of_slices_and_endpoints_does_not_matter() -> None:
    a, b = Endpoint("10.0.0.1"), Endpoint("10.0.0.2")
    assert one(SIMPLE, piece(a, b)) == one(SIMPLE, piece(b, name="x"), piece(a, name="y"))


def test_an_endpoint_in_two_slices_counts_once() -> None:
    a = Endpoint("10.0.0.1")
    assert len(one(SIMPLE, piece(a), piece(a, name="web-2")).endpoints) == 1


def test_each_family_has_its_own_endpoints() -> None:
    both = Service(WEB, ("10.96.0.1", "fd00:96::1"), (ServicePort("http", TCP, 80, 30080),))
    six = EndpointSlice(
        ObjectName("shop", "six"), WEB, Family.V6, (EndpointPort("http", TCP, 8080),), (Endpoint("fd00::1"),)
    )
    found = {(f.key.family, f.key.address): f.action for f in frontends(both, [six], ME)}
    assert found == {
        (Family.V4, "10.96.0.1"): Action.REJECT,
        (Family.V4, ""): Action.REJECT,
        (Family.V6, "fd00:96::1"): Action.BALANCE,
        (Family.V6, ""): Action.BALANCE,
    }


def test_a_port_of_another_name_or_protocol_does_not_count() -> None:
    service = Service(WEB, ("10.96.0.1",), (ServicePort("http", TCP, 80),))
    ports = (EndpointPort("http", Protocol.UDP, 8080), EndpointPort("", TCP, 8081))
    other = EndpointSlice(ObjectName("shop", "x"), WEB, Family.V4, ports, (Endpoint("10.0.0.1"),))
    assert one(service, other).action is Action.REJECT


def test_a_service_without_ports_has_no_frontend() -> None:
    assert frontends(Service(WEB, ("10.96.0.1",), ()), [piece(Endpoint("10.0.0.1"))], ME) == ()


@pytest.mark.parametrize(
    ("endpoint", "action"),
    [
        (Endpoint("10.0.0.1", ready=False, serving=True, terminating=True), Action.BALANCE),
        (Endpoint("10.0.0.1", ready=False, serving=False, terminating=True), Action.REJECT),
        (Endpoint("10.0.0.1", ready=False, serving=True, terminating=False), Action.REJECT),
        (Endpoint("10.0.0.1", ready=True, serving=True, terminating=True), Action.BALANCE),
    ],
)
def test_the_last_endpoint_counts_while_it_serves_and_terminates(endpoint: Endpoint, action: Action) -> None:
    assert one(SIMPLE, piece(endpoint)).action is action


def test_under_policy_local_an_endpoint_that_drains_here_is_better_than_none_here() -> None:
    """KEP-1669: only this node's endpoints are looked at, so others being ready is no help."""
    service = Service(WEB, ("10.96.0.1",), (ServicePort("", TCP, 80, 30080),), external_policy=LOCAL)
    drains = Endpoint("10.0.0.1", "me", ready=False, serving=True, terminating=True)
    ready = Endpoint("10.0.0.2", "you")
    found = {(f.key.address, f.key.origin): f for f in frontends(service, [piece(drains, ready)], ME)}
    assert found["", Origin.ANY].endpoints == (Backend("10.0.0.1", 8080, True),)
    assert found["", Origin.INTERNAL].endpoints == (Backend("10.0.0.2", 8080, False),)
    assert found["10.96.0.1", Origin.ANY].endpoints == (Backend("10.0.0.2", 8080, False),)


def test_a_node_port_under_policy_local_keeps_outside_clients_addresses() -> None:
    service = Service(WEB, ("10.96.0.1",), (ServicePort("", TCP, 80, 30080),), external_policy=LOCAL)
    found = frontends(service, [piece(Endpoint("10.0.0.1", "me"))], ME)
    assert {(f.key.origin, f.masquerade) for f in found if not f.key.address} == {
        (Origin.ANY, Masquerade.NEVER),
        (Origin.INTERNAL, Masquerade.OFF_NODE),
    }
