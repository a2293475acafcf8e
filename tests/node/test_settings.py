"""The kernel's settings: set at the start, again when somebody has changed them, and no more than needed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cni import sysctls
from netlink import netns
from netlink.rtnl import Rtnl
from node import settings
from node.settings import NET, NO_LINK_LOCAL, Setting, Settings, neighbour_limits, wanted
from tests.node.advertising import advertise, cabled
from tests.node.world import wait_until

TUNNEL = "pwvxlan4"
OF_TUNNEL = {
    "ipv4/conf/pwvxlan4/rp_filter": "2",
    "ipv4/conf/pwvxlan4/forwarding": "1",
    "ipv6/conf/pwvxlan4/disable_ipv6": "0",
    "ipv6/conf/pwvxlan4/accept_ra": "0",
    "ipv6/conf/pwvxlan4/addr_gen_mode": NO_LINK_LOCAL,
}


def read(*paths: Path) -> list[str]:
    return [path.read_text().strip() for path in paths]


def shell(where: str, script: str) -> str:
    command = ["sh", "-ec", script]
    return netns.run(
        where, lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )


def again(made: Settings, *devices: str, **options: bool) -> list[str]:
    return made.assert_all(devices, **options)


def test_forwarding_is_set_for_both_families(namespaces: Callable[[], str]) -> None:
    def inside() -> tuple[list[str], list[str], list[str]]:
        return read(*settings.FORWARDING), Settings().assert_all(), read(*settings.FORWARDING)

    assert netns.run(namespaces(), inside) == (["0", "0"], [], ["1", "1"])


def test_pods_that_come_forward_where_somebody_has_turned_it_off_for_new_interfaces(
    namespaces: Callable[[], str],
) -> None:
    node = namespaces()
    shell(node, "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.default.forwarding=0")
    assert netns.run(node, Settings().assert_all) == []
    shell(node, "ip link add name pod type bridge")
    assert shell(node, "sysctl -n net.ipv4.conf.pod.forwarding") == "1\n"


def test_tcp_outside_the_window_is_let_pass_only_if_asked_for(namespaces: Callable[[], str]) -> None:
    """kubernetes#74839: random resets; what connection tracking cannot place is not translated."""

    def inside() -> list[str]:
        found = Settings().assert_all() + read(settings.TCP_BE_LIBERAL)
        return [*found, *Settings().assert_all(liberal=True), *read(settings.TCP_BE_LIBERAL)]

    assert netns.run(namespaces(), inside) == ["0", "1"]


def test_a_file_that_cannot_be_written_is_a_sentence_and_the_others_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = "/proc/sys/kernel/random/boot_id"  # for root too
    other = tmp_path / "other"
    other.write_text("0\n")
    found = (
        Setting(Path(read_only), "1", "this fails"),
        Setting(other, "1", "that fails"),
        Setting(tmp_path / "none", "1", "nothing fails"),
        Setting(tmp_path / "none", "1", "much fails", needed=True),
    )
    monkeypatch.setattr(settings, "wanted", lambda *_: found)
    monkeypatch.setattr(settings, "FORWARDING_V6", tmp_path / "absent")
    assert Settings().assert_all() == [
        f"{read_only} cannot be set to 1: Permission denied; this fails",
        f"{tmp_path / 'none'} cannot be set to 1: No such file or directory; much fails",
    ]
    assert read(other) == ["1"]


