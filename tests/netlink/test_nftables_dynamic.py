"""Sets that packets fill, maps that come and go, and a random number that picks a chain: session affinity."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import BatchError, Nft, Nftables
from netlink.nftables.expressions import (
    Base,
    Cmp,
    Compare,
    Constant,
    Dnat,
    Do,
    Expression,
    Lookup,
    MapLookup,
    Meta,
    MetaKey,
    Payload,
    RandomIndex,
    Remember,
    Verdict,
    VerdictLookup,
)
from netlink.nftables.fake import FakeNft
from netlink.nftables.objects import PRIORITY_DSTNAT, Chain, Field, Goto, Hook, Map, Rule
from netlink.nftables.objects import Base as BaseChain
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteChain,
    DeleteMap,
    DeleteTable,
    Operation,
)
from netlink.nftables.trace import Packet, outcomes
from tests.netlink.nft import Use, loaded_again, own, reloaded

THREE_HOURS = 10_800
CLIENTS = Map("clients", (Field.SOURCE,), dynamic=True, timeout=THREE_HOURS, comment="who came")
FEW = Map("few", (Field.SOURCE,), dynamic=True, timeout=THREE_HOURS, size=2)
CHOICE = Map("choice", (Field.INDEX,), verdicts=True, comment="where new clients go")
TARGETS = Map("targets", (Field.INDEX,), data=(Field.DESTINATION,))
MAPS = (CLIENTS, FEW, CHOICE, TARGETS)
SKELETON: tuple[Operation, ...] = (
    AddTable("dynamic"),
    *map(AddMap, MAPS),
    AddChain(Chain("one")),
    AddChain(Chain("two")),
    AddChain(Chain("from")),
)
INDEXES = [struct.pack("=I", i) for i in range(4)]
ALL = frozenset(m.name for m in MAPS)

PLAN = {
    Family.V4: ("10.96.0.1", "10.9.0.%d", "10.0.0.1%d"),
    Family.V6: ("fd96::1", "fd09::%d", "fd00::1%d"),
}
"""The service's address, clients, endpoints."""
PORT, TARGET_PORT = 80, 8080
CONNECTIONS = 16
"""Chance takes this many connections to one of four endpoints with probability 4^-15."""


def source(family: Family) -> Payload:
    return Payload(Base.NETWORK, family.source_offset, family.size)


@pytest.mark.parametrize("expression", [VerdictLookup("choice"), MapLookup("targets")], ids=lambda e: e.name)
def test_a_map_that_a_rule_looks_into_stays(use: Use, expression: Expression) -> None:
    check_use(use, (RandomIndex(2), expression))


@pytest.mark.parametrize("expression", [Lookup("clients"), Remember("clients")], ids=lambda e: e.name)
def test_a_set_that_a_rule_uses_stays(use: Use, expression: Expression) -> None:
    check_use(use, (source(Family.V4), expression))


def check_use(use: Use, expressions: tuple[Expression, ...]) -> None:
    """Check that what the last expression uses cannot go before the rule."""
    used = expressions[-1]
    assert isinstance(used, Lookup | MapLookup | VerdictLookup | Remember)
    which = next(m for m in MAPS if m.name == used.set_name)

    def check(nft: Nftables) -> None:
        nft.commit([*SKELETON, AddRule(Rule("from", expressions, "a use"))])
        with pytest.raises(BatchError) as caught:
            nft.commit([DeleteMap(which)])
        assert caught.value.errno == errno.EBUSY
        assert str(caught.value).startswith(f"cannot delete map {which.name}: ")
        assert nft.maps() == ALL
        nft.commit([DeleteChain("from"), DeleteMap(which)])
        assert nft.maps() == ALL - {which.name}

    use(check)


