"""CIDRs in interval sets: the set holds what they hold, whatever overlaps, comes and goes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.nftables.operations import AddElements, AddMap, AddTable, DeleteElements, DeleteTable
from proxy.nftables.ruleset import POD_CIDRS, TABLE
from proxy.nftables.spans import Members, Pairs, Spans, difference

V4, V6 = Family.V4, Family.V6


def in_order(found: Iterable[bytes]) -> list[tuple[int, int]]:
    """Boundaries as (address, 1 for an end); at one address an end comes before a start."""
    return sorted(((int.from_bytes(k[:-1], "big"), k[-1]) for k in found), key=lambda m: (m[0], -m[1]))


def holds(found: Iterable[bytes], address: int, family: Family) -> bool:
    """Whether an interval set holds an address, as the kernel reads it: the nearest element below decides."""
    marks = in_order(found)
    assert all(len(k) == family.size + 1 for k in found)
    place = bisect_right([m for m, _ in marks], address)
    return place > 0 and marks[place - 1][1] == 0


def cidrs(family: Family) -> st.SearchStrategy[str]:
    """CIDRs close together, so that they meet, overlap and reach the ends of the address space."""
    near = st.builds(
        lambda offset, length: (offset << (family.bits - 6), length),
        st.integers(0, 63),
        st.integers(0, 8),
    )
    narrow = st.builds(
        lambda low, top, length: (((1 << family.bits) - 1 - low) if top else low, length),
        st.integers(0, 40),
        st.booleans(),
        st.integers(family.bits - 4, family.bits),
    )
    kind = type(ip_address("0.0.0.0" if family is V4 else "::"))
    return (near | narrow).map(lambda c: str(ip_network(f"{kind(c[0])}/{c[1]}", strict=False)))


def edges(found: Iterable[str], family: Family) -> set[int]:
    """Addresses at and around the ends of the ranges, and of the whole space."""
    places = {0, (1 << family.bits) - 1}
    for cidr in found:
        network = ip_network(cidr)
        first, last = int(network.network_address), int(network.broadcast_address)
        places |= {first - 1, first, (first + last) // 2, last, last + 1}
    return {p for p in places if 0 <= p < 1 << family.bits}


def steps(family: Family) -> st.SearchStrategy[list[list[str]]]:
    """What is to be in the set after each step; each keeps a part of the one before."""
    return st.lists(st.lists(cidrs(family), max_size=8), min_size=1, max_size=6)


def applied(held: set[bytes], removed: Pairs, added: Pairs) -> set[bytes]:
    """Apply as the kernel does: what goes must be there, what comes must not."""
    for key, _ in removed:
        held.remove(key)
    for key, _ in added:
        assert key not in held
        held.add(key)
    return held


@given(st.sampled_from(Family).flatmap(lambda f: st.tuples(st.just(f), steps(f))))
def test_an_interval_set_holds_exactly_the_addresses_of_its_cidrs(
    drawn: tuple[Family, list[list[str]]],
) -> None:
    family, sequence = drawn
    found, held, before = Spans(family), set[bytes](), Members()
    for own in sequence:
        now = Members([*own, "10.0.0.0/8" if family is V6 else "fd00::/8"])
        held = applied(held, *found.change(*difference(before, now)))
        before = now
        networks = [ip_network(c) for c in own]
        for address in edges(own, family):
            naive = any(int(n.network_address) <= address <= int(n.broadcast_address) for n in networks)
            assert holds(held, address, family) == naive
        marks = in_order(held)
        assert [m for _, m in marks] == [i % 2 for i in range(len(marks))], "starts and ends take turns"
        assert held == {key for key, _ in Spans(family).change((), own)[1]}


def boundaries(pairs: Pairs) -> list[tuple[str, int]]:
    return [(str(ip_address(key[:-1])), key[-1]) for key, _ in pairs]


def test_neighbours_stay_apart_and_the_last_address_has_no_end() -> None:
    _, added = Spans(V4).change((), ("10.0.1.0/24", "10.0.0.0/24"))
    assert boundaries(added) == [("10.0.0.0", 0), ("10.0.1.0", 1), ("10.0.1.0", 0), ("10.0.2.0", 1)]
    assert boundaries(Spans(V4).change((), ("255.255.255.0/24",))[1]) == [("255.255.255.0", 0)]


def test_a_range_in_another_one_is_there_when_that_goes() -> None:
    found = Spans(V4)
    found.change((), ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"))
    removed, added = found.change(("10.0.0.0/8",), ("192.0.2.0/24",))
    assert boundaries(removed) == [("10.0.0.0", 0), ("11.0.0.0", 1)]
    assert boundaries(added)[:2] == [("10.1.0.0", 0), ("10.2.0.0", 1)]
    assert len(added) == 4


@pytest.mark.parametrize("family", Family)
def test_ranges_come_and_go_in_the_kernel_side_by_side(namespaces: Callable[[], str], family: Family) -> None:
    """Nodes join and leave, whose podCIDRs are neighbours, and pools beside and around them."""
    near = st.builds(
        lambda number, length: (number >> 6 - length << 6 - length, length),
        st.integers(0, 63),
        st.integers(2, 6),
    )
    base = ip_address("10.244.0.0" if family is V4 else "fd00:10:244::")
    unit, longest = (8, 24) if family is V4 else (64, 64)

    def named(place: tuple[int, int]) -> str:
        return f"{base + (place[0] << unit)}/{longest - 6 + place[1]}"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.lists(near.map(named), max_size=12), min_size=1, max_size=8))
    def any_sequence(sequence: list[list[str]]) -> None:
        with Nft(family, TABLE) as nft:
            nft.commit([AddTable(""), AddMap(POD_CIDRS)])
            try:
                found, before = Spans(family), Members()
                for now in map(Members, sequence):
                    removed, added = found.change(*difference(before, now))
                    nft.commit([DeleteElements(POD_CIDRS, removed), AddElements(POD_CIDRS, added)])
                    before = now
                    assert nft.elements(POD_CIDRS) == dict(Spans(family).change((), now)[1])
            finally:
                nft.commit([DeleteTable()])

    netns.run(namespaces(), any_sequence)


TEXTS = st.lists(st.sampled_from("abcdefgh"), max_size=8)


@given(TEXTS, TEXTS, TEXTS)
def test_members_are_a_set_that_others_are_made_from(
    first: list[str], gone: list[str], come: list[str]
) -> None:
    one = Members(first)
    two = one.changed(gone, come)
    assert (set(one), len(one)) == (set(first), len(set(first)))
    assert set(two) == set(first) - set(gone) | set(come)
    assert two == Members(two)
    assert hash(two) == hash(Members(two))
    for wanted in (difference(one, two), difference(tuple(one), two)):
        assert wanted == (set(one) - set(two), set(two) - set(one))
    assert all(text in two for text in come)
