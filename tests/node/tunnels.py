"""Two nodes and a stranger on one network, a pod behind the first node, and VXLAN made by hand.

pod ── left ──┬── right        left, right, stranger: 10.0.0.{1,2,3}, fd00::{1,2,3}
              └── stranger     pod: 10.1.0.2, fd01::2
vx4: 10.4.0.{1,2}, fd04::{1,2} over IPv4        vx6: 10.6.0.{1,2}, fd06::{1,2} over IPv6
"""

from __future__ import annotations

import re
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from netlink import netns
from netlink.conntrack import Flow
from netlink.family import Family
from node.tunnel_rules import NAME, TunnelRules, Wanted
from tests.netlink.joined import DEADLINE, with_conntrack

PORT, VNI = 8472, 112
TUNNEL_SOURCE_PORT = 5000
MACS = {"left": "02:00:00:00:00:01", "right": "02:00:00:00:00:02"}
NUMBERS = {"left": 1, "right": 2, "stranger": 3}


def underlay(family: Family, name: str) -> str:
    """The address of a node or the stranger on the network."""
    return f"10.0.0.{NUMBERS[name]}" if family is Family.V4 else f"fd00::{NUMBERS[name]}"


def overlay(family: Family, outer: Family, name: str) -> str:
    """The address of a node on the tunnel over an underlay of some family."""
    number = NUMBERS[name]
    return f"10.{outer.value}.0.{number}" if family is Family.V4 else f"fd0{outer.value}::{number}"


@dataclass(frozen=True, slots=True)
class World:
    """The names of the namespaces."""

    left: str
    right: str
    stranger: str
    pod: str

    def everybody(self, *names: str, clamp: bool = False) -> dict[Family, Wanted]:
        """What is wanted with these as peers, in both families."""
        return {f: Wanted(PORT, frozenset(underlay(f, n) for n in names), clamp) for f in Family}

    @contextmanager
    def rules(self, name: str) -> Iterator[TunnelRules]:
        """Tunnel rules in a namespace, gone afterwards."""
        with ExitStack() as stack:
            rules = netns.run(name, stack.enter_context, TunnelRules())
            stack.callback(rules.apply, {})
            yield rules

    @contextmanager
    def nft(self, name: str, table: str, content: str) -> Iterator[None]:
        """A table of nftables of somebody else, gone afterwards."""
        run(name, "nft", "-f", "-", stdin=f"table {table} {{\n{content}\n}}")
        try:
            yield
        finally:
            run(name, "nft", "delete", "table", *table.split())

    def tracked(self, name: str, family: Family) -> tuple[Flow, ...]:
        """The connection tracking entries of VXLAN."""
        return with_conntrack(name, lambda c: c.flows(family, socket.IPPROTO_UDP, PORT))

    def forget(self, name: str) -> None:
        """Remove all connection tracking entries of UDP."""

        def all_of_them(family: Family) -> None:
            with_conntrack(name, lambda c: c.delete(*c.flows(family, socket.IPPROTO_UDP)))

        for family in Family:
            all_of_them(family)


def build(namespaces: Callable[[], str]) -> World:
    """Make the namespaces and what connects them."""
    lan = namespaces()
    world = World(*(namespaces() for _ in range(4)))
    batches: dict[str, list[str]] = {lan: ["link add br0 type bridge", "link set br0 up"]}
    for name in NUMBERS:
        where = getattr(world, name)
        batches[lan] += [
            f"link add {name} type veth peer name eth0 netns {where}",
            f"link set {name} master br0 up",
        ]
        batches[where] = ["link set lo up", "link set eth0 up", *_addresses("eth0", underlay, name)]
    for name, mac in MACS.items():
        batches[getattr(world, name)] += _tunnels(name, mac)
    batches[world.left] += [
        f"link add pod0 type veth peer name eth0 netns {world.pod}",
        "link set pod0 up",
        "addr add 10.1.0.1/24 dev pod0",
        "addr add fd01::1/64 dev pod0 nodad",
    ]
    batches[world.pod] = [
        "link set eth0 up",
        "addr add 10.1.0.2/24 dev eth0",
        "addr add fd01::2/64 dev eth0 nodad",
        "route add default via 10.1.0.1",
        "route add ::/0 via fd01::1",
    ]
    for name in ("right", "stranger"):
        batches[getattr(world, name)] += [
            "route add 10.1.0.0/24 via 10.0.0.1",
            "route add fd01::/64 via fd00::1",
        ]
    for where, lines in batches.items():
        run(where, "ip", "-batch", "-", stdin="\n".join(lines))
    for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        netns.run(world.left, Path("/proc/sys/net", key).write_text, "1")
    return world


