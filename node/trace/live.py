"""Send a real packet, listen to nftables' trace events on the node where it starts, compare with the trace.

A rule of our own, in a table that the kernel removes with the socket that made it, marks the packet to be
traced (`meta nftrace set 1`). The packet is a TCP connection's first, which is closed at once, or an empty
datagram.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from netlink import netns
from netlink.attributes import nested, number, parsed, text
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.messages import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, split
from netlink.nftables.batch import BATCH_BEGIN, BATCH_END, NFNL_SUBSYS_NFTABLES, NftSocket
from netlink.nftables.expressions import Base, Cmp, Compare, Constant, Expression, Meta, MetaKey, Payload
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.objects import Chain, Hook, Rule, Table
from netlink.nftables.operations import AddChain, AddRule, AddTable
from node.trace.ask import Known
from node.trace.nft import FAMILY_WORDS, string, verdict
from node.trace.nft_words import VERDICTS
from node.trace.packet import Branch, Kind, Packet, Trace, Verdict

NAME = "podwire_trace"
FIRST = -500
"""The priority of the chain that marks the packet: before all others."""
NEWTABLE, TRACE, TABLE_OWNER = 0, 17, 2
NETLINK_NETFILTER, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE = 12, 270, 1, 9
META_NFTRACE = 12
TYPE_POLICY, TYPE_RETURN, TYPE_RULE = 1, 2, 3
ANSWER_SECONDS, EVENT_SECONDS = 2.0, 0.5
RECEIVE_BYTES = 1 << 16
TAKEN = frozenset({errno.EEXIST, errno.EPERM})
"""What the kernel says when another process has the table that marks."""
KINDS = {socket.IPPROTO_TCP: socket.SOCK_STREAM, socket.IPPROTO_UDP: socket.SOCK_DGRAM}


class LiveError(Exception):
    """The packet cannot be sent, or nobody can listen; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Event:
    """What the kernel said of the packet: a rule that matched (by its handle), or a chain's policy."""

    chain: str
    handle: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What became of the real packet, and whether that is on one of the ways that were traced."""

    answer: str
    events: tuple[Event, ...]
    agrees: bool
    why: str

    def data(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return it as lines."""
        lines = [f"the real packet: {self.answer}"]
        lines += [f"  {e.chain}{f' handle {e.handle}' if e.handle else ''}: {e.verdict}" for e in self.events]
        return "\n".join([*lines, f"{'agrees' if self.agrees else 'DIFFERS'}: {self.why}"])


def confirm(trace: Trace, known: Known, namespaces: Mapping[str, str]) -> Confirmed:
    """Send the packet of a trace from where it starts and compare. Raises LiveError.

    `namespaces` are those of places; one that is not in it is the caller's own.
    """
    packet = trace.packet
    if packet.protocol not in KINDS:
        raise LiveError("--live sends TCP and UDP only")
    steps = trace.branches[0].steps
    start = steps[0].place
    near = {start, *namespaces}
    place = next((s.place for s in steps if s.kind is Kind.RULE and s.place in near), start)
    pod = known.pod(packet.source) if packet.source else None
    outside = steps[0].kind is not Kind.START and not (pod and pod.netns)
    if outside:
        raise LiveError(
            f"--live cannot send from {packet.source}, which is neither a pod of this node nor the node"
        )
    if pod and not Path(pod.netns).exists():
        raise LiveError(f"--live: {pod.netns}, the namespace of pod {pod.name}, is not there")
    sender = pod.netns if pod else namespaces.get(start, "")
    try:
        answer, events = _inside(namespaces.get(place, ""), _watched, packet, sender)
    except (NetlinkError, OSError) as error:
        if isinstance(error, NetlinkError) and error.errno in TAKEN:
            raise LiveError(f"the nftables table {NAME} is there: another --live runs; try again") from None
        raise LiveError(f"--live cannot listen: {error}") from None
    return judge(trace.branches, place, answer, events)


