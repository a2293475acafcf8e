"""Frames as a pod with CAP_NET_RAW might send them: true, forged, or wrapped to hide what is in them."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

from netlink.announce import checksum

IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
BROADCAST, ALL_NODES_MAC = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
ALL_NODES = "ff02::1"
UDP, ICMPV6, FRAGMENT, HOP_BY_HOP, DESTINATION_OPTIONS = 17, 58, 44, 0, 60
ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECT, ECHO = 134, 135, 136, 137, 128
OVERRIDE = bytes.fromhex("20000000")


def ethernet(destination: str, source: str, kind: int, payload: bytes) -> bytes:
    """Return a frame; MAC addresses as text, type as a number."""
    macs = bytes.fromhex((destination + source).replace(":", ""))
    return macs + struct.pack(">H", kind) + payload


def udp(source: str, destination: str, port: int, payload: bytes) -> bytes:
    """Return a UDP packet inside its IPv4 or IPv6 packet."""
    body = struct.pack(">HHHH", port, port, 8 + len(payload), 0) + payload
    body = body[:6] + struct.pack(">H", _sum(source, destination, UDP, body)) + body[8:]
    return (ipv6 if ":" in source else ipv4)(source, destination, UDP, body)


def ipv4(source: str, destination: str, protocol: int, body: bytes) -> bytes:
    """Return an IPv4 packet."""
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    start = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(body), 1, 0, 64, protocol)
    return start + struct.pack(">H", checksum(start + bytes(2) + ends)) + ends + body


def ipv6(source: str, destination: str, following: int, body: bytes) -> bytes:
    """Return an IPv6 packet; `following` is the type of the first header in `body`."""
    ends = ip_address(source).packed + ip_address(destination).packed
    return struct.pack(">IHBB", 6 << 28, len(body), following, 255) + ends + body


def icmpv6(source: str, destination: str, kind: int, body: bytes) -> bytes:
    """Return an ICMPv6 message, without its IPv6 header; code 0."""
    message = bytes((kind, 0, 0, 0)) + body
    return message[:2] + struct.pack(">H", _sum(source, destination, ICMPV6, message)) + message[4:]


def router_advertisement(source: str, marker: bytes) -> bytes:
    """Return an ICMPv6 router advertisement: a default router for 1,800 s."""
    return icmpv6(
        source, ALL_NODES, ROUTER_ADVERTISEMENT, struct.pack(">BBHII", 64, 0, 1800, 0, 0) + option(marker)
    )


def redirect(source: str, destination: str, marker: bytes) -> bytes:
    """Return an ICMPv6 redirect: `destination` is reached by `source`."""
    ends = ip_address(source).packed + ip_address(destination).packed
    return icmpv6(source, ALL_NODES, REDIRECT, bytes(4) + ends + option(marker))


def advertisement(source: str, target: str, marker: bytes) -> bytes:
    """Return an ICMPv6 neighbour advertisement that overrides what others know of the target."""
    return icmpv6(source, ALL_NODES, ADVERTISEMENT, OVERRIDE + ip_address(target).packed + option(marker))


def solicitation(source: str, destination: str, target: str, marker: bytes) -> bytes:
    """Return an ICMPv6 neighbour solicitation, which from `::` asks whether an address is taken."""
    return icmpv6(source, destination, SOLICITATION, bytes(4) + ip_address(target).packed + option(marker))


def option(marker: bytes) -> bytes:
    """Return a neighbour discovery option of a type for experiments, which holds the marker (14 bytes)."""
    assert len(marker) == 14
    return bytes((253, 2)) + marker


def extension(following: int, padding: bytes = bytes(4)) -> bytes:
    """Return an extension header of options that say nothing: hop-by-hop or destination options."""
    padding += bytes((4 - len(padding)) % 8)
    return bytes((following, len(padding) // 8, 1, len(padding))) + padding


def fragment(following: int, offset: int, more: bool) -> bytes:
    """Return a fragment header; offset in bytes."""
    return struct.pack(">BBHI", following, 0, offset | more, 0x1234)


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str], marker: bytes) -> bytes:
    """Return an ARP message (1 request, 2 reply) about (MAC, address) pairs; the marker is its padding."""
    body = struct.pack(">HHBBH", 1, IPV4, 6, 4, operation)
    for mac, address in (sender, target):
        body += bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
    return body + marker


def vlan(kind: int, payload: bytes) -> bytes:
    """Return the payload of a frame that is tagged for VLAN 1."""
    return struct.pack(">HH", 1, kind) + payload


def sctp_init(source: int, destination: int) -> bytes:
    """Return the first message of an SCTP association, between ports (RFC 9260, sections 3.1 and 3.3.2)."""
    ports = struct.pack(">HHI", source, destination, 0)
    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 7, 1 << 16, 1, 1, 1)
    return ports + struct.pack("<I", _crc32c(ports + bytes(4) + chunk)) + chunk


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def _sum(source: str, destination: str, protocol: int, body: bytes) -> int:
    ends = ip_address(source).packed + ip_address(destination).packed
    return checksum(ends + struct.pack(">II", len(body), protocol) + body) or 0xFFFF