def test_maps_are_listed_and_removed_by_name(use: Use) -> None:
    def check(nft: Nftables) -> None:
        assert nft.maps() == frozenset()
        nft.commit(SKELETON)
        assert nft.maps() == ALL
        nft.commit([DeleteMap(name) for name in nft.maps()])
        assert nft.maps() == frozenset()
        with pytest.raises(BatchError) as caught:
            nft.commit([DeleteMap(CLIENTS)])
        assert caught.value.errno == errno.ENOENT
        nft.commit([DeleteTable()])
        assert nft.maps() == frozenset()

    use(check)


def test_a_map_goes_with_its_elements_and_then_the_chains_they_led_to(use: Use) -> None:
    def check(nft: Nftables) -> None:
        pick = AddRule(Rule("from", (RandomIndex(2), VerdictLookup("choice")), "pick"))
        elements = AddElements(CHOICE, [(INDEXES[0], Goto("one")), (INDEXES[1], Goto("two"))])
        nft.commit([*SKELETON, pick, elements])
        nft.commit([DeleteChain("from"), DeleteMap(CHOICE), DeleteChain("one"), DeleteChain("two")])
        assert nft.chains() == frozenset()
        assert nft.maps() == ALL - {"choice"}

    use(check)


def test_a_map_is_replaced_in_one_batch(use: Use) -> None:
    def check(nft: Nftables) -> None:
        pick = AddRule(Rule("from", (RandomIndex(2), VerdictLookup("choice")), "pick"))
        old, new = [(INDEXES[0], Goto("one"))], [(INDEXES[0], Goto("two")), (INDEXES[1], Goto(""))]
        nft.commit([*SKELETON, pick, AddElements(CHOICE, old)])
        removed: list[Operation] = [DeleteChain("from"), DeleteMap(CHOICE)]
        nft.commit([*removed, AddChain(Chain("from")), AddMap(CHOICE), AddElements(CHOICE, new), pick])
        assert nft.elements(CHOICE) == dict(new)

    use(check)


def test_nothing_is_remembered_in_a_set_that_is_missing(use: Use) -> None:
    def check(nft: Nftables) -> None:
        nft.commit(SKELETON)
        with pytest.raises(BatchError) as caught:
            nft.commit([AddRule(Rule("from", (source(Family.V4), Remember("nothing")), "remember"))])
        assert caught.value.errno == errno.ENOENT

    use(check)


def test_a_dynamic_set_holds_as_many_elements_as_it_says(use: Use) -> None:
    def check(nft: Nftables) -> None:
        clients = [bytes((10, 0, 0, i)) for i in range(3)]
        nft.commit([*SKELETON, AddElements(FEW, [(c, None) for c in clients[:2]])])
        with pytest.raises(BatchError) as caught:
            nft.commit([AddElements(FEW, [(clients[2], None)])])
        assert (caught.value.errno, caught.value.element) == (errno.ENFILE, clients[2])
        assert nft.elements(FEW) == dict.fromkeys(clients[:2])

    use(check)


@pytest.mark.parametrize("family", Family)
def test_nft_prints_what_is_remembered_and_picked_and_loads_what_it_printed(
    family: Family, namespaces: Callable[[], str]
) -> None:
    def inside() -> None:
        with Nft(family, "affinity") as nft:
            nft.commit(list(affinity(family)))
            printed = reloaded()
            for words in (
                f"typeof {family.keyword} saddr",
                "size 65535",
                "flags dynamic,timeout",
                "timeout 3h",
                'comment "who goes to 0"',
                "typeof numgen random mod 2 : verdict",
                "0 : goto to_0, 1 : goto to_1, 2 : goto to_2, 3 : goto to_3",
                f'update @clients_0 {{ {family.keyword} saddr }} comment "remember"',
                f"{family.keyword} saddr @clients_0 goto to_0",
                "numgen random mod 4 vmap @choice",
                f"meta l4proto tcp dnat to {place(family, 0)}",
            ):
                assert words in printed
            client = socket.inet_pton(family.af, PLAN[family][1] % 1)
            nft.commit([AddElements(clients_of(0), [(client, None)])])
        assert "expires" in loaded_again()[1]

    netns.run(namespaces(), inside)