def _inside(namespace: str, function: Callable[..., Any], *args: Any) -> Any:
    return netns.run(namespace, function, *args) if namespace else function(*args)


@dataclass(frozen=True, slots=True)
class Traced:
    """Ask for the packet to be traced: `meta nftrace set`."""

    name: ClassVar[str] = "meta"
    slot: int = 0

    def attributes(self) -> bytes:
        """Return the encoded attributes."""
        return number(2, META_NFTRACE) + number(3, 8 + self.slot)


class Marker(NftSocket):
    """The table that marks a packet; the kernel removes it when this is closed, or its process ends."""

    def mark(self, packet: Packet) -> None:
        """Make the table. Raises BatchError, with an errno of `TAKEN` if there is one."""
        table = Table(packet.family, NAME)
        operation = AddTable("a packet to be traced")
        frames = [self._frame(BATCH_BEGIN, 0, b"", subsystem=0, resource=NFNL_SUBSYS_NFTABLES)]
        body = text(1, NAME) + number(2, TABLE_OWNER)
        flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK
        frames.append(self._frame(NEWTABLE, flags, body, family=packet.family.af))
        frames.append(self._frame(BATCH_END, 0, b"", subsystem=0, resource=NFNL_SUBSYS_NFTABLES))
        self._open.send(b"".join(frames))
        self._collect([(operation, ())], frames, self._sequence - 1)
        parts: list[AddChain | AddRule] = []
        for hook in (Hook.PREROUTING, Hook.OUTPUT):
            name = hook.name.lower()
            parts.append(AddChain(Chain(name, BaseChain("filter", hook, FIRST))))
            parts.append(AddRule(Rule(name, tuple(_selects(packet)), "trace this packet")))
        self.commit((table, parts))


def _selects(packet: Packet) -> Iterator[Expression]:
    family = packet.family
    for offset, address in (
        (family.source_offset, packet.source),
        (family.destination_offset, packet.destination),
    ):
        if address:
            yield Payload(Base.NETWORK, offset, family.size)
            yield Cmp(Compare.EQ, socket.inet_pton(family.af, address))
    yield Meta(MetaKey.L4PROTO)
    yield Cmp(Compare.EQ, bytes([packet.protocol]))
    yield Payload(Base.TRANSPORT, 2, 2)
    yield Cmp(Compare.EQ, struct.pack(">H", packet.dport))
    yield Constant(b"\1")
    yield Traced()


def _watched(packet: Packet, sender: str) -> tuple[str, tuple[Event, ...]]:
    """Mark, listen, send; return the answer, and the events of the first packet."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER))
        listener.bind((0, 0))
        listener.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)
        stack.enter_context(Marker()).mark(packet)
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(_inside(sender, probe, packet)))
        thread.start()
        events = _first(_listen(listener, thread))
        thread.join()
    return answers[0] if answers else "it could not be sent", events


def probe(packet: Packet) -> str:
    """Open a connection, or send a datagram, from the calling thread's namespace; say what came back."""
    family = socket.AF_INET if packet.family is Family.V4 else socket.AF_INET6
    try:
        with socket.socket(family, KINDS[packet.protocol]) as client:
            client.settimeout(ANSWER_SECONDS)
            if packet.source or packet.sport:
                client.bind((packet.source, packet.sport))
            client.connect((packet.destination, packet.dport))
            if packet.protocol == socket.IPPROTO_TCP:
                return "connected"
            client.send(b"")
            client.recv(1)
            return "answered"
    except TimeoutError:
        return "no answer"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return f"failed: {error.strerror or error}"


def _listen(listener: socket.socket, thread: threading.Thread) -> Iterator[tuple[int, Event]]:
    """Yield (packet, event) until the probe has ended and nothing more is said."""
    listener.settimeout(EVENT_SECONDS)
    deadline = time.monotonic() + ANSWER_SECONDS + EVENT_SECONDS
    while time.monotonic() < deadline:
        try:
            received = listener.recv(RECEIVE_BYTES)
        except TimeoutError:
            if not thread.is_alive():
                return
            continue
        for kind, _, _, message in split(received):
            if kind & 0xFF == TRACE and (found := event(message)):
                yield found


