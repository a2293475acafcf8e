"""A lab of virtual machines: nodes, the router and the client boot Debian, with podwire as its unit.

The disks are below the cache of `lab.qemu.cache`, as they may grow beyond what /run can hold; all else of a
lab is in its directory, as of any lab.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from lab import network, probe, process, state
from lab.machines import OWN
from lab.qemu import cache, files, image, kernels, machine
from lab.qemu.machine import Machine
from lab.qemu.throwaway import usable_accel
from lab.remote import Remote
from lab.state import Lab, agent_command
from lab.topology import LabError, Topology

BOOT_SECONDS = 240.0
READY_SECONDS = 240.0
CHECKOUT = Path(__file__).parents[2]


def tell(what: str) -> None:
    """Say on stderr what was done."""
    print(f"lab: {what}", file=sys.stderr, flush=True)


def up(plan: Topology, root: Path = state.ROOT, kernel: str = "stable") -> Lab:
    """Make a lab of machines and return when every node's daemon is ready. What fails is taken down again.

    Raises LabError when a lab of this name exists, and when a machine does not come up.
    """
    directory = state.directory(plan.name, root)
    found = kernels.prepare(kernel, tell)
    disk = image.prepare(CHECKOUT, tell)
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise LabError(
            f"lab {plan.name!r} exists already; `podwire lab down --name {plan.name}` removes it"
        ) from None
    remote = Remote(lambda name: agent_command(directory, name))
    lab = Lab(plan, directory, remote)
    with ExitStack() as undo:
        undo.callback(remove, plan.name, root)
        undo.callback(remote.close)
        with cache.step(tell, "machines booted"):
            _boot(lab, found, disk)
        with cache.step(tell, "network of the router and the others made"):
            lab.call("router", network.build_inside, plan)
        state.save(lab)
        with cache.step(tell, "daemons ready"), ThreadPoolExecutor(len(plan.nodes)) as pool:
            list(pool.map(lambda node: wait_ready(lab, node.name), plan.nodes))
        undo.pop_all()
    return lab


def remove(name: str, root: Path = state.ROOT) -> bool:
    """End the machines of a lab and remove its directory and disks; return whether there was anything."""
    directory = state.directory(name, root)
    disks = _disks(directory)
    found = directory.exists() or disks.exists()
    process.stop((directory / "machines").glob("*/*.pid"))
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(disks, ignore_errors=True)
    return found


def pid(lab: Lab, node: str) -> int | None:
    """Return the pid of the node's daemon, on the node; None when it does not run."""
    return lab.call(node, main_pid)


def log(lab: Lab, node: str) -> str:
    """Return what the node's daemon wrote."""
    return lab.call(node, output, ["journalctl", "--unit=podwire", "--no-pager", "--output=cat"])


def execute(lab: Lab, place: str, namespace: str, command: list[str]) -> int:
    """Run a command at a place, with our terminal if there is one; return its exit status."""
    terminal = ["-t"] if sys.stdin.isatty() else []
    inside = [] if namespace == OWN else ["ip", "netns", "exec", namespace]
    done = subprocess.run(
        [*state.ssh_command(lab.root, lab.plan.machine(place), *terminal), shlex.join([*inside, *command])],
        check=False,
    )
    return done.returncode


def wait_ready(lab: Lab, node: str, seconds: float = READY_SECONDS) -> None:
    """Wait until a node's daemon says that it is. Raises LabError with its last words."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if lab.call(node, is_ready, 5.0):
            return
    raise LabError(f"the daemon of {node} did not get ready; its log ends:\n{cache.tail(log(lab, node))}")


def wait_answer(lab: Lab, name: str, deadline: float) -> None:
    """Wait until a machine's agent answers. Raises LabError with what the machine wrote last."""
    its = Machine(name, lab.root)
    while True:
        running = process.read(its.pid_file)
        try:
            lab.machines.call(name, str)
            return
        except LabError as error:
            if time.monotonic() > deadline or running is None or not running.alive:
                said = its.console.read_text(errors="replace") if its.console.exists() else ""
                raise LabError(f"machine {name} did not come up: {error}\n{cache.tail(said)}") from None
        time.sleep(0.5)


def is_ready(seconds: float) -> bool:
    """Wait until the daemon of this machine says that it is ready; False when it takes longer."""
    return probe.wait_status(OWN, network.HEALTH_PORT, "/healthz", time.monotonic() + seconds)


def wait_reached(lab: Lab, name: str, source: str, seconds: float = BOOT_SECONDS) -> None:
    """Wait until a node is ready as another one sees it: the node has no more to do for it than an answer.

    Raises LabError.
    """
    address = lab.plan.node(name).addresses[0]
    deadline = time.monotonic() + seconds
    while lab.call(source, probe.status, address, network.HEALTH_PORT, "/healthz")[0] != 200:
        if time.monotonic() > deadline:
            raise LabError(f"{name} is not ready after {seconds:.0f} s, as {source} sees it")
        time.sleep(0.5)


def wait_gone(lab: Lab, name: str, boot_id: str, seconds: float = BOOT_SECONDS) -> None:
    """Wait until a machine is no more in that boot. Raises LabError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if lab.machines.call(name, _boot_id) != boot_id:
                return
        except LabError:
            return
        time.sleep(0.5)
    raise LabError(f"machine {name} has not gone down within {seconds:.0f} s")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main_pid() -> int | None:
    """Return the pid of podwire's unit on this machine."""
    said = output(["systemctl", "show", "--property=MainPID", "--value", "podwire"]).strip()
    return int(said) if said.isdigit() and said != "0" else None


def output(command: list[str]) -> str:
    """Run a command on this machine; return what it printed, whatever came of it."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _boot(lab: Lab, kernel: kernels.Kernel, disk: Path) -> None:
    """Start the machines and wait until each can be told what to do."""
    machines = [Machine(name, lab.root) for name in lab.plan.machines]
    ports = machine.free_ports(len(machines))
    key = lab.root / "key"
    cache.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab {lab.plan.name}", "-f", key])
    (lab.root / "ssh_config").write_text(machine.ssh_config(machines, ports, key))
    public = key.with_suffix(".pub").read_text().strip()
    disks = _disks(lab.root)
    for directory in (lab.manifests, lab.root / "wires", lab.root / "machines", disks):
        directory.mkdir(parents=True, exist_ok=True)
    for node in lab.plan.nodes:
        state.write_json(lab.manifests / f"node-{node.name}.yaml", network.node_object(node))
    accel = usable_accel(kernel)
    for its, port in zip(machines, ports, strict=True):
        (disks / its.name).mkdir(mode=0o700)
        its.directory.symlink_to(disks / its.name)
        machine.make_disk(its, disk)
        content = files.files(lab.plan, its.name, public)
        its.archive.write_bytes(files.archive(content, files.links(lab.plan, its.name)))
        machine.start(its, lab.plan, kernel, accel, port)
    deadline = time.monotonic() + BOOT_SECONDS
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda its: wait_answer(lab, its.name, deadline), machines))


def _disks(directory: Path) -> Path:
    return cache.root() / "labs" / directory.name
