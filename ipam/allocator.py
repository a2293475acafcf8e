"""Pick a pod address: one that was never used, else the one freed longest ago.

A new pod on an address that was in use a moment ago meets stale neighbour and conntrack entries, so an
address rests as long as the range allows, and at least for the quarantine. The functions work inside the
caller's transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from netaddr import IPAddress

from ipam.pools import Demand
from ipam.ranges import AddressRange, address_of, total
from ipam.records import Kept

# What makes version 1 of the tables, and what makes version 2 of version 1.
SCHEMA_1 = (
    """CREATE TABLE address (
        family INTEGER NOT NULL, value BLOB NOT NULL, freed INTEGER, PRIMARY KEY (family, value)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX address_queue ON address (family, freed, value)",
    "CREATE TABLE cursor (family INTEGER PRIMARY KEY, cidr TEXT NOT NULL, next INTEGER NOT NULL) STRICT",
)
# `address` has a row for every address ever given. `freed` is NULL while an attachment holds it, or `kept`
# has it for a pod that may come back; else its place in the queue of its family: a counter and not a time,
# because a node's clock can step back. `freed_at` is a time (epoch seconds), for the quarantine.
# `cursor` says of a demand's ranges that their first `next` addresses all have such a row; `seen` is when
# it was in use last (to the hour), `first` and `last` are its ranges' bounds.
SCHEMA_2 = (
    "ALTER TABLE address ADD COLUMN freed_at REAL NOT NULL DEFAULT 0",
    "DROP INDEX address_queue",
    "CREATE INDEX address_queue ON address (family, freed, value, freed_at) WHERE freed IS NOT NULL",
    "DROP TABLE cursor",
    """CREATE TABLE cursor (
        family INTEGER NOT NULL, ranges TEXT NOT NULL, next INTEGER NOT NULL, seen REAL NOT NULL,
        first BLOB NOT NULL, last BLOB NOT NULL, PRIMARY KEY (family, ranges)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE kept (
        family INTEGER NOT NULL, value BLOB NOT NULL, network TEXT NOT NULL, ifname TEXT NOT NULL,
        pod TEXT NOT NULL, until REAL NOT NULL, freed_at REAL NOT NULL, PRIMARY KEY (family, value)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX kept_until ON kept (until)",
    "CREATE INDEX kept_pod ON kept (pod, network, ifname)",
)

FEW = 512
"""Ranges of up to this many addresses are looked through; larger ones find theirs early in the queue."""
TIDY = 3600.0  # seconds between two tidyings of a cursor that is in use
UNUSED = 86400.0  # seconds after which a cursor that nobody used is dropped


@dataclass(frozen=True, slots=True)
class Owner:
    """For whom addresses are kept: the pod ("namespace/name") and which of its interfaces."""

    network: str
    ifname: str
    pod: str


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms addresses are taken: at what time (epoch seconds), by whom, after how long a rest."""

    now: float
    quarantine: float = 0.0
    owner: Owner | None = None


def take(db: sqlite3.Connection, demand: Demand, terms: Terms) -> IPAddress | None:
    """Mark an address as held and return it; None when there is none to be had now.

    In this order: the requested one; one that is kept for the owner; one never used, in the order of the
    ranges; the one freed longest ago, if its quarantine is over.
    """
    kept = _take_kept(db, demand, terms.owner) if terms.owner else None
    if kept is not None:
        return kept
    if demand.requested is not None:
        return demand.requested if _take_this(db, demand.requested) else None
    fresh = _never_used(db, demand.ranges, terms.now)
    return fresh if fresh is not None else _freed_longest_ago(db, demand.ranges, terms)


def give_back(db: sqlite3.Connection, addresses: Iterable[IPAddress], freed_at: float) -> None:
    """Put held addresses at the end of the queue; `freed_at` 0 spares them the quarantine."""
    for address in addresses:
        db.execute(
            "UPDATE address SET freed_at = ?3, freed = 1 + coalesce((SELECT max(freed) FROM address"
            " WHERE family = ?1 AND freed IS NOT NULL), 0) WHERE family = ?1 AND value = ?2",
            (address.version, address.packed, freed_at),
        )


def keep(
    db: sqlite3.Connection, addresses: Iterable[IPAddress], owner: Owner, until: float, freed_at: float
) -> None:
    """Keep held addresses for their owner instead of giving them back."""
    db.executemany(
        "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(a.version, a.packed, owner.network, owner.ifname, owner.pod, until, freed_at) for a in addresses],
    )


def drop_lapsed(db: sqlite3.Connection, now: float) -> bool:
    """Give back what was kept until now; False when nothing was kept, so that no owner need be looked for."""
    if db.execute("SELECT 1 FROM kept LIMIT 1").fetchone() is None:
        return False
    for family, value, freed_at in db.execute(
        "SELECT family, value, freed_at FROM kept WHERE until <= ? ORDER BY until, family, value", (now,)
    ).fetchall():
        _drop_kept(db, _address(family, value), freed_at)
    return True


def release_kept(db: sqlite3.Connection, address: IPAddress) -> bool:
    """Give back an address that is kept; False when it is not."""
    row = db.execute(
        "SELECT freed_at FROM kept WHERE family = ? AND value = ?", (address.version, address.packed)
    ).fetchone()
    if row:
        _drop_kept(db, address, row[0])
    return row is not None


def kept(db: sqlite3.Connection, now: float) -> tuple[Kept, ...]:
    """Return what is kept, in the order in which it lapses."""
    rows = db.execute(
        "SELECT family, value, network, ifname, pod, until FROM kept WHERE until > ?"
        " ORDER BY until, family, value",
        (now,),
    )
    return tuple(Kept(_address(family, value), *rest) for family, value, *rest in rows)


def has_room(db: sqlite3.Connection, ranges: Sequence[AddressRange], now: float) -> bool:
    """Say whether some address of the ranges is free, or will be when its quarantine is over; cheap."""
    row = _cursor(db, ranges)
    if _gap(db, ranges, row[0] if row else 0) is not None or _freed_first(db, ranges) is not None:
        return True
    return any(
        db.execute(
            "SELECT 1 FROM kept WHERE family = ? AND value BETWEEN ? AND ? AND until <= ? LIMIT 1",
            (*_bounds(range_), now),
        ).fetchone()
        for range_ in ranges
    )


def next_out_of_quarantine(db: sqlite3.Connection, ranges: Iterable[AddressRange]) -> float | None:
    """Return when the free address of the ranges that has rested longest was freed; None without one."""
    times = [
        db.execute(
            "SELECT min(freed_at) FROM address INDEXED BY address_queue WHERE family = ?"
            " AND freed IS NOT NULL AND value BETWEEN ? AND ?",
            _bounds(range_),
        ).fetchone()[0]
        for range_ in ranges
    ]
    return min((time for time in times if time is not None), default=None)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many addresses of some ranges have a pod, are in quarantine, and wait for their pod."""

    used: int = 0
    quarantined: int = 0
    kept: int = 0


def count(db: sqlite3.Connection, ranges: Iterable[AddressRange], terms: Terms) -> Counts:
    """Count what becomes of the ranges' addresses. Looks at every one that was ever given."""
    used = quarantined = kept_ = 0
    for range_ in ranges:
        held, resting = db.execute(
            "SELECT count(*) FILTER (WHERE freed IS NULL), count(*) FILTER (WHERE freed IS NOT NULL"
            " AND freed_at > ?4 - ?5 AND freed_at <= ?4) FROM address WHERE family = ?1"
            " AND value BETWEEN ?2 AND ?3",
            (*_bounds(range_), terms.now, terms.quarantine),
        ).fetchone()
        waiting, lapsed = db.execute(
            "SELECT count(*) FILTER (WHERE until > ?4), count(*) FILTER (WHERE until <= ?4) FROM kept"
            " WHERE family = ?1 AND value BETWEEN ?2 AND ?3",
            (*_bounds(range_), terms.now),
        ).fetchone()
        used, quarantined, kept_ = used + held - waiting - lapsed, quarantined + resting, kept_ + waiting
    return Counts(used, quarantined, kept_)


def _take_this(db: sqlite3.Connection, address: IPAddress) -> bool:
    """Take an address whether it is in quarantine or not: who asks for it by name wants it now."""
    if _insert(db, address):
        return True
    taken = db.execute(
        "UPDATE address SET freed = NULL WHERE family = ? AND value = ? AND freed IS NOT NULL",
        (address.version, address.packed),
    )
    return taken.rowcount == 1


def _take_kept(db: sqlite3.Connection, demand: Demand, owner: Owner) -> IPAddress | None:
    rows = db.execute(
        "SELECT value FROM kept WHERE pod = ? AND network = ? AND ifname = ? AND family = ? ORDER BY value",
        (owner.pod, owner.network, owner.ifname, demand.version),
    )
    for (value,) in rows:
        address = _address(demand.version, value)
        if demand.allows(address):
            db.execute("DELETE FROM kept WHERE family = ? AND value = ?", (demand.version, value))
            return address
    return None


def _drop_kept(db: sqlite3.Connection, address: IPAddress, freed_at: float) -> None:
    db.execute("DELETE FROM kept WHERE family = ? AND value = ?", (address.version, address.packed))
    give_back(db, [address], freed_at)


def _never_used(db: sqlite3.Connection, ranges: Sequence[AddressRange], now: float) -> IPAddress | None:
    row = _cursor(db, ranges)
    start, seen = row or (0, None)
    if seen is None or not 0 <= now - seen < TIDY:
        _tidy(db, ranges, start, now)
    found: int | None = start
    if start == total(ranges):
        return None
    if not _insert(db, _nth(ranges, start)):
        found = _gap(db, ranges, start)
        if found is not None:
            _insert(db, _nth(ranges, found))
    db.execute(
        "UPDATE cursor SET next = ? WHERE family = ? AND ranges = ?",
        (total(ranges) if found is None else found + 1, ranges[0].version, _name(ranges)),
    )
    return None if found is None else _nth(ranges, found)


def _cursor(db: sqlite3.Connection, ranges: Sequence[AddressRange]) -> tuple[int, float] | None:
    row: tuple[int, float] | None = db.execute(
        "SELECT next, seen FROM cursor WHERE family = ? AND ranges = ?", (ranges[0].version, _name(ranges))
    ).fetchone()
    return row


def _gap(db: sqlite3.Connection, ranges: Sequence[AddressRange], start: int) -> int | None:
    """Return the index, from `start` on, of the first address that was never given.

    Reads more than one row only where an earlier configuration, or a request by name, gave addresses.
    """
    before = 0
    for range_ in ranges:
        index = max(start - before, 0)
        if index < range_.size:
            bounds = _bounds(AddressRange(range_.version, range_.first + index, range_.last))
            (known,) = db.execute(
                "SELECT count(*) FROM address WHERE family = ? AND value BETWEEN ? AND ?", bounds
            ).fetchone()
            if known < range_.size - index:
                return before + index + _known_in_a_row(db, bounds)
        before += range_.size
    return None


def _known_in_a_row(db: sqlite3.Connection, bounds: tuple[int, bytes, bytes]) -> int:
    """Return how many addresses have rows, from the first on, until one has none."""
    first = int.from_bytes(bounds[1], "big")
    rows = db.execute(
        "SELECT value FROM address WHERE family = ? AND value BETWEEN ? AND ? ORDER BY value", bounds
    )
    known = 0
    for (value,) in rows:
        if int.from_bytes(value, "big") != first + known:
            break
        known += 1
    return known


def _tidy(db: sqlite3.Connection, ranges: Sequence[AddressRange], start: int, now: float) -> None:
    """Note that these ranges are in use; drop the cursors of others, and free addresses outside all ranges.

    Those would be stepped over in the queue for ever. Addresses freed today stay: they may be in quarantine.
    """
    db.execute("DELETE FROM cursor WHERE NOT (? - seen BETWEEN 0 AND ?)", (now, UNUSED))
    family, first, last = _bounds(AddressRange(ranges[0].version, min(ranges).first, max(ranges).last))
    db.execute(
        "INSERT OR REPLACE INTO cursor (family, ranges, next, seen, first, last) VALUES (?, ?, ?, ?, ?, ?)",
        (family, _name(ranges), start, now, first, last),
    )
    behind = b""  # in both families less than every address
    for first, last in db.execute(
        "SELECT first, last FROM cursor WHERE family = ? ORDER BY first", (family,)
    ).fetchall():
        _forget_between(db, family, behind, first, now)
        behind = max(behind, last)
    _forget_between(db, family, behind, b"\xff" * 17, now)


def _forget_between(db: sqlite3.Connection, family: int, after: bytes, before: bytes, now: float) -> None:
    db.execute(
        "DELETE FROM address WHERE family = ? AND value > ? AND value < ? AND freed IS NOT NULL"
        " AND freed_at < ?",
        (family, after, before, now - UNUSED),
    )


def _freed_longest_ago(
    db: sqlite3.Connection, ranges: Sequence[AddressRange], terms: Terms
) -> IPAddress | None:
    value = _freed_first(db, ranges, terms.now - terms.quarantine, terms.now)
    if value is None:
        return None
    db.execute("UPDATE address SET freed = NULL WHERE family = ? AND value = ?", (ranges[0].version, value))
    return _address(ranges[0].version, value)


def _freed_first(
    db: sqlite3.Connection, ranges: Sequence[AddressRange], since: float = 0.0, now: float = 0.0
) -> bytes | None:
    """Return the address of the ranges that was freed first, of those not freed after `since` up to `now`.

    One freed later than now saw the clock step back; how long it rests already cannot be told.
    """
    if total(ranges) <= FEW:
        rows = [
            row
            for range_ in ranges
            # The plus keeps SQLite from walking the queue, in which these may come last.
            for row in db.execute(
                "SELECT freed, value FROM address WHERE family = ? AND value BETWEEN ? AND ?"
                " AND +freed IS NOT NULL AND NOT (freed_at > ? AND freed_at <= ?)",
                (*_bounds(range_), since, now),
            )
        ]
        return min(rows)[1] if rows else None
    family, first, last = _bounds(AddressRange(ranges[0].version, min(ranges).first, max(ranges).last))
    for (value,) in db.execute(
        "SELECT value FROM address INDEXED BY address_queue WHERE family = ? AND freed IS NOT NULL"
        " AND value BETWEEN ? AND ? AND NOT (freed_at > ? AND freed_at <= ?) ORDER BY freed",
        (family, first, last, since, now),
    ):
        number = int.from_bytes(value, "big")
        if any(range_.first <= number <= range_.last for range_ in ranges):
            return bytes(value)
    return None


def _insert(db: sqlite3.Connection, address: IPAddress) -> bool:
    """Note an address as held for the first time; False when it was given before."""
    inserted = db.execute(
        "INSERT INTO address (family, value) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (address.version, address.packed),
    )
    return inserted.rowcount == 1


def _nth(ranges: Sequence[AddressRange], index: int) -> IPAddress:
    for range_ in ranges:
        if index < range_.size:
            return address_of(range_.version, range_.first + index)
        index -= range_.size
    raise IndexError(index)


def _bounds(range_: AddressRange) -> tuple[int, bytes, bytes]:
    size = 4 if range_.version == 4 else 16
    return range_.version, range_.first.to_bytes(size, "big"), range_.last.to_bytes(size, "big")


def _name(ranges: Sequence[AddressRange]) -> str:
    return ",".join(f"{range_.first:x}-{range_.last:x}" for range_ in ranges)


def _address(family: int, value: bytes) -> IPAddress:
    return address_of(family, int.from_bytes(value, "big"))
