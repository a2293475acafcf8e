"""The lab as a user meets it, by its commands and with real daemons."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab import network, state
from netlink import netns

NAMES = ("upone", "uptwo")


def podwire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    for name in NAMES:
        network.remove(name)


def processes_of(name: str) -> list[str]:
    """Return the command lines that name the lab's directory."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            found.append(file.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if f"{state.ROOT}/{name}/" in line]


def test_two_labs_with_pods_come_up_side_by_side_and_leave_nothing() -> None:
    for name in NAMES:
        up = podwire("up", "--name", name, "--nodes", "1")
        assert up.returncode == 0, up.stderr
        run = podwire("pod", "run", "--name", name, "--serve", "80", "web")
        assert run.returncode == 0, run.stderr
        assert podwire("pod", "check", "--name", name, "web").returncode == 0
    status = json.loads(podwire("status", "--name", NAMES[0], "-o", "json").stdout)
    assert [(pod["pod"], pod["addresses"]) for pod in status["pods"]] == [
        ("web", "10.244.1.2,fd00:10:244:1::2")
    ]
    assert podwire("exec", "--name", NAMES[0], "web", "--", "sh", "-c", "exit 7").returncode == 7
    again = podwire("up", "--name", NAMES[0])
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    for name in NAMES:
        assert podwire("pod", "rm", "--name", name, "web").returncode == 0
        assert podwire("down", "--name", name).returncode == 0
        assert not (state.ROOT / name).exists()
        assert list(netns.DIRECTORY.glob(f"pw-{name}-*")) == []
        assert processes_of(name) == []


def test_a_file_is_applied_twice_to_a_lab_of_one_family(tmp_path: Path) -> None:
    name, file = NAMES[0], tmp_path / "pod.yaml"
    file.write_text("{kind: Pod, metadata: {name: web}, spec: {nodeName: node1}}")
    kind = ("--ip-family", "ipv6", "--underlay", "ipv4", "--backend", "vxlan", "--proxy-mode", "iptables")
    up = podwire("up", "--name", name, "--nodes", "1", *kind)
    assert up.returncode == 0, up.stderr
    told = json.loads(podwire("status", "--name", name, "-o", "json").stdout)
    assert (told["ipFamily"], told["underlay"], told["backend"]) == ("ipv6", "ipv4", "vxlan")
    assert told["proxyMode"] == "iptables"
    for what in ("made", "unchanged"):
        applied = podwire("apply", "--name", name, str(file))
        assert (applied.returncode, applied.stdout) == (0, f"pod web on node1 has fd00:10:244:1::2: {what}\n")


def test_a_lab_that_is_not_there_is_said_in_one_sentence() -> None:
    for verb in (["down"], ["status"], ["exec", "node1", "--", "true"]):
        done = podwire(verb[0], "--name", NAMES[0], *verb[1:])
        assert done.returncode == 1
        assert "no lab named 'upone'" in done.stderr
        assert done.stderr.count("\n") == 1
