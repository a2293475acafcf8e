"""Routes, rules, neighbours and forwarding entries are read back as written; any bytes can be read."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netlink import entries, netns
from netlink.attributes import attribute
from netlink.errors import NetlinkError
from netlink.messages import pack
from netlink.requests import (
    LAST,
    NUD_PERMANENT,
    RTA_DST,
    RTA_METRICS,
    RTA_MULTIPATH,
    RTA_TABLE,
    RTA_VIA,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Request,
    Route,
    Rule,
    Veth,
    Vxlan,
    address_add,
    fdb_replace,
    link_up,
    neighbour_replace,
    proxy_add,
    route_add,
    route_delete,
    route_replace,
    rule_add,
    rule_delete,
    veth_add,
    vxlan_add,
)
from netlink.rtnl import NETLINK_GET_STRICT_CHK, SOL_NETLINK, Rtnl
from tests.netlink.joined import wait_until

OWN_V4, OWN_V6 = "10.244.1.0", "fd00:244:1::"
TABLES = 254, 112, 11_200


@pytest.fixture
def inside(namespaces: Callable[[], str]) -> Callable[[Callable[[Rtnl, int], None]], None]:
    """A function that runs another in a namespace, with a socket and an interface with addresses."""

    def run(work: Callable[[Rtnl, int], None]) -> None:
        def with_socket() -> None:
            with Rtnl() as rtnl:
                rtnl.commit(link_up(1), veth_add(Veth("eth0", "eth1")))
                left, right = rtnl.link("eth0"), rtnl.link("eth1")
                assert left
                assert right
                own = (("192.0.2.1/24", left.index), ("fd00:2::1/64", left.index))
                rtnl.commit(link_up(right.index), *(address_add(index, cidr) for cidr, index in own))
                rtnl.commit(*(address_add(1, a, passive=True) for a in (f"{OWN_V4}/32", f"{OWN_V6}/128")))
                work(rtnl, left.index)

        netns.run(namespaces(), with_socket)

    return run


Inside = Callable[[Callable[[Rtnl, int], None]], None]


def told(command: str) -> str:
    """Return what a program says of the namespace that the thread is in."""
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def routes(oif: int, table: int) -> list[Route]:
    """Return one route of every kind that we write."""
    tunnelled = [
        Route("10.244.2.0/24", "10.244.2.0", oif, onlink=True, mtu=1450, source=OWN_V4, table=table),
        Route("fd00:244:2::/64", "fd00:244:2::", oif, onlink=True, mtu=1450, source=OWN_V6, table=table),
    ]
    direct = [
        Route("10.244.3.0/24", "192.0.2.3", oif, table=table),
        Route("fd00:244:3::/64", "fd00:2::3", oif, table=table),
        Route("10.244.4.0/24", "fd00:2::4", oif, mtu=1400, table=table),
        Route("10.244.5.0/24", "fe80::5", oif, table=table),
        Route("10.244.1.6/32", oif=oif, mtu=1300, table=table),
        Route("fd00:244:1::6/128", oif=oif, mtu=1300, table=table),
        Route("0.0.0.0/0", "192.0.2.9", oif, table=table),
        Route("::/0", "fe80::9", oif, table=table),
    ]
    metrics = [
        Route("10.244.7.0/24", "192.0.2.7", oif, metric=77, table=table),
        Route("fd00:244:7::/64", "fd00:2::7", oif, metric=77, table=table),
        Route("10.244.8.0/24", metric=77, table=table),
        Route("fd00:244:8::/64", metric=77, table=table),
    ]
    return [
        Route(f"{OWN_V4}/24", table=table),
        Route(f"{OWN_V6}/64", table=table),
        *tunnelled,
        *direct,
        *metrics,
    ]


def test_routes_are_read_back_equal_and_from_their_table_only(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        written = {table: routes(oif, table) for table in TABLES}
        for table, ours in written.items():
            assert rtnl.routes(112, table) == ()
            rtnl.commit(*map(route_replace, ours))
        for table, ours in written.items():
            assert set(rtnl.routes(112, table)) == set(ours)
            assert len(rtnl.routes(112, table)) == len(ours)
        assert rtnl.routes(99) == ()
        shown = told("ip route show proto 112") + told("ip -6 route show proto 112")
        for text in (
            "10.244.2.0/24 via 10.244.2.0 dev eth0 src 10.244.1.0 onlink mtu 1450",
            "fd00:244:2::/64 via fd00:244:2:: dev eth0 src fd00:244:1:: metric 1024 onlink mtu 1450",
            "10.244.4.0/24 via inet6 fd00:2::4 dev eth0 mtu 1400",
            f"unreachable 10.244.1.0/24 metric {LAST}",
        ):
            assert text in shown
        for table, ours in written.items():
            rtnl.commit(*map(route_delete, ours))
            assert rtnl.routes(112, table) == ()

    inside(work)


@pytest.mark.parametrize("change", [{"mtu": 1300}, {"source": "192.0.2.1"}, {"gateway": "192.0.2.5"}])
def test_a_route_that_differs_is_replaced_in_place(inside: Inside, change: dict[str, object]) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        before: dict[str, object] = {"gateway": "192.0.2.3", "mtu": 1400, "source": OWN_V4}
        for values in (before, before | change):
            route = Route("10.244.3.0/24", oif=oif, **values)  # type: ignore[arg-type]
            rtnl.commit(route_replace(route))
            assert rtnl.routes(112) == (route,)

    inside(work)


def test_a_route_is_removed_whatever_its_metric_unless_one_is_named(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        for to, via in (("10.244.3.0/24", "192.0.2.3"), ("fd00:244:3::/64", "fd00:2::3")):
            other = Route(to, via, oif, metric=77)
            rtnl.commit(route_add(other))
            with pytest.raises(NetlinkError) as failure:
                rtnl.commit(route_delete(Route(to, via, oif, metric=78)))
            assert failure.value.gone
            rtnl.commit(route_delete(Route(to, via, oif)))
        assert rtnl.routes(112) == ()

    inside(work)


def test_a_route_with_several_next_hops_is_shown_with_the_first(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        told("ip route add default mtu 1400 nexthop via 192.0.2.2 nexthop via 192.0.2.3")
        told("ip -6 route add default nexthop via fd00:2::2 nexthop via fd00:2::3")
        told("ip route add 10.9.0.0/16 nexthop via inet6 fd00:2::2 dev eth0 nexthop via 192.0.2.3")
        told("ip nexthop add id 5 via 192.0.2.9 dev eth0")
        told("ip route add 10.8.0.0/16 nhid 5")
        found = {r.destination: (r.gateway, r.oif, r.mtu) for r in rtnl.routes()}
        assert found["0.0.0.0/0"] == ("192.0.2.2", oif, 1400)
        assert found["::/0"] in {("fd00:2::2", oif, 0), ("fd00:2::3", oif, 0)}
        assert found["10.9.0.0/16"] == ("fd00:2::2", oif, 0)
        assert found["10.8.0.0/16"] == ("192.0.2.9", oif, 0)

    inside(work)


@pytest.mark.parametrize("kind", ["unreachable", "blackhole", "prohibit"])
def test_a_route_that_leads_nowhere_has_neither_gateway_nor_interface(inside: Inside, kind: str) -> None:
    def work(rtnl: Rtnl, _: int) -> None:
        for to in ("10.9.0.0/16", "fd00:9::/64"):
            told(f"ip route add {kind} {to}")
            (found,) = (r for r in rtnl.routes() if r.destination == to)
            assert found.unreachable

    inside(work)


def test_the_kernels_way_to_an_address_has_source_and_mtu(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        rtnl.commit(*map(route_replace, routes(oif, 254)))
        for to, via, source in (
            ("10.244.2.9", "10.244.2.0", OWN_V4),
            ("fd00:244:2::9", "fd00:244:2::", OWN_V6),
        ):
            found = rtnl.route_to(to)
            assert found
            assert (found.gateway, found.oif, found.mtu, found.source) == (via, oif, 1450, source)
        for own in ("192.0.2.1", "fd00:2::1", OWN_V4, OWN_V6):
            wait_until(lambda own=own: rtnl.owns(own), f"{own} to be ours")  # IPv6: a thread of the kernel's
            assert rtnl.route_to(own) is None

    inside(work)


def test_a_route_that_remembers_a_path_mtu_is_known_by_its_flag() -> None:
    for flags in (0, entries.RTM_F_CLONED):
        assert entries.is_cached(pack(RTM_NEWROUTE, 0, 1, route_bytes(flags=flags))) == bool(flags)


def test_rules_of_ours_are_read_back_equal(inside: Inside) -> None:
    rules = [Rule(f"{OWN_V4}/24", 112, 112), Rule(f"{OWN_V6}/64", 112, 112), Rule("10.9.0.0/16", 11_200, 7)]

    def work(rtnl: Rtnl, _: int) -> None:
        assert rtnl.rules() == ()
        told("ip rule add from 10.8.0.0/16 lookup 112 pref 112")
        rtnl.commit(*map(rule_add, rules))
        assert set(rtnl.rules()) == set(rules)
        for rule in rules:
            with pytest.raises(NetlinkError, match=r"^cannot add the rule from .* to table") as failure:
                rtnl.commit(rule_add(rule))
            assert failure.value.exists
        assert "112:\tfrom 10.244.1.0/24 lookup 112 proto 112" in told("ip rule")
        assert "112:\tfrom fd00:244:1::/64 lookup 112 proto 112" in told("ip -6 rule")
        rtnl.commit(*map(rule_delete, rules))
        assert rtnl.rules() == ()
        assert "from 10.8.0.0/16" in told("ip rule")

    inside(work)


def test_the_answers_of_a_kernel_that_does_not_select_are_the_same(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        rtnl.commit(vxlan_add(Vxlan("pwvxlan4", 112, 8472, "192.0.2.1", "02:00:00:00:01:01", 1450)))
        tunnel = rtnl.link("pwvxlan4")
        assert tunnel
        rtnl.commit(*(route_replace(route) for table in TABLES for route in routes(oif, table)))
        rtnl.commit(*(neighbour_replace(i, "10.244.2.0", "02:00:00:00:00:01") for i in (oif, tunnel.index)))
        rtnl.commit(fdb_replace(tunnel.index, "02:00:00:00:00:01", "192.0.2.2"), proxy_add(oif, "192.0.2.7"))
        rtnl.commit(rule_add(Rule("10.9.0.0/16", 112, 7)))

        def answers() -> list[object]:
            tables = [frozenset(rtnl.routes(112, table)) for table in TABLES]
            entries = {n for n in rtnl.neighbours(tunnel.index) if n.state == NUD_PERMANENT}
            addresses = rtnl.addresses(oif), rtnl.addresses(tunnel.index)
            return [tables, entries, rtnl.forwarding(tunnel.index), rtnl.proxies(), rtnl.rules(), addresses]

        selected = answers()
        assert all(selected)
        rtnl._open().setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 0)
        assert answers() == selected

    inside(work)


def test_proxies_are_no_neighbours(inside: Inside) -> None:
    def work(rtnl: Rtnl, oif: int) -> None:
        rtnl.commit(proxy_add(oif, "192.0.2.7"), proxy_add(oif, "fd00:2::7"))
        assert set(rtnl.proxies()) == {(oif, "192.0.2.7"), (oif, "fd00:2::7")}
        assert not {n.address for n in rtnl.neighbours(oif)} & {"192.0.2.7", "fd00:2::7"}

    inside(work)


def route_bytes(family: int = 10, bits: int = 64, table: int = 254, kind: int = 1, flags: int = 0) -> bytes:
    return struct.pack("=BBBBBBBBI", family, bits, 0, 0, table, 112, 0, kind, flags)


DECODERS = (
    entries.route,
    entries.neighbour,
    entries.forwarding,
    entries.proxy,
    entries.rule,
    entries.is_cached,
)
REAL: tuple[Request, ...] = (
    *map(route_replace, routes(7, 11_200)),
    rule_add(Rule("10.9.0.0/16", 11_200, 7)),
    neighbour_replace(7, "10.244.2.0", "02:00:00:00:00:01"),
    proxy_add(7, "fd00:2::7"),
    fdb_replace(7, "02:00:00:00:00:01", "192.0.2.2"),
)


def decode(message: bytes) -> list[object]:
    return [decoder(message) for decoder in DECODERS]


@given(
    st.sampled_from([RTM_NEWROUTE, RTM_NEWNEIGH, RTM_NEWRULE]), st.sampled_from([0, 2, 7, 10]), st.binary()
)
@example(RTM_NEWROUTE, 10, route_bytes()[1:] + attribute(RTA_DST, b"abc"))
@example(RTM_NEWROUTE, 10, route_bytes()[1:] + attribute(RTA_VIA, b"a"))
@example(RTM_NEWROUTE, 2, route_bytes(bits=24)[1:] + attribute(RTA_MULTIPATH, b"abcd"))
@example(RTM_NEWROUTE, 2, route_bytes(bits=24)[1:] + attribute(RTA_METRICS, attribute(2, b"a")))
@example(RTM_NEWROUTE, 2, route_bytes(bits=24)[1:] + attribute(RTA_TABLE, b"a"))
def test_any_bytes_are_read_or_left_out(kind: int, family: int, body: bytes) -> None:
    decode(body)
    decode(pack(kind, 0, 1, bytes([family]) + body))


@given(st.sampled_from(REAL), st.data())
def test_a_message_with_a_wrong_byte_or_cut_off_is_read_or_left_out(
    request: Request, data: st.DataObject
) -> None:
    body = bytearray(request.body)
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    decode(pack(request.kind, 0, 1, bytes(body[: data.draw(st.integers(0, len(body)))])))


def test_what_we_write_is_what_we_read() -> None:
    for request, route in zip(REAL, routes(7, 11_200), strict=False):
        assert entries.route(pack(request.kind, 0, 1, request.body)) == route
    rule, neighbour, proxy, forwarding = (pack(r.kind, 0, 1, r.body) for r in REAL[-4:])
    assert entries.rule(rule) == Rule("10.9.0.0/16", 11_200, 7)
    assert entries.neighbour(neighbour) == entries.Neighbour(7, "10.244.2.0", "02:00:00:00:00:01", 0x80)
    assert entries.proxy(proxy) == (7, "fd00:2::7")
    assert entries.forwarding(forwarding) == (7, entries.Forwarding("02:00:00:00:00:01", "192.0.2.2"))
    others = entries.forwarding(neighbour), entries.neighbour(forwarding), entries.proxy(neighbour)
    assert others == (None, None, None)