def _addresses(device: str, plan: Callable[[Family, str], str], name: str) -> Iterator[str]:
    yield f"addr add {plan(Family.V4, name)}/24 brd + dev {device}"
    yield f"addr add {plan(Family.V6, name)}/64 dev {device} nodad"


def _tunnels(name: str, mac: str) -> Iterator[str]:
    """Yield what makes a node's tunnels to the other one, whose outer packets all have one source port."""
    (other,) = (n for n in MACS if n != name)
    ports = f"dstport {PORT} srcport {TUNNEL_SOURCE_PORT} {TUNNEL_SOURCE_PORT + 1}"
    for outer in Family:
        device = f"vx{outer.value}"
        ends = f"local {underlay(outer, name)} remote {underlay(outer, other)} dev eth0"
        yield f"link add {device} address {mac} type vxlan id {VNI} {ports} {ends}"
        yield f"link set {device} up"
        yield f"addr add {overlay(Family.V4, outer, name)}/24 dev {device}"
        yield f"addr add {overlay(Family.V6, outer, name)}/64 dev {device} nodad"


def run(name: str, *command: str, stdin: str = "") -> str:
    """Run a program in a namespace; return what it prints."""

    def work() -> str:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{stdin}"
        return done.stdout

    return netns.run(name, work)


def dropped(name: str, family: Family, chain: str) -> int:
    """Packets that the rule of a chain has counted."""
    found = re.search(r"packets (\d+)", run(name, "nft", "list", "chain", family.keyword, NAME, chain))
    assert found
    return int(found[1])


@contextmanager
def udp(name: str, family: Family, port: int = 0) -> Iterator[socket.socket]:
    """A socket of UDP in a namespace, bound to a port."""
    with netns.run(name, socket.socket, family.af, socket.SOCK_DGRAM) as made:
        made.settimeout(DEADLINE)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.bind(("", port))
        yield made


def nothing_waits(for_whom: socket.socket) -> bool:
    """Whether nothing has arrived at a socket."""
    return not select.select([for_whom], [], [], 0)[0]


def exchange(server: socket.socket, client: socket.socket, address: str) -> None:
    """Send a datagram to a server's address and another one back."""
    client.sendto(b"there", (address, server.getsockname()[1]))
    data, peer = server.recvfrom(100)
    server.sendto(b"back", peer)
    assert (data, client.recvfrom(100)[0]) == (b"there", b"back")


@contextmanager
def sniffer(name: str, device: str = "eth0") -> Iterator[socket.socket]:
    """A socket that sees what arrives at a device."""
    with netns.run(name, socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as made:
        netns.run(name, made.bind, (device, 3))
        made.settimeout(DEADLINE)
        yield made


def seen(sniffed: socket.socket, family: Family, protocol: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield ports and transport header of each packet of a protocol; 1,000 packets at most."""
    version, kind, length = (4, 9, 20) if family is Family.V4 else (6, 6, 40)
    for _ in range(1000):
        packet, where = sniffed.recvfrom(2000)
        if where[2] != socket.PACKET_OUTGOING and packet[0] >> 4 == version and packet[kind] == protocol:
            source, destination = struct.unpack_from(">HH", packet, length)
            yield source, destination, packet[length:]


def mss(tcp: bytes) -> int:
    """The largest segment that the options of a TCP header name."""
    options = tcp[20 : (tcp[12] >> 4) * 4]
    while options[0] != 2:
        options = options[1 if options[0] == 1 else options[1] :]
    return int(struct.unpack_from(">H", options, 2)[0])


def vxlan(outer: Family, to: str, payload: bytes, port: int) -> bytes:
    """What somebody writes who has no tunnel: VXLAN with a datagram to a node's address on the tunnel."""
    data = struct.pack(">HHHH", 5555, port, 8 + len(payload), 0) + payload
    addresses = socket.inet_aton(overlay(Family.V4, outer, "left").rsplit(".", 1)[0] + ".9")
    addresses += socket.inet_aton(overlay(Family.V4, outer, to))
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack(">10H", head))
    checksum = ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF
    head = head[:10] + struct.pack(">H", checksum) + head[12:]
    frame = (
        bytes.fromhex(MACS[to].replace(":", "")) + bytes.fromhex("020000000009") + b"\x08\x00" + head + data
    )
    return struct.pack(">II", 1 << 27, VNI << 8) + frame
