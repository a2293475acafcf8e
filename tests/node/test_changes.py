"""One line for each change worth knowing, and never a flood of them."""

from __future__ import annotations

from netlink.family import Family
from node.changes import MOST, Line, told
from proxy.model import EMPTY, Endpoint, EndpointSlice, Node, ObjectName, Service, Snapshot

WEB = ObjectName("shop", "web")
SERVICE = Service(WEB, ("10.96.0.1",), (), external_ips=("192.0.2.1",))


def snapshot(*services: Service, ready: int = 0, nodes: tuple[Node, ...] = ()) -> Snapshot:
    endpoints = tuple(Endpoint(f"10.0.0.{n}", ready=n < ready) for n in range(3))
    piece = EndpointSlice(ObjectName("shop", "web-1"), WEB, Family.V4, (), endpoints)
    return Snapshot({s.name: s for s in services}, {WEB: (piece,)}, {n.name: n for n in nodes})


def test_a_service_that_comes_changes_and_goes() -> None:
    facts = {"service": "shop/web", "addresses": "10.96.0.1,192.0.2.1", "endpoints": 2}
    now = snapshot(SERVICE, ready=2)
    assert told(EMPTY, now, {WEB}, (), endpoints=True) == [Line("service added", facts)]
    other = snapshot(Service(WEB, ("10.96.0.1",), ()), ready=2)
    assert told(now, other, {WEB}, (), endpoints=True) == [
        Line("service changed", {**facts, "addresses": "10.96.0.1"})
    ]
    assert told(now, EMPTY, {WEB}, (), endpoints=True) == [Line("service removed", {"service": "shop/web"})]


def test_endpoints_that_change_are_not_important() -> None:
    line = Line("endpoints changed", {"service": "shop/web", "endpoints": 1}, important=False)
    assert told(snapshot(SERVICE, ready=2), snapshot(SERVICE, ready=1), {WEB}, (), endpoints=True) == [line]


def test_endpoints_are_not_looked_at_if_nobody_wants_to_know() -> None:
    before, after = snapshot(SERVICE, ready=2), snapshot(SERVICE, ready=1)
    assert told(before, after, {WEB}, (), endpoints=False) == []


def test_endpoints_without_a_service_are_nobodys_concern() -> None:
    assert told(EMPTY, snapshot(), {WEB}, (), endpoints=True) == []


def test_nodes_that_come_change_and_go() -> None:
    one, other = Node("n1", ("10.1.0.0/24",), ("192.0.2.1",)), Node("n1", ("10.2.0.0/24",), ("192.0.2.1",))
    facts = {"node": "n1", "podCIDRs": "10.1.0.0/24", "addresses": "192.0.2.1"}
    assert told(EMPTY, snapshot(nodes=(one,)), (), {one.name}, endpoints=True) == [Line("node added", facts)]
    changed = [Line("node changed", {**facts, "podCIDRs": "10.2.0.0/24"})]
    assert told(snapshot(nodes=(one,)), snapshot(nodes=(other,)), (), {one.name}, endpoints=True) == changed
    assert told(snapshot(nodes=(one,)), EMPTY, (), {one.name}, endpoints=True) == [
        Line("node removed", {"node": "n1"})
    ]
    assert told(snapshot(nodes=(one,)), EMPTY, (), (), endpoints=True) == []


def test_many_changes_at_once_are_a_few_lines() -> None:
    nodes = tuple(Node(f"n{number}") for number in range(100))
    lines = told(EMPTY, snapshot(nodes=nodes), (), {n.name for n in nodes}, endpoints=True)
    assert len(lines) == MOST + 1
    assert lines[-1] == Line("more changes", {"number": 80})
