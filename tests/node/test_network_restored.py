"""What somebody removes of the network between nodes comes back without a restart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import probe
from lab.probe import Answer
from lab.runtime import Pod
from lab.state import Lab
from lab.topology import IpFamily, plan
from netlink.family import Family
from tests.scenarios.plain import PORT, difference, held, reaches, running, shell

SECONDS = 8.0
"""A second between comparisons in steady state, some more after the start, on a loaded machine."""

UPLINK = """
ip link set eth0 down
ip link set eth0 up
ip route add default via 192.168.50.1 proto static
ip address add fd00:192:168:50::111/64 dev eth0 nodad
ip address add fd00:192:168:50::11/64 dev eth0 nodad
ip route add default via fd00:192:168:50::1 proto static
"""
"""As whoever manages the network does after a cable was out: IPv6 addresses go with the link."""

FAULTS = {
    "routes": "ip route flush proto 112; ip -6 route flush proto 112",
    "one route": "ip route del 10.244.3.0/24; ip -6 route del fd00:10:244:2::/64",
    "pods' routes to nodes": "ip route flush table 112; ip -6 route flush table 112",
    "tunnel down and up": "ip link set pwvxlan4 down; ip link set pwvxlan4 up",
    "tunnel down": "ip link set pwvxlan6 down",
    "tunnels": "ip link del pwvxlan4; ip link del pwvxlan6",
    "forwarding entries": "for d in pwvxlan4 pwvxlan6; do bridge fdb show dev $d | while read mac rest; do"
    " bridge fdb del $mac dev $d; done; done",
    "neighbours": "for d in pwvxlan4 pwvxlan6; do ip neigh flush nud permanent dev $d;"
    " ip -6 neigh flush nud permanent dev $d; done",
    "rules": "ip rule del pref 112; ip -6 rule del pref 112",
    "addresses": "ip address flush dev pwvxlan4 scope global",
    "uplink down and up": UPLINK,
    "tables": "nft delete table ip podwire_tunnels; nft delete table ip6 podwire_tunnels",
    "mtu of the tunnel": "ip link set pwvxlan4 mtu 1300",
}


@pytest.fixture(scope="module")
def found() -> Iterator[tuple[Lab, dict[str, Pod]]]:
    with running(plan("restored", ip_family=IpFamily.DUAL)) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_what_somebody_removes_comes_back(found: tuple[Lab, dict[str, Pod]], fault: str) -> None:
    lab, pods = found
    namespace = lab.plan.node("node1").namespace
    before = held(namespace)
    shell(namespace, FAULTS[fault])
    assert reaches(lambda: held(namespace) == before, SECONDS), difference(before, held(namespace))
    for family in Family:
        for other in ("node2", "node3"):
            answer = probe.fetch(pods["node1"].netns, pods[other].address(family), PORT)
            assert answer == [Answer(other, pods["node1"].address(family))]
