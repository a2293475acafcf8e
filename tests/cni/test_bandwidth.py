"""A pod receives and sends as much as it may, and not much more. Measured with iperf3."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from cni import tables
from cni.bandwidth import (
    BURST_BYTES,
    HEADER_BYTES,
    MAX_GUARD_RATE,
    MAX_MTU,
    QUEUE_BYTES,
    bucket,
    guard,
    host_problem,
    host_requests,
    pod_problem,
    pod_requests,
)
from cni.options import Bandwidth, Rate
from cni.rules import Rules
from cni.tables import PodRules
from netlink import netns
from netlink.nftables.expressions import LimitOver
from netlink.qdisc import MAX_32, Tbf, qdisc_delete, tbf_replace, tbfs
from netlink.requests import Request
from netlink.rtnl import Rtnl
from tests.netlink.joined import MTU, End, join

M = 1_000_000
UNKNOWN_BURST = (1 << 32) - 1
"""What containerd sends: the annotation has no burst."""
SECONDS = 2
TIMEOUT = 10
WITHIN = 0.70, 1.05
HOST = "10.0.0.1"


@dataclass(frozen=True, slots=True)
class Pod:
    """Both ends of a pod's veth, and what limits them."""

    host: End
    pod: End

    def limit(self, bandwidth: Bandwidth) -> None:
        """Set the limits, and none where there is none."""
        for end, requests in (
            (self.host, host_requests(self.host.index, bandwidth, MTU)),
            (self.pod, pod_requests(self.pod.index, bandwidth, MTU)),
        ):
            if end.index in limits(end):
                end.commit(qdisc_delete(end.index))
            end.commit(*requests)

    def spawn(self, end: End, *command: str) -> subprocess.Popen[str]:
        return netns.run(end.netns, lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    def measure(self, *options: str) -> dict[str, Any]:
        """Return what an iperf3 client in the pod reports at the end; it sends, unless `-R` is given."""
        server = self.spawn(self.host, "iperf3", "-s", "-1", "--forceflush")
        with ended(server):
            assert server.stdout
            assert any("listening" in line for line in server.stdout), "the server does not listen"
            command = ("iperf3", "-J", "-c", HOST, "-t", str(SECONDS), *options)
            client = self.spawn(self.pod, *command)
            with ended(client):
                report, _ = client.communicate(timeout=10 * SECONDS)
            answer: dict[str, Any] = json.loads(report)
            assert "error" not in answer, answer["error"]
            end: dict[str, Any] = answer["end"]
            return end


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let a process that we started end by itself, or end it if something went wrong."""
    try:
        yield
        process.wait(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def limits(end: End) -> dict[int, Tbf]:
    def read() -> dict[int, Tbf]:
        with Rtnl() as rtnl:
            return tbfs(rtnl)

    return netns.run(end.netns, read)


@pytest.fixture(scope="module")
def pod(namespaces: Callable[[], str]) -> Pod:
    return Pod(*join(namespaces, "pwpodhost", "eth0"))


BOTH = Bandwidth(ingress=Rate(20 * M, UNKNOWN_BURST), egress=Rate(80 * M, UNKNOWN_BURST))
WAYS = {"ingress": (("-R",), 20 * M), "egress": ((), 80 * M)}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_tcp_connection_gets_its_rate(pod: Pod, way: str) -> None:
    options, rate = WAYS[way]
    pod.limit(BOTH)
    goodput = pod.measure(*options)["sum_received"]["bits_per_second"] / rate
    assert WITHIN[0] <= goodput <= WITHIN[1]


@pytest.mark.parametrize("way", list(WAYS))
def test_udp_gets_its_rate_and_its_sender_waits_instead_of_losing_packets(pod: Pod, way: str) -> None:
    """On both ends here the sender is on the interface itself; a packet from afar is lost if it must be."""
    options, rate = WAYS[way]
    pod.limit(BOTH)
    found = pod.measure(*options, "-u", "-b", str(3 * rate))["sum"]
    assert WITHIN[0] <= found["bits_per_second"] / rate <= WITHIN[1]
    assert found["lost_percent"] < 10, "two thirds would be lost if the sender did not wait"


@pytest.mark.parametrize("way", list(WAYS))
def test_a_tiny_burst_costs_neither_rate_nor_the_packets_that_are_larger(pod: Pod, way: str) -> None:
    """Offloading makes packets of 64 kB: the filter cuts them into frames of the MTU, which must fit."""
    options, rate = WAYS[way]
    pod.limit(Bandwidth(ingress=Rate(20 * M, 1), egress=Rate(80 * M, 8)))
    goodput = pod.measure(*options)["sum_received"]["bits_per_second"] / rate
    assert WITHIN[0] <= goodput <= WITHIN[1]


def test_the_other_direction_is_not_limited(pod: Pod) -> None:
    pod.limit(Bandwidth(ingress=None, egress=Rate(20 * M, UNKNOWN_BURST)))
    assert pod.measure("-R")["sum_received"]["bits_per_second"] > 5 * 20 * M


@pytest.mark.parametrize("way", ["ingress", "egress"])
def test_a_burst_passes_at_line_speed_and_the_rest_at_the_rate(pod: Pod, way: str) -> None:
    """900 kB of a burst of 1 MB would take 7 s at 1 Mbit/s; what exceeds it by 100 kB takes most of one."""
    rate = Rate(1 * M, 8 * M)
    pod.limit(Bandwidth(ingress=rate, egress=None) if way == "ingress" else Bandwidth(None, rate))

    with netns.run(pod.host.netns, socket.create_server, (HOST, 0)) as listener:
        listener.settimeout(TIMEOUT)
        client = netns.run(pod.pod.netns, socket.create_connection, listener.getsockname(), TIMEOUT)
        server, _ = listener.accept()
        with client, server:
            ends = (server, client) if way == "ingress" else (client, server)
            assert seconds_for(900_000, *ends) < 2
            assert seconds_for(200_000, *ends) > 0.4


def seconds_for(size: int, sender: socket.socket, receiver: socket.socket) -> float:
    """Return how long so many bytes take from one to the other."""
    sender.setblocking(False)
    start = time.monotonic()
    unsent, missing = size, size
    while missing:
        readable, writable, _ = select.select([receiver], [sender] if unsent else [], [], TIMEOUT)
        assert readable or writable, f"nothing moves for {TIMEOUT} s"
        if writable:
            unsent -= sender.send(bytes(unsent))
        if readable:
            missing -= len(receiver.recv(missing))
    return time.monotonic() - start


# The guard.


def dropped(pod: Pod) -> int:
    """Return how many packets the guard dropped."""
    command = ["nft", "-j", "list", "chain", "ip", tables.NAME, "pod"]
    done = netns.run(pod.host.netns, lambda: subprocess.run(command, check=True, capture_output=True))
    rules = [item["rule"] for item in json.loads(done.stdout)["nftables"] if "rule" in item]
    (rule,) = (r for r in rules if "bandwidth" in r["comment"])
    return int(next(e["counter"]["packets"] for e in rule["expr"] if "counter" in e))


@pytest.fixture
def guarded(pod: Pod) -> Iterator[Pod]:
    bandwidth = Bandwidth(ingress=None, egress=Rate(20 * M, 1))
    rules = PodRules(pod.host.ifname, "", ("10.0.0.2",), egress=guard(bandwidth))
    pod.limit(bandwidth)
    with ExitStack() as stack:
        netns.run(pod.host.netns, stack.enter_context, Rules(list)).add(rules)
        yield pod
        command = ["nft", "delete", "table", "ip", tables.NAME]
        netns.run(pod.host.netns, lambda: subprocess.run(command, check=True))


@pytest.mark.parametrize("options", [(), ("-u", "-b", "60M", "-l", "100")], ids=["tcp", "udp"])
def test_the_guard_drops_nothing_of_what_the_pods_own_filter_lets_pass(
    guarded: Pod, options: tuple[str, ...]
) -> None:
    guarded.measure(*options)
    assert dropped(guarded) == 0


def test_a_pod_that_removes_its_filter_is_limited_by_the_guard(guarded: Pod) -> None:
    """Nftables lets one second at the rate pass beyond the burst: 3 s worth in 2 s, not 3 times as much."""
    guarded.pod.commit(qdisc_delete(guarded.pod.index))
    found = guarded.measure("-u", "-b", "200M")["sum"]
    received = found["bytes"] * (1 - found["lost_percent"] / 100)
    assert received * 8 < 20 * M * (SECONDS + 1) * 1.1
    assert dropped(guarded) > 0


# What is asked for.


@pytest.mark.parametrize(
    ("rate", "mtu", "expected"),
    [
        pytest.param(Rate(20 * M, 8 * M), 1500, Tbf(20 * M, M, QUEUE_BYTES), id="as asked"),
        pytest.param(Rate(20 * M, 1), 1500, Tbf(20 * M, 10_000, QUEUE_BYTES), id="4 ms at the rate"),
        pytest.param(Rate(M, 1), 1500, Tbf(M, 1522, QUEUE_BYTES), id="one frame"),
        pytest.param(Rate(M, 1), 9000, Tbf(M, 9022, QUEUE_BYTES), id="one jumbo frame"),
        pytest.param(Rate(M, 0), 1500, Tbf(M, BURST_BYTES, QUEUE_BYTES), id="no burst given"),
        pytest.param(
            Rate(20 * M, (1 << 31) - 1), 1500, Tbf(20 * M, 125_000, QUEUE_BYTES), id="kubelet's no burst"
        ),
        pytest.param(Rate(20 * M, UNKNOWN_BURST), 1500, Tbf(20 * M, 125_000, QUEUE_BYTES), id="containerd's"),
        pytest.param(Rate(20 * M, 1 << 35), 1500, Tbf(20 * M, 125_000, QUEUE_BYTES), id="CRI-O's"),
        pytest.param(Rate(1_000 * M, 0), 1500, Tbf(1_000 * M, 6_250_000, 6_250_000), id="50 ms at the rate"),
        pytest.param(Rate(1, 1), 1500, Tbf(8, 1522, QUEUE_BYTES), id="a byte a second at least"),
        pytest.param(Rate(1001, 1), 1500, Tbf(1000, 1522, QUEUE_BYTES), id="whole bytes"),
        pytest.param(Rate(10**15, 1), 1500, Tbf(10**15, MAX_32, MAX_32), id="all that 32 bits hold"),
    ],
)
def test_a_rate_becomes_a_filter_that_every_frame_fits(rate: Rate, mtu: int, expected: Tbf) -> None:
    assert bucket(rate, mtu) == expected


def test_nothing_is_asked_of_the_kernel_for_a_pod_without_limits() -> None:
    for bandwidth in (None, Bandwidth(None, None)):
        assert host_requests(7, bandwidth, MTU) == pod_requests(7, bandwidth, MTU) == []
        assert guard(bandwidth) is None


def test_ingress_is_limited_on_the_host_and_egress_in_the_pod() -> None:
    def request(rate: Rate) -> list[Request]:
        return [tbf_replace(7, bucket(rate, MTU))]

    fast, slow = Rate(80 * M, 8 * M), Rate(20 * M, 8 * M)
    assert host_requests(7, Bandwidth(fast, slow), MTU) == request(fast)
    assert pod_requests(7, Bandwidth(fast, slow), MTU) == request(slow)
    assert host_requests(7, Bandwidth(None, slow), MTU) == pod_requests(7, Bandwidth(fast, None), MTU) == []


@pytest.mark.parametrize(
    ("egress", "expected"),
    [
        (Rate(20 * M, 8 * M), LimitOver(2_500_000, M + BURST_BYTES)),
        (Rate(20 * M, 1), LimitOver(2_500_000, MAX_MTU + HEADER_BYTES + BURST_BYTES)),
        (Rate(MAX_GUARD_RATE * 8, 1), LimitOver(MAX_GUARD_RATE, 56_000_000 + BURST_BYTES)),
        (Rate(MAX_GUARD_RATE * 8, (1 << 31) - 2), LimitOver(MAX_GUARD_RATE, (1 << 28) - 1 + BURST_BYTES)),
        (Rate(MAX_GUARD_RATE * 8 + 8, 1), None),
    ],
)
def test_the_guard_has_the_same_rate_and_a_larger_burst(egress: Rate, expected: LimitOver | None) -> None:
    """As far as nftables counts: rate and burst together, in ns, must not exceed 64 bits."""
    found = guard(Bandwidth(None, egress))
    assert found == expected
    assert found is None or (found.rate + found.burst) * 1_000_000_000 < 1 << 64


def test_what_is_missing_or_different_is_said_in_a_sentence(pod: Pod) -> None:
    pod.limit(BOTH)
    ends = ((pod.host, host_problem, "received by", 20 * M), (pod.pod, pod_problem, "sent by", 80 * M))
    for end, problem, way, rate in ends:
        assert problem(limits(end), end.index, BOTH, MTU) == ""
        assert problem(limits(end), end.index, None, MTU) == "", "somebody else's limit is none of ours"
        end.commit(tbf_replace(end.index, Tbf(8_000, 2_000, QUEUE_BYTES)))
        assert problem(limits(end), end.index, BOTH, MTU) == (
            f"the limit on what is {way} the pod is 8000 bit/s with a burst of 2000 bytes, "
            f"not {rate} bit/s with {rate // 160} bytes"
        )
        end.commit(qdisc_delete(end.index))
        assert problem(limits(end), end.index, BOTH, MTU) == (
            f"the limit of {rate} bit/s on what is {way} the pod is missing"
        )
