"""A place for programs that start daemons and mount things, of which nothing is left in the end.

A capsule is a mount and a PID namespace whose first process waits for the end of its input, which the test
holds. Whatever ends the test, a failure or a kill -9, ends the input; the first process then ends every
other one, shims and containers that have long left their parent included. With the last process go all
mounts, and the network namespaces that the capsule was told of. Control groups are in no namespace: the
first process removes those below the capsule's.

Inside, /run is empty, and what is written there and in /var/lib is forgotten: runtimes keep sockets and
caches there, whatever the directories that they are told.

    python -m tests.runtimes.capsule CGROUP
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from netlink import netns

ROOT = Path(__file__).parents[2]
CGROUPS = Path("/sys/fs/cgroup")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
END_SECONDS = 15.0

# linux/sched.h and linux/mount.h
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
MS_REC, MS_SLAVE = 0x4000, 0x80000

_libc = ctypes.CDLL(None, use_errno=True)


def program(name: str, package: str) -> str:
    """Return a program's path. Fails naming the Debian package that has it."""
    found = shutil.which(name, path=PATH)
    assert found, f"the program {name} is missing: apt-get install --no-install-recommends {package}"
    return found


@dataclass(frozen=True, slots=True)
class Capsule:
    """A running capsule: its first process, as seen from here, and the name of its control group."""

    pid: int
    cgroup: str
    _input: IO[bytes]

    def adopt(self, namespace: str) -> None:
        """Let a named network namespace go with the capsule, even if nobody is left to remove it."""
        self._input.write(f"{namespace}\n".encode())
        self._input.flush()

    def path(self, inside: str | Path) -> str:
        """Return where a file that was mounted inside is found from here."""
        return f"/proc/{self.pid}/root{inside}"

    def popen(self, namespace: str, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in the capsule and a network namespace, with the repository as its directory.

        What is started here is nsenter, which waits for the program and ends as it does; `signal` reaches
        the program itself. nsenter forks, this process does not: gRPC's threads would not survive that.
        """
        environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"} | options.pop("env", {})
        enter = [program("nsenter", "util-linux"), f"--target={self.pid}", "--mount", "--pid"]
        words = [*enter, f"--wdns={ROOT}", "--", *map(str, command)]
        # In a session of its own nsenter outlives a signal to the test's, so that the program has a parent.
        start: Any = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
        return netns.run(namespace, lambda: subprocess.Popen(words, env=environment, **start))

    def run(
        self, namespace: str, command: Sequence[str | Path], timeout: float = 30, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; its output is text."""
        data = options.pop("input", "")
        pipe = subprocess.PIPE
        with self.popen(namespace, command, stdin=pipe, stdout=pipe, stderr=pipe, **options) as process:
            try:
                out, err = process.communicate(data.encode(), timeout)
            except BaseException:
                stop(process, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a program that `popen` has started, and wait for its end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + END_SECONDS
    signalled = False
    while process.poll() is None:
        if not signalled:
            for pid in children.read_text().split():  # none yet, if it was started just now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
                signalled = True
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"{process.args!r} does not end")
        time.sleep(0.002)


@contextlib.contextmanager
def capsule() -> Iterator[Capsule]:
    """Make a capsule for the length of a block; afterwards its processes have ended."""
    cgroup = f"podwire-test-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", __name__, cgroup]
    pipe = subprocess.PIPE
    # A session of its own: a ^C is for the test, which then ends the capsule.
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdin and process.stdout
        try:
            words = process.stdout.readline().split()
            assert words, "the capsule did not start"
            yield Capsule(int(words[0]), cgroup, process.stdin)
        finally:
            process.stdin.close()
            try:
                process.wait(2 * END_SECONDS)
            finally:
                process.kill()
    assert process.returncode == 0, f"the capsule {cgroup} did not end cleanly"


def main() -> None:
    """Make the namespaces; the outer process waits for the test's end, the inner one for the outer one's."""
    cgroup = sys.argv[1]
    _call(_libc.unshare(CLONE_NEWPID), "make a PID namespace")
    ready, tell = os.pipe()
    ended, hold = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        if os.read(ready, 1):
            print(pid, flush=True)
        adopted = sys.stdin.read().split()
        os.close(hold)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for name in adopted:
            netns.delete(name)
        sys.exit(status)
    os.close(hold)
    _call(_libc.unshare(CLONE_NEWNS), "make a mount namespace")
    # What is unmounted outside goes here too: a namespace of another test is not kept alive.
    _mount("none", "/", None, MS_REC | MS_SLAVE)
    _mount("proc", "/proc", "proc")
    _mount("tmpfs", "/run", "tmpfs")
    for directory in ("/run/upper", "/run/work"):
        Path(directory).mkdir()
    _mount("overlay", "/var/lib", "overlay", data="lowerdir=/var/lib,upperdir=/run/upper,workdir=/run/work")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans need nobody to wait for them
    os.write(tell, b"\n")
    os.read(ended, 1)
    _end(cgroup)


def _end(cgroup: str) -> None:
    """End every other process of this PID namespace, then remove the control groups."""
    deadline = time.monotonic() + END_SECONDS
    while running := _running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        if time.monotonic() > deadline:
            sys.exit(f"processes in the capsule do not end: {running}")
        time.sleep(0.005)
    # Below each controller (version 1) or below the root (version 2).
    for top in [*CGROUPS.glob(f"*/{cgroup}"), *CGROUPS.glob(cgroup)]:
        for directory, _, _ in os.walk(top, topdown=False):
            _remove_cgroup(Path(directory), deadline)


def _running() -> list[str]:
    """Return what runs beside this process in its PID namespace, without zombies: their parent is outside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, state = (process / "stat").read_text().partition("(")[2].rpartition(") ")[::2]
            if process.name != "1" and state[0] not in "ZX":
                found.append(f"{process.name} {name}")
    return found


def _remove_cgroup(directory: Path, deadline: float) -> None:
    """Remove a control group as soon as the kernel sees that nobody is in it."""
    while True:
        try:
            return directory.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    names = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    _call(_libc.mount(*names, ctypes.c_ulong(flags), os.fsencode(data)), f"mount {target}")


def _call(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
