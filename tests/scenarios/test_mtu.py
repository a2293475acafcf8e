"""A segment that carries less than the others: what is too big is said to whoever sends it, and TCP fits."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.runtime import Pod
from lab.state import Lab
from lab.topology import Backend, Between, IpFamily, plan
from netlink import netns
from netlink.family import Family
from tests.scenarios.plain import reaches, running, shell

SECONDS = 8.0
USUAL, LESS = 1500, 1400
OVERHEAD = {Family.V4: 50, Family.V6: 70}
HEADERS = {Family.V4: 28, Family.V6: 48}
AMOUNT = 4 << 20

# linux/in.h, linux/in6.h
MTU = {Family.V4: (socket.IPPROTO_IP, 14), Family.V6: (socket.IPPROTO_IPV6, 24)}
MTU_DISCOVER = {Family.V4: (socket.IPPROTO_IP, 10), Family.V6: (socket.IPPROTO_IPV6, 23)}
PMTUDISC_DO = 2

Found = tuple[Lab, dict[str, Pod]]


@pytest.fixture(scope="module", params=[Backend.AUTO, Backend.DIRECT], ids=lambda backend: backend.value)
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    """Pods are made while all carries the same; then node3's segment carries less."""
    form = plan("mtu", ip_family=IpFamily.DUAL, between=Between(request.param))
    with running(form) as (lab, pods):
        set_mtu(lab, LESS)
        wanted = LESS - (50 if form.backend is Backend.AUTO else 0)
        shown = "ip route get 10.244.1.1; ip link show eth0; ip route show 10.244.1.0/24"
        assert reaches(lambda: f"mtu {wanted}" in shell(namespace_of(lab), shown), SECONDS)
        yield lab, pods


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("way", [("node1", "node3"), ("node3", "node1"), ("node2", "node1")])
def test_tcp_carries_megabytes_whoever_connects(found: Found, family: Family, way: tuple[str, str]) -> None:
    _, pods = found
    client, server = (pods[name] for name in way)
    with netns.run(server.netns, socket.create_server, (server.address(family), 0), family=family.af) as door:
        port = door.getsockname()[1]
        with netns.run(client.netns, socket.create_connection, (server.address(family), port), 5) as near:
            far = door.accept()[0]
            far.settimeout(5)
            with far:
                for sender, receiver in ((near, far), (far, near)):
                    assert carried(sender, receiver) == AMOUNT


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("way", [("node1", "node3"), ("node3", "node1")])
def test_a_datagram_that_is_too_big_is_told_with_what_fits(
    found: Found, family: Family, way: tuple[str, str]
) -> None:
    lab, pods = found
    sender, receiver = (pods[name] for name in way)
    fits = LESS - (OVERHEAD[family] if lab.plan.backend is Backend.AUTO else 0)
    with netns.run(sender.netns, socket.socket, family.af, socket.SOCK_DGRAM) as one:
        one.setsockopt(*MTU_DISCOVER[family], PMTUDISC_DO)
        one.connect((receiver.address(family), 9))
        assert reaches(lambda: too_big(one, fits - HEADERS[family] + 1), SECONDS)
        assert one.getsockopt(*MTU[family]) == fits
        assert not too_big(one, fits - HEADERS[family])


@pytest.mark.parametrize("found", [Backend.AUTO], indirect=True, ids=lambda backend: backend.value)
def test_an_mtu_that_changes_is_followed(found: Found) -> None:
    """Direct routes have none of their own: the interface's counts."""
    lab, _ = found
    for mtu in (USUAL, LESS):
        set_mtu(lab, mtu)
        for family, cidr in ((Family.V4, "10.244.1.0/24"), (Family.V6, "fd00:10:244:1::/64")):
            shown = f"ip -{family.value} route show {cidr}; ip link show pwvxlan{family.value}"
            wanted = f"mtu {mtu - OVERHEAD[family]}"
            assert reaches(lambda: shell(namespace_of(lab), shown).count(wanted) == 2, SECONDS)  # noqa: B023


def namespace_of(lab: Lab) -> str:
    """The namespace of the node whose segment carries less."""
    return lab.plan.node("node3").namespace


def set_mtu(lab: Lab, mtu: int) -> None:
    shell(lab.plan.router, f"ip link set node3 mtu {mtu}; ip link set lan1 mtu {mtu}")
    shell(namespace_of(lab), f"ip link set eth0 mtu {mtu}")


def carried(sender: socket.socket, receiver: socket.socket) -> int:
    """Send AMOUNT from one end of a connection and return how much arrives within the time-out."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(sender.sendall, os.urandom(1) * AMOUNT)
        got = 0
        while got < AMOUNT:
            got += len(receiver.recv(1 << 20))
        work.result()
    return got


def too_big(sender: socket.socket, size: int) -> bool:
    """Send a datagram that may not be cut; whether it is already known not to fit."""
    try:
        sender.send(bytes(size))
    except ConnectionRefusedError:  # nobody listens there: so it has arrived
        return False
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # what was told is told once more otherwise
        return True
    return False
