"""The unit: what systemd says to it, and that a daemon under its restrictions does all of its work."""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from netlink import netns
from proxy.l7.engine import Engine
from proxy.l7.places import OWNER
from proxy.l7.render import Settings
from tests.cni.endurance import Site
from tests.cni.world import CONFIG, request_env
from tests.node import sandbox
from tests.node.sandbox import UNIT, directives
from tests.node.world import CLUSTER_IP, NODE, NODES, World, build, ended, service, wait_until

HAS_SYSTEMD = shutil.which("systemd-analyze") is not None
HAS_SECCOMP = ctypes.util.find_library("seccomp") is not None
needs_systemd = pytest.mark.skipif(not HAS_SYSTEMD, reason="systemd-analyze is not installed")
needs_both = pytest.mark.skipif(not (HAS_SYSTEMD and HAS_SECCOMP), reason="no systemd-analyze or libseccomp")
MOST_EXPOSED = 3.9
"""What `systemd-analyze security` may say at most; 10 is a service without any restriction."""
HTTP = {"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}
LIMITED = {
    "runtimeConfig": {**HTTP["runtimeConfig"], "bandwidth": {"ingressRate": 10**8, "ingressBurst": 10**7}}
}
FLAT = ("--mode", "flat", "--flat-addresses", "192.168.50.64/29")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    path = tmp_path / "podwire.service"
    path.write_text(UNIT.read_text().replace("/opt/podwire/bin/podwire", "/bin/true"))
    return path


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_the_unit_is_as_closed_as_what_it_does_permits(unit: Path) -> None:
    threshold = f"--threshold={int(MOST_EXPOSED * 10)}"
    command = ["systemd-analyze", "security", "--offline=yes", threshold, "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_unit_starts_the_daemon_before_kubelet_and_does_not_wait_for_a_network() -> None:
    found = directives(UNIT)
    assert "kubelet.service" in found["Before"][0].split()
    assert "network-online.target" not in " ".join(found["After"])
    assert found["Type"] == ["notify"]
    assert found["Restart"] == ["always"]


def test_a_reload_looks_for_mistakes_in_the_file_first() -> None:
    """Only if the first command succeeds does systemd go on to the next; otherwise the reload has failed."""
    found = directives(UNIT)
    program, options = found["ExecStart"][0].split(" daemon --config ")
    assert found["ExecReload"] == [f"{program} config check {options}", "/bin/kill -HUP $MAINPID"]


def test_the_units_places_are_the_daemons_defaults() -> None:
    from node.config import DEFAULT_PATH
    from node.config_keys import Configuration

    found, paths = directives(UNIT), Configuration().paths
    assert f"/run/{found['RuntimeDirectory'][0]}" == str(Path(paths.socket).parent)
    assert f"/var/lib/{found['StateDirectory'][0]}" == paths.state_dir
    assert f"/etc/{found['ConfigurationDirectory'][0].split()[0]}" == str(Path(DEFAULT_PATH).parent)
    assert found["ExecStart"][0].endswith(f"daemon --config {DEFAULT_PATH}")


@dataclass(slots=True)
class Sandboxed(World):
    """A node whose daemon runs as the unit has it."""

    unit: Path = UNIT

    def command(self, *options: str) -> list[str]:
        places = f"{self.root / 'state'},{self.root / 'run'},{self.root / 'net.d'}"
        # Not super(): dataclass(slots=True) makes the class anew, and super() knows the first one.
        command = World.command(self, *options)
        return [sys.executable, "-m", sandbox.__name__, str(self.unit), places, *command]

    @property
    def socket(self) -> Path:
        return self.root / "run/podwire.sock"


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[Sandboxed]:
    made = build(namespaces, tmp_path)
    world = Sandboxed(made.node, made.pod, made.peer, tmp_path)
    for name in ("state", "run", "net.d"):
        (tmp_path / name).mkdir()
    world.write("nodes.yaml", NODES)
    world.write("web.yaml", service())
    with ended(world):
        yield world


def start(world: Sandboxed, namespaces: Callable[[], str], *options: str) -> Site:
    world.options = (*options, "--cni-conf-dir", str(world.root / "net.d"))
    world.start()
    site = Site(world, namespaces)
    site.install()
    return site


def call(site: Site, command: str, path: str, container: str = "web") -> dict[str, object]:
    """Execute the binary for a namespace by any path of it."""
    env = request_env(command, container, path)
    done = netns.run(
        site.world.node,
        lambda: subprocess.run(
            [site.world.root / "bin/podwire"],
            env=env,
            input=json.dumps(CONFIG | LIMITED).encode(),
            capture_output=True,
            timeout=20,
            check=False,
        ),
    )
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout)) if done.stdout else {}


