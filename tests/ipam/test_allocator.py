import itertools
import sqlite3
from collections.abc import Iterator

import pytest
from netaddr import IPAddress

from ipam import allocator
from ipam.allocator import Owner, Terms
from ipam.pools import Demand
from ipam.ranges import parse_range, total

NET = "10.1.0.2-10.1.0.6"
HOUR = 3600.0
DAY = 24 * HOUR
WEB = Owner("net", "eth0", "shop/web-0")


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in (*allocator.SCHEMA_1, *allocator.SCHEMA_2):
        connection.execute(statement)
    yield connection
    connection.close()


def demand(*ranges: str) -> Demand:
    return Demand("test", tuple(map(parse_range, ranges)))


def named(address: str) -> Demand:
    return Demand("test", (parse_range(address),), IPAddress(address))


def take(
    db: sqlite3.Connection, *ranges: str, count: int = 1, now: float = 1.0, quarantine: float = 0.0
) -> list[str]:
    terms = Terms(now, quarantine)
    return [str(allocator.take(db, demand(*ranges), terms)) for _ in range(count)]


def take_named(db: sqlite3.Connection, address: str, owner: Owner | None = None) -> str:
    return str(allocator.take(db, named(address), Terms(1.0, 100.0, owner)))


def give_back(db: sqlite3.Connection, *addresses: str, at: float = 1.0) -> None:
    allocator.give_back(db, map(IPAddress, addresses), at)


def keep(db: sqlite3.Connection, address: str, until: float, owner: Owner = WEB, at: float = 1.0) -> None:
    allocator.keep(db, [IPAddress(address)], owner, until, at)


def test_new_pod_unreachable_after_address_reuse(db: sqlite3.Connection) -> None:
    """Never-used first, then the one freed longest ago: stale neighbour entries have time to die."""
    assert take(db, NET, count=2) == ["10.1.0.2", "10.1.0.3"]
    give_back(db, "10.1.0.3", "10.1.0.2")
    assert take(db, NET, count=3) == ["10.1.0.4", "10.1.0.5", "10.1.0.6"]
    give_back(db, "10.1.0.5")
    assert take(db, NET, count=3) == ["10.1.0.3", "10.1.0.2", "10.1.0.5"]


