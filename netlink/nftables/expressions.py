"""The parts of a rule, as frozen values that encode themselves.

A rule is a list of expressions that work on registers: one loads a field, the next compares it or looks
it up, the last acts. `nft --debug=netlink list ruleset` prints them in the same words. All numbers are
from linux/netfilter/nf_tables.h. What `nft` 1.0.6 could not print back is not here (design decision 2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

from netlink.attributes import attribute, nested, number, text


class Verdict(IntEnum):
    """What a rule or a verdict map element says of a packet (NF_* and NFT_*)."""

    DROP = 0
    ACCEPT = 1
    JUMP = -3
    GOTO = -4
    RETURN = -5


class Base(IntEnum):
    """Where in a packet a payload offset starts."""

    LINK = 0
    NETWORK = 1
    TRANSPORT = 2


class MetaKey(IntEnum):
    """Packet metadata."""

    PROTOCOL = 1
    PRIORITY = 2
    MARK = 3
    IIFNAME = 6
    SKGID = 11
    L4PROTO = 16
    PKTTYPE = 19


class CtKey(IntEnum):
    """Connection tracking data. DIRECTION is one byte: 0 original, 1 reply."""

    DIRECTION = 1
    STATUS = 2


class Compare(IntEnum):
    """How `Cmp` compares."""

    EQ = 0
    NEQ = 1


def register(slot: int) -> int:
    """Return the number of a four-byte register; concatenated fields sit in consecutive slots."""
    return 8 + slot


VERDICT_REGISTER = 0
IPS_SRC_NAT = 1 << 4  # linux/netfilter/nf_conntrack_common.h: the connection's source was changed
IPS_DST_NAT = 1 << 5  # its destination was changed
IP_CT_DIR_REPLY = 1  # linux/netfilter/nf_conntrack_tuple_common.h
SOCKET_TRANSPARENT = 0
RTN_LOCAL = 2  # linux/rtnetlink.h: an address of this machine
RT_TCP_MSS = 3
BYTEORDER_HTON = 1
EXTHDR_OP_TCP_OPTION = 1
SOURCE_FULLY_RANDOM = 1 << 4
LIMIT_BYTES, LIMIT_OVER = 1, 1
DYNSET_UPDATE = 1
REJECT_ICMP_UNREACHABLE, REJECT_TCP_RESET = 0, 1


class Expression(Protocol):
    """One step of a rule: its kernel name and its attributes."""

    name: ClassVar[str]

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        ...


@dataclass(frozen=True, slots=True)
class Payload:
    """Load bytes of the packet."""

    name: ClassVar[str] = "payload"
    base: Base
    offset: int
    length: int
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return (
            number(1, register(self.slot))
            + number(2, self.base)
            + number(3, self.offset)
            + number(4, self.length)
        )


@dataclass(frozen=True, slots=True)
class PayloadSet:
    """Write a register into the packet; for fields that no checksum is about."""

    name: ClassVar[str] = "payload"
    base: Base
    offset: int
    length: int
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        place = number(2, self.base) + number(3, self.offset) + number(4, self.length)
        return place + number(5, register(self.slot))


@dataclass(frozen=True, slots=True)
class Meta:
    """Load packet metadata."""

    name: ClassVar[str] = "meta"
    key: MetaKey
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, self.key)


@dataclass(frozen=True, slots=True)
class MetaSet:
    """Store a register as packet metadata."""

    name: ClassVar[str] = "meta"
    key: MetaKey
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(2, self.key) + number(3, register(self.slot))


@dataclass(frozen=True, slots=True)
class Ct:
    """Load connection tracking data."""

    name: ClassVar[str] = "ct"
    key: CtKey
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, self.key)


@dataclass(frozen=True, slots=True)
class SocketTransparent:
    """Load, in one byte, whether the socket that the packet is for may have others' addresses.

    (IP_TRANSPARENT). The rule ends here for a packet that no socket of this machine is for.
    """

    name: ClassVar[str] = "socket"
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, SOCKET_TRANSPARENT) + number(2, register(self.slot))


@dataclass(frozen=True, slots=True)
class ExtensionHeader:
    """Load bytes of an IPv6 extension header; the rule ends here for a packet without one."""

    name: ClassVar[str] = "exthdr"
    header: int
    offset: int
    length: int
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return (
            number(1, register(self.slot))
            + attribute(2, bytes([self.header]))
            + number(3, self.offset)
            + number(4, self.length)
        )


@dataclass(frozen=True, slots=True)
class RouteMss:
    """Load the largest TCP segment that the packet's route carries, and the route back: 16 bits, host order.

    `rt mtu` in nft's words: the smaller path MTU of both less the IP and TCP headers. Only where a packet has
    its route: forward, output and postrouting.
    """

    name: ClassVar[str] = "rt"
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, RT_TCP_MSS)


@dataclass(frozen=True, slots=True)
class ToNetworkOrder:
    """Turn a 16-bit number from host to network order, in place."""

    name: ClassVar[str] = "byteorder"
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        registers = number(1, register(self.slot)) + number(2, register(self.slot))
        return registers + number(3, BYTEORDER_HTON) + number(4, 2) + number(5, 2)


@dataclass(frozen=True, slots=True)
class TcpOptionSet:
    """Write a register into a TCP option, by its kind and a place in it; without the option the rule ends.

    The kernel never raises two bytes, as it takes them for the largest segment: a larger one would stall
    connections (nft_exthdr_tcp_set_eval).
    """

    name: ClassVar[str] = "exthdr"
    kind: int
    offset: int
    length: int
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        place = attribute(2, bytes([self.kind])) + number(3, self.offset) + number(4, self.length)
        return place + number(6, EXTHDR_OP_TCP_OPTION) + number(7, register(self.slot))


@dataclass(frozen=True, slots=True)
class FibDestinationType:
    """Load the type of the destination address: local, unicast, … (`fib daddr type`)."""

    name: ClassVar[str] = "fib"
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, 3) + number(3, 2)


@dataclass(frozen=True, slots=True)
class Bitwise:
    """Compute `(register & mask) ^ flip`, in place; mask and flip are as long as the field, network bytes."""

    name: ClassVar[str] = "bitwise"
    mask: bytes
    flip: bytes
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return (
            number(1, register(self.slot))
            + number(2, register(self.slot))
            + number(3, len(self.mask))
            + nested(4, attribute(1, self.mask))
            + nested(5, attribute(1, self.flip))
        )


@dataclass(frozen=True, slots=True)
class Cmp:
    """Go on with the rule only if the register compares as said."""

    name: ClassVar[str] = "cmp"
    operator: Compare
    value: bytes
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, self.operator) + nested(3, attribute(1, self.value))


@dataclass(frozen=True, slots=True)
class Lookup:
    """Go on only if the key is in the set (or is not, when `invert`)."""

    name: ClassVar[str] = "lookup"
    set_name: str
    slot: int = 0
    invert: bool = False

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        flags = number(5, 1) if self.invert else b""
        return text(1, self.set_name) + number(2, register(self.slot)) + flags


@dataclass(frozen=True, slots=True)
class MapLookup:
    """Go on with the key's data in register `into`, if the key is in the map."""

    name: ClassVar[str] = "lookup"
    set_name: str
    slot: int = 0
    into: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return text(1, self.set_name) + number(2, register(self.slot)) + number(3, register(self.into))


