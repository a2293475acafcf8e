"""Any sequence of changes ends in the same kernel state as a fresh load of the last state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft, Nftables
from netlink.nftables.fake import FakeNft
from netlink.nftables.operations import DeleteTable
from node.store import Store
from proxy.dataplane import NodeRanges
from proxy.frontends import Frontend, frontends
from proxy.l7.policy import Policy
from proxy.l7.policy import Protocol as L7Protocol
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
from proxy.nftables.ruleset import MAPS, TABLE
from proxy.nftables.spans import Members
from proxy.table import Change, FrontendTable
from proxy.topology import Place
from tests.proxy.plan import proxied

HERE = Place("me", "zone")
NAMES = [ObjectName("ns", n) for n in ("a", "b", "c")]
POLICIES = st.sampled_from(TrafficPolicy)
CIDRS = ("10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/23", "10.9.0.0/16", "0.0.0.0/0", "255.255.255.0/24")

# Few addresses and ports, so that services collide often.
ports = st.builds(
    ServicePort,
    name=st.sampled_from(["x", "y"]),
    protocol=st.sampled_from([Protocol.TCP, Protocol.UDP]),
    port=st.sampled_from([80, 81]),
    node_port=st.sampled_from([0, 30000, 30001]),
)
OUTSIDE = st.lists(st.sampled_from(["198.51.100.1", "198.51.100.2"]), max_size=2, unique=True).map(tuple)
POLICIES_OF_L7 = st.sampled_from([None, Policy(), Policy(external=True), Policy(protocol=L7Protocol.TCP)])
"""What a service asks of the L7 proxy, which serves all that is asked of it."""
services = st.fixed_dictionaries(
    {
        "cluster_ips": st.sampled_from(["10.96.0.1", "10.96.0.2", "10.96.0.3"]).map(lambda a: (a,)),
        "ports": st.lists(ports, max_size=3, unique_by=lambda p: p.name).map(tuple),
    },
    optional={
        "internal_policy": POLICIES,
        "external_policy": POLICIES,
        "external_ips": OUTSIDE,
        "balancer_ips": OUTSIDE,
        "source_ranges": st.lists(st.sampled_from((*CIDRS, "fd00::/8")), max_size=3).map(tuple),
        "affinity_seconds": st.sampled_from([0, 60, 10800]),
        "policy": POLICIES_OF_L7,
    },
)
endpoint = st.builds(
    Endpoint,
    address=st.sampled_from([f"10.0.0.{i}" for i in range(1, 9)]),
    node=st.sampled_from(["me", "other"]),
    ready=st.booleans(),
    serving=st.booleans(),
    terminating=st.booleans(),
    zone_hints=st.sampled_from([(), ("zone",), ("elsewhere",)]),
)
slices = st.lists(endpoint, max_size=6)
cidrs = st.lists(st.sampled_from(CIDRS), max_size=4)
addresses = st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2", "fd00::1"]), max_size=3)
node_ranges = st.builds(
    NodeRanges,
    cidrs.map(Members),
    *(cidrs.map(tuple) for _ in range(4)),
    node_addresses=addresses.map(Members),
    egress=st.sampled_from([(), ("192.0.2.1",), ("192.0.2.2", "fd00::1"), ("fd00::1",)]),
)
change = st.one_of(
    st.tuples(st.just("service"), st.sampled_from(NAMES), st.none() | services),
    st.tuples(st.just("slice"), st.sampled_from(NAMES), st.none() | slices),
    st.tuples(st.just("ranges"), st.just(NAMES[0]), node_ranges),
)


def objects_after(objects: dict[tuple[str, str], object], step: tuple[str, ObjectName, object]) -> None:
    """Apply a drawn change to the objects a source would deliver."""
    kind, name, value = step
    key = (kind, str(name))
    if value is None:
        objects.pop(key, None)
    elif kind == "service":
        assert isinstance(value, dict)
        objects[key] = Service(name, **value)
    else:
        assert isinstance(value, list)
        wanted = tuple(EndpointPort(n, p, 8080) for n in "xy" for p in (Protocol.TCP, Protocol.UDP))
        objects[key] = EndpointSlice(name, name, Family.V4, wanted, tuple(value))


def contents(nft: Nftables) -> object:
    """Everything in a table, made comparable."""
    return nft.table_comment(), nft.chains(), nft.maps(), {m.name: nft.elements(m) for m in MAPS}


Batches = list[list[tuple[str, ObjectName, object]]]
batches_of_changes = st.lists(st.lists(change, min_size=1, max_size=4), min_size=1, max_size=8)


A, C = NAMES[0], NAMES[2]
CLAIM = {"cluster_ips": ("10.96.0.1",), "ports": (ServicePort("x", Protocol.TCP, 80, 30001),)}


@example([[("service", A, CLAIM), ("service", C, CLAIM)], [("service", A, None), ("service", C, None)]], 8, 0)
@settings(max_examples=40, deadline=None)
@given(batches_of_changes, st.integers(0, 8), st.integers(0, 4))
def test_in_memory(batches: Batches, restart: int, most_listed: int) -> None:
    steps_and_fresh_load_agree(FakeNft(Family.V4), batches, restart, most_listed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches_of_changes, st.integers(0, 8), st.integers(0, 4))
def test_in_the_kernel(namespace: str, batches: Batches, restart: int, most_listed: int) -> None:
    def inside() -> None:
        with Nft(Family.V4, TABLE) as nft:
            try:
                steps_and_fresh_load_agree(nft, batches, restart, most_listed)
            finally:
                nft.commit([DeleteTable()])

    netns.run(namespace, inside)


@pytest.fixture
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


def steps_and_fresh_load_agree(kernel: Nftables, batches: Batches, restart: int, most_listed: int) -> None:
    """Apply batch after batch, adopting once as a restarted daemon does; compare with a fresh load.

    Of more than `most_listed` endpoints all are written when adopting.
    """
    objects: dict[tuple[str, str], object] = {}
    ranges = NodeRanges()
    store, table = Store(), FrontendTable()
    dataplane = Dataplane(kernel)
    dataplane.load((), ranges)
    for number, batch in enumerate(batches):
        for step in batch:
            if isinstance(step[2], NodeRanges):
                ranges = step[2]
            else:
                objects_after(objects, step)
        changes = deliver(store, table, objects)
        if number == restart:  # the changes came while the daemon was down
            dataplane = Dataplane(kernel)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("proxy.nftables.dataplane.MOST_LISTED", most_listed)
                assert dataplane.load(table, ranges)
        else:
            dataplane.apply(changes, ranges)
    dataplane.tidy()

    fresh, fresh_table = FakeNft(Family.V4), FrontendTable()
    deliver(Store(), fresh_table, objects)
    fresh_plane = Dataplane(fresh)
    fresh_plane.load(fresh_table, ranges)
    assert contents(kernel) == contents(fresh)
    assert dataplane.elements == fresh_plane.elements


def deliver(store: Store, table: FrontendTable, objects: dict[tuple[str, str], object]) -> list[Change]:
    """Hand objects to the store as a source does, and what comes of them to the table as the syncer does."""
    store.replace(dict(objects))  # type: ignore[arg-type]
    pending = store.take(0)
    changes: list[Change] = []
    for name in pending.services if pending else ():
        service = pending.snapshot.services.get(name)
        found: list[Frontend] = []
        if service:
            pieces = pending.snapshot.slices.get(name, ())
            found = [proxied(service, f) for f in frontends(service, pieces, Place("me", "zone"))]
        changes += table.replace(name, found)
    return changes
