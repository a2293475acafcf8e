"""Sets whose elements span a range of each field: who may come to which address and port."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import BatchError, Nft, Nftables
from netlink.nftables.expressions import Base, Do, Expression, Lookup, Meta, MetaKey, Payload, Verdict
from netlink.nftables.fake import FakeNft
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.objects import Chain, Data, Field, Hook, Map, Rule
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteElements,
    EnsureElements,
    Operation,
)
from netlink.nftables.trace import Packet, outcomes
from tests.netlink.nft import Use, own, reloaded

ALLOWED = Map(
    "allowed",
    (Field.DESTINATION, Field.L4PROTO, Field.DPORT, Field.SOURCE),
    ranges=True,
    comment="who may come",
)
RESTRICTED = Map("restricted", (Field.DESTINATION, Field.L4PROTO, Field.DPORT))
SERVICE = {Family.V4: "10.96.0.20", Family.V6: "fd96::20"}
CLIENT = {Family.V4: "10.8.", Family.V6: "fd08::"}
"""What the addresses of clients begin with."""
SETS: tuple[Operation, ...] = (AddTable("ranges"), AddMap(ALLOWED), AddMap(RESTRICTED))
UDP, HTTP, DNS = socket.IPPROTO_UDP, 80, 53

Element = tuple[bytes, Data]


def key(family: Family, port: int = HTTP) -> bytes:
    """Return the first three fields."""
    return socket.inet_pton(family.af, SERVICE[family]) + bytes((UDP, 0, 0, 0)) + struct.pack(">HH", port, 0)


def span(family: Family, first: str, last: str, port: int = HTTP) -> Element:
    """Return the element that lets clients from one to another one in."""
    ends = (key(family, port) + socket.inet_pton(family.af, address) for address in (first, last))
    return b"".join(ends), None


def clients(family: Family, first: str, last: str, port: int = HTTP) -> Element:
    """Return the element that lets clients in, by the last digits of their addresses."""
    return span(family, client(family, first), client(family, last), port)


def client(family: Family, digits: str) -> str:
    """Return a client's address: `0.7` is 10.8.0.7 or fd08::0:7."""
    return CLIENT[family] + (digits if family is Family.V4 else digits.replace(".", ":"))


@pytest.mark.parametrize("family", Family)
def test_ranges_are_added_read_back_and_removed(use: Use, family: Family) -> None:
    def check(nft: Nftables) -> None:
        one, two = clients(family, "0.0", "0.255"), clients(family, "1.7", "1.7")
        elsewhere = clients(family, "0.0", "1.255", DNS)
        nft.commit([*SETS, AddElements(ALLOWED, [one, two, elsewhere])])
        assert nft.elements(ALLOWED) == dict([one, two, elsewhere])
        nft.commit([EnsureElements(ALLOWED, [one, two]), DeleteElements(ALLOWED, [two])])
        assert nft.elements(ALLOWED) == dict([one, elsewhere])

    use(check, family)


@pytest.mark.parametrize(
    ("first", "last"),
    [("0.16", "0.31"), ("0.0", "0.16"), ("0.31", "0.255"), ("0.20", "0.21"), ("0.16", "0.40")],
)
def test_a_range_that_begins_or_ends_in_another_is_refused(use: Use, first: str, last: str) -> None:
    def check(nft: Nftables) -> None:
        free, there = clients(Family.V4, "1.0", "1.255"), clients(Family.V4, "0.16", "0.31")
        nft.commit([*SETS, AddElements(ALLOWED, [there])])
        wrong = clients(Family.V4, first, last)
        with pytest.raises(BatchError) as caught:
            nft.commit([AddElements(ALLOWED, [free, wrong])])
        assert (caught.value.errno, caught.value.element) == (errno.EEXIST, wrong[0])
        assert nft.elements(ALLOWED) == dict([there])

    use(check)


def test_a_range_gives_way_to_one_that_overlaps_it_in_one_batch(use: Use) -> None:
    def check(nft: Nftables) -> None:
        old, new = clients(Family.V4, "0.16", "0.31"), clients(Family.V4, "0.0", "0.20")
        nft.commit([*SETS, AddElements(ALLOWED, [old])])
        nft.commit([DeleteElements(ALLOWED, [old]), AddElements(ALLOWED, [new])])
        assert nft.elements(ALLOWED) == dict([new])

    use(check)


def test_a_range_is_removed_by_any_key_in_it(use: Use) -> None:
    """The kernel looks for the first key only; who removes must know what is there."""

    def check(nft: Nftables) -> None:
        nft.commit([*SETS, AddElements(ALLOWED, [clients(Family.V4, "0.16", "0.31")])])
        nft.commit([DeleteElements(ALLOWED, [clients(Family.V4, "0.20", "0.99")])])
        assert nft.elements(ALLOWED) == {}
        with pytest.raises(BatchError) as caught:
            nft.commit([DeleteElements(ALLOWED, [clients(Family.V4, "0.16", "0.31")])])
        assert caught.value.errno == errno.ENOENT
        assert caught.value.element == clients(Family.V4, "0.16", "0.31")[0]

    use(check)


