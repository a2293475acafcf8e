"""kill -9 of the plugin binary and of the daemon at every step: no address, host port or rule is leaked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cni.install import install_binary
from cni.plugin import Plugin, ledger_of
from netlink import netns
from tests.cni.faulty import SOCKET
from tests.cni.world import Node, assert_consistent, stdin

ROOT = Path(__file__).parents[2]
ADD_STEPS = ("reserved", "rules set", "link made", "host configured", "pod configured", "committed")
DEL_STEPS = ("released", "rules removed", "link removed", "forgotten")
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": protocol} for protocol in ("tcp", "udp")]
LIMITS = {"ingressRate": 10**8, "ingressBurst": 10**7, "egressRate": 10**8, "egressBurst": 10**7}


def config_of(container: str) -> bytes:
    """Return the configuration of an execution: the container that suffers has all that leaves traces."""
    wishes = {"portMappings": PORTS, "bandwidth": LIMITS} if container == "c1" else {}
    return stdin(runtimeConfig=wishes)


class Crashing(Node):
    """A node with the installed binary, and processes that die."""

    def start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return netns.run(
            self.namespace,
            lambda: subprocess.Popen(command, env=env, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe),
        )

    def run(self, command: list[str], env: dict[str, str]) -> tuple[int, bytes, bytes]:
        with self.start(command, env) as process:
            out, err = process.communicate(config_of(env["CNI_CONTAINERID"]), timeout=20)
        return process.returncode, out, err

    def cni(self, command: str, container: str) -> tuple[int, dict[str, Any]]:
        with ledger_of(self.state_dir) as ledger:
            plugin = Plugin(ledger, self.state_dir)
            return self.handle(plugin, self.env(command, container), config_of(container))

    def binary(self) -> str:
        return str(self.state_dir / "bin/podwire")

    def shim(self, command: str, container: str) -> tuple[int, str]:
        """Execute the installed binary; return its status, and what it printed."""
        code, out, err = self.run([self.binary()], self.env(command, container))
        print(err.decode())
        return code, out.decode()

    def dying_shim(self, command: str, container: str, step: str) -> None:
        """Let the binary, without a daemon, die at a step."""
        code, out, err = self.run(faulty("shim", self.state_dir, step), self.env(command, container))
        assert (code, out) == (-signal.SIGKILL, b""), err.decode()

    @contextmanager
    def daemon(self, kind: str, step: str) -> Iterator[subprocess.Popen[bytes]]:
        with self.start(faulty(kind, self.state_dir, step), {}) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == b"serving\n"
                yield process
            finally:
                process.kill()

    def wait_until(self, file: str) -> None:
        deadline = time.monotonic() + 10
        while not (self.state_dir / file).exists():
            assert time.monotonic() < deadline, f"{file} did not appear"
            time.sleep(0.002)


def faulty(kind: str, state_dir: Path, step: str) -> list[str]:
    return [sys.executable, "-m", "tests.cni.faulty", kind, str(state_dir), step]


@pytest.fixture
def node(namespaces: Callable[[], str], tmp_path: Path) -> Crashing:
    node = Crashing(namespaces, tmp_path)
    install_binary(tmp_path / "bin", socket=str(tmp_path / SOCKET), state_dir=str(tmp_path))
    assert node.cni("ADD", "neighbour")[0] == 0  # a pod that must not notice anything
    return node


def assert_all_can_go(node: Node) -> None:
    """After DEL of everything there is nothing: no interface, no route, no record."""
    for container in node.pods:
        assert node.cni("DEL", container) == (0, {})
    assert_consistent(node, set())


@pytest.mark.parametrize("step", ADD_STEPS)
@pytest.mark.parametrize("then", ["DEL", "ADD", "restart"])
def test_the_binary_dies_in_add_without_a_daemon(node: Crashing, step: str, then: str) -> None:
    """The runtime's DEL cleans up; so does a new ADD of the container, or the next start of the daemon."""
    node.dying_shim("ADD", "c1", step)
    if then == "DEL":
        assert node.cni("DEL", "c1") == (0, {})
        assert_consistent(node, {"neighbour"})
    elif then == "ADD":
        code, out = node.cni("ADD", "c1")
        # Another execution cannot know that the dead one finished: it is refused until a DEL, as specified.
        assert (code, out.get("code")) == ((1, 101) if step == "committed" else (0, None))
        assert_consistent(node, {"neighbour", "c1"})
    node.recover()
    finished = then == "ADD" or (then == "restart" and step == "committed")
    assert_consistent(node, {"neighbour"} | ({"c1"} if finished else set()))
    assert_all_can_go(node)


