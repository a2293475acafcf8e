"""Entries that lead to what is gone are removed, and no others."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from netlink.attributes import attribute, nested, number
from netlink.conntrack import (
    BODY,
    CT_GET,
    IPS_DST_NAT,
    Backend,
    Conntrack,
    Destination,
    Flow,
    Tuple,
    encode_tuple,
    flow,
    served,
    stale,
)
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP_INTR,
    NLM_F_EXCL,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
    pack,
    split,
)
from tests.netlink.joined import with_conntrack

T = TypeVar("T")
TCP, UDP, SCTP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP
CT_NEW = 1 << 8
ESTABLISHED = 0x2 | 0x4 | 0x8  # IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
PORT = 5300


# Entries written by the test, so that there can be many, of protocols and zones that have no sockets here.


@pytest.fixture
def inside(namespaces: Callable[[], str]) -> Callable[[Callable[[Conntrack], T]], T]:
    """A function that runs another with a socket in a namespace of the test's."""
    name = namespaces()
    return lambda work: with_conntrack(name, work)


Inside = Callable[[Callable[[Conntrack], None]], None]


def entry(number: int, destination: str = "10.9.0.1", port: int = 53, protocol: int = UDP) -> Flow:
    """Return the `number`th client's entry, untranslated: who answers is the destination itself."""
    family = Family.V6 if ":" in destination else Family.V4
    source = f"fd02::{number + 1:x}" if family is Family.V6 else f"10.2.{number // 250}.{number % 250 + 1}"
    there, back = (
        Tuple(source, destination, 1024 + number, port),
        Tuple(destination, source, port, 1024 + number),
    )
    return Flow(family, protocol, there, back)


def insert(*flows: Flow, extra: bytes = b"") -> None:
    """Write entries to the kernel, in the namespace of the calling thread."""
    head = number(7, 600) + number(3, ESTABLISHED) + extra  # CTA_TIMEOUT, CTA_STATUS
    bodies = [
        (f.family, _tuples(f) + head + (attribute(18, struct.pack(">H", f.zone)) if f.zone else b""))
        for f in flows
    ]
    _write(bodies)


def _tuples(flow: Flow) -> bytes:
    directions = (flow.original, flow.reply)
    return b"".join(
        nested(at, encode_tuple(flow.family, flow.protocol, d)) for at, d in enumerate(directions, start=1)
    )


def _write(bodies: Sequence[tuple[Family, bytes]]) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as raw:
        for at in range(0, len(bodies), 50):
            part = bodies[at : at + 50]
            flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK
            raw.send(
                b"".join(
                    pack(CT_NEW, flags, n, struct.pack("=BBH", family.af, 0, 0) + body)
                    for n, (family, body) in enumerate(part)
                )
            )
            answers = 0
            while answers < len(part):
                for kind, _, _, message in split(raw.recv(1 << 16)):
                    assert (kind, error_code(message)) == (NLMSG_ERROR, 0)
                    answers += 1


def plain(flows: Sequence[Flow]) -> set[Flow]:
    """Return flows without what the kernel adds."""
    return {replace(f, status=0, id=0) for f in flows}


def test_a_dump_holds_the_entries_of_the_family_protocol_and_port_asked_for(inside: Inside) -> None:
    v4 = [entry(1), entry(2, port=54), entry(3, protocol=TCP), entry(4, protocol=SCTP)]
    v4.append(entry(5, port=54, protocol=SCTP))
    v6 = [entry(1, "fd09::1"), entry(2, "fd09::1", port=54)]

    def work(conntrack: Conntrack) -> None:
        insert(*(f for f in v4 + v6 if f.protocol != TCP))
        insert(*(f for f in v4 if f.protocol == TCP), extra=nested(4, nested(1, attribute(1, b"\3"))))
        assert plain(conntrack.flows(Family.V4)) == set(v4)
        assert plain(conntrack.flows(Family.V6)) == set(v6)
        assert plain(conntrack.flows(Family.V4, UDP)) == {v4[0], v4[1]}
        assert plain(conntrack.flows(Family.V4, UDP, 54)) == {v4[1]}
        assert plain(conntrack.flows(Family.V4, SCTP, 54)) == {v4[4]}
        assert plain(conntrack.flows(Family.V4, original_dport=54)) == {v4[1], v4[4]}
        assert plain(conntrack.flows(Family.V6, UDP, 54)) == {v6[1]}
        assert conntrack.flows(Family.V6, SCTP) == ()
        assert len(conntrack._dump(Family.V4, UDP, 54)) == 1, "the kernel does not filter"

    inside(work)


