"""One virtual machine of a lab: QEMU's command line, and its process.

The cables between machines are pairs of datagram sockets in the lab's directory, one datagram a frame; no
interface of this machine has a part in them. `mgmt0` is QEMU's user network: from the machine it leads
nowhere, and its ssh port is at a port of our loopback.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import process
from lab.machines import OWN
from lab.qemu import cache, files
from lab.qemu.kernels import Kernel
from lab.qemu.throwaway import CPU, QUICK
from lab.topology import Topology

MEMORY_MB = 512
SSH = 22


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine's place in a lab; `root` is the lab's directory."""

    name: str
    root: Path

    @property
    def directory(self) -> Path:
        """Where its disk, its own files and its console are."""
        return self.root / "machines" / self.name

    @property
    def disk(self) -> Path:
        """What differs from the image."""
        return self.directory / "disk.qcow2"

    @property
    def archive(self) -> Path:
        """Its own files."""
        return self.directory / "files.tar"

    @property
    def console(self) -> Path:
        """What it wrote to its serial line."""
        return self.directory / "console.log"

    @property
    def pid_file(self) -> Path:
        """Names QEMU's process."""
        return self.directory / "qemu.pid"


def make_disk(machine: Machine, image: Path) -> None:
    """Give a machine a disk that begins as the image is."""
    cache.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", machine.disk])


def start(machine: Machine, plan: Topology, kernel: Kernel, accel: str, port: int) -> process.Process:
    """Start a machine; its ssh port is at `port` of 127.0.0.1."""
    machine.console.unlink(missing_ok=True)
    words = command(machine, plan, kernel, accel, port)
    return process.start(OWN, words, machine.pid_file, machine.directory / "qemu.log")


def command(machine: Machine, plan: Topology, kernel: Kernel, accel: str, port: int) -> list[str]:
    """Return QEMU's command line. A reboot of the machine is one of the same process."""
    options: list[tuple[str, str]] = [
        ("-name", f"podwire-{plan.name}-{machine.name}"),
        ("-M", "q35,usb=off"),
        ("-accel", "kvm" if accel == "kvm" else "tcg,thread=multi,tb-size=512"),
        ("-cpu", CPU[accel]),
        ("-m", str(MEMORY_MB)),
        ("-smp", "2"),
        ("-drive", f"file={machine.disk},if=virtio,cache=unsafe"),
        ("-drive", f"file={kernel.modules},if=virtio,format=raw,readonly=on"),
        ("-drive", f"file={machine.archive},if=virtio,format=raw,readonly=on"),
        ("-device", "virtio-rng-pci"),
        ("-serial", f"file:{machine.console}"),
        ("-kernel", str(kernel.image)),
        ("-initrd", str(kernel.initrd)),
        ("-append", f"console=ttyS0 quiet {QUICK}"),
    ]
    for name in files.ports(plan, machine.name):
        options += _cable(machine, name)
    forward = f"hostfwd=tcp:127.0.0.1:{port}-:{SSH}"
    options += _card("mgmt0", f"user,restrict=on,{forward}", files.mac(machine.name, "mgmt0"))
    words = [word for option in options for word in option]
    return [cache.find("qemu-system-x86_64"), "-nodefaults", "-nographic", *words]


def _cable(machine: Machine, name: str) -> list[tuple[str, str]]:
    """Return a network card and its end of the cable: each host has one to the router."""
    wires = machine.root / "wires"
    ends = [f"{name}.router", f"{name}.host"] if machine.name == "router" else [f"{machine.name}.host", ""]
    here, there = ends[0], ends[1] or f"{machine.name}.router"
    net = f"dgram,local.type=unix,local.path={wires / here},remote.type=unix,remote.path={wires / there}"
    return _card(name, net, files.mac(machine.name, name))


def _card(name: str, net: str, mac: str) -> list[tuple[str, str]]:
    kind, _, options = net.partition(",")
    return [
        ("-netdev", f"{kind},id={name},{options}"),
        ("-device", f"virtio-net-pci,netdev={name},mac={mac},romfile="),
    ]


def free_ports(count: int) -> list[int]:
    """Return so many ports of 127.0.0.1 that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def ssh_config(machines: Sequence[Machine], ports: Sequence[int], key: Path) -> str:
    """Return the configuration by which `ssh -F FILE NAME` reaches each machine; connections are shared."""
    common = [
        "Host *",
        "    HostName 127.0.0.1",
        "    User root",
        f"    IdentityFile {key}",
        "    IdentitiesOnly yes",
        "    StrictHostKeyChecking no",
        "    UserKnownHostsFile /dev/null",
        "    LogLevel ERROR",
        "    ConnectTimeout 60",
        "    ServerAliveInterval 5",
        "    ServerAliveCountMax 6",
        "    Ciphers chacha20-poly1305@openssh.com",
        "    Compression no",
    ]
    each = [f"Host {machine.name}\n    Port {port}" for machine, port in zip(machines, ports, strict=True)]
    return "\n".join([*each, *common, ""])
