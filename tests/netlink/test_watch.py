"""What others change is told, what we change ourselves is not."""

from __future__ import annotations

import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink import netns
from netlink.messages import pack
from netlink.requests import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Request,
    Route,
    Rule,
    Veth,
    Vxlan,
    address_add,
    address_delete,
    fdb_delete,
    fdb_replace,
    link_up,
    neighbour_delete,
    neighbour_replace,
    route_delete,
    route_replace,
    rule_add,
    rule_delete,
    veth_add,
    vxlan_add,
)
from netlink.rtnl import Rtnl
from netlink.watch import Ours, Seen, Watch

PODS = "pwpod"
MAC, OTHER_MAC = "02:00:00:00:01:02", "02:00:00:00:01:03"
QUIET = Seen()


class World:
    """A node's namespace, entered: an interface, a tunnel, a pod's interface, all ours set, and a watch."""

    def __init__(self, rtnl: Rtnl, watch: Watch) -> None:
        self.rtnl, self.watch = rtnl, watch
        self.eth0, self.tunnel, self.pod = map(socket.if_nametoindex, ("eth0", "pwvxlan4", "pwpod1"))
        self.wanted = {(self.tunnel, MAC, "192.0.2.2")}
        self.peers = (
            Route("10.244.2.0/24", "10.244.2.0", self.tunnel, onlink=True, mtu=1450),
            Route("fd00:244:2::/64", "fd00:244:2::", self.tunnel, onlink=True, mtu=1450),
        )
        self.pods = (Route("10.244.1.5/32", oif=self.pod), Route("fd00:244:1::5/128", oif=self.pod))

    def commit(self, *requests: Request) -> Seen:
        """Apply changes of our own; return what the watch says."""
        self.rtnl.commit(*requests)
        return self.drain()

    def others(self, *commands: str) -> Seen:
        """Have the programs `ip` and `bridge` change something; return what the watch says."""
        for command in commands:
            subprocess.run(command.split(), check=True)
        return self.drain()

    def drain(self) -> Seen:
        """Read all notifications: the kernel sends them before it answers a request."""
        return self.watch.drain({self.rtnl.port}, {self.tunnel}, self.wanted)

    def settle(self) -> None:
        """Wait until the kernel has done by itself what it does when interfaces are new."""
        for _ in range(50):
            select.select([self.watch], [], [], 0.1)
            self.drain()
            local = {a.index for a in self.rtnl.addresses() if a.cidr.startswith("fe80:")}
            ready = all(self.rtnl.passes(link.index) for link in self.rtnl.links())
            if ready and {self.eth0, self.tunnel, self.pod} <= local:
                self.drain()
                return
        raise AssertionError("the interfaces do not pass packets or have no link-local addresses")


@pytest.fixture
def world(namespaces: Callable[[], str]) -> Iterator[World]:
    with ExitStack() as stack:
        home = stack.enter_context(open("/proc/thread-self/ns/net", "rb"))
        stack.callback(lambda: netns.enter(home.fileno()))
        with netns.opened(namespaces()) as fd:
            netns.enter(fd)
        rtnl = stack.enter_context(Rtnl())
        rtnl.commit(link_up(1), veth_add(Veth("eth0", "eth1")), veth_add(Veth("pwpod1", "pwpod1-peer")))
        rtnl.commit(*(link_up(socket.if_nametoindex(name)) for name in ("eth1", "pwpod1-peer")))
        rtnl.commit(vxlan_add(Vxlan("pwvxlan4", 112, 8472, "192.0.2.1", "02:00:00:00:01:01", 1450)))
        rtnl.commit(address_add(socket.if_nametoindex("eth0"), "192.0.2.1/24"))
        yield make(stack, rtnl)


def make(stack: ExitStack, rtnl: Rtnl) -> World:
    world = World(rtnl, stack.enter_context(Watch(PODS)))
    rtnl.commit(
        fdb_replace(world.tunnel, MAC, "192.0.2.2"),
        neighbour_replace(world.tunnel, "10.244.2.0", MAC),
        neighbour_replace(world.tunnel, "fd00:244:2::", MAC),
        *map(route_replace, (*world.peers, *world.pods)),
        rule_add(Rule("10.244.1.0/24", 112, 112)),
    )
    world.settle()
    return world


def test_our_own_changes_are_not_told(world: World) -> None:
    peer, far = Route("10.244.3.0/24", "10.244.3.0", world.tunnel, onlink=True), "192.0.2.3"
    assert (
        world.commit(route_replace(peer), neighbour_replace(world.tunnel, "10.244.3.0", OTHER_MAC)) == QUIET
    )
    world.wanted.add((world.tunnel, OTHER_MAC, far))
    assert world.commit(fdb_replace(world.tunnel, OTHER_MAC, far)) == QUIET
    assert world.commit(rule_add(Rule("10.9.0.0/24", 112, 112))) == QUIET
    assert world.commit(rule_delete(Rule("10.9.0.0/24", 112, 112))) == QUIET
    assert world.commit(*map(route_delete, (peer, *world.peers, *world.pods))) == QUIET
    assert world.commit(neighbour_delete(world.tunnel, "10.244.3.0")) == QUIET
    world.wanted.clear()
    assert (
        world.commit(fdb_delete(world.tunnel, OTHER_MAC, far), fdb_delete(world.tunnel, MAC, "192.0.2.2"))
        == QUIET
    )
    assert world.commit(address_add(world.eth0, "192.0.2.77/32")) == QUIET
    assert world.commit(address_delete(world.eth0, "192.0.2.77/32")) == QUIET


