"""What the L7 proxy needs of the node's network: its addresses, and the way back of transparent connections.

- The addresses that HAProxy listens on (proxy.l7.places) are local, by routes to their ranges. No interface
  has them, so that none is ever a source by itself, or one of the node's addresses.
- While a service is transparent, endpoints answer to the client's own address, past the proxy. So the packets
  of these answers get a mark, and what has it is for this node, whosever address it has:

      endpoint ─▶ prerouting (mangle): answers to a transparent socket ▶ mark 0x2000     table `podwire_l7`
                  ip rule: what has the mark ▶ table 113
                  table 113: everything is local ▶ HAProxy

  On a bridge, pods answer each other's addresses directly. There the mark, which br_netfilter lets the same
  rule set, sends the frame to the node instead of the other pod:

      endpoint ─▶ podwire0: what has the mark ▶ to the bridge's own MAC        table `bridge podwire_l7`

The mark is no part of the way back that reverse path filtering looks for, unless src_valid_mark is set, as by
wg-quick: then answers are dropped (Documentation/networking/ip-sysctl; `obstacles` tells).

Our rules and routes carry a protocol number of their own (`ip rule show proto 113`), as those with the one of
routes to pods are compared by node.network.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from cni.wiring import BRIDGE, HOST_PREFIX
from netlink.attributes import attribute, parsed
from netlink.family import Family
from netlink.messages import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE
from netlink.nftables.batch import NftSocket
from netlink.nftables.expressions import (
    IP_CT_DIR_REPLY,
    Bitwise,
    Cmp,
    Compare,
    Constant,
    Ct,
    CtKey,
    Expression,
    Meta,
    MetaKey,
    MetaSet,
    PayloadSet,
    SocketTransparent,
)
from netlink.nftables.expressions import Base as Place
from netlink.nftables.objects import BRIDGE as FRAMES
from netlink.nftables.objects import PRIORITY_MANGLE, Base, Chain, Hook, Rule, Table, TableFamily
from netlink.nftables.operations import AddChain, AddRule, AddTable, DeleteTable, Operation
from netlink.requests import (
    FR_ACT_TO_TBL,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    FRA_TABLE,
    ROUTE,
    RT_SCOPE_HOST,
    RT_SCOPE_UNIVERSE,
    RTA_DST,
    RTA_OIF,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RULE,
    Request,
    routes_query,
)
from netlink.rtnl import RTN_LOCAL, Rtnl
from netlink.watch import RT_TABLE_LOCAL
from proxy.l7.places import RANGES, TRANSPARENT_MARK, TRANSPARENT_TABLE

Network = tuple[int, int, bytes]
"""What a route leads to: the family's number, the length of the prefix, the address; no address is all."""

LOOPBACK = 1
NAME = "podwire_l7"
TABLES: dict[TableFamily, Table] = {family: Table(family, NAME) for family in (*Family, FRAMES)}
PROTOCOL = 113
"""The number that our rule and route carry."""
FRA_FWMARK, FRA_FWMASK = 10, 16  # linux/fib_rules.h
CHAIN = "prerouting"
MARK = struct.pack("=I", TRANSPARENT_MARK)
BODY = 16  # where a message's own header begins, behind nlmsghdr
PROC = Path("/proc/sys/net/ipv4/conf")
BEHIND_BR_NETFILTER = 10
"""NF_BR_PRI_BRNF is 0 (linux/netfilter_bridge.h)."""


def ensure(families: Collection[Family], *, transparent: bool) -> None:
    """Have the addresses local, and, if a service is `transparent`, the way back; of these families only.

    What is right stays untouched; what somebody took is made again. Connections that were made transparently
    need the way back until they end. Raises NetlinkError.
    """
    with Rtnl() as rtnl:
        _ranges(rtnl, families)
        for family in Family:
            _way_back(rtnl, family, wanted=transparent and family in families)
        bridge = rtnl.link(BRIDGE) if transparent and families else None
    with NftSocket() as nft:
        for family in Family:
            _table(nft, TABLES[family], _packets() if transparent and family in families else ())
        _table(nft, TABLES[FRAMES], _frames(bridge.mac) if bridge else ())


