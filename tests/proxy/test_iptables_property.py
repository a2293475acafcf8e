"""Any sequence of changes ends in the same rules of iptables as a fresh load of the last state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from node.dataplanes import Programs
from node.store import Store
from proxy.dataplane import NodeRanges
from proxy.iptables.dataplane import Dataplane
from proxy.iptables.fake import FakeTables
from proxy.iptables.live import Tables
from proxy.iptables.names import TABLES
from proxy.table import FrontendTable
from tests.proxy.test_dataplane_property import Batches, batches_of_changes, deliver, objects_after


@pytest.fixture
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


@settings(max_examples=120, deadline=None)
@given(batches_of_changes, st.integers(0, 8), st.integers(0, 12))
def test_in_memory(batches: Batches, restart: int, most_commented: int) -> None:
    steps_and_fresh_load_agree(FakeTables(Family.V4), batches, restart, most_commented)


@pytest.mark.parametrize("variant", Variant)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches_of_changes, st.integers(0, 8), st.integers(0, 12))
def test_in_the_kernel(
    namespace: str, variant: Variant, batches: Batches, restart: int, most_commented: int
) -> None:
    def inside() -> None:
        programs = Programs(variant, Family.V4)
        try:
            steps_and_fresh_load_agree(programs, batches, restart, most_commented)
        finally:
            Dataplane(programs).remove()
        assert not {name: chains for name, chains in contents(programs).items() if any(chains.values())}

    netns.run(namespace, inside)


def contents(tables: Tables) -> dict[str, dict[str, list[str]]]:
    """Return all rules of the tables that are ours, in order."""
    return {
        table.name: {name: [rule.line for rule in rules] for name, rules in table.chains.items()}
        for table in tables.read()
        if table.name in TABLES
    }


def steps_and_fresh_load_agree(tables: Tables, batches: Batches, restart: int, most_commented: int) -> None:
    """Apply batch after batch, adopting once as a restarted daemon does; compare with a fresh load.

    Of more than `most_commented` endpoints the chains have no comments.
    """
    objects: dict[tuple[str, str], object] = {}
    ranges = NodeRanges()
    store, table = Store(), FrontendTable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.iptables.plan.MOST_COMMENTED", most_commented)
        dataplane = Dataplane(tables)
        dataplane.load((), ranges)
        for number, batch in enumerate(batches):
            for step in batch:
                if isinstance(step[2], NodeRanges):
                    ranges = step[2]
                else:
                    objects_after(objects, step)
            changes = deliver(store, table, objects)
            if number == restart:  # the changes came while the daemon was down
                dataplane = Dataplane(tables)
                assert dataplane.load(table, ranges)
            else:
                dataplane.apply(changes, ranges)
        assert dataplane.intact()

        fresh, fresh_table = FakeTables(Family.V4), FrontendTable()
        deliver(Store(), fresh_table, objects)
        fresh_plane = Dataplane(fresh)
        fresh_plane.load(fresh_table, ranges)
        assert contents(tables) == contents(fresh)
        assert dataplane.elements == fresh_plane.elements
        # What is there is known again: nothing is sent.
        again = Dataplane(tables)
        assert again.load(table, ranges)
        assert (again.sent, again.gone) == (0, ())
