"""Two network namespaces with a veth between them, and what the tests on it need."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from netlink import netns
from netlink.conntrack import Conntrack
from netlink.requests import Request, Veth, address_add, link_up, veth_add
from netlink.rtnl import Rtnl

T = TypeVar("T")
DEADLINE = 10
MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"
MTU = 1500


@dataclass(frozen=True, slots=True)
class End:
    """One namespace, and its interface in it."""

    netns: str
    ifname: str
    index: int

    def commit(self, *requests: Request) -> None:
        def work() -> None:
            with Rtnl() as rtnl:
                rtnl.commit(*requests)

        netns.run(self.netns, work)


def join(namespaces: Callable[[], str], left: str, right: str) -> tuple[End, End]:
    """Make two namespaces and a veth between them: `left` 10.0.0.1 and fd00::1, `right` the same with 2."""
    here, there = namespaces(), namespaces()

    def make() -> int:
        with Rtnl() as rtnl, netns.opened(there) as fd:
            rtnl.commit(veth_add(Veth(left, right, *MACS, peer_netns=fd, mtu=MTU)))
        return socket.if_nametoindex(left)

    ends = (
        End(here, left, netns.run(here, make)),
        End(there, right, netns.run(there, socket.if_nametoindex, right)),
    )
    for number, end in enumerate(ends, start=1):
        lo = netns.run(end.netns, socket.if_nametoindex, "lo")
        addresses = (f"10.0.0.{number}/24", f"fd00::{number}/64")
        end.commit(link_up(lo), link_up(end.index), *(address_add(end.index, a) for a in addresses))
    return ends


def wait_until(good: Callable[[], bool], what: str) -> None:
    """Look until something holds, for `DEADLINE` seconds at most."""
    deadline = time.monotonic() + DEADLINE
    while not good():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"


def with_conntrack(name: str, work: Callable[[Conntrack], T]) -> T:
    """Run something in a namespace with a connection tracking socket."""

    def opened() -> T:
        with Conntrack() as conntrack:
            return work(conntrack)

    return netns.run(name, opened)
