"""The tables of pods as values: what a pod becomes, and what the constant part is made of."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import tables
from cni.tables import BY_ADDRESS, BY_PORT, HAIRPIN, IPV4, IPV6, LIMITS, MACS, PODS, TABLES, TARGETS, PodRules
from ipam.records import HostPort
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.expressions import LimitOver
from netlink.nftables.fake import FakeNft
from netlink.nftables.objects import BRIDGE, Map, TableFamily
from netlink.nftables.operations import AddChain, AddElements, AddMap, AddRule, DeleteElements

PORTS = (
    HostPort(6, 80, 8080),
    HostPort(17, 53, 5353, "192.0.2.1"),
    HostPort(132, 9, 9, "fd09::1"),
    HostPort(6, 81, 81, "0.0.0.0"),
    HostPort(6, 82, 82, "::"),
)
POD = PodRules("pwpod0123456789", "02:00:00:00:00:01", ("10.1.0.2", "fd00:1::2"), PORTS)
BRIDGED = PodRules("pwpod0123456789", "02:00:00:00:00:01", ("10.1.0.2", "fd00:1::2"), (), bridge=True)


def printed(pod: PodRules) -> dict[tuple[TableFamily, Map], dict[str, str]]:
    """Return a pod's elements in the words of `nft`."""
    return {
        (family, which): {
            tables.words(which.key, family, key): tables.words(which.data, family, data) if data else ""
            for key, data in elements.items()
            if not data or isinstance(data, bytes)
        }
        for family, maps in tables.elements(pod).items()
        for which, elements in maps.items()
    }


def test_a_routed_pod_is_its_addresses_and_its_host_ports() -> None:
    assert printed(POD) == {
        (Family.V4, PODS): {"pwpod0123456789 . 10.1.0.2": ""},
        (Family.V6, PODS): {"pwpod0123456789 . fd00:1::2": ""},
        (Family.V4, BY_PORT): {"tcp . 80": "10.1.0.2 . 8080", "tcp . 81": "10.1.0.2 . 81"},
        (Family.V6, BY_PORT): {"tcp . 80": "fd00:1::2 . 8080", "tcp . 82": "fd00:1::2 . 82"},
        (Family.V4, BY_ADDRESS): {"192.0.2.1 . udp . 53": "10.1.0.2 . 5353"},
        (Family.V6, BY_ADDRESS): {"fd09::1 . sctp . 9": "fd00:1::2 . 9"},
        (Family.V4, HAIRPIN): {"10.1.0.2 . 10.1.0.2": ""},
        (Family.V6, HAIRPIN): {"fd00:1::2 . fd00:1::2": ""},
    }


def test_a_bridged_pod_is_its_mac_and_all_that_it_may_say_it_is() -> None:
    link_local = "pwpod0123456789 . fe80::ff:fe00:1"
    addresses = {"pwpod0123456789 . fd00:1::2": "", link_local: ""}
    assert printed(BRIDGED) == {
        (BRIDGE, MACS): {"pwpod0123456789 . 02:00:00:00:00:01": ""},
        (BRIDGE, IPV4): {"pwpod0123456789 . 10.1.0.2": ""},
        (BRIDGE, IPV6): addresses,
        (BRIDGE, TARGETS): addresses,
    }


def test_what_a_pod_may_send_is_limited_wherever_its_packets_pass() -> None:
    limit = LimitOver(2_500_000, 65_536)
    for pod, families in ((POD, {Family.V4, Family.V6}), (BRIDGED, {BRIDGE})):
        found = tables.elements(replace(pod, egress=limit))
        assert {family for family, maps in found.items() if LIMITS in maps} == families
        assert all(maps[LIMITS] == {b"pwpod0123456789\0": limit} for maps in found.values() if LIMITS in maps)


def test_host_ports_of_a_family_that_the_pod_lacks_are_left_out() -> None:
    found = tables.elements(PodRules("pwpod0", "", ("10.1.0.2",), PORTS))
    assert set(found) == {Family.V4}


