"""VXLAN devices with their forwarding entries, neighbours and routes: read back, and packets pass."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from netlink import netns
from netlink.errors import NetlinkError
from netlink.requests import (
    NUD_PERMANENT,
    Request,
    Route,
    Veth,
    Vxlan,
    address_add,
    fdb_delete,
    fdb_replace,
    link_set,
    link_up,
    neighbour_delete,
    neighbour_replace,
    route_replace,
    veth_add,
    vxlan_add,
)
from netlink.rtnl import Rtnl

MACS = "02:00:00:00:01:01", "02:00:00:00:01:02"
UNDERLAY = {4: ("192.0.2.1", "192.0.2.2"), 6: ("fd00:2::1", "fd00:2::2")}
RANGES = {4: ("10.244.1.0", "10.244.2.0"), 6: ("fd00:244:1::", "fd00:244:2::")}
LENGTHS = {4: ("/24", "/32"), 6: ("/64", "/128")}
SUBNET = {4: "/24", 6: "/64"}
OVERHEAD = {4: 50, 6: 70}


def device(version: int, side: int = 0) -> Vxlan:
    """Return the tunnel of one side over an IP version."""
    return Vxlan(
        f"pwvxlan{version}", 112, 8472, UNDERLAY[version][side], MACS[side], 1500 - OVERHEAD[version]
    )


def index_of(rtnl: Rtnl, name: str) -> int:
    found = rtnl.link(name)
    assert found
    return found.index


def told(*command: str) -> str:
    """Return what a program says of the namespace that the thread is in."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inside(name: str, work: Callable[[Rtnl], None]) -> None:
    def with_socket() -> None:
        with Rtnl() as rtnl:
            work(rtnl)

    netns.run(name, with_socket)


@pytest.mark.parametrize("version", [4, 6])
def test_a_device_is_read_back_as_it_was_made(version: int, namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(version)))
        found = rtnl.link(f"pwvxlan{version}")
        assert found
        assert found.vxlan == device(version)
        assert (found.up, found.kind, found.mtu, found.mac) == (True, "vxlan", device(version).mtu, MACS[0])
        shown = told("ip", "-d", "link", "show", "dev", found.name)
        options = f"vxlan id 112 local {UNDERLAY[version][0]} srcport 0 0 dstport 8472 nolearning ttl 64"
        assert options in shown
        assert "df set" in shown
        assert " udpcsum noudp6zerocsumtx noudp6zerocsumrx" in shown
        with pytest.raises(NetlinkError, match=r"^cannot add the VXLAN device pwvxlan. ?: File exists$") as e:
            rtnl.commit(vxlan_add(device(version)))
        assert e.value.exists

    inside(namespaces(), work)


def test_both_devices_have_the_same_port_and_number(namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(4)), vxlan_add(device(6)))
        assert [k.vxlan for k in rtnl.links() if k.vxlan] == [device(4), device(6)]
        assert all(link.vxlan is None for link in rtnl.links() if link.kind != "vxlan")

    inside(namespaces(), work)


HAND_MADE = "id 112 local 192.0.2.1 dstport 8472 nolearning ttl 64 df set"


@pytest.mark.parametrize(
    "options",
    [
        HAND_MADE.replace("nolearning", "learning"),
        HAND_MADE.replace("ttl 64", "ttl 5"),
        HAND_MADE.replace("df set", "df unset"),
        HAND_MADE.replace("8472", "4789"),
        f"{HAND_MADE} remote 192.0.2.9",
        f"{HAND_MADE} gbp",
        f"{HAND_MADE} proxy",
        f"{HAND_MADE} tos 4",
        "dstport 8472 external",
    ],
)
def test_a_device_with_another_option_is_not_equal(options: str, namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        fixed = f"ip link add pwvxlan4 mtu 1450 address {MACS[0]} type vxlan"
        told(*fixed.split(), *options.split())
        found = rtnl.link("pwvxlan4")
        assert found
        assert found.vxlan != device(4)
        told("ip", "link", "del", "pwvxlan4")
        told(*fixed.split(), *HAND_MADE.split())
        found = rtnl.link("pwvxlan4")
        assert found
        assert found.vxlan == device(4)

    inside(namespaces(), work)


def test_mac_and_mtu_of_a_device_can_be_changed(namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(4)))
        rtnl.commit(link_set(index_of(rtnl, "pwvxlan4"), mac=MACS[1], mtu=1350))
        found = rtnl.link("pwvxlan4")
        assert found
        assert found.vxlan
        assert (found.mac, found.mtu) == (found.vxlan.mac, found.vxlan.mtu) == (MACS[1], 1350)

    inside(namespaces(), work)


