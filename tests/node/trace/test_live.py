"""A real packet beside its trace: what the kernel's trace events say, and whether that agrees."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from netlink import netns
from netlink.attributes import attribute, nested, text
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import address_add, link_up
from netlink.rtnl import Rtnl
from node.trace import live
from node.trace.ask import Known
from node.trace.live import Event, Marker
from node.trace.packet import Branch, End, Kind, Packet, Step, Trace, Verdict
from node.trace.path import Tracer, World
from node.trace.read import read

V4 = Family.V4
ADDRESS = "192.0.2.1"
RULES = """
table ip others {
  chain out {
    type filter hook output priority 0
    tcp dport 81 drop
    tcp dport 82 reject with tcp reset
    ip daddr 192.0.2.1 counter
  }
}
"""


@pytest.fixture(scope="module")
def node(namespaces: Callable[[], str]) -> str:
    name = namespaces()

    def configure() -> None:
        index = socket.if_nametoindex("lo")
        with Rtnl() as rtnl:
            rtnl.commit(link_up(index), address_add(index, f"{ADDRESS}/32"))
        subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)

    netns.run(name, configure)
    return name


def _trace(node: str, port: int) -> Trace:
    state = netns.run(node, read, "node", V4)
    packet = Packet(V4, 6, "", ADDRESS, port)
    branches = Tracer(World(lambda name, family: state)).sent("node", packet)
    return Trace(packet, "node", f"{ADDRESS}:{port}", branches)


@pytest.mark.parametrize(
    ("port", "answer", "verdict"),
    [(80, "connected", "delivered"), (81, "no answer", "dropped"), (82, "refused", "rejected")],
)
def test_a_real_packet_meets_the_rules_that_were_traced(
    node: str, monkeypatch: pytest.MonkeyPatch, port: int, answer: str, verdict: str
) -> None:
    monkeypatch.setattr(live, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(live, "EVENT_SECONDS", 0.1)
    server = netns.run(node, socket.create_server, (ADDRESS, 80))
    with server:
        found = live.confirm(_trace(node, port), Known("node"), {"node": node})
    assert (found.answer, found.agrees) == (answer, True), found
    assert found.why.endswith(f"traced as {verdict}")
    assert any(e.chain == "ip others out" and e.handle for e in found.events)


def test_a_trace_that_is_wrong_is_found_out(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(live, "EVENT_SECONDS", 0.1)
    trace = _trace(node, 81)
    wrong = replace(trace, packet=replace(trace.packet, dport=82))
    found = live.confirm(wrong, Known("node"), {"node": node})
    assert (found.agrees, found.why) == (False, "on node other rules matched than on any way traced")


def test_rules_of_iptables_in_nftables_are_recognised(
    namespaces: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their events name handles of nftables; a rule of chance matches on one way and not on the other."""
    monkeypatch.setattr(live, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(live, "EVENT_SECONDS", 0.1)
    name = namespaces()

    def configure() -> None:
        index = socket.if_nametoindex("lo")
        with Rtnl() as rtnl:
            rtnl.commit(link_up(index), address_add(index, f"{ADDRESS}/32"))
        chance = "-m statistic --mode random --probability 0.5 -j RETURN"
        for rule in (chance, "-p tcp -m tcp --dport 81 -j DROP", "-m comment --comment all -j ACCEPT"):
            subprocess.run(["iptables-nft", "-A", "OUTPUT", *rule.split()], check=True)

    netns.run(name, configure)
    trace = _trace(name, 80)
    assert sorted(b.probability for b in trace.branches) == [Fraction(1, 2), Fraction(1, 2)]
    found = live.confirm(trace, Known("node"), {"node": name})
    assert (found.answer, found.agrees) == ("refused", True), found


def _tables() -> str:
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout


def test_the_table_that_marks_goes_with_its_socket_and_two_cannot_be(node: str) -> None:
    def work() -> None:
        packet = Packet(V4, 17, "", ADDRESS, 53)
        with Marker() as marker:
            marker.mark(packet)
            assert live.NAME in _tables()
            subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True)
            with Marker() as other, pytest.raises(NetlinkError) as refused:
                other.mark(packet)
            assert refused.value.errno in live.TAKEN
        assert live.NAME not in _tables()

    netns.run(node, work)