@pytest.mark.parametrize(
    ("command", "destination"),
    [
        ("ip route del 10.244.2.0/24", "10.244.2.0/24"),
        ("ip -6 route del fd00:244:2::/64", "fd00:244:2::/64"),
        ("ip route del 10.244.1.5", "10.244.1.5/32"),
        ("ip -6 route del fd00:244:1::5", "fd00:244:1::5/128"),
    ],
)
def test_a_route_of_ours_that_others_remove_is_lost(world: World, command: str, destination: str) -> None:
    assert world.others(command) == Seen(network=True, lost=frozenset({destination}))
    assert world.drain() == QUIET


@pytest.mark.parametrize(
    "command",
    [
        "ip route replace 10.244.2.0/24 dev eth0 proto 112",
        "ip -6 route replace fd00:244:2::/64 dev eth0 proto 112",
        "ip route replace 10.244.1.5 dev eth0",
        "ip route add 10.244.7.0/24 dev eth0",
        "ip -6 route add default via fe80::9 dev eth0",
        "ip route add 10.244.7.0/24 via inet6 fe80::9 dev eth0 proto bird",
        "ip route add default nexthop via 192.0.2.5 nexthop via 192.0.2.6",
        "ip rule del pref 112",
        "ip neigh replace 10.244.2.0 lladdr 02:00:00:00:00:09 dev pwvxlan4",
        "ip neigh del 10.244.2.0 dev pwvxlan4",
        "ip neigh del fd00:244:2:: dev pwvxlan4",
        "ip neigh flush dev pwvxlan4 nud permanent",
        f"bridge fdb del {MAC} dev pwvxlan4 dst 192.0.2.2",
        f"bridge fdb replace {MAC} dev pwvxlan4 dst 192.0.2.9",
        f"bridge fdb add {OTHER_MAC} dev pwvxlan4 dst 192.0.2.9",
        "ip link set pwvxlan4 down",
        "ip link set pwvxlan4 mtu 1400",
        "ip link set pwvxlan4 address 02:00:00:00:00:09",
        "ip link del pwvxlan4",
        "ip link set eth0 mtu 1400",
        "ip link set eth1 down",
        "ip link set eth0 down",
        "ip link add other0 type bridge",
        "ip addr add 192.0.2.9/24 dev eth0",
        "ip addr del 192.0.2.1/24 dev eth0",
        "ip addr add fd00:2::1/64 dev eth0",
    ],
)
def test_what_routes_depend_on_is_told(world: World, command: str) -> None:
    seen = world.others(command)
    assert (seen.network, seen.overrun) == (True, False)


@pytest.mark.parametrize(
    "command",
    [
        "ip route add 10.9.0.0/24 dev eth0 table 77",
        "ip route add 10.244.1.6 dev pwpod1 proto 112",
        "ip -6 route add fd00:244:1::6 dev pwpod1 proto 112",
        "ip route add 10.9.0.0/24 dev pwpod1",
        "ip route add 169.254.7.0/24 dev eth0",
        "ip rule add from 10.9.0.0/16 lookup 77",
        "ip neigh replace 192.0.2.5 lladdr 02:00:00:00:00:09 dev eth0",
        f"bridge fdb append {OTHER_MAC} dev eth0",
        "ip link set pwpod1 mtu 1400",
        "ip link add pwpod2 type bridge",
        "ip link del pwpod1",
        "ip addr add fe80::77/64 dev eth0 nodad",
    ],
)
def test_what_does_not_matter_is_not_told(world: World, command: str) -> None:
    assert world.others(command) == QUIET


def test_what_is_told_again_without_a_change_is_not_told(world: World) -> None:
    lifetimes = "ip addr change fd00:2::1/64 dev eth0 nodad valid_lft {} preferred_lft {}"
    assert world.others("ip addr add fd00:2::1/64 dev eth0 nodad").network
    assert world.others(lifetimes.format(2000, 1000)).network, "it is not for ever any more"
    assert world.others(lifetimes.format(3000, 2000)) == QUIET, "as after a router advertisement"
    assert world.others(lifetimes.format(3000, 0)).network, "it is deprecated"
    assert world.others("ip link set eth0 txqueuelen 77") == QUIET


def test_after_an_overrun_anything_may_have_changed(world: World) -> None:
    assert world.watch._socket
    world.watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    many = (Route(f"10.9.{i}.0/24", oif=world.eth0) for i in range(100))
    assert world.commit(*map(route_replace, many)) == Seen(network=True, overrun=True)
    assert world.drain() == QUIET
    assert world.others("ip link set eth0 up") == QUIET, "what there is has been read again"


def test_a_watch_is_ready_when_there_is_something_to_read(world: World) -> None:
    assert select.select([world.watch], [], [], 0)[0] == []
    subprocess.run(["ip", "route", "del", "10.244.2.0/24"], check=True)
    assert select.select([world.watch], [], [], 5)[0] == [world.watch]
    assert world.drain().lost
    assert select.select([world.watch], [], [], 0)[0] == []


def test_a_watch_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        Watch(PODS).drain((), ())


NEW = (RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH, RTM_NEWRULE)
GONE = (RTM_DELLINK, RTM_DELADDR, RTM_DELROUTE, RTM_DELNEIGH, RTM_DELRULE)


@given(st.sampled_from(NEW + GONE), st.sampled_from([0, 2, 7, 10]), st.binary(max_size=120))
def test_any_bytes_are_judged(kind: int, family: int, body: bytes) -> None:
    ours, lost = Ours((5,), range(1000), ()), set[str]()
    for message in (pack(kind, 0, 1, struct.pack("=B", family) + body), body):
        assert Watch(PODS)._matters(kind, message, ours, lost) in (True, False)
