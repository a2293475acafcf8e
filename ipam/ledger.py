"""The record of which pod has which address: one SQLite file, the truth for daemon and CNI binary alike."""

from __future__ import annotations

import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netaddr import IPAddress

from ipam import allocator, attachments
from ipam.allocator import Owner, Terms
from ipam.attachments import COLUMNS, attachment_of
from ipam.pools import Demand, Group
from ipam.ranges import AddressRange, total
from ipam.records import (
    AddressTaken,
    AlreadyAttached,
    Attachment,
    Claim,
    Exhausted,
    HostPort,
    HostPortTaken,
    InTheWay,
    Kept,
    Key,
    LedgerBusy,
    LedgerError,
    Shortage,
    State,
    StillReleasing,
    Usage,
)

__all__ = [
    "AddressTaken",
    "AlreadyAttached",
    "Attachment",
    "Claim",
    "Exhausted",
    "HostPort",
    "HostPortTaken",
    "InTheWay",
    "Kept",
    "Key",
    "Ledger",
    "LedgerBusy",
    "LedgerError",
    "Shortage",
    "State",
    "StillReleasing",
    "Usage",
    "read_boot_id",
]

SCHEMA_VERSION = 2
BUSY_TIMEOUT = 10.0  # seconds
# SQLite's own bound is 1000 pages; with somebody who calls `checkpoint`, one that is not reached.
EMERGENCY_PAGES = 10_000
CHECKPOINT_AFTER = 100  # transactions; about 500 pages
CHECKPOINT_TRIES = 3  # the second is quick: it writes what was added during the first

# The statements that lead to each version from the one before; a new file takes all of them.
SCHEMA = (
    (*attachments.SCHEMA_1, *allocator.SCHEMA_1),
    (*attachments.SCHEMA_2, *allocator.SCHEMA_2),
)


