"""A trace says what goes to the node's L7 proxy: for which service, by which of its listeners."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest

from netlink import netns
from netlink.attributes import attribute
from netlink.conntrack import Flow, Tuple
from netlink.family import Family
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from node import l7_network
from node.trace import nft_words, show
from node.trace.nft import DROP, Expr
from node.trace.packet import Kind, Packet, Trace, Verdict
from node.trace.path import Tracer, World
from node.trace.read import read
from node.trace.why import Front, Names
from proxy.l7 import places
from proxy.l7.policy import Protocol
from tests.node.trace.states import NODE1, V4, do, own, packet, rule, table, with_tables, world
from tests.proxy import dataplanes
from tests.proxy.plan import node_ranges, place, programmed
from tests.proxy.plan_lines import address

HTTP = {family: places.address(Protocol.HTTP, family, "test/l7:web") for family in Family}
PREROUTING, OUTPUT = 0, 3
NODE = replace(NODE1, ways=(*NODE1.ways, own(HTTP[V4], 1)))
KNOWN = Names((Front("test/l7:web", "10.96.0.60", 6, 80),))
FLOW = Flow(V4, 6, Tuple("10.244.1.2", "10.96.0.60", 4000, 80), Tuple(HTTP[V4], "10.244.1.2", 10000, 4000))


@pytest.fixture(params=dataplanes.KINDS, ids=str)
def node(request: pytest.FixtureRequest, namespaces: Callable[[], str]) -> str:
    """A node with the plan's services, written by each dataplane in its turn."""
    dataplane: dataplanes.Kind = request.param
    found = namespaces()

    def work() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_up(1))
        l7_network.ensure(tuple(Family), transparent=True)
        for family in Family:
            dataplane.load(family, programmed(family), node_ranges())

    netns.run(found, work)
    return found


@pytest.mark.parametrize("family", Family)
def test_the_end_is_the_proxy_for_that_service(node: str, family: Family) -> None:
    state = netns.run(node, read, "node1", family)
    target = address("l7", family)
    names = Names((Front("test/l7:web", target, 6, 80),))
    tracer = Tracer(World(lambda name, asked: state if asked is family else None, names=names))
    sent = Packet(family, 6, place("pod1b", family), target, 80, iif="lo")
    (branch,) = tracer.received("node1", sent)
    proxy = f"[{HTTP[family]}]" if family is Family.V6 else HTTP[family]
    assert branch.end.verdict is Verdict.DELIVERED
    assert branch.end.who == f"the L7 proxy of node1 (http), {proxy}:10000"
    assert "an endpoint of service test/l7:web" in branch.end.reason
    assert branch.end.look == "podwire l7 show"
    assert not [s for s in branch.steps if s.kind is Kind.UNDECIDED]
    shown = show.text(Trace(sent, "a pod", "l7", (branch,)))
    assert "which chooses an endpoint of service test/l7:web by itself" in shown
    assert "look at: podwire l7 show" in shown


def test_what_is_addressed_to_the_proxy_itself_is_for_no_service() -> None:
    (branch,) = Tracer(world(NODE)).received("node1", packet(destination=HTTP[V4], dport=10000))
    assert branch.end.who == f"the L7 proxy of node1 (http), {HTTP[V4]}:10000"
    assert branch.end.reason == "it is addressed to the proxy itself, which serves nobody by that address"


def test_a_connection_that_the_proxy_has_stays_there() -> None:
    state = replace(NODE, flows=(FLOW,))
    sent = packet(destination="10.96.0.60", sport=4000)
    (branch,) = Tracer(world(state, names=KNOWN)).received("node1", sent)
    assert "the L7 proxy of node1 (http)" in branch.end.who
    assert "test/l7:web" in branch.end.reason


def test_without_names_the_address_is_told() -> None:
    sent = packet(destination="10.96.0.60", sport=4000)
    (branch,) = Tracer(world(replace(NODE, flows=(FLOW,)))).received("node1", sent)
    assert "an endpoint of service 10.96.0.60:80" in branch.end.reason


def _group(number: int, sign: int) -> tuple[Expr, ...]:
    load = Expr("meta", {1: (8).to_bytes(4, "big"), 2: (11).to_bytes(4, "big")})
    held = attribute(1, number.to_bytes(4, "little"))
    return load, Expr("cmp", {1: (8).to_bytes(4, "big"), 2: sign.to_bytes(4, "big"), 3: held})


@pytest.mark.parametrize(
    ("group", "sign", "verdict", "undecided"),
    [
        (places.OWNER, 0, Verdict.DELIVERED, 0),
        (places.OWNER, 1, Verdict.DROPPED, 0),
        (1000, 0, Verdict.DELIVERED, 1),
    ],
)
def test_what_is_traced_is_never_what_the_proxy_sends(
    group: int, sign: int, verdict: Verdict, undecided: int
) -> None:
    """Of what other groups send nothing is known."""
    own_rule = table("fw", OUTPUT, rule(*_group(group, sign), do(DROP)))
    sent = packet(source="192.168.50.11", destination="10.244.1.3", iif="")
    (branch,) = Tracer(world(with_tables(NODE, own_rule))).sent("node1", sent)
    assert branch.end.verdict is verdict
    assert len([s for s in branch.steps if s.kind is Kind.UNDECIDED]) == undecided


def test_the_rules_of_transparent_services_are_said_in_words(namespaces: Callable[[], str]) -> None:
    def work() -> str:
        l7_network.ensure((V4,), transparent=True)
        state = read("node1", V4)
        (found,) = (t for t in state.tables if t.name == l7_network.NAME)
        (only,) = found.chains["prerouting"].rules
        listed = subprocess.run(("nft", "list", "ruleset"), check=True, capture_output=True, text=True).stdout
        assert "ct direction reply socket transparent 1 meta mark set meta mark | 0x00002000" in listed
        return nft_words.words(found, only)

    said = netns.run(namespaces(), work)
    assert "socket transparent 1 meta mark set meta mark | 0x2000" in said