def remove() -> None:
    """Take away all that `ensure` has made. Raises NetlinkError."""
    ensure((), transparent=False)


def obstacles(transparent: bool, proc: Path = PROC) -> tuple[str, ...]:
    """Return what keeps answers of transparent connections from the proxy, in sentences."""
    if not transparent:
        return ()
    found = sorted(p.parent.name for p in proc.glob("*/src_valid_mark") if p.read_text().strip() == "1")
    what = "answers to transparent services of the L7 proxy are dropped"
    return tuple(f"net.ipv4.conf.{name}.src_valid_mark is 1: {what}" for name in found)


def _ranges(rtnl: Rtnl, families: Collection[Family]) -> None:
    """Have the ranges of some families local, and not those of the others."""
    there = _local(rtnl, RT_TABLE_LOCAL)
    wanted = {_network(f, each[f]): f in families for each in RANGES.values() for f in Family}
    wrong = {network: to for network, to in wanted.items() if to is not (network in there)}
    _do(rtnl, *(_route(network, RT_TABLE_LOCAL, add=to) for network, to in wrong.items()))


def _way_back(rtnl: Rtnl, family: Family, *, wanted: bool) -> None:
    """Have the rule and the route of a family there, or not; the rule only while the route is."""
    requests = []
    everything = (family.af, 0, b"")
    if (everything in _local(rtnl, TRANSPARENT_TABLE)) is not wanted:
        requests.append(_route(everything, TRANSPARENT_TABLE, add=wanted))
    if _has_rule(rtnl, family) is not wanted:
        requests.insert(len(requests) if wanted else 0, _rule(family, add=wanted))
    _do(rtnl, *requests)


def _do(rtnl: Rtnl, *requests: Request) -> None:
    """Apply requests; what is there already, or gone, is as it is to be."""
    for request, failure in rtnl.attempt(*requests).items() if requests else ():
        if not (failure.exists if request.flags else failure.gone):
            raise failure


def _has_rule(rtnl: Rtnl, family: Family) -> bool:
    """Whether our rule is there."""
    wanted = parsed(_rule_attributes()).items()
    messages = (m for m in rtnl.dump(RTM_GETRULE) if m[BODY] == family.af)
    return any(wanted <= parsed(m, BODY + RULE.size).items() for m in messages)


def _local(rtnl: Rtnl, table: int) -> frozenset[Network]:
    """Return what our routes of a table make local."""
    found = set()
    for message in rtnl.dump(RTM_GETROUTE, routes_query(table, PROTOCOL)):
        af, bits, _, _, _, _, _, kind, _ = ROUTE.unpack_from(message, BODY)
        if kind == RTN_LOCAL:
            to = parsed(message, BODY + ROUTE.size).get(RTA_DST, b"")
            found.add((af, bits, to))
    return frozenset(found)


def _network(family: Family, cidr: str) -> Network:
    address, _, bits = cidr.partition("/")
    return family.af, int(bits), socket.inet_pton(family.af, address)


def _rule(family: Family, *, add: bool) -> Request:
    body = RULE.pack(family.af, 0, 0, 0, 0, FR_ACT_TO_TBL, 0) + _rule_attributes()
    what = f"{'add' if add else 'remove'} the {family.keyword} rule for mark {TRANSPARENT_MARK:#x}"
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Request(what, RTM_NEWRULE if add else RTM_DELRULE, flags if add else 0, body)


def _rule_attributes() -> bytes:
    table = struct.pack("=I", TRANSPARENT_TABLE)
    return (
        attribute(FRA_PRIORITY, table)
        + attribute(FRA_FWMARK, MARK)
        + attribute(FRA_FWMASK, MARK)
        + attribute(FRA_TABLE, table)
        + attribute(FRA_PROTOCOL, bytes([PROTOCOL]))
    )


