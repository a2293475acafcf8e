"""The ledger under several processes, and under kill -9 at every statement."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ipam.ledger import Claim, Exhausted, Key, Ledger, State
from ipam.ranges import parse_pod_cidrs

FORK = multiprocessing.get_context("fork")
CIDRS = parse_pod_cidrs(["10.1.0.0/26", "fd00:1::/64"])  # 61 IPv4 pods
KEY = Key("c1", "eth0")


def attach(ledger: Ledger, key: Key) -> None:
    ledger.reserve(key, Claim("net", "", "pw0", "r"), CIDRS)
    ledger.commit(key, "{}")


def attach_many(path: Path, worker: int, tries: int = 20) -> int:
    """Attach until full; returns how many tries found the range full."""
    refused = 0
    with Ledger(path, boot_id="boot-1") as ledger:
        for number in range(tries):
            try:
                attach(ledger, Key(f"c{worker}-{number}", "eth0"))
            except Exhausted:
                refused += 1
    return refused


def assert_61_pods_without_duplicates(path: Path) -> None:
    with Ledger(path, boot_id="boot-1") as ledger:
        for family in (0, 1):
            assert len({a.addresses[family] for a in ledger.attachments(State.ATTACHED)}) == 61
        assert [usage.used for usage in ledger.usage(CIDRS)] == [61, 61]


def test_one_address_given_twice_under_concurrent_adds_of_several_processes(tmp_path: Path) -> None:
    """Eight processes create and fill the ledger at once: each address once, refused only when full."""
    path = tmp_path / "ledger.db"
    with FORK.Pool(8) as pool:
        refused = pool.starmap(attach_many, [(path, worker) for worker in range(8)], chunksize=1)
        pool.close()
        pool.join()
    assert sum(refused) == 8 * 20 - 61
    assert_61_pods_without_duplicates(path)


def test_one_address_given_twice_under_concurrent_adds_of_threads(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path, boot_id="boot-1") as ledger:

        def work(worker: int) -> None:
            for number in range(20):
                with suppress(Exhausted):
                    attach(ledger, Key(f"c{worker}-{number}", "eth0"))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_61_pods_without_duplicates(path)


def die_before_statement(path: Path, step: Callable[[Ledger], object], number: int) -> None:
    """In a child: open the ledger, then SIGKILL itself when SQLite starts the step's statement `number`."""
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen > number:
            os.kill(os.getpid(), signal.SIGKILL)

    with Ledger(path, boot_id="boot-1") as ledger:
        ledger._db().set_trace_callback(count)  # the only way to stand between two statements
        step(ledger)


STEPS: dict[str, Callable[[Ledger], object]] = {
    "reserve": lambda ledger: attach(ledger, Key("new", "eth0")),
    "release": lambda ledger: ledger.release(KEY),
    "forget": lambda ledger: ledger.forget(KEY),
    "settings": lambda ledger: ledger.save_settings({"mode": "bridge", "mtu": "9000"}),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_at_any_statement_leaves_all_or_nothing(tmp_path: Path, step: str) -> None:
    for number in range(100):
        path = tmp_path / str(number) / "ledger.db"
        with Ledger(path, boot_id="boot-1") as ledger:
            attach(ledger, KEY)
            ledger.save_settings({"mode": "routed"})
        child = FORK.Process(target=die_before_statement, args=(path, STEPS[step], number))
        child.start()
        child.join()
        with Ledger(path, boot_id="boot-1") as ledger:
            held = ledger.attachments()
            assert [usage.used for usage in ledger.usage(CIDRS)] == [len(held)] * 2
            assert all(len(attachment.addresses) == 2 for attachment in held)
            assert ledger.settings() in ({"mode": "routed"}, {"mode": "bridge", "mtu": "9000"})
            if child.exitcode == 0:
                assert number > 2
                return
            assert child.exitcode == -signal.SIGKILL
            STEPS[step](ledger)  # the retry succeeds
            assert [usage.used for usage in ledger.usage(CIDRS)] == [len(ledger.attachments())] * 2
    pytest.fail("the step never ended")
