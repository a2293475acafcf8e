import sqlite3
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from netaddr import IPAddress, IPNetwork

from ipam import ledger as ledger_module
from ipam.ledger import (
    AlreadyAttached,
    Attachment,
    Claim,
    Exhausted,
    Key,
    Ledger,
    LedgerBusy,
    LedgerError,
    State,
    StillReleasing,
    read_boot_id,
)
from ipam.pools import IpamConfig, Wish, demands, groups
from ipam.ranges import parse_pod_cidrs

CIDRS = parse_pod_cidrs(["10.1.0.0/29", "fd00:1::/64"])  # five IPv4 pods
KEY = Key("c1", "eth0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "podwire" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ticks = count(1)
    with Ledger(path, boot_id="boot-1", clock=lambda: float(next(ticks))) as opened:
        yield opened


def reserve(
    ledger: Ledger, container: str = "c1", cidrs: tuple[IPNetwork, ...] = CIDRS, request: str = "r1"
) -> Attachment:
    wanted = demands(IpamConfig(), cidrs, Wish())
    return ledger.reserve(Key(container, "eth0"), Claim("net", "/run/netns/a", "pw0", request), wanted)


def used(ledger: Ledger, cidrs: tuple[IPNetwork, ...] = CIDRS) -> list[tuple[int, int, int]]:
    """Return capacity, used and releasing of each podCIDR."""
    return [(u.capacity, u.used, u.releasing) for u in ledger.usage(groups(IpamConfig(), cidrs))]


def fill(ledger: Ledger) -> list[Attachment]:
    made = [reserve(ledger, f"c{number}") for number in range(1, 6)]
    return [ledger.commit(attachment.key, "{}") for attachment in made]


def test_an_attachment_lives_from_reserve_to_forget(ledger: Ledger) -> None:
    pending = reserve(ledger)
    assert pending == Attachment(
        KEY,
        "net",
        "/run/netns/a",
        "pw0",
        (IPAddress("10.1.0.2"), IPAddress("fd00:1::2")),
        State.PENDING,
        "r1",
        "",
        "boot-1",
        2.0,
    )
    attached = ledger.commit(KEY, '{"ips": []}')
    assert (attached.state, attached.result, attached.addresses) == (
        State.ATTACHED,
        '{"ips": []}',
        pending.addresses,
    )
    assert ledger.get(KEY) == attached and ledger.attachments() == (attached,)
    for _ in range(2):
        released = ledger.release(KEY)
        assert released is not None and released.state is State.RELEASED
    assert ledger.attachments(State.RELEASED) == (released,) and ledger.attachments(State.PENDING) == ()
    for _ in range(2):
        ledger.forget(KEY)
    assert ledger.get(KEY) is None and ledger.release(KEY) is None and ledger.attachments() == ()


def test_a_second_try_after_a_broken_one_gets_the_same_addresses(ledger: Ledger) -> None:
    first = reserve(ledger, request="r1")
    second = reserve(ledger, request="r2")
    assert (
        second.addresses == first.addresses and second.request_id == "r2" and second.created == first.created
    )
    assert ledger.attachments() == (second,)


def test_a_second_try_after_the_podcidr_changed_gets_new_addresses(ledger: Ledger) -> None:
    reserve(ledger)
    moved = parse_pod_cidrs(["10.2.0.0/29"])
    assert reserve(ledger, cidrs=moved).addresses == (IPAddress("10.2.0.2"),)
    assert [n for _, n, _ in used(ledger, (*CIDRS, *moved))] == [0, 0, 1]


def test_a_second_try_keeps_the_addresses_that_it_still_may_have(ledger: Ledger) -> None:
    """Else the only address of a range would be in quarantine for the pod that has it."""
    reserve(ledger)
    both = parse_pod_cidrs(["10.2.0.0/30", "fd00:1::/64"])
    assert [str(a) for a in reserve(ledger, cidrs=both).addresses] == ["10.2.0.2", "fd00:1::2"]
    only = parse_pod_cidrs(["10.2.0.0/30"])
    assert [str(a) for a in reserve(ledger, cidrs=only).addresses] == ["10.2.0.2"]


def test_an_attached_key_answers_with_its_attachment(ledger: Ledger) -> None:
    reserve(ledger)
    attached = ledger.commit(KEY, "{}")
    with pytest.raises(
        AlreadyAttached, match="interface 'eth0' of container 'c1' is attached already"
    ) as caught:
        reserve(ledger)
    assert caught.value.attachment == attached


def test_a_released_key_waits_for_its_link(ledger: Ledger) -> None:
    reserve(ledger)
    released = ledger.release(KEY)
    with pytest.raises(StillReleasing) as caught:
        reserve(ledger)
    assert caught.value.attachment == released
    ledger.forget(KEY)
    assert reserve(ledger).addresses[0] == IPAddress("10.1.0.3")


@pytest.mark.parametrize("end", ["release", "forget"])
def test_an_add_overtaken_by_del_cannot_commit(ledger: Ledger, end: str) -> None:
    reserve(ledger)
    getattr(ledger, end)(KEY)
    with pytest.raises(LedgerError, match="no pending attachment"):
        ledger.commit(KEY, "{}")


def test_a_full_range_says_so_and_names_what_is_on_its_way_out(ledger: Ledger) -> None:
    fill(ledger)
    going = ledger.release(Key("c3", "eth0"))
    with pytest.raises(Exhausted) as caught:
        reserve(ledger, "c6")
    assert str(caught.value) == "no free pod address in podCIDR 10.1.0.0/29 (5 addresses): 1 being released"
    assert caught.value.releasing == (going,) and caught.value.retry_after is None
    assert used(ledger)[0] == (5, 5, 1)
    assert used(ledger)[1][1:] == (5, 1), "the IPv6 address picked before IPv4 ran out is not kept"


def test_without_a_podcidr_no_pod_is_recorded(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no podCIDR"):
        reserve(ledger, cidrs=())
    assert ledger.attachments() == ()


def test_duplicate_address_after_daemon_restart(ledger: Ledger, path: Path) -> None:
    """Memory is not the truth: a new daemon continues from the file."""
    before = reserve(ledger, "c1")
    ledger.close()
    with Ledger(path, boot_id="boot-1") as again:
        assert again.reclaimed == 0 and again.attachments() == (before,)
        assert not set(reserve(again, "c2").addresses) & set(before.addresses)


def test_range_exhausted_after_reboots(ledger: Ledger, path: Path) -> None:
    """DEL never ran for pods of an earlier boot; their addresses come back, and rest first."""
    ledger.close()
    for boot in range(2, 6):
        with Ledger(path, boot_id=f"boot-{boot}") as booted:
            assert booted.reclaimed == (5 if boot > 2 else 0)
            assert {str(a.addresses[0]) for a in fill(booted)} == {f"10.1.0.{n}" for n in range(2, 7)}


def test_settings_are_there_for_the_next_process(ledger: Ledger, path: Path) -> None:
    assert ledger.settings() == {}
    ledger.save_settings({"mode": "routed", "mtu": "1500"})
    ledger.save_settings({"mode": "bridge"})
    with Ledger(path, boot_id="boot-1") as other:
        assert other.settings() == {"mode": "bridge"}


def test_only_root_can_read_the_ledger(ledger: Ledger, path: Path) -> None:
    reserve(ledger)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}


def test_a_ledger_of_a_newer_podwire_is_refused(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match=r"ledger\.db has schema 99, this podwire knows up to 2"):
        ledger.open()


def test_a_file_that_is_no_ledger_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a database, but long enough to look like one" * 50)
    with pytest.raises(LedgerError, match=r"ledger\.db cannot be used: file is not a database"):
        Ledger(path, boot_id="boot-1").open()
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(path / "below-a-file.db", boot_id="boot-1").open()


def test_a_ledger_that_stays_locked_is_busy(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipam.ledger.BUSY_TIMEOUT", 0.01)
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerBusy), Ledger(path, boot_id="boot-1"):
            pass
        assert ledger.attachments() == (), "readers do not wait for a writer"
    finally:
        other.close()


def test_processes_that_create_the_ledger_at_once_wait_for_each_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its timeout, SQLite answers "locked" at once while a file that is not WAL yet is written."""
    path.parent.mkdir()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("ipam.ledger.time.sleep", lambda _: other.close())
    with Ledger(path, boot_id="boot-1") as ledger:
        assert ledger.attachments() == ()


def test_a_ledger_not_opened_says_so(path: Path) -> None:
    with pytest.raises(LedgerError, match="not open"):
        Ledger(path, boot_id="boot-1").get(KEY)
    assert not path.exists()


@pytest.mark.parametrize("pages", [ledger_module.EMERGENCY_PAGES, 1000])
def test_an_add_never_waits_for_the_disk_of_a_checkpoint(path: Path, pages: int) -> None:
    """Without somebody who calls `checkpoint`, SQLite's own bound stays."""
    with Ledger(path, boot_id="boot-1", background_checkpoints=pages != 1000) as ledger:
        assert ledger._db().execute("PRAGMA wal_autocheckpoint").fetchone() == (pages,)


def fill_log(ledger: Ledger) -> None:
    for number in range(ledger_module.CHECKPOINT_AFTER):
        ledger.save_settings({"mode": f"{number}" * 2000})


def test_a_checkpoint_begins_the_log_anew_once_it_is_worth_it(path: Path) -> None:
    """An idle node's disk is left alone."""
    with Ledger(path, boot_id="boot-1", background_checkpoints=True) as ledger:
        log = path.with_name("ledger.db-wal")
        assert not ledger.checkpoint(), "only the tables were made so far"
        fill_log(ledger)
        size = log.stat().st_size
        before = log.read_bytes()[:32]
        assert ledger.checkpoint() and not ledger.checkpoint()
        assert log.read_bytes()[:32] != before, "the header is new: no ADD has to write it"
        fill_log(ledger)
        assert log.stat().st_size <= size + 50_000
        assert ledger.settings()["mode"].startswith("99")


def test_a_checkpoint_keeps_neither_readers_nor_writers_waiting(path: Path) -> None:
    with Ledger(path, boot_id="boot-1", background_checkpoints=True) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN")
            other.execute("SELECT count(*) FROM setting").fetchone()  # a reader of this moment
            fill_log(ledger)
            assert not ledger.checkpoint(), "the reader needs what is in the log since"
            assert other.execute("SELECT count(*) FROM setting").fetchone() == (0,)
            other.execute("COMMIT")
            fill_log(ledger)
            other.execute("BEGIN IMMEDIATE")  # a writer at work
            other.execute("DELETE FROM setting")
            assert ledger.checkpoint()
            other.execute("COMMIT")
        finally:
            other.close()
        assert ledger.settings() == {}


def test_a_checkpoint_that_fails_is_a_ledger_error(ledger: Ledger, path: Path) -> None:
    fill_log(ledger)
    path.rename(path.with_name("moved"))
    path.mkdir()
    with pytest.raises(LedgerError, match="cannot be used"):
        ledger.checkpoint()
    path.rmdir()
    path.with_name("moved").rename(path)


def test_the_boot_id_is_the_kernels() -> None:
    assert len(read_boot_id()) == 36 and read_boot_id() == read_boot_id()
