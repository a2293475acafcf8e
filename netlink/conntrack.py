"""The kernel's connection tracking entries: read, and removed where they lead to what is gone.

Address translation is decided once per connection and kept in its entry. A UDP or SCTP client that goes on
sending never starts a new one, so after a change of a service's or host port's pods its packets go where the
old pod was, until somebody removes the entry (kubernetes#139628); an entry whose target is still one is left
alone (kubernetes#122740).

    Destination → Backends, of what changed ──`Conntrack.delete_stale`: one dump──▶ entries removed

Messages are packed and parsed here, without pyroute2: a busy node has 100,000 entries.
Source: linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h, net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from netlink.attributes import NLA_F_NESTED, attribute, nested, number, parse, parsed
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
    pack,
    split,
)

NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10

CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_MARK, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 2, 3, 8, 12, 18, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO, CTA_TUPLE_ZONE = 1, 2, 3
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
FILTER_PROTO_NUM, FILTER_PROTO_DST_PORT = 1 << 3, 1 << 5

IPS_DST_NAT = 1 << 5
"""The destination of the connection's first packet was translated."""
KEEPS_GOING = frozenset({socket.IPPROTO_UDP, socket.IPPROTO_SCTP})
"""Protocols whose clients send on without noticing; a TCP connection to a pod that is gone ends by itself."""

FAMILY_AT, BODY = 16, 20  # after the netlink header; nfgenmsg starts with the family and has four bytes
RECEIVE_BYTES = 1 << 18
WRITE_DELETES = 100
"""The answers to one write must fit the receive buffer: each takes about 1 kB of its 208."""
DUMP_TRIES = 10

# The tuple of a protocol with ports and without a zone, as the kernel always writes it: header of CTA_TUPLE_*
# (its length tells it from other tuples), source, destination, protocol, source port, destination port.
_TUPLE = {
    Family.V4.af: struct.Struct(">4s8x4s4x4s8xB3x4xH2x4xH2x"),
    Family.V6.af: struct.Struct(">4s8x16s4x16s8xB3x4xH2x4xH2x"),
}
_FAMILIES = {family.af: family for family in Family}
_NUMBERS = (CTA_STATUS, CTA_MARK, CTA_ID, CTA_ZONE)
_HEADERS = {
    af: tuple(
        struct.pack("=HH", layout.size, NLA_F_NESTED | kind) for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY)
    )
    for af, layout in _TUPLE.items()
}


class Destination(NamedTuple):
    """What connections are addressed to: protocol number, address, port."""

    protocol: int
    address: str
    port: int


class Backend(NamedTuple):
    """Where connections are sent to: address and port."""

    address: str
    port: int


Served = Mapping[Destination, frozenset[Backend]]
"""Who answers for a destination now; nobody if the set is empty."""


class Tuple(NamedTuple):
    """Addresses and ports of the packets in one direction, as they are seen before translation."""

    source: str
    destination: str
    sport: int
    dport: int


@dataclass(frozen=True, slots=True)
class Flow:
    """An entry: a connection as its first packet was addressed, and the packets that are its replies.

    The reply's source is where the connection is sent to. `status` has the kernel's IPS_* bits; `zone` is 0
    unless something else on the node, an overlay switch perhaps, keeps entries of its own.
    """

    family: Family
    protocol: int
    original: Tuple
    reply: Tuple
    status: int = 0
    mark: int = 0
    zone: int = 0
    id: int = 0


def served(
    addresses: Iterable[str], protocol: int, port: int, *backends: Backend
) -> dict[Destination, frozenset[Backend]]:
    """Return the same port of several addresses as destinations: a host port of all the node's addresses."""
    return dict.fromkeys((Destination(protocol, a, port) for a in addresses), frozenset(backends))


def stale(flow: Flow, served: Served) -> bool:
    """Whether an entry sends a connection elsewhere than to who answers for its destination now.

    If nobody does, only a translated one is stale: the others go to the node itself or through it.
    """
    if flow.protocol not in KEEPS_GOING or flow.zone:
        return False
    backends = served.get(Destination(flow.protocol, flow.original.destination, flow.original.dport))
    if backends is None or Backend(flow.reply.source, flow.reply.sport) in backends:
        return False
    return bool(backends) or bool(flow.status & IPS_DST_NAT)