def test_what_somebody_changes_is_set_again_and_named(
    namespaces: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    node, made = namespaces(), Settings()
    netns.run(node, again, made)
    caplog.clear()
    netns.run(node, again, made)
    assert not caplog.records, "nothing is said while nothing is to be done"
    shell(node, "sysctl -qw net.ipv4.ip_forward=0")
    assert netns.run(node, again, made) == []
    first = "net.ipv4.ip_forward was 0, and is 1 again: somebody has changed it"
    assert caplog.messages[0] == first
    assert netns.run(node, read, *settings.FORWARDING) == ["1", "1"]


def test_what_is_the_nodes_is_noted_and_what_is_a_devices_is_not(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node = namespaces()
    shell(node, f"ip link add name {TUNNEL} type bridge; sysctl -qw net.ipv4.conf.{TUNNEL}.rp_filter=0")

    def inside() -> list[Path]:
        sysctls.keep_in(tmp_path)
        try:
            assert Settings().assert_all([TUNNEL], liberal=True) == []
        finally:
            sysctls.keep_in(None)
        return [*sysctls.noted(tmp_path)]

    assert netns.run(node, inside) == [*settings.FORWARDING, settings.TCP_BE_LIBERAL, settings.USE_PMTU]


@pytest.fixture
def tunnels(namespaces: Callable[[], str]) -> tuple[str, str]:
    """Two hardened nodes on one network, with a tunnel made by hand and a pod address each."""
    nodes = namespaces(), namespaces()
    strict = "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv6.conf.default.disable_ipv6=1"
    for node in nodes:
        shell(node, f"{strict}; ip link set lo up; echo 0 > {NET}/ipv6/conf/default/accept_dad")
    shell(nodes[0], f"ip link add eth0 type veth peer name eth0 netns {nodes[1]}")
    for me, peer in ((1, 2), (2, 1)):
        mac, far = (f"02:00:00:00:0a:0{number}" for number in (me, peer))
        shell(
            nodes[me - 1],
            f"""
            ip address add 192.168.50.1{me}/24 dev eth0; ip link set eth0 up
            ip link add {TUNNEL} address {mac} type vxlan id 112 dstport 8472 local 192.168.50.1{me}
            ip address add 10.244.{me}.0/32 dev {TUNNEL}
            ip address add 10.244.{me}.2/32 dev lo
            """,
        )
        netns.run(nodes[me - 1], again, Settings(), TUNNEL)
        shell(
            nodes[me - 1],
            f"""
            ip link set {TUNNEL} up
            bridge fdb append {far} dev {TUNNEL} dst 192.168.50.1{peer}
            ip neigh add 10.244.{peer}.0 lladdr {far} dev {TUNNEL} nud permanent
            ip neigh add fd00:{peer}:: lladdr {far} dev {TUNNEL} nud permanent
            ip address add fd00:{me}::/128 dev {TUNNEL} nodad
            ip route add 10.244.{peer}.0/24 via 10.244.{peer}.0 dev {TUNNEL} onlink src 10.244.{me}.0
            ip route add fd00:{peer}::/64 via fd00:{peer}:: dev {TUNNEL} onlink src fd00:{me}::
            """,
        )
    return nodes


def hears(sender: str, receiver: str, source: str, target: str) -> bool:
    """Whether a datagram arrives."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET

    def listen() -> socket.socket:
        there = socket.socket(family, socket.SOCK_DGRAM)
        there.bind((target, 0))
        there.settimeout(0.3)
        return there

    def send(port: int) -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as here:
            here.bind((source, 0))
            here.sendto(b"?", (target, port))

    with netns.run(receiver, listen) as there:
        netns.run(sender, send, there.getsockname()[1])
        try:
            return there.recv(10) == b"?"
        except TimeoutError:
            return False


def test_a_tunnel_takes_packets_that_go_back_another_way_whatever_all_says(tunnels: tuple[str, str]) -> None:
    """A far node's own address, or a pod of a node that is reached directly from here."""
    one, two = tunnels
    assert hears(one, two, "10.244.1.2", "10.244.2.2")
    assert hears(one, two, "192.168.50.11", "10.244.2.2")
    for value, passes in (("0", False), ("1", False), ("2", True)):
        shell(two, f"sysctl -qw net.ipv4.conf.{TUNNEL}.rp_filter={value}")
        assert hears(one, two, "192.168.50.11", "10.244.2.2") is passes, f"all 1, {TUNNEL} {value}"


def test_a_tunnel_has_ipv6_without_a_link_local_address(tunnels: tuple[str, str]) -> None:
    one, two = tunnels
    assert hears(one, two, "fd00:1::", "fd00:2::")
    assert "fe80" not in shell(one, f"ip -6 address show dev {TUNNEL}")
    values = {name: shell(one, f"cat {NET}/{name}").strip() for name in OF_TUNNEL}
    assert values == OF_TUNNEL


def test_a_tunnel_without_ipv6_pods_is_left_without_it(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    shell(node, f"sysctl -qw net.ipv6.conf.default.disable_ipv6=1; ip link add name {TUNNEL} type bridge")
    assert netns.run(node, partial(again, Settings(), TUNNEL, ipv6=False)) == []
    assert shell(node, f"sysctl -n net.ipv6.conf.{TUNNEL}.disable_ipv6") == "1\n"


def test_a_tunnel_that_is_gone_is_nothing_to_be_told(namespaces: Callable[[], str]) -> None:
    assert netns.run(namespaces(), Settings().assert_all, [TUNNEL], 5000) == []


@pytest.mark.parametrize(
    ("peers", "limits"),
    [
        (0, (128, 512, 1024)),
        (256, (128, 512, 1024)),
        (257, (256, 1024, 2048)),
        (1000, (512, 2048, 4096)),
        (5000, (2048, 8192, 16384)),
    ],
)
def test_there_is_room_for_the_neighbours_that_peers_are(peers: int, limits: tuple[int, int, int]) -> None:
    assert neighbour_limits(peers) == limits
    found = {s.path: s for s in wanted((), peers, False, True) if "gc_thresh" in s.path.name}
    assert len(found) == (6 if limits[0] > 128 else 0), "the kernel's own are not touched where they will do"
    assert all(s.met(str(int(s.value) * 2)) and not s.met(str(int(s.value) - 1)) for s in found.values())


def test_limits_are_raised_and_never_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "NET", tmp_path)
    monkeypatch.setattr(settings, "FORWARDING", ())
    monkeypatch.setattr(settings, "FORWARDING_V6", tmp_path / "absent")
    monkeypatch.setattr(settings, "FORWARDING_NEW", tmp_path / "absent")
    folder = tmp_path / "ipv4/neigh/default"
    folder.mkdir(parents=True)
    files = [folder / f"gc_thresh{number}" for number in (1, 2, 3)]
    for file, value in zip(files, ("128", "9999", "1024"), strict=True):
        file.write_text(f"{value}\n")
    wanted.cache_clear()
    assert Settings().assert_all(peers=1000) == []
    assert read(*files) == ["512", "9999", "4096"]
    assert Settings().assert_all(peers=3) == []
    assert read(*files) == ["512", "9999", "4096"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    wanted.cache_clear()


def test_asking_again_takes_well_under_a_millisecond(tunnels: tuple[str, str]) -> None:
    made = Settings()

    def inside() -> float:
        made.assert_all([TUNNEL], 5000, liberal=True)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            assert made.assert_all([TUNNEL], 5000, liberal=True) == []
            times.append(time.perf_counter() - start)
        return min(times)

    assert netns.run(tunnels[0], inside) < 0.001


@pytest.fixture
def advertised(namespaces: Callable[[], str]) -> tuple[str, str]:
    return cabled(namespaces)


def accept_ra(node: str) -> list[str]:
    return netns.run(node, read, *(settings.CONF_V6 / name / "accept_ra" for name in ("eth0", "eth1")))


def has_default(node: str) -> bool:
    def inside() -> bool:
        with Rtnl() as rtnl:
            return any(r.destination == "::/0" and r.gateway for r in rtnl.routes())

    return netns.run(node, inside)


def test_a_default_route_from_a_router_advertisement_stays_when_forwarding_begins_and_is_kept_up(
    advertised: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    node, router = advertised
    advertise(router, 1800)
    wait_until(lambda: has_default(node), "the default route")
    made = Settings()
    with caplog.at_level("INFO", "podwire.settings"):
        assert netns.run(node, again, made) == []
    assert "net.ipv6.conf.eth0.accept_ra set to 2, it was 1" in caplog.messages
    assert accept_ra(node) == ["2", "1"], "only where such a route is: nobody else may steer the node"
    assert has_default(node), "the kernel drops it unless told otherwise"
    advertise(router, 0)
    wait_until(lambda: not has_default(node), "the router to be none any more")
    advertise(router, 1800)
    wait_until(lambda: has_default(node), "the router to be back")
    for theirs, then in (("1", "2"), ("0", "0")):  # 0: somebody handles advertisements itself now
        shell(node, f"sysctl -qw net.ipv6.conf.eth0.accept_ra={theirs}")
        assert netns.run(node, again, made) == []
        assert accept_ra(node) == [then, "1"]


def test_a_node_that_takes_no_router_advertisements_does_not_begin_to(advertised: tuple[str, str]) -> None:
    node, _ = advertised
    assert netns.run(node, Settings().assert_all) == []
    assert accept_ra(node) == ["1", "1"]


def test_the_machines_own_limits_are_not_seen_in_a_namespace(namespaces: Callable[[], str]) -> None:
    """They are the kernel's, for all namespaces: tests must not raise them."""
    assert not netns.run(namespaces(), os.path.exists, NET / "ipv4/neigh/default/gc_thresh3")