def test_an_address_is_not_given_again_before_its_quarantine_is_over(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    give_back(db, "10.1.0.4", at=100.0)
    give_back(db, "10.1.0.2", at=105.0)
    assert take(db, NET, now=109.9, quarantine=10) == ["None"]
    assert allocator.next_out_of_quarantine(db, demand(NET).ranges) == 100.0
    assert take(db, NET, now=110.0, quarantine=10, count=2) == ["10.1.0.4", "None"]
    assert take(db, NET, now=110.0, quarantine=0) == ["10.1.0.2"]


def test_an_address_never_used_does_not_wait(db: sqlite3.Connection) -> None:
    take(db, NET, count=2)
    give_back(db, "10.1.0.2", "10.1.0.3", at=100.0)
    assert take(db, NET, now=100.0, quarantine=10, count=4) == ["10.1.0.4", "10.1.0.5", "10.1.0.6", "None"]


def test_a_clock_that_stepped_back_ends_the_quarantine(db: sqlite3.Connection) -> None:
    """Otherwise an address freed "in the future" would be lost until that future; the queue is no clock."""
    take(db, NET, count=5)
    give_back(db, "10.1.0.4", at=1000.0)
    give_back(db, "10.1.0.2", at=2.0)
    assert take(db, NET, now=5.0, quarantine=10) == ["10.1.0.4"]
    assert take(db, NET, now=5.0, quarantine=10) == ["None"], "freed 3 seconds ago"


def test_an_address_that_needs_no_rest_is_given_before_one_in_quarantine(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    give_back(db, "10.1.0.2", at=99.0)
    give_back(db, "10.1.0.3", at=0.0)  # of an earlier boot
    assert take(db, NET, now=100.0, quarantine=10, count=2) == ["10.1.0.3", "None"]


def test_a_full_range_gives_nothing_until_one_comes_back(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    assert take(db, NET) == ["None"]
    assert not allocator.has_room(db, demand(NET).ranges, 1.0)
    give_back(db, "10.1.0.4")
    assert allocator.has_room(db, demand(NET).ranges, 1.0)
    assert take(db, NET, count=2) == ["10.1.0.4", "None"]


def test_families_do_not_share_a_queue(db: sqlite3.Connection) -> None:
    six = "fd00::2-fd00::3"
    assert take(db, six, count=3) == ["fd00::2", "fd00::3", "None"]
    give_back(db, "fd00::3")
    assert take(db, NET) == ["10.1.0.2"]
    assert take(db, six, count=2) == ["fd00::3", "None"]


def test_a_grown_range_skips_what_is_held_and_prefers_what_was_never_used(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    give_back(db, "10.1.0.4")
    wide = "10.1.0.2-10.1.0.14"
    assert take(db, wide, count=8) == [f"10.1.0.{n}" for n in range(7, 15)]
    assert take(db, wide, count=2) == ["10.1.0.4", "None"]


def test_a_shrunk_range_gives_no_address_that_became_gateway_or_broadcast(db: sqlite3.Connection) -> None:
    take(db, "10.1.0.2-10.1.0.14", count=13)
    give_back(db, *(f"10.1.0.{n}" for n in range(2, 15)))
    assert take(db, "10.1.0.10", count=2) == ["10.1.0.10", "None"]


def test_ranges_are_used_in_their_order_and_nothing_between_them(db: sqlite3.Connection) -> None:
    ranges = ("10.1.0.8-10.1.0.9", "10.1.0.2-10.1.0.3")
    assert take(db, "10.1.0.2-10.1.0.9", count=8)[-1] == "10.1.0.9"
    give_back(db, "10.1.0.5", "10.1.0.2", "10.1.0.9")
    assert take(db, *ranges, count=3) == ["10.1.0.2", "10.1.0.9", "None"]
    fresh = ("10.2.0.8-10.2.0.9", "10.2.0.2-10.2.0.3")
    assert take(db, *fresh, count=5) == ["10.2.0.8", "10.2.0.9", "10.2.0.2", "10.2.0.3", "None"]


def test_pools_used_by_turns_find_their_own_addresses(db: sqlite3.Connection) -> None:
    """Also where one pool's addresses all lie behind another's in the queue, with few and with many."""
    few, many = "10.2.0.0/28", "10.3.0.0/20"
    assert total(demand(few).ranges) <= allocator.FEW < total(demand(many).ranges)
    first = {name: take(db, name, count=total(demand(name).ranges)) for name in (few, many)}
    assert {len(set(addresses)) for addresses in first.values()} == {16, 4096}
    give_back(db, *first[many][:100], *first[few][:5], *first[many][100:200])
    assert take(db, few, count=6) == [*first[few][:5], "None"]
    assert take(db, many, count=101)[-1] == first[many][100]


def test_a_requested_address_is_given_or_refused(db: sqlite3.Connection) -> None:
    assert take_named(db, "10.1.0.5") == "10.1.0.5"
    assert take_named(db, "10.1.0.5") == "None"
    assert take(db, NET, count=5) == ["10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.6", "None"]
    give_back(db, "10.1.0.5", at=1.0)
    assert take(db, NET, quarantine=100) == ["None"]
    assert take_named(db, "10.1.0.5") == "10.1.0.5", "who asks by name does not wait for the quarantine"


def test_a_kept_address_is_for_its_owner_only(db: sqlite3.Connection) -> None:
    take(db, NET, count=2)
    keep(db, "10.1.0.2", until=50.0)
    other = Owner("net", "eth0", "shop/web-1")
    for stranger in (None, other, Owner("net2", "eth0", "shop/web-0"), Owner("net", "net1", "shop/web-0")):
        assert str(allocator.take(db, named("10.1.0.2"), Terms(2.0, 0.0, stranger))) == "None"
    assert str(allocator.take(db, demand(NET), Terms(2.0, 0.0, other))) == "10.1.0.4"
    assert str(allocator.take(db, demand(NET), Terms(2.0, 9.0, WEB))) == "10.1.0.2", "before any other"
    assert str(allocator.take(db, demand(NET), Terms(2.0, 0.0, WEB))) == "10.1.0.5"
    assert allocator.kept(db, 2.0) == ()


def test_an_owner_may_ask_for_its_kept_address_by_name(db: sqlite3.Connection) -> None:
    take(db, NET)
    keep(db, "10.1.0.2", until=50.0)
    assert take_named(db, "10.1.0.2", WEB) == "10.1.0.2"


def test_a_kept_address_outside_the_ranges_is_not_forced_on_its_owner(db: sqlite3.Connection) -> None:
    take(db, NET)
    keep(db, "10.1.0.2", until=50.0)
    assert str(allocator.take(db, demand("10.2.0.0/30"), Terms(2.0, 0.0, WEB))) == "10.2.0.0"
    assert [str(kept.address) for kept in allocator.kept(db, 2.0)] == ["10.1.0.2"]


def test_what_was_kept_too_long_queues_last(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    keep(db, "10.1.0.2", until=50.0, at=1.0)
    give_back(db, "10.1.0.3", at=40.0)
    assert allocator.drop_lapsed(db, 49.9) and len(allocator.kept(db, 49.9)) == 1
    assert allocator.drop_lapsed(db, 50.0) and allocator.kept(db, 50.0) == ()
    assert take(db, NET, now=50.0, count=3) == ["10.1.0.3", "10.1.0.2", "None"]
    assert not allocator.drop_lapsed(db, 51.0)


def test_a_hold_can_be_dropped(db: sqlite3.Connection) -> None:
    take(db, NET, count=5)
    keep(db, "10.1.0.2", until=50.0)
    assert allocator.release_kept(db, IPAddress("10.1.0.2"))
    assert not allocator.release_kept(db, IPAddress("10.1.0.2"))
    assert not allocator.release_kept(db, IPAddress("10.1.0.3")), "a pod has it"
    assert take(db, NET, count=2) == ["10.1.0.2", "None"]


def rows(db: sqlite3.Connection, table: str) -> int:
    (number,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(number)


def test_addresses_and_cursors_of_a_former_range_are_forgotten_a_day_later(db: sqlite3.Connection) -> None:
    """Held ones are not, and no address of a range in use: its place in the queue counts."""
    take(db, NET, count=3)
    give_back(db, "10.1.0.2", "10.1.0.3")
    six = "fd00::2-fd00::ff"
    new = "10.2.0.2-10.2.0.6"
    take(db, six)
    assert take(db, new, count=5)[0] == "10.2.0.2"
    give_back(db, "10.2.0.2", "10.2.0.3")
    assert rows(db, "address") == 9
    for now in (HOUR, 12 * HOUR, DAY + HOUR):
        assert take(db, new, now=now, quarantine=2 * DAY) == ["None"]
    assert rows(db, "address") == 7 and rows(db, "cursor") == 1
    assert take(db, new, now=DAY + HOUR, count=2) == ["10.2.0.2", "10.2.0.3"]
    assert take(db, NET, now=DAY + HOUR, count=5) == ["10.1.0.2", "10.1.0.3", "10.1.0.5", "10.1.0.6", "None"]
    assert take(db, six, now=DAY + HOUR) == ["fd00::3"], "although its cursor is gone"


def test_range_sets_that_never_come_again_do_not_fill_the_ledger(db: sqlite3.Connection) -> None:
    for number in range(200):
        now = number * HOUR
        (address,) = take(db, f"10.3.{number}.0/24", now=now)
        give_back(db, address, at=now)
        take(db, NET, now=now, quarantine=DAY)
    assert rows(db, "cursor") < 40 and rows(db, "address") < 40


def test_an_add_in_a_full_and_in_a_much_used_slash_16_costs_a_few_rows(db: sqlite3.Connection) -> None:
    """Counted in steps of SQLite's virtual machine, of which an ADD in an empty range takes some hundred."""
    big = demand("10.8.0.2-10.8.255.254")
    db.execute("BEGIN")
    last = [allocator.take(db, big, Terms(1.0)) for _ in range(65533)][-1]
    assert str(last) == "10.8.255.254"

    steps = itertools.count()

    def used(expected: str) -> int:
        before = next(steps)
        assert str(allocator.take(db, big, Terms(100.0, 10.0))) == expected
        return next(steps) - before

    db.set_progress_handler(lambda: next(steps) < 0, 1)
    assert used("None") < 1000
    db.set_progress_handler(None, 0)
    allocator.give_back(db, (IPAddress(0x0A080002 + n) for n in range(65533)), 50.0)
    db.set_progress_handler(lambda: next(steps) < 0, 1)
    assert used("10.8.0.2") < 1000 and used("10.8.0.3") < 1000
    assert allocator.has_room(db, big.ranges, 1.0) and next(steps) < 5000
