"""What is asked of the kernel by route netlink is read back from it."""

import errno
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from netlink import netns
from netlink.errors import NetlinkError
from netlink.requests import (
    NUD_PERMANENT,
    ROUTE_PROTOCOL,
    Route,
    Veth,
    address_add,
    address_delete,
    bridge_add,
    bridge_hairpin,
    link_delete,
    link_set,
    link_up,
    neighbour_replace,
    route_delete,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl

T = TypeVar("T")
Inside = Callable[[Callable[[Rtnl], T]], T]
MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"


@pytest.fixture
def inside(namespaces: Callable[[], str]) -> Callable[[Callable[[Rtnl], T]], T]:
    """A function that runs another in a namespace of the test's, with a socket."""
    name = namespaces()

    def run(work: Callable[[Rtnl], T]) -> T:
        def with_socket() -> T:
            with Rtnl() as rtnl:
                return work(rtnl)

        return netns.run(name, with_socket)

    return run


def pair(rtnl: Rtnl) -> tuple[int, int]:
    """Make a veth pair, both ends up, and return their indices."""
    rtnl.commit(veth_add(Veth("left", "right", *MACS, mtu=1400)))
    left, right = rtnl.link("left"), rtnl.link("right")
    assert left
    assert right
    rtnl.commit(link_up(right.index))
    return left.index, right.index


def test_a_veth_pair_has_its_names_macs_mtu_and_one_end_up(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(veth_add(Veth("left", "right", *MACS, mtu=1400)))
        left, right = rtnl.link("left"), rtnl.link("right")
        assert left
        assert right
        assert (left.mac, right.mac) == MACS
        assert (left.mtu, right.mtu, left.kind, right.kind) == (1400, 1400, "veth", "veth")
        assert (left.up, right.up) == (True, False)
        assert (left.peer_index, right.peer_index) == (right.index, left.index)
        assert {"lo", "left", "right"} <= {link.name for link in rtnl.links()}
        rtnl.commit(link_delete("left"))
        assert rtnl.link("right") is None

    inside(work)


def test_the_peer_can_be_made_in_another_namespace(
    inside: Inside[None], namespaces: Callable[[], str]
) -> None:
    other = namespaces()

    def work(rtnl: Rtnl) -> None:
        with netns.opened(other) as fd:
            rtnl.commit(veth_add(Veth("left", "right", peer_netns=fd)))
        assert rtnl.link("left")
        assert rtnl.link("right") is None

    inside(work)

    def there() -> bool:
        with Rtnl() as rtnl:
            return rtnl.link("right") is not None

    assert netns.run(other, there)


def test_a_bridge_has_ports_until_they_are_taken_off(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        rtnl.commit(bridge_add("br", "02:00:00:00:00:03"))
        bridge = rtnl.link("br")
        assert bridge
        assert (bridge.kind, bridge.mac, bridge.up) == ("bridge", "02:00:00:00:00:03", True)
        with pytest.raises(NetlinkError, match="hairpin"):
            rtnl.commit(bridge_hairpin(left))  # not a port yet
        for index, master in ((bridge.index, bridge.index), (0, None)):
            rtnl.commit(link_set(left, master=index))
            port = rtnl.link("left")
            assert port
            assert port.master == master

    inside(work)


def test_mtu_and_name_can_be_changed(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(veth_add(Veth("left", "right")))
        right = rtnl.link("right")
        assert right
        rtnl.commit(link_set(right.index, name="other", mtu=1300))
        other = rtnl.link("other")
        assert other
        assert (other.index, other.mtu) == (right.index, 1300)

    inside(work)


def test_addresses_of_both_families_are_usable_at_once(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        rtnl.commit(address_add(left, "10.0.0.1/24"), address_add(left, "fd00::1/64"))
        assert {"10.0.0.1/24", "fd00::1/64"} <= {a.cidr for a in rtnl.addresses(left)}
        assert {a.index for a in rtnl.addresses(left)} == {left}
        for near in ("10.0.0.9", "fd00::9"):
            route = rtnl.route_to(near)
            assert route
            assert route.oif == left

    inside(work)


def test_a_passive_address_answers_and_is_never_chosen_as_a_source(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        passive = ("10.244.1.0/32", "fd00:244:1::/128")
        rtnl.commit(link_up(1), *(address_add(left, cidr, passive=True) for cidr in passive))
        found = {a.cidr: a for a in rtnl.addresses(left)}
        assert all(found[cidr].passive for cidr in passive)
        rtnl.commit(address_add(left, "10.0.0.1/24"), address_add(left, "fd00::1/64"))
        found = {a.cidr: a for a in rtnl.addresses(left)}
        assert not any(found[cidr].passive for cidr in ("10.0.0.1/24", "fd00::1/64"))
        wait_until(lambda: rtnl.passes(left) and rtnl.owns("fd00:244:1::"))
        for cidr, near, source in ((passive[0], "10.0.0.9", "10.0.0.1"), (passive[1], "fd00::9", "fd00::1")):
            assert rtnl.owns(cidr.split("/")[0])
            route = rtnl.route_to(near)
            assert route
            assert route.source == source
        rtnl.commit(*(address_delete(left, cidr) for cidr in passive))
        assert not {a.cidr for a in rtnl.addresses(left)} & set(passive)
        with pytest.raises(NetlinkError, match=r"^cannot remove address 10.244.1.0/32") as failure:
            rtnl.commit(address_delete(left, passive[0]))
        assert failure.value.gone

    inside(work)


def test_an_interface_passes_packets_when_both_ends_are_up(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(veth_add(Veth("host0", "pod0", *MACS)))
        host, pod = socket.if_nametoindex("host0"), socket.if_nametoindex("pod0")
        assert not rtnl.passes(host)
        rtnl.commit(link_up(host), link_up(pod))
        wait_until(lambda: rtnl.passes(host) and rtnl.passes(pod))

    inside(work)


def test_an_address_is_owned_once_packets_to_it_are_taken(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(veth_add(Veth("host0", "pod0", *MACS)))
        host, pod = socket.if_nametoindex("host0"), socket.if_nametoindex("pod0")
        assert not rtnl.owns("fd00::5")
        rtnl.commit(link_up(1), link_up(host), link_up(pod), address_add(host, "fd00::5/64"))
        rtnl.commit(address_add(host, "10.0.0.5/24"))
        wait_until(lambda: rtnl.owns("fd00::5") and rtnl.owns("10.0.0.5"))
        assert not rtnl.owns("fd00::6")
        assert not rtnl.owns("10.0.0.6")

    inside(work)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline


def test_routes_of_both_families_are_read_back_by_protocol(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        ours = [
            Route("10.1.0.2/32", oif=left),
            Route("10.2.0.0/24", gateway="10.1.0.2", oif=left, onlink=True),
            Route("0.0.0.0/0", gateway="10.1.0.2", oif=left),
            Route("fd00:1::2/128", oif=left),
            Route("fd00:2::/64", gateway="fd00:1::2", oif=left),
            Route("::/0", gateway="fe80::1", oif=left),
        ]
        # As long as there is no IPv4 address at all, no IPv4 gateway is valid.
        rtnl.commit(address_add(left, "10.8.0.1/32"))
        foreign = Route("10.9.0.0/24", oif=left, protocol=99)
        rtnl.commit(*(route_replace(route) for route in [*ours, foreign]))
        read = {r.destination: r for r in rtnl.routes(ROUTE_PROTOCOL)}
        assert set(read) == {r.destination for r in ours}
        assert all((read[r.destination].gateway, read[r.destination].oif) == (r.gateway, left) for r in ours)
        assert foreign in rtnl.routes()
        rtnl.commit(*(route_delete(route) for route in reversed(ours)))
        assert rtnl.routes(ROUTE_PROTOCOL) == ()

    inside(work)


def test_a_route_is_replaced_not_added_twice(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, right = pair(rtnl)
        for cidr in ("10.1.0.2/32", "fd00:1::2/128"):
            for index in (left, right):
                rtnl.commit(route_replace(Route(cidr, oif=index)))
            assert [r.oif for r in rtnl.routes(ROUTE_PROTOCOL) if r.destination == cidr] == [right]

    inside(work)


def test_an_unreachable_route_leads_nowhere(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        rtnl.commit(route_replace(Route("10.3.0.0/16")))
        assert [r.destination for r in rtnl.routes(ROUTE_PROTOCOL)] == ["10.3.0.0/16"]
        assert rtnl.route_to("10.3.0.1") is None
        assert rtnl.route_to("10.4.0.1") is None

    inside(work)


def test_a_neighbour_is_permanent_and_can_be_replaced(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        for address in ("10.1.0.2", "fd00:1::2"):
            for mac in MACS:
                rtnl.commit(neighbour_replace(left, address, mac))
            found = [n for n in rtnl.neighbours() if n.address == address]
            assert [(n.index, n.mac, n.state) for n in found] == [(left, MACS[1], NUD_PERMANENT)]

    inside(work)


def test_requests_after_a_refused_one_are_done_and_the_first_refusal_is_told(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        with pytest.raises(NetlinkError, match=r"absent: No such device$") as failure:
            rtnl.commit(link_delete("absent"), bridge_add("br"), link_delete("absent2"))
        assert failure.value.gone
        assert rtnl.link("br")
        with pytest.raises(NetlinkError, match=r"^cannot add the bridge br: File exists$") as failure:
            rtnl.commit(bridge_add("br"))
        assert failure.value.exists
        rtnl.commit()
        rtnl.commit(link_delete("br"))  # the socket is still good
        assert rtnl.link("br") is None

    inside(work)


def test_a_plain_file_as_the_peers_namespace_is_invalid(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        with open("/dev/null") as file, pytest.raises(NetlinkError) as failure:
            rtnl.commit(veth_add(Veth("left", "right", peer_netns=file.fileno())))
        assert failure.value.errno == errno.EINVAL
        assert str(failure.value) == "cannot add the veth pair left, right: Invalid argument"
        assert rtnl.link("left") is None

    inside(work)


def test_any_number_of_routes_is_written_and_read_at_once(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        left, _ = pair(rtnl)
        cidrs = [f"10.{i // 250}.{i % 250}.0/24" for i in range(1000)]
        requests = [route_replace(Route(cidr, oif=left)) for cidr in cidrs]
        with pytest.raises(NetlinkError, match="cannot remove interface absent"):
            rtnl.commit(link_delete("absent"), *requests, link_delete("last"))
        assert sorted(r.destination for r in rtnl.routes(ROUTE_PROTOCOL)) == sorted(cidrs)

    inside(work)


def test_sockets_have_port_ids_of_their_own(inside: Inside[None]) -> None:
    def work(rtnl: Rtnl) -> None:
        with Rtnl() as other:
            assert 0 != other.port != rtnl.port != 0

    inside(work)


def test_a_socket_that_is_not_open_says_so() -> None:
    for question in (Rtnl.links, Rtnl.port.fget):  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="not open"):
            question(Rtnl())
