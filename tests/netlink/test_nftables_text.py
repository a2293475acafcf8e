"""The printed table is the kernel's own listing, and nft makes the very table of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.nftables.expressions import (
    Base,
    Cmp,
    Compare,
    Constant,
    Counter,
    Ct,
    CtKey,
    Dnat,
    Do,
    Expression,
    LimitOver,
    Lookup,
    Meta,
    MetaKey,
    MetaSet,
    Payload,
    Reject,
    SocketTransparent,
    Verdict,
)
from netlink.nftables.fake import FakeNft, State
from netlink.nftables.objects import BRIDGE, PRIORITY_MANGLE, Chain, Field, Hook, Map, Rule, Table
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import AddChain, AddRule, AddTable, DeleteTable
from netlink.nftables.text import listing
from node.store import Store
from proxy.dataplane import NodeRanges
from proxy.frontends import Frontend, frontends
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)
from proxy.nftables.dataplane import Dataplane
from proxy.nftables.ruleset import TABLE
from proxy.table import FrontendTable
from proxy.topology import Place
from tests.netlink.nft import nft
from tests.proxy import plan
from tests.proxy.test_dataplane_property import (
    Batches,
    batches_of_changes,
    deliver,
    node_ranges,
    objects_after,
)

LOCAL, CLUSTER = TrafficPolicy.LOCAL, TrafficPolicy.CLUSTER
RANGES = NodeRanges(
    pod_cidrs=("10.244.0.0/16", "fd44::/48"),
    local_pod_cidrs=("10.244.1.0/24", "fd44:0:0:1::/64"),
    no_masquerade=("192.168.50.11/32", "192.168.50.12/31", "255.255.255.0/24", "fd50::b/128", "ff00::/8"),
    node_ports=("0.0.0.0/0", "::/0"),
    node_addresses=("192.168.50.11", "192.168.50.12", "fd50::b"),
    egress=("192.0.2.1", "fd00::1"),
)
SOURCES = {
    Family.V4: ("10.1.0.0/16", "10.3.0.4/32", "192.168.0.0/24", "192.168.1.0/25", "128.0.0.0/2"),
    Family.V6: ("fd01::/64", "fd02::3/128", "fd03::/64", "fd03:0:0:1::/65", "::/1"),
}

Where = Callable[[], str]


def test_every_sort_of_service(two: Where, family: Family) -> None:
    assert_same(two, family, every_sort(family), RANGES)


def test_clients_that_stay_with_their_endpoint(two: Where, family: Family) -> None:
    """Affinity, with names of the greatest length."""
    (port,) = PORTS[:1]
    found = of(Service(name("n"), (at(family, 1),), (port,), affinity_seconds=10800), family, 1)
    others = tuple(replace(p, node_port=p.node_port + 100 if p.node_port else 0) for p in PORTS)
    found += of(Service(name("p"), (at(family, 2),), others, LOCAL, LOCAL, affinity_seconds=93784), family, 7)
    without = (replace(port, node_port=0),)
    long = Service(ObjectName("n" * 63, "s" * 63), (at(family, 3),), without, affinity_seconds=1)
    assert_same(two, family, [*found, *of(long, family, 2)], RANGES)


def test_a_table_without_services(two: Where, family: Family) -> None:
    assert_same(two, family, (), NodeRanges(node_ports=()))


def test_the_plan_of_the_packet_traces(two: Where, family: Family) -> None:
    assert_same(two, family, plan.programmed(family), plan.node_ranges())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches_of_changes, node_ranges)
def test_any_services(two: Where, batches: Batches, ranges: NodeRanges) -> None:
    objects: dict[tuple[str, str], object] = {}
    for kind, whose, value in (step for batch in batches for step in batch):
        if kind != "ranges":
            objects_after(objects, (kind, whose, value))
    table = FrontendTable()
    deliver(Store(), table, objects)
    assert_same(two, Family.V4, table, ranges)


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        ("0a000000", "0a0000ff", "10.0.0.0/24"),
        ("0a000004", "0a000004", "10.0.0.4"),
        ("0a000001", "0a000002", "10.0.0.1-10.0.0.2"),
        ("00000000", "ffffffff", "0.0.0.0/0"),
        ("80000000", "ffffffff", "128.0.0.0/1"),
        ("00000001", "ffffffff", "0.0.0.1-255.255.255.255"),
    ],
)
def test_a_range_is_an_address_or_a_cidr_or_first_and_last(first: str, last: str, words: str) -> None:
    ranges = Map("ranges", (Field.SOURCE,), interval=True)
    end = int(last, 16) + 1
    elements = {bytes.fromhex(first) + b"\0": None}
    if end < 1 << 32:
        elements[end.to_bytes(4, "big") + b"\1"] = None
    printed = listing(TABLE_V4, State("", maps={"ranges": ranges}, elements={"ranges": {**elements}}))
    assert f"elements = {{ {words} }}" in printed


SADDR = Payload(Base.NETWORK, 12, 4)


@pytest.mark.parametrize(
    "expressions",
    [
        (LimitOver(1, 1),),
        (Meta(MetaKey.PROTOCOL),),
        (Payload(Base.NETWORK, 9, 1),),
        (Payload(Base.LINK, 0, 6),),
        (Reject(1),),
        (Cmp(Compare.EQ, b"\6"),),
        (Meta(MetaKey.MARK), Cmp(Compare.EQ, bytes(4))),
        (Meta(MetaKey.L4PROTO), Lookup("sources")),
        (Lookup("sources"),),
        (SADDR, MetaSet(MetaKey.MARK)),
        (SADDR, Dnat(2, 0, 1)),
        (SADDR, Dnat(2, 0, 0)),
        (Constant(bytes(4)), Dnat(2, 0, 1)),
    ],
    ids=str,
)
def test_what_the_printer_does_not_know_is_an_error(expressions: tuple[Expression, ...]) -> None:
    sources = Map("sources", (Field.SOURCE,))
    state = State("", {"one": Chain("one")}, {"one": [Rule("one", expressions, "")]}, {"sources": sources})
    state.elements["sources"] = {}
    with pytest.raises(NotImplementedError, match="the printer does not know"):
        listing(TABLE_V4, state)


@pytest.mark.parametrize(
    "which", [Map("m", (Field.IIFNAME,)), Map("m", (Field.SOURCE,), limits=True)], ids=str
)
def test_a_set_that_the_printer_does_not_know_is_an_error(which: Map) -> None:
    with pytest.raises(NotImplementedError, match="the printer does not know"):
        listing(TABLE_V4, State("", maps={"m": which}, elements={"m": {}}))


def test_a_table_of_bridges_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="bridge podwire"):
        listing(Table(BRIDGE, TABLE), State(""))


def test_a_rule_needs_no_comment() -> None:
    rule = Rule("one", (SADDR, Cmp(Compare.NEQ, b"\x0a\0"), Counter(), Do(Verdict.JUMP, "two")), "")
    printed = listing(TABLE_V4, State("", {"one": Chain("one")}, {"one": [rule]}))
    assert "\t\tip saddr != 10.0.0.0/16 counter packets 0 bytes 0 jump two\n" in printed


@pytest.mark.parametrize(
    ("expressions", "words"),
    [
        ((Meta(MetaKey.SKGID), Cmp(Compare.EQ, struct.pack("=I", 61000))), "meta skgid 61000"),
        ((Meta(MetaKey.SKGID), Cmp(Compare.NEQ, struct.pack("=I", 7))), "meta skgid != 7"),
        ((Ct(CtKey.DIRECTION), Cmp(Compare.EQ, b"\1")), "ct direction reply"),
        ((Ct(CtKey.DIRECTION), Cmp(Compare.EQ, b"\0")), "ct direction original"),
        ((SocketTransparent(), Cmp(Compare.EQ, b"\1")), "socket transparent 1"),
    ],
    ids=str,
)
def test_what_is_asked_of_sockets_and_connections(
    two: Where, expressions: tuple[Expression, ...], words: str
) -> None:
    """As nft prints it."""
    chain = Chain("one", BaseChain("filter", Hook.PREROUTING, PRIORITY_MANGLE))
    rule = Rule("one", (*expressions, Do(Verdict.RETURN)), "")
    state = State("a comment", {"one": chain}, {"one": [rule]})
    text = listing(TABLE_V4, state)
    assert f"\t\t{words} return\n" in text

    def load() -> str:
        with Nft(Family.V4, TABLE) as kernel:
            kernel.commit([AddTable("a comment"), AddChain(chain), AddRule(rule)])
            try:
                return nft("list", "table", "ip", TABLE)
            finally:
                kernel.commit([DeleteTable()])

    assert netns.run(two(), load).replace(' comment ""', "") == text


TABLE_V4 = Table(Family.V4, TABLE)
PORTS = (
    ServicePort("h", Protocol.TCP, 80, 30001),
    ServicePort("d", Protocol.UDP, 5353),
    ServicePort("s", Protocol.SCTP, 80),
)


@pytest.fixture(params=Family, ids=lambda f: f.keyword)
def family(request: pytest.FixtureRequest) -> Family:
    assert isinstance(request.param, Family)
    return request.param


@pytest.fixture(scope="module")
def two(namespaces: Where) -> Where:
    """Two namespaces, in turn."""
    names = [namespaces(), namespaces()]

    def turn() -> str:
        names.reverse()
        return names[0]

    return turn


def name(text: str) -> ObjectName:
    return ObjectName("test", text)


def at(family: Family, number: int) -> str:
    return f"10.96.0.{number}" if family is Family.V4 else f"fd96::{number:x}"


def of(service: Service, family: Family, here: int, away: int = 0) -> tuple[Frontend, ...]:
    """The frontends of a service with some endpoints on this node, and some on another."""
    places = ["me"] * here + ["other"] * away
    ends = tuple(Endpoint(at(family, 100 + n), place) for n, place in enumerate(places))
    ports = tuple(EndpointPort(p.name, p.protocol, 8080) for p in service.ports)
    piece = EndpointSlice(service.name, service.name, family, ports, ends)
    return frontends(service, (piece,), Place("me"))


def every_sort(family: Family) -> list[Frontend]:
    """Every action, policy, kind of address, and number of endpoints that the layout tells apart."""
    found: list[Frontend] = []
    number = 0
    for here, away in ((0, 0), (0, 2), (1, 3), (16, 0), (17, 30)):
        for policy in (LOCAL, CLUSTER):
            number += 1
            own, external, balancer = (at(family, number + offset) for offset in (0, 20, 40))
            ports = tuple(
                ServicePort(p.name, p.protocol, p.port, 30000 + 3 * number + i) for i, p in enumerate(PORTS)
            )
            sources = SOURCES[family] if number % 3 else ()
            service = Service(
                name(f"s{number}"), (own,), ports, policy, policy, (external,), (balancer,), sources
            )
            found += of(service, family, here, away)
    return found


def assert_same(two: Where, family: Family, served: Iterable[Frontend], ranges: NodeRanges) -> None:
    """The text, what nft lists of a load by us, and what it lists of a load of the text: all the same."""
    served = list(served)
    fake = FakeNft(family)
    Dataplane(fake).load(served, ranges)
    assert fake.state
    text = listing(Table(family, TABLE), fake.state)

    def load() -> tuple[str, list[str]]:
        with Nft(family, TABLE) as kernel:
            Dataplane(kernel).load(served, ranges)
            try:
                return listed(family)
            finally:
                kernel.commit([DeleteTable()])

    def load_text() -> tuple[str, list[str]]:
        nft("-f", "-", stdin=text)
        try:
            return listed(family)
        finally:
            nft("flush", "ruleset")

    printed, code = netns.run(two(), load)
    assert normal(text) == normal(printed)
    printed_again, code_again = netns.run(two(), load_text)
    assert normal(printed_again) == normal(printed)
    assert code_again == code


def listed(family: Family) -> tuple[str, list[str]]:
    """What nft prints of the table, and the kernel's expressions, rule by rule.

    Registers are numbered as they are used: nft chooses some others. It also swaps the bytes of the protocol,
    which is only one, in the key of a set with ranges.
    """
    head = f"{family.keyword} {TABLE} "
    code: list[str] = []
    registers: dict[str, str] = {}
    for line in nft("--debug=netlink", "list", "table", family.keyword, TABLE).splitlines():
        if line.startswith(head):
            code.append(" ".join(line.split()[:3]))  # a rule's chain, without its handle
            registers.clear()
        elif line.startswith("  [") and not re.search(r"byteorder reg \d+ = hton\(reg \d+, 2, 1\)", line):
            for found in re.findall(r"reg(?:_key)? (\d+)", line):
                registers.setdefault(found, str(len(registers)))
            code.append(re.sub(r"(reg(?:_key)?) (\d+)", lambda m: f"{m[1]} {registers[m[2]]}", line))
    return nft("list", "table", family.keyword, TABLE), code


def normal(text: str) -> str:
    """A listing with sorted elements and without what was counted."""

    def in_order(found: re.Match[str]) -> str:
        return "{ " + ", ".join(sorted(" ".join(e.split()) for e in found[1].split(","))) + " }"

    text = re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", text)
    return re.sub(r"(?<=elements = )\{(.*?)\}", in_order, text, flags=re.DOTALL)