def test_an_entry_that_is_gone_counts_for_nothing_and_one_with_another_id_stays(inside: Inside) -> None:
    def work(conntrack: Conntrack) -> None:
        insert(entry(1), entry(2))
        before = conntrack.flows(Family.V4)
        assert conntrack.delete(*before) == 2
        assert conntrack.delete(*before) == 0
        insert(entry(1))
        (since,) = conntrack.flows(Family.V4)
        assert conntrack.delete(replace(since, id=since.id ^ 1)) == 0
        assert conntrack.flows(Family.V4) == (since,)
        assert conntrack.delete(entry(1)) == 1, "without an id any will do"
        assert conntrack.delete() == 0

    inside(work)


def test_those_that_a_predicate_picks_are_removed(inside: Inside) -> None:
    def work(conntrack: Conntrack) -> None:
        insert(*map(entry, range(10)))
        assert conntrack.delete_where(lambda f: f.original.sport % 2 == 0, Family.V4, UDP) == 5
        assert plain(conntrack.flows(Family.V4)) == {entry(n) for n in range(1, 10, 2)}

    inside(work)


@pytest.mark.parametrize("protocol", [UDP, SCTP])
@pytest.mark.parametrize("network", ["10.9.0.", "fd09::"])
def test_the_stale_entries_of_many_destinations_go_at_once(
    inside: Inside, protocol: int, network: str
) -> None:
    """2,000 entries of 100 services on 10 ports: every second service got a pod, half of those kept one."""
    every = [
        entry(n, f"{network}{n % 100 + 1}", 53 + n % 10, protocol) for n in range(2000)
    ]  # answered by the service's own address, as by a pod with the host's network
    changed: dict[Destination, frozenset[Backend]] = {}
    for service in range(0, 100, 2):
        address, port = f"{network}{service + 1}", 53 + service % 10
        kept = [Backend(address, port)] if service % 4 == 0 else []
        changed |= served([address], protocol, port, Backend(f"{network}200", 53), *kept)
    gone = {f for n, f in enumerate(every) if n % 4 == 2}

    def work(conntrack: Conntrack) -> None:
        insert(*every)
        assert conntrack.delete_stale(changed) == len(gone) == 500
        assert plain(conntrack.flows(every[0].family)) == set(every) - gone
        assert conntrack.delete_stale(changed) == 0
        assert conntrack.delete_stale({}) == 0

    inside(work)


def test_icmp_is_no_flow(inside: Inside) -> None:
    def icmp(kind: int) -> bytes:
        identity = attribute(4, b"\0\7") + attribute(5, bytes([kind])) + attribute(6, b"\0")
        addresses = ("10.2.0.1", "10.9.0.1") if kind == 8 else ("10.9.0.1", "10.2.0.1")
        source, destination = (attribute(at, socket.inet_aton(a)) for at, a in enumerate(addresses, start=1))
        return nested(1, source, destination) + nested(2, attribute(1, b"\1"), identity)

    def work(conntrack: Conntrack) -> None:
        _write([(Family.V4, nested(1, icmp(8)) + nested(2, icmp(0)) + number(7, 600))])
        assert len(conntrack._dump(Family.V4, None, None)) == 1
        assert conntrack.flows(Family.V4) == ()

    inside(work)


def test_an_entry_of_another_zone_is_not_ours(inside: Inside) -> None:
    """An overlay switch on the node (Open vSwitch, OVN) keeps entries of its own in zones."""
    foreign = replace(entry(1), zone=7)
    now = served(["10.9.0.1"], UDP, 53, Backend("10.1.0.2", 53))

    def work(conntrack: Conntrack) -> None:
        insert(foreign, entry(2))
        assert plain(conntrack.flows(Family.V4)) == {foreign, entry(2)}
        assert conntrack.delete_stale(now) == 1
        assert plain(conntrack.flows(Family.V4)) == {foreign}
        assert conntrack.delete(*conntrack.flows(Family.V4)) == 1

    inside(work)


# What is stale.

TO_OLD = Flow(
    Family.V4,
    UDP,
    Tuple("10.2.0.1", "10.0.0.1", 1024, PORT),
    Tuple("10.1.0.2", "10.2.0.1", 53, 1024),
    status=IPS_DST_NAT,
)
TO_NODE = replace(TO_OLD, reply=Tuple("10.0.0.1", "10.2.0.1", PORT, 1024), status=0)
OLD, NEW = Backend("10.1.0.2", 53), Backend("10.1.0.3", 53)


