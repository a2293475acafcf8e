"""HAProxy's processes: started in a session of their own, checked, noticed when they end.

The master is started with few capabilities and never gets more; a worker, where nobody's connections are made
with a client's own address, gives up all of them. Source: capabilities(7), setpriv(1), prlimit(1),
pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from proxy.l7.render import Settings

log = logging.getLogger("podwire.l7")

CHECK_SECONDS = 60.0
CAPABILITIES = ("setuid", "setgid", "sys_chroot", "kill", "net_raw", "net_bind_service")
"""To be OWNER in its jail, to end workers, to connect from clients' addresses, and to have a low port."""
SPARE_DESCRIPTORS = 4_096
"""Beside two for each connection: listeners, checks, logs, idle connections to endpoints."""
MESSAGES_BYTES = 1_000_000
"""When the file of HAProxy's messages is begun anew."""

_ALERT = re.compile(r"\[ALERT\]\s*\(\d+\) : (?:config : )?(.*)")
_NOISE = ("Error(s) found in configuration file", "Fatal errors found in configuration")


class Watched:
    """A process, ours or not: whether it runs, and a call in another thread once it has ended."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._child = child
        self._descriptor = os.pidfd_open(pid)
        self._woken = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(0):
            return True
        if self._child:
            self._child.poll()  # it is gone only then
        return False

    def on_end(self, call: Callable[[], None]) -> None:
        """Have a thread that waits for the end, and calls then."""
        self._thread = threading.Thread(target=self._wait, args=(call,), name="l7-watch", daemon=True)
        self._thread.start()

    def _wait(self, call: Callable[[], None]) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        if all(descriptor != self._woken for descriptor, _ in poll.poll()):
            call()

    def forget(self) -> None:
        """Do not call at the end."""
        os.eventfd_write(self._woken, 1)

    def end(self, seconds: float) -> None:
        """Have it end: SIGTERM, and SIGKILL after a while."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            if poll.poll(seconds * 1000):
                break
        if self._child:
            self._child.wait(seconds)

    def close(self) -> None:
        """Watch it no longer; it goes on."""
        self.forget()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        if self._child:
            self._child.poll()
            self._child.returncode = self._child.returncode or 0  # no warning that it runs on: it is meant to
        os.close(self._woken)
        os.close(self._descriptor)


def strays(settings: Settings) -> Iterator[Watched]:
    """Yield processes that run with the configuration file of these settings, whoever has started them.

    Several could listen at one port: none may be left when another is started.
    """
    wanted = os.fsencode(settings.configuration)
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name == "haproxy" and wanted in words:
                yield Watched(int(folder.name))


def prepare(settings: Settings) -> None:
    """Make the folders that HAProxy needs. What a worker sees is empty but for the sample's socket."""
    settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings.jail.mkdir(exist_ok=True)
    settings.jail.chmod(0o711)
    if settings.access_log:
        with contextlib.suppress(OSError):  # told of when it is opened
            settings.access_log.parent.mkdir(mode=0o755, parents=True, exist_ok=True)


def start(settings: Settings) -> Watched:
    """Start the master process with the configuration in its file. Raises OSError."""
    limit = _descriptors(2 * settings.max_connections + SPARE_DESCRIPTORS)
    kept = ",".join(f"+{name}" for name in CAPABILITIES)
    command = (
        *("prlimit", f"--nofile={limit}:{limit}", "--core=0:0", "--"),
        *("setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--"),
        *(settings.program, "-W", "-S", f"{settings.master_socket},mode,600"),
        *("-f", str(settings.configuration)),
    )
    trim_messages(settings)
    with _appended(settings.access_log) as out, _appended(settings.messages) as errors:
        # It keeps running when this process ends, and none of its signals are for it.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
            umask=0o077,
            cwd="/",
        )
    return Watched(child.pid, child)


def _descriptors(wanted: int) -> int:
    """Return how many descriptors a process can have, `wanted` if this one may say so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted <= hard:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, wanted))
    except (ValueError, PermissionError):
        return hard
    return wanted


@contextlib.contextmanager
def _appended(path: Path | None) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path or os.devnull, flags, 0o640)
    except OSError as error:  # better without a log than not at all
        log.error("%s cannot be written to: %s", path, error.strerror)
        descriptor = os.open(os.devnull, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def trim_messages(settings: Settings) -> None:
    """Begin the file of messages anew when it has become long."""
    with contextlib.suppress(FileNotFoundError):
        if settings.messages.stat().st_size > MESSAGES_BYTES:
            os.truncate(settings.messages, 0)


def alerts(messages: str) -> tuple[str, ...]:
    """Return what HAProxy finds wrong, without its prefixes."""
    found = (match[1].strip() for match in _ALERT.finditer(messages))
    return tuple(text for text in found if not text.startswith(_NOISE))


def check(settings: Settings, path: Path) -> tuple[str, ...]:
    """Return what HAProxy finds wrong with a configuration; nothing if it can use it."""
    done = subprocess.run(
        (settings.program, "-c", "-f", str(path)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=CHECK_SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return ()
    messages = done.stderr.decode(errors="replace")
    return alerts(messages) or (messages.strip()[-200:] or f"exit status {done.returncode}",)