def event(message: bytes) -> tuple[int, Event] | None:
    """Decode NFT_MSG_TRACE: which packet it is of, and what happened; None for what decides nothing."""
    found = parsed(message, 20)
    kind = int.from_bytes(found.get(4, b""), "big")
    word = FAMILY_WORDS.get(message[16], str(message[16]))
    chain = f"{word} {string(found.get(1, b''))} {string(found.get(2, b''))}"
    packet = int.from_bytes(found.get(6, b""), "big")
    if kind == TYPE_RULE and 3 in found:
        # The verdict is said without the data's own attribute around it.
        target = verdict(nested(2, found.get(5, b"")))
        words = f"{VERDICTS.get(target.code, target.code)} {target.chain}".strip() if target else ""
        return packet, Event(chain, int.from_bytes(found.get(3, b""), "big"), words)
    if kind == TYPE_POLICY:
        drops = int.from_bytes(found.get(16, b"\0\0\0\1"), "big") == 0
        return packet, Event(chain, 0, f"policy {'drop' if drops else 'accept'}")
    return None


def _first(events: Iterator[tuple[int, Event]]) -> tuple[Event, ...]:
    """Return the events of the first packet: each begins with that of our own rule."""
    found: list[Event] = []
    first, marked, over = 0, 0, False
    for packet, one in events:
        ours = one.chain.split(" ")[1] == NAME
        if ours and one.handle:
            marked += 1
            first = first or packet
            over = over or marked > 1
        if not ours and packet == first and not over:
            found.append(one)
    return tuple(found)


def judge(branches: Sequence[Branch], place: str, answer: str, events: Sequence[Event]) -> Confirmed:
    """Compare what became of the real packet with the ways that were traced. Pure."""
    real = [(e.chain, e.handle) for e in events if e.handle]
    if not real and any(s.kind is Kind.RULE for b in branches for s in b.steps if s.place == place):
        return Confirmed(answer, tuple(events), False, f"no rule on {place} has seen it")
    alike = [b for b in branches if _told(b, place) == [r for r in real if r not in _open(b, place)]]
    if not alike:
        return Confirmed(
            answer, tuple(events), False, f"on {place} other rules matched than on any way traced"
        )
    fits = [b for b in alike if _fits(b.end.verdict, answer)]
    if not fits:
        ends = ", ".join(dict.fromkeys(b.end.verdict.value for b in alike))
        return Confirmed(answer, tuple(events), False, f"traced as {ends}")
    end = fits[0].end
    matched = (
        f"the same {len(real)} rules of {place} matched" if real else f"no rule of {place} is on its way"
    )
    why = f"{matched}; traced as {end.verdict.value}"
    if end.verdict.arrives and answer in ("refused", "no answer"):
        why += "; nobody seems to listen there"
    return Confirmed(answer, tuple(events), True, why)


def _told(branch: Branch, place: str) -> list[tuple[str, int]]:
    """Return the rules that match on a way at a place, until it leaves; those of outer packets are others."""
    found = []
    here = False
    for step in branch.steps:
        if step.place != place:
            if here:
                break
            continue
        here = True
        # Of legacy tables the kernel tells nothing.
        if step.kind is Kind.RULE and not step.hook.startswith("(") and "-legacy " not in step.chain:
            found.append((step.chain, step.handle))
    return found


def _open(branch: Branch, place: str) -> set[tuple[str, int]]:
    return {(s.chain, s.handle) for s in branch.steps if s.kind is Kind.UNDECIDED and s.place == place}


def _fits(verdict: Verdict, answer: str) -> bool:
    if verdict is Verdict.REJECTED:
        return answer == "refused" or answer.startswith("failed")
    if verdict in (Verdict.DROPPED, Verdict.UNROUTABLE):
        return answer == "no answer" or answer.startswith("failed")
    return not answer.startswith("failed")
