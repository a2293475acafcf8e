"""Read a node's network state from the kernel, in the calling thread's network namespace; change nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from socket import inet_ntop

from netlink import entries
from netlink.attributes import parsed
from netlink.conntrack import Conntrack
from netlink.decode import Link
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import ROUTE, RTM_GETROUTE, RTM_GETRULE, RULE, Route
from netlink.rtnl import Rtnl
from netlink.wireguard import NAME as WIREGUARD
from netlink.wireguard import WireGuard
from node.trace import iptables
from node.trace.nft import Reader, string
from node.trace.state import BRIDGED, PodPlace, Policy, Remote, Secured, State, Way

BODY = 16
KIND, FLAGS = BODY + 7, BODY + 8
RTNH_F_DEAD, RTA_MULTIPATH = 1, 9
FRA_DST, FRA_SRC, FRA_IIFNAME, FRA_GOTO, FRA_PRIORITY, FRA_FWMARK, FRA_SUPPRESS = 1, 2, 3, 4, 6, 10, 14
FRA_TABLE, FRA_FWMASK, FRA_OIFNAME = 15, 16, 17
FRA_OTHERS = {19: "l3mdev", 20: "uidrange", 22: "ipproto", 23: "sport", 24: "dport", 12: "tun_id"}
FIB_RULE_INVERT = 2
SYSCTLS = {
    Family.V4: ("ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv4/conf/all/route_localnet"),
    Family.V6: ("ipv6/conf/all/forwarding", "ipv6/conf/all/disable_ipv6"),
}
OF_LINKS = {
    Family.V4: ("ipv4/conf/{}/rp_filter", "ipv4/conf/{}/route_localnet", "ipv4/conf/{}/forwarding"),
    Family.V6: ("ipv6/conf/{}/forwarding", "ipv6/conf/{}/disable_ipv6"),
}
ROOT = Path("/proc/sys/net")


def read(node: str, family: Family, pods: Iterable[PodPlace] = ()) -> State:
    """Return the state of this namespace for a family; `pods` are those that are known to be on it.

    What cannot be read, as without root, is left out with a sentence in `missing`.
    """
    missing: list[str] = []
    with Rtnl() as rtnl:
        links = rtnl.links()
        addresses = rtnl.addresses()
        ways = tuple(
            w for m in rtnl.dump(RTM_GETROUTE, ROUTE.pack(family.af, *[0] * 8)) if (w := _way(m, family))
        )
        policies = tuple(
            p for m in rtnl.dump(RTM_GETRULE, RULE.pack(family.af, *[0] * 6)) if (p := policy(m, family))
        )
        neighbours = rtnl.neighbours()
        remotes = tuple(
            Remote(link.index, f.mac, f.address)
            for link in links
            if link.kind == "vxlan"
            for f in rtnl.forwarding(link.index)
        )
    try:
        with Conntrack() as conntrack:
            flows = conntrack.flows(family)
    except NetlinkError as error:
        flows = ()
        missing.append(f"connections: {error}")
    try:
        with Reader() as reader:
            tables = reader.tables(family)
    except NetlinkError as error:
        tables = ()
        missing.append(f"rules: {error}")
    tables, tables_of_iptables = iptables.read(family, tables, missing)
    secured = _secured([link for link in links if link.kind == WIREGUARD], missing)
    return State(
        node,
        family,
        links,
        addresses,
        ways,
        policies,
        neighbours,
        remotes,
        flows,
        _sysctls(family, [link.name for link in links]),
        tables,
        tuple(pods),
        tuple(missing),
        tables_of_iptables,
        iptables.remembered() if tables_of_iptables else {},
        secured,
    )


def _secured(links: Iterable[Link], missing: list[str]) -> tuple[Secured, ...]:
    """Return the ranges of the peers of WireGuard devices."""
    found: list[Secured] = []
    for link in links:
        try:
            with WireGuard() as kernel:
                device = kernel.device(link.name)
        except NetlinkError as error:
            missing.append(f"peers of {link.name}: {error}")
            continue
        for key, known in device.peers.items():
            to = known.peer.endpoint or ("", 0)
            found += [
                Secured(link.index, device.key, device.port, key, cidr, *to) for cidr in known.peer.allowed
            ]
    return tuple(found)


def _way(message: bytes, family: Family) -> Way | None:
    """Decode a route with its type; None for one that does not count now, or of the other family."""
    if entries.is_cached(message) or message[BODY] != family.af:
        return None
    found: Route | None = entries.route(message)
    flags = struct.unpack_from("=I", message, FLAGS)[0]
    if found is None or flags & RTNH_F_DEAD:
        return None
    attributes = parsed(message, BODY + ROUTE.size)
    return Way(
        found.destination,
        message[KIND],
        found.table,
        found.gateway or "",
        found.oif or 0,
        found.mtu,
        found.source,
        found.priority,
        _hops(attributes.get(RTA_MULTIPATH, b"")) or 1,
    )


def _hops(multipath: bytes) -> int:
    count = start = 0
    while start + 8 <= len(multipath):
        start += max(8, struct.unpack_from("=H", multipath, start)[0] + 3 & ~3)
        count += 1
    return count


def policy(message: bytes, family: Family) -> Policy | None:
    """Decode a policy rule; None for one of another family."""
    af, dst_bits, src_bits, _, table, action, flags = RULE.unpack_from(message, BODY)
    if af != family.af:
        return None
    found = parsed(message, BODY + RULE.size)

    def number(kind: int, default: int = 0) -> int:
        return int(struct.unpack("=I", found[kind])[0]) if kind in found else default

    def cidr(kind: int, bits: int) -> str:
        return f"{inet_ntop(family.af, found[kind])}/{bits}" if kind in found else ""

    suppress = number(FRA_SUPPRESS, 0xFFFFFFFF)
    mark = number(FRA_FWMARK)
    return Policy(
        number(FRA_PRIORITY),
        number(FRA_TABLE, table),
        action,
        cidr(FRA_SRC, src_bits),
        cidr(FRA_DST, dst_bits),
        string(found.get(FRA_IIFNAME, b"")),
        string(found.get(FRA_OIFNAME, b"")),
        mark,
        number(FRA_FWMASK, 0xFFFFFFFF if mark else 0),
        bool(flags & FIB_RULE_INVERT),
        -1 if suppress == 0xFFFFFFFF else suppress,
        number(FRA_GOTO),
        ", ".join(word for kind, word in FRA_OTHERS.items() if kind in found),
    )


def _sysctls(family: Family, interfaces: Iterable[str]) -> dict[str, str]:
    names = [*SYSCTLS[family], BRIDGED[family]]
    names += [pattern.format(i) for i in interfaces for pattern in OF_LINKS[family]]
    found = {}
    for name in names:
        try:
            found[name] = (ROOT / name).read_text().strip()
        except OSError:
            continue
    return found