def test_a_key_without_its_end_is_refused(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit(SETS)
        half = clients(Family.V4, "0.0", "0.255")[0][: ALLOWED.key_size(Family.V4)]
        with pytest.raises(BatchError) as caught:
            nft.commit([AddElements(ALLOWED, [(half, None)])])
        assert (caught.value.errno, caught.value.element) == (errno.EINVAL, half)

    use(check)


@pytest.mark.parametrize("family", Family)
def test_ranges_that_take_several_messages_are_read_back_and_the_wrong_one_is_named(
    family: Family, namespaces: Callable[[], str]
) -> None:
    many = [clients(family, "0.1", "3.9", port) for port in range(1, 1300)]
    wrong = clients(family, "0.2", "0.3", 1299)

    def inside() -> None:
        with Nft(family, "ranges") as nft:
            nft.commit(SETS)
            with pytest.raises(BatchError) as caught:
                nft.commit([AddElements(ALLOWED, [*many, wrong])])
            assert (caught.value.errno, caught.value.element) == (errno.EEXIST, wrong[0])
            assert nft.elements(ALLOWED) == {}
            nft.commit([AddElements(ALLOWED, many)])
            assert nft.elements(ALLOWED) == dict(many)

    netns.run(namespaces(), inside)


@pytest.mark.parametrize("family", Family)
def test_nft_prints_ranges_as_prefixes_and_loads_what_it_printed(
    family: Family, namespaces: Callable[[], str]
) -> None:
    first, last = (str(ip_address(octet * family.size)) for octet in (b"\0", b"\xff"))
    byte = "ff" if family is Family.V6 else "255"
    net = "fd08::/120" if family is Family.V6 else "10.8.0.0/24"
    wanted = {
        span(family, first, last): f"udp . 80 . {first}/0",
        clients(family, "0.0", f"0.{byte}", DNS): f"udp . 53 . {net}",
        clients(family, "1.2", "1.2", 8080): f"udp . 8080 . {client(family, '1.2')}",
        clients(family, "1.2", "1.9", 9090): f"udp . 9090 . {client(family, '1.2')}-{client(family, '1.9')}",
    }

    def inside() -> None:
        with Nft(family, "ranges") as nft:
            nft.commit([*SETS, *guard(family), AddElements(ALLOWED, list(wanted))])
            printed = reloaded()
            assert nft.elements(ALLOWED) == dict(list(wanted))
        keyword = family.keyword
        for words in (
            f"typeof {keyword} daddr . meta l4proto . th dport . {keyword} saddr",
            "flags interval",
            'comment "who may come"',
            f"{keyword} daddr . meta l4proto . th dport . {keyword} saddr != @allowed drop",
            *(f"{SERVICE[family]} . {text}" for text in wanted.values()),
        ):
            assert words in printed

    netns.run(namespaces(), inside)


def guard(family: Family) -> tuple[Operation, ...]:
    """Return a chain that drops what this machine sends to a restricted place from where it may not."""
    after = family.size // 4 + 2
    place: tuple[Expression, ...] = (
        Payload(Base.NETWORK, family.destination_offset, family.size),
        Meta(MetaKey.L4PROTO, after - 2),
        Payload(Base.TRANSPORT, 2, 2, after - 1),
    )
    origin = Payload(Base.NETWORK, family.source_offset, family.size, after)
    allowed = (*place, origin, Lookup(ALLOWED.name, invert=True))
    return (
        AddChain(Chain("output", BaseChain("filter", Hook.OUTPUT, 0))),
        AddRule(Rule("output", (*place, Lookup(RESTRICTED.name), *allowed, Do(Verdict.DROP)), "who may not")),
    )


@pytest.mark.parametrize("family", Family)
def test_packets_pass_from_first_to_last_and_the_walk_agrees(
    family: Family, namespaces: Callable[[], str]
) -> None:
    everybody = {"0.6", "0.7", "0.8", "0.9", "1.0", "2.0"}
    asked = {
        (digits, port): passes
        for port, allowed in ((HTTP, {"0.7", "0.8", "0.9"}), (DNS, {"1.0"}), (8080, everybody))
        for digits in everybody
        for passes in [digits in allowed]
    }
    operations: tuple[Operation, ...] = (
        *SETS,
        *guard(family),
        AddElements(RESTRICTED, [(key(family, port), None) for port in (HTTP, DNS)]),
        AddElements(ALLOWED, [clients(family, "0.7", "0.9"), clients(family, "1.0", "1.0", DNS)]),
    )
    fake = FakeNft(family)
    fake.commit(operations)
    assert fake.state

    def inside() -> None:
        own(family, [SERVICE[family], *{client(family, digits) for digits, _ in asked}])
        with Nft(family, "ranges") as nft:
            nft.commit(operations)
        for (digits, port), passes in asked.items():
            assert sends(family, client(family, digits), port) == passes, (digits, port)

    netns.run(namespaces(), inside)
    for (digits, port), passes in asked.items():
        packet = Packet(client(family, digits), SERVICE[family], UDP, port, from_node=True)
        (outcome,) = outcomes(fake.state, packet, frozenset())
        assert (outcome.verdict == "accept") == passes, (digits, port)


def sends(family: Family, address: str, port: int) -> bool:
    """Whether a packet from an address leaves; the output hook tells the sender that it dropped one."""
    with socket.socket(family.af, socket.SOCK_DGRAM) as sender:
        sender.bind((address, 0))
        try:
            sender.sendto(b"x", (SERVICE[family], port))
        except PermissionError:
            return False
        return True
