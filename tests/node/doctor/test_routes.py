"""Routes and entries of tunnels that differ from what the daemon wants are told one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from netlink import netns
from netlink.requests import Route, Vxlan
from netlink.wireguard import Device, Known, Peer
from node.doctor import routes
from node.doctor.routes import Observed, Secured, Tunnel, judge
from node.doctor.view import Context, PeerRoute, View
from tests.node.doctor.underlay import FAR, MACS, RANGES, build, tunnel

NAMES = {2: "eth0", 3: "pwvxlan4"}
VIEW = View(
    "node1",
    routes=(
        PeerRoute("10.244.1.0/24", "node1", backend="local"),
        PeerRoute("10.244.2.0/24", "node2", "192.0.2.2", "direct", "eth0", 1500, "192.0.2.2"),
        PeerRoute("10.244.3.0/24", "node3", "10.244.3.0", "vxlan", "pwvxlan4", 1450, "198.51.100.3"),
    ),
)
LOCAL = Route("10.244.1.0/24")
DIRECT = Route("10.244.2.0/24", gateway="192.0.2.2", oif=2, mtu=1500)
FAR_ROUTE = Route("10.244.3.0/24", gateway="10.244.3.0", oif=3, mtu=1450)
MADE = Vxlan("pwvxlan4", 112, 8472, "192.0.2.1", "02:00:00:00:00:01", 1450)
TUNNEL = Tunnel("pwvxlan4", True, MADE, {"10.244.3.0": "02::3"}, {"02::3": "198.51.100.3"})
GOOD = Observed((LOCAL, DIRECT, FAR_ROUTE), (), (TUNNEL,), NAMES)

CASES = [
    ("as it should be", GOOD, ""),
    (
        "missing",
        replace(GOOD, routes=(LOCAL, FAR_ROUTE)),
        "the route to 10.244.2.0/24 of node node2 is missing",
    ),
    (
        "another gateway",
        replace(GOOD, routes=(LOCAL, replace(DIRECT, gateway="192.0.2.9"), FAR_ROUTE)),
        "the route to 10.244.2.0/24 of node node2 is by 192.0.2.9, not by 192.0.2.2",
    ),
    (
        "another interface",
        replace(GOOD, routes=(LOCAL, replace(DIRECT, oif=3), FAR_ROUTE)),
        "the route to 10.244.2.0/24 of node node2 is over pwvxlan4, not over eth0",
    ),
    (
        "another MTU",
        replace(GOOD, routes=(LOCAL, DIRECT, replace(FAR_ROUTE, mtu=1500))),
        "the route to 10.244.3.0/24 of node node3 has the MTU 1500, not 1450",
    ),
    (
        "stale",
        replace(GOOD, routes=(*GOOD.routes, Route("10.244.9.0/24", gateway="192.0.2.9", oif=2))),
        "a stale route of podwire's leads to 10.244.9.0/24, which is of no node",
    ),
    (
        "stale, of pods to nodes",
        replace(GOOD, nodes=(Route("198.51.100.9/32", gateway="10.244.9.0", oif=3, table=112),)),
        "a stale route of podwire's in table 112 leads to 198.51.100.9/32, no node",
    ),
    ("no device", replace(GOOD, tunnels=()), "the VXLAN device pwvxlan4 is missing, for 1 ranges"),
    ("down", replace(GOOD, tunnels=(replace(TUNNEL, up=False),)), "the VXLAN device pwvxlan4 is down"),
    (
        "another port",
        replace(GOOD, tunnels=(replace(TUNNEL, made=replace(MADE, port=4789)),)),
        "the VXLAN device pwvxlan4 has UDP port 4789, not 8472",
    ),
    (
        "learning",
        replace(GOOD, tunnels=(replace(TUNNEL, made=replace(MADE, learning=True)),)),
        "the VXLAN device pwvxlan4 has learning True, not False",
    ),
    (
        "no neighbour",
        replace(GOOD, tunnels=(replace(TUNNEL, neighbours={}),)),
        "pwvxlan4 has no neighbour 10.244.3.0, by which node node3 is reached",
    ),
    (
        "no forwarding entry",
        replace(GOOD, tunnels=(replace(TUNNEL, forwarding={}),)),
        "pwvxlan4 has no forwarding entry for 02::3, which is of node node3",
    ),
    (
        "a node that moved",
        replace(GOOD, tunnels=(replace(TUNNEL, forwarding={"02::3": "198.51.100.8"}),)),
        "pwvxlan4 sends packets for node node3 to 198.51.100.8, not to 198.51.100.3",
    ),
    (
        "stale neighbour",
        replace(GOOD, tunnels=(replace(TUNNEL, neighbours={**TUNNEL.neighbours, "10.244.9.0": "02::9"}),)),
        "a stale neighbour 10.244.9.0 (02::9) on pwvxlan4 is of no node",
    ),
    (
        "stale forwarding entry",
        replace(GOOD, tunnels=(replace(TUNNEL, forwarding={**TUNNEL.forwarding, "02::9": "198.51.100.9"}),)),
        "a stale forwarding entry on pwvxlan4 leads to 198.51.100.9, which is no node's",
    ),
]


@pytest.mark.parametrize(("seen", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_said_of_the_kernel(seen: Observed, said: str) -> None:
    found = [finding.sentence for finding in judge(VIEW, seen).findings]
    assert found[:1] == ([said] if said else [])


def test_on_a_bridge_the_own_range_has_the_bridges_route() -> None:
    seen = replace(GOOD, routes=(DIRECT, FAR_ROUTE))
    assert judge(replace(VIEW, mode="bridge"), seen).findings == ()


def test_a_tunnel_is_read_from_the_kernel(namespaces: Callable[[], str]) -> None:
    made = build(namespaces)
    tunnel(made)
    far = RANGES[0].split("/")[0]
    route = PeerRoute(RANGES[0], "node2", far, "vxlan", "pwvxlan4", 1450, FAR[0])
    assert netns.run(made.near, routes.check, Context(View("node1", routes=(route,)))).findings == ()
    moved = replace(route, peer="198.51.100.9")
    check = netns.run(made.near, routes.check, Context(View("node1", routes=(moved,))))
    assert [f.sentence for f in check.findings] == [
        f"pwvxlan4 sends packets for node node2 to {FAR[0]}, not to 198.51.100.9",
        f"a stale forwarding entry on pwvxlan4 leads to {FAR[0]}, which is no node's",
    ]
    assert check.findings[1].remedy == f"bridge fdb del {MACS[1]} dev pwvxlan4 dst {FAR[0]}"


SECURED_VIEW = View(
    "node1",
    backend="wireguard",
    routes=(PeerRoute("10.244.3.0/24", "node3", "", "wireguard", "pwwg0", 1440, "198.51.100.3"),),
)
KNOWN = {"KEY": Known(Peer("KEY", allowed=frozenset({"10.244.3.0/24"})))}
WG = tuple(Secured(f"pwwg{n}", True, Device(4 + n, f"pwwg{n}", "OWN", 51820 + n, KNOWN)) for n in (0, 1))
SECURED = Observed(
    (Route("10.244.3.0/24", oif=4, mtu=1440), Route("10.244.3.0/24", metric=4095)),
    names={4: "pwwg0", 5: "pwwg1"},
    secured=WG,
)


@pytest.mark.parametrize(("seen", "said"), [
    (SECURED, ""),
    (replace(SECURED, routes=SECURED.routes[1:]), "the route to 10.244.3.0/24 of node node3 is over None"),
    (replace(SECURED, secured=WG[:1]), "the WireGuard device pwwg1 is missing"),
    (replace(SECURED, secured=(replace(WG[0], up=False), WG[1])), "the WireGuard device pwwg0 is down"),
    (replace(SECURED, secured=(replace(WG[0], made=None), WG[1])), "pwwg0 is there, but is no WireGuard"),
    (replace(SECURED, secured=(replace(WG[0], made=replace(WG[0].made, port=1)), WG[1])),
     "the WireGuard device pwwg0 has UDP port 1, not 51820"),
    (replace(SECURED, secured=(WG[0], replace(WG[1], made=replace(WG[1].made, peers={})))),
     "pwwg1 has no peer for 10.244.3.0/24, which is of node node3"),
])  # fmt: skip
def test_wireguards_devices_are_compared_too(seen: Observed, said: str) -> None:
    found = judge(SECURED_VIEW, seen).findings
    assert len(found) == bool(said)
    assert all(finding.sentence.startswith(said) for finding in found)
