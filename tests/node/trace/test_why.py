"""Why rules of ours end a packet's way, by the names that the daemon knows."""

from __future__ import annotations

import pytest

from node.trace.packet import Packet
from node.trace.rules import Passed, Ruling
from node.trace.why import Front, Names, reason_of
from tests.node.trace.states import packet

NAMES = Names(
    (
        Front("shop/web:http", "10.96.0.5", 6, 80, action="reject"),
        Front("shop/web:http", "", 6, 30180),
    ),
    (("10.244.1.2", "shop/a"),),
)
SLICES = "kubectl get endpointslices -n shop -l kubernetes.io/service-name=web"
REJECT = ("ip podwire reject_no_endpoints", "no endpoints: TCP reset")


@pytest.mark.parametrize(
    ("last", "ruling", "sent", "reason", "look"),
    [
        (
            REJECT,
            Ruling.REJECT,
            packet(destination="10.96.0.5"),
            "service shop/web:http has no ready endpoints for 10.96.0.5:80/tcp",
            SLICES,
        ),
        (
            REJECT,
            Ruling.REJECT,
            packet(destination="192.168.50.11", dport=30180),
            "service shop/web:http has no ready endpoints for 192.168.50.11:30180/tcp",
            SLICES,
        ),
        (
            REJECT,
            Ruling.REJECT,
            packet(destination="10.96.0.5", dport=81),
            "service shop/web has no port 81/tcp",
            "kubectl get service web -n shop -o yaml",
        ),
        (
            REJECT,
            Ruling.REJECT,
            packet(destination="10.96.0.9"),
            "the service with 10.96.0.9:80/tcp has no ready endpoints, or no such port",
            "podwire frontends",
        ),
        (
            ("ip podwire prerouting", "to the chain of that shape"),
            Ruling.DROP,
            packet(destination="192.168.50.11", dport=30180),
            "service shop/web:http has the traffic policy Local and no endpoint on node1",
            SLICES,
        ),
        (
            ("ip podwire prerouting", "sources that a load balancer's address is not for"),
            Ruling.DROP,
            packet("203.0.113.9", "10.96.0.5"),
            "203.0.113.9 is not in the loadBalancerSourceRanges of service shop/web:http",
            "kubectl get service web -n shop -o yaml",
        ),
        (
            ("ip podwire_pods pod", "from any other: forged, or the pod is not known"),
            Ruling.DROP,
            packet(),
            "the guard of pods drops it: from any other: forged, or the pod is not known "
            "(10.244.1.2 by pwpoda)",
            "kubectl get pod a -n shop -o wide",
        ),
        (
            ("ip podwire_tunnels input", "VXLAN from what is no node"),
            Ruling.DROP,
            packet(),
            "the guard of tunnels drops it: VXLAN from what is no node",
            "podwire routes",
        ),
        (
            ("ip filter PODWIRE-REJECT", ""),
            Ruling.REJECT,
            packet(destination="10.96.0.5"),
            "service shop/web:http has no ready endpoints for 10.96.0.5:80/tcp",
            SLICES,
        ),
        (
            ("iptables-legacy filter KUBE-EXTERNAL-SERVICES", "shop/other has no local endpoints"),
            Ruling.DROP,
            packet(destination="10.96.0.9"),
            "service shop/other has the traffic policy Local and no endpoint on node1",
            SLICES.replace("=web", "=other"),
        ),
        (
            ("ip filter KUBE-PROXY-FIREWALL", ""),
            Ruling.DROP,
            packet("203.0.113.9", "10.96.0.5"),
            "203.0.113.9 is not in the loadBalancerSourceRanges of service shop/web:http",
            "kubectl get service web -n shop -o yaml",
        ),
        (
            ("inet fw forward", "policy drop"),
            Ruling.DROP,
            packet(),
            "chain inet fw forward of node1 drops it: policy drop",
            "nft list chain inet fw forward",
        ),
    ],
)
def test_an_end_names_its_cause_and_the_object_to_look_at(
    last: tuple[str, str], ruling: Ruling, sent: Packet, reason: str, look: str
) -> None:
    assert reason_of(NAMES, "node1", Passed(ruling, sent, last=last), sent) == (reason, look)


def test_a_chain_of_iptables_is_listed_by_its_own_program() -> None:
    passed = Passed(Ruling.DROP, packet(), last=("ip filter FORWARD", ""), xtables="iptables-nft")
    assert reason_of(NAMES, "node1", passed, packet()) == (
        "chain ip filter FORWARD of node1 drops it",
        "iptables-nft -t filter -S FORWARD",
    )
