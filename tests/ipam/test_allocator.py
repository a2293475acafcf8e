import sqlite3
from collections.abc import Iterator

import pytest
from netaddr import IPAddress, IPNetwork

from ipam import allocator

NET = IPNetwork("10.1.0.0/29")  # pods: .2 to .6


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in allocator.SCHEMA:
        connection.execute(statement)
    yield connection
    connection.close()


def take(db: sqlite3.Connection, cidr: IPNetwork, count: int) -> list[str]:
    return [str(allocator.take(db, cidr)) for _ in range(count)]


def give_back(db: sqlite3.Connection, *addresses: str) -> None:
    allocator.give_back(db, map(IPAddress, addresses))


def test_new_pod_unreachable_after_address_reuse(db: sqlite3.Connection) -> None:
    """Never-used first, then the one freed longest ago: stale neighbour entries have time to die."""
    assert take(db, NET, 2) == ["10.1.0.2", "10.1.0.3"]
    give_back(db, "10.1.0.3", "10.1.0.2")
    assert take(db, NET, 3) == ["10.1.0.4", "10.1.0.5", "10.1.0.6"]
    give_back(db, "10.1.0.5")
    assert take(db, NET, 3) == ["10.1.0.3", "10.1.0.2", "10.1.0.5"]


def test_a_full_range_gives_nothing_until_one_comes_back(db: sqlite3.Connection) -> None:
    take(db, NET, 5)
    assert allocator.take(db, NET) is None
    assert allocator.held(db, NET) == 5
    give_back(db, "10.1.0.4")
    assert take(db, NET, 2) == ["10.1.0.4", "None"]


def test_families_do_not_share_a_queue(db: sqlite3.Connection) -> None:
    six = IPNetwork("fd00::/126")
    assert take(db, six, 3) == ["fd00::2", "fd00::3", "None"]
    give_back(db, "fd00::3")
    assert take(db, NET, 1) == ["10.1.0.2"]
    assert take(db, six, 2) == ["fd00::3", "None"]


def test_a_grown_range_skips_what_is_held_and_prefers_what_was_never_used(db: sqlite3.Connection) -> None:
    take(db, NET, 5)
    give_back(db, "10.1.0.4")
    wide = IPNetwork("10.1.0.0/28")  # pods: .2 to .14
    assert take(db, wide, 8) == [f"10.1.0.{n}" for n in range(7, 15)]
    assert take(db, wide, 2) == ["10.1.0.4", "None"]


def test_a_shrunk_range_gives_no_address_that_became_gateway_or_broadcast(db: sqlite3.Connection) -> None:
    take(db, IPNetwork("10.1.0.0/28"), 13)
    give_back(db, *(f"10.1.0.{n}" for n in range(2, 15)))
    assert take(db, IPNetwork("10.1.0.8/30"), 2) == ["10.1.0.10", "None"]


def test_addresses_of_a_former_range_are_forgotten_once_free(db: sqlite3.Connection) -> None:
    take(db, NET, 3)
    give_back(db, "10.1.0.2", "10.1.0.3")
    take(db, IPNetwork("10.2.0.0/29"), 1)
    assert allocator.held(db, NET) == 1
    assert db.execute("SELECT count(*) FROM address").fetchone() == (2,)
