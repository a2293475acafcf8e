"""The check `kernel`: has it what podwire needs, tried for real in a network namespace of its own.

The namespace has no name, and ends with the thread that made it. A kernel that loads modules as they are
needed does so here as well, as it would for the daemon.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cni import tables as pod_tables
from netlink.conntrack import Conntrack
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import BatchError, NftSocket
from netlink.nftables.objects import Table
from netlink.nftables.operations import AddChain, AddMap, AddRule, Operation
from netlink.requests import (
    Request,
    Route,
    Veth,
    Vxlan,
    address_add,
    bridge_add,
    link_up,
    route_replace,
    veth_add,
    vxlan_add,
    wireguard_add,
)
from netlink.rtnl import Rtnl
from node import tunnel_rules
from node.doctor.findings import Check, Finding, Severity
from node.doctor.view import Context
from proxy.nftables import ruleset

NAME = "kernel"
BRIDGE_FILTERS = "sys/net/bridge/bridge-nf-call-iptables"
CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCETHTOOL, ETHTOOL_GTXCSUM = 0x8946, 0x16  # linux/sockios.h, ethtool.h
LEAST = (5, 9)
"""What docs/decisions.md and README.md ask for."""

CHECKSUMS = {(5, 7): 0, (5, 6): 13, (5, 4): 41, (4, 19): 123, (4, 14): 181}
"""Where packets that were translated twice keep a right UDP checksum inside VXLAN (kubernetes#88986): from
the last part of the version on, of each series, and in all later than the newest."""

MODULES = {
    "numgen": "nft_numgen",
    "fib": "nft_fib_ipv4 nft_fib_ipv6",
    "masq": "nft_masq",
    "nat": "nft_nat nft_chain_nat",
    "reject": "nft_reject_ipv4 nft_reject_ipv6",
    "ct": "nft_ct",
    "notrack": "nft_ct",
    "limit": "nft_limit",
    "dynset": "nf_tables",
    "rt": "nf_tables",
    "exthdr": "nf_tables",
}
"""The kernel's modules, by the name of an expression in a rule."""


@dataclass(frozen=True, slots=True)
class Try:
    """Something that was tried; `reason` says why it did not work, "" that it did; `modules` may lack."""

    what: str
    reason: str = ""
    modules: str = ""
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of the kernel. `tunnels`: podwire's VXLAN devices that leave checksums for later."""

    release: str
    tries: tuple[Try, ...]
    mode: str = "routed"
    bridge_filters: bool = True
    ipv6: bool = True
    ipv6_wanted: bool = False
    tunnels: tuple[str, ...] = ()
    untried: str = ""


def version(release: str) -> tuple[int, int, int]:
    """Return the numbers of a kernel release such as 5.4.0-42-generic."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def wrong_checksums(release: str) -> bool:
    """Whether a kernel of that release gets the checksums of what is in VXLAN wrong."""
    series, patch = version(release)[:2], version(release)[2]
    if series > max(CHECKSUMS):
        return False
    return patch < CHECKSUMS[series] if series in CHECKSUMS else True


def judge(seen: Observed) -> Check:
    """Return what podwire lacks."""
    findings = []
    if version(seen.release)[:2] < LEAST:
        words = f"the kernel is Linux {seen.release}, and podwire needs {LEAST[0]}.{LEAST[1]} or later"
        findings.append(Finding(words, "install a newer kernel, and boot it"))
    for one in seen.tries:
        if one.reason:
            remedy = f"modprobe -a {one.modules}" if one.modules else "use a kernel that has it"
            severity = Severity.ERROR if one.needed else Severity.WARNING
            findings.append(Finding(f"the kernel cannot {one.what}: {one.reason}", remedy, severity))
    if seen.mode == "bridge" and not seen.bridge_filters:
        words = "br_netfilter is not loaded, and pods on a bridge need it to reach services"
        findings.append(
            Finding(words, "modprobe br_netfilter; deploy/systemd/bridge.conf does it at each boot")
        )
    if seen.ipv6_wanted and not seen.ipv6:
        words = "the node's podCIDRs have IPv6, and IPv6 is off in the kernel"
        findings.append(Finding(words, "take ipv6.disable=1 off the kernel's command line"))
    if wrong_checksums(seen.release):
        for name in seen.tunnels:
            words = f"Linux {seen.release} sends wrong UDP checksums over {name} after translation"
            findings.append(Finding(words, f"ethtool -K {name} tx-checksum-ip-generic off"))
    notes = [seen.untried] if seen.untried else []
    if not seen.ipv6 and not seen.ipv6_wanted:
        notes.append("IPv6 is off in the kernel, and the node's podCIDRs have none")
    return Check(NAME, tuple(findings), tuple(notes))


def attempts(mode: str, ipv6: bool, secured: bool = False) -> Iterator[Try]:
    """Try in this network namespace, which has nothing in it, what podwire does elsewhere.

    `secured`: with WireGuard between nodes.
    """
    with Rtnl() as rtnl:
        yield _links(rtnl, "make veth pairs", "veth", veth_add(Veth("left", "right")))
        yield _links(
            rtnl,
            "make VXLAN devices over IPv4",
            "vxlan",
            vxlan_add(Vxlan("tunnel4", 112, 8472, "192.0.2.1", "02:00:00:00:00:01", 1450)),
        )
        if ipv6:
            far = Vxlan("tunnel6", 112, 8472, "2001:db8::1", "02:00:00:00:00:02", 1430)
            yield _links(rtnl, "make VXLAN devices over IPv6", "vxlan ip6_udp_tunnel", vxlan_add(far))
            yield _across(rtnl)
        if mode == "bridge":
            yield _links(rtnl, "make bridges", "bridge", bridge_add("bridge"))
        if secured:
            yield _links(rtnl, "make WireGuard devices", "wireguard", wireguard_add("tunnel", 1420))
    yield _conntrack()
    yield from _nftables(mode, ipv6)


def _links(rtnl: Rtnl, what: str, modules: str, *requests: Request) -> Try:
    try:
        rtnl.commit(*requests)
    except NetlinkError as error:
        return Try(what, os.strerror(error.errno or 0), modules)
    return Try(what)


def _across(rtnl: Rtnl) -> Try:
    """Try a route of IPv4 by an IPv6 gateway (Linux 5.2); needed where nodes have IPv6 addresses only."""
    what = "route IPv4 by an IPv6 gateway"
    link = rtnl.link("left")
    if link is None:
        return Try(what)
    route = Route("198.51.100.0/24", gateway="fe80::1", oif=link.index)
    far = socket.if_nametoindex("right")
    try:
        rtnl.commit(link_up(far), address_add(link.index, "192.0.2.1/24"), route_replace(route))
    except NetlinkError as error:
        return Try(what, os.strerror(error.errno or 0), needed=False)
    return Try(what)


def _conntrack() -> Try:
    what = "list and remove connections that it tracks"
    try:
        with Conntrack() as conntrack:
            conntrack.flows(Family.V4)
    except OSError as error:
        return Try(what, os.strerror(error.errno or 0), "nf_conntrack nf_conntrack_netlink")
    return Try(what)


def _nftables(mode: str, ipv6: bool) -> Iterator[Try]:
    """Try the tables themselves, each in a transaction of its own."""
    wanted: list[tuple[Table, Sequence[Operation]]] = []
    for family in Family if ipv6 else (Family.V4,):
        outer = tunnel_rules.Outer(8472)
        wanted += [
            (Table(family, ruleset.TABLE), ruleset.base(family)),
            (pod_tables.TABLES[family], pod_tables.structure(family)),
            (tunnel_rules.TABLES[family], tunnel_rules.structure(family, outer, True)),
        ]
    if mode == "bridge":
        frames = pod_tables.FAMILIES[-1]
        wanted.append((pod_tables.TABLES[frames], pod_tables.structure(frames)))
    try:
        with NftSocket() as nft:
            for table, operations in wanted:
                yield _table(nft, table, operations)
    except OSError as error:
        yield Try("speak nftables", os.strerror(error.errno or 0), "nf_tables")


def _table(nft: NftSocket, table: Table, operations: Sequence[Operation]) -> Try:
    what = f"load table {table} of nftables"
    try:
        nft.commit((table, operations))
    except BatchError as error:
        words = f"{what} ({error.operation})" if error.operation else what
        return Try(words, os.strerror(error.errno or 0), _modules(error.operation))
    return Try(what)


def _modules(operation: Operation | None) -> str:
    """Return the modules that may lack if an operation is refused."""
    match operation:
        case AddRule(rule):
            found = (MODULES[e.name].split() for e in rule.expressions if e.name in MODULES)
            return " ".join(dict.fromkeys(m for some in found for m in some))
        case AddMap():
            return "nf_tables"
        case AddChain(chain) if chain.base and chain.base.kind == "nat":
            return "nft_chain_nat"
    return "nf_tables"


def in_namespace(work: Callable[[], tuple[Try, ...]]) -> tuple[Try, ...]:
    """Run something in a new network namespace, which is gone afterwards. Raises what it raises, OSError."""
    found: list[tuple[Try, ...]] = []
    failures: list[Exception] = []

    def inside() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            found.append(work())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=inside, name="doctor-kernel")
    thread.start()
    thread.join()
    for failure in failures:
        raise failure
    return found[0]


def checksums_by_card(name: str) -> bool:
    """Whether an interface leaves checksums to be computed later (`ethtool -k`, tx-checksumming)."""
    value = array.array("I", [ETHTOOL_GTXCSUM, 0])
    request = struct.pack("16sP", name.encode(), value.buffer_info()[0]) + bytes(16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        try:
            fcntl.ioctl(opened, SIOCETHTOOL, request)
        except OSError:
            return False
    return bool(value[1])


def check(context: Context) -> Check:
    """Look at the kernel, and try."""
    view = context.view
    mode = view.mode if view else "routed"
    ipv6 = context.proc("thread-self/net/if_inet6").exists()
    tries: tuple[Try, ...] = ()
    untried = ""
    try:
        secured = bool(view and view.secured)
        tries = in_namespace(lambda: tuple(attempts(mode, ipv6, secured)))
    except OSError as error:
        untried = f"nothing was tried, as no network namespace can be made: {error.strerror}"
    tunnels = (name for _, name in socket.if_nameindex() if name.startswith("pwvxlan"))
    return judge(
        Observed(
            os.uname().release,
            tries,
            mode,
            context.proc(BRIDGE_FILTERS).exists(),
            ipv6,
            bool(view and any(":" in cidr for cidr in view.pod_cidrs)),
            tuple(name for name in tunnels if checksums_by_card(name)),
            untried,
        )
    )
