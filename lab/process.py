"""Processes of a lab: started in a namespace, remembered in a pid file, ended by it later.

The pid file holds the pid and its start time, so a process that got the same pid later, after the
first one ended, is never touched.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.state import write
from netlink import netns

GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its pid and its start time in clock ticks since boot (proc(5), stat field 22)."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """Return when the process started, or None when it has ended.

    A zombie has, unless it has threads left: these still hold its sockets, which take connections.
    """
    process = Path(f"/proc/{pid}")
    try:
        # The name, in parentheses, may hold anything; the fields are counted from its end.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        ended = fields[0] in "ZX" and len(list((process / "task").iterdir())) < 2
    except OSError:
        return None
    return None if ended else int(fields[19])


def start(namespace: str, command: Sequence[str], pid_file: Path, log: Path) -> Process:
    """Start a command inside a namespace, in a session of its own, and write its pid file.

    Output is appended to `log`; standard input is empty. Only the network namespace differs from ours,
    so that namespaces mounted later are seen by the process too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = netns.run(
        namespace,
        lambda: os.posix_spawn(command[0], list(command), os.environ, file_actions=actions, setsid=True),
    )
    process = Process(pid, start_time(pid) or 0)
    write(pid_file, f"{process.pid} {process.started}\n")
    return process


def read(pid_file: Path) -> Process | None:
    """Return the process a pid file names, or None when there is no such file."""
    try:
        pid, started = pid_file.read_text().split()
    except FileNotFoundError:
        return None
    return Process(int(pid), int(started))


def stop(pid_files: Iterable[Path]) -> None:
    """End the processes of these pid files, together, and remove the files.

    TERM first; after a few seconds KILL, to the whole session's process group.
    """
    files = list(pid_files)
    running = [process for process in map(read, files) if process is not None and process.alive]
    for process in running:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        if not _ended(process, deadline):
            _signal(process, signal.SIGKILL)
            _ended(process, time.monotonic() + GRACE_SECONDS)
    for file in files:
        file.unlink(missing_ok=True)


def _signal(process: Process, number: signal.Signals) -> None:
    try:
        if process.alive:
            # Each was started with setsid, so its pid is its process group's number.
            os.killpg(process.pid, number) if number == signal.SIGKILL else os.kill(process.pid, number)
    except ProcessLookupError:
        pass


def _ended(process: Process, deadline: float) -> bool:
    """Wait until a process has ended; reap it when it is our child."""
    while process.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return not process.alive
