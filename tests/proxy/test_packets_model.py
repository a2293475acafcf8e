"""The packet-trace table against the pure model: rules as values, walked in memory."""

from __future__ import annotations

import pytest

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from netlink.nftables.trace import Packet, outcomes
from node import masquerade
from proxy.frontends import frontends
from proxy.nftables.dataplane import Dataplane
from proxy.table import FrontendTable
from proxy.topology import Place
from tests.proxy.plan import CASES, ME, NODE1, NODE1_ALIAS, Case, snapshot


@pytest.fixture(scope="module")
def table() -> FakeNft:
    """The whole plan, loaded."""
    plan = snapshot()
    found = FrontendTable()
    for name, service in plan.services.items():
        found.replace(name, frontends(service, plan.slices.get(name, ()), Place(ME)))
    fake = FakeNft(Family.V4)
    Dataplane(fake).load(found, masquerade.ranges(plan.nodes, ME))
    return fake


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_packet(table: FakeNft, case: Case) -> None:
    local = frozenset({NODE1, NODE1_ALIAS, "127.0.0.1"})
    packet = Packet(
        case.source, case.destination, case.protocol.value, case.port, from_node=case.source in local
    )
    assert table.state
    found = outcomes(table.state, packet, local)
    ends = {f"{o.destination}:{o.port}" if o.verdict == "accept" else o.verdict for o in found}
    matched = "\n".join(f"{o.verdict} {o.destination}:{o.port}: {' | '.join(o.rules)}" for o in found)
    assert ends == case.expected, matched
    if ends - {"drop", "reject"}:
        assert {o.masqueraded for o in found} == {case.masqueraded}, matched