def test_host_ports_lead_to_the_first_address_of_a_family() -> None:
    pod = PodRules("pwpod0", "", ("10.1.0.2", "10.1.0.3"), (HostPort(6, 80, 8080),))
    assert printed(pod)[Family.V4, BY_PORT] == {"tcp . 80": "10.1.0.2 . 8080"}
    assert len(printed(pod)[Family.V4, PODS]) == 2


def test_of_two_pods_with_one_host_port_the_newer_has_it() -> None:
    port = (HostPort(6, 80, 8080),)
    older, newer = PodRules("pwpod1", "", ("10.1.0.2",), port), PodRules("pwpod2", "", ("10.1.0.3",), port)
    found = tables.wanted([older, newer])[Family.V4]
    assert found[BY_PORT] == tables.elements(newer)[Family.V4][BY_PORT]
    assert len(found[PODS]) == 2


@given(
    st.lists(
        st.builds(
            PodRules,
            st.integers(0, 1 << 40).map(lambda n: f"pwpod{n % (1 << 40):010x}"),
            st.just("02:00:00:00:00:01"),
            st.lists(st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)), max_size=3).map(
                tuple
            ),
            st.lists(
                st.builds(
                    HostPort,
                    st.sampled_from([6, 17, 132]),
                    st.integers(1, 65535),
                    st.integers(1, 65535),
                    st.sampled_from(["", "0.0.0.0", "::", "127.0.0.1", "fd09::1"]),
                ),
                max_size=3,
            ).map(tuple),
        ),
        max_size=4,
    )
)
def test_whatever_pods_there_are_their_elements_fit_the_maps(pods: list[PodRules]) -> None:
    found = tables.wanted(pods)
    for family in Family:
        nft = FakeNft(family)
        nft.commit(tables.structure(family))
        contents = found.get(family, {})
        nft.commit([AddElements(which, list(e.items())) for which, e in contents.items()])
        nft.commit([DeleteElements(which, list(e.items())) for which, e in contents.items()])


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_everything_says_what_it_is_for(family: TableFamily) -> None:
    chains = set()
    for operation in tables.structure(family):
        match operation:
            case AddMap(which):
                assert which.comment
            case AddRule(rule):
                assert rule.comment
                assert rule.chain in chains
            case AddChain(chain):
                chains.add(chain.name)
    assert set(tables.rule_comments(family)) == chains


def test_the_constant_part_stays_small() -> None:
    rules = {f: sum(isinstance(op, AddRule) for op in tables.structure(f)) for f in tables.FAMILIES}
    assert max(rules.values()) <= 24


def test_each_table_says_its_own_layout() -> None:
    comments = {tables.layout_comment(family) for family in tables.FAMILIES}
    assert len(comments) == 3
    assert all("layout" in comment for comment in comments)


def test_nft_prints_all_tables_and_loads_what_it_printed(namespaces: Callable[[], str]) -> None:
    def nft(*arguments: str, stdin: str = "") -> str:
        return subprocess.run(
            ["nft", *arguments], input=stdin, capture_output=True, text=True, check=True
        ).stdout

    def inside() -> None:
        limit = LimitOver(2_500_000, 65_536)
        contents = tables.wanted(replace(one, egress=limit) for one in (POD, BRIDGED))
        with NftSocket() as socket:
            filled = {
                f: [AddElements(w, list(e.items())) for w, e in contents[f].items()] for f in tables.FAMILIES
            }
            socket.commit(*((TABLES[f], [*tables.structure(f), *filled[f]]) for f in tables.FAMILIES))
            printed = nft("list", "ruleset")
            assert 'iifname "pwpod*" goto pod' in printed
            assert "@pods accept" in printed
            assert "limit rate over 2500000 bytes/second burst 64 kbytes" in printed
            assert '"pwpod0123456789" . 02:00:00:00:00:01' in printed
            for family in tables.FAMILIES:
                for which in tables.maps(family):
                    assert socket.elements(TABLES[family], which) == contents[family].get(which, {})
                assert socket.rules(TABLES[family]) == tables.rule_comments(family)
                assert socket.table_comment(TABLES[family]) == tables.layout_comment(family)
        nft("flush", "ruleset")
        nft("-f", "-", stdin=printed)
        assert nft("list", "ruleset") == printed

    netns.run(namespaces(), inside)
