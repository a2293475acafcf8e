"""Probes on a real network: who answers, what passes, and where it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netlink import netns
from node.doctor import mtu, peers
from node.doctor.findings import Check
from node.doctor.icmp import Answer, Kind, Probe, Prober
from node.doctor.view import Context, PeerRoute, View
from tests.node.doctor.underlay import FAR, RANGES, ROUTERS, Underlay, build, tunnel

TIMEOUT = 0.6
NO_ERRORS = """
table inet quiet {
  chain out {
    type filter hook output priority 0
    icmp type destination-unreachable drop
    icmpv6 type packet-too-big drop
  }
}
"""
NO_VXLAN = "table ip quiet { chain in { type filter hook input priority 0; udp dport 8472 drop; }; }"


@pytest.fixture
def network(namespaces: Callable[[], str]) -> Underlay:
    return build(namespaces)


@pytest.fixture
def narrow(namespaces: Callable[[], str]) -> Underlay:
    return build(namespaces, mtu=1400)


def by_router(size: int = 1500, family: int = 0) -> PeerRoute:
    return PeerRoute(RANGES[family], "node2", ROUTERS[0][family], "gateway", "eth0", size, FAR[family])


def by_tunnel(size: int = 1450) -> PeerRoute:
    return PeerRoute(RANGES[0], "node2", RANGES[0].split("/")[0], "vxlan", "pwvxlan4", size, FAR[0])


def run(check: Callable[[Context], Check], where: Underlay, *routes: PeerRoute) -> Check:
    context = Context(View("node1", routes=routes), timeout=TIMEOUT)
    return netns.run(where.near, check, context)


def sentences(check: Check) -> list[str]:
    return [finding.sentence for finding in check.findings]


def ask(where: Underlay, *probes: Probe) -> list[Answer]:
    def inside() -> list[Answer]:
        with Prober() as prober:
            return prober.ask(probes, TIMEOUT)

    return netns.run(where.near, inside)


def test_what_becomes_of_a_probe_is_told_in_both_families(narrow: Underlay) -> None:
    for v in (0, 1):
        range_address = RANGES[v].split("/")[0]
        found = ask(
            narrow,
            Probe(FAR[v]),
            Probe(range_address, 1400),
            Probe(range_address, 1401),
            Probe(range_address, 1500, ttl=1),
            Probe(range_address, 1501),
            Probe(FAR[v].replace("2", "3") if v == 0 else "2001:db8:2::99"),
        )
        kinds = [answer.kind for answer in found]
        assert kinds[:5] == [Kind.REPLY, Kind.REPLY, Kind.TOO_BIG, Kind.EXPIRED, Kind.TOO_BIG]
        assert kinds[5] in (Kind.SILENCE, Kind.UNREACHABLE)
        assert (found[2].sender, found[2].mtu) == (ROUTERS[0][v], 1400)
        assert found[3].sender == ROUTERS[0][v]
        assert found[4].sender == ""
        assert 0 < found[0].seconds < TIMEOUT


def test_nodes_that_answer_are_no_finding_and_the_time_is_told(network: Underlay) -> None:
    check = run(peers.check, network, by_router(), by_router(family=1))
    assert sentences(check) == []
    assert check.notes[0].startswith("pods' ranges of 1 node answers after")


def test_a_node_that_is_gone_is_told_once_with_its_ranges(network: Underlay) -> None:
    gone = PeerRoute("10.244.9.0/24", "node9", "192.0.2.9", "direct", "eth0", 0, "192.0.2.9")
    check = run(peers.check, network, gone, by_router())
    assert sentences(check) == [
        "node node9 does not answer on its address 192.0.2.9, nor do its pods' ranges 10.244.9.0/24"
    ]


def test_a_network_that_does_not_know_a_range_is_told_by_its_gateway(network: Underlay) -> None:
    unknown = PeerRoute("10.244.77.0/24", "node2", ROUTERS[0][0], "gateway", "eth0", 0, FAR[0])
    check = run(peers.check, network, unknown)
    [finding] = check.findings
    assert finding.sentence.startswith(f"node node2 answers on {FAR[0]}, but its pods' range 10.244.77.0/24")
    assert finding.sentence.endswith(f"; its route is by the gateway {ROUTERS[0][0]}")
    assert finding.remedy.startswith(f"have {ROUTERS[0][0]} route 10.244.77.0/24 to {FAR[0]}")


def test_a_peer_that_drops_vxlan_is_told_by_the_port(network: Underlay) -> None:
    tunnel(network)
    assert sentences(run(peers.check, network, by_tunnel())) == []
    network.nft(network.far, NO_VXLAN)
    check = run(peers.check, network, by_tunnel())
    assert sentences(check) == [
        f"node node2 answers on {FAR[0]}, but its pods' range {RANGES[0]} does not; "
        "VXLAN (UDP port 8472) may be blocked on the way"
    ]


def test_paths_that_keep_their_promise_are_no_finding(narrow: Underlay) -> None:
    check = run(mtu.check, narrow, by_router(1400), by_router(1400, family=1))
    assert (check.findings, check.notes) == ((), ())


@pytest.mark.parametrize("family", [0, 1])
def test_a_router_that_says_what_fits_is_named(narrow: Underlay, family: int) -> None:
    check = run(mtu.check, narrow, by_router(family=family))
    [finding] = check.findings
    assert finding.sentence == (
        "packets of 1500 bytes to pods of node node2 are lost; up to 1400 pass; "
        f"{ROUTERS[0][family]} refuses larger ones than 1400 bytes"
    )
    assert finding.remedy.startswith("set network.mtu to 1400 on all nodes")


@pytest.mark.parametrize("family", [0, 1])
def test_a_black_hole_is_found_by_size_and_place(narrow: Underlay, family: int) -> None:
    narrow.nft(narrow.router, NO_ERRORS)
    check = run(mtu.check, narrow, by_router(family=family))
    [finding] = check.findings
    assert finding.sentence == (
        "packets of 1500 bytes to pods of node node2 are lost; up to 1400 pass; "
        f"behind {ROUTERS[0][family]} nothing large comes back"
    )
    assert finding.remedy.startswith("set network.mtu to 1400 on all nodes")


def test_of_a_tunnel_the_outer_packets_are_searched(narrow: Underlay) -> None:
    tunnel(narrow)
    narrow.nft(narrow.router, NO_ERRORS)
    check = run(mtu.check, narrow, by_tunnel())
    [finding] = check.findings
    assert finding.sentence == (
        f"VXLAN's packets of 1500 bytes to node node2 ({FAR[0]}) are lost; up to 1400 pass; "
        f"behind {ROUTERS[0][0]} nothing large comes back"
    )
    assert finding.remedy.startswith("set network.mtu to 1400 on all nodes")


def test_without_a_promise_the_interface_counts(narrow: Underlay) -> None:
    check = run(mtu.check, narrow, by_router(0))
    assert sentences(check)[0].startswith("packets of 1500 bytes to pods of node node2 are lost; up to 1400")


def test_a_node_that_does_not_answer_is_not_searched(network: Underlay) -> None:
    gone = PeerRoute("10.244.9.0/24", "node9", "192.0.2.9", "direct", "eth0", 1500, "192.0.2.9")
    check = run(mtu.check, network, gone)
    assert check.findings == ()
    assert check.notes == ("not probed, as they do not answer small packets: 10.244.9.0 of node node9",)
