"""A node for a real container runtime: its namespace, the daemon in a capsule, and a machine beside it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from cni.install import CONFLIST
from cni.plugin import ledger_of
from cni.wiring import HOST_PREFIX
from ipam.ledger import Attachment
from lab.probe import Answer, Failure, fetch, wait_status
from netlink import netns
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from tests.runtimes.capsule import Capsule, stop

T = TypeVar("T")

DEADLINE = 10.0
STATIC = 4  # RTPROT_STATIC
NODE, OUTSIDE = ("192.168.50.11", "fd00:50::11"), ("192.168.50.12", "fd00:50::12")
POD_CIDRS = tuple(map(ip_network, ("10.244.1.0/24", "fd00:244:1::/64")))
GO_PLUGINS = Path("/usr/lib/cni")

MANIFEST = f"""
kind: Node
metadata: {{name: node1}}
spec: {{podCIDRs: [{", ".join(f'"{cidr}"' for cidr in POD_CIDRS)}]}}
status: {{addresses: [{", ".join(f'{{type: InternalIP, address: "{a}"}}' for a in NODE)}]}}
"""


def wait_for(found: Callable[[], T], what: str) -> T:
    """Wait until a condition holds, at most until the deadline; return what it returned."""
    deadline = time.monotonic() + DEADLINE
    while not (result := found()):
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.01)
    return result


@dataclass(slots=True)
class World:
    """The node, whose programs run in the capsule, and the machine outside."""

    capsule: Capsule
    node: str
    outside: str
    root: Path
    daemon: subprocess.Popen[bytes] | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def bin_dir(self) -> Path:
        return self.root / "cni/bin"

    @property
    def conf_dir(self) -> Path:
        return self.root / "cni/net.d"

    @property
    def state_dir(self) -> Path:
        return self.root / "state"

    def run(self, *command: str | Path, **options: Any) -> str:
        """Run a program on the node; return what it prints. It must succeed."""
        done = self.capsule.run(self.node, command, **options)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, command: list[str | Path], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on the node that stays; what it prints goes to a file of that name."""
        with self.log(name).open("ab") as log:
            process = self.capsule.popen(self.node, command, stdout=log, stderr=log, **options)
        self.processes.append(process)
        return process

    def log(self, name: str) -> Path:
        """Return the file with what a program that stays has printed."""
        return self.root / f"{name}.log"

    def podwire(self, *words: str | Path) -> str:
        """Run a command of `podwire` on the node."""
        return self.run(sys.executable, "-m", "cli.main", *words)

    @property
    def socket(self) -> Path:
        return self.state_dir / "podwire.sock"

    def install(self) -> None:
        """Write the plugin and its conflist; runtimes want one more plugin, for `lo`."""
        paths = [self.bin_dir, self.conf_dir, self.state_dir, self.socket]
        flags = ("--bin-dir", "--conf-dir", "--state-dir", "--socket")
        self.podwire("install", *(word for pair in zip(flags, paths, strict=True) for word in pair))
        self.link_plugin("loopback")

    def link_plugin(self, name: str) -> None:
        """Let the runtime find a plugin of the CNI project."""
        plugin = GO_PLUGINS / name
        assert plugin.exists(), f"{plugin} is missing: apt-get install containernetworking-plugins"
        if not (self.bin_dir / name).exists():
            (self.bin_dir / name).symlink_to(plugin)

    @property
    def conflist(self) -> dict[str, Any]:
        """The network configuration list that the runtime reads."""
        return dict(json.loads((self.conf_dir / CONFLIST).read_text()))

    @conflist.setter
    def conflist(self, document: dict[str, Any]) -> None:
        """Replace it in one step, by a file in the same folder as `podwire install` does."""
        temporary = self.conf_dir / f".{CONFLIST}"
        temporary.write_text(json.dumps(document))
        temporary.rename(self.conf_dir / CONFLIST)

    def start_daemon(self) -> None:
        """Start the daemon and wait until it is ready."""
        words: list[str | Path] = [sys.executable, "-m", "cli.main", "daemon", "--node-name", "node1"]
        words += ["--source", self.root / "manifests", "--state-dir", self.state_dir]
        self.daemon = self.start("daemon", [*words, "--socket", self.socket])
        ready = wait_status(self.node, 10256, "/healthz", time.monotonic() + DEADLINE)
        assert ready, self.log("daemon").read_text()

    def stop_daemon(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the daemon."""
        assert self.daemon
        stop(self.daemon, number)
        self.daemon = None

    def plugin(self, command: str, config: dict[str, Any], **variables: str) -> tuple[int, dict[str, Any]]:
        """Execute the installed plugin as a runtime does; return its status and what it printed."""
        environment = {"CNI_COMMAND": command, "CNI_PATH": str(self.bin_dir)}
        environment |= {f"CNI_{name}": value for name, value in variables.items()}
        binary, stdin = self.bin_dir / "podwire", json.dumps(config)
        done = self.capsule.run(self.node, [binary], env=environment, input=stdin)
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def attachments(self) -> tuple[Attachment, ...]:
        """Return what the ledger has."""
        with ledger_of(self.state_dir) as ledger:
            return ledger.attachments()

    def pod_links(self) -> set[str]:
        """Return the names of the pods' interfaces on the node."""
        return {name for name in self.links(self.node) if name.startswith(HOST_PREFIX)}

    def links(self, namespace: str | Path) -> dict[str, str]:
        """Return the MAC address of each interface in a namespace."""

        def read() -> dict[str, str]:
            with Rtnl() as rtnl:
                return {link.name: link.mac for link in rtnl.links()}

        return netns.run(namespace, read)

    def addresses(self, namespace: str | Path) -> set[str]:
        """Return the addresses in a namespace that somebody has given it."""

        def read() -> set[str]:
            with Rtnl() as rtnl:
                return {address.cidr.split("/")[0] for address in rtnl.addresses()}

        found = map(ip_address, netns.run(namespace, read))
        return {str(address) for address in found if not address.is_loopback and not address.is_link_local}

    def assert_holds(self, containers: set[str]) -> None:
        """Ledger and interfaces have these containers, nothing else; links may go after DEL's answer."""

        def consistent() -> bool:
            rows = self.attachments()
            same = {row.key.container_id for row in rows} == containers
            return same and self.pod_links() == {row.host_ifname for row in rows}

        wait_for(consistent, f"the node holds {containers or 'nothing'}")


def seen(namespace: str | Path, address: str, port: int) -> tuple[str, str]:
    """Make an HTTP request inside a namespace; return who answered and which address it saw."""
    (answer,) = fetch(str(namespace), address, port)
    assert isinstance(answer, Answer), f"{address} port {port}: {answer}"
    client = ip_address(answer.seen.strip("[]"))
    mapped = client.ipv4_mapped if isinstance(client, IPv6Address) else None
    return answer.server, str(mapped or client)


def unreachable(namespace: str | Path, address: str, port: int) -> bool:
    """Whether nobody answers there."""
    return isinstance(fetch(str(namespace), address, port)[0], Failure)


@contextmanager
def world(make: Callable[[], str], capsule: Capsule, root: Path) -> Iterator[World]:
    """Make the node and the machine beside it. All that was started here is ended, in reverse order."""
    found = World(capsule, make(), make(), root)
    capsule.adopt(found.node)
    capsule.adopt(found.outside)
    (root / "manifests").mkdir()
    (root / "manifests/node.yaml").write_text(MANIFEST)
    with netns.opened(found.outside) as outside:
        netns.run(found.node, _configure, NODE, OUTSIDE, outside)
    netns.run(found.outside, _configure, OUTSIDE, NODE)
    try:
        yield found
    finally:
        for process in reversed(found.processes):
            stop(process, signal.SIGKILL)


def _configure(own: tuple[str, ...], other: tuple[str, ...], peer: int | None = None) -> None:
    """Connect this namespace to the next one; the other machine is the way to everywhere."""
    with Rtnl() as rtnl:
        if peer is not None:
            rtnl.commit(veth_add(Veth("eth0", "eth0", peer_netns=peer)))
        eth0 = socket.if_nametoindex("eth0")
        rtnl.commit(link_up(1), link_up(eth0))
        for address, gateway in zip(own, other, strict=True):
            prefix, everywhere = (64, "::/0") if ":" in address else (24, "0.0.0.0/0")
            rtnl.commit(address_add(eth0, f"{address}/{prefix}"))
            rtnl.commit(route_replace(Route(everywhere, gateway=gateway, protocol=STATIC)))