@pytest.mark.parametrize("step", DEL_STEPS)
@pytest.mark.parametrize("then", ["DEL", "ADD", "restart"])
def test_the_binary_dies_in_del_without_a_daemon(node: Crashing, step: str, then: str) -> None:
    node.cni("ADD", "c1")
    node.dying_shim("DEL", "c1", step)
    if then != "restart":
        assert node.cni(then, "c1")[0] == 0
        assert_consistent(node)
    node.recover()
    assert_consistent(node, {"neighbour", "c1"} if then == "ADD" else {"neighbour"})
    assert_all_can_go(node)


def test_an_add_that_dies_at_every_step_in_turn_uses_one_address(node: Crashing) -> None:
    for step in ADD_STEPS[:-1]:
        node.dying_shim("ADD", "c1", step)
    code, result = node.cni("ADD", "c1")
    assert code == 0
    assert [ip["address"] for ip in result["ips"]] == ["10.1.0.3/32", "fd00:1::3/128"]
    assert_consistent(node, {"neighbour", "c1"})


@pytest.mark.parametrize("step", ADD_STEPS)
def test_the_daemon_dies_in_add_and_the_binary_finishes_it(node: Crashing, step: str) -> None:
    """One execution, one answer: even after `committed` the same execution is answered, not refused."""
    with node.daemon("daemon", step) as daemon:
        code, out = node.shim("ADD", "c1")
        assert daemon.wait(10) == -signal.SIGKILL
    assert code == 0, out
    assert json.loads(out)["ips"][0]["address"] == "10.1.0.3/32"
    assert_consistent(node, {"neighbour", "c1"})
    node.recover()
    assert_consistent(node, {"neighbour", "c1"})
    assert node.cni("CHECK", "c1") == (0, {})
    assert_all_can_go(node)


@pytest.mark.parametrize("step", DEL_STEPS)
def test_the_daemon_dies_in_del_and_the_binary_finishes_it(node: Crashing, step: str) -> None:
    """DEL may have been answered before the reaper got to the link: a start finishes what is left."""
    node.cni("ADD", "c1")
    with node.daemon("daemon", step) as daemon:
        code, out = node.shim("DEL", "c1")
        assert daemon.wait(10) == -signal.SIGKILL
    assert (code, out) == (0, "")
    node.recover()
    assert_consistent(node, {"neighbour"})
    assert_all_can_go(node)


@pytest.mark.parametrize("step", ADD_STEPS[:-1])
def test_daemon_and_binary_die_in_the_same_add(node: Crashing, step: str) -> None:
    with node.daemon("daemon", step) as daemon:
        node.dying_shim("ADD", "c1", "host configured")
        assert daemon.wait(10) == -signal.SIGKILL
    node.recover()
    assert_consistent(node, {"neighbour"})
    assert node.cni("ADD", "c1")[0] == 0
    assert_all_can_go(node)


@pytest.mark.parametrize("step", ADD_STEPS)
def test_a_delete_during_an_add_that_nobody_waits_for_any_more_waits_and_wins(
    node: Crashing, step: str
) -> None:
    """The binary of the ADD was killed, the daemon goes on with it, and the runtime sends DEL."""
    with node.daemon("slow", step):
        kill_midway(node, "ADD")
        with node.start([node.binary()], node.env("DEL", "c1")) as deletion:
            hand_over(deletion)
            node.wait_until("DEL")
            assert deletion.poll() is None
            (node.state_dir / "go").touch()
            assert deletion.wait(10) == 0
    node.recover()
    assert_consistent(node, {"neighbour"})
    assert_all_can_go(node)


@pytest.mark.parametrize("step", ["released", "forgotten"])
def test_the_binary_dies_while_the_daemon_is_in_del(node: Crashing, step: str) -> None:
    node.cni("ADD", "c1")
    with node.daemon("slow", step):
        kill_midway(node, "DEL")
        (node.state_dir / "go").touch()
        assert node.shim("DEL", "c1") == (0, "")
    node.recover()
    assert_consistent(node, {"neighbour"})
    assert_all_can_go(node)


def kill_midway(node: Crashing, command: str) -> None:
    """Execute the binary and kill it when the daemon, working for it, has reached its step."""
    with node.start([node.binary()], node.env(command, "c1")) as shim:
        hand_over(shim)
        node.wait_until("reached")
        shim.kill()


def hand_over(process: subprocess.Popen[bytes]) -> None:
    """Give a binary its configuration, without waiting for it to end."""
    assert process.stdin
    process.stdin.write(config_of("c1"))
    process.stdin.close()
