"""What expressions load of a packet: bytes, or None where the value cannot be known beforehand. Pure."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

from netlink.family import Family
from node.trace.nft import Expr
from node.trace.packet import Packet
from node.trace.rules import BaseChain, Surroundings

ETHERTYPES = {Family.V4: b"\x08\x00", Family.V6: b"\x86\xdd"}
STATE_INVALID, STATE_ESTABLISHED, STATE_NEW, STATE_UNTRACKED = 1, 2, 8, 64
TRACKING, CONNTRACK = (0, 3), -200
"""Where connection tracking sees packets first: its hooks, and its priority (NF_IP_PRI_CONNTRACK)."""
IPS_SRC_NAT, IPS_DST_NAT, IPS_CONFIRMED, IPS_SEEN_REPLY = 16, 32, 8, 2


class NoMatch(Exception):
    """An expression has nothing to load, so that the rule does not match."""


def payload(packet: Packet, base: int, offset: int, size: int) -> bytes | None:
    """Return bytes of the packet; of its headers only what is known of a first packet."""
    if base == 1:
        header: list[int | None] = [None] * 40
        family = packet.family
        header[0] = 0x45 if family is Family.V4 else 0x60
        header[9 if family is Family.V4 else 6] = packet.protocol
        for start, address in (
            (family.source_offset, packet.source),
            (family.destination_offset, packet.destination),
        ):
            header[start : start + family.size] = ip_address(address).packed
    elif base == 2:
        ports = struct.pack(">HH", packet.sport, packet.dport)
        header = [*(ports if packet.sport else (None, None, *ports[2:])), *[None] * 36]
        if packet.protocol == socket.IPPROTO_TCP and not packet.known:
            header[13] = 0x02
    else:
        return None
    part = header[offset : offset + size]
    known = [b for b in part if b is not None]
    return bytes(known) if len(known) == size else None


def meta(packet: Packet, around: Surroundings, key: int) -> bytes | None:
    """Return what `meta` loads."""
    match key:
        case 1:
            return ETHERTYPES[packet.family]
        case 2:
            return struct.pack("=I", packet.priority)
        case 3:
            return struct.pack("=I", packet.mark)
        case 4 | 5:
            return struct.pack("=I", around.index_of(packet.iif if key == 4 else packet.oif))
        case 6 | 7:
            return (packet.iif if key == 6 else packet.oif).encode().ljust(16, b"\0")
        case 15:
            return bytes([packet.family.af])
        case 16:
            return bytes([packet.protocol])
    return None


def conntrack(packet: Packet, at: BaseChain, key: int) -> bytes | None:
    """Return what `ct` loads; before connection tracking and without it there is but a state."""
    early = at.hook in TRACKING and not at.translates and at.priority <= CONNTRACK
    if early or not packet.tracked:
        if key:
            raise NoMatch
        return struct.pack("=I", STATE_INVALID if packet.tracked else STATE_UNTRACKED)
    match key:
        case 0:
            known = STATE_ESTABLISHED if packet.known else STATE_NEW
            return struct.pack("=I", known)
        case 1:
            return b"\0"
        case 2:
            bits = (IPS_DST_NAT if packet.translated else 0) | (IPS_SRC_NAT if packet.renamed else 0)
            bits |= IPS_CONFIRMED | IPS_SEEN_REPLY if packet.known else 0
            return struct.pack("=I", bits)
        case 3:
            return struct.pack("=I", packet.ct_mark)
    return None


def fib(packet: Packet, around: Surroundings, expr: Expr) -> bytes | None:
    """Return what `fib` loads: the type of an address, or the interface that leads there."""
    flags, result = expr.number(3), expr.number(2) & 0xFFFF
    address = packet.source if flags & 1 else packet.destination
    if result == 3:
        return struct.pack("=I", around.kind_of(address))
    out = around.way_out(packet, address)
    if flags & 8 and out != packet.iif:  # with iif: only a way by the interface it came from counts
        out = ""
    if flags & 32:
        return bytes([bool(out)])
    return struct.pack("=I", around.index_of(out)) if result == 1 else out.encode().ljust(16, b"\0")
