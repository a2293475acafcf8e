"""What the overlays of deploy/kubernetes come to, held against the API's own types and podwire's words."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import main, parser
from cni import install
from node.config_file import load

DEPLOY = Path(__file__).parents[2] / "deploy/kubernetes"
FOLDERS = ("base", "uninstall", "overlays/kubeadm", "overlays/k3s", "overlays/k3s-uninstall", "overlays/kind")
DAEMONS = ("base", "overlays/kubeadm", "overlays/k3s", "overlays/kind")
NAMESPACE = "kube-system"
K3S = {"cni-bin": "/var/lib/rancher/k3s/data/cni", "cni-conf": "/var/lib/rancher/k3s/agent/etc/cni/net.d"}

ASKED = {
    ("", "services"): {"list", "watch"},
    ("discovery.k8s.io", "endpointslices"): {"list", "watch"},
    ("", "nodes"): {"get", "list", "watch", "patch"},
    ("", "nodes/status"): {"patch"},
    ("", "events"): {"create", "patch"},
}
ASKED_OF_ITS_NAMESPACE = {("coordination.k8s.io", "leases"): {"get", "list", "create", "update", "delete"}}
"""What the daemon asks of the API, by group and resource."""


@cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    command = [kubectl, "kustomize", str(DEPLOY / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(folder: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in built(folder) if document["kind"] == kind)
    return found


def pod(folder: str) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(folder, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def host_paths(folder: str) -> dict[str, str]:
    return {v["name"]: v["hostPath"]["path"] for v in pod(folder)["volumes"] if "hostPath" in v}


def allowed(role: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    return {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_api_knows_every_field_and_none_is_lost(folder: str) -> None:
    """The models of the `kubernetes` package refuse wrong types and lose fields that they do not know."""
    from kubernetes.client import models

    for document in built(folder):
        model = getattr(models, f"V1{document['kind']}")
        assert json.loads(model.from_dict(document).to_json()) == document


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_that_is_named_is_there(folder: str) -> None:
    names = {(document["kind"], document["metadata"]["name"]) for document in built(folder)}
    spec = pod(folder)
    for volume in spec["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
    if folder in DAEMONS:
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
    for container in (*spec["initContainers"], *spec["containers"]):
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted <= {volume["name"] for volume in spec["volumes"]}
    for binding in (d for d in built(folder) if d["kind"].endswith("RoleBinding")):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in names
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["name"]) in names
        assert subject["namespace"] == NAMESPACE
    labels = of_kind(folder, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert of_kind(folder, "DaemonSet")["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_is_in_one_namespace(folder: str) -> None:
    for document in built(folder):
        wanted = None if document["kind"].startswith("ClusterRole") else NAMESPACE
        assert document["metadata"].get("namespace") == wanted


@pytest.mark.parametrize("folder", DAEMONS)
def test_the_daemon_may_do_what_it_asks_for_and_no_more(folder: str) -> None:
    assert allowed(of_kind(folder, "ClusterRole")) == ASKED
    assert allowed(of_kind(folder, "Role")) == ASKED_OF_ITS_NAMESPACE


@pytest.mark.parametrize("folder", DAEMONS)
def test_podwire_takes_the_arguments(folder: str) -> None:
    spec = pod(folder)
    for container in (*spec["initContainers"], *spec["containers"]):
        args = parser().parse_args(container["args"])
        assert args.run
    (install_args,) = (parser().parse_args(c["args"]) for c in spec["initContainers"])
    assert (install_args.no_conflist, str(install_args.host_root)) == (True, "/host")
    mounts = {m["name"]: m["mountPath"] for m in spec["initContainers"][0]["volumeMounts"]}
    assert mounts == {"opt": f"/host{install.HOME}", "cni-bin": f"/host{install_args.bin_dir}"}


@pytest.mark.parametrize("folder", DAEMONS)
def test_the_configuration_has_no_mistake(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(folder, "ConfigMap")["data"]["config.yaml"])
    assert main(["config", "check", str(file)]) == 0, capsys.readouterr().err
    configuration = load(file, {})
    assert configuration.source == "kubernetes"
    (daemon,) = pod(folder)["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in daemon["volumeMounts"]}
    assert mounts[configuration.pods.cni_conf_dir] == "cni-conf"
    assert mounts[configuration.paths.state_dir] == "state"
    assert mounts[str(Path(configuration.paths.socket).parent)] == "run"
    port = int(configuration.healthz.bind_address.rpartition(":")[2])
    probes = [daemon[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert [(p["path"], p["port"]) for p in probes] == [
        ("/livez", port),
        ("/livez", port),
        ("/healthz", port),
    ]


@pytest.mark.parametrize("folder", [folder for folder in DAEMONS if folder != "base"])
def test_an_overlay_names_the_api_server_itself(folder: str, tmp_path: Path) -> None:
    """The Service's address leads there only when podwire already works."""
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(folder, "ConfigMap")["data"]["config.yaml"])
    assert load(file, {}).kubernetes.api_override.startswith("https://")