@dataclass(frozen=True, slots=True)
class VerdictLookup:
    """Do what the verdict map says of the key, if the key is in it."""

    name: ClassVar[str] = "lookup"
    set_name: str
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return text(1, self.set_name) + number(2, register(self.slot)) + number(3, VERDICT_REGISTER)


@dataclass(frozen=True, slots=True)
class Remember:
    """Put the key into a dynamic set, or begin its timeout anew (`update @set { … }`).

    The rule ends here when the set is full. Source: nf_tables.h, NFTA_DYNSET_*.
    """

    name: ClassVar[str] = "dynset"
    set_name: str
    key_slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return text(1, self.set_name) + number(3, DYNSET_UPDATE) + number(4, register(self.key_slot))


@dataclass(frozen=True, slots=True)
class RandomIndex:
    """Load a random number from 0 to modulus-1, in host order (`numgen random mod`)."""

    name: ClassVar[str] = "numgen"
    modulus: int
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + number(2, self.modulus) + number(3, 1) + number(4, 0)


@dataclass(frozen=True, slots=True)
class Constant:
    """Load given bytes."""

    name: ClassVar[str] = "immediate"
    value: bytes
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, register(self.slot)) + nested(2, attribute(1, self.value))


@dataclass(frozen=True, slots=True)
class Dnat:
    """Send the connection to the address and port in two registers."""

    name: ClassVar[str] = "nat"
    family: int
    address_slot: int
    port_slot: int

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return (
            number(1, 1)
            + number(2, self.family)
            + number(3, register(self.address_slot))
            + number(5, register(self.port_slot))
        )


