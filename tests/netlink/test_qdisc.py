"""The token bucket filter that was asked for is the one the kernel has."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netlink import netns
from netlink.errors import NetlinkError
from netlink.qdisc import MAX_32, Tbf, qdisc_delete, tbf_replace, tbfs
from netlink.requests import Veth, link_delete, veth_add
from netlink.rtnl import Rtnl

TBF = Tbf(rate=20_000_000, burst=65_536, limit=200_000)


@pytest.fixture
def rtnl(namespaces: Callable[[], str]) -> Iterator[Rtnl]:
    """A socket in a namespace that the test is moved into, with interfaces `left` and `right`."""
    home = netns.path("/proc/thread-self/ns/net")
    with netns.opened(home) as fd:
        try:
            with netns.opened(namespaces()) as there:
                netns.enter(there)
            with Rtnl() as socket_:
                socket_.commit(veth_add(Veth("left", "right")))
                yield socket_
                socket_.commit(link_delete("left"))
        finally:
            netns.enter(fd)


def left() -> int:
    return socket.if_nametoindex("left")


def shown() -> list[dict[str, Any]]:
    """Return what `tc` says of `left`."""
    done = subprocess.run(["tc", "-j", "qdisc", "show", "dev", "left"], check=True, capture_output=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "tbf",
    [
        TBF,
        Tbf(rate=1_000_000_008, burst=12_345_678, limit=1),
        Tbf(rate=8, burst=1_600, limit=262_144),
        Tbf(rate=1_000_000, burst=536_870_911, limit=262_144),
        Tbf(rate=34_359_738_360, burst=200_000_000, limit=MAX_32),
        Tbf(rate=34_359_738_368, burst=200_000_000, limit=MAX_32),
        Tbf(rate=400_000_000_000, burst=MAX_32, limit=MAX_32),
        Tbf(rate=1_000_000_000_000_000, burst=MAX_32, limit=MAX_32),
    ],
    ids=lambda tbf: f"{tbf.rate}-{tbf.burst}",
)
def test_a_filter_is_read_back_as_it_was_set(rtnl: Rtnl, tbf: Tbf) -> None:
    """From a byte a second to more than 32 bits can tell, with bursts of more than the kernel's 274 s."""
    rtnl.commit(tbf_replace(left(), tbf))
    found = tbfs(rtnl)
    assert set(found) == {left()}
    assert tbf.is_like(found[left()]), found
    assert found[left()].rate == tbf.rate


def test_tc_shows_the_same_rate_and_burst(rtnl: Rtnl) -> None:
    rtnl.commit(tbf_replace(left(), TBF))
    (qdisc,) = shown()
    options = qdisc["options"]
    assert (qdisc["kind"], qdisc["root"], options["rate"]) == ("tbf", True, TBF.rate // 8)
    assert abs(options["burst"] - TBF.burst) <= 1
    assert options["lat"] == pytest.approx((TBF.limit - TBF.burst) / (TBF.rate / 8) * 1e6, rel=0.01)


@pytest.mark.parametrize(
    "other",
    [
        Tbf(rate=TBF.rate + 8, burst=TBF.burst, limit=TBF.limit),
        Tbf(rate=TBF.rate, burst=TBF.burst + 8, limit=TBF.limit),
        Tbf(rate=TBF.rate, burst=TBF.burst - 8, limit=TBF.limit),
        Tbf(rate=TBF.rate, burst=TBF.burst, limit=TBF.limit + 1),
    ],
)
def test_another_rate_burst_or_limit_is_not_alike(rtnl: Rtnl, other: Tbf) -> None:
    rtnl.commit(tbf_replace(left(), other))
    assert not TBF.is_like(tbfs(rtnl)[left()])


def test_a_filter_is_changed_in_place_so_that_no_waiting_packet_is_lost(rtnl: Rtnl) -> None:
    rtnl.commit(tbf_replace(left(), TBF))
    (before,) = shown()
    rtnl.commit(tbf_replace(left(), Tbf(80_000_000, 100_000, 300_000)))
    (after,) = shown()
    assert after["handle"] == before["handle"]
    assert (after["options"]["rate"], after["options"]["burst"]) == (10_000_000, 100_000)


def test_another_root_qdisc_is_replaced(rtnl: Rtnl) -> None:
    subprocess.run(["tc", "qdisc", "add", "dev", "left", "root", "handle", "1:", "htb"], check=True)
    assert tbfs(rtnl) == {}
    rtnl.commit(tbf_replace(left(), TBF))
    assert TBF.is_like(tbfs(rtnl)[left()])


def test_only_root_filters_are_told_each_with_its_interface(rtnl: Rtnl) -> None:
    right = socket.if_nametoindex("right")
    fast = Tbf(rate=80_000_000, burst=100_000, limit=300_000)
    rtnl.commit(tbf_replace(right, fast))
    for command in (
        "tc qdisc add dev left root handle 1: htb",
        "tc class add dev left parent 1: classid 1:1 htb rate 1mbit",
        "tc qdisc add dev left parent 1:1 tbf rate 1mbit burst 10k limit 100k",
    ):
        subprocess.run(command.split(), check=True)
    found = tbfs(rtnl)
    assert set(found) == {right}
    assert fast.is_like(found[right])


def test_a_removed_filter_leaves_none_and_removing_it_again_says_it_is_gone(rtnl: Rtnl) -> None:
    rtnl.commit(tbf_replace(left(), TBF))
    rtnl.commit(qdisc_delete(left()))
    assert tbfs(rtnl) == {}
    with pytest.raises(NetlinkError, match=rf"^cannot remove the qdisc of interface {left()}: ") as failure:
        rtnl.commit(qdisc_delete(left()))
    assert failure.value.gone


def test_an_interface_that_is_not_there_is_named_with_the_rate(rtnl: Rtnl) -> None:
    with pytest.raises(NetlinkError, match=r"^cannot limit interface 9999 to 20000000 bit/s: ") as failure:
        rtnl.commit(tbf_replace(9999, TBF))
    assert failure.value.gone
