"""The ledger under several processes, and under kill -9 at every statement."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from ipam.ledger import Attachment, Claim, Exhausted, HostPort, HostPortTaken, InTheWay, Key, Ledger, State
from ipam.pools import Demand, IpamConfig, Wish, demands, groups
from ipam.ranges import parse_pod_cidrs, parse_range

FORK = multiprocessing.get_context("fork")
CIDRS = parse_pod_cidrs(["10.1.0.0/26", "fd00:1::/64"])  # 61 IPv4 pods
DEMANDS = demands(IpamConfig(), CIDRS, Wish())
GROUPS = groups(IpamConfig(), CIDRS)
KEY = Key("c1", "eth0")


def attach(ledger: Ledger, key: Key, sticky: float = 0.0) -> Attachment:
    ports = (HostPort(6, 8080, 80),) if sticky else ()
    claim = Claim("net", "", "pw0", "r", "ns/web-0", host_ports=ports, sticky=sticky)
    ledger.reserve(key, claim, DEMANDS)
    return ledger.commit(key, "{}")


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """Run the work in threads, all at once; raise what went wrong in one of them."""
    with ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(work, worker) for worker in range(number)]:
            done.result()


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
        assert [usage.used for usage in ledger.usage(GROUPS)] == [61, 61]


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

        in_threads(8, work)
    assert_61_pods_without_duplicates(path)


@pytest.mark.parametrize("own_ledger", [False, True])
def test_32_threads_and_a_range_of_one_neither_deadlock_nor_get_the_same_answer(
    tmp_path: Path, own_ledger: bool
) -> None:
    """Each wants the only address five times over, on one connection or on one of its own."""
    path = tmp_path / "ledger.db"
    one = (Demand("podCIDR 10.1.0.0/30", (parse_range("10.1.0.2"),)),)
    holders: list[int] = []
    overlaps: list[int] = []
    begin = threading.Barrier(32)

    def hold(ledger: Ledger, worker: int, number: int) -> bool:
        key = Key(f"c{worker}-{number}", "eth0")
        try:
            made = ledger.reserve(key, Claim("net", "", "pw0", "r"), one)
        except InTheWay:
            return False
        holders.append(worker)
        overlaps.extend(holders[:-1])
        assert [str(address) for address in made.addresses] == ["10.1.0.2"]
        ledger.commit(key, "{}")
        ledger.release(key)
        holders.remove(worker)
        ledger.forget(key)
        return True

    def work(ledger: Ledger, worker: int) -> None:
        begin.wait(timeout=60)
        for number in range(5):
            deadline = time.monotonic() + 60
            while not hold(ledger, worker, number):
                assert time.monotonic() < deadline, "an address that is given back finds its way"

    def work_alone(worker: int) -> None:
        with Ledger(path, boot_id="boot-1") as ledger:
            work(ledger, worker)

    with Ledger(path, boot_id="boot-1") as shared:
        in_threads(32, work_alone if own_ledger else lambda worker: work(shared, worker))
        assert overlaps == [] and shared.attachments() == ()


def test_one_host_port_given_twice_under_concurrent_adds(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db", boot_id="boot-1") as ledger:

        def work(worker: int) -> None:
            with suppress(HostPortTaken):
                attach(ledger, Key(f"c{worker}", "eth0"), sticky=1.0)

        in_threads(8, work)
        assert len(ledger.attachments()) == 1


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


@pytest.mark.parametrize("sticky", [0.0, 3600.0])
@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_at_any_statement_leaves_all_or_nothing(
    tmp_path: Path, step: str, sticky: float
) -> None:
    for number in range(100):
        path = tmp_path / str(number) / "ledger.db"
        with Ledger(path, boot_id="boot-1") as ledger:
            attach(ledger, KEY, sticky)
            ledger.save_settings({"mode": "routed"})
        child = FORK.Process(target=die_before_statement, args=(path, STEPS[step], number))
        child.start()
        child.join()
        with Ledger(path, boot_id="boot-1") as ledger:
            held = ledger.attachments()
            assert [usage.used for usage in ledger.usage(GROUPS)] == [len(held)] * 2
            assert len(ledger.kept()) == (2 if sticky and ledger.get(KEY) is None else 0)
            assert all(len(attachment.addresses) == 2 for attachment in held)
            assert ledger.settings() in ({"mode": "routed"}, {"mode": "bridge", "mtu": "9000"})
            if child.exitcode == 0:
                assert number > 2
                return
            assert child.exitcode == -signal.SIGKILL
            STEPS[step](ledger)  # the retry succeeds
            assert [usage.used for usage in ledger.usage(GROUPS)] == [len(ledger.attachments())] * 2
    pytest.fail("the step never ended")
