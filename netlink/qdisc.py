"""The token bucket filter of an interface, as requests for `Rtnl.commit` and as a value read back.

A tbf lets `burst` bytes pass at line speed, then `rate`; up to `limit` bytes wait for their turn. It sees
what the interface sends, with Ethernet headers. A packet of more than `burst` bytes is lost, except one that
offloading made large: that is cut into segments first. Source: linux/pkt_sched.h, net/sched/sch_tbf.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netlink.attributes import attribute, nested, parsed, text
from netlink.messages import NLM_F_CREATE, NLM_F_REPLACE
from netlink.requests import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from netlink.rtnl import Rtnl

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TC_H_ROOT = 0xFFFFFFFF
TC_LINKLAYER_ETHERNET = 1

_QDISC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
_RATE = struct.Struct("=BBHhHI")  # struct tc_ratespec: cell log, link layer, overhead, align, mpu, bytes/s
_PARMS = struct.Struct("=12s12sIII")  # struct tc_tbf_qopt: rate, peak rate, limit, buffer in ticks, mtu
_HEADER_BYTES = 16  # struct nlmsghdr

TICK = 64
"""Nanoseconds in a tick, the unit in which the kernel reports a burst: the time it takes at the rate."""
MAX_32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Tbf:
    """A token bucket filter: `rate` in bits a second (whole bytes), `burst` and `limit` in bytes.

    The kernel reports a burst as ticks in 32 bits: rounded, and with 274 s at the rate taken off as often as
    that goes. `is_like` knows.
    """

    rate: int
    burst: int
    limit: int

    def is_like(self, found: Tbf) -> bool:
        """Whether what was read back is this, as far as the kernel's rounding lets one tell."""
        wrap = TICK << 32
        difference = (self._nanoseconds(self.burst) - self._nanoseconds(found.burst)) % wrap
        rounding = self._nanoseconds(2 + self.burst // 100_000) + 2 * TICK
        same = (self.rate, self.limit) == (found.rate, found.limit)
        return same and min(difference, wrap - difference) <= rounding

    def _nanoseconds(self, size: int) -> int:
        """Return how long `size` bytes take at the rate."""
        return size * 8_000_000_000 // self.rate


def tbf_replace(index: int, tbf: Tbf) -> Request:
    """Make a tbf the interface's root qdisc, or change the one that is: what it holds is not lost then.

    The kernel wants a table of transmission times (TCA_TBF_RTAB) only to guess the link layer from it; with
    the link layer said, it takes none (Linux 3.9 and later). The rate is sent a second time, in 64 bits,
    where 32 are too few (34 Gbit/s). With no handle given, any other root qdisc is replaced.
    """
    rate = tbf.rate // 8
    ratespec = _RATE.pack(0, TC_LINKLAYER_ETHERNET, 0, 0, 0, min(rate, MAX_32))
    options = attribute(TCA_TBF_PARMS, _PARMS.pack(ratespec, bytes(_RATE.size), tbf.limit, 0, 0))
    options += attribute(TCA_TBF_BURST, struct.pack("=I", tbf.burst))
    if rate > MAX_32:
        options += attribute(TCA_TBF_RATE64, struct.pack("=Q", rate))
    body = _QDISC.pack(0, index, 0, TC_H_ROOT, 0) + text(TCA_KIND, "tbf") + nested(TCA_OPTIONS, options)
    what = f"limit interface {index} to {tbf.rate} bit/s"
    return Request(what, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body)


def qdisc_delete(index: int) -> Request:
    """Give an interface its default qdisc back; one that has no other is an error that is `gone`."""
    body = _QDISC.pack(0, index, 0, TC_H_ROOT, 0)
    return Request(f"remove the qdisc of interface {index}", RTM_DELQDISC, 0, body)


def tbfs(rtnl: Rtnl) -> dict[int, Tbf]:
    """Return the root tbf of each interface that has one, by index.

    One dump for all: asked for a single interface, the kernel answers by multicast.
    """
    return parse_tbfs(rtnl.dump(RTM_GETQDISC, _QDISC.pack(0, 0, 0, 0, 0)))


def parse_tbfs(messages: Iterable[bytes]) -> dict[int, Tbf]:
    """Pick the root tbfs out of RTM_NEWQDISC messages, by interface index."""
    found: dict[int, Tbf] = {}
    for message in messages:
        _, index, _, parent, _ = _QDISC.unpack_from(message, _HEADER_BYTES)
        attributes = parsed(message, _HEADER_BYTES + _QDISC.size)
        if parent == TC_H_ROOT and attributes.get(TCA_KIND) == b"tbf\0":
            found[index] = _tbf(parsed(attributes[TCA_OPTIONS]))
    return found


def _tbf(options: dict[int, bytes]) -> Tbf:
    """Decode the options. The burst is told as the time it takes at the rate."""
    ratespec, _, limit, ticks, _ = _PARMS.unpack_from(options[TCA_TBF_PARMS])
    rate = int(_RATE.unpack(ratespec)[-1])
    if TCA_TBF_RATE64 in options:
        rate = int(struct.unpack("=Q", options[TCA_TBF_RATE64])[0])
    return Tbf(rate * 8, -(-ticks * TICK * rate // 1_000_000_000), limit)
