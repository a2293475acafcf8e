"""What a pod may receive and send: the `bandwidth` capability as token bucket filters on its veth's ends.

    ingress (to the pod)    tbf on the host's end, where the pod cannot reach it
    egress (from the pod)   tbf on the pod's own end: its senders wait instead of losing packets
                            and, against a pod with NET_ADMIN that removes it, a policer on the host (`guard`)

A tbf counts Ethernet frames. Source: CNI conventions, "bandwidth" (rates in bits a second, bursts in bits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netlink.nftables.expressions import LimitOver
from netlink.qdisc import MAX_32, Tbf, tbf_replace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.options import Bandwidth, Rate
    from netlink.requests import Request

NO_BURST = (1 << 31) - 1
"""From here on, in bits, a burst means that the runtime knows of none, as it is with the annotation
`kubernetes.io/ingress-bandwidth`: kubelet sent 2^31-1, containerd sends 2^32-1, CRI-O 2^35-9. Taken at its
word, a pod limited to 10 Mbit/s could send at line speed for minutes' worth of its rate."""
BURST_TIME = 0.05
"""Seconds at the rate that a burst lasts which nobody asked for, `BURST_BYTES` at least."""
BURST_BYTES = 64 << 10
"""One packet as large as offloading makes them, so that it need not be cut."""
TIMER_TIME = 0.004
"""Seconds between two ticks of a kernel without high-resolution timers: less burst than this costs rate."""
MAX_MTU = 65535
HEADER_BYTES = 22
"""An Ethernet header and two VLAN tags: what a frame has beyond the MTU."""
QUEUE_TIME = 0.05
"""Seconds that a packet may wait on its way to the pod, or out of it."""
QUEUE_BYTES = 256 << 10
"""Bytes that may wait at any rate: more than a UDP socket's send buffer, so that a pod's own senders wait for
their turn instead of losing packets, and a few packets as large as offloading makes them."""
MAX_GUARD_RATE = 14_000_000_000
"""Bytes a second that an nftables limit can hold, with any burst: (rate + burst) in ns has 64 bits."""


def host_requests(index: int, bandwidth: Bandwidth | None, mtu: int) -> list[Request]:
    """Return what limits the host's end of a pod's veth (interface index there; MTU in bytes)."""
    rate = bandwidth.ingress if bandwidth else None
    return [tbf_replace(index, bucket(rate, mtu))] if rate else []


def pod_requests(index: int, bandwidth: Bandwidth | None, mtu: int) -> list[Request]:
    """Return what limits the pod's end (interface index in the pod; MTU in bytes)."""
    rate = bandwidth.egress if bandwidth else None
    return [tbf_replace(index, bucket(rate, mtu))] if rate else []


def guard(bandwidth: Bandwidth | None) -> LimitOver | None:
    """Return what the pod must not exceed; None when nothing limits it, or more than nftables can count.

    What the pod's tbf lets pass never exceeds this, whatever the MTU: same rate, a larger burst, and nftables
    adds a second at the rate to it. Nor does it count more of a packet than the tbf.
    """
    rate = bandwidth.egress if bandwidth else None
    if not rate:
        return None
    tbf = bucket(rate, MAX_MTU)
    if tbf.rate // 8 > MAX_GUARD_RATE:
        return None
    return LimitOver(tbf.rate // 8, min(tbf.burst + BURST_BYTES, MAX_32))


def bucket(rate: Rate, mtu: int) -> Tbf:
    """Return the filter for a rate.

    The burst is what was asked for, but never less than one frame, which could not pass at all, nor than
    what passes between two timer ticks.
    """
    size = max(rate.rate // 8, 1)
    asked = rate.burst // 8
    if not 0 < rate.burst < NO_BURST:
        asked = max(round(size * BURST_TIME), BURST_BYTES)
    burst = max(asked, round(size * TIMER_TIME), mtu + HEADER_BYTES)
    limit = max(round(size * QUEUE_TIME), QUEUE_BYTES)
    return Tbf(rate=size * 8, burst=min(burst, MAX_32), limit=min(limit, MAX_32))


def host_problem(tbfs: Mapping[int, Tbf], index: int, bandwidth: Bandwidth | None, mtu: int) -> str:
    """Say what is wrong with the limit on the host's end, in a sentence; "" if nothing is.

    `tbfs` is what `netlink.qdisc.tbfs` read there. A limit that podwire did not ask for is not wrong: a later
    plugin may have set it.
    """
    return _problem(tbfs.get(index), bandwidth.ingress if bandwidth else None, mtu, "received by")


def pod_problem(tbfs: Mapping[int, Tbf], index: int, bandwidth: Bandwidth | None, mtu: int) -> str:
    """Say what is wrong with the limit on the pod's end, as `host_problem` does."""
    return _problem(tbfs.get(index), bandwidth.egress if bandwidth else None, mtu, "sent by")


def _problem(found: Tbf | None, rate: Rate | None, mtu: int, way: str) -> str:
    if not rate:
        return ""
    wanted = bucket(rate, mtu)
    if found is None:
        return f"the limit of {wanted.rate} bit/s on what is {way} the pod is missing"
    if not wanted.is_like(found):
        return (
            f"the limit on what is {way} the pod is {found.rate} bit/s with a burst of {found.burst} bytes, "
            f"not {wanted.rate} bit/s with {wanted.burst} bytes"
        )
    return ""
