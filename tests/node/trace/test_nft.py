"""Rules as the kernel has them: read, said in words, walked."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from netlink import netns
from netlink.family import Family
from node.trace import nft_words
from node.trace.nft import Set, Table
from node.trace.nft_walk import NftRules
from node.trace.packet import Packet
from node.trace.read import read
from node.trace.rules import Passed, Ruling
from node.trace.state import State
from tests.node.trace.states import V4

RULESET = """
table inet others {
  set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.0-192.0.2.9 }; }
  set pairs { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90 }; }
  map ways { type inet_service : verdict; elements = { 80 : jump more, 81 : drop, 82 : return }; }
  map ports { type inet_service : ipv4_addr . inet_service; elements = { 30000 : 10.1.1.1 . 8080 }; }
  set busy { type ipv4_addr; flags dynamic,timeout; timeout 1m; }
  chain more { counter packets 5 bytes 300 reject with icmp type port-unreachable; }
  chain filters {
    type filter hook forward priority -5; policy drop;
    tcp dport vmap @ways comment "by port"
    ip saddr @nets accept
    ip saddr . tcp dport @pairs meta mark set 0x7
    iifname "eth*" oifname "pw0" ct state established,related accept
    ip daddr != 10.0.0.0/8 meta mark & 0x000000ff == 0x00000007 drop
    ct state new ct mark set 0x1
    tcp flags & (syn | ack) == syn tcp option maxseg size set rt mtu
    meta skuid 1000 drop
    fib daddr type local accept
    limit rate over 10/second drop
    update @busy { ip saddr }
    ip saddr { 1.1.1.1, 2.2.2.2 } goto more
    udp dport 1000-2000 accept
  }
  chain nat {
    type nat hook prerouting priority dstnat; policy accept;
    dnat ip to tcp dport map @ports
    udp dport 53 redirect to :5353
    ip daddr 9.9.9.9 dnat ip to 10.2.2.2
  }
  chain post {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "eth0" ip saddr 10.0.0.0/8 snat ip to 192.0.2.1
    oifname "eth1" masquerade
  }
}
table bridge frames { chain c { type filter hook forward priority 0; }; }
"""


class Around:
    """A node without routes: 192.0.2.1 is its own."""

    def kind_of(self, address: str) -> int:
        return 2 if address == "192.0.2.1" else 1

    def index_of(self, interface: str) -> int:
        return {"eth0": 2}.get(interface, 0)

    def address_of(self, interface: str) -> str:
        return {"eth0": "192.0.2.1"}.get(interface, "")

    def way_out(self, packet: Packet, address: str) -> str:
        return "eth0"


@pytest.fixture(scope="module")
def state(namespaces: Callable[[], str]) -> State:
    name = namespaces()

    def load() -> State:
        subprocess.run(["nft", "-f", "-"], input=RULESET, text=True, check=True)
        return read("node1", V4)

    return netns.run(name, load)


def _table(state: State) -> Table:
    return next(t for t in state.tables if t.name == "others")


def _walk(state: State, chain: str, packet: Packet) -> Passed:
    rules = NftRules(state.tables, V4)
    base = next(b for hook in range(5) for b in rules.bases(hook) if b.title == f"inet others {chain}")
    (passed,) = rules.walk(base, packet, "node1", Around())
    return passed


def _packet(
    source: str = "172.16.0.1", destination: str = "10.9.9.9", port: int = 443, **more: Any
) -> Packet:
    fields = {"protocol": 6, "iif": "eth0", "oif": "pw0", **more}
    return Packet(V4, source=source, destination=destination, dport=port, **fields)


def test_rules_are_said_in_words_like_those_of_nft(state: State) -> None:
    table = _table(state)
    words = [nft_words.words(table, r) for c in ("filters", "nat", "post") for r in table.chains[c].rules]
    assert words == [
        "tcp dport vmap @ways",
        "ip saddr @nets accept",
        "meta nfproto ipv4 meta l4proto tcp ip saddr . th dport @pairs meta mark set 0x7",
        "iifname eth* oifname pw0 ct state established,related accept",
        "ip daddr != 10.0.0.0/8 meta mark & 0xff == 0x7 drop",
        "ct state new ct mark set 0x1",
        "tcp flags & syn,ack == syn tcp option maxseg size set rt mtu",
        "meta skuid 1000 drop",
        "fib daddr type local accept",
        "limit rate over 10/1 s drop",
        "meta nfproto ipv4 update @busy { ip saddr }",
        "ip saddr { 1.1.1.1, 2.2.2.2 } goto more",
        "udp dport >= 1000 th dport <= 2000 accept",
        "meta l4proto tcp dnat to th dport map @ports",
        "udp dport 53 redirect to :5353",
        "ip daddr 9.9.9.9 dnat to 10.2.2.2",
        "oifname eth0 ip saddr 10.0.0.0/8 snat to 192.0.2.1",
        "oifname eth1 masquerade",
    ]


@pytest.mark.parametrize(
    ("packet", "ruling", "last"),
    [
        (_packet(port=80), Ruling.REJECT, "inet others more"),
        (_packet(port=81), Ruling.DROP, "inet others filters"),
        (_packet("10.1.2.3", port=82), Ruling.DROP, "inet others filters"),  # return: the policy
        (_packet("10.255.255.255"), Ruling.ACCEPT, "inet others filters"),
        (_packet("192.0.2.9"), Ruling.ACCEPT, "inet others filters"),
        (_packet("192.0.2.10"), Ruling.DROP, "inet others filters"),
        (_packet("192.0.2.10", known=True), Ruling.ACCEPT, "inet others filters"),
        (_packet(destination="192.0.2.1"), Ruling.ACCEPT, "inet others filters"),
        (_packet("2.2.2.2"), Ruling.REJECT, "inet others more"),
        (_packet(destination="192.0.2.1", mark=7), Ruling.DROP, "inet others filters"),
        (_packet(protocol=17, port=1500), Ruling.ACCEPT, "inet others filters"),
    ],
    ids=str,
)
def test_a_packet_meets_what_the_rules_say(state: State, packet: Packet, ruling: Ruling, last: str) -> None:
    passed = _walk(state, "filters", packet)
    assert (passed.ruling, passed.last[0]) == (ruling, last)


def test_a_rule_tells_its_comment_counter_and_the_element_that_matched(state: State) -> None:
    first, second = _walk(state, "filters", _packet(port=80)).steps[:2]
    assert (first.text, first.elements) == ("by port", ("80 in @ways: jump more",))
    assert (second.rule, second.packets) == ("meta nfproto ipv4 reject", 5)


def test_what_depends_on_a_program_is_undecided(state: State) -> None:
    texts = [s.text for s in _walk(state, "filters", _packet()).steps]
    assert "not followed (meta skuid is not known beforehand)" in texts


@pytest.mark.parametrize(
    ("packet", "to"),
    [
        (_packet(port=30000), "10.1.1.1:8080"),
        (_packet(protocol=17, port=53), "192.0.2.1:5353"),
        (_packet(destination="9.9.9.9"), "10.2.2.2:443"),
        (_packet(), "10.9.9.9:443"),
    ],
)
def test_destinations_are_translated(state: State, packet: Packet, to: str) -> None:
    found = _walk(state, "nat", packet).packet
    assert f"{found.destination}:{found.dport}" == to


def test_sources_are_translated(state: State) -> None:
    assert _walk(state, "post", _packet("10.1.1.1", oif="eth0")).source == "192.0.2.1"
    assert _walk(state, "post", _packet(oif="eth1")).masquerade


def test_tables_of_others_are_listed_and_those_of_frames_as_not_followed(state: State) -> None:
    assert NftRules(state.tables, V4).others() == [
        "inet others filters: filter hook forward priority -5, policy drop, 13 rules",
        "inet others nat: nat hook prerouting priority -100, policy accept, 3 rules",
        "inet others post: nat hook postrouting priority 100, policy accept, 2 rules",
        "bridge frames c: for frames, not followed",
    ]


def test_a_state_can_be_written_and_read_again(state: State) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=State) == state


def test_the_other_family_does_not_see_tables_of_ip(namespaces: Callable[[], str]) -> None:
    def work() -> State:
        subprocess.run(["nft", "add table ip one; add table ip6 two; add chain ip6 two c"], check=True)
        return read("n", Family.V6)

    assert [str(t) for t in netns.run(namespaces(), work).tables] == ["ip6 two"]


def test_a_dormant_table_is_asked_by_nobody(namespaces: Callable[[], str]) -> None:
    text = "table ip t { flags dormant; chain c { type filter hook input priority 0; policy drop; }; }"

    def work() -> State:
        subprocess.run(["nft", text], check=True)
        return read("n", V4)

    assert not NftRules(netns.run(namespaces(), work).tables, V4).bases(1)


def test_an_interval_begins_and_ends_where_it_says() -> None:
    edges = {b"\x10\0": None, b"\x20\1": None, b"\x20\0": None, b"\x30\1": None}
    found = Set("s", edges, interval=True)
    inside = [n for n in (0x0F, 0x10, 0x1F, 0x20, 0x2F, 0x30) if found.find(bytes([n]))]
    assert inside == [0x10, 0x1F, 0x20, 0x2F]
    assert Set("s", {}, interval=True).find(b"\1") is None
    assert Set("s", {b"": None}).find(b"\1") == (b"", None)
