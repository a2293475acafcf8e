"""Rules as iptables-save prints them: ranges, comments, chances, and the input of iptables-restore."""

from __future__ import annotations

from ipaddress import IPv4Address, collapse_addresses, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from proxy.dataplane import NodeRanges
from proxy.iptables.names import ChainId
from proxy.iptables.shared import setting
from proxy.iptables.text import Edit, Jump, comment, joined, probability, restore_text, without

FIRST = {Family.V4: 0x0A000000, Family.V6: 0xFD << 120}


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Family, list[str]]:
    """Ranges of few addresses side by side, so that they touch and overlap often; and everything."""
    family = draw(st.sampled_from(Family))
    spans = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=8))
    found = [f"{ip_address(FIRST[family] + (at >> size << size))}/{family.bits - size}" for at, size in spans]
    everything = "0.0.0.0/0" if family is Family.V4 else "::/0"
    return family, [*found, *([everything] if draw(st.integers(0, 9)) == 0 else [])]


@given(ranges())
def test_ranges_are_joined_as_the_standard_library_does(drawn: tuple[Family, list[str]]) -> None:
    family, cidrs = drawn
    other = "fd99::/64" if family is Family.V4 else "192.0.2.0/24"
    expected = collapse_addresses([ip_network(c) for c in cidrs])  # type: ignore[type-var]
    assert joined(family, [*cidrs, other]) == tuple(map(str, expected))


@given(st.integers(0, 63), st.integers(0, 6), st.integers(0, 63), st.integers(0, 6))
def test_a_range_without_another_has_exactly_the_other_addresses(
    at: int, size: int, hole_at: int, hole_size: int
) -> None:
    whole = ip_network((at >> size << size, 32 - size))
    hole = ip_network((hole_at >> hole_size << hole_size, 32 - hole_size))
    left = [a for c in without(Family.V4, str(whole), str(hole)) for a in ip_network(c)]
    assert sorted(left) == sorted(set(whole) - set(hole))
    assert len(left) == len(set(left))
    assert all(isinstance(a, IPv4Address) for a in left)


@pytest.mark.parametrize(
    ("selected", "matches"),
    [
        (("0.0.0.0/0", "::/0"), ("! -d 127.0.0.0/8",)),
        (("192.168.0.1/32", "192.168.60.0/24", "fd00::1/128"), ("-d 192.168.0.1/32", "-d 192.168.60.0/24")),
        (("127.0.0.0/8", "127.0.0.1/32"), ()),
        (("126.0.0.0/7",), ("-d 126.0.0.0/8",)),
        ((), ()),
    ],
)
def test_node_ports_are_on_what_is_selected_and_never_on_loopback(
    selected: tuple[str, ...], matches: tuple[str, ...]
) -> None:
    """CVE-2020-8558."""
    assert setting(Family.V4, NodeRanges(node_ports=selected), terse=False).node_ports == matches


def test_a_comment_is_quoted_as_iptables_does() -> None:
    assert comment("simple_-1") == "-m comment --comment simple_-1"
    assert comment('say "a\\b"') == '-m comment --comment "say \\"a\\\\b\\""'
    assert comment("a\nCOMMIT") == '-m comment --comment "a?COMMIT"'
    assert len(comment("é" * 300).encode()) <= 255 + len('-m comment --comment ""')


def test_chances_are_those_that_kube_proxy_asks_for_as_the_kernel_keeps_them() -> None:
    assert [probability(n).rpartition(" ")[2] for n in (3, 2)] == ["0.33333333349", "0.50000000000"]
    assert probability(1) == ""


def test_an_edit_empties_before_it_fills_and_removes_last() -> None:
    new, old = ChainId("nat", "NEW"), ChainId("nat", "OLD")
    jump = Jump("nat", "OUTPUT", "-j NEW", "NEW")
    text = restore_text(Edit({new: ("-j ACCEPT",)}, [old], [jump._replace(rule="-j OLD")], [jump]))
    assert text.splitlines() == [
        *("*nat", ":NEW - [0:0]", ":OLD - [0:0]", "-A NEW -j ACCEPT"),
        *("-D OUTPUT -j OLD", "-I OUTPUT -j NEW", "-X OLD", "COMMIT"),
    ]