def _route(network: Network, table: int, *, add: bool) -> Request:
    """Make a network local (`ip route add local … dev lo`), or take that away."""
    af, bits, to = network
    scope = RT_SCOPE_HOST if af == socket.AF_INET else RT_SCOPE_UNIVERSE
    body = ROUTE.pack(af, bits, 0, 0, table, PROTOCOL, scope, RTN_LOCAL, 0)
    body += attribute(RTA_DST, to) if to else b""
    body += attribute(RTA_OIF, struct.pack("=I", LOOPBACK))
    what = f"{'add' if add else 'remove'} a local route of table {table}"
    flags = NLM_F_CREATE | NLM_F_REPLACE
    return Request(what, RTM_NEWROUTE if add else RTM_DELROUTE, flags if add else 0, body)


def _table(nft: NftSocket, table: Table, wanted: tuple[Operation, ...]) -> None:
    """Have a table there as it is to be, or not at all."""
    comment = nft.table_comment(table)
    operations: list[Operation] = [] if comment is None else [DeleteTable()]
    if wanted:
        rules = tuple(o.rule.comment for o in wanted if isinstance(o, AddRule))
        if AddTable(comment or "") in wanted and nft.rules(table) == {CHAIN: rules}:
            return
        operations += wanted
    if operations:
        nft.commit((table, operations))


@functools.cache
def _packets() -> tuple[Operation, ...]:
    """Return what makes the table that marks answers to a transparent socket, in either family.

    Only answers: a listening transparent socket, somebody else's, may be for any address of its port, and so
    for packets that are to be forwarded.
    """
    return _structure(
        PRIORITY_MANGLE,
        *(Meta(MetaKey.L4PROTO), Cmp(Compare.EQ, bytes([socket.IPPROTO_TCP]))),
        *(Ct(CtKey.DIRECTION), Cmp(Compare.EQ, bytes([IP_CT_DIR_REPLY]))),
        *(SocketTransparent(), Cmp(Compare.EQ, b"\1")),
        *(Meta(MetaKey.MARK), Bitwise(bytes(b ^ 0xFF for b in MARK), MARK), MetaSet(MetaKey.MARK)),
    )


@functools.cache
def _frames(mac: str) -> tuple[Operation, ...]:
    """Return what makes the table that gives frames with the mark to the node, by the bridge's MAC.

    Behind br_netfilter, which lets IP's rules see frames, and before the bridge looks where they go.
    """
    return _structure(
        BEHIND_BR_NETFILTER,
        *(Meta(MetaKey.IIFNAME), Cmp(Compare.EQ, HOST_PREFIX.encode())),
        *(Meta(MetaKey.MARK), Bitwise(MARK, bytes(4)), Cmp(Compare.NEQ, bytes(4))),
        *(Constant(bytes.fromhex(mac.replace(":", ""))), PayloadSet(Place.LINK, 0, 6)),
        *(Constant(bytes(1)), MetaSet(MetaKey.PKTTYPE)),  # PACKET_HOST
    )


def _structure(priority: int, *expressions: Expression) -> tuple[Operation, ...]:
    """Return what makes a table with one chain and one rule."""
    base = Base("filter", Hook.PREROUTING, priority)
    rule = Rule(CHAIN, expressions, "answers to connections with a client's address")
    made = (AddChain(Chain(CHAIN, base)), AddRule(rule))
    digest = hashlib.sha256(repr(made).encode()).hexdigest()[:12]
    return (AddTable(f"the way back of transparent services; layout {digest}"), *made)


def kept(family: Family) -> Iterator[str]:
    """Yield what is there of a family, in words: for whoever takes it away. Raises NetlinkError."""
    with Rtnl() as rtnl:
        there = _local(rtnl, RT_TABLE_LOCAL)
        ranges = [each[family] for each in RANGES.values()]
        yield from (f"local route to {cidr}" for cidr in ranges if _network(family, cidr) in there)
        if _has_rule(rtnl, family):
            yield f"{family.keyword} rule {TRANSPARENT_TABLE}"
        if (family.af, 0, b"") in _local(rtnl, TRANSPARENT_TABLE):
            yield f"{family.keyword} route of table {TRANSPARENT_TABLE}"
    with NftSocket() as nft:
        for table in (TABLES[family], TABLES[FRAMES]):
            if nft.table_comment(table) is not None:
                yield f"table {table}"
