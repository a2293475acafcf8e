"""containerd with a pod's sandbox, made as kubelet asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from lab import probe
from lab.oci import NAME, PORT, write
from lab.probe import Answer
from lab.qemu.scenarios.base import Trial, Verdict
from netlink.family import Family

NODE = "node1"
SOCKET = "/run/containerd/containerd.sock"
SECONDS = 60.0
ARCHIVE = Path("/var/lib/pause.tar")


def containerd(trial: Trial) -> Iterator[Verdict]:
    """Start containerd, run a sandbox, reach it from another node, and remove it."""
    world = trial.world
    trial.shell(
        NODE,
        f"""mkdir -p /etc/containerd
        ln -sf /usr/lib/cni/loopback /opt/cni/bin/  # containerd 1 runs it (docs/install/kubeadm.md)
        containerd config default | sed -e 's|sandbox_image = .*|sandbox_image = "{NAME}"|' \
            -e 's|bin_dir = .*|bin_dir = "/opt/cni/bin"|' > /etc/containerd/config.toml
        systemctl unmask -q containerd; systemctl start containerd""",
        180,
    )
    try:
        world.lab.call(NODE, write, ARCHIVE)
        trial.shell(NODE, f"ctr -n k8s.io images import {ARCHIVE}")
        pod, addresses = world.lab.call(NODE, run_sandbox, "sandbox-1")
        yield trial.verdict("addresses of the sandbox", len(addresses), len(world.lab.plan.families))
        for address in addresses:
            (result,) = world.at("summary-2", probe.fetch, address, PORT, 1, 10.0)
            expected = world.of(Family(ip_address(address).version)).address("summary-2")
            saw = _plain(result.seen) if isinstance(result, Answer) else result.reason
            yield trial.verdict(f"summary-2 reaches {address}, which sees", saw, expected)
        trial.restart([NODE])
        # Of the lab's own pods containerd knows nothing, which is said, too.
        said = trial.try_shell(NODE, "podwire ipam check")[1]
        lines = [line for line in said.splitlines() if any(f"({address})" in line for address in addresses)]
        yield trial.verdict("podwire ipam check of it after a restart", lines, [])
        world.lab.call(NODE, remove_sandbox, pod)
        held = trial.shell(NODE, "podwire ipam show -o json")
        yield trial.verdict("its addresses are free", [a for a in addresses if f'"{a}' in held], [])
    finally:
        trial.try_shell(NODE, "systemctl stop containerd")


def _plain(seen: str) -> str:
    """Return an address as the lab writes it; the sandbox's server has one socket for both families."""
    return seen.strip("[]").removeprefix("::ffff:")


def run_sandbox(name: str) -> tuple[str, tuple[str, ...]]:
    """Ask this machine's containerd for a sandbox, as kubelet does; return its id and addresses."""
    import grpc

    from api import cri_pb2 as pb
    from api import cri_pb2_grpc as rpc

    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, uid=f"{name}-uid", namespace="yaobank", attempt=0),
        hostname=name,
        log_directory="/var/log/pods",
        linux=pb.LinuxPodSandboxConfig(),
    )
    with grpc.insecure_channel(f"unix:{SOCKET}") as channel:
        stub = rpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]
        made = stub.RunPodSandbox(pb.RunPodSandboxRequest(config=config), timeout=SECONDS).pod_sandbox_id
        status = stub.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=made), timeout=SECONDS)
    network = status.status.network
    return made, (network.ip, *(more.ip for more in network.additional_ips))


def remove_sandbox(sandbox: str) -> None:
    """Have this machine's containerd stop and remove a sandbox."""
    import grpc

    from api import cri_pb2 as pb
    from api import cri_pb2_grpc as rpc

    with grpc.insecure_channel(f"unix:{SOCKET}") as channel:
        stub = rpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=SECONDS)
        stub.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=SECONDS)