def test_it_goes_too_when_the_probe_fails(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(live, "_first", fail)
    with pytest.raises(RuntimeError):
        live.confirm(_trace(node, 80), Known("node"), {"node": node})
    assert live.NAME not in netns.run(node, _tables)


def test_what_cannot_be_sent_is_a_sentence(node: str) -> None:
    trace = _trace(node, 80)
    with pytest.raises(live.LiveError, match="sends TCP and UDP only"):
        live.confirm(replace(trace, packet=replace(trace.packet, protocol=132)), Known("node"), {})
    (branch,) = trace.branches
    arrives = replace(branch, steps=branch.steps[1:])
    outside = replace(trace, branches=(arrives,), packet=replace(trace.packet, source="198.51.100.1"))
    with pytest.raises(live.LiveError, match=r"cannot send from 198\.51\.100\.1"):
        live.confirm(outside, Known("node"), {"node": node})


def _event(kind: int, *more: bytes) -> tuple[int, Event] | None:
    body = text(1, "t") + text(2, "c") + attribute(4, struct.pack(">I", kind))
    body += attribute(6, struct.pack(">I", 5)) + b"".join(more)
    return live.event(bytes(16) + bytes([2, 0, 0, 0]) + body)


def test_events_are_rules_and_policies() -> None:
    goto = nested(5, attribute(1, struct.pack(">i", -4)), text(2, "next"))
    assert _event(live.TYPE_RULE, attribute(3, struct.pack(">Q", 7)), goto) == (
        5,
        Event("ip t c", 7, "goto next"),
    )
    assert _event(live.TYPE_POLICY, attribute(16, bytes(4))) == (5, Event("ip t c", 0, "policy drop"))
    assert _event(live.TYPE_RETURN) is None
    assert _event(live.TYPE_RULE) is None


def _branch(verdict: Verdict, *handles: int, kind: Kind = Kind.RULE) -> Branch:
    steps = tuple(Step(kind, "node", "output", "", "ip t c", handle=h) for h in handles)
    return Branch(Fraction(1), steps, (), End(verdict, "node", "", Packet(V4, 6, "", ADDRESS, 80)))


@pytest.mark.parametrize(
    ("verdict", "answer", "agrees"),
    [
        (Verdict.DELIVERED, "connected", True),
        (Verdict.DELIVERED, "refused", True),  # nobody listens
        (Verdict.DROPPED, "no answer", True),
        (Verdict.DROPPED, "connected", False),
        (Verdict.REJECTED, "refused", True),
        (Verdict.REJECTED, "failed: Permission denied", True),
        (Verdict.REJECTED, "connected", False),
        (Verdict.UNROUTABLE, "failed: No route to host", True),
    ],
)
def test_the_answer_must_fit_the_verdict(verdict: Verdict, answer: str, agrees: bool) -> None:
    assert live.judge([_branch(verdict, 1)], "node", answer, [Event("ip t c", 1, "")]).agrees is agrees


def test_rules_that_were_undecided_may_match_or_not() -> None:
    one = _branch(Verdict.DELIVERED, 1)
    undecided = replace(one, steps=(*one.steps, *_branch(Verdict.DELIVERED, 2, kind=Kind.UNDECIDED).steps))
    for events in ((1,), (1, 2)):
        told = [Event("ip t c", h, "") for h in events]
        assert live.judge([undecided], "node", "connected", told).agrees
    assert not live.judge([one], "node", "connected", [Event("ip t c", h, "") for h in (1, 2)]).agrees
    assert not live.judge([one], "node", "connected", []).agrees
