"""Rules as iptables-save prints them, and the input of iptables-restore. Pure.

A rule is its line without "-A CHAIN": what is there and what is wanted are compared as text. Both variants
print alike what stands here; where a version did not, its chains would be written anew by each `load`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from netlink.family import Family
from proxy.iptables.names import TABLES, ChainId

Rules = tuple[str, ...]
Chains = Mapping[ChainId, Rules]

MASQUERADE_MARK = 0x4000
LONGEST_COMMENT = 255
"""linux/netfilter/xt_comment.h, without the byte that ends it."""
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPED = re.compile(r"([\"'\\])")
_PROBABILITY_ONE = 0x80000000
"""linux/netfilter/xt_statistic.h keeps a probability in 31 bits."""


def rule(*parts: str) -> str:
    """Join the parts of a rule that are not empty."""
    return " ".join(filter(None, parts))


def comment(text: str) -> str:
    """Match every packet, and say something to people."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    while len(shown.encode()) > LONGEST_COMMENT:
        shown = shown[:-1]
    quoted = shown if _PLAIN.fullmatch(shown) else '"' + _ESCAPED.sub(r"\\\1", shown) + '"'
    return f"-m comment --comment {quoted}"


def host(family: Family, address: str) -> str:
    """Write an address as a range."""
    return f"{address}/{family.bits}"


def within(option: str, cidr: str) -> str:
    """Match an address (option -s or -d) in a range; everybody's is not written."""
    return "" if cidr.endswith("/0") else f"{option} {cidr}"


def probability(endpoints: int) -> str:
    """Match one packet of some, by chance; all if it is one.

    As kube-proxy writes it ("%0.10f"), and the kernel rounds it.
    """
    if endpoints == 1:
        return ""
    kept = round(float(f"{1 / endpoints:.10f}") * _PROBABILITY_ONE)
    return f"-m statistic --mode random --probability {kept / _PROBABILITY_ONE:.11f}"


def recent(family: Family, action: str, name: str) -> str:
    """Ask (`--rcheck …`) or tell (`--set`) a list of clients by its name (xt_recent)."""
    mask = "255.255.255.255" if family is Family.V4 else "ffff:" * 7 + "ffff"
    return f"-m recent {action} --name {name} --mask {mask} --rsource"


def reject(family: Family, protocol: str = "") -> str:
    """Refuse a packet: TCP by a reset, anything else by ICMP.

    kube-proxy has ICMP for TCP too. Linux clients take it for a hint while they connect: in IPv6 they try
    again for one to three seconds before they give up.
    """
    icmp = "icmp" if family is Family.V4 else "icmp6"
    return f"-j REJECT --reject-with {'tcp-reset' if protocol == 'tcp' else f'{icmp}-port-unreachable'}"


def joined(family: Family, cidrs: Iterable[str]) -> tuple[str, ...]:
    """Return the fewest ranges that hold the same addresses as those of a family among `cidrs`, in order."""
    af, bits, wanted = family.af, family.bits, family is Family.V6
    spans = []
    for cidr in cidrs:
        if (":" in cidr) is wanted:
            address, _, length = cidr.partition("/")
            start = int.from_bytes(socket.inet_pton(af, address), "big")
            spans.append((start, start + (1 << bits - int(length or bits))))
    whole: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return tuple(cidr for start, end in whole for cidr in _cidrs(family, start, end))


def without(family: Family, cidr: str, hole: str) -> tuple[str, ...]:
    """Return the ranges that hold the addresses of one range and not those of another in it."""
    (start, end), (first, last) = (_span(family, c) for c in (cidr, hole))
    return (
        *_cidrs(family, start, max(start, min(end, first))),
        *_cidrs(family, min(end, max(start, last)), end),
    )


def _span(family: Family, cidr: str) -> tuple[int, int]:
    address, _, length = cidr.partition("/")
    start = int.from_bytes(socket.inet_pton(family.af, address), "big")
    return start, start + (1 << family.bits - int(length))


def _cidrs(family: Family, start: int, end: int) -> Iterator[str]:
    """Yield the ranges from one address up to, not including, another."""
    while start < end:
        size = min(start & -start or 1 << family.bits, 1 << (end - start).bit_length() - 1)
        address = socket.inet_ntop(family.af, start.to_bytes(family.size, "big"))
        yield f"{address}/{family.bits - size.bit_length() + 1}"
        start += size


class Jump(NamedTuple):
    """A rule of a built-in chain that leads to one of ours."""

    table: str
    chain: str
    rule: str
    to: str


class Edit(NamedTuple):
    """What is to be changed: chains to write and to remove, jumps to take out and to put on top, in order."""

    written: Chains
    removed: Sequence[ChainId] = ()
    jumps_out: Sequence[Jump] = ()
    jumps_in: Sequence[Jump] = ()


def restore_text(edit: Edit) -> str:
    """Return the input of iptables-restore --noflush; a table of which nothing changes is not in it.

    A chain that goes is emptied first: what led to it is gone when the last line takes it away.
    """
    lines: list[str] = []
    for table in TABLES:
        written = {c.name: rules for c, rules in edit.written.items() if c.table == table}
        removed = [c.name for c in edit.removed if c.table == table]
        out, put = ([j for j in jumps if j.table == table] for jumps in (edit.jumps_out, edit.jumps_in))
        if not (written or removed or out or put):
            continue
        lines.append(f"*{table}")
        lines += [f":{name} - [0:0]" for name in (*written, *removed)]
        lines += [f"-A {name} {one}" for name, rules in written.items() for one in rules]
        lines += [f"-D {jump.chain} {jump.rule}" for jump in out]
        lines += [f"-I {jump.chain} {jump.rule}" for jump in reversed(put)]
        lines += [f"-X {name}" for name in removed]
        lines.append("COMMIT")
    return "\n".join([*lines, ""])
