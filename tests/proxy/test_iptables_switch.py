"""From one dataplane to another under traffic: each packet meets one of them, and the same verdict."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from itertools import permutations

import pytest

from netlink import netns
from netlink.family import Family
from proxy.model import Protocol
from tests.proxy import world
from tests.proxy.dataplanes import KINDS, Kind
from tests.proxy.plan import node_ranges, place, programmed
from tests.proxy.plan_cases import CASES
from tests.proxy.plan_lines import Case

LINES = (
    "Cluster addresses: the client's address is kept between pods",
    "Cluster addresses: an outside client, masqueraded",
    "Ports that no service has: a cluster address's other port is refused",
    "No endpoints: at the node port",
    "Node ports: masqueraded",
    "loadBalancerSourceRanges: a client in a range",
    "externalTrafficPolicy Local: node port: endpoints of this node, address kept",
    "externalTrafficPolicy Local: node port: a pod of another node, masqueraded",
    "Hairpin and egress: a pod to the outside is masqueraded",
)
SOME = [case for case in CASES if case.name in LINES]


@pytest.fixture(scope="module")
def lab(namespaces: Callable[[], str]) -> Iterator[world.World]:
    built = world.build(namespaces, CASES)
    with world.answering(built.servers):
        yield built


def verdicts(lab: world.World) -> None:
    """Send every case; it ends where the table says, and is masqueraded where the table says."""
    for case in SOME:
        end, seen = netns.run(lab.namespace_of(case.source), world.send, case)
        assert end in case.expected, case
        if seen:
            assert (seen != case.source) is (end in case.masqueraded), case


class Conversation:
    """A flow of UDP to a service: whoever answers first answers always."""

    def __init__(self, lab: world.World, case: Case) -> None:
        self._socket = netns.run(
            lab.namespace_of(case.source),
            lambda: socket.socket(
                socket.AF_INET if case.family is Family.V4 else socket.AF_INET6, socket.SOCK_DGRAM
            ),
        )
        self._socket.settimeout(world.ANSWERED_SECONDS)
        self._socket.connect((case.destination, case.port))
        self._first = self.ask()

    def ask(self) -> bytes:
        self._socket.send(b"who")
        return self._socket.recv(100)

    def goes_on(self) -> bool:
        """Whether the same endpoint answers, and sees the same client."""
        return self.ask() == self._first

    def close(self) -> None:
        self._socket.close()


def _chooses(case: Case) -> bool:
    """Whether a case is of a client by UDP with a choice of endpoints."""
    clients = [place(name, case.family) for name in ("pod1b", "client")]
    return case.protocol is Protocol.UDP and case.source in clients and len(case.expected) > 1


@pytest.mark.parametrize(("old", "new"), list(permutations(KINDS, 2)), ids=str)
def test_a_switch_breaks_nothing(lab: world.World, old: Kind, new: Kind) -> None:
    """The new one is there before the old one goes: at no moment is a packet served by neither."""

    def do(what: Callable[[Family], None]) -> None:
        for family in Family:
            netns.run(lab.node, what, family)

    def load(kind: Kind) -> Callable[[Family], None]:
        return lambda family: kind.load(family, programmed(family), node_ranges())

    flows: list[Conversation] = []
    do(load(old))
    try:
        flows += [Conversation(lab, case) for case in CASES if _chooses(case)]
        assert len(flows) >= 8
        do(load(new))
        verdicts(lab)
        assert all(flow.goes_on() for flow in flows)
        do(old.remove)
        verdicts(lab)
        assert all(flow.goes_on() for flow in flows)
    finally:
        for flow in flows:
            flow.close()
        do(old.remove)
        do(new.remove)
