"""A containerd of its own, and pods in it by the calls that kubelet makes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from api import cri_pb2 as pb
from api import cri_pb2_grpc as rpc
from lab import oci as image
from tests.runtimes.capsule import program, stop
from tests.runtimes.world import World, unreachable, wait_for

CALL_SECONDS = 20.0
NAMESPACE = "shop"
DNS = "10.96.0.10"

# Snapshots are plain copies: nothing is mounted, and any file system will do. The "opt" plugin would make
# /opt/containerd.
CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{root}/containerd.sock"
[ttrpc]
address = "{root}/containerd.ttrpc.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin_dir}"
conf_dir = "{conf_dir}"
"""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A running pod: its addresses as the runtime tells them, and its network namespace as seen from here."""

    id: str
    addresses: tuple[str, ...]
    netns: str

    @property
    def address(self) -> str:
        return self.addresses[0]


@dataclass(slots=True)
class Containerd:
    """containerd in a world."""

    world: World
    process: subprocess.Popen[bytes] | None = None
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.world.root / "containerd"

    @property
    def socket(self) -> Path:
        return self.root / "containerd.sock"

    @contextlib.contextmanager
    def calls(self) -> Iterator[rpc.RuntimeServiceStub]:
        """Connect to its CRI."""
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            yield rpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Start it and wait until it answers."""
        programs = [program("containerd", "containerd"), program("containerd-shim-runc-v2", "containerd")]
        program("runc", "runc")
        self.root.mkdir(exist_ok=True)
        config = self.root / "config.toml"
        dirs = {"bin_dir": self.world.bin_dir, "conf_dir": self.world.conf_dir}
        config.write_text(CONFIG.format(root=self.root, image=image.NAME, **dirs))
        self.process = self.world.start("containerd", [programs[0], "--config", config])
        wait_for(self.answers, "containerd answers")

    def answers(self) -> bool:
        """Whether it answers; it must not have ended."""
        assert self.process and self.process.poll() is None, self.world.log("containerd").read_text()
        with self.calls() as stub:
            try:
                stub.Version(pb.VersionRequest(), timeout=1)
            except grpc.RpcError:
                return False
        return True

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it; pods go on."""
        assert self.process
        stop(self.process, number)
        self.process = None

    def load(self, archive: Path) -> None:
        """Import the image that sandboxes are made of, and wait until the CRI knows it."""
        ctr = program("ctr", "containerd")
        words: list[str | Path] = [ctr, "--address", self.socket, "-n", "k8s.io", "images", "import"]
        self.world.run(*words, "--snapshotter", "native", archive)
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=image.NAME))
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            images = rpc.ImageServiceStub(channel)  # type: ignore[no-untyped-call]
            wait_for(
                lambda: images.ImageStatus(request, timeout=CALL_SECONDS).HasField("image"),
                "containerd's CRI knows the image",
            )

    def pod_config(self, name: str, **more: Any) -> pb.PodSandboxConfig:
        """Return what kubelet would say of a pod; each try of a name is another one's."""
        self.numbers[name] = number = self.numbers.get(name, -1) + 1
        metadata = pb.PodSandboxMetadata(name=name, uid=f"{name}-uid", namespace=NAMESPACE, attempt=number)
        return pb.PodSandboxConfig(
            metadata=metadata,
            hostname=name,
            log_directory=str(self.root / "logs"),
            dns_config=pb.DNSConfig(
                servers=[DNS]
            ),  # else the node's resolv.conf is read; often a link to /run
            linux=pb.LinuxPodSandboxConfig(cgroup_parent=f"/{self.world.capsule.cgroup}"),
            **more,
        )

    def add(self, name: str, **more: Any) -> Sandbox:
        """Run a pod's sandbox. The image makes it serve HTTP; returns when it does."""
        request = pb.RunPodSandboxRequest(config=self.pod_config(name, **more))
        with self.calls() as stub:
            sandbox = self.get(stub.RunPodSandbox(request, timeout=CALL_SECONDS).pod_sandbox_id)
        wait_for(lambda: not unreachable(sandbox.netns, "127.0.0.1", image.PORT), f"{name} serves")
        return sandbox

    def status(self, sandbox: str) -> tuple[pb.PodSandboxStatus, dict[str, Any]]:
        """Return a sandbox's status, and what containerd knows besides."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
        with self.calls() as stub:
            reply = stub.PodSandboxStatus(request, timeout=CALL_SECONDS)
        return reply.status, json.loads(reply.info["info"])

    def get(self, sandbox: str) -> Sandbox:
        """Return a running sandbox as the runtime describes it."""
        status, info = self.status(sandbox)
        network = status.network
        (netns,) = (
            item["path"] for item in info["runtimeSpec"]["linux"]["namespaces"] if item["type"] == "network"
        )
        addresses = (network.ip, *(more.ip for more in network.additional_ips))
        return Sandbox(sandbox, addresses, self.world.capsule.path(netns))

    def stop_pod(self, sandbox: str) -> None:
        """Stop a sandbox, as kubelet does any number of times."""
        with self.calls() as stub:
            stub.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_SECONDS)

    def remove_pod(self, sandbox: str) -> None:
        """Remove a sandbox, which stops it if need be; also any number of times."""
        with self.calls() as stub:
            stub.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_SECONDS)

    def network(self) -> tuple[bool, str]:
        """Whether the runtime thinks that there is a network, and the name of that which it uses."""
        with self.calls() as stub:
            reply = stub.Status(pb.StatusRequest(verbose=True), timeout=CALL_SECONDS)
        (condition,) = (c for c in reply.status.conditions if c.type == "NetworkReady")
        networks = json.loads(reply.info.get("cniconfig", "{}")).get("Networks") or ()
        names = [network["Config"]["Name"] for network in networks]
        return condition.status, next((name for name in names if name != "cni-loopback"), "")