def read_boot_id() -> str:
    """Return the kernel's identifier of this boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Ledger:
    """The attachments of this node. One object may be used by many threads, one file by many processes.

    Every change is one transaction. All methods raise LedgerBusy or LedgerError when SQLite cannot do its
    part. `reclaimed` is how many attachments of an earlier boot `open` deleted. `clock` tells epoch seconds.

    Every thousand pages SQLite writes its log back into the file, within somebody's commit, which can take
    100 ms on a slow disk. With `background_checkpoints` it does not, and the owner calls `checkpoint` now
    and then.
    """

    def __init__(
        self,
        path: Path,
        *,
        boot_id: str,
        clock: Callable[[], float] = time.time,
        background_checkpoints: bool = False,
    ) -> None:
        self._path = path
        self._boot_id = boot_id
        self._clock = clock
        self._background_checkpoints = background_checkpoints
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._writes = 0
        self._settings: tuple[int, dict[str, str]] | None = None
        self.reclaimed = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Open or create the file (0600) and free what an earlier boot left: those pods had no DEL."""
        with self._lock, self._errors():
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # mknod: closing a descriptor of the file would drop the locks that SQLite holds in this process.
            with suppress(FileExistsError):
                os.mknod(self._path, stat.S_IFREG | 0o600)
            self._connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
        try:
            with self._errors():
                _use_wal(self._connection)
                if self._background_checkpoints:
                    self._connection.execute(f"PRAGMA wal_autocheckpoint = {EMERGENCY_PAGES}")
            with self._transaction() as db:
                self._migrate(db)
                # Nobody had these addresses while the node booted: that was their quarantine.
                now = self._clock()
                self.reclaimed = _delete(db, "boot_id != ?", (self._boot_id,), now, freed_at=0.0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; harmless when it is not open."""
        with self._lock:
            self._settings = None
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def settings(self) -> dict[str, str]:
        """Return what `save_settings` saved last; read from the file only when that may have changed."""
        with self._lock, self._errors():
            db = self._db()
            (version,) = db.execute("PRAGMA data_version").fetchone()  # changes when others write
            if self._settings is None or self._settings[0] != version:
                self._settings = version, dict(db.execute("SELECT name, value FROM setting").fetchall())
            return dict(self._settings[1])

    def save_settings(self, settings: Mapping[str, str]) -> None:
        """Replace the node settings that the CNI binary needs while the daemon is down."""
        with self._transaction() as db:
            self._settings = None
            db.execute("DELETE FROM setting")
            db.executemany("INSERT INTO setting VALUES (?, ?)", settings.items())

    def reserve(
        self, key: Key, claim: Claim, demands: Sequence[Demand], quarantine: float = 0.0
    ) -> Attachment:
        """Record a pending attachment with one address for each demand; on any error nothing is kept.

        `pools.demands` makes demands. Addresses rest for `quarantine` seconds before they are given again.
        Of an earlier, broken try it keeps the addresses that the demands still allow. Raises Exhausted,
        AddressTaken or StillReleasing (all InTheWay: taking back one of `releasing` may help), HostPortTaken
        or AlreadyAttached.
        """
        if not demands:
            raise LedgerError(f"{key} cannot get an address: the node has no podCIDR yet")
        with self._transaction() as db:
            now = self._clock()
            earlier = attachments.find(db, key)
            if earlier and earlier.state is State.ATTACHED:
                raise AlreadyAttached(earlier)
            if earlier and earlier.state is State.RELEASED:
                raise StillReleasing(earlier)
            attachments.check_host_ports(db, key, claim.host_ports)
            owner = Owner(claim.network, key.ifname, claim.pod) if claim.pod else None
            attachments.await_own(db, key, claim)
            wanted = Attachment(
                key=key,
                network=claim.network,
                netns=claim.netns,
                host_ifname=claim.host_ifname,
                addresses=_take_all(
                    db, demands, Terms(now, quarantine, owner), earlier.addresses if earlier else ()
                ),
                state=State.PENDING,
                request_id=claim.request_id,
                result="",
                boot_id=self._boot_id,
                created=earlier.created if earlier else now,
                pod=claim.pod,
                mac=claim.mac,
                host_ports=claim.host_ports,
                wiring=claim.wiring,
                sticky=claim.sticky,
            )
            attachments.save(db, wanted)
        return wanted

    def commit(self, key: Key, result: str) -> Attachment:
        """Turn a pending attachment into an attached one; LedgerError when there is none."""
        with self._transaction() as db:
            rows = db.execute(
                f"UPDATE attachment SET state = 'attached', result = ? WHERE container_id = ? AND ifname = ?"
                f" AND state = 'pending' RETURNING {COLUMNS}",
                (result, key.container_id, key.ifname),
            ).fetchall()
            if not rows:
                raise LedgerError(f"{key} has no pending attachment: it was deleted meanwhile")
        return attachment_of(rows[0])

    def release(self, key: Key) -> Attachment | None:
        """Mark the attachment as going; its addresses stay taken until `forget`. None when it is unknown."""
        with self._transaction() as db:
            rows = db.execute(
                "UPDATE attachment SET state = 'released' WHERE container_id = ? AND ifname = ?"
                f" RETURNING {COLUMNS}",
                (key.container_id, key.ifname),
            ).fetchall()
        return attachment_of(rows[0]) if rows else None

    def forget(self, key: Key) -> None:
        """Delete the attachment and free its addresses, or keep them for its pod: its link is gone.

        Harmless when it is unknown.
        """
        with self._transaction() as db:
            now = self._clock()
            _delete(db, "container_id = ? AND ifname = ?", (key.container_id, key.ifname), now, now)

    def release_kept(self, address: IPAddress) -> bool:
        """Free an address that is kept for a pod that may come back; False when it is not kept."""
        with self._transaction() as db:
            return allocator.release_kept(db, address)

    def kept(self) -> tuple[Kept, ...]:
        """Return the addresses that are kept for pods that may come back, in the order in which that ends."""
        with self._lock, self._errors():
            return allocator.kept(self._db(), self._clock())

    def get(self, key: Key) -> Attachment | None:
        """Return the attachment of the key, in whatever state."""
        with self._lock, self._errors():
            return attachments.find(self._db(), key)

    def attachments(self, state: State | None = None) -> tuple[Attachment, ...]:
        """Return all attachments, or those in one state, oldest first."""
        sql = f"SELECT {COLUMNS} FROM attachment WHERE ?1 IS NULL OR state = ?1 ORDER BY created"
        return tuple(attachment_of(row) for row in self._read(sql, state))

    def usage(self, groups: Sequence[Group], quarantine: float = 0.0) -> tuple[Usage, ...]:
        """Return how full each group of ranges (`pools.groups`) is. Looks at every address ever given."""
        with self._transaction("BEGIN") as db:
            going = attachments.releasing(db)
            terms = Terms(self._clock(), quarantine)
            return tuple(_usage(db, group, going, terms) for group in groups)

    def shortage(self, demands: Sequence[Demand], quarantine: float = 0.0) -> Exhausted | None:
        """Return what an ADD would fail with for some time to come; None when it could get its addresses.

        Addresses that are being released or in quarantine count as there: they are within seconds. Cheap,
        also in a full range.
        """
        with self._transaction("BEGIN") as db:
            now = self._clock()
            full = [d for d in demands if d.requested is None and not allocator.has_room(db, d.ranges, now)]
            going = attachments.releasing(db) if full else ()
            full = [demand for demand in full if not _among(demand.ranges, going)]
            return _exhausted(db, full, Terms(now, quarantine)) if full else None

    def checkpoint(self) -> bool:
        """Write the log back into the file and begin it anew, for a thread that may wait for the disk.

        False when there is little to write yet, or a reader or writer was at work on it: try again later.
        Nobody waits for it, but for a write in the moment in which the log begins anew.
        """
        with self._lock:
            if self._writes < CHECKPOINT_AFTER:
                return False
            self._writes = 0
        # On a connection of its own, as the other one's lock is every thread's.
        with self._errors(), closing(sqlite3.connect(self._path, timeout=0, isolation_level=None)) as db:
            for _ in range(CHECKPOINT_TRIES):
                _, pages, written = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if pages == written:
                    # The first write after a finished checkpoint flushes the log's new header to the disk.
                    # This one changes nothing; without it, the next ADD would wait.
                    with suppress(sqlite3.OperationalError):
                        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    return True
        return False

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring the tables to our version; a new file has version 0."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"ledger {self._path} has schema {version}, this podwire knows up to {SCHEMA_VERSION}:"
                " run the podwire that wrote it"
            )
        if version < SCHEMA_VERSION:
            for statements in SCHEMA[version:]:
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LedgerError(f"ledger {self._path} is not open")
        return self._connection

    def _read(self, sql: str, *values: str | None) -> list[Any]:
        with self._lock, self._errors():
            return self._db().execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            db = self._db()
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
                self._writes += 1
            except BaseException:
                if db.in_transaction:  # a full disk makes SQLite roll back by itself
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits say which kind of busy
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LedgerBusy(f"ledger {self._path} is locked by another process") from error
            raise LedgerError(f"ledger {self._path} cannot be used: {error}") from error


def _use_wal(db: sqlite3.Connection) -> None:
    """Let readers and a writer work at once, without a disk flush for each commit.

    NORMAL can lose the last commits in a power failure, never the file. Nothing is lost that counts: the
    records of an earlier boot are stale anyway. A killed process loses nothing.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # Processes that create the file at once: SQLite does not wait here, as two would deadlock.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    db.execute("PRAGMA synchronous = NORMAL")


def _delete(
    db: sqlite3.Connection, condition: str, values: tuple[str, ...], now: float, freed_at: float
) -> int:
    rows = db.execute(f"DELETE FROM attachment WHERE {condition} RETURNING {COLUMNS}", values).fetchall()
    for attachment in map(attachment_of, rows):
        if attachment.sticky > 0 and attachment.pod:
            owner = Owner(attachment.network, attachment.key.ifname, attachment.pod)
            allocator.keep(db, attachment.addresses, owner, now + attachment.sticky, freed_at)
        else:
            allocator.give_back(db, attachment.addresses, freed_at)
    return len(rows)


def _take_all(
    db: sqlite3.Connection, demands: Sequence[Demand], terms: Terms, earlier: Sequence[IPAddress]
) -> tuple[IPAddress, ...]:
    """Take an address for each demand, of those that an earlier try has if it may; give back the others."""
    if not allocator.drop_lapsed(db, terms.now):
        terms = Terms(terms.now, terms.quarantine)
    spare = list(earlier)
    taken = []
    missing = []
    for demand in demands:
        address = next(filter(demand.allows, spare), None)
        if address is not None:
            spare.remove(address)
        else:
            address = allocator.take(db, demand, terms)
        if address is not None:
            taken.append(address)
        elif demand.requested is not None:
            raise _address_taken(db, demand.requested, terms.now)
        else:
            missing.append(demand)
    if missing:
        raise _exhausted(db, missing, terms)
    allocator.give_back(db, spare, terms.now)
    return tuple(taken)


def _address_taken(db: sqlite3.Connection, address: IPAddress, now: float) -> AddressTaken:
    for kept in allocator.kept(db, now):
        if kept.address == address:
            left = f"for another {math.ceil(kept.until - now)} s"
            return AddressTaken(address, f"it is kept for pod {kept.pod} {left}")
    attachment = attachments.holding(db, address)
    if attachment is None:
        return AddressTaken(address, "it is the pod's own already")
    going = attachment.state is State.RELEASED
    holder = f"{attachment.holder}{', which is being released' if going else ''}"
    return AddressTaken(address, f"it belongs to {holder}", (attachment,) if going else ())


def _exhausted(db: sqlite3.Connection, demands: Sequence[Demand], terms: Terms) -> Exhausted:
    going = attachments.releasing(db)
    kept = allocator.kept(db, terms.now)
    shortages = []
    for demand in demands:
        freed = allocator.next_out_of_quarantine(db, demand.ranges)
        shortages.append(
            Shortage(
                demand.source,
                size=total(demand.ranges),
                releasing=_among(demand.ranges, going),
                kept=sum(demand.allows(k.address) for k in kept),
                wait=None if freed is None else max(0.0, freed + terms.quarantine - terms.now),
            )
        )
    helpful = tuple(a for a in going if any(_among(demand.ranges, [a]) for demand in demands))
    return Exhausted(shortages, helpful)


def _among(ranges: Sequence[AddressRange], attachments: Sequence[Attachment]) -> int:
    """Return how many addresses of the attachments lie in the ranges."""
    return sum(
        any(address in range_ for range_ in ranges)
        for attachment in attachments
        for address in attachment.addresses
    )


def _usage(db: sqlite3.Connection, group: Group, going: Sequence[Attachment], terms: Terms) -> Usage:
    counts = allocator.count(db, group.ranges, terms)
    return Usage(
        name=group.name,
        version=group.version,
        capacity=total(group.ranges),
        used=counts.used,
        releasing=_among(group.ranges, going),
        quarantined=counts.quarantined,
        kept=counts.kept,
        reserved=total(group.reserved),
        excluded=total(group.excluded),
    )
