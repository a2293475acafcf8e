"""The packets of a connection, hop by hop: sockets in several namespaces, read in the kernel's time order."""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from netlink import netns
from netlink.family import Family, with_port

# linux/if_ether.h; asm-generic/socket.h (the old name: struct timespec of longs)
ETH_P_ALL = 0x0003
FAMILIES = {0x0800: Family.V4, 0x86DD: Family.V6}
SO_TIMESTAMPNS = 35
TCP, SYN = 6, 0x02
BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Hop:
    """A TCP SYN or SYN-ACK as one place saw it."""

    place: str
    source: str
    source_port: int
    destination: str
    destination_port: int

    def __str__(self) -> str:
        source = with_port(self.source, self.source_port)
        return f"{self.place:<10} {source} → {with_port(self.destination, self.destination_port)}"


@contextmanager
def stamping() -> Iterator[None]:
    """Have the kernel stamp packets during a block.

    It begins to do so some time after the first socket asks for it, and a packet without a stamp gets the
    time at which it is read: the order of hops needs a socket that asked well before.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        yield


@contextmanager
def watch(namespaces: Mapping[str, str], ignore: Container[str] = ()) -> Iterator[list[Hop]]:
    """Watch these places (name to namespace) during a block; the list is filled when the block ends.

    `ignore` names interfaces whose packets do not count, such as the ports of a bridge.

    Only openings of connections (SYN) and their answers are kept. A packet that a place sees several
    times unchanged, on one interface after the other, counts once.
    """
    hops: list[Hop] = []
    with ExitStack() as sockets:
        opened = {
            place: sockets.enter_context(netns.run(namespace, _packets))
            for place, namespace in namespaces.items()
        }
        yield hops
        seen = [found for place, packets in opened.items() for found in _read(place, packets, ignore)]
    for _, hop in sorted(seen, key=lambda found: found[0]):
        previous = next((earlier for earlier in reversed(hops) if earlier.place == hop.place), None)
        if hop != previous:
            hops.append(hop)


def _packets() -> socket.socket:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    packets.setblocking(False)
    return packets


def _read(
    place: str, packets: socket.socket, ignore: Container[str]
) -> Iterator[tuple[tuple[int, int], Hop]]:
    """Yield what the socket has queued, with the kernel's time of each."""
    while True:
        try:
            data, ancillary, _, address = packets.recvmsg(BUFFER, 64)
        except BlockingIOError:
            return
        family = FAMILIES.get(address[1]) if address[0] not in ignore else None
        hop = _parse(place, family, data) if family else None
        if hop is not None:
            seconds, nanoseconds = struct.unpack("@ll", ancillary[0][2])
            yield (seconds, nanoseconds), hop


def _parse(place: str, family: Family, data: bytes) -> Hop | None:
    """Return the hop of a TCP packet with SYN set, else None (RFC 791, 8200 and 9293).

    An IPv6 packet with extension headers is passed over: no TCP of the lab has any.
    """
    shortest = family.destination_offset + family.size
    header = (data[0] & 0x0F) * 4 if family is Family.V4 and data else shortest
    protocol = 9 if family is Family.V4 else 6
    if len(data) < max(header, shortest) + 14 or data[protocol] != TCP or not data[header + 13] & SYN:
        return None
    source, destination = (
        socket.inet_ntop(family.af, data[offset : offset + family.size])
        for offset in (family.source_offset, family.destination_offset)
    )
    ports = struct.unpack_from("!HH", data, header)
    return Hop(place, source, ports[0], destination, ports[1])
