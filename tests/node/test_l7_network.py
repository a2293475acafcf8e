"""What the L7 proxy needs of the node is there, is repaired, goes again; and transparent connections work."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import pytest
from netaddr import IPNetwork

from cni import wiring
from cni.settings import Mode
from cni.wiring import PodAddress, PodLink
from netlink import netns
from netlink.family import Family
from netlink.requests import Rule as PolicyRule
from netlink.requests import address_add, address_delete, link_up, rule_add
from netlink.rtnl import Rtnl
from node import l7_network
from node.network import LOOPBACK
from proxy.l7 import places
from proxy.l7.policy import Protocol
from tests.node.world import wait_until

ALL = tuple(Family)
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, in6.h
LEVELS = {
    Family.V4: (socket.IPPROTO_IP, IP_TRANSPARENT),
    Family.V6: (socket.IPPROTO_IPV6, IPV6_TRANSPARENT),
}
PODS = {
    "client": {Family.V4: "10.244.1.10", Family.V6: "fd00:10:244:1::10"},
    "endpoint": {Family.V4: "10.244.1.11", Family.V6: "fd00:10:244:1::11"},
}
PORT, SECONDS = 8080, 5.0


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def listed() -> str:
    """Everything that this is about, as `ip` and `nft` show it; `ip` fails for a table without routes."""
    commands = (
        "ip -br address show dev lo",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table local",
        "ip -6 route show table local",
        "ip -4 route show table 113",
        "ip -6 route show table 113",
        "nft list ruleset",
    )
    done = (subprocess.run(c.split(), check=False, capture_output=True, text=True) for c in commands)
    return "".join(found.stdout for found in done)


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    found = namespaces()
    netns.run(found, up)
    return found


def up() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(LOOPBACK))


def test_the_addresses_are_local_and_no_interface_has_them(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            before = {a.cidr for a in rtnl.addresses(LOOPBACK)}
            l7_network.ensure(ALL, transparent=False)
            assert {a.cidr for a in rtnl.addresses(LOOPBACK)} == before
        for family in Family:
            for protocol in Protocol:
                address = places.address(protocol, family, "shop/web")
                assert shell("ip", "route", "get", address).startswith("local")

    netns.run(node, inside)


@pytest.mark.parametrize("families", [(), (Family.V4,), (Family.V6,), ALL], ids=str)
@pytest.mark.parametrize("transparent", [False, True])
def test_what_is_wanted_is_there_and_nothing_else(
    node: str, families: Collection[Family], transparent: bool
) -> None:
    def inside() -> None:
        nothing = listed()
        l7_network.ensure(ALL, transparent=True)
        l7_network.ensure(families, transparent=transparent)
        for family in Family:
            there = list(l7_network.kept(family))
            assert len(there) == (0 if family not in families else 5 if transparent else 2), there
        l7_network.remove()
        assert listed() == nothing
        l7_network.remove()

    netns.run(node, inside)


@pytest.mark.parametrize(
    "taken",
    [
        f"ip route delete local {places.RANGES[Protocol.TCP][Family.V4]} dev lo table local",
        f"ip -6 route delete local {places.RANGES[Protocol.HTTP][Family.V6]} dev lo table local",
        "ip -6 rule delete pref 113",
        "ip -4 route flush table 113",
        "nft delete table ip6 podwire_l7",
        "nft flush chain ip podwire_l7 prerouting",
        "nft add rule ip podwire_l7 prerouting drop",
    ],
)
def test_what_somebody_took_is_made_again(node: str, taken: str) -> None:
    def inside() -> None:
        l7_network.ensure(ALL, transparent=True)
        before = sorted(listed().split())
        shell(*taken.split())
        assert sorted(listed().split()) != before
        l7_network.ensure(ALL, transparent=True)
        assert sorted(listed().split()) == before

    netns.run(node, inside)


def test_what_is_right_is_not_touched(node: str) -> None:
    """Somebody who watches sees nothing; what the table has counted stays."""

    def inside() -> None:
        l7_network.ensure(ALL, transparent=True)
        before = shell("nft", "-a", "list", "ruleset")
        with subprocess.Popen(
            ("ip", "monitor", "address", "route", "rule"), stdout=subprocess.PIPE, text=True
        ) as watch:
            try:
                assert watch.stdout
                with Rtnl() as rtnl:
                    # Seen once it watches, and again when all before has been seen.
                    wait_until(partial(_flagged, rtnl, watch), "a change is seen")
                    l7_network.ensure(ALL, transparent=True)
                    rtnl.commit(address_add(LOOPBACK, "192.0.2.9/32"))
                seen = iter(watch.stdout.readline, "")
                assert not [line for line in _until(seen, "192.0.2.9") if "113" in line or "169.254" in line]
            finally:
                watch.terminate()
        assert shell("nft", "-a", "list", "ruleset") == before

    netns.run(node, inside)


def _flagged(rtnl: Rtnl, watch: subprocess.Popen[str]) -> bool:
    rtnl.attempt(address_delete(LOOPBACK, "192.0.2.8/32"), address_add(LOOPBACK, "192.0.2.8/32"))
    assert watch.stdout
    return bool(select.select([watch.stdout], [], [], 0.05)[0])


def _until(lines: Iterable[str], word: str) -> list[str]:
    found: list[str] = []
    for line in lines:
        found.append(line)
        if word in line:
            break
    return found


def test_what_is_others_stays(node: str) -> None:
    def inside() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(
                address_add(LOOPBACK, "169.254.112.3/32"), rule_add(PolicyRule("10.0.0.0/8", 113, 113))
            )
        shell("ip", "rule", "add", "fwmark", "0x2000/0x2000", "lookup", "7", "pref", "113")
        shell("ip", "route", "add", "192.0.2.0/24", "dev", "lo", "table", "113")
        before = listed()
        l7_network.ensure(ALL, transparent=True)
        l7_network.remove()
        assert listed() == before

    netns.run(node, inside)


RANGES = {Family.V4: "10.244.1.0/24", Family.V6: "fd00:10:244:1::/64"}
"""What bridged pods have their addresses in; its first one is the bridge's."""


