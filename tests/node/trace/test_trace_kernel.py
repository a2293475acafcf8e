"""What is traced in the live kernel state is what the kernel does with the real packet.

The world is that of the service proxy's packet table (tests/proxy): real namespaces, real rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from netlink import netns
from netlink.family import Family
from node.trace.packet import Branch, Packet
from node.trace.path import Tracer, World
from node.trace.read import read
from tests.proxy import world
from tests.proxy.dataplanes import KINDS, Kind
from tests.proxy.plan import OWN, node_ranges, place, programmed
from tests.proxy.plan_cases import CASES
from tests.proxy.plan_lines import Case, where
from tests.proxy.test_packets_kernel import _ask
from tests.proxy.test_packets_kernel import dropped as dropped  # the fixture: what is dropped, all at once

NODE = "node1"
OWN_ADDRESSES = frozenset(place(name, family) for name in OWN for family in Family)


@dataclass(frozen=True, slots=True)
class Measured:
    """The node, as it was read before the first case."""

    tracer: Tracer

    def trace(self, case: Case) -> tuple[Branch, ...]:
        """Return what would become of a case's packet."""
        packet = Packet(case.family, case.protocol.value, case.source, case.destination, case.port)
        if case.source in OWN_ADDRESSES:
            return self.tracer.sent(NODE, packet)
        node = self.tracer.place(NODE, case.family)
        assert node
        return self.tracer.received(NODE, replace(packet, iif=node.way_out(packet, case.source)))


@pytest.fixture(scope="module")
def built(namespaces: Callable[[], str]) -> Iterator[world.World]:
    """The plan's world, without a service."""
    found = world.build(namespaces, CASES)
    with world.answering(found.servers):
        yield found


@pytest.fixture(scope="module", params=KINDS, ids=str)
def lab(built: world.World, request: pytest.FixtureRequest) -> Iterator[world.World]:
    """The plan's world, programmed by each dataplane in its turn."""
    with programmed_by(built, request.param):
        yield built


@contextlib.contextmanager
def programmed_by(built: world.World, dataplane: Kind) -> Iterator[None]:
    """Have a dataplane write the plan, and take it away."""

    def program() -> None:
        for family in Family:
            dataplane.load(family, programmed(family), node_ranges())

    def forget() -> None:
        for family in Family:
            dataplane.remove(family)

    netns.run(built.node, program)
    try:
        yield
    finally:
        netns.run(built.node, forget)


@pytest.fixture(scope="module")
def measured(lab: world.World) -> Measured:
    states = {family: netns.run(lab.node, read, NODE, family) for family in Family}
    return Measured(Tracer(World(lambda name, family: states[family] if name == NODE else None)))


def end_of(branch: Branch) -> str:
    """Return an end as the plan writes it."""
    end = branch.end
    if end.verdict.arrives:
        return where(end.packet.destination, end.packet.dport)
    return {"dropped": "drop", "rejected": "reject"}.get(end.verdict.value, end.verdict.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_trace_ends_where_the_real_packet_does(
    lab: world.World, measured: Measured, dropped: dict[Case, list[tuple[str, str]]], case: Case
) -> None:
    branches = measured.trace(case)
    text = "\n".join(f"{s.hook:12} {s.chain:24} {s.text}" for b in branches for s in b.steps)
    answers = dropped.get(case) or netns.run(lab.namespace_of(case.source), _ask, case)
    assert {end_of(b) for b in branches} == case.expected, text
    ends = {end for end, _ in answers}
    assert ends <= {end_of(b) for b in branches}, text
    assert sum(b.probability for b in branches) == pytest.approx(1)
    assert {end_of(b) for b in branches if b.masqueraded} == case.masqueraded, text
    seen = {(end, who) for end, who in answers if who}
    if case.source not in OWN_ADDRESSES:
        told = {(end_of(b), b.end.packet.source) for b in branches if b.end.verdict.arrives}
        assert seen <= told
