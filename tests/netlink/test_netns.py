"""Network namespaces of the real kernel."""

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.errors import NetlinkError


def here() -> tuple[int, int]:
    """Return what tells the calling thread's namespace from others."""
    found = Path("/proc/thread-self/ns/net").stat()
    return found.st_dev, found.st_ino


def inode(name: str) -> tuple[int, int]:
    found = netns.path(name).stat()
    return found.st_dev, found.st_ino


def test_a_function_runs_inside_and_the_caller_stays_outside(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    before = here()
    assert netns.run(name, here) == inode(name) != before
    assert here() == before


def test_name_path_and_descriptor_mean_the_same_namespace(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    path = netns.path(name)
    with netns.opened(path) as fd:
        assert netns.run(fd, here) == netns.run(path, here) == netns.run(name, here)
        os.fstat(fd)  # still open: it is the caller's
    assert netns.path(str(path)) == path
    with netns.opened(path) as fd, netns.opened("/proc/thread-self/ns/net") as home:
        assert not netns.is_here(fd)
        assert netns.run(fd, netns.is_here, fd)
        assert netns.is_here(home)
        assert netns.is_namespace(fd)
    with netns.opened("/dev/null") as fd:
        assert not netns.is_namespace(fd)


def test_threads_started_inside_stay_inside(namespaces: Callable[[], str]) -> None:
    found = []

    def start() -> None:
        thread = threading.Thread(target=lambda: found.append(here()))
        thread.start()
        thread.join()

    name = namespaces()
    netns.run(name, start)
    assert found == [inode(name)]


def test_arguments_results_and_exceptions_pass_through(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    assert netns.run(name, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        netns.run(name, divmod, 7, 0)


def test_a_new_namespace_has_only_a_loopback(namespaces: Callable[[], str]) -> None:
    assert "lo" in [name for _, name in netns.run(namespaces(), socket.if_nameindex)]


def test_a_name_that_is_taken_is_refused_and_keeps_its_namespace(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    before = inode(name)
    with pytest.raises(FileExistsError):
        netns.create(name)
    assert inode(name) == before


def test_deleting_twice_is_fine_and_leaves_no_file(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    netns.delete(name)
    netns.delete(name)
    assert not netns.path(name).exists()
    with pytest.raises(FileNotFoundError):
        netns.run(name, here)


def test_a_plain_file_is_not_a_namespace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NetlinkError, match="enter the network namespace: Invalid argument") as failure:
        netns.run(file, here)
    assert failure.value.errno == errno.EINVAL


def test_no_descriptor_is_left_open(namespaces: Callable[[], str]) -> None:
    name = namespaces()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing itself has one, each time
    for _ in range(3):
        netns.run(name, here)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
