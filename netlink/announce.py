"""Tell the neighbours on an interface which MAC an address has now, before they ask or find out.

After an address has moved to another interface, neighbours send to the old one until their entries expire
(containernetworking/plugins#858). The frames are pure; `announce` sends one. Source: RFC 5227 section 3 (ARP
announcement), RFC 4861 sections 4.4 and 7.2.6 (unsolicited neighbour advertisement), RFC 4443 section 2.3.
"""

from __future__ import annotations

import socket
import struct
import threading
from ipaddress import IPv4Address, IPv6Address, ip_address

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARP_ETHERNET, ARP_IPV4, ARP_REQUEST = 1, 0x0800, 1
NEIGHBOUR_ADVERTISEMENT = 136
OVERRIDE = 0x20000000
TARGET_LINK_LAYER_ADDRESS = 2
HOP_LIMIT = 255  # receivers drop anything that may have crossed a router

BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1").packed
ALL_NODES_MAC = bytes.fromhex("333300000001")


def announce(ifname: str, address: str, mac: str) -> None:
    """Send the frame that fits the address, in the network namespace of the calling thread.

    The interface must be up. Raises OSError when the kernel cannot send.
    """
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        data = frame(address, mac)
        sender.sendto(data, (ifname, int.from_bytes(data[12:14], "big")))
    finally:
        # Closing a packet socket waits for an RCU grace period, 16 ms: longer than all the rest of an ADD.
        threading.Thread(target=sender.close, name="close packet socket").start()


def frame(address: str, mac: str) -> bytes:
    """Return the Ethernet frame that announces an address, IPv4 or IPv6."""
    ip = ip_address(address)
    hardware = bytes.fromhex(mac.replace(":", ""))
    return _arp(ip, hardware) if isinstance(ip, IPv4Address) else _advertisement(ip, hardware)


def _arp(ip: IPv4Address, mac: bytes) -> bytes:
    """Return an ARP request for the address by the address itself.

    A request, not a reply: receivers that want a reply to have been asked for take the request too.
    """
    kind = struct.pack(">HHBBH", ARP_ETHERNET, ARP_IPV4, len(mac), len(ip.packed), ARP_REQUEST)
    return _ethernet(BROADCAST, mac, ETH_P_ARP, kind + mac + ip.packed + bytes(len(mac)) + ip.packed)


def _advertisement(ip: IPv6Address, mac: bytes) -> bytes:
    """Return a neighbour advertisement to all nodes that overrides what they know."""
    option = struct.pack(">BB", TARGET_LINK_LAYER_ADDRESS, 1) + mac
    body = struct.pack(">I", OVERRIDE) + ip.packed + option
    pseudo = ip.packed + ALL_NODES + struct.pack(">II", 4 + len(body), socket.IPPROTO_ICMPV6)
    head = struct.pack(">BB", NEIGHBOUR_ADVERTISEMENT, 0)
    message = head + struct.pack(">H", checksum(pseudo + head + bytes(2) + body)) + body
    header = struct.pack(">IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, HOP_LIMIT)
    return _ethernet(ALL_NODES_MAC, mac, ETH_P_IPV6, header + ip.packed + ALL_NODES + message)


def _ethernet(destination: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return destination + source + struct.pack(">H", kind) + payload


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071): the complement of the sum of 16-bit words, carries added."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
