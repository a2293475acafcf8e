"""The packet-trace table on the kernel: real packets through real namespaces, on each dataplane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from netlink import netns
from netlink.conntrack import Conntrack
from netlink.family import Family
from proxy.model import Protocol
from tests.proxy import world
from tests.proxy.dataplanes import ALL_KINDS, IPVS, Kind, needs_ipvs
from tests.proxy.plan import OWN, node_ranges, place, programmed, twin
from tests.proxy.plan_cases import CASES, PROXYS_OWN
from tests.proxy.plan_lines import Case, address

TRIES_PER_ENDPOINT = 20
"""Missing one of n equally likely endpoints in 20·n tries has probability e^-20."""
LEAST_TRIES, STICKY_TRIES = 3, 10
NODE_ADDRESSES = frozenset(place(name, family) for name in OWN for family in Family)

CROWD = {Family.V4: [f"192.168.70.{n}" for n in range(1, 61)]}
CROWD[Family.V6] = [twin(address) for address in CROWD[Family.V4]]
"""More addresses of the node, each a client."""

Answers = list[tuple[str, str]]
"""Who answered, and the client it saw."""


@pytest.fixture(scope="module")
def built(namespaces: Callable[[], str]) -> Iterator[world.World]:
    """The plan's world, without a service."""
    found = world.build(namespaces, (*CASES, *PROXYS_OWN))
    for addresses in CROWD.values():
        netns.run(found.node, world.own, addresses)
    with world.answering(found.servers):
        yield found


@pytest.fixture(scope="module", params=ALL_KINDS, ids=str)
def lab(built: world.World, request: pytest.FixtureRequest) -> Iterator[world.World]:
    """The plan's world, programmed by each dataplane in its turn."""
    dataplane: Kind = request.param
    if dataplane is IPVS:
        needs_ipvs()

    def program() -> None:
        for family in Family:
            dataplane.load(family, programmed(family), node_ranges())

    def forget() -> None:
        """Take it away, and what flows remember: a client's port may come again."""
        with Conntrack() as conntrack:
            for family in Family:
                dataplane.remove(family)
                conntrack.delete_where(lambda _: True, family)

    netns.run(built.node, program)
    yield built
    netns.run(built.node, forget)


@pytest.fixture(scope="module")
def dropped(lab: world.World) -> dict[Case, Answers]:
    """The answers to all that is to be dropped: waiting for none of them takes no longer than for one."""
    cases = [c for c in CASES if "drop" in c.expected]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = pool.map(lambda c: netns.run(lab.namespace_of(c.source), world.send, c), cases)
        return {case: [answer] for case, answer in zip(cases, answers, strict=True)}


def _ask(case: Case) -> Answers:
    """Send until every end that is expected was met, or something that is not."""
    answers: Answers = []
    least = STICKY_TRIES if case.sticky else LEAST_TRIES
    for _ in range(TRIES_PER_ENDPOINT * len(case.expected)):
        answers.append(world.send(case))
        ends = {end for end, _ in answers}
        if not ends <= case.expected or (len(answers) >= least and (case.sticky or ends == case.expected)):
            break
    return answers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packet(lab: world.World, dropped: dict[Case, Answers], case: Case) -> None:
    answers = dropped.get(case) or netns.run(lab.namespace_of(case.source), _ask, case)
    ends = {end for end, _ in answers}
    if case.sticky:
        assert len(ends) == 1, "a client with affinity went to several endpoints"
        assert ends < case.expected
    else:
        assert ends == case.expected
    # A masqueraded node keeps an address of the node: the kernel cannot show the difference.
    if case.source not in NODE_ADDRESSES:
        assert {end for end, seen in answers if seen not in ("", case.source)} == case.masqueraded & ends
        assert {end for end, seen in answers if seen == case.source}.isdisjoint(case.masqueraded)


@pytest.mark.parametrize("case", PROXYS_OWN, ids=str)
def test_what_the_l7_proxy_sends_is_not_translated(lab: world.World, case: Case) -> None:
    end, seen = netns.run(lab.node, world.send, case)
    assert end in case.expected
    assert seen in ("", case.source)


def _sticky(family: Family, source: str, destination: str, port: int = 80) -> Case:
    """Return a packet to the service `sticky`."""
    some = next(c for c in CASES if c.sticky and c.family is family)
    return replace(some, source=source, destination=address(destination, family), port=port)


@pytest.mark.parametrize("family", Family)
def test_a_client_with_affinity_goes_to_one_endpoint_by_every_address(
    lab: world.World, family: Family
) -> None:
    """Connections of a client go to the same Pod ("Virtual IPs and Service Proxies", Session affinity)."""
    source = place("pod1c", family)
    cases = [_sticky(family, source, name) for name in ("sticky", "sticky/external", "sticky/balancer")]
    cases.append(_sticky(family, source, "node1", 30031))
    ends = {netns.run(lab.namespace_of(source), world.send, c)[0] for c in cases for _ in range(3)}
    assert len(ends) == 1


@pytest.mark.parametrize("family", Family)
def test_clients_with_affinity_are_spread_over_all_endpoints(lab: world.World, family: Family) -> None:
    """A client that is remembered moves no other; 60 miss one of three with probability 1e-10."""
    cases = [_sticky(family, source, "sticky") for source in CROWD[family]]
    first, second = ([netns.run(lab.node, world.send, c)[0] for c in cases] for _ in range(2))
    assert first == second
    assert set(first) == cases[0].expected


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP], ids=str)
@pytest.mark.parametrize("family", Family)
def test_tcp_is_refused_by_a_reset_and_udp_by_icmp(
    lab: world.World, family: Family, protocol: Protocol
) -> None:
    """A client cannot tell, but its kernel counts: a reset ends a connection at once, ICMP is only a hint."""
    case = next(
        c
        for c in CASES
        if c.expected == {"reject"} and (c.family, c.protocol, c.source) == (family, protocol, _pod1(family))
    )

    def ask() -> int:
        before = _unreachable(family)
        assert world.send(case)[0] == "reject"
        return _unreachable(family) - before

    told = netns.run(lab.namespace_of(case.source), ask)
    assert told == (0 if protocol is Protocol.TCP else 1)


def _pod1(family: Family) -> str:
    return place("pod1", family)


def _unreachable(family: Family) -> int:
    """Return how many ICMP messages "destination unreachable" this namespace has received."""
    if family is Family.V6:
        lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Icmp6InDestUnreachs "))
    names, values = (
        line.split()
        for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
        if line.startswith("Icmp:")
    )
    return int(values[names.index("InDestUnreachs")])
