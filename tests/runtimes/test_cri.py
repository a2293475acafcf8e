"""What is said when a container runtime cannot be asked; a real one is asked in test_containerd."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from api import cri_pb2 as pb
from api import cri_pb2_grpc as rpc
from cli import cri
from cli.output import CommandError


class Runtime(rpc.RuntimeServiceServicer):
    """A runtime that answers with what it was given, or does not."""

    def __init__(self, *items: pb.PodSandbox, fault: grpc.StatusCode | None = None) -> None:
        self.items = items
        self.fault = fault
        self.go = threading.Event()

    def ListPodSandbox(self, request: pb.ListPodSandboxRequest, context: Any) -> pb.ListPodSandboxResponse:
        if self.fault is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.go.wait(10)
        elif self.fault:
            context.abort(self.fault, "the disk is full")
        return pb.ListPodSandboxResponse(items=self.items)


@contextmanager
def serving(socket: Path, runtime: Runtime | None) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    if runtime:
        rpc.add_RuntimeServiceServicer_to_server(runtime, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield
    finally:
        if runtime:
            runtime.go.set()
        server.stop(None).wait()


def item(name: str, identity: str, state: pb.PodSandboxState = pb.SANDBOX_READY) -> pb.PodSandbox:
    return pb.PodSandbox(id=identity, metadata={"name": name, "namespace": "shop"}, state=state)


def test_sandboxes_come_by_pod_and_id(tmp_path: Path) -> None:
    """A pod can have an old sandbox beside the new one; a pod without metadata is listed too."""
    items = item("b", "1"), item("a", "3"), item("a", "2", pb.SANDBOX_NOTREADY), pb.PodSandbox(id="4")
    with serving(tmp_path / "s", Runtime(*items)):
        found = cri.sandboxes(tmp_path / "s")
    assert [(s.pod, s.id, s.ready) for s in found] == [
        ("/", "4", True),
        ("shop/a", "2", False),
        ("shop/a", "3", True),
        ("shop/b", "1", True),
    ]


def test_a_node_full_of_pods_is_listed(tmp_path: Path) -> None:
    """The answer is longer than the 4 MB that gRPC reads unasked."""
    items = [item(f"pod-{number}", str(number)) for number in range(300)]
    for sandbox in items:
        sandbox.annotations["kubectl.kubernetes.io/last-applied-configuration"] = "x" * 20_000
    with serving(tmp_path / "s", Runtime(*items)):
        assert len(cri.sandboxes(tmp_path / "s")) == 300


@pytest.mark.parametrize(
    ("runtime", "sentence"),
    [
        (None, "what answers on {} does not speak the Kubernetes CRI (runtime.v1)"),
        (
            Runtime(fault=grpc.StatusCode.DEADLINE_EXCEEDED),
            "the container runtime on {} does not answer in time",
        ),
        (Runtime(fault=grpc.StatusCode.INTERNAL), "the container runtime on {} failed: the disk is full"),
    ],
)
def test_a_failure_is_one_sentence(tmp_path: Path, runtime: Runtime | None, sentence: str) -> None:
    socket = tmp_path / "s"
    with serving(socket, runtime), pytest.raises(CommandError) as caught:
        cri.sandboxes(socket, timeout=0.2)
    assert str(caught.value) == sentence.format(socket)


def test_no_runtime_is_one_sentence(tmp_path: Path) -> None:
    """Neither without a socket nor with one that nobody listens on any more."""
    for name in ("missing", "left"):
        socket = tmp_path / name
        if name == "left":
            socket.touch()
        with pytest.raises(CommandError, match=f"^no container runtime answers on {socket}$"):
            cri.sandboxes(socket)
