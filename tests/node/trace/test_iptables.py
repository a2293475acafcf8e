"""iptables in a trace: what its programs print, both variants, beside nftables."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from node.trace import iptables
from node.trace.hooks import Place
from node.trace.packet import Branch, Kind, Packet, Verdict
from node.trace.path import Tracer
from node.trace.read import read
from node.trace.state import State
from tests.node.trace.states import NODE1, NODE2, ROUTER, V4, packet, world

SAVED = """
*filter
:FORWARD DROP [5:300]
:OWN - [0:0]
[7:420] -A FORWARD -d 10.244.1.3/32 -p tcp -m comment --comment "to \\"b\\"" -m tcp --dport 80 -j OWN
[0:0] -A FORWARD -m string --string x --algo bm -j ACCEPT
[6:1] -A OWN -m conntrack --ctstate NEW -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:A - [0:0]
:B - [0:0]
[1:60] -A PREROUTING -d 10.96.0.1/32 -m statistic --mode random --probability 0.33333333349 -j A
[1:60] -A PREROUTING -d 10.96.0.1/32 -j B
[1:60] -A A -p tcp -j DNAT --to-destination 10.244.1.3:80
[1:60] -A B -p tcp -j DNAT --to-destination 10.244.2.2:80
COMMIT
"""


def _branches(sent: Packet, saved: str = SAVED, variant: Variant = Variant.LEGACY) -> tuple[Branch, ...]:
    state = replace(NODE1, iptables=tuple(iptables.parse(saved, variant)))
    return Tracer(world(state, NODE2, ROUTER)).received("node1", sent)


def test_a_rule_is_told_with_its_comment_text_and_counter() -> None:
    (branch,) = _branches(packet())
    first, second = (s for s in branch.steps if s.kind is Kind.RULE)
    assert (first.chain, first.text, first.packets) == ("iptables-legacy filter FORWARD", 'to "b"', 7)
    assert second.rule == "-m conntrack --ctstate NEW -j ACCEPT"
    assert branch.end.verdict is Verdict.DELIVERED


def test_a_policy_drops_and_a_rule_of_unknown_form_is_passed_over() -> None:
    (branch,) = _branches(packet(destination="10.244.1.3", dport=81))
    assert branch.end.verdict is Verdict.DROPPED
    assert [s.text for s in branch.steps if s.kind is Kind.CHAIN][-1] == "policy drop"
    (passed_over,) = (s for s in branch.steps if s.kind is Kind.UNDECIDED)
    assert "--string x" in passed_over.rule
    assert branch.end.look == "iptables-legacy -t filter -S FORWARD"


def test_each_way_by_chance_has_its_probability() -> None:
    branches = _branches(packet(destination="10.96.0.1"))
    assert [(b.probability, b.end.packet.destination) for b in branches] == [
        (Fraction(1, 3), "10.244.1.3"),
        (Fraction(2, 3), "10.244.2.2"),
    ]


def test_the_nft_variant_has_the_names_of_nftables() -> None:
    (branch,) = _branches(packet(), variant=Variant.NFT)
    assert [s.chain for s in branch.steps if s.kind is Kind.RULE] == ["ip filter FORWARD", "ip filter OWN"]


@pytest.mark.parametrize("variant", Variant)
def test_the_tables_of_both_variants_are_read(namespaces: Callable[[], str], variant: Variant) -> None:
    rules = "-p tcp -m statistic --mode random --probability 0.5 -m tcp --dport 81 -j DROP"

    def work() -> State:
        for program in (f"iptables-{variant.value}", f"ip6tables-{variant.value}"):
            subprocess.run([program, "-A", "FORWARD", *rules.split()], check=True, capture_output=True)
        return read("node1", V4)

    state = netns.run(namespaces(), work)
    (table,) = state.iptables
    assert (table.variant, table.name) == (variant.value, "filter")
    assert not state.tables
    (rule,) = table.chains["FORWARD"]
    assert rule.handle > 0
    assert Place(state).others() == ("node1: " + _title(variant) + " filter: 1 rules of iptables",)


def _title(variant: Variant) -> str:
    return "iptables-legacy" if variant is Variant.LEGACY else "ip"


def test_tables_of_the_nft_variant_without_extensions_are_walked_as_nftables(
    namespaces: Callable[[], str],
) -> None:
    def work() -> State:
        words = "iptables-nft -A FORWARD -s 10.0.0.0/8 -j DROP"
        subprocess.run(words.split(), check=True, capture_output=True)
        return read("node1", V4)

    state = netns.run(namespaces(), work)
    assert not state.iptables
    assert [str(t) for t in state.tables] == ["ip filter"]


def test_without_the_programs_it_says_what_is_not_followed(
    namespaces: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> State:
        words = "iptables-legacy -A FORWARD -s 10.0.0.0/8 -j DROP"
        subprocess.run(words.split(), check=True, capture_output=True)
        monkeypatch.setattr("netlink.xtables.shutil.which", lambda *_, **__: None)
        return read("node1", V4)

    missing = netns.run(namespaces(), work).missing
    assert missing == ("iptables-legacy is not followed: the program iptables-legacy-save is not installed",)


def test_clients_that_are_remembered_are_read_by_list(tmp_path: Path) -> None:
    (tmp_path / "KUBE-SEP-X").write_text("src=10.0.0.1 ttl: 64 last_seen: 1 oldest_pkt: 1 1\n")
    assert iptables.remembered(tmp_path) == {"KUBE-SEP-X": ("10.0.0.1",)}
    assert iptables.remembered(tmp_path / "none") == {}


def test_the_state_of_iptables_can_be_written_too() -> None:
    state = State("n", Family.V4, iptables=tuple(iptables.parse(SAVED, Variant.NFT)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=State) == state
