"""WireGuard devices: what is set is read back, and a kernel without them says so in a sentence."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from netlink import netns, wireguard
from netlink.errors import NetlinkError
from netlink.messages import pack
from netlink.requests import link_up, wireguard_add
from netlink.rtnl import Rtnl
from netlink.wireguard import Change, Device, Peer, WireGuard, new_private_key
from tests.netlink.kernel_with import needs_wireguard

NAME = "wg0"


def key(number: int) -> str:
    return wireguard._text(bytes([number]) * 31 + b"\1")


PEER = Peer(key(1), ("192.0.2.1", 51820), frozenset({"10.244.2.0/24", "fd00:2::/64"}))
PEER6 = Peer(key(2), ("2001:db8::2", 51821), frozenset({"10.244.3.0/24", "2001:db8::2/128"}), 25)


def added(peer: Peer) -> Change:
    return Change(peer.key, peer.endpoint, peer.allowed, peer.keepalive)


def test_a_private_key_is_random_and_has_the_bits_that_curve25519_wants() -> None:
    keys = {new_private_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(k) == 32 and not k[0] & 7 and k[31] & 192 == 64 for k in keys)


def test_pyroute2_reads_our_messages_as_we_mean_them() -> None:
    from pyroute2.netlink.generic.wireguard import wgmsg

    import netlink.pyroute2_parts  # noqa: F401  the package without all that it imports

    body = bytes((wireguard.WG_CMD_SET_DEVICE, WireGuard.VERSION, 0, 0))
    body += wireguard.text(wireguard.WGDEVICE_A_IFNAME, NAME)
    peers = b"".join(wireguard._peer(added(p)) for p in (PEER, PEER6))
    body += wireguard.nested(wireguard.WGDEVICE_A_PEERS, peers)
    message = wgmsg(pack(30, 0, 1, body))
    message.decode()
    assert message.get_attr("WGDEVICE_A_IFNAME") == NAME
    for told, peer in zip(message.get_attr("WGDEVICE_A_PEERS"), (PEER, PEER6), strict=True):
        assert told.get_attr("WGPEER_A_PUBLIC_KEY").decode() == peer.key
        where = told.get_attr("WGPEER_A_ENDPOINT")
        assert (where["addr"], where["port"]) == peer.endpoint
        assert told.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") == peer.keepalive
        assert told.get_attr("WGPEER_A_FLAGS") == wireguard.WGPEER_F_REPLACE_ALLOWEDIPS
        assert {a["addr"] for a in told.get_attr("WGPEER_A_ALLOWEDIPS")} == peer.allowed


def test_many_peers_go_in_messages_of_limited_size() -> None:
    parts = list(wireguard._gathered([bytes(300)] * 5000))
    assert sum(map(len, parts)) == 1_500_000
    assert max(map(len, parts)) <= wireguard.MESSAGE_BYTES
    assert list(wireguard._gathered([])) == []


def test_a_peer_that_is_told_in_two_messages_is_one() -> None:
    def told(peer: Peer) -> bytes:
        body = bytes((wireguard.WG_CMD_GET_DEVICE, WireGuard.VERSION, 0, 0))
        return pack(
            30, 0, 1, body + wireguard.nested(wireguard.WGDEVICE_A_PEERS, wireguard._peer(added(peer)))
        )

    rest = PEER._replace(endpoint=None, allowed=frozenset({"192.0.2.1/32"}))
    found = wireguard._device(NAME, [told(PEER), told(rest)])
    assert found.peers[PEER.key].peer == PEER._replace(allowed=PEER.allowed | rest.allowed)


def test_what_is_set_is_read_back(namespaces: Callable[[], str]) -> None:
    needs_wireguard()

    def work() -> None:
        private = new_private_key()
        with Rtnl() as rtnl, WireGuard() as wg:
            rtnl.commit(wireguard_add(NAME, 1420))
            link = rtnl.link(NAME)
            assert link and (link.kind, link.mtu, link.up) == ("wireguard", 1420, False)
            assert wg.device(NAME) == Device(link.index, NAME)
            wg.configure(NAME, private_key=private, port=51820)
            rtnl.commit(link_up(link.index))
            assert wg.change(NAME, [added(PEER), added(PEER6)]) == 1
            found = wg.device(NAME)
            assert (found.port, len(found.key)) == (51820, 44)
            assert {k: known.peer for k, known in found.peers.items()} == {PEER.key: PEER, PEER6.key: PEER6}
            # A range that another peer gets is taken from the one that had it; what is not said stays.
            wg.change(NAME, [Change(PEER6.key, allowed=PEER.allowed, keepalive=0)])
            found = wg.device(NAME)
            assert found.peers[PEER.key].peer == PEER._replace(allowed=frozenset())
            assert found.peers[PEER6.key].peer == PEER6._replace(allowed=PEER.allowed, keepalive=0)
            wg.change(NAME, [Change(PEER.key, remove=True), Change(key(7), remove=True)])
            assert wg.device(NAME).peers.keys() == {PEER6.key}
            before = wg.device(NAME).key
            wg.configure(NAME, private_key=private)
            assert wg.device(NAME).key == before
            wg.configure(NAME, private_key=new_private_key())
            assert wg.device(NAME).key not in ("", before)

    netns.run(namespaces(), work)


def test_a_thousand_peers_come_back_as_they_were_set(namespaces: Callable[[], str]) -> None:
    needs_wireguard()
    peers = [
        Peer(
            wireguard._text(number.to_bytes(2, "big") * 16),
            (f"192.0.2.{number % 256}", 51820),
            frozenset({f"10.{number // 256}.{number % 256}.0/24", f"fd00:{number:x}::/64"}),
        )
        for number in range(1, 1001)
    ]

    def work() -> None:
        with Rtnl() as rtnl, WireGuard() as wg:
            rtnl.commit(wireguard_add(NAME, 1420))
            assert wg.change(NAME, map(added, peers)) > 1
            found = wg.device(NAME)
            assert {k: known.peer for k, known in found.peers.items()} == {p.key: p for p in peers}

    netns.run(namespaces(), work)


def test_a_device_that_is_not_there_is_gone(namespaces: Callable[[], str]) -> None:
    needs_wireguard()

    def work() -> None:
        with WireGuard() as wg, pytest.raises(NetlinkError) as caught:
            wg.device(NAME)
        assert caught.value.gone

    netns.run(namespaces(), work)


def test_a_kernel_without_wireguard_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WireGuard, "NAME", "no-such-family")
    with pytest.raises(NetlinkError, match="cannot find WireGuard in the kernel: No such file") as caught:
        WireGuard().__enter__()
    assert caught.value.errno == errno.ENOENT
