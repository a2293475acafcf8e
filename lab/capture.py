"""The packets of a connection, hop by hop, and pods' packets that are where they must not be.

The former are read from sockets in several namespaces, in the kernel's time order; the latter are counted by
nftables on the router.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from lab.topology import POD_CIDRS, Backend, LabError, Topology, title
from netlink import netns
from netlink.family import Family, with_port
from netlink.rtnl import Rtnl

# linux/if_ether.h; asm-generic/socket.h (the old name: struct timespec of longs)
ETH_P_ALL = 0x0003
FAMILIES = {0x0800: Family.V4, 0x86DD: Family.V6}
SO_TIMESTAMPNS = 35
TCP, SYN = 6, 0x02
BUFFER = 1 << 16

T = TypeVar("T")


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


Seen = tuple[tuple[int, int], "Hop"]  # the kernel's time in seconds and nanoseconds
_watching: dict[str, socket.socket] = {}
"""The sockets of this process's machine, by place."""


class InPlace(Protocol):
    """Calls a function on a place's machine, with the place's namespace and more arguments."""

    def __call__(self, place: str, function: Callable[..., T], *args: Any) -> T:
        """Return what the function does."""
        ...


@contextmanager
def watch(places: Sequence[str], at: InPlace, ignore: Sequence[str] = ()) -> Iterator[list[Hop]]:
    """Watch these places during a block; the list is filled when the block ends, in order of time.

    `ignore` names interfaces whose packets do not count, such as the ports of a bridge.

    Only openings of connections (SYN) and their answers are kept. A packet that a place sees several
    times unchanged, on one interface after the other, counts once.
    """
    hops: list[Hop] = []
    seen: list[Seen] = []
    with ExitStack() as opened:
        for place in places:
            at(place, begin, place)
            opened.callback(partial(_collect, seen, at, place, ignore))
        yield hops
    for _, hop in sorted(seen, key=lambda found: found[0]):
        previous = next((earlier for earlier in reversed(hops) if earlier.place == hop.place), None)
        if hop != previous:
            hops.append(hop)


def _collect(seen: list[Seen], at: InPlace, place: str, ignore: Sequence[str]) -> None:
    seen += at(place, end, place, ignore)


def begin(namespace: str, place: str) -> None:
    """Begin to watch a place."""
    _watching[place] = netns.run(namespace, _packets)


def end(_: str, place: str, ignore: Sequence[str]) -> list[Seen]:
    """Stop watching a place; return what it saw."""
    with _watching.pop(place) as packets:
        return list(_read(place, packets, ignore))


def count_bare(plan: Topology) -> None:
    """Have the router count packets with a pod's address that nodes send.

    Those that it is to forward; with backend vxlan also those from node to node on one segment, which pass
    through its bridges.
    """
    chain = "bridge lab bare"
    lines = ["add table bridge lab", f"add chain {chain} {{ type filter hook prerouting priority -300; }}"]
    bridges = netns.run(plan.router, _bridges, plan)
    own = "" if plan.backend is Backend.VXLAN else f"ether daddr {{ {bridges} }} "
    for family, cidr in POD_CIDRS.items():
        name, keyword = _counter(family), family.keyword
        lines.append(f"add counter bridge lab {name}")
        lines += [
            f"add rule {chain} {own}{keyword} {end} {cidr} counter name {name}" for end in ("saddr", "daddr")
        ]
    netns.run(plan.router, _nft, "-f", "-", text="\n".join(lines))


def bare(plan: Topology, family: Family) -> int:
    """Return how often the router has seen a pod's address of a family since `count_bare`."""
    said = netns.run(plan.router, _nft, "-j", "list", "counters", "table", "bridge", "lab")
    found = (entry["counter"] for entry in json.loads(said)["nftables"] if "counter" in entry)
    return sum(int(counter["packets"]) for counter in found if counter["name"] == _counter(family))


def forget_bare() -> None:
    """End what `count_bare` began."""
    _nft("-f", "-", text="add table bridge lab\ndelete table bridge lab\n")


def _bridges(plan: Topology) -> str:
    """Return the MACs of the router's bridges: what hosts send to for it to forward."""
    names = [port.name for port in plan.router_ports if port.bridge]
    with Rtnl() as rtnl:
        return ", ".join(link.mac for link in rtnl.links() if link.name in names)


def _counter(family: Family) -> str:
    return f"{title(family)}-pods"


def _nft(*arguments: str, text: str = "") -> str:
    done = subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"the router does not count packets: {done.stderr.strip()}")
    return done.stdout


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