class Conntrack:
    """The entries of the network namespace of the thread that opens it; not shared by threads."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0

    def __enter__(self) -> Self:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def flows(
        self, family: Family, protocol: int | None = None, original_dport: int | None = None
    ) -> tuple[Flow, ...]:
        """Return the entries of a family, or those of a protocol, or of one port that was addressed in it.

        Only protocols with ports; ICMP is left out.
        """
        found = (flow(m) for m in self._dump(family, protocol, original_dport))
        return tuple(
            f
            for f in found
            if f and protocol in (None, f.protocol) and original_dport in (None, f.original.dport)
        )

    def delete(self, *flows: Flow) -> int:
        """Remove entries, many in one write; return how many were there.

        An entry that is gone is fine. One made since for the same packets may go with it, if it has the same
        place in memory; the next packet makes it again. The kernel goes on after one that it refuses;
        NetlinkError names the first refused.
        """
        parts = (flows[at : at + WRITE_DELETES] for at in range(0, len(flows), WRITE_DELETES))
        failures = [failure for part in parts for failure in self._delete(part)]
        refused = [f for f in failures if f.errno != errno.ENOENT]
        if refused:
            raise refused[0]
        return len(flows) - len(failures)

    def delete_where(
        self,
        predicate: Callable[[Flow], bool],
        family: Family,
        protocol: int | None = None,
        original_dport: int | None = None,
    ) -> int:
        """Remove those of the entries `flows` returns that the predicate is true for; return how many."""
        return self.delete(*filter(predicate, self.flows(family, protocol, original_dport)))

    def delete_stale(self, served: Served) -> int:
        """Remove the entries of changed destinations that lead elsewhere than they should; return how many.

        One dump for each family and protocol in `served`, however many destinations there are; of the other
        destinations' entries no more is read than where they go.
        """
        return self.delete(*(f for f in self._suspects(served) if stale(f, served)))

    def _suspects(self, served: Served) -> Iterator[Flow]:
        """Yield the entries of the destinations, except those that lead to a backend: most of them do."""
        for (family, protocol), backends in _packed(served).items():
            ports = {port for _, port in backends}
            unpack, size = _TUPLE[family.af].unpack_from, _TUPLE[family.af].size
            for message in self._dump(family, protocol, ports.pop() if len(ports) == 1 else None):
                if _is_plain(message, family.af):
                    _, _, destination, _, _, dport = unpack(message, BODY)
                    _, source, _, _, sport, _ = unpack(message, BODY + size)
                    right = backends.get((destination, dport))
                    if right is None or (source, sport) in right:
                        continue
                found = flow(message)
                if found:
                    yield found

    def _dump(self, family: Family, protocol: int | None, dport: int | None) -> list[bytes]:
        """Return the messages of a dump; one that changed under way is asked for again.

        The kernel filters (CTA_FILTER, Linux 5.8), as far as it does: SCTP ports it does not look at, and an
        older one returns all. So callers look again.
        """
        for _ in range(DUMP_TRIES):
            found: list[bytes] = []
            interrupted = False
            for kind, flags, message in self._ask(family, protocol, dport):
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind == NLMSG_ERROR:
                    raise NetlinkError(error_code(message), "cannot read the connection tracking entries")
                if kind != NLMSG_DONE:
                    found.append(message)
            if not interrupted:
                return found
        raise NetlinkError(errno.EINTR, "cannot read the connection tracking entries: they change too fast")

    def _ask(
        self, family: Family, protocol: int | None, dport: int | None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Ask for a dump; yield (type, flags, whole message) of each answer up to the end."""
        self._open.send(self._frame(CT_GET, NLM_F_DUMP, family, _filter(protocol, dport)))
        while True:
            for kind, flags, sequence, message in self._receive():
                if sequence == self._sequence:
                    yield kind, flags, message
                    if kind in (NLMSG_DONE, NLMSG_ERROR):
                        return

    def _delete(self, flows: tuple[Flow, ...]) -> list[NetlinkError]:
        """Remove entries in one write; return what was refused. Only the last is acknowledged."""
        first = self._sequence + 1
        last = len(flows) - 1
        self._open.send(
            b"".join(
                self._frame(CT_DELETE, NLM_F_ACK if at == last else 0, f.family, _identity(f))
                for at, f in enumerate(flows)
            )
        )
        failures: list[NetlinkError] = []
        while True:
            for kind, _, sequence, message in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                code = error_code(message)
                if code:
                    failures.append(NetlinkError(code, f"cannot remove {flows[sequence - first]}"))
                if sequence == first + last:
                    return failures

    def _frame(self, kind: int, flags: int, family: Family, body: bytes) -> bytes:
        self._sequence += 1
        return pack(kind, flags, self._sequence, struct.pack("=BBH", family.af, 0, 0) + body)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        yield from split(self._open.recv(RECEIVE_BYTES))

    @property
    def _open(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError("the connection tracking socket is not open")
        return self._socket


def _packed(served: Served) -> dict[tuple[Family, int], dict[tuple[bytes, int], set[tuple[bytes, int]]]]:
    """Return destinations and backends with addresses as the kernel has them, by family and protocol."""
    found: dict[tuple[Family, int], dict[tuple[bytes, int], set[tuple[bytes, int]]]] = {}
    for (protocol, address, port), backends in served.items():
        if protocol in KEEPS_GOING:
            family = Family.V6 if ":" in address else Family.V4
            key = socket.inet_pton(family.af, address), port
            right = {(socket.inet_pton(family.af, b.address), b.port) for b in backends}
            found.setdefault((family, protocol), {})[key] = right
    return found


def _is_plain(message: bytes, af: int) -> bool:
    """Whether both tuples are laid out as `_TUPLE` says."""
    second = BODY + _TUPLE[af].size
    return (message[BODY : BODY + 4], message[second : second + 4]) == _HEADERS[af]


def flow(message: bytes) -> Flow | None:
    """Decode an entry; None for a protocol without ports."""
    family = _FAMILIES[message[FAMILY_AT]]
    zone = 0
    if _is_plain(message, family.af):
        size = _TUPLE[family.af].size
        protocol, original = _plain_tuple(family, message, BODY)
        _, reply = _plain_tuple(family, message, BODY + size)
        rest = parsed(message, BODY + 2 * size)
    else:
        rest = parsed(message, BODY)
        first, second = (_tuple(family, rest[kind]) for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY))
        if first is None or second is None:
            return None
        protocol, original, zone = first
        reply = second[1]
        zone = zone or second[2]
    number_of = {kind: int.from_bytes(rest[kind], "big") for kind in _NUMBERS if kind in rest}
    return Flow(
        family,
        protocol,
        original,
        reply,
        status=number_of.get(CTA_STATUS, 0),
        mark=number_of.get(CTA_MARK, 0),
        zone=number_of.get(CTA_ZONE, zone),
        id=number_of.get(CTA_ID, 0),
    )