def place(family: Family, at: int) -> str:
    address = PLAN[family][2] % at
    return f"{address}:{TARGET_PORT}" if family is Family.V4 else f"[{address}]:{TARGET_PORT}"


def clients_of(at: int, timeout: int = THREE_HOURS, size: int = 65_535) -> Map:
    """Return the set of an endpoint's clients."""
    return Map(
        f"clients_{at}",
        (Field.SOURCE,),
        dynamic=True,
        timeout=timeout,
        size=size,
        comment=f"who goes to {at}",
    )


def affinity(
    family: Family, *, endpoints: int = 4, timeout: int = THREE_HOURS, size: int = 65_535
) -> Iterator[Operation]:
    """Yield what balances a service with affinity, for connections that begin here."""
    service, _, targets = PLAN[family]
    port_slot = family.size // 4
    yield AddTable("affinity")
    yield AddMap(CHOICE)
    for i in range(endpoints):
        chain, clients = f"to_{i}", clients_of(i, timeout, size)
        go = (
            Meta(MetaKey.L4PROTO),
            Cmp(Compare.EQ, bytes([socket.IPPROTO_TCP])),
            Constant(socket.inet_pton(family.af, targets % i)),
            Constant(struct.pack(">H", TARGET_PORT), port_slot),
            Dnat(family.af, 0, port_slot),
        )
        yield AddMap(clients)
        yield AddChain(Chain(chain))
        yield AddRule(Rule(chain, (source(family), Remember(clients.name)), "remember"))
        yield AddRule(Rule(chain, go, "go"))
    yield AddElements(CHOICE, [(INDEXES[i], Goto(f"to_{i}")) for i in range(endpoints)])
    yield AddChain(Chain("from"))
    for i in range(endpoints):
        known = (source(family), Lookup(f"clients_{i}"), Do(Verdict.GOTO, f"to_{i}"))
        yield AddRule(Rule("from", known, "known"))
    yield AddRule(Rule("from", (RandomIndex(endpoints), VerdictLookup("choice")), "new"))
    yield AddChain(Chain("output", BaseChain("nat", Hook.OUTPUT, PRIORITY_DSTNAT)))
    to_service = (
        Payload(Base.NETWORK, family.destination_offset, family.size),
        Cmp(Compare.EQ, socket.inet_pton(family.af, service)),
        Do(Verdict.GOTO, "from"),
    )
    yield AddRule(Rule("output", to_service, "the service"))


@contextmanager
def servers(family: Family) -> Iterator[Callable[[int], int]]:
    """Open the endpoints; give a function that connects a client (by number) and tells which one it met."""
    service, clients, targets = PLAN[family]
    numbers = range(4)
    own(family, [service, *(clients % i for i in (1, 2)), *(targets % i for i in numbers)])
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for i in numbers:
            server = stack.enter_context(socket.socket(family.af, socket.SOCK_STREAM))
            server.bind((targets % i, TARGET_PORT))
            server.listen()
            selector.register(server, selectors.EVENT_READ, i)

        def connect(client: int) -> int:
            with socket.socket(family.af, socket.SOCK_STREAM) as connection:
                connection.bind((clients % client, 0))
                connection.settimeout(5)
                connection.connect((service, PORT))
                ((key, _),) = selector.select(timeout=5)
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.accept()[0].close()
                return int(key.data)

        yield connect


def traced(family: Family, client: int, held: dict[int, list[bytes]]) -> set[str]:
    """Return where the walk sees a client's connection go when the sets hold this."""
    service, clients, _ = PLAN[family]
    fake = FakeNft(family)
    filled = (AddElements(clients_of(i), [(k, None) for k in keys]) for i, keys in held.items())
    fake.commit([*affinity(family), *filled])
    packet = Packet(clients % client, service, socket.IPPROTO_TCP, PORT, from_node=True)
    assert fake.state
    return {o.destination for o in outcomes(fake.state, packet, frozenset())}