def answers(namespace: str, address: str, port: int) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((address, port), 1).close()
        except OSError:
            return False
        return True

    return netns.run(namespace, connect)


@needs_both
@pytest.mark.parametrize("options", [(), ("--mode", "bridge"), FLAT], ids=["routed", "bridge", "flat"])
def test_under_the_units_restrictions_pods_host_ports_limits_and_services_work(
    world: Sandboxed, namespaces: Callable[[], str], options: tuple[str, ...]
) -> None:
    site = start(world, namespaces, *options)
    later = namespaces()  # mounted by the node after the daemon has its own mounts
    path = str(netns.path(later))
    call(site, "ADD", path)
    with netns.run(later, socket.create_server, ("", 80)):
        wait_until(lambda: answers(world.peer, NODE, 8080), "the host port leads to the pod")
    with netns.run(world.peer, socket.create_server, ("", 8080)):
        wait_until(lambda: answers(later, CLUSTER_IP, 80), "the pod reaches the service")
    call(site, "DEL", path)
    assert not answers(world.peer, NODE, 8080)
    assert world.stop() == 0
    assert " ADD container=web" in world.log  # the daemon's work, not the plugin's own
    assert " DEL container=web" in world.log
    assert not [line for line in world.log.splitlines() if " ERROR " in line or "permitted" in line]
    assert [path.suffix for path in (world.root / "net.d").iterdir()] == [".conflist"]


@needs_both
def test_under_the_units_restrictions_a_namespace_may_be_that_of_another_users_process(
    world: Sandboxed, namespaces: Callable[[], str]
) -> None:
    """/proc/PID/ns/net is for those who may look into the process: hence CAP_SYS_PTRACE."""
    site = start(world, namespaces)
    pod = namespaces()
    command = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "cat"]
    with netns.run(pod, lambda: subprocess.Popen(command, stdin=subprocess.PIPE)) as process:
        try:
            assert process.stdin
            call(site, "ADD", f"/proc/{process.pid}/ns/net")
        finally:
            process.kill()
    assert world.stop() == 0
    assert " ADD container=web" in world.log


@needs_both
def test_under_the_units_restrictions_the_l7_proxy_runs_as_its_own_user_and_outlives_the_daemon(
    world: Sandboxed, namespaces: Callable[[], str]
) -> None:
    asked = {"paths": [{"regex": "^/old/(.*)$", "rewrite": "/new/"}], "flags": {"access-log": True}}
    annotation = json.dumps({"podwire.io/proxy": json.dumps(asked)})
    text = service().replace("namespace: shop}", f"namespace: shop, annotations: {annotation}}}", 1)
    world.write("web.yaml", text)
    with ended_proxy(world):
        start(world, namespaces, "--l7-access-log", str(world.root / "run/l7.log"))
        with netns.run(world.peer, socket.create_server, ("", 8080)):
            wait_until(lambda: proxies(world) == [0, OWNER], "HAProxy, its master and a worker")
            wait_until(lambda: answers(world.pod, CLUSTER_IP, 80), "the pod reaches the service")
            assert world.stop() == 0
            assert answers(world.pod, CLUSTER_IP, 80)
        assert proxies(world) == [0, OWNER]
        assert not [line for line in world.log.splitlines() if " ERROR " in line or "permitted" in line]


def proxies(world: Sandboxed) -> list[int]:
    """The users of HAProxy's processes in the node."""
    found = world.run("ip", "netns", "pids", world.node).split()
    return sorted(Path(f"/proc/{pid}").stat().st_uid for pid in found if "haproxy" in name_of(pid))


def name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def ended_proxy(world: Sandboxed) -> Iterator[None]:
    """End the HAProxy that is left."""
    try:
        yield
    finally:
        if world.daemon:
            world.stop()
        proxy = Engine(Settings(world.root / "run/l7"))
        if proxy.adopt():
            proxy.stop()


@needs_both
def test_the_sandbox_is_one(tmp_path: Path) -> None:
    """What the unit forbids is forbidden in the tests above, too."""
    tries = (
        "import os, socket\n"
        "def refused(do, *args):\n"
        "    try: do(*args)\n"
        "    except OSError as error: print(error.errno)\n"
        "    else: print('done')\n"
        f"refused(open, {str(tmp_path / 'file')!r}, 'w')\n"
        "refused(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)\n"
        "refused(os.chown, '/proc/self', 0, 0)\n"
        "refused(os.nice, -5)\n"
        "refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)\n"
    )
    place = tmp_path / "writable"
    place.mkdir()
    command = [sys.executable, "-m", sandbox.__name__, str(UNIT), str(place), sys.executable, "-c", tries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = [errno.EROFS, errno.EAFNOSUPPORT, errno.EPERM, errno.EPERM]
    assert done.stdout.split() == [*map(str, refused), "done"], done.stderr
