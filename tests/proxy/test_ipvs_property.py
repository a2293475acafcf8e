"""Any sequence of changes ends in the same virtual servers and elements as a fresh load of the last state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netlink import netns
from netlink.delivery import Delivery, Ground
from netlink.family import Family
from netlink.ipvs import Ipvs, Real, Servers, Virtual
from netlink.nftables.batch import Nft, Nftables
from netlink.nftables.fake import FakeNft
from netlink.rtnl import Rtnl
from node.store import Store
from proxy.dataplane import NodeRanges
from proxy.ipvs.dataplane import Dataplane
from proxy.ipvs.drain import LOOK_SECONDS
from proxy.ipvs.elements import found_marks
from proxy.ipvs.fake import FakeGround, FakeIpvs
from proxy.ipvs.places import DEVICE, MADE_ADDRESSES, MARKED, TABLE
from proxy.ipvs.ruleset import LEADS, MAPS, MARKS
from proxy.nftables.elements import key_of
from proxy.nftables.ruleset import KINDS
from proxy.table import FrontendTable
from tests.proxy.dataplanes import needs_ipvs
from tests.proxy.test_dataplane_property import Batches, batches_of_changes, deliver, objects_after

V4 = Family.V4


class Kernel(NamedTuple):
    """All that the dataplane works on."""

    nft: Nftables
    ipvs: Servers
    ground: Ground


def fake() -> Kernel:
    return Kernel(FakeNft(V4), FakeIpvs(), FakeGround())


@settings(max_examples=30, deadline=None)
@given(batches_of_changes, st.integers(0, 8))
def test_in_memory(batches: Batches, restart: int) -> None:
    steps_and_fresh_load_agree(fake(), batches, restart)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches_of_changes, st.integers(0, 8))
def test_in_the_kernel(namespaces: Callable[[], str], batches: Batches, restart: int) -> None:
    needs_ipvs()

    def inside() -> None:
        with Nft(V4, TABLE) as nft, Ipvs() as ipvs, Rtnl() as rtnl:
            kernel = Kernel(nft, ipvs, Delivery(rtnl, V4, DEVICE, MARKED))
            try:
                steps_and_fresh_load_agree(kernel, batches, restart)
            finally:
                Dataplane(*kernel).remove()
            assert not ipvs.servers()
            assert nft.table_comment() is None
            assert rtnl.link(DEVICE) is None

    netns.run(namespaces(), inside)


def contents(kernel: Kernel) -> dict[str, object]:
    """Everything there is; marks and made ports, which depend on what was before, by what they stand for."""
    elements = {m: kernel.nft.elements(m) for m in MAPS}
    servers = {
        v: (s, {r for r, load in kernel.ipvs.reals(v).items() if load.weight})
        for v, s in kernel.ipvs.servers().items()
    }
    marks = found_marks(V4, elements)
    assert len(set(marks.values())) == len(marks)
    found: dict[str, object] = {
        m.name: elements[m] for m in MAPS if m not in {*MARKS.values(), *LEADS.values()}
    }
    found["by mark"] = {key: servers.pop(Virtual(V4, mark=mark)) for key, mark in marks.items()}
    made: dict[Virtual, set[object]] = {}
    for kind in KINDS:
        for encoded, data in elements[LEADS[kind]].items():
            assert isinstance(data, bytes)
            key = key_of(kind, V4, encoded)
            to = Real(".".join(map(str, data[:4])), int.from_bytes(data[4:6], "big"))
            made.setdefault(Virtual(V4, key.protocol.value, *to), set()).add(key)
    shared = {v: keys for v, keys in made.items() if v.address == MADE_ADDRESSES[V4]}
    found["shared"] = {frozenset(keys): servers.pop(v) for v, keys in shared.items()}
    found["led"] = {v: keys for v, keys in made.items() if v not in shared}
    found["by address"] = servers
    found["ground"] = kernel.ground.addresses(), kernel.ground.routes()
    return found


def steps_and_fresh_load_agree(kernel: Kernel, batches: Batches, restart: int) -> None:
    """Apply batch after batch, adopting once as a restarted daemon does; compare with a fresh load."""
    objects: dict[tuple[str, str], object] = {}
    ranges = NodeRanges()
    store, table = Store(), FrontendTable()
    now = 0.0

    def clock() -> float:
        return now

    dataplane = Dataplane(*kernel, clock=clock)
    dataplane.load((), ranges)
    for number, batch in enumerate(batches):
        now += number
        for step in batch:
            if isinstance(step[2], NodeRanges):
                ranges = step[2]
            else:
                objects_after(objects, step)
        changes = deliver(store, table, objects)
        if number == restart:  # the changes came while the daemon was down
            dataplane = Dataplane(*kernel, clock=clock)
            assert dataplane.load(table, ranges)
        else:
            dataplane.apply(changes, ranges)
        assert dataplane.intact()
    now += LOOK_SECONDS
    dataplane.tidy()

    other, fresh_table = fake(), FrontendTable()
    deliver(Store(), fresh_table, objects)
    fresh = Dataplane(*other)
    fresh.load(fresh_table, ranges)
    assert contents(kernel) == contents(other)
    assert dataplane.elements == fresh.elements
    # What is there is known again: nothing is sent.
    commits = dataplane.commits
    again = Dataplane(*kernel)
    assert again.load(table, ranges)
    assert again.elements == fresh.elements
    assert again.commits == commits
    assert not again.gone
