"""Map elements: deltas lead from one version to the next; interval sets hold what they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from netlink.nftables.objects import Elements, Goto
from proxy.frontends import Action, Backend, Frontend, FrontendKey, Masquerade, Origin
from proxy.model import Protocol
from proxy.nftables.elements import Delta, Pairs, delta, hairpin, key_bytes, key_of, kind_of, shape
from proxy.nftables.ruleset import KINDS, constant_shapes, shape_id

V4, V6 = Family.V4, Family.V6


def a_key(family: Family = V4, address: str = "10.96.0.1", origin: Origin = Origin.ANY) -> FrontendKey:
    return FrontendKey(family, address, Protocol.UDP, 53, origin)


def test_a_key_is_encoded_as_the_registers_hold_it() -> None:
    assert key_bytes(a_key()) == bytes((10, 96, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0))
    assert key_bytes(a_key(V6, "fd00::1")) == bytes.fromhex(
        "fd0000000000000000000000000000011100000000350000"
    )
    assert key_bytes(a_key(address="")) == bytes((17, 0, 0, 0, 0, 53, 0, 0))


def test_a_hairpin_is_an_address_with_itself() -> None:
    assert hairpin(V4, "10.0.0.1") == (bytes((10, 0, 0, 1, 10, 0, 0, 1)), None)
    assert len(hairpin(V6, "fd00::1")[0]) == 32


@pytest.mark.parametrize(
    ("action", "endpoints", "goto"),
    [
        (Action.BALANCE, 2, Goto("services_2_masquerade_off_cluster")),
        (Action.REJECT, 0, Goto("reject_no_endpoints")),
        (Action.DROP, 0, Goto("")),
    ],
)
def test_a_frontend_has_the_number_of_its_chain(action: Action, endpoints: int, goto: Goto) -> None:
    backends = tuple(Backend(f"10.0.0.{i}", 53, False) for i in range(endpoints))
    frontend = Frontend(a_key(), "ns/dns", action, Masquerade.OFF_CLUSTER, backends)
    assert dict(constant_shapes())[shape(frontend)] == goto


def test_every_shape_has_a_number_of_its_own() -> None:
    numbers = [number for number, _ in constant_shapes()]
    numbers += [
        shape_id(k, n, m) for k in KINDS for m in Masquerade for n in (1, 17, 5000, 999_999) if n > 16
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("family", [V4, V6])
def test_a_key_is_read_back_from_its_element(family: Family) -> None:
    for address in ("10.96.0.1" if family is V4 else "fd00::1", ""):
        for origin in Origin:
            key = FrontendKey(family, address, Protocol.SCTP, 5353, origin)
            assert key_of(kind_of(key), family, key_bytes(key)) == key


def test_the_kind_is_where_a_packet_looks_first() -> None:
    keys = [a_key(address=a, origin=o) for a in ("10.96.0.1", "") for o in (Origin.INTERNAL, Origin.ANY)]
    found = [kind_of(k) for k in keys]
    assert found == list(KINDS)


def test_a_new_endpoint_address_touches_one_element() -> None:
    old, new = (
        Frontend(a_key(), "ns/dns", Action.BALANCE, Masquerade.NEVER, (Backend(address, 53, False),))
        for address in ("10.0.0.1", "10.0.0.2")
    )
    found = delta(old, new)
    assert (found.old_shapes, found.new_shapes) == ([], [])
    assert (len(found.old_endpoints), len(found.new_endpoints)) == (1, 1)


def frontends(key: FrontendKey) -> st.SearchStrategy[Frontend | None]:
    address = (
        st.ip_addresses(v=key.family.value).map(str)
        if key.family is V4
        else st.sampled_from("12").map("fd::{}".format)
    )
    backends = st.lists(st.builds(Backend, address, st.integers(1, 65535), st.booleans()), max_size=5)

    def made(endpoints: list[Backend], empty: Action, masquerade: Masquerade, affinity: int) -> Frontend:
        action = Action.BALANCE if endpoints else empty
        return Frontend(key, "ns/dns", action, masquerade, tuple(endpoints), affinity)

    empty = st.sampled_from([Action.REJECT, Action.DROP])
    return st.none() | st.builds(made, backends, empty, st.sampled_from(Masquerade), st.sampled_from([0, 60]))


all_keys = st.sampled_from([a_key(), a_key(V6, "fd00::1"), a_key(address=""), a_key(V6, "", Origin.INTERNAL)])


def elements(frontend: Frontend | None) -> tuple[Elements, Elements, Elements]:
    if frontend is None:
        return {}, {}, {}
    found = delta(None, frontend)
    assert (found.old_shapes, found.old_endpoints, found.old_affinity) == ([], [], [])
    return dict(found.new_shapes), dict(found.new_endpoints), dict(found.new_affinity)


def applied(held: Elements, removed: Pairs, added: Pairs) -> Elements:
    """Apply as the kernel does: what goes must be there, as it is said to be; what comes must not."""
    held = dict(held)
    for key, data in removed:
        assert held.pop(key) == data
    for key, data in added:
        assert key not in held
        held[key] = data
    return held


@given(all_keys.flatmap(lambda k: st.tuples(frontends(k), frontends(k))))
def test_a_delta_leads_from_one_version_to_the_other(pair: tuple[Frontend | None, Frontend | None]) -> None:
    old, new = pair
    if old is None and new is None:
        return
    found: Delta = delta(old, new)
    shapes, endpoints, affinity = elements(old)
    assert (
        applied(shapes, found.old_shapes, found.new_shapes),
        applied(endpoints, found.old_endpoints, found.new_endpoints),
        applied(affinity, found.old_affinity, found.new_affinity),
    ) == elements(new)


@given(all_keys.flatmap(frontends))
def test_an_unchanged_frontend_has_an_empty_delta(frontend: Frontend | None) -> None:
    if frontend:
        assert delta(frontend, frontend) == Delta([], [], [], [], [], [])
