"""The record of which pod has which address: one SQLite file, the truth for daemon and CNI binary alike."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netaddr import IPAddress, IPNetwork

from ipam import allocator
from ipam.ranges import capacity, pod_addresses

SCHEMA_VERSION = 1
BUSY_TIMEOUT = 10.0  # seconds
COLUMNS = (
    "container_id, ifname, network, netns, host_ifname, addresses, state, request_id, result,"
    " boot_id, created"
)

SCHEMA = (
    """CREATE TABLE attachment (
        container_id TEXT NOT NULL, ifname TEXT NOT NULL, network TEXT NOT NULL, netns TEXT NOT NULL,
        host_ifname TEXT NOT NULL, addresses TEXT NOT NULL, state TEXT NOT NULL,
        request_id TEXT NOT NULL, result TEXT NOT NULL, boot_id TEXT NOT NULL, created REAL NOT NULL,
        PRIMARY KEY (container_id, ifname)
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    *allocator.SCHEMA,
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


class LedgerError(Exception):
    """The ledger cannot do what was asked; the message is one sentence."""


class LedgerBusy(LedgerError):
    """Another process kept the ledger locked for the whole busy timeout: try again."""


class Exhausted(LedgerError):
    """A range has no free address. `releasing` hold some that come free once their links are gone."""

    def __init__(self, full: Sequence[IPNetwork], releasing: tuple[Attachment, ...]) -> None:
        ranges = " and ".join(f"{cidr} ({capacity(cidr)} addresses)" for cidr in full)
        waiting = f", {len(releasing)} of them free as soon as their links are gone" if releasing else ""
        super().__init__(f"no free pod address in podCIDR {ranges}{waiting}")
        self.releasing = releasing


class AlreadyAttached(LedgerError):
    """The key has an attachment in use; the same `request_id` means that this is a repeated try."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(f"{attachment.key} is attached already")
        self.attachment = attachment


class StillReleasing(LedgerError):
    """The key has an attachment whose link is not gone yet: remove the link, `forget`, try again."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(f"{attachment.key} is still being released")
        self.attachment = attachment


class State(StrEnum):
    """Where an attachment is in its life; its addresses are taken in every state."""

    PENDING = "pending"
    ATTACHED = "attached"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Key:
    """What CNI identifies an attachment by."""

    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"interface {self.ifname!r} of container {self.container_id!r}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What an ADD says of the attachment it wants; `network` is the name of its network configuration."""

    network: str
    netns: str
    host_ifname: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod interface. `result` is the ADD result as JSON ("" while pending), `created` epoch seconds."""

    key: Key
    network: str  # the name of the network configuration that asked for it
    netns: str
    host_ifname: str
    addresses: tuple[IPAddress, ...]  # in the order of the podCIDRs
    state: State
    request_id: str
    result: str
    boot_id: str
    created: float


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a range is, in addresses; `used` includes `releasing`."""

    cidr: IPNetwork
    capacity: int
    used: int
    releasing: int


def read_boot_id() -> str:
    """Return the kernel's identifier of this boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Ledger:
    """The attachments of this node. One object may be used by many threads, one file by many processes.

    Every change is one transaction. All methods raise LedgerBusy or LedgerError when SQLite cannot do its
    part. `reclaimed` is how many attachments of an earlier boot `open` deleted.
    """

    def __init__(self, path: Path, *, boot_id: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._boot_id = boot_id
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
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
            with self._transaction() as db:
                self._create(db)
                self.reclaimed = _delete(db, "boot_id != ?", self._boot_id)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; harmless when it is not open."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def settings(self) -> dict[str, str]:
        """Return what `save_settings` saved last."""
        return dict(self._read("SELECT name, value FROM setting"))

    def save_settings(self, settings: Mapping[str, str]) -> None:
        """Replace the node settings that the CNI binary needs while the daemon is down."""
        with self._transaction() as db:
            db.execute("DELETE FROM setting")
            db.executemany("INSERT INTO setting VALUES (?, ?)", settings.items())

    def reserve(self, key: Key, claim: Claim, cidrs: Sequence[IPNetwork]) -> Attachment:
        """Record a pending attachment with one address of each range; on any error nothing is kept.

        A pending one of an earlier, broken try keeps its addresses while they lie in the ranges.
        Raises Exhausted, AlreadyAttached or StillReleasing.
        """
        if not cidrs:
            raise LedgerError(f"{key} cannot get an address: the node has no podCIDR yet")
        with self._transaction() as db:
            earlier = _find(db, key)
            if earlier and earlier.state is State.ATTACHED:
                raise AlreadyAttached(earlier)
            if earlier and earlier.state is State.RELEASED:
                raise StillReleasing(earlier)
            wanted = Attachment(
                key=key,
                network=claim.network,
                netns=claim.netns,
                host_ifname=claim.host_ifname,
                addresses=earlier.addresses if earlier else (),
                state=State.PENDING,
                request_id=claim.request_id,
                result="",
                boot_id=self._boot_id,
                created=earlier.created if earlier else self._clock(),
            )
            if not _fits(wanted.addresses, cidrs):
                allocator.give_back(db, wanted.addresses)
                wanted = replace(wanted, addresses=_take_all(db, cidrs))
            db.execute(
                f"INSERT OR REPLACE INTO attachment ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                _row(wanted),
            )
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
        return _attachment(rows[0])

    def release(self, key: Key) -> Attachment | None:
        """Mark the attachment as going; its addresses stay taken until `forget`. None when it is unknown."""
        with self._transaction() as db:
            rows = db.execute(
                "UPDATE attachment SET state = 'released' WHERE container_id = ? AND ifname = ?"
                f" RETURNING {COLUMNS}",
                (key.container_id, key.ifname),
            ).fetchall()
        return _attachment(rows[0]) if rows else None

    def forget(self, key: Key) -> None:
        """Delete the attachment and free its addresses: its link is gone. Harmless when it is unknown."""
        with self._transaction() as db:
            _delete(db, "container_id = ? AND ifname = ?", key.container_id, key.ifname)

    def get(self, key: Key) -> Attachment | None:
        """Return the attachment of the key, in whatever state."""
        with self._lock, self._errors():
            return _find(self._db(), key)

    def attachments(self, state: State | None = None) -> tuple[Attachment, ...]:
        """Return all attachments, or those in one state, oldest first."""
        sql = f"SELECT {COLUMNS} FROM attachment WHERE ?1 IS NULL OR state = ?1 ORDER BY created"
        return tuple(_attachment(row) for row in self._read(sql, state))

    def usage(self, cidrs: Sequence[IPNetwork]) -> tuple[Usage, ...]:
        """Return how full each range is."""
        with self._transaction("BEGIN") as db:
            return tuple(
                Usage(cidr, capacity(cidr), allocator.held(db, cidr), len(_releasing(db, [cidr])))
                for cidr in cidrs
            )

    def _create(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"ledger {self._path} has schema {version}, this podwire knows up to {SCHEMA_VERSION}:"
                " run the podwire that wrote it"
            )
        if version == 0:
            for statement in SCHEMA:
                db.execute(statement)

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


def _find(db: sqlite3.Connection, key: Key) -> Attachment | None:
    row = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE container_id = ? AND ifname = ?",
        (key.container_id, key.ifname),
    ).fetchone()
    return _attachment(row) if row else None


def _delete(db: sqlite3.Connection, condition: str, *values: str) -> int:
    rows = db.execute(f"DELETE FROM attachment WHERE {condition} RETURNING {COLUMNS}", values).fetchall()
    for row in rows:
        allocator.give_back(db, _attachment(row).addresses)
    return len(rows)


def _take_all(db: sqlite3.Connection, cidrs: Sequence[IPNetwork]) -> tuple[IPAddress, ...]:
    taken = [(cidr, allocator.take(db, cidr)) for cidr in cidrs]
    if full := [cidr for cidr, address in taken if address is None]:
        raise Exhausted(full, _releasing(db, full))
    return tuple(address for _, address in taken if address is not None)


def _releasing(db: sqlite3.Connection, cidrs: Sequence[IPNetwork]) -> tuple[Attachment, ...]:
    rows = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE state = 'released' ORDER BY created"
    ).fetchall()
    pools = [pod_addresses(cidr) for cidr in cidrs]
    return tuple(
        attachment
        for attachment in map(_attachment, rows)
        if any(address in pool for address in attachment.addresses for pool in pools)
    )


def _fits(addresses: Sequence[IPAddress], cidrs: Sequence[IPNetwork]) -> bool:
    return len(addresses) == len(cidrs) and all(
        address in pod_addresses(cidr) for address, cidr in zip(addresses, cidrs, strict=True)
    )


def _row(attachment: Attachment) -> tuple[str | float, ...]:
    return (
        attachment.key.container_id,
        attachment.key.ifname,
        attachment.network,
        attachment.netns,
        attachment.host_ifname,
        " ".join(map(str, attachment.addresses)),
        attachment.state,
        attachment.request_id,
        attachment.result,
        attachment.boot_id,
        attachment.created,
    )


def _attachment(row: Sequence[Any]) -> Attachment:
    container_id, ifname, network, netns, host_ifname, addresses, state, *rest = row
    parsed = tuple(IPAddress(address) for address in addresses.split())
    return Attachment(Key(container_id, ifname), network, netns, host_ifname, parsed, State(state), *rest)
