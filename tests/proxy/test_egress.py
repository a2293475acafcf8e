"""What the outside sees of pods: the interface's address, or the chosen one, by packets and by the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.fake import FakeNft
from netlink.nftables.trace import Packet, outcomes
from node import masquerade
from proxy.dataplane import NodeRanges
from proxy.model import Protocol
from proxy.nftables.dataplane import Dataplane
from tests.proxy import world
from tests.proxy.dataplanes import KINDS, Kind
from tests.proxy.plan import HERE, NODES, OWN, both, place, programmed, twin
from tests.proxy.plan_lines import ENDPOINT_PORT, Case, address

FIRST, ON_THE_NODE, ROUTED = both("192.168.50.11"), both("192.168.60.11"), both("192.0.2.77")
"""Of node1: its InternalIP, an address beside it, and one that only its neighbours' routes lead to it."""
OUTSIDE, INSIDE = "client", ("pod2", "node2", "stranger")
"""Pods keep their address towards another node's pod, towards nodes, and where the configuration says so."""


def ranges(egress: tuple[str, ...], families: frozenset[Family] = frozenset(Family)) -> NodeRanges:
    return masquerade.ranges(NODES, HERE.node, both("203.0.113.0/24"), families, egress=egress)


def to(family: Family, name: str, port: int = ENDPOINT_PORT, protocol: Protocol = Protocol.TCP) -> Case:
    """A packet of a pod of node1."""
    source, destination = place("pod1", family), address(name, family)
    return Case("", family, source, destination, port, protocol, frozenset(), frozenset())


@pytest.fixture(scope="module")
def lab(namespaces: Callable[[], str]) -> Iterator[world.World]:
    built = world.build(namespaces, [to(f, OUTSIDE, protocol=p) for f in Family for p in world.KINDS])
    with world.answering(built.servers):
        yield built


def seen(lab: world.World, case: Case) -> str:
    """The address that the other end sees."""
    return netns.run(lab.namespace_of(case.source), world.send, case)[1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", Family)
def test_the_outside_sees_the_chosen_address_and_nobody_else_does(
    lab: world.World, family: Family, kind: Kind
) -> None:
    """Chosen, changed and given up again; each holds for new connections at once."""

    def program() -> Iterator[tuple[str, ...]]:
        with kind.opened(family) as dataplane:
            dataplane.load(programmed(family), ranges(ROUTED))
            yield ROUTED
            for chosen in (ON_THE_NODE, (), FIRST):
                dataplane.apply((), ranges(chosen))
                yield chosen

    steps = program()
    pod, own = place("pod1", family), {place(name, family) for name in OWN}
    while (chosen := netns.run(lab.node, next, steps, None)) is not None:
        expected = {a for a in chosen if (":" in a) is (family is Family.V6)} or own
        for protocol in world.KINDS:
            assert seen(lab, to(family, OUTSIDE, protocol=protocol)) in expected, chosen
        assert {seen(lab, to(family, name)) for name in INSIDE} == {pod}, chosen
        from_outside = Case(
            *("", family, place(OUTSIDE, family), address("two", family), 80, Protocol.TCP),
            *(frozenset[str](), frozenset[str]()),
        )
        assert seen(lab, from_outside) in own, "services are not the way out"
    netns.run(lab.node, kind.remove, family)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("chosen", [(), ROUTED], ids=["", "chosen"])
def test_towards_the_cluster_and_what_never_leaves_a_link_pods_keep_their_address(
    family: Family, chosen: tuple[str, ...]
) -> None:
    fake = FakeNft(family)
    Dataplane(fake).load((), ranges(chosen))
    kept = {
        Family.V4: ("169.254.20.10", "224.0.0.251", "10.244.2.10", "192.168.50.12", "203.0.113.9"),
        Family.V6: ("fe80::1", "ff02::fb", twin("10.244.2.10"), twin("192.168.50.12"), twin("203.0.113.9")),
    }
    replaced = {
        Family.V4: ("198.51.100.10", "192.168.50.13", "10.243.255.255", "10.244.3.0", "169.253.255.255"),
        Family.V6: (twin("198.51.100.10"), twin("192.168.50.13"), "fd00:10:244:3::", "fec0::1", "fd99::1"),
    }
    assert {_source(fake, family, d) for d in kept[family]} == {(False, "")}
    expected = {(False, place_of(chosen, family))} if chosen else {(True, "")}
    assert {_source(fake, family, d) for d in replaced[family]} == expected


def place_of(chosen: tuple[str, ...], family: Family) -> str:
    return chosen[list(Family).index(family)]


def _source(fake: FakeNft, family: Family, destination: str) -> tuple[bool, str]:
    """Whether a pod is masqueraded towards a destination, and the address that is chosen for it."""
    assert fake.state
    packet = Packet(place("pod1", family), destination, Protocol.TCP.value, 443)
    (found,) = outcomes(fake.state, packet, frozenset())
    return found.masqueraded, found.source


def test_a_family_that_is_not_masqueraded_has_no_chosen_address_either() -> None:
    found = {}
    for family in Family:
        fake = FakeNft(family)
        Dataplane(fake).load((), ranges(ROUTED, frozenset({Family.V4})))
        found[family] = _source(fake, family, place(OUTSIDE, family))
    assert found == {Family.V4: (False, ROUTED[0]), Family.V6: (False, "")}
