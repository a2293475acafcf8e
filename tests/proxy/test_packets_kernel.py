"""The packet-trace table on the kernel: real packets through real namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from node import masquerade
from proxy.frontends import frontends
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import TABLE
from proxy.table import FrontendTable
from proxy.topology import Place
from tests.proxy import world
from tests.proxy.plan import CASES, ME, NODE1, NODE1_ALIAS, Case, snapshot

TRIES_PER_ENDPOINT = 20
"""Missing one of n equally likely endpoints in 20·n tries has probability e^-20."""


@pytest.fixture(scope="module")
def lab(namespaces: Callable[[], str]) -> Iterator[world.World]:
    """The plan, built and programmed."""

    def program() -> None:
        plan = snapshot()
        table = FrontendTable()
        for name, service in plan.services.items():
            table.replace(name, frontends(service, plan.slices.get(name, ()), Place(ME)))
        with Nft(Family.V4, TABLE) as nft:
            Dataplane(nft).load(table, masquerade.ranges(plan.nodes, ME))

    built = world.build(namespaces)
    netns.run(built.node, program)
    with world.answering(built.servers):
        yield built


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_packet(lab: world.World, case: Case) -> None:
    def probe() -> list[tuple[str, str]]:
        answers: list[tuple[str, str]] = []
        for _ in range(TRIES_PER_ENDPOINT * len(case.expected)):
            answers.append(world.send(case.protocol, case.source, case.destination, case.port))
            if {a for a, _ in answers} >= case.expected and len(answers) > 2:
                break
        return answers

    answers = netns.run(lab.namespace_of(case.source), probe)
    assert {a for a, _ in answers} == case.expected
    seen = {s for _, s in answers if s}
    # A masqueraded node keeps an address of the node: the kernel cannot show the difference.
    if seen and case.source not in (NODE1, NODE1_ALIAS):
        assert (seen != {case.source}) == case.masqueraded, f"the server saw {seen}"
