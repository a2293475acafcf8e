"""`podwire wireguard` prints what the daemon tells of it; the daemon itself is in tests/node."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from api import podwire_pb2 as pb
from tests.node.world import podwire

PEER = pb.WireguardPeer(
    node="node2",
    device="pwwg0",
    key="KEY",
    endpoint="192.0.2.2:51820",
    received=1_234_567,
    sent=999,
    route=True,
)


class Daemon:
    """What a daemon answers."""

    def __init__(self, reply: pb.WireguardReply, refused: str = "") -> None:
        self.reply, self.refused = reply, refused

    def Wireguard(self, request: Any, timeout: float) -> pb.WireguardReply:
        return self.reply

    def RotateWireguard(self, request: Any, timeout: float) -> pb.RotateWireguardReply:
        return pb.RotateWireguardReply(refused=self.refused)


def ask(monkeypatch: pytest.MonkeyPatch, daemon: Daemon, *words: str) -> tuple[int, str, str]:
    @contextlib.contextmanager
    def connected(socket: str) -> Iterator[Daemon]:
        yield daemon

    monkeypatch.setattr("cli.wireguard.connected", connected)
    return podwire("wireguard", *words)


def test_peers_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    PEER.handshake = time.time() - 5
    reply = pb.WireguardReply(used=True, step="detour", peers=[PEER], problems=["WireGuard: a sentence"])
    status, out, err = ask(monkeypatch, Daemon(reply))
    assert (status, err) == (0, "")
    head, row, *rest = out.splitlines()
    assert head.split() == ["NODE", "DEVICE", "ENDPOINT", "LAST", "HANDSHAKE", "RECEIVED", "SENT", "ROUTE"]
    assert row.split() == [
        "node2",
        "pwwg0",
        "192.0.2.2:51820",
        "5",
        "s",
        "ago",
        "1.2",
        "MB",
        "999",
        "B",
        "yes",
    ]
    assert rest == ["the keys of this node are being changed: detour", "problem: WireGuard: a sentence"]


def test_programs_get_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = pb.WireguardReply(used=True, keys=["KEY0", "KEY1"], step="idle", peers=[PEER])
    status, out, _ = ask(monkeypatch, Daemon(reply), "-o", "json")
    found = json.loads(out)
    assert (status, found["keys"], found["peers"][0]["key"]) == (0, ["KEY0", "KEY1"], "KEY")


def test_another_backend_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = ask(monkeypatch, Daemon(pb.WireguardReply()))
    assert (status, err) == (1, "podwire: this node's backend is not wireguard (network.backend)\n")


def test_a_change_of_keys_begins_or_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = ask(monkeypatch, Daemon(pb.WireguardReply()), "rotate")
    assert (status, "are being changed" in out) == (0, True)
    status, _, err = ask(monkeypatch, Daemon(pb.WireguardReply(), "not now"), "rotate")
    assert (status, err) == (1, "podwire: not now\n")
