"""Why an endpoint is used or not: what is said agrees with what the frontends do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from proxy.explain import Used, explain
from proxy.frontends import frontends
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

HERE = Place("node1", "a")
NAME = ObjectName("shop", "web")


def service(
    internal: TrafficPolicy = TrafficPolicy.CLUSTER,
    external: TrafficPolicy = TrafficPolicy.CLUSTER,
    node_port: int = 0,
) -> Service:
    ports = (ServicePort("http", Protocol.TCP, 80, node_port),)
    return Service(NAME, ("10.96.0.1",), ports, internal, external)


def told(service: Service, *endpoints: Endpoint) -> dict[str, tuple[str, str]]:
    """Return what is said of each endpoint, by address."""
    ports = (EndpointPort("http", Protocol.TCP, 8080),)
    piece = EndpointSlice(ObjectName("shop", "web-1"), NAME, Family.V4, ports, endpoints)
    return {e.backend.address: (e.used.value, e.why) for e in explain(service, (piece,), HERE)}


def test_conditions_are_named() -> None:
    assert told(
        service(),
        Endpoint("10.0.0.1", "node1"),
        Endpoint("10.0.0.2", "node2", ready=False, serving=False),
        Endpoint("10.0.0.3", "node2", ready=False, serving=True, terminating=True),
        Endpoint("10.0.0.4", "node2", ready=False, serving=False, terminating=True),
    ) == {
        "10.0.0.1": ("yes", "ready"),
        "10.0.0.2": ("no", "not ready"),
        "10.0.0.3": ("no", "terminating, serves while none is ready"),
        "10.0.0.4": ("no", "terminating, serves no more"),
    }


def test_what_terminates_serves_while_nobody_is_ready() -> None:
    last = Endpoint("10.0.0.3", "node2", ready=False, serving=True, terminating=True)
    assert told(service(), last) == {"10.0.0.3": ("yes", "terminating, serves while none is ready")}


def test_hints_for_other_zones_are_named() -> None:
    assert told(
        service(),
        Endpoint("10.0.0.1", "node2", zone_hints=("a",)),
        Endpoint("10.0.0.2", "node3", zone_hints=("b", "c")),
    ) == {"10.0.0.1": ("yes", "ready"), "10.0.0.2": ("no", "ready; its hints are for zone b, zone c")}


def test_a_local_policy_is_named_where_it_keeps_an_endpoint_out() -> None:
    endpoints = Endpoint("10.0.0.1", "node1"), Endpoint("10.0.0.2", "node2")
    why = "ready; not on this node, as internalTrafficPolicy Local asks for"
    assert told(service(internal=TrafficPolicy.LOCAL), *endpoints)["10.0.0.2"] == ("no", why)
    found = told(service(external=TrafficPolicy.LOCAL, node_port=30080), *endpoints)
    why = "ready; not on this node, as externalTrafficPolicy Local asks for"
    assert found == {"10.0.0.1": ("yes", "ready"), "10.0.0.2": ("partly", why)}


def test_a_policy_without_a_frontend_is_not_named() -> None:
    far = Endpoint("10.0.0.2", "node2")
    assert told(service(external=TrafficPolicy.LOCAL), far) == {"10.0.0.2": ("yes", "ready")}


ENDPOINTS = st.lists(
    st.builds(
        Endpoint,
        address=st.sampled_from([f"10.0.0.{n}" for n in range(1, 7)]),
        node=st.sampled_from(("node1", "node2")),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
        zone_hints=st.sampled_from(((), ("a",), ("b",))),
    ),
    max_size=6,
    unique_by=lambda e: e.address,
)


@given(ENDPOINTS, st.sampled_from(TrafficPolicy), st.sampled_from(TrafficPolicy))
def test_used_is_what_the_frontends_have(
    endpoints: list[Endpoint], internal: TrafficPolicy, external: TrafficPolicy
) -> None:
    ports = (EndpointPort("http", Protocol.TCP, 8080),)
    piece = EndpointSlice(ObjectName("shop", "web-1"), NAME, Family.V4, ports, tuple(endpoints))
    some = service(internal, external, 30080)
    found = explain(some, (piece,), HERE)
    decided = frontends(some, (piece,), HERE)
    assert {e.backend.address for e in found} == {e.address for e in endpoints}
    for one in found:
        count = sum(one.backend in f.endpoints for f in decided)
        assert one.used is (Used.YES if count == len(decided) else Used.PARTLY if count else Used.NO)
        if one.used is not Used.YES:
            assert one.why != "ready"
