"""A real kube-apiserver with its etcd, where KUBEBUILDER_ASSETS names a folder with one (as for envtest)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.kubeapi import certificates
from tests.kubeapi.client import KubeClient

HOST = "127.0.0.1"
READY_SECONDS = 60.0
STOP_SECONDS = 20.0


def missing() -> str:
    """Return why there is no real API server here; empty when there is one."""
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    if not assets or not (Path(assets) / "kube-apiserver").exists():
        return "KUBEBUILDER_ASSETS names no folder with kube-apiserver"
    return "" if _etcd() else "there is no etcd on PATH nor in KUBEBUILDER_ASSETS"


def _etcd() -> str | None:
    return shutil.which("etcd", path=os.pathsep.join((os.environ["KUBEBUILDER_ASSETS"], os.environ["PATH"])))


@contextlib.contextmanager
def start() -> Iterator[KubeClient]:
    """Start both on the loopback interface; they are gone at the end of the block."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kube-apiserver-")))
        etcd_url = _start_etcd(stack, directory)
        ca = certificates.authority(directory)
        served = certificates.signed(directory, ca, (HOST, "localhost"))
        token = secrets.token_hex(16)
        tokens = directory / "tokens.csv"
        tokens.write_text(f'{token},test,test,"system:masters"\n')
        port = _free_port()
        flags = {
            "etcd-servers": etcd_url,
            "bind-address": HOST,
            "advertise-address": HOST,
            "secure-port": port,
            "cert-dir": directory,
            "tls-cert-file": served.certificate,
            "tls-private-key-file": served.key,
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": served.key,  # any key does: nobody asks for such tokens
            "service-account-signing-key-file": served.key,
            "token-auth-file": tokens,
            "authorization-mode": "RBAC",
            "disable-admission-plugins": "ServiceAccount",
            "service-cluster-ip-range": "10.96.0.0/12",
            "allow-privileged": "true",
        }
        program = Path(os.environ["KUBEBUILDER_ASSETS"]) / "kube-apiserver"
        log = directory / "kube-apiserver.log"
        process = _run(stack, [str(program), *(f"--{k}={v}" for k, v in flags.items())], log)
        cluster = KubeClient(f"https://{HOST}:{port}", token, ca.certificate)
        _wait_until_ready(cluster, process, log)
        yield cluster


def _start_etcd(stack: contextlib.ExitStack, directory: Path) -> str:
    client, peer = (f"http://{HOST}:{_free_port()}" for _ in range(2))
    command = [
        _etcd() or "etcd",
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
    ]
    _run(stack, command, directory / "etcd.log")
    return client


def _run(stack: contextlib.ExitStack, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    output = stack.enter_context(log.open("wb"))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def _wait_until_ready(cluster: KubeClient, process: subprocess.Popen[bytes], log: Path) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if cluster.request("GET", "/readyz")[0] == 200:
                return
        pause.wait(0.1)
    end = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"kube-apiserver was not ready within {READY_SECONDS} s; the end of its log:\n{end}")
