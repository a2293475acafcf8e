"""What the IPVS dataplane asks of the kernel, in memory: how much, in which order, under which names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from netlink.family import Family
from netlink.ipvs import Command, IpvsError, Real, Schedule, Virtual
from netlink.nftables.batch import BatchError
from netlink.nftables.operations import AddElements
from proxy.dataplane import NOTHING
from proxy.frontends import Frontend, Origin, frontends
from proxy.ipvs import ruleset
from proxy.ipvs.dataplane import Dataplane
from proxy.ipvs.drain import LOOK_SECONDS, MOST_SECONDS
from proxy.ipvs.elements import found_marks
from proxy.ipvs.fake import FakeGround, FakeIpvs
from proxy.ipvs.places import MADE_ADDRESSES, MARK, is_ours, mark_of, number_of
from proxy.ipvs.ways import Numbers, Way, way
from proxy.l7.places import TRANSPARENT_MARK
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
from proxy.nftables.elements import key_bytes
from proxy.nftables.ruleset import MASQUERADE_MARK, SERVICES
from proxy.table import Change
from proxy.topology import Place
from tests.proxy.dataplanes import Recorded
from tests.proxy.plan import node_ranges, programmed

V4 = Family.V4
MANY = tuple(f"10.0.0.{n}" for n in range(1, 101))
AT_CLUSTER = Virtual(V4, 6, "10.96.0.1", 80)
MADE = MADE_ADDRESSES[V4]


def served(
    addresses: Sequence[str], *, affinity: int = 0, local: bool = False, protocol: Protocol = Protocol.TCP
) -> tuple[Frontend, ...]:
    """Return the frontends of a service; every second endpoint is on this node."""
    policy = TrafficPolicy.LOCAL if local else TrafficPolicy.CLUSTER
    service = Service(
        ObjectName("shop", "web"),
        ("10.96.0.1",),
        (ServicePort("", protocol, 80, 30080),),
        external_ips=("198.18.0.1",),
        external_policy=policy,
        affinity_seconds=affinity,
    )
    ends = tuple(Endpoint(a, "me" if n % 2 else "other", True, True) for n, a in enumerate(addresses))
    name = ObjectName("shop", "web")
    found = EndpointSlice(name, name, V4, (EndpointPort("", protocol, 8080),), ends)
    return frontends(service, [found], Place("me", ""))


def changes(old: Sequence[Frontend], new: Sequence[Frontend]) -> list[Change]:
    before, after = {f.key: f for f in old}, {f.key: f for f in new}
    return [Change(before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)]


class Node:
    """A dataplane on a kernel in memory."""

    def __init__(self, scheduler: str = "rr") -> None:
        self.nft, self.ipvs, self.ground = Recorded(V4), FakeIpvs(), FakeGround()
        self.now = 0.0
        self.start(scheduler)

    def start(self, scheduler: str = "rr") -> None:
        self.dataplane = Dataplane(self.nft, self.ipvs, self.ground, scheduler, clock=lambda: self.now)

    def marks(self) -> dict[object, int]:
        return {**found_marks(V4, {m: self.nft.elements(m) for m in ruleset.MARKS.values()})}

    def weights(self, virtual: Virtual) -> dict[str, int]:
        return {real.address: load.weight for real, load in self.ipvs.reals(virtual).items()}


def test_one_endpoint_replaced_by_another_is_two_messages_for_each_address_at_any_size() -> None:
    node = Node()
    old, new = served(MANY), served((*MANY[2:], "10.0.1.1", "10.0.1.2"))
    node.dataplane.load(old, NOTHING)
    del node.ipvs.requests[:]
    node.dataplane.apply(changes(old, new))
    for virtual in node.ipvs.there:
        mine = [r for r in node.ipvs.requests if r.virtual == virtual]
        assert [r.command for r in mine] == [Command.NEW_DEST] * 2 + [Command.SET_DEST] * 2
        assert [r.weight for r in mine] == [1, 1, 0, 0]


def test_a_load_of_what_is_there_sends_nothing() -> None:
    node = Node()
    node.dataplane.load(programmed(V4), node_ranges())
    batches, requests = len(node.nft.batches), len(node.ipvs.requests)
    node.start()
    assert node.dataplane.load(programmed(V4), node_ranges())
    assert (len(node.nft.batches), len(node.ipvs.requests)) == (batches, requests)


def test_frontends_keep_their_marks_when_the_daemon_restarts_and_others_come() -> None:
    node = Node()
    node.dataplane.load(programmed(V4), node_ranges())
    before = node.marks()
    assert len(set(before.values())) == len(before) > 40
    node.start()
    node.dataplane.load((*served(MANY[:2]), *reversed(programmed(V4))), node_ranges())
    after = node.marks()
    assert {key: after[key] for key in before} == before
    assert len(set(after.values())) == len(after)


def test_marks_have_none_of_the_bits_that_stand_for_something_else() -> None:
    other = MASQUERADE_MARK | TRANSPARENT_MARK | 0x8000
    for number in (*range(1, 70000, 7), (1 << 25) - 1):
        mark = mark_of(number)
        assert is_ours(mark)
        assert number_of(mark) == number
        assert not mark & other
        assert mark != MARK
    assert not is_ours(0)


def test_a_number_is_free_again_when_its_server_is_gone() -> None:
    numbers = Numbers(4)
    assert [numbers.take() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(OverflowError):
        numbers.take()
    numbers.release(2)
    assert numbers.take() == 2


def test_clients_with_affinity_share_one_server_by_every_address() -> None:
    node = Node()
    found = served(MANY[:4], affinity=60)
    node.dataplane.load(found, NOTHING)
    assert node.ipvs.servers() == {AT_CLUSTER: Schedule("rr", 60)}
    assert {way(f) for f in found} == {Way.ADDRESS, Way.LED}


def test_those_with_other_endpoints_share_one_at_an_address_that_is_made() -> None:
    """Policy Local: clients outside reach endpoints of this node, by node port or external address."""
    node = Node()
    found = served(MANY[:4], affinity=60, local=True)
    node.dataplane.load(found, NOTHING)
    made = Virtual(V4, 6, MADE, 1)
    assert set(node.ipvs.servers()) == {AT_CLUSTER, made}
    assert set(node.weights(made)) == {MANY[1], MANY[3]}
    assert node.ground.held == {"10.96.0.1", MADE}
    outside = [f for f in found if not f.exclusive and f.key.origin is Origin.ANY]
    assert len(outside) == 2
    # It stays the same one while its endpoints change.
    after = served(MANY[:6], affinity=60, local=True)
    node.dataplane.apply(changes(found, after))
    assert set(node.ipvs.servers()) == {AT_CLUSTER, made}
    assert set(node.weights(made)) == {MANY[1], MANY[3], MANY[5]}
    node.dataplane.apply(changes(after, ()))
    node.now += LOOK_SECONDS
    node.dataplane.tidy()
    assert not node.ipvs.servers()
    assert not node.ground.held


def test_what_leads_to_a_server_comes_after_it_and_goes_before_it() -> None:
    node = Node()
    node.dataplane.load((), NOTHING)
    there: list[bool] = []
    prefix = key_bytes(served(MANY[:1])[0].key)

    class Watched(FakeIpvs):
        def commit(self, requests: Sequence[object]) -> None:
            if requests:
                there.append(prefix in node.nft.elements(SERVICES.shapes))
            super().commit(requests)  # type: ignore[arg-type]

    watched = Watched()
    node.ipvs = watched
    node.start()
    node.dataplane.load((), NOTHING)
    one = served(MANY[:1], protocol=Protocol.UDP)
    prefix = key_bytes(one[0].key)
    node.dataplane.apply(changes((), one))
    node.dataplane.apply(changes(one, ()))
    assert there == [False, False]
    assert not watched.there


def test_who_has_connections_stays_for_fifteen_minutes_at_most() -> None:
    node = Node()
    both, one = served(MANY[:2]), served(MANY[1:2])
    node.dataplane.load(both, NOTHING)
    node.ipvs.connections[AT_CLUSTER, Real(MANY[0], 8080)] = 1
    node.dataplane.apply(changes(both, one))
    for _ in range(2):
        node.now += LOOK_SECONDS
        node.dataplane.tidy()
        assert node.weights(AT_CLUSTER) == {MANY[0]: 0, MANY[1]: 1}
    node.start()  # the daemon restarts: the time begins anew, as it is nowhere
    node.dataplane.load(one, NOTHING)
    node.now += MOST_SECONDS - 1
    node.dataplane.tidy()
    assert MANY[0] in node.weights(AT_CLUSTER)
    node.now += LOOK_SECONDS
    node.dataplane.tidy()
    assert node.weights(AT_CLUSTER) == {MANY[1]: 1}


def test_another_scheduler_counts_at_once_and_moves_no_endpoint() -> None:
    node = Node()
    node.dataplane.load(served(MANY[:2]), NOTHING)
    del node.ipvs.requests[:]
    node.start("lc")
    node.dataplane.load(served(MANY[:2]), NOTHING)
    assert {r.command for r in node.ipvs.requests} == {Command.SET_SERVICE}
    assert set(node.ipvs.servers().values()) == {Schedule("lc")}


def test_the_frontend_that_was_refused_is_found() -> None:
    node = Node()
    found = served(MANY[:2], affinity=60, local=True) + tuple(
        replace(f, key=f.key._replace(port=81), affinity=0) for f in served(MANY[:2])
    )
    node.dataplane.load(found, NOTHING)
    for virtual in node.ipvs.there:
        (request, *_) = (r for r in node.ipvs.requests if r.virtual == virtual)
        culprit = node.dataplane.culprit(IpvsError(22, request), found)
        assert culprit is not None
        assert way(culprit) in ((Way.ADDRESS, Way.LED) if virtual.port else (Way.MARK,))
    element = key_bytes(found[0].key)
    error = BatchError(17, AddElements(SERVICES.shapes, [(element, None)]), element, "")
    assert node.dataplane.culprit(error, found) == found[0]


def test_nothing_is_left_when_it_is_removed() -> None:
    node = Node()
    node.dataplane.load(programmed(V4), node_ranges())
    node.start()
    node.dataplane.remove()
    assert not node.ipvs.there
    assert node.nft.state is None
    assert not node.ground.held
    assert not node.ground.routed
    node.dataplane.remove()