@pytest.mark.parametrize(
    ("flow", "backends", "expected"),
    [
        pytest.param(TO_OLD, [NEW], True, id="another pod serves it"),
        pytest.param(TO_OLD, [OLD, NEW], False, id="its pod is still one of them"),
        pytest.param(TO_OLD, [Backend("10.1.0.2", 54)], True, id="its pod serves another port"),
        pytest.param(TO_OLD, [], True, id="nobody serves it"),
        pytest.param(TO_NODE, [], False, id="nobody serves it, and the node itself answers"),
        pytest.param(TO_NODE, [NEW], True, id="the node itself answered until a pod came"),
        pytest.param(replace(TO_OLD, protocol=SCTP), [NEW], False, id="the port of another protocol"),
        pytest.param(replace(TO_OLD, zone=3), [NEW], False, id="another zone's"),
        pytest.param(
            replace(TO_OLD, original=TO_OLD.original._replace(dport=PORT + 1)),
            [NEW],
            False,
            id="another port",
        ),
        pytest.param(
            replace(TO_OLD, original=TO_OLD.original._replace(destination="8.8.8.8")),
            [NEW],
            False,
            id="the same port of a stranger, through the node",
        ),
    ],
)
def test_stale_is_what_leads_elsewhere(flow: Flow, backends: list[Backend], expected: bool) -> None:
    assert stale(flow, served(["10.0.0.1", "10.0.0.2"], UDP, PORT, *backends)) is expected


def test_tcp_is_never_stale() -> None:
    now = served(["10.0.0.1"], TCP, PORT, NEW)
    assert not stale(replace(TO_OLD, protocol=TCP), now)


# Dumps that change under way.


class Scripted:
    """A kernel that answers with datagrams prepared by the test; each `flags` is a dump of one entry."""

    def __init__(self, dumps: Iterator[int]) -> None:
        self.dumps = dumps
        self.asked = 0

    def send(self, data: bytes) -> None:
        self.asked += 1
        ((_, _, self.sequence, _),) = split(data)

    def recv(self, _: int) -> bytes:
        body = bytes((Family.V4.af, 0, 0, 0)) + _tuples(entry(self.asked))
        done = pack(NLMSG_DONE, 0, self.sequence, bytes(4))
        old = pack(CT_GET, 0, self.sequence - 1, body)  # what is left of an earlier question
        return old + pack(CT_GET, next(self.dumps), self.sequence, body) + done


def scripted(*dumps: int) -> tuple[Conntrack, Scripted]:
    conntrack, kernel = Conntrack(), Scripted(iter(dumps))
    conntrack._socket = kernel  # type: ignore[assignment]
    return conntrack, kernel


def test_a_dump_that_changed_under_way_is_asked_for_again() -> None:
    conntrack, kernel = scripted(NLM_F_DUMP_INTR, NLM_F_DUMP_INTR, 0)
    assert conntrack.flows(Family.V4, UDP) == (entry(3),)
    assert kernel.asked == 3


def test_a_dump_that_never_stands_still_is_given_up() -> None:
    conntrack, kernel = scripted(*[NLM_F_DUMP_INTR] * 100)
    with pytest.raises(NetlinkError, match="change too fast") as failure:
        conntrack.flows(Family.V4, UDP)
    assert failure.value.errno == errno.EINTR
    assert kernel.asked == 10


class Refusing:
    """A kernel that answers each removal with the next code of a list; a success only if asked to."""

    def __init__(self, codes: Sequence[int]) -> None:
        self.codes = iter(codes)
        self.answers: list[bytes] = []

    def send(self, data: bytes) -> None:
        for _, flags, sequence, message in split(data):
            code = next(self.codes)
            if code or flags & NLM_F_ACK:
                body = struct.pack("=i", -code) + message[:16]
                self.answers.append(pack(NLMSG_ERROR, 0, sequence, body))

    def recv(self, _: int) -> bytes:
        return self.answers.pop(0)


@pytest.mark.parametrize("last", [0, errno.ENOENT, errno.EBUSY])
def test_the_first_refusal_is_told_after_all_were_tried(last: int) -> None:
    codes = [0, errno.ENOENT, errno.EPERM, 0, *[0] * 200, last]
    conntrack, kernel = Conntrack(), Refusing(codes)
    conntrack._socket = kernel  # type: ignore[assignment]
    with pytest.raises(NetlinkError, match=r"^cannot remove Flow\(") as failure:
        conntrack.delete(*(entry(n) for n in range(len(codes))))
    assert failure.value.errno == errno.EPERM
    assert list(kernel.codes) == kernel.answers == []


def test_a_socket_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        Conntrack().flows(Family.V4)


def test_the_fixed_places_are_where_the_kernel_writes(inside: Inside) -> None:
    """An entry is decoded the same when its tuples are gone through attribute by attribute."""

    def work(conntrack: Conntrack) -> None:
        for destination in ("10.9.0.1", "fd09::1"):
            insert(entry(1, destination))
            family = entry(1, destination).family
            (message,) = conntrack._dump(family, UDP, 53)
            found = flow(message)
            longer = nested(1, encode_tuple(family, UDP, entry(1, destination).original), attribute(99, b""))
            start = BODY + struct.unpack_from("=H", message, BODY)[0]
            assert flow(message[:BODY] + longer + message[start:]) == found
            assert plain([found] if found else []) == {entry(1, destination)}

    inside(work)
