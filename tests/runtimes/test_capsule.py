"""Nothing that was started in a capsule is left, whatever ends the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from tests.runtimes.capsule import CGROUPS, ROOT, Capsule, capsule, program
from tests.runtimes.world import wait_for

# A daemon that has left its parent, with a mount, a control group of its own and a network namespace.
DAEMON = """
exec < /dev/null > /dev/null 2>&1
mount -t tmpfs tmpfs {root}
mkdir -p {cgroup}/below && echo $$ > {cgroup}/below/cgroup.procs
trap '' TERM HUP INT
touch {root}/mounted {ready}
while :; do sleep 1000; done
"""


def run_daemon(inside: Capsule, namespace: str, root: Path) -> None:
    """Start the daemon and wait until it is all there."""
    root.mkdir(exist_ok=True)
    ready = root.with_suffix(".ready")
    parent = CGROUPS / "pids" if (CGROUPS / "pids").is_dir() else CGROUPS  # control groups of version 1 or 2
    script = DAEMON.format(root=root, ready=ready, cgroup=parent / inside.cgroup)
    words = [program("setsid", "util-linux"), "--fork", "sh", "-c", script]
    inside.run(namespace, words)
    wait_for(ready.exists, "the daemon runs")


def members(first: int) -> set[int]:
    """Return the processes in the capsule's PID namespace, as seen from here."""
    found = set()
    namespace = (Path("/proc") / str(first) / "ns/pid_for_children").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/pid").readlink() == namespace:
                found.add(int(process.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def cgroups(name: str) -> list[Path]:
    return [*CGROUPS.glob(f"*/{name}"), *CGROUPS.glob(name)]


def test_the_end_of_a_block_ends_everything(namespaces: Callable[[], str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    with capsule() as inside:
        run_daemon(inside, namespaces(), root)
        assert Path(inside.path(root / "mounted")).exists()
        running = members(inside.pid)
        assert inside.pid in running
        assert len(running) >= 2
        assert cgroups(inside.cgroup)
    assert not (root / "mounted").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)
    assert not cgroups(inside.cgroup)


def test_a_killed_test_ends_everything(namespaces: Callable[[], str], tmp_path: Path) -> None:
    """As `timeout -s KILL` does it: nobody is there to clean up, not even network namespaces."""
    namespace = namespaces()
    words = [sys.executable, "-m", __name__, namespace, str(tmp_path / "root")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout
        pid, cgroup = test.stdout.readline().split()
        running = members(int(pid))
        assert len(running) >= 2
        test.kill()
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in running), "all have ended")
    wait_for(lambda: not netns.path(namespace).exists(), "the network namespace is gone")
    assert not cgroups(cgroup)


def test_a_failure_inside_ends_everything_and_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError), capsule() as inside:
        print(1 / 0)
    assert not Path(f"/proc/{inside.pid}").exists()


def test_what_is_written_to_run_and_var_lib_is_forgotten(namespaces: Callable[[], str]) -> None:
    """Inside it is there, and /run has nothing of the machine's in it."""
    namespace, files = namespaces(), ["/run/pwtest", "/var/lib/pwtest"]
    with capsule() as inside:
        assert inside.run(namespace, ["touch", *files]).returncode == 0
        assert all(Path(inside.path(file)).exists() for file in files)
        assert not Path(inside.path("/run/netns")).exists()
    assert not any(Path(file).exists() for file in files)


def test_a_program_that_takes_too_long_is_ended(namespaces: Callable[[], str]) -> None:
    with capsule() as inside:
        with pytest.raises(subprocess.TimeoutExpired):
            inside.run(namespaces(), ["sleep", "1000"], timeout=0.2)
        assert members(inside.pid) == {inside.pid}


def test_a_program_is_told_to_end_and_its_status_comes_back(namespaces: Callable[[], str]) -> None:
    """It is in the network namespace, and its directory is the repository."""
    namespace = namespaces()
    with capsule() as inside:
        done = inside.run(namespace, ["sh", "-c", "readlink /proc/self/ns/net; pwd; exit 3"])
        assert done.returncode == 3
        own = netns.run(namespace, os.readlink, "/proc/thread-self/ns/net")
        assert done.stdout.split() == [own, str(ROOT)]


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(AssertionError, match=r"no-such-program is missing: apt-get install .* some-package$"):
        program("no-such-program", "some-package")


if __name__ == "__main__":
    with capsule() as held:
        held.adopt(sys.argv[1])
        run_daemon(held, sys.argv[1], Path(sys.argv[2]))
        print(held.pid, held.cgroup, flush=True)
        signal.pause()
