import multiprocessing
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ipam.lock import LockTimeout, container_lock

FORK = multiprocessing.get_context("fork")


def hold_until_told(directory: Path, pipe: Connection) -> None:
    with container_lock(directory, "c1"):
        pipe.send("held")
        with suppress(EOFError):
            pipe.recv()


def test_the_timeout_names_the_container(tmp_path: Path) -> None:
    with container_lock(tmp_path, "c1"):
        with pytest.raises(LockTimeout, match="container 'c1'"), container_lock(tmp_path, "c1", timeout=0):
            pass
        with container_lock(tmp_path, "c2", timeout=0):
            pass  # another container does not wait
    with container_lock(tmp_path, "c1", timeout=0):
        pass


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold_until_told, args=(tmp_path, theirs))
    holder.start()
    try:
        assert ours.recv() == "held"
        with pytest.raises(LockTimeout), container_lock(tmp_path, "c1", timeout=0.02):
            pass
        holder.kill()
        with container_lock(tmp_path, "c1", timeout=5):
            pass
    finally:
        holder.kill()
        holder.join()
        ours.close()
        theirs.close()


def test_a_child_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    with container_lock(tmp_path, "c1"):
        child = FORK.Process(target=theirs.recv)
        child.start()
    try:
        with container_lock(tmp_path, "c1", timeout=0):
            pass
    finally:
        child.kill()
        child.join()
        ours.close()
        theirs.close()


def test_two_threads_exclude_each_other(tmp_path: Path) -> None:
    inside = threading.Semaphore(1)
    overlaps = []

    def work() -> None:
        for _ in range(10):
            with container_lock(tmp_path, "c1"):
                if not inside.acquire(blocking=False):
                    overlaps.append(threading.get_ident())
                    continue
                inside.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []


def test_a_thousand_containers_leave_one_empty_file(tmp_path: Path) -> None:
    for number in range(1000):
        with container_lock(tmp_path / "run", f"c{number}"):
            pass
    (left,) = (tmp_path / "run").iterdir()
    assert left.name == "attachments.lock" and left.stat().st_size == 0
    assert left.stat().st_mode & 0o777 == 0o600