def test_the_socket_and_the_ledger_are_where_the_plugin_looks() -> None:
    """Container and node know them by the same paths, as `podwire install` wrote them into the plugin."""
    args = parser().parse_args(pod("base")["initContainers"][0]["args"])
    paths = host_paths("base")
    assert (paths["state"], paths["run"]) == (str(args.state_dir), str(args.socket.parent))
    for mount in pod("base")["containers"][0]["volumeMounts"]:
        if mount["name"] in ("state", "run", "netns"):
            assert paths[mount["name"]] == mount["mountPath"]
    netns = next(m for m in pod("base")["containers"][0]["volumeMounts"] if m["name"] == "netns")
    assert netns["mountPropagation"] == "HostToContainer"


def test_on_k3s_only_the_node_s_directories_differ() -> None:
    others, k3s = pod("overlays/kubeadm"), pod("overlays/k3s")
    assert {name: path for name, path in host_paths("overlays/k3s").items() if name in K3S} == K3S
    for spec in (others, k3s):
        spec = spec | {"volumes": [v for v in spec["volumes"] if v["name"] not in (*K3S, "config")]}
        spec["volumes"].sort(key=lambda volume: str(volume["name"]))
        assert spec["hostNetwork"]
    assert others["containers"] == k3s["containers"]
    assert others["initContainers"] == k3s["initContainers"]
    args = pod("overlays/k3s-uninstall")["initContainers"][0]["args"]
    assert args == ["/host", f"--bin-dir={K3S['cni-bin']}", f"--conf-dir={K3S['cni-conf']}"]
    words = ["cleanup", "--podwire", "--all", "--yes", "--host-root", *args]
    given = parser().parse_args(words)
    assert (str(given.bin_dir), str(given.conf_dir)) == (K3S["cni-bin"], K3S["cni-conf"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_network_comes_before_all_else_and_on_every_node(folder: str) -> None:
    spec = pod(folder)
    assert spec["hostNetwork"]
    assert spec["dnsPolicy"] == "Default"
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["tolerations"] == [{"operator": "Exists"}]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_image_is_of_this_version(folder: str) -> None:
    from importlib.metadata import version

    spec = pod(folder)
    images = {container["image"] for container in (*spec["initContainers"], *spec["containers"])}
    assert images == {f"localhost/podwire:{version('podwire')}"}


def test_only_what_must_be_is_privileged() -> None:
    spec = pod("base")
    (init,), (daemon,) = spec["initContainers"], spec["containers"]
    assert daemon["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_CHROOT", "DAC_OVERRIDE"]}
    assert not init["securityContext"]["allowPrivilegeEscalation"]


def test_kind_makes_a_cluster_without_a_network_and_with_the_overlay_s_name() -> None:
    cluster = yaml.safe_load((DEPLOY / "overlays/kind/cluster.yaml").read_text())
    assert cluster["networking"] == {"disableDefaultCNI": True, "kubeProxyMode": "none"}
    config = yaml.safe_load(of_kind("overlays/kind", "ConfigMap")["data"]["config.yaml"])
    assert config["kubernetes"]["apiOverride"] == f"https://{cluster['name']}-control-plane:6443"