@pytest.mark.parametrize(
    ("version", "remotes"), [(4, ("192.0.2.7", "192.0.2.8")), (6, ("fd00::7", "fd00::8"))]
)
def test_a_mac_leads_to_one_address_at_a_time(
    version: int, remotes: tuple[str, str], namespaces: Callable[[], str]
) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(4)), vxlan_add(device(6)))
        index = index_of(rtnl, f"pwvxlan{version}")
        for remote in remotes:
            rtnl.commit(fdb_replace(index, MACS[1], remote))
            assert [(f.mac, f.address) for f in rtnl.forwarding(index)] == [(MACS[1], remote)]
        shown = told("bridge", "fdb", "show", "dev", f"pwvxlan{version}")
        assert f"{MACS[1]} dst {remotes[1]} self permanent" in shown
        assert rtnl.forwarding(index_of(rtnl, f"pwvxlan{10 - version}")) == ()
        rtnl.commit(fdb_delete(index, MACS[1], remotes[1]))
        assert rtnl.forwarding(index) == ()
        with pytest.raises(NetlinkError, match="stop sending frames") as failure:
            rtnl.commit(fdb_delete(index, MACS[1], remotes[1]))
        assert failure.value.gone

    inside(namespaces(), work)


def test_a_remote_of_the_other_family_is_refused(namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(4)))
        with pytest.raises(
            NetlinkError, match=r"send frames for .* to fd00::7: Address family not supported"
        ):
            rtnl.commit(fdb_replace(index_of(rtnl, "pwvxlan4"), MACS[1], "fd00::7"))

    inside(namespaces(), work)


def test_neighbours_are_those_of_the_device_until_they_are_removed(namespaces: Callable[[], str]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(vxlan_add(device(4)), vxlan_add(device(6)))
        first, second = (index_of(rtnl, f"pwvxlan{version}") for version in (4, 6))
        addresses = [RANGES[4][1], RANGES[6][1]]
        rtnl.commit(*(neighbour_replace(i, a, MACS[1]) for i in (first, second) for a in addresses))
        for index in (first, second):
            found = [n for n in rtnl.neighbours(index) if n.state == NUD_PERMANENT]
            assert sorted(n.address for n in found) == addresses
            assert {(n.index, n.mac) for n in found} == {(index, MACS[1])}
        rtnl.commit(*(neighbour_delete(first, address) for address in addresses))
        assert not [n for n in rtnl.neighbours(first) if n.state == NUD_PERMANENT]
        assert len([n for n in rtnl.neighbours() if n.state == NUD_PERMANENT]) == 2

    inside(namespaces(), work)


@pytest.mark.parametrize("underlay", [4, 6])
def test_packets_of_both_families_pass_through_a_tunnel_over_either(
    underlay: int, namespaces: Callable[[], str]
) -> None:
    names = namespaces(), namespaces()
    with netns.opened(names[1]) as fd:
        inside(names[0], lambda rtnl: rtnl.commit(veth_add(Veth("eth0", "eth0", peer_netns=fd))))
    for side, name in enumerate(names):
        inside(name, lambda rtnl, side=side: connect(rtnl, underlay, side))  # type: ignore[misc]
    for inner, ranges in RANGES.items():
        size = str(1500 - OVERHEAD[underlay] - (28 if inner == 4 else 48))
        ping = ("ping", "-c", "1", "-W", "5", "-M", "do", "-s", size, "-I", ranges[0], ranges[1])
        assert "1 received" in netns.run(names[0], told, *ping)


def connect(rtnl: Rtnl, underlay: int, side: int) -> None:
    """Set what a node needs to send to the other side's ranges, and to be pinged at its own."""
    far = 1 - side
    rtnl.commit(link_up(1), link_up(index_of(rtnl, "eth0")))
    own = UNDERLAY[underlay][side] + SUBNET[underlay]
    rtnl.commit(address_add(index_of(rtnl, "eth0"), own), vxlan_add(device(underlay, side)))
    index = index_of(rtnl, f"pwvxlan{underlay}")
    rtnl.commit(fdb_replace(index, MACS[far], UNDERLAY[underlay][far]))
    wanted: list[Request] = []
    for version, ranges in RANGES.items():
        length, host = LENGTHS[version]
        route = Route(
            ranges[far] + length,
            ranges[far],
            index,
            onlink=True,
            mtu=device(underlay).mtu,
            source=ranges[side],
        )
        wanted += [
            address_add(index, ranges[side] + host),
            neighbour_replace(index, ranges[far], MACS[far]),
            route_replace(route),
        ]
    rtnl.commit(*wanted)
