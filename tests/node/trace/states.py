"""Handmade states of two nodes, for tests of the walk: no kernel, no rules but those that a test adds.

node1  192.168.50.11  pod a 10.244.1.2 on pwpoda, pod b 10.244.1.3 on pwpodb
node2  192.168.60.12  pod c 10.244.2.2 on pwpodc; by VXLAN from node1
router 192.168.50.1, 192.168.60.1
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from netlink.attributes import attribute, nested
from netlink.decode import Address, Link
from netlink.entries import Neighbour
from netlink.family import Family
from netlink.requests import Vxlan
from node.trace.nft import Base, Chain, Expr, Rule, Table
from node.trace.packet import Packet
from node.trace.path import World
from node.trace.state import LOCAL, UNICAST, PodPlace, Policy, Remote, State, Way

V4 = Family.V4
MAC = "02:00:00:00:00:02"
POLICIES = (Policy(0, 255), Policy(32766, 254), Policy(32767, 253))
SYSCTLS = {"ipv4/ip_forward": "1"}


def link(index: int, name: str, kind: str = "veth", **more: Any) -> Link:
    """Return an interface that is up."""
    fields = {"mac": "02:00:00:00:00:01", "mtu": 1500, "up": True, "master": None, "peer_index": None}
    return Link(index=index, name=name, kind=kind, **{**fields, **more})


def own(address: str, index: int) -> Way:
    """Return the route of the local table for an address."""
    return Way(f"{address}/32", LOCAL, 255, oif=index)


def route(destination: str, index: int, gateway: str = "", **more: Any) -> Way:
    """Return a route of the main table."""
    return Way(destination, UNICAST, 254, gateway, index, **more)


def _tunnel(local: str) -> Link:
    return link(9, "pwvxlan4", "vxlan", mtu=1450, vxlan=Vxlan("pwvxlan4", 112, 8472, local, MAC, 1450))


NODE1 = State(
    "node1",
    V4,
    (link(1, "lo", ""), link(2, "eth0"), link(3, "pwpoda"), link(4, "pwpodb"), _tunnel("192.168.50.11")),
    (Address(2, "192.168.50.11/24"), Address(9, "10.244.1.0/32")),
    (
        own("192.168.50.11", 2),
        own("10.244.1.0", 9),
        route("192.168.50.0/24", 2),
        route("0.0.0.0/0", 2, "192.168.50.1"),
        route("10.244.1.2/32", 3),
        route("10.244.1.3/32", 4),
        route("10.244.2.0/24", 9, "10.244.2.0", mtu=1450),
    ),
    POLICIES,
    (Neighbour(9, "10.244.2.0", MAC, 128),),
    (Remote(9, MAC, "192.168.60.12"),),
    sysctls=SYSCTLS,
    pods=(PodPlace("shop/a", "pwpoda", ("10.244.1.2",)), PodPlace("shop/b", "pwpodb", ("10.244.1.3",))),
)
NODE2 = State(
    "node2",
    V4,
    (link(1, "lo", ""), link(2, "eth0"), link(3, "pwpodc"), _tunnel("192.168.60.12")),
    (Address(2, "192.168.60.12/24"), Address(9, "10.244.2.0/32")),
    (
        own("192.168.60.12", 2),
        own("10.244.2.0", 9),
        route("0.0.0.0/0", 2, "192.168.60.1"),
        route("192.168.60.0/24", 2),
        route("10.244.2.2/32", 3),
        route("10.244.1.0/24", 9, "10.244.1.0"),
    ),
    POLICIES,
    sysctls=SYSCTLS,
    pods=(PodPlace("shop/c", "pwpodc", ("10.244.2.2",)),),
)
ROUTER = State(
    "router",
    V4,
    (link(1, "lo", ""), link(2, "lan0"), link(3, "lan1")),
    (Address(2, "192.168.50.1/24"), Address(3, "192.168.60.1/24")),
    (
        own("192.168.50.1", 2),
        own("192.168.60.1", 3),
        route("192.168.50.0/24", 2),
        route("192.168.60.0/24", 3),
    ),
    POLICIES,
    sysctls=SYSCTLS,
)
OWNERS = {
    "192.168.50.11": "node1",
    "192.168.60.12": "node2",
    "192.168.50.1": "router",
    "192.168.60.1": "router",
}


def world(*states: State, **more: Any) -> World:
    """Return the world of some states, of IPv4 only."""
    known = {s.node: s for s in states or (NODE1, NODE2, ROUTER)}
    return World(
        lambda name, family: known.get(name) if family is V4 else None, lambda a: OWNERS.get(a, ""), **more
    )


def packet(source: str = "10.244.1.2", destination: str = "10.244.1.3", **more: Any) -> Packet:
    """Return a packet, of pod a to pod b, to TCP port 80, if nothing else is said."""
    fields = {"dport": 80, "iif": "pwpoda"}
    return Packet(V4, 6, source, destination, **{**fields, **more})


def table(
    name: str, hook: int, *rules: Rule, kind: str = "filter", priority: int = 0, drops: bool = False
) -> Table:
    """Return a table of IPv4 with one base chain, named "c"."""
    return Table(2, name, {"c": Chain("c", Base(kind, hook, priority, drops), rules)}, {})


def rule(*expressions: Expr, comment: str = "", handle: int = 1) -> Rule:
    """Return a rule."""
    return Rule(handle, expressions, comment)


def do(code: int) -> Expr:
    """Return the expression for a verdict."""
    return Expr("immediate", {1: bytes(4), 2: nested(2, attribute(1, struct.pack(">i", code)))})


def with_tables(state: State, *tables: Table) -> State:
    """Return a state with rules."""
    return replace(state, tables=tables)
