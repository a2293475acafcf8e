"""podman with a store of its own, and podwire's conflist as its only network."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import oci as image
from tests.runtimes.capsule import program
from tests.runtimes.world import World, unreachable, wait_for

NETWORK = "podwire"
RUN_SECONDS = 30.0

# Containers' own limits are nothing to us, and must work on a machine without systemd or AppArmor.
CONFIG = """\
[containers]
apparmor_profile = "unconfined"
cgroupns = "host"
cgroups = "no-conmon"
log_driver = "k8s-file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{bin_dir}"]
network_config_dir = "{conf_dir}"
default_network = "{network}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
"""


@dataclass(frozen=True, slots=True)
class Container:
    """A running container: its addresses as podman tells them, and its namespace as seen from here."""

    id: str
    addresses: tuple[str, ...]
    mac: str
    netns: str

    @property
    def address(self) -> str:
        return self.addresses[0]


@dataclass(frozen=True, slots=True)
class Podman:
    """The podman of a world."""

    world: World

    @property
    def config(self) -> Path:
        return self.world.root / "containers.conf"

    def setup(self, archive: Path) -> None:
        """Write the configuration and load the image."""
        for name, package in (("podman", "podman"), ("conmon", "conmon"), ("runc", "runc")):
            program(name, package)
        dirs = {"bin_dir": self.world.bin_dir, "conf_dir": self.world.conf_dir}
        self.config.write_text(CONFIG.format(network=NETWORK, **dirs))
        self("load", "--input", archive)

    def _command(self, *words: str | Path) -> tuple[list[str | Path], dict[str, str]]:
        """Return a podman command and its environment."""
        root = self.world.root / "podman"
        root.mkdir(exist_ok=True)
        directories = {"--root": "root", "--runroot": "run", "--tmpdir": "tmp", "--volumepath": "volumes"}
        command: list[str | Path] = [program("podman", "podman"), "--storage-driver", "vfs"]
        for option, name in directories.items():
            command += [option, root / name]
        return [*command, *words], {"CONTAINERS_CONF": str(self.config), "TMPDIR": str(root)}

    def __call__(self, *words: str | Path) -> str:
        """Run a podman command; it must succeed."""
        command, environment = self._command(*words)
        return self.world.run(*command, env=environment).strip()

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Begin to run a container that serves HTTP; its host name is its name."""
        words = ["--detach", "--name", name, "--hostname", name, "--network", NETWORK]
        words += ["--cgroup-parent", f"/{self.world.capsule.cgroup}", *options, image.NAME]
        command, environment = self._command("run", *words)
        return self.world.capsule.popen(
            self.world.node, command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def add(self, name: str, *options: str) -> Container:
        """Run a container and return when it serves."""
        with self.start(name, *options) as process:
            out, err = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, (out + err).decode()
        container = self.get(name)
        wait_for(lambda: not unreachable(container.netns, "127.0.0.1", image.PORT), f"{name} serves")
        return container

    def get(self, name: str) -> Container:
        """Return a running container as podman describes it."""
        (found,) = json.loads(self("inspect", name))
        netns = self.world.capsule.path(found["NetworkSettings"]["SandboxKey"])
        network = found["NetworkSettings"]["Networks"][NETWORK]
        addresses = (network["IPAddress"], network["GlobalIPv6Address"])
        return Container(found["Id"], addresses, network["MacAddress"], netns)

    def remove_all(self) -> None:
        """Remove every container."""
        self("rm", "--all", "--force", "--time", "0")
