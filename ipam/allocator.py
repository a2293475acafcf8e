"""Pick a pod address: one that was never used, else the one freed longest ago.

A new pod on an address that was in use a moment ago meets stale neighbour and conntrack entries, so an
address rests as long as the range allows. The functions work inside the caller's transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from netaddr import IPAddress, IPNetwork, IPRange

from ipam.ranges import pod_addresses

# `address` has a row for every address ever given. `freed` is NULL while an attachment holds it, else its
# place in the queue of its family: a counter and not a time, because a node's clock can step back.
# `cursor` says that the first `next` pod addresses of the CIDR all have such a row.
SCHEMA = (
    """CREATE TABLE address (
        family INTEGER NOT NULL, value BLOB NOT NULL, freed INTEGER, PRIMARY KEY (family, value)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX address_queue ON address (family, freed, value)",
    "CREATE TABLE cursor (family INTEGER PRIMARY KEY, cidr TEXT NOT NULL, next INTEGER NOT NULL) STRICT",
)


def take(db: sqlite3.Connection, cidr: IPNetwork) -> IPAddress | None:
    """Mark one free address of the range as held and return it; None when every one is held."""
    pods = pod_addresses(cidr)
    fresh = _never_used(db, cidr, pods)
    return fresh if fresh is not None else _freed_longest_ago(db, pods)


def give_back(db: sqlite3.Connection, addresses: Iterable[IPAddress]) -> None:
    """Put held addresses at the end of the queue."""
    for address in addresses:
        db.execute(
            "UPDATE address SET freed = 1 + coalesce((SELECT max(freed) FROM address"
            " WHERE family = ?1 AND freed IS NOT NULL), 0) WHERE family = ?1 AND value = ?2",
            (address.version, address.packed),
        )


def held(db: sqlite3.Connection, cidr: IPNetwork) -> int:
    """Return how many pod addresses of the range are held."""
    (count,) = db.execute(
        "SELECT count(*) FROM address WHERE family = ? AND value BETWEEN ? AND ? AND freed IS NULL",
        _bounds(pod_addresses(cidr)),
    ).fetchone()
    return int(count)


def _never_used(db: sqlite3.Connection, cidr: IPNetwork, pods: IPRange) -> IPAddress | None:
    row = db.execute(
        "SELECT next FROM cursor WHERE family = ? AND cidr = ?", (cidr.version, str(cidr))
    ).fetchone()
    if row is None:
        _begin_range(db, cidr, pods)
    # More than one turn only over addresses known from an earlier, overlapping podCIDR: once each.
    for index in range(row[0] if row else 0, pods.size):
        address = IPAddress(pods.first + index, cidr.version)
        inserted = db.execute(
            "INSERT INTO address (family, value) VALUES (?, ?) ON CONFLICT DO NOTHING",
            (address.version, address.packed),
        )
        if inserted.rowcount:
            db.execute("UPDATE cursor SET next = ? WHERE family = ?", (index + 1, cidr.version))
            return address
    db.execute("UPDATE cursor SET next = ? WHERE family = ?", (pods.size, cidr.version))
    return None


def _begin_range(db: sqlite3.Connection, cidr: IPNetwork, pods: IPRange) -> None:
    """Make this the family's range; forget free addresses outside, which would only be stepped over."""
    db.execute(
        "INSERT OR REPLACE INTO cursor (family, cidr, next) VALUES (?, ?, 0)", (cidr.version, str(cidr))
    )
    db.execute(
        "DELETE FROM address WHERE family = ? AND value NOT BETWEEN ? AND ? AND freed IS NOT NULL",
        _bounds(pods),
    )


def _freed_longest_ago(db: sqlite3.Connection, pods: IPRange) -> IPAddress | None:
    row = db.execute(
        "SELECT value FROM address WHERE family = ? AND value BETWEEN ? AND ? AND freed IS NOT NULL"
        " ORDER BY freed LIMIT 1",
        _bounds(pods),
    ).fetchone()
    if row is None:
        return None
    db.execute("UPDATE address SET freed = NULL WHERE family = ? AND value = ?", (pods.version, row[0]))
    return IPAddress(int.from_bytes(row[0], "big"), pods.version)


def _bounds(pods: IPRange) -> tuple[int, bytes, bytes]:
    first, last = IPAddress(pods.first, pods.version), IPAddress(pods.last, pods.version)
    return pods.version, first.packed, last.packed
