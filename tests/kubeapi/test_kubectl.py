"""That kubectl works with the server, as people will use it when a test has failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from tests.kubeapi.client import KubeClient
from tests.kubeapi.objects import lease, piece, service

KUBECTL = shutil.which("kubectl") or ""
SECONDS = 30

pytestmark = pytest.mark.skipif(not KUBECTL, reason="there is no kubectl on PATH")


class Kubectl(Protocol):
    """Runs kubectl and returns what it printed; `stdin` is an object for `-f -`."""

    def __call__(self, *arguments: str, stdin: Any = None) -> str: ...


@pytest.fixture
def environment(cluster: KubeClient, tmp_path: Path) -> dict[str, str]:
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    return {**os.environ, "KUBECONFIG": str(config), "HOME": str(tmp_path)}


@pytest.fixture
def kubectl(environment: dict[str, str]) -> Kubectl:
    def run(*arguments: str, stdin: Any = None) -> str:
        command = [KUBECTL, *arguments]
        text = None if stdin is None else yaml.safe_dump(stdin)
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        assert "error" not in done.stderr.lower(), done.stderr
        return done.stdout

    return run


def rows(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


def test_kubectl_lists_services(cluster: KubeClient, space: str, kubectl: Kubectl) -> None:
    made = cluster.create(service("web", space, app="web"))
    head, *lines = rows(kubectl("get", "services", "-A", "-o", "wide"))
    assert head == ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"]
    line = next(line for line in lines if line[0] == space)
    assert line[1:6] == ["web", "ClusterIP", made["spec"]["clusterIP"], "<none>", "80/TCP"]
    printed = json.loads(kubectl("get", "svc", "-n", space, "-o", "json"))
    assert [item["metadata"]["uid"] for item in printed["items"]] == [made["metadata"]["uid"]]
    assert yaml.safe_load(kubectl("get", "service/web", "-n", space, "-o", "yaml")) is not None


@pytest.mark.parametrize("kind", ["nodes", "endpointslices", "leases", "events", "namespaces", "configmaps"])
def test_kubectl_lists_every_kind(cluster: KubeClient, space: str, kubectl: Kubectl, kind: str) -> None:
    cluster.create(piece("web-1", space, "10.0.0.1", "10.0.0.2"))
    cluster.create(lease("mine", space))
    kubectl("get", kind, "-n", space)
    if kind == "endpointslices":
        assert rows(kubectl("get", kind, "-n", space))[1][:4] == [
            "web-1",
            "IPv4",
            "8080",
            "10.0.0.1,10.0.0.2",
        ]


def test_kubectl_creates_labels_patches_and_deletes(space: str, kubectl: Kubectl) -> None:
    kubectl("create", "--validate=false", "-f", "-", stdin=service("web", space))
    kubectl("label", "service", "web", "-n", space, "tier=front")
    kubectl(
        "patch", "service", "web", "-n", space, "--type=merge", "-p", '{"spec": {"ports": [{"port": 81}]}}'
    )
    kubectl("annotate", "service", "web", "-n", space, "note=one")
    found = json.loads(kubectl("get", "services", "-n", space, "-l", "tier=front", "-o", "json"))["items"][0]
    assert found["metadata"]["labels"] == {"tier": "front"}
    assert [p["port"] for p in found["spec"]["ports"]] == [81]
    kubectl("delete", "service", "web", "-n", space)
    assert kubectl("get", "services", "-n", space) == ""


def test_kubectl_applies_and_applies_again(space: str, kubectl: Kubectl) -> None:
    wanted = piece("web-1", space, "10.0.0.1")
    wanted["ports"] = [{"name": "", "port": 8080, "protocol": "TCP"}]  # the list is compared as a whole
    for addresses in (["10.0.0.1"], ["10.0.0.2", "10.0.0.3"]):
        wanted["endpoints"] = [{"addresses": [a]} for a in addresses]
        kubectl("apply", "--validate=false", "-f", "-", stdin=wanted)
        found = json.loads(kubectl("get", "endpointslice", "web-1", "-n", space, "-o", "json"))
        assert [a for e in found["endpoints"] for a in e["addresses"]] == addresses
    assert "unchanged" in kubectl("apply", "--validate=false", "-f", "-", stdin=wanted)
    kubectl("delete", "-f", "-", stdin=wanted)


def test_kubectl_applies_the_ports_of_a_service(space: str, kubectl: Kubectl) -> None:
    wanted = service("web", space)
    for ports in ([80], [80, 443], [443]):
        wanted["spec"]["ports"] = [{"name": f"port-{p}", "port": p} for p in ports]
        kubectl("apply", "--validate=false", "-f", "-", stdin=wanted)
        found = json.loads(kubectl("get", "service", "web", "-n", space, "-o", "json"))
        assert [p["port"] for p in found["spec"]["ports"]] == ports


def test_kubectl_describes_a_node(cluster: KubeClient, node: str, kubectl: Kubectl) -> None:
    cluster.patch("nodes", node, {"spec": {"podCIDRs": ["10.244.1.0/24"]}})
    printed = kubectl("describe", "node", node)
    assert f"Name:               {node}" in printed
    assert "PodCIDR:" in printed and "10.244.1.0/24" in printed


def test_kubectl_taints_and_cordons_a_node(node: str, kubectl: Kubectl, cluster: KubeClient) -> None:
    kubectl("taint", "node", node, "reserved=yes:NoSchedule")
    kubectl("cordon", node)
    spec = cluster.get("nodes", node)["spec"]
    assert "reserved" in [t["key"] for t in spec["taints"]] and spec["unschedulable"] is True


def test_kubectl_watches(cluster: KubeClient, space: str, environment: dict[str, str]) -> None:
    cluster.create(service("one", space))
    command = [KUBECTL, "get", "services", "-n", space, "-w"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline().startswith("NAME")
            assert process.stdout.readline().startswith("one ")
            cluster.create(service("two", space))
            assert process.stdout.readline().startswith("two ")
        finally:
            process.terminate()