def pods(make: Callable[[], str], mode: Mode) -> tuple[str, dict[str, str]]:
    """A node that forwards, with two pods."""
    node = make()

    def configure() -> None:
        up()
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", name).write_text("1")
        for name in ("all", "default"):
            Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("1")
        if mode is Mode.BRIDGE:
            assert wiring.ensure_bridge(tuple(map(IPNetwork, RANGES.values()))) == []

    netns.run(node, configure)
    homes = {name: make() for name in PODS}
    for name, home in homes.items():
        ends = tuple(_end(f, a, mode) for f, a in PODS[name].items())
        link = PodLink(
            mode, "eth0", f"pwpod{name}", wiring.mac_of(f"h{name}"), wiring.mac_of(name), 1500, ends
        )
        netns.run(node, wiring.attach, link, str(netns.path(home)))
    return node, homes


def _end(family: Family, address: str, mode: Mode) -> PodAddress:
    if mode is Mode.ROUTED:
        return PodAddress(f"{address}/{family.bits}", address, family, family.gateway)
    network = IPNetwork(RANGES[family])
    return PodAddress(f"{address}/{network.prefixlen}", address, family, str(network[1]))


@pytest.fixture(scope="module", params=[Mode.ROUTED, Mode.BRIDGE], ids=lambda mode: mode.value)
def made(namespaces: Callable[[], str], request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    return pods(namespaces, request.param)


def connected(node: str, homes: dict[str, str], family: Family) -> str:
    """Connect from the node to the endpoint with the client's address; return the client that it saw."""
    client, endpoint = (PODS[name][family] for name in PODS)
    server = netns.run(homes["endpoint"], partial(socket.create_server, (endpoint, PORT), family=family.af))

    def connect() -> socket.socket:
        with contextlib.ExitStack() as undo:
            found = undo.enter_context(socket.socket(family.af))
            found.settimeout(SECONDS)
            found.setsockopt(*LEVELS[family], 1)
            found.bind((client, 0))
            found.connect((endpoint, PORT))
            undo.pop_all()
        return found

    with server:
        server.settimeout(SECONDS)
        with netns.run(node, connect) as proxy:
            there, peer = server.accept()
            with there:
                there.sendall(b"x" * 100_000)
                there.shutdown(socket.SHUT_WR)
                received = 0
                while chunk := proxy.recv(65536):
                    received += len(chunk)
        assert received == 100_000
    return str(peer[0])


@pytest.mark.parametrize("family", Family)
def test_an_endpoint_sees_the_clients_own_address(made: tuple[str, dict[str, str]], family: Family) -> None:
    """With strict reverse path filtering, and on a bridge, where pods reach each other without the node."""
    node, homes = made
    netns.run(node, l7_network.ensure, ALL, transparent=True)
    assert connected(node, homes, family) == PODS["client"][family]


@pytest.mark.parametrize("filtering", ["0", "1", "2"])
def test_an_obstacle_is_one(
    made: tuple[str, dict[str, str]], filtering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reverse path filtering without the mark is none, whatever its mode."""
    node, homes = made
    settings = Path("/proc/sys/net/ipv4/conf/all")

    def configure(mark: str) -> tuple[str, ...]:
        (settings / "src_valid_mark").write_text(mark)
        for path in settings.parent.glob("*/rp_filter"):
            path.write_text(filtering)
        return l7_network.obstacles(True)

    netns.run(node, l7_network.ensure, ALL, transparent=True)
    assert netns.run(node, configure, "0") == ()
    assert connected(node, homes, Family.V4) == PODS["client"][Family.V4]
    monkeypatch.setattr("tests.node.test_l7_network.SECONDS", 0.3)
    try:
        (said,) = netns.run(node, configure, "1")
        assert "net.ipv4.conf.all.src_valid_mark is 1" in said
        with pytest.raises(TimeoutError):
            connected(node, homes, Family.V4)
        assert netns.run(node, l7_network.obstacles, False) == ()
    finally:
        netns.run(node, configure, "0")
