"""Messages of IPVS: as pyroute2 has them, and as the kernel takes and tells them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest

from netlink import netns
from netlink.attributes import attribute, nested, parsed
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.ipvs import (
    ATTR_DEST,
    BODY,
    DEST_ACTIVE,
    DEST_FAMILY,
    DEST_INACTIVE,
    Command,
    Ipvs,
    IpvsError,
    Load,
    Real,
    Request,
    Schedule,
    Servers,
    Virtual,
    encode,
    real,
    server,
)
from netlink.messages import pack
from proxy.ipvs.fake import FakeIpvs
from tests.proxy.dataplanes import needs_ipvs
from tests.proxy.world import own

V4 = Virtual(Family.V4, socket.IPPROTO_TCP, "10.96.0.1", 443)
V6 = Virtual(Family.V6, socket.IPPROTO_UDP, "fd00:96::1", 53)
MARKED = Virtual(Family.V6, mark=0x70000007)
REALS = {Family.V4: Real("10.244.1.10", 8443), Family.V6: Real("fd00:10:244:1::10", 5353)}
STICKY = Schedule("wrr", 10800)


def _decoded(body: bytes) -> dict[str, object]:
    """Return a request as pyroute2 reads it: values by attribute."""
    from pyroute2.netlink.generic.ipvs import ipvsmsg

    message = ipvsmsg(pack(40, 0, 1, bytes((1, 1, 0, 0)) + body))
    message.decode()
    found: dict[str, object] = {}
    for _, inner in message["attrs"]:
        found |= dict(inner["attrs"])
    return found


@pytest.mark.parametrize("virtual", [V4, V6, MARKED], ids=str)
def test_pyroute2_reads_what_is_sent(virtual: Virtual) -> None:
    there = REALS[virtual.family]
    found = _decoded(encode(Request(Command.NEW_SERVICE, virtual, STICKY)))
    found |= _decoded(encode(Request(Command.NEW_DEST, virtual, real=there, weight=3)))
    assert found["IPVS_SVC_ATTR_AF"] == virtual.family.af
    if virtual.mark:
        assert found["IPVS_SVC_ATTR_FWMARK"] == virtual.mark
    else:
        assert found["IPVS_SVC_ATTR_PROTOCOL"] == virtual.protocol
        assert found["IPVS_SVC_ATTR_ADDR"] == virtual.address
        assert found["IPVS_SVC_ATTR_PORT"] == virtual.port
    assert found["IPVS_SVC_ATTR_SCHED_NAME"] == "wrr"
    assert found["IPVS_SVC_ATTR_FLAGS"] == {"flags": 1, "mask": 0xFFFFFFFF}
    assert found["IPVS_SVC_ATTR_TIMEOUT"] == 10800
    assert found["IPVS_DEST_ATTR_PORT"] == there.port
    assert found["IPVS_DEST_ATTR_FWD_METHOD"] == 0
    assert found["IPVS_DEST_ATTR_WEIGHT"] == 3


def test_a_server_is_read_as_it_is_sent() -> None:
    for virtual in (V4, V6, MARKED):
        body = encode(Request(Command.NEW_SERVICE, virtual, STICKY))
        assert server(bytes(BODY) + body) == (virtual, STICKY)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("order", ["as it is", "another", "without a family, as of an old kernel"])
def test_a_real_server_is_read_in_whatever_order(family: Family, order: str) -> None:
    virtual = V4 if family is Family.V4 else V6
    sent = parsed(encode(Request(Command.NEW_DEST, virtual, real=REALS[family], weight=3)))[ATTR_DEST]
    counts = [attribute(kind, bytes((kind, 0, 0, 0))) for kind in (DEST_ACTIVE, DEST_INACTIVE, 9)]
    own_family = attribute(DEST_FAMILY, bytes((family.af, 0)))
    statistics = nested(10, *(attribute(kind, bytes(8)) for kind in range(1, 11)))
    parts = [*counts, own_family, statistics]
    if order != "as it is":
        parts = [statistics, *counts, *([own_family] if order == "another" else [])]
    told = bytes(BODY) + nested(ATTR_DEST, sent, *parts)
    assert real(told, family) == (REALS[family], Load(3, DEST_ACTIVE, DEST_INACTIVE))


def test_a_kernel_without_it_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netlink.ipvs.Ipvs.NAME", "NO-IPVS")
    with (
        pytest.raises(NetlinkError, match=r"^cannot use IPVS: the kernel has none \(its module ip_vs\)$"),
        Ipvs(),
    ):
        pass


@pytest.mark.parametrize("which", ["fake", "kernel"])
def test_the_kernel_and_the_fake_take_and_refuse_the_same(which: str, namespaces: Callable[[], str]) -> None:
    if which == "fake":
        _contract(FakeIpvs())
        return
    needs_ipvs()

    def inside() -> None:
        own(["192.0.2.1"])  # without a local address, no address is one of a host to the kernel
        with Ipvs() as kernel:
            _contract(kernel)

    netns.run(namespaces(), inside)


def _contract(kernel: Servers) -> None:
    for virtual in (V4, V6, MARKED):
        there = REALS[virtual.family]
        other = Real(there.address, 9)
        assert kernel.reals(virtual) == {}
        kernel.commit([Request(Command.NEW_SERVICE, virtual, Schedule("rr"))])
        kernel.commit([Request(Command.NEW_DEST, virtual, real=r) for r in (there, other)])
        kernel.commit([Request(Command.SET_DEST, virtual, real=there, weight=0)])
        kernel.commit([Request(Command.SET_SERVICE, virtual, STICKY)])
        assert kernel.servers()[virtual] == STICKY
        assert kernel.reals(virtual) == {there: Load(0), other: Load(1)}
        _refused(kernel, Request(Command.NEW_SERVICE, virtual, STICKY), errno.EEXIST)
        _refused(kernel, Request(Command.NEW_DEST, virtual, real=there), errno.EEXIST)
        kernel.commit([Request(Command.DEL_DEST, virtual, real=there)])
        _refused(kernel, Request(Command.DEL_DEST, virtual, real=there), errno.ENOENT)
        _refused(kernel, Request(Command.SET_DEST, virtual, real=there), errno.ENOENT)
    assert set(kernel.servers()) == {V4, V6, MARKED}
    kernel.commit([Request(Command.DEL_SERVICE, v) for v in (V4, V6, MARKED)])
    _refused(kernel, Request(Command.DEL_SERVICE, V4), errno.ESRCH)
    _refused(kernel, Request(Command.NEW_DEST, V4, real=REALS[Family.V4]), errno.ESRCH)
    assert kernel.servers() == {}


def _refused(kernel: Servers, request: Request, code: int) -> None:
    """One of many is refused: it is named, and the others are made."""
    marks = [Virtual(Family.V4, mark=n) for n in range(1, 100)]
    others = [Request(Command.NEW_SERVICE, v, Schedule("rr")) for v in marks]
    with pytest.raises(IpvsError) as caught:
        kernel.commit([*others[:70], request, *others[70:]])
    assert (caught.value.errno, caught.value.request) == (code, request)
    assert set(marks) <= set(kernel.servers())
    kernel.commit([Request(Command.DEL_SERVICE, v) for v in marks])


def test_a_scheduler_that_the_kernel_has_not_is_named(namespaces: Callable[[], str]) -> None:
    needs_ipvs()

    def inside() -> None:
        with Ipvs() as kernel, pytest.raises(IpvsError, match="the kernel has no scheduler none-such"):
            kernel.commit([Request(Command.NEW_SERVICE, V4, Schedule("none-such"))])

    netns.run(namespaces(), inside)


@pytest.mark.parametrize("name", ["rr", "lc", "sh", "wrr"])
def test_the_kernel_has_the_schedulers_that_can_be_asked_for(
    name: str, namespaces: Callable[[], str]
) -> None:
    needs_ipvs()

    def inside() -> None:
        with Ipvs() as kernel:
            kernel.commit([Request(Command.NEW_SERVICE, V4, Schedule(name))])
            assert kernel.servers() == {V4: Schedule(name)}

    netns.run(namespaces(), inside)
