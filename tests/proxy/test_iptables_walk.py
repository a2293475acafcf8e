"""The walk through rules as text: what it knows it follows, what it does not know it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from netlink.family import Family
from netlink.nftables.trace import Packet
from proxy.dataplane import NodeRanges
from proxy.frontends import Backend, frontends
from proxy.iptables.dataplane import JUMPS
from proxy.iptables.names import ChainId, PortName, endpoint_chain, service_chain
from proxy.iptables.plan import Plan
from proxy.iptables.walk import Around, Path, Seen, UnknownRule, parse, paths, tables, ways
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.topology import Place

NAME = ObjectName("yaobank", "summary")
PORT = PortName("yaobank/summary:http", Protocol.TCP)
PODS = ("10.48.0.65", "10.48.0.67", "10.48.0.68")
RANGES = NodeRanges(pod_cidrs=("10.48.0.0/16",), node_pods=("10.48.0.0/24",))
CLIENT = Packet("10.48.0.9", "198.19.0.1", 6, 80)


def chains(pods: int, affinity: int = 0) -> Plan:
    service = Service(
        NAME, ("198.19.0.1",), (ServicePort("http", Protocol.TCP, 80),), affinity_seconds=affinity
    )
    endpoints = tuple(Endpoint(address, "node1") for address in PODS[:pods])
    piece = EndpointSlice(NAME, NAME, Family.V4, (EndpointPort("http", Protocol.TCP, 80),), endpoints)
    plan = Plan(Family.V4)
    plan.reset(frontends(service, (piece,), Place("node1")), RANGES)
    return plan


def walked(plan: Plan, packet: Packet = CLIENT, **remembered: tuple[str, ...]) -> list[Path]:
    lists = {f"KUBE-SEP-{name}": clients for name, clients in remembered.items()}
    return list(paths(tables(plan.chains(), JUMPS), packet, {"192.168.0.1"}, lists))


def test_the_documented_walk_leads_by_two_endpoints_at_half_each() -> None:
    """KUBE-SERVICES, KUBE-SVC, KUBE-SEP with its mark for the endpoint itself, DNAT."""
    plan = chains(2)
    found = plan.chains()
    assert found[service_chain("SVC", PORT)][1:] == (
        '-m comment --comment "yaobank/summary:http -> 10.48.0.65:80" '
        "-m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-QBQ2ZLCSJLFEASMX",
        '-m comment --comment "yaobank/summary:http -> 10.48.0.67:80" -j KUBE-SEP-BS2BXDAXX5ZBJNP2',
    )
    assert found[endpoint_chain(PORT, Backend(PODS[0], 80, True))] == (
        '-s 10.48.0.65/32 -m comment --comment "yaobank/summary:http" -j KUBE-MARK-MASQ',
        '-p tcp -m comment --comment "yaobank/summary:http" -m tcp -j DNAT --to-destination 10.48.0.65:80',
    )
    assert [(p.outcome.destination, p.probability) for p in walked(plan)] == [
        ("10.48.0.65", 0.5),
        ("10.48.0.67", 0.5),
    ]
    assert [step.chain for step in walked(plan)[0].steps] == [
        "PREROUTING",
        "KUBE-SERVICES",
        "KUBE-SVC-OIQIZJVJK6E34BR4",
        "KUBE-SEP-QBQ2ZLCSJLFEASMX",
        *["FORWARD"] * 4,
        *["POSTROUTING", "KUBE-POSTROUTING", "POSTROUTING"],
    ]


def test_every_endpoint_is_as_probable_as_another() -> None:
    found = [p.probability for p in walked(chains(3))]
    assert found == pytest.approx([1 / 3] * 3, abs=1e-8)


def test_a_client_with_affinity_has_one_way_only() -> None:
    plan = chains(3, affinity=60)
    chain = endpoint_chain(PORT, Backend(PODS[2], 80, True)).name
    known = walked(plan, CLIENT, **{chain.removeprefix("KUBE-SEP-"): (CLIENT.source,)})
    assert [(p.outcome.destination, p.probability) for p in known] == [(PODS[2], 1.0)]
    assert len(walked(plan)) == 3


@pytest.mark.parametrize(
    "rule",
    [
        "-j LOG",
        "-m set --match-set x src -j DROP",
        "-m addrtype --dst-type BROADCAST -j DROP",
        "-m statistic --mode nth --every 2 --packet 0 -j DROP",
        "-m recent --update --name x -j DROP",
        "-j MARK --set-mark",
        "-p tcp -m multiport --dports 80,81 -j DROP",
        "-j REDIRECT --to-ports 80",
        "-j DNAT --to-destination 10.0.0.1",
        "-j DNAT --to-destination 10.0.0.1-10.0.0.2:80",
        "-j MASQUERADE --to-ports 80",
    ],
)
def test_a_rule_of_an_unknown_form_is_no_guess(rule: str) -> None:
    with pytest.raises(UnknownRule):
        list(paths({"nat": {"PREROUTING": [rule]}}, CLIENT, ()))


def test_a_rule_of_an_unknown_form_can_be_passed_over_and_told_of() -> None:
    chains = {
        "FORWARD": ["-m set --match-set x src -j DROP", "-i eth+ -p tcp -m tcp --sport 1024:65535 -j DROP"]
    }
    seen = Seen("10.0.0.1", "10.0.0.2", 6, 80, sport=40000, iif="eth0")
    (way,) = ways(chains, ChainId("filter", "FORWARD"), seen, Around(()), strict=False)
    assert (way.verdict, way.undecided) == ("drop", (chains["FORWARD"][0],))
    (other,) = ways(chains, ChainId("filter", "FORWARD"), replace(seen, iif="wg0"), Around(()), strict=False)
    assert other.verdict == "accept"


def test_chains_in_a_circle_are_said_to_be_one() -> None:
    circle = {"nat": {"PREROUTING": ["-j A"], "A": ["-j B"], "B": ["-j A"]}}
    with pytest.raises(UnknownRule, match="circle"):
        list(paths(circle, CLIENT, ()))


def test_what_is_in_a_comment_is_no_condition() -> None:
    assert parse('-m comment --comment "say \\"-j DROP\\", ! -s 10.0.0.1" -j ACCEPT').target == "ACCEPT"
