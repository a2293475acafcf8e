"""What the service manager hears, on a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.notify import Notifier, watchdog_seconds


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and how $NOTIFY_SOCKET names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        abstract = request.param == "abstract"
        name = f"podwire-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        server.bind(f"\0{name}" if abstract else name)
        server.setblocking(False)
        yield server, f"@{name}" if abstract else name


def heard(server: socket.socket) -> list[list[str]]:
    """Every message since the last call, as its lines."""
    found = []
    while True:
        try:
            found.append(server.recv(4096).decode().splitlines())
        except BlockingIOError:
            return found


def test_ready_status_and_stopping(manager: tuple[socket.socket, str]) -> None:
    server, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("serving pods")
    notifier.status("serving pods")  # said already
    notifier.status("40 services\nREADY=0")
    notifier.stopping()
    assert heard(server) == [
        ["READY=1", "STATUS=serving pods"],
        ["STATUS=40 services READY=0"],
        ["STOPPING=1"],
    ]


def test_reloading_carries_the_time(manager: tuple[socket.socket, str]) -> None:
    server, name = manager
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier({"NOTIFY_SOCKET": name}).reloading()
    ((first, second),) = heard(server)
    assert first == "RELOADING=1"
    key, _, value = second.partition("=")
    assert key == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_the_watchdog_hears_every_third_of_its_time(manager: tuple[socket.socket, str]) -> None:
    server, name = manager
    now = [100.0]
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"}, lambda: now[0])
    for step in (0.0, 0.1, 0.8, 0.2, 0.5, 5.0):
        now[0] += step
        notifier.alive()
    assert heard(server) == [["WATCHDOG=1"]] * 3  # at 100.0, 101.1, 106.6


def test_without_a_watchdog_nothing_is_sent(manager: tuple[socket.socket, str]) -> None:
    server, name = manager
    Notifier({"NOTIFY_SOCKET": name}).alive()
    assert heard(server) == []


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "me"}, None),
    ],
)
def test_the_watchdogs_time_is_ours_only_if_it_says_so(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_seconds(environ) == seconds


@pytest.mark.parametrize(
    "name", ["", "relative/path", "/no/such/socket", "@podwire-nobody-listens", "/" + "x" * 200]
)
def test_where_nobody_listens_nothing_happens(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"})
    notifier.ready("x")
    notifier.alive()
    notifier.reloading()
    notifier.stopping()


def test_a_full_queue_holds_nobody_up_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager that reads no more."""
    monkeypatch.setattr("node.notify.SEND_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        for number in range(queue + 5):
            notifier.status(str(number))


def test_the_environment_of_the_process_counts(manager: tuple[socket.socket, str]) -> None:
    server, name = manager
    code = "from node.notify import Notifier; n = Notifier(); n.ready('up'); n.alive()"
    environ = {**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    assert heard(server) == [["READY=1", "STATUS=up"], ["WATCHDOG=1"]]
