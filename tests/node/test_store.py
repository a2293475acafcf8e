"""The store folds objects into snapshots and knows what changed."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from node.sources.objects import Object
from node.store import Identity, Pending, Store
from proxy.model import EMPTY, Endpoint, EndpointSlice, Node, ObjectName, Service, Snapshot

A, B = ObjectName("ns", "a"), ObjectName("ns", "b")


def service(name: ObjectName, ip: str = "10.96.0.1") -> Service:
    return Service(name, (ip,), ())


def piece(name: str, owner: ObjectName, *addresses: str) -> EndpointSlice:
    return EndpointSlice(
        ObjectName("ns", name), owner, Family.V4, (), tuple(Endpoint(address) for address in addresses)
    )


def objects(*values: Object) -> dict[Identity, Object]:
    return {(type(v).__name__, str(v.name)): v for v in values}


def take(store: Store) -> Pending:
    pending = store.take(0)
    assert pending
    return pending


def test_nothing_is_pending_before_the_source_has_spoken() -> None:
    store = Store()
    assert store.take(0) is None
    assert store.oldest is None


def test_the_first_word_of_the_source_counts_even_when_it_is_empty() -> None:
    store = Store(clock=lambda: 7.0)
    store.replace({})
    assert store.oldest == 7.0
    assert store.take(0) == Pending(Snapshot({}, {}, {}), frozenset(), frozenset(), 7.0)
    assert store.take(0) is None
    assert store.oldest is None


def test_a_change_names_the_services_that_differ() -> None:
    store = Store()
    store.replace(objects(service(A), service(B), piece("a-1", A, "10.0.0.1"), Node("n")))
    first = take(store)
    assert first.services == {A, B}
    assert first.nodes
    store.replace(objects(service(A), service(B), piece("a-1", A, "10.0.0.2"), Node("n")))
    second = take(store)
    assert second.services == {A}
    assert not second.nodes
    assert second.snapshot.slices == {A: (piece("a-1", A, "10.0.0.2"),)}


def test_the_same_content_again_is_no_change() -> None:
    store = Store()
    store.replace(objects(service(A), Node("n")))
    take(store)
    store.replace(objects(service(A), Node("n")))
    assert store.take(0) is None


def test_changes_that_were_not_taken_add_up_and_the_oldest_counts() -> None:
    times = iter([1.0, 2.0, 3.0])
    store = Store(clock=lambda: next(times))
    store.replace(objects(service(A)))
    store.replace(objects(service(B)))
    store.replace(objects(service(B), Node("n")))
    assert take(store) == Pending(
        Snapshot({B: service(B)}, {}, {"n": Node("n")}), frozenset({A, B}), frozenset({"n"}), 1.0
    )


def test_a_slice_that_changes_its_service_changes_both() -> None:
    store = Store()
    store.replace(objects(piece("x", A)))
    take(store)
    store.replace(objects(piece("x", B)))
    pending = take(store)
    assert pending.services == {A, B}
    assert pending.snapshot.slices == {B: (piece("x", B),)}


def test_a_snapshot_stays_as_it_was_taken() -> None:
    store = Store()
    store.replace(objects(service(A), piece("a-1", A)))
    before = take(store).snapshot
    store.replace({})
    assert before == Snapshot({A: service(A)}, {A: (piece("a-1", A),)}, {})
    assert take(store).snapshot == EMPTY


def test_take_wakes_up_for_a_change() -> None:
    store = Store()
    found: list[Pending | None] = []
    thread = threading.Thread(target=lambda: found.append(store.take(5)))
    thread.start()
    store.replace(objects(service(A)))
    thread.join()
    assert found[0]
    assert found[0].services == {A}


values = (
    st.builds(service, st.sampled_from([A, B]), st.sampled_from(["10.96.0.1", "10.96.0.2"]))
    | st.builds(piece, st.sampled_from("xyz"), st.sampled_from([A, B]), st.sampled_from(["10.0.0.1"]))
    | st.builds(Node, st.sampled_from(["n", "m"]), deleting=st.booleans())
)


@given(st.lists(st.lists(values, max_size=6), max_size=6), st.sets(st.integers(0, 5)))
def test_every_way_to_some_content_ends_in_the_same_snapshot(
    states: list[list[Object]], takes: set[int]
) -> None:
    """And what is named as changed covers every difference to the snapshot taken before."""
    store, before = Store(), EMPTY
    for number, state in enumerate(states):
        store.replace(objects(*state))
        pending = store.take(0) if number in takes else None
        if pending is None:
            continue
        fresh = Store()
        fresh.replace(objects(*state))
        assert pending.snapshot == take(fresh).snapshot
        for name in (A, B):
            same_service = before.services.get(name) == pending.snapshot.services.get(name)
            same_slices = before.slices.get(name) == pending.snapshot.slices.get(name)
            assert (same_service and same_slices) or name in pending.services
        assert before.nodes == pending.snapshot.nodes or pending.nodes
        before = pending.snapshot


def test_an_update_changes_what_it_names_and_nothing_else() -> None:
    store = Store()
    store.replace(objects(service(A), service(B), Node("n")))
    before = take(store).snapshot
    store.update({("Service", str(A)): service(A, "10.96.0.9"), ("Service", "ns/none"): None})
    pending = take(store)
    assert pending.services == {A}
    assert not pending.nodes
    assert pending.snapshot == Snapshot({A: service(A, "10.96.0.9"), B: service(B)}, {}, {"n": Node("n")})
    assert before.services[A] == service(A)
    assert pending.snapshot.nodes is before.nodes, "what did not change is not copied"


def test_a_list_of_one_kind_takes_out_what_it_lacks_but_what_is_to_be_kept() -> None:
    store = Store()
    store.replace(objects(service(A), service(B), piece("x", A), Node("n")))
    take(store)
    store.relist("Service", {}, frozenset({("Service", str(B))}))
    pending = take(store)
    assert pending.snapshot == Snapshot({B: service(B)}, {A: (piece("x", A),)}, {"n": Node("n")})
    store.relist("Service", objects(service(B)), frozenset())
    assert store.take(0) is None


def test_changes_that_come_while_others_are_gathered_are_taken_with_them() -> None:
    store = Store()
    store.replace({})
    take(store)
    found: list[Pending | None] = []
    thread = threading.Thread(target=lambda: found.append(store.take(5, gather=0.2)))
    thread.start()
    store.update(objects(service(A)))
    store.update(objects(service(B)))
    thread.join()
    assert found[0]
    assert found[0].services == {A, B}
