"""What is said of paths that lose large packets, and which paths there are."""

from __future__ import annotations

from netlink.decode import Link
from netlink.requests import Route
from node.doctor.mtu import Measured, Path, judge, paths, pods
from node.doctor.view import PeerRoute

DIRECT = PeerRoute("10.244.2.0/24", "node2", "192.0.2.2", "direct", "eth0", 0, "192.0.2.2")
FAR = PeerRoute("10.244.3.0/24", "node3", "10.244.3.0", "vxlan", "pwvxlan4", 1450, "198.51.100.3")
FAR6 = PeerRoute("fd00::/64", "node3", "fd00::", "vxlan", "pwvxlan6", 1430, "2001:db8::3")


def test_each_range_is_probed_and_of_a_tunnel_the_packets_around_it() -> None:
    assert paths((DIRECT, FAR, FAR6), {"10.244.2.0": 9000}) == (
        Path("node2", "10.244.2.0", 9000),
        Path("node3", "10.244.3.0", 1450, overhead=50),
        Path("node3", "198.51.100.3", 1500, outer=True),
        Path("node3", "fd00::", 1430, overhead=70),
        Path("node3", "2001:db8::3", 1500, outer=True),
    )
    assert paths((DIRECT,), {}) == ()  # nobody promises anything


def test_the_packets_around_a_tunnel_say_it_all() -> None:
    inner, outer = paths((FAR,), {})
    found = judge([Measured(outer, 1400, here=True), Measured(inner, 1350)], [inner])
    assert [f.sentence for f in found] == [
        "VXLAN's packets of 1500 bytes to node node3 (198.51.100.3) are lost; up to 1400 pass; "
        "the interface that they leave by carries no larger ones"
    ]


def test_the_remedy_counts_what_is_added() -> None:
    inner, _ = paths((FAR,), {})
    [finding] = judge([Measured(inner, 1350)])
    assert finding.sentence.endswith("up to 1350 pass; no router says where")
    assert finding.remedy.startswith("set network.mtu to 1400 ")


def test_nothing_large_passes_at_all() -> None:
    [finding] = judge([Measured(Path("node2", "10.244.2.0", 1500))])
    assert "pass;" not in finding.sentence
    assert finding.remedy.startswith("network.mtu is what passes: ping -M do")


def test_paths_that_were_not_searched_are_named() -> None:
    more = [Path(f"node{n}", f"10.244.{n}.0", 1500) for n in range(20)]
    [finding] = judge([], more)
    assert "node9 and 10 more are lost as well" in finding.sentence


def test_pods_that_send_more_than_the_way_out_carries_are_told() -> None:
    links = (
        Link(2, "eth0", "", 1400, True, "", None, None),
        Link(3, "pwpod0123456789", "", 1500, True, "veth", None, 2),
    )
    routes = (Route("0.0.0.0/0", gateway="192.0.2.1", oif=2),)
    [finding] = pods(links, routes, "pwpod")
    assert (
        finding.sentence == "pods send packets of up to 1500 bytes, but eth0, which leads out, carries 1400"
    )
    assert pods(links, (), "pwpod") == ()
    assert pods(links[:1], routes, "pwpod") == ()