def _plain_tuple(family: Family, message: bytes, start: int) -> tuple[int, Tuple]:
    """Decode a tuple at its fixed places: protocol, addresses and ports."""
    _, source, destination, protocol, sport, dport = _TUPLE[family.af].unpack_from(message, start)
    ntop = socket.inet_ntop
    return protocol, Tuple(ntop(family.af, source), ntop(family.af, destination), sport, dport)


def _tuple(family: Family, payload: bytes) -> tuple[int, Tuple, int] | None:
    """Decode a tuple attribute by attribute: protocol, addresses and ports, zone. None if it has no ports."""
    attributes = parsed(payload)
    numbers = parsed(attributes[CTA_TUPLE_PROTO])
    if CTA_PROTO_DST_PORT not in numbers:
        return None
    source, destination = (socket.inet_ntop(family.af, a) for _, a in parse(attributes[CTA_TUPLE_IP]))
    sport, dport = (int.from_bytes(numbers[k], "big") for k in (CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT))
    zone = int.from_bytes(attributes.get(CTA_TUPLE_ZONE, b""), "big")
    return numbers[CTA_PROTO_NUM][0], Tuple(source, destination, sport, dport), zone


def _identity(flow: Flow) -> bytes:
    """Encode what names an entry for its removal. The id is a hash of the entry and its place in memory."""
    body = nested(CTA_TUPLE_ORIG, encode_tuple(flow.family, flow.protocol, flow.original))
    if flow.zone:
        body += attribute(CTA_ZONE, struct.pack(">H", flow.zone))
    return body + (number(CTA_ID, flow.id) if flow.id else b"")


def encode_tuple(family: Family, protocol: int, direction: Tuple) -> bytes:
    """Encode the content of CTA_TUPLE_ORIG or CTA_TUPLE_REPLY."""
    first = 1 if family is Family.V4 else 3  # CTA_IP_V4_SRC and _DST, or the two of IPv6
    addresses = (direction.source, direction.destination)
    encoded = (attribute(first + at, socket.inet_pton(family.af, a)) for at, a in enumerate(addresses))
    ports = attribute(CTA_PROTO_SRC_PORT, struct.pack(">H", direction.sport))
    ports += attribute(CTA_PROTO_DST_PORT, struct.pack(">H", direction.dport))
    numbers = nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, bytes([protocol])), ports)
    return nested(CTA_TUPLE_IP, *encoded) + numbers


def _filter(protocol: int | None, dport: int | None) -> bytes:
    """Encode what to limit a dump to. No addresses: some kernels compare those of IPv6 the wrong way."""
    if protocol is None:
        return b""
    flags = FILTER_PROTO_NUM
    wanted = attribute(CTA_PROTO_NUM, bytes([protocol]))
    if dport is not None:
        flags |= FILTER_PROTO_DST_PORT
        wanted += attribute(CTA_PROTO_DST_PORT, struct.pack(">H", dport))
    original = struct.pack("=I", flags)
    limits = attribute(CTA_FILTER_ORIG_FLAGS, original) + attribute(CTA_FILTER_REPLY_FLAGS, bytes(4))
    return nested(CTA_TUPLE_ORIG, nested(CTA_TUPLE_PROTO, wanted)) + nested(CTA_FILTER, limits)
