"""Who has a frontend when several services claim it, and what a change changes."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from proxy.dataplane import NodeRanges
from proxy.frontends import Action, Backend, Frontend, FrontendKey, Masquerade, Origin
from proxy.model import ObjectName, Protocol
from proxy.nftables.dataplane import Dataplane
from proxy.table import Change, FrontendTable

A, B, C = (ObjectName("ns", n) for n in "abc")
NAMES = [A, B, C, ObjectName("ns", "ab"), ObjectName("n", "a")]


def key(address: str = "10.96.0.1", port: int = 80) -> FrontendKey:
    return FrontendKey(Family.V4, address, Protocol.TCP, port, Origin.ANY)


def frontend(
    service: ObjectName, at: FrontendKey, endpoint: str = "10.0.0.1", port_name: str = ""
) -> Frontend:
    title = f"{service}:{port_name}" if port_name else str(service)
    return Frontend(at, title, Action.BALANCE, Masquerade.NEVER, (Backend(endpoint, 80, False),))


def test_a_service_comes_changes_and_goes() -> None:
    table = FrontendTable()
    one, other = frontend(A, key()), frontend(A, key(), "10.0.0.2")
    assert table.replace(A, [one]) == [Change(None, one)]
    assert table.replace(A, [one]) == []
    assert table.replace(A, [other]) == [Change(one, other)]
    assert table.replace(A, []) == [Change(other, None)]
    assert list(table) == []


def test_only_the_keys_that_differ_change() -> None:
    table = FrontendTable()
    first, second, third = (frontend(A, key(port=p)) for p in (80, 81, 82))
    table.replace(A, [first, second])
    assert table.replace(A, [second, third]) == [Change(first, None), Change(None, third)]
    assert set(table) == {second, third}


def test_the_first_name_has_a_key_that_two_claim_and_the_other_waits() -> None:
    table = FrontendTable()
    at = key("", 30000)
    late, early = frontend(B, at), frontend(A, at)
    table.replace(B, [late])
    assert table.replace(A, [early]) == [Change(late, early)]
    assert table.conflicts() == ["service ns/b gets no node port 30000/TCP: service ns/a has it"]
    assert table.replace(A, []) == [Change(early, late)]
    assert table.conflicts() == []


def test_a_change_of_one_that_waits_changes_nothing_now() -> None:
    table = FrontendTable()
    table.replace(A, [frontend(A, key())])
    table.replace(B, [frontend(B, key())])
    changed = frontend(B, key(), "10.0.0.9")
    assert table.replace(B, [changed]) == []
    assert table.replace(A, []) == [Change(frontend(A, key()), changed)]


def test_an_external_address_takes_no_cluster_address() -> None:
    table = FrontendTable()
    external = frontend(A, key())
    cluster = replace(frontend(C, key()), exclusive=True)
    for first, second in (((A, external), (C, cluster)), ((C, cluster), (A, external))):
        table.replace(first[0], (first[1],))
        table.replace(second[0], (second[1],))
        assert [f.service for f in table] == [str(C)]
        table.replace(A, ())
        table.replace(C, ())


def test_a_conflict_over_an_address_is_named() -> None:
    table = FrontendTable()
    for name in (C, A, B):
        table.replace(name, [frontend(name, key(), port_name="http")])
    assert table.conflicts() == [
        "service ns/b:http gets no 10.96.0.1 port 80/TCP: service ns/a:http has it",
        "service ns/c:http gets no 10.96.0.1 port 80/TCP: service ns/a:http has it",
    ]


def test_a_name_that_begins_like_another_is_another() -> None:
    table = FrontendTable()
    long = ObjectName("ns", "ab")
    table.replace(A, [frontend(A, key(), port_name="http")])
    table.replace(long, [frontend(long, key("10.96.0.2"))])
    table.replace(A, [])
    assert [f.service for f in table] == ["ns/ab"]


keys = st.builds(key, st.sampled_from(["10.96.0.1", ""]), st.sampled_from([80, 81]))
claims = st.tuples(
    st.sampled_from(NAMES),
    st.lists(
        st.tuples(keys, st.sampled_from(["10.0.0.1", "10.0.0.2"])), max_size=3, unique_by=lambda c: c[0]
    ),
)
# As in a real service: the same key has the same port name, whatever the version.
histories = st.lists(claims, max_size=12)
History = Sequence[tuple[ObjectName, list[tuple[FrontendKey, str]]]]


def made(name: ObjectName, claimed: list[tuple[FrontendKey, str]]) -> list[Frontend]:
    return [frontend(name, at, endpoint, f"p{at.port}") for at, endpoint in claimed]


@given(histories)
def test_changes_lead_from_one_content_to_the_next(history: History) -> None:
    """What the dataplane would hold after applying all changes is what the table holds."""
    table, kernel = FrontendTable(), dict[FrontendKey, Frontend]()
    for name, claimed in history:
        for change in table.replace(name, made(name, claimed)):
            assert change.old != change.new
            some = change.new or change.old
            assert some
            assert kernel.get(some.key) == change.old
            if change.new:
                kernel[some.key] = change.new
            else:
                del kernel[some.key]
    assert kernel == {f.key: f for f in table}
    assert len(table) == len(kernel)


@given(histories, st.randoms())
def test_the_winner_does_not_depend_on_the_order_of_events(history: History, random: Random) -> None:
    last = dict(history)
    order = list(last)
    random.shuffle(order)
    lived, fresh = FrontendTable(), FrontendTable()
    for name, claimed in history:
        lived.replace(name, made(name, claimed))
    for name in order:
        fresh.replace(name, made(name, last[name]))
    assert set(lived) == set(fresh)
    assert sorted(lived.conflicts()) == sorted(fresh.conflicts())
    expected: dict[FrontendKey, str] = {}
    for name in sorted(last, key=str, reverse=True):
        expected |= {f.key: f.service for f in made(name, last[name])}
    assert {f.key for f in lived} == set(expected)


def test_of_services_that_are_gone_nothing_is_kept() -> None:
    """kubernetes#128928: the proxy that grew to 8 GB."""
    table, dataplane = FrontendTable(), Dataplane(FakeNft(Family.V4))
    dataplane.load((), NodeRanges())
    before = dataplane.elements
    for number in range(20):
        name = ObjectName("ns", f"s{number}")
        key = FrontendKey(Family.V4, f"10.96.0.{number // 2}", Protocol.TCP, 80, Origin.ANY)
        backends = tuple(Backend(f"10.0.{number}.{n}", 80, n % 2 == 0) for n in range(number))
        one = Frontend(key, str(name), Action.BALANCE, Masquerade.ALWAYS, backends, number % 3 * 60)
        dataplane.apply(table.replace(name, (one,)))
    for number in range(20):
        dataplane.apply(table.replace(ObjectName("ns", f"s{number}"), ()))
    dataplane.tidy()
    assert dataplane.elements == before
    kept = (table._keys, table._winners, table._waiting, dataplane._parts, dataplane._uses, dataplane._idle)
    assert not any(kept)


def test_a_cluster_address_that_another_service_names_as_its_own_is_served_to_nobody_by_that() -> None:
    """An externalIP under policy Local has a frontend for clients inside, which comes before that for any."""
    victim = replace(frontend(B, key()), exclusive=True)
    inside = key()._replace(origin=Origin.INTERNAL)
    thief = [frontend(A, key(), "10.0.0.9"), frontend(A, inside, "10.0.0.9")]
    for order in ((B, A), (A, B)):
        table = FrontendTable()
        for name in order:
            table.replace(name, [victim] if name == B else thief)
        assert list(table) == [victim]
        assert table.conflicts() == ["service ns/a gets no 10.96.0.1 port 80/TCP: service ns/b has it"]
        assert Change(victim, thief[0]) in table.replace(B, [])
        assert set(table) == set(thief)
        assert Change(None, thief[1]) not in table.replace(B, [victim])
        assert list(table) == [victim]
