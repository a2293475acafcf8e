"""Neighbours learn at once which MAC an address has now."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from netlink import netns
from netlink.announce import announce, checksum, frame
from netlink.rtnl import Rtnl
from tests.netlink.joined import End, join, wait_until

MOVED = {4: "10.0.0.9", 6: "fd00::9"}
OLD, NEW = "02:00:00:00:00:0a", "02:00:00:00:00:0b"


@pytest.fixture(scope="module")
def ends(namespaces: Callable[[], str]) -> tuple[End, End]:
    return join(namespaces, "near", "far")


def known(end: End, address: str) -> str | None:
    """Return the MAC that a namespace knows for an address."""

    def work() -> str | None:
        with Rtnl() as rtnl:
            return next((n.mac for n in rtnl.neighbours() if n.address == address), None)

    return netns.run(end.netns, work)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("state", ["stale", "reachable"])
def test_a_neighbour_with_an_old_entry_learns_the_new_mac_at_once(
    ends: tuple[End, End], version: int, state: str
) -> None:
    near, far = ends
    address = MOVED[version]
    entry = f"ip neigh replace {address} lladdr {OLD} dev far nud {state}"
    netns.run(far.netns, lambda: subprocess.run(entry.split(), check=True))
    assert known(far, address) == OLD
    netns.run(near.netns, announce, near.ifname, address, NEW)
    wait_until(lambda: known(far, address) == NEW, f"the entry of {address} changes")


@pytest.mark.parametrize("version", [4, 6])
def test_a_neighbour_that_does_not_know_the_address_keeps_no_entry(
    ends: tuple[End, End], version: int
) -> None:
    near, far = ends
    stranger, witness = (("10.0.0.20", "10.0.0.21"), ("fd00::20", "fd00::21"))[version == 6]
    entry = f"ip neigh replace {witness} lladdr {OLD} dev far nud stale"
    netns.run(far.netns, lambda: subprocess.run(entry.split(), check=True))
    for address in (stranger, witness):
        netns.run(near.netns, announce, near.ifname, address, NEW)
    wait_until(lambda: known(far, witness) == NEW, "the later announcement has arrived")
    assert known(far, stranger) is None


def test_an_arp_announcement_asks_everybody_for_its_own_address() -> None:
    assert frame("10.0.0.9", NEW).hex(" ") == (
        "ff ff ff ff ff ff 02 00 00 00 00 0b 08 06 "  # to everybody, from the new MAC, ARP
        "00 01 08 00 06 04 00 01 "  # Ethernet, IPv4, request
        "02 00 00 00 00 0b 0a 00 00 09 "  # sender
        "00 00 00 00 00 00 0a 00 00 09"  # target: the same address
    )


def test_a_neighbour_advertisement_overrides_and_has_the_right_checksum() -> None:
    sent = frame("fd00::9", NEW)
    assert sent[:14].hex() == "333300000001" + NEW.replace(":", "") + "86dd"
    version, length, following, hop_limit = struct.unpack_from(">IHBB", sent, 14)
    message = sent[54:]
    assert (version >> 28, length, following, hop_limit) == (6, len(message), socket.IPPROTO_ICMPV6, 255)
    addresses = sent[22:54]
    assert addresses == ip_address("fd00::9").packed + ip_address("ff02::1").packed
    assert (message[0], message[1], message[4]) == (136, 0, 0x20)
    assert message[8:24] == ip_address("fd00::9").packed
    assert message[24:] == bytes((2, 1)) + bytes.fromhex(NEW.replace(":", ""))
    assert checksum(addresses + struct.pack(">II", length, following) + message) == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0xFFFF), (b"\xff\xff", 0), (bytes.fromhex("0001f203f4f5f6f7"), 0x220D), (b"\x01", 0xFEFF)],
)
def test_the_checksum_is_that_of_rfc_1071(data: bytes, expected: int) -> None:
    assert checksum(data) == expected


def test_an_interface_that_is_missing_or_down_cannot_announce(namespaces: Callable[[], str]) -> None:
    def code(ifname: str) -> int | None:
        with pytest.raises(OSError) as failure:
            announce(ifname, "10.0.0.9", NEW)
        return failure.value.errno

    name = namespaces()
    assert netns.run(name, code, "absent") == errno.ENODEV
    assert netns.run(name, code, "lo") == errno.ENETDOWN
