"""A ledger that podwire 0.1.0 wrote (schema 1) goes on being the truth."""

import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPAddress

from ipam import ledger as ledger_module
from ipam.ledger import Attachment, Claim, HostPort, Key, Ledger, State
from ipam.pools import IpamConfig, Wish, demands, groups
from ipam.ranges import parse_pod_cidrs

FORK = multiprocessing.get_context("fork")
CIDRS = parse_pod_cidrs(["10.1.0.0/29", "fd00:1::/64"])

# What 0.1.0 executed, statement by statement, and what its tables held after three ADDs and two DELs, of
# which one is not finished.
VERSION_1 = """
CREATE TABLE attachment (
    container_id TEXT NOT NULL, ifname TEXT NOT NULL, network TEXT NOT NULL, netns TEXT NOT NULL,
    host_ifname TEXT NOT NULL, addresses TEXT NOT NULL, state TEXT NOT NULL,
    request_id TEXT NOT NULL, result TEXT NOT NULL, boot_id TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (container_id, ifname)
) STRICT, WITHOUT ROWID;
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE address (
    family INTEGER NOT NULL, value BLOB NOT NULL, freed INTEGER, PRIMARY KEY (family, value)
) STRICT, WITHOUT ROWID;
CREATE INDEX address_queue ON address (family, freed, value);
CREATE TABLE cursor (family INTEGER PRIMARY KEY, cidr TEXT NOT NULL, next INTEGER NOT NULL) STRICT;
PRAGMA user_version = 1;
INSERT INTO attachment VALUES
    ('c2', 'eth0', 'podwire', '/run/netns/b', 'pw2', '10.1.0.3 fd00:1::3', 'attached', 'r2', '{"a": 1}', 'boot-1', 11.5),
    ('c3', 'eth0', 'podwire', '/run/netns/c', 'pw3', '10.1.0.4 fd00:1::4', 'released', 'r3', '{}', 'boot-1', 12.5);
INSERT INTO setting VALUES ('mode', 'routed'), ('mtu', '1450');
INSERT INTO address VALUES
    (4, x'0a010002', 1), (4, x'0a010003', NULL), (4, x'0a010004', NULL),
    (6, x'fd000001000000000000000000000002', 1), (6, x'fd000001000000000000000000000003', NULL),
    (6, x'fd000001000000000000000000000004', NULL);
INSERT INTO cursor VALUES (4, '10.1.0.0/29', 3), (6, 'fd00:1::/64', 3);
"""  # noqa: E501


def write_version_1(path: Path) -> Path:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(VERSION_1)
    db.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_version_1(tmp_path / "ledger.db")


def reserve(ledger: Ledger, container: str, **claim: Any) -> str:
    made = ledger.reserve(
        Key(container, "eth0"),
        Claim("podwire", "", "pw", "r", **claim),
        demands(IpamConfig(), CIDRS, Wish()),
        quarantine=10.0,
    )
    return " ".join(map(str, made.addresses))


def assert_migrated(ledger: Ledger) -> None:
    attached = Attachment(
        Key("c2", "eth0"),
        "podwire",
        "/run/netns/b",
        "pw2",
        (IPAddress("10.1.0.3"), IPAddress("fd00:1::3")),
        State.ATTACHED,
        "r2",
        '{"a": 1}',
        "boot-1",
        11.5,
    )
    assert ledger.get(Key("c2", "eth0")) == attached
    assert [a.key.container_id for a in ledger.attachments(State.RELEASED)] == ["c3"]
    assert ledger.settings() == {"mode": "routed", "mtu": "1450"}
    assert [(u.used, u.releasing) for u in ledger.usage(groups(IpamConfig(), CIDRS))] == [(2, 1), (2, 1)]
    assert ledger._db().execute("PRAGMA user_version").fetchone() == (2,)


def test_a_ledger_of_version_1_is_brought_up_to_date_in_place(path: Path) -> None:
    """Nobody's address is given away; what was free is, in its old order and without a quarantine."""
    with Ledger(path, boot_id="boot-1") as ledger:
        assert ledger.reclaimed == 0
        assert_migrated(ledger)
        ports = (HostPort(6, 80, 80),)
        assert reserve(ledger, "n1", pod="ns/a", host_ports=ports, sticky=60.0) == "10.1.0.5 fd00:1::5"
        assert reserve(ledger, "n2").startswith("10.1.0.6 ")
        assert reserve(ledger, "n3").startswith("10.1.0.2 ")
        ledger.forget(Key("n1", "eth0"))
        assert len(ledger.kept()) == 2
    with Ledger(path, boot_id="boot-1") as ledger:
        assert ledger.get(Key("n3", "eth0"))


def test_a_migrated_ledger_has_the_tables_of_a_new_one(path: Path, tmp_path: Path) -> None:
    def tables(file: Path) -> list[Any]:
        with Ledger(file, boot_id="boot-1") as ledger:
            rows = ledger._db().execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
        return [(kind, name, " ".join((sql or "").split())) for kind, name, sql in rows]

    assert tables(path) == tables(tmp_path / "new.db")


def test_a_version_1_ledger_of_an_earlier_boot_is_reclaimed_at_once(path: Path) -> None:
    with Ledger(path, boot_id="boot-2") as ledger:
        assert ledger.reclaimed == 2 and ledger.attachments() == ()
        assert ledger.settings() == {"mode": "routed", "mtu": "1450"}


def die_at_statement(path: Path, number: int) -> None:
    """In a child: open the ledger, and SIGKILL itself when SQLite starts statement `number` of that."""
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen > number:
            os.kill(os.getpid(), signal.SIGKILL)

    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*arguments, **options)
        db.set_trace_callback(count)
        return db

    ledger_module.sqlite3.connect = traced  # type: ignore[assignment,attr-defined]
    with Ledger(path, boot_id="boot-1"):
        pass


def test_a_process_killed_while_it_migrates_leaves_version_1_or_2(tmp_path: Path) -> None:
    for number in range(100):
        path = write_version_1(tmp_path / f"{number}.db")
        child = FORK.Process(target=die_at_statement, args=(path, number))
        child.start()
        child.join()
        with Ledger(path, boot_id="boot-1") as ledger:
            assert_migrated(ledger)
        if child.exitcode == 0:
            assert number > 10
            return
        assert child.exitcode == -signal.SIGKILL
    pytest.fail("the migration never ended")