@pytest.mark.parametrize("family", Family)
def test_a_client_stays_with_its_endpoint_and_the_walk_agrees(
    family: Family, namespaces: Callable[[], str]
) -> None:
    _, clients, targets = PLAN[family]

    def inside() -> None:
        keys = {i: socket.inet_pton(family.af, clients % i) for i in (1, 2)}
        assert traced(family, 1, {}) == {targets % i for i in range(4)}
        with servers(family) as connect, Nft(family, "affinity") as nft:
            nft.commit(list(affinity(family)))
            met: dict[int, int] = {}
            for client in (1, 2):
                met[client] = connect(client)
                assert {connect(client) for _ in range(CONNECTIONS)} == {met[client]}
            held = {i: list(nft.elements(clients_of(i))) for i in range(4)}
        wanted = {i: sorted(keys[c] for c in met if met[c] == i) for i in range(4)}
        assert {i: sorted(h) for i, h in held.items()} == wanted
        for client, endpoint in met.items():
            assert traced(family, client, held) == {targets % endpoint}

    netns.run(namespaces(), inside)


def test_a_client_is_forgotten_after_the_timeout(namespaces: Callable[[], str]) -> None:
    def inside() -> None:
        clients = [clients_of(i) for i in range(4)]
        with servers(Family.V4) as connect, Nft(Family.V4, "affinity") as nft:
            nft.commit(list(affinity(Family.V4, timeout=1)))
            begun = time.monotonic()
            connect(1)
            assert any(nft.elements(which) for which in clients)
            while any(nft.elements(which) for which in clients):
                assert time.monotonic() < begun + 5
            assert time.monotonic() > begun + 0.9

    netns.run(namespaces(), inside)


def test_a_client_that_a_full_set_does_not_take_is_served_by_the_next_rule(
    namespaces: Callable[[], str],
) -> None:
    def inside() -> None:
        only = clients_of(0, size=1)
        with servers(Family.V4) as connect, Nft(Family.V4, "affinity") as nft:
            nft.commit(list(affinity(Family.V4, endpoints=1, size=1)))
            assert [connect(client) for client in (1, 2, 1, 2)] == [0] * 4
            assert list(nft.elements(only)) == [bytes((10, 9, 0, 1))]

    netns.run(namespaces(), inside)


def test_the_walk_follows_random_choices_after_random_choices() -> None:
    """A choice that only one branch of an earlier one meets counts, with its own number of branches."""
    fake = FakeNft(Family.V4)
    port = Constant(struct.pack(">H", 80), 1)
    targets = [bytes((10, 0, 0, i)) for i in range(3)]
    first, second = (RandomIndex(2), VerdictLookup("choice")), (RandomIndex(3), MapLookup("targets"))
    fake.commit(
        [
            *SKELETON,
            AddChain(Chain("output", BaseChain("nat", Hook.OUTPUT, PRIORITY_DSTNAT))),
            AddElements(CHOICE, [(INDEXES[0], Goto("")), (INDEXES[1], Goto("one"))]),
            AddElements(TARGETS, list(zip(INDEXES, targets, strict=False))),
            AddRule(Rule("output", first, "drop, or go on")),
            AddRule(Rule("one", (*second, port, Dnat(Family.V4.af, 0, 1)), "one of three")),
        ]
    )
    assert fake.state
    packet = Packet("10.9.0.1", "10.96.0.1", 6, 80, from_node=True)
    found = [(o.verdict, o.destination) for o in outcomes(fake.state, packet, frozenset())]
    accepted = [("accept", f"10.0.0.{i}") for i in range(3)]
    assert found == [("drop", "10.96.0.1"), *accepted]