@dataclass(frozen=True, slots=True)
class Snat:
    """Give the connection the address in a register as its source, with a fully random port."""

    name: ClassVar[str] = "nat"
    family: int
    address_slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        address = number(3, register(self.address_slot))
        return number(1, 0) + number(2, self.family) + address + number(7, SOURCE_FULLY_RANDOM)


@dataclass(frozen=True, slots=True)
class Masquerade:
    """Give the connection an address of the interface it leaves by, with a fully random port."""

    name: ClassVar[str] = "masq"

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, SOURCE_FULLY_RANDOM)


@dataclass(frozen=True, slots=True)
class NoTrack:
    """Keep the packet out of connection tracking, and so of all translation; for chains that come before."""

    name: ClassVar[str] = "notrack"

    def attributes(self) -> bytes:
        """Return the encoded attributes: none."""
        return b""


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the packet: with an ICMP (or ICMPv6) unreachable code, or with a TCP reset if there is none."""

    name: ClassVar[str] = "reject"
    code: int | None = None

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        if self.code is None:
            return number(1, REJECT_TCP_RESET) + attribute(2, b"\0")
        return number(1, REJECT_ICMP_UNREACHABLE) + attribute(2, bytes([self.code]))


@dataclass(frozen=True, slots=True)
class Counter:
    """Count packets and bytes that come this far."""

    name: ClassVar[str] = "counter"

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return attribute(1, struct.pack(">Q", 0)) + attribute(2, struct.pack(">Q", 0))


@dataclass(frozen=True, slots=True)
class LimitOver:
    """Match what exceeds a rate, in bytes a second, and a burst in bytes.

    The kernel adds a second at the rate to the burst, and counts in ns: (rate + burst) * 10^9 has 64 bits.
    """

    name: ClassVar[str] = "limit"
    rate: int
    burst: int

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        encoded = attribute(1, struct.pack(">Q", self.rate)) + attribute(2, struct.pack(">Q", 1))
        encoded += number(3, self.burst) if self.burst else b""
        return encoded + number(4, LIMIT_BYTES) + number(5, LIMIT_OVER)


@dataclass(frozen=True, slots=True)
class Do:
    """End with a verdict; `chain` for a jump or goto."""

    name: ClassVar[str] = "immediate"
    verdict: Verdict
    chain: str = ""

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(1, VERDICT_REGISTER) + nested(2, verdict_data(self.verdict, self.chain))


def verdict_data(verdict: Verdict, chain: str = "") -> bytes:
    """Encode a verdict as rule or element data (NFTA_DATA_VERDICT)."""
    return nested(2, number(1, verdict), text(2, chain) if chain else b"")
