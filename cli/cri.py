"""Ask a container runtime which pods it has, in the language of kubelet (Kubernetes CRI, runtime.v1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from api import cri_pb2 as pb
from api import cri_pb2_grpc as rpc
from cli.output import CommandError

SOCKET = "/run/containerd/containerd.sock"
TIMEOUT_SECONDS = 5.0
MESSAGE_BYTES = 16 << 20  # containerd sends no more


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's sandbox. `id` is what CNI calls the container id; a stopped one is not `ready`.

    The list does not say which sandboxes are on the node's network and so have no address of their own.
    """

    id: str
    namespace: str
    name: str
    ready: bool
    annotations: Mapping[str, str]

    @property
    def pod(self) -> str:
        """The pod's namespace/name."""
        return f"{self.namespace}/{self.name}"


def sandboxes(socket: str | Path = SOCKET, timeout: float = TIMEOUT_SECONDS) -> tuple[Sandbox, ...]:
    """Return the runtime's sandboxes by pod and id. Raises CommandError when it cannot be asked."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            stub = rpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]
            reply = stub.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise CommandError(_sentence(socket, error)) from None
    return tuple(sorted(map(_sandbox, reply.items), key=lambda sandbox: (sandbox.pod, sandbox.id)))


def _sandbox(item: pb.PodSandbox) -> Sandbox:
    return Sandbox(
        item.id,
        item.metadata.namespace,
        item.metadata.name,
        item.state == pb.SANDBOX_READY,
        dict(item.annotations),
    )


def _sentence(socket: str | Path, error: grpc.RpcError) -> str:
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"no container runtime answers on {socket}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the container runtime on {socket} does not answer in time"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers on {socket} does not speak the Kubernetes CRI (runtime.v1)"
    return f"the container runtime on {socket} failed: {error.details()}"
