"""The container runtime against a plugin chain that only writes down how it was called."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lab import controller, probe, runtime, state
from lab.runtime import PluginError, PodSpec
from lab.state import Lab
from lab.topology import LabError
from netlink import netns
from netlink.family import Family

# Appends each call to calls.jsonl beside itself; refuses the command named in the file `refuse`.
PLUGIN = f"""#!{sys.executable} -IS
import json, os, pathlib, sys
IPS = [{{"address": "10.244.1.7/32"}}, {{"address": "fd00:10:244:1::7/128"}}]
here = pathlib.Path(sys.argv[0]).parent
config = json.load(sys.stdin)
env = {{k: v for k, v in os.environ.items() if k.startswith("CNI_")}}
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"env": env, "config": config}}) + "\\n")
refuse = here / "refuse"
if refuse.exists() and refuse.read_text() == config["type"] + env["CNI_COMMAND"]:
    print(json.dumps({{"cniVersion": "1.1.0", "code": 11, "msg": "no", "details": "later"}}))
    sys.exit(1)
if env["CNI_COMMAND"] == "ADD":
    result = config.get("prevResult", {{"cniVersion": "1.1.0", "ips": IPS}})
    print(json.dumps(result | {{config["type"]: True}}))
"""


@pytest.fixture
def lab(make_lab: Callable[[], Lab]) -> Lab:
    lab = make_lab()
    node = lab.node_dir("node1") / "cni"
    plugins = [{"type": "one", "capabilities": {"mac": True}, "color": "red"}, {"type": "two"}]
    conflist = {"cniVersion": "1.1.0", "name": "net", "plugins": plugins}
    state.write_json(node / "net.d/10-net.conflist", conflist)
    state.write_json(node / "net.d/20-other.conflist", {"plugins": [{"type": "absent"}]})
    for name in ("one", "two"):
        state.write(node / "bin" / name, PLUGIN)
        (node / "bin" / name).chmod(0o755)
    return lab


def calls(lab: Lab) -> list[dict[str, Any]]:
    lines = (lab.node_dir("node1") / "cni/bin/calls.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def order(lab: Lab) -> list[str]:
    return [f"{call['env']['CNI_COMMAND']} {call['config']['type']}" for call in calls(lab)]


def refuse(lab: Lab, what: str) -> None:
    (lab.node_dir("node1") / "cni/bin/refuse").write_text(what)


def test_a_pod_is_added_checked_and_deleted_in_the_order_of_the_specification(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1"))
    runtime.check(lab, pod)
    runtime.remove(lab, pod)
    assert order(lab) == ["ADD one", "ADD two", "CHECK one", "CHECK two", "DEL two", "DEL one"]


def test_each_plugin_gets_its_configuration_and_the_right_previous_result(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1", "shop"))
    runtime.remove(lab, pod)
    first, second, *deletes = (call["config"] for call in calls(lab))
    assert first == {"type": "one", "color": "red", "cniVersion": "1.1.0", "name": "net"}
    assert second["prevResult"]["one"] is True
    assert "two" not in second["prevResult"]
    assert [delete["prevResult"] for delete in deletes] == [pod.result, pod.result]
    env = calls(lab)[0]["env"]
    assert env["CNI_NETNS"] == str(netns.path(pod.netns))
    assert env["CNI_CONTAINERID"] == pod.container_id
    assert "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web" in env["CNI_ARGS"]


def test_a_failed_add_is_deleted_again_and_leaves_no_namespace(lab: Lab) -> None:
    refuse(lab, "twoADD")
    with pytest.raises(PluginError, match="code 11: no: later") as failure:
        runtime.add(lab, PodSpec("web", "node1"))
    assert failure.value.code == 11
    assert order(lab) == ["ADD one", "ADD two", "DEL two", "DEL one"]
    assert not netns.path(lab.plan.pod_namespace("node1", "web")).exists()
    assert runtime.pods(lab) == []


def test_a_failed_delete_keeps_the_pod_for_another_try(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1"))
    refuse(lab, "oneDEL")
    with pytest.raises(PluginError):
        runtime.remove(lab, pod)
    assert runtime.pods(lab) == [pod]
    refuse(lab, "")
    runtime.remove(lab, pod)
    assert runtime.pods(lab) == []


def test_a_plugin_that_is_not_there_is_named(lab: Lab) -> None:
    (lab.node_dir("node1") / "cni/bin/one").unlink()
    with pytest.raises(PluginError, match="plugin one cannot be executed: No such file"):
        runtime.add(lab, PodSpec("web", "node1"))


def test_a_pod_serves_and_its_processes_end_with_it(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1", ports=(80, 81)))
    for port in pod.spec.ports:
        assert probe.fetch(pod.netns, "127.0.0.1", port) == [probe.Answer("web", "127.0.0.1")]
    assert probe.datagram(pod.netns, "127.0.0.1", 80) == probe.Answer("web", "127.0.0.1")
    runtime.remove(lab, pod)
    assert list(lab.node_dir("node1").rglob("web*")) == []


def test_a_second_server_on_a_port_is_refused_in_words(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1", ports=(80,)))
    taken: Path = runtime.server_file(lab, pod, 80).with_name("web@second.pid")
    with pytest.raises(LabError, match="port 80: Address already in use"):
        runtime.serve_in(pod.netns, ("web", "node1"), [80], taken)


def test_a_pod_is_found_by_name_and_two_of_a_name_are_told_apart(lab: Lab) -> None:
    runtime.add(lab, PodSpec("web", "node1"))
    assert runtime.find(lab, "web").spec.node == "node1"
    for name, sentence in (("db", "no pod 'db'"), ("Web", "no pod 'Web'")):
        with pytest.raises(LabError, match=sentence):
            runtime.find(lab, name)
    with pytest.raises(LabError, match="has a pod 'web' already"):
        runtime.add(lab, PodSpec("web", "node1"))


def test_the_pods_behind_a_service_are_those_its_selector_names(lab: Lab) -> None:
    service = {
        "kind": "Service",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {
            "clusterIPs": [V4, V6],
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 8080, "targetPort": 80}],
        },
    }
    state.write_manifest(lab, service)
    web = PodSpec("web", "node1", labels={"app": "web", "tier": "front"})
    (pod, _) = controller.run(lab, [web, PodSpec("db", "node1", labels={"app": "db"})])
    found = list(state.manifests(lab, "EndpointSlice"))
    assert [s["addressType"] for s in found] == ["IPv4", "IPv6"]
    assert [s["endpoints"][0]["addresses"] for s in found] == [["10.244.1.7"], ["fd00:10:244:1::7"]]
    for piece in found:
        assert piece["ports"] == [{"name": "http", "protocol": "TCP", "port": 80}]
        assert [e["targetRef"]["name"] for e in piece["endpoints"]] == ["web"]
    controller.remove(lab, pod)
    assert [s["endpoints"] for s in state.manifests(lab, "EndpointSlice")] == [[], []]


def test_a_pod_without_an_address_of_a_family_is_in_no_slice_of_it(lab: Lab) -> None:
    pod = runtime.add(lab, PodSpec("web", "node1", labels={"app": "web"}))
    pod = replace(pod, result={"ips": [{"address": "10.244.1.7/32"}]})
    shop = {"metadata": {"name": "shop"}, "spec": {"selector": {"app": "web"}, "ports": []}}
    counts = {family: len(controller.endpoint_slice(shop, [pod], family)["endpoints"]) for family in Family}
    assert counts == {Family.V4: 1, Family.V6: 0}


PODS = """
kind: Pod
metadata: {name: web, labels: {tier: %s}}
spec: {nodeName: node1}
---
kind: Pod
metadata: {name: db}
spec: {nodeName: node1}
"""


def test_a_file_can_be_applied_again_and_only_what_it_changes_is_replaced(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "pods.yaml"

    def apply(tier: str) -> dict[str, str]:
        file.write_text(PODS % tier)
        return {applied.pod.spec.name: applied.what for applied in controller.apply(lab, file)}

    assert apply("front") == {"web": "made", "db": "made"}
    before = {pod.spec.name: pod.container_id for pod in runtime.pods(lab)}
    assert apply("front") == {"web": "unchanged", "db": "unchanged"}
    assert apply("back") == {"web": "replaced", "db": "unchanged"}
    after = {pod.spec.name: pod.container_id for pod in runtime.pods(lab)}
    assert (before["web"] != after["web"], before["db"] == after["db"]) == (True, True)
    assert runtime.find(lab, "web").spec.labels == {"tier": "back"}


def test_a_pod_whose_add_never_finished_is_made_anew(lab: Lab, tmp_path: Path) -> None:
    pod = runtime.add(lab, PodSpec("db", "node1"))
    state.write_json(lab.node_dir("node1") / "pods/db.json", asdict(replace(pod, result=None)))
    file = tmp_path / "pods.yaml"
    file.write_text(PODS % "front")
    assert [applied.what for applied in controller.apply(lab, file)] == ["made", "replaced"]


V4, V6 = "10.96.0.5", "fd00:10:96::5"


def service(policy: str, *addresses: str) -> dict[str, Any]:
    spec = {"ipFamilyPolicy": policy, "clusterIP": addresses[0], "clusterIPs": list(addresses)}
    return {"kind": "Service", "metadata": {"name": "shop"}, "spec": spec}


@pytest.mark.parametrize(
    ("policy", "families", "kept"),
    [
        ("PreferDualStack", [Family.V4, Family.V6], [V4, V6]),
        ("PreferDualStack", [Family.V6], [V6]),
        ("PreferDualStack", [Family.V4], [V4]),
        ("RequireDualStack", [Family.V4, Family.V6], [V4, V6]),
    ],
)
def test_a_service_has_the_families_that_it_may_and_the_lab_has(
    policy: str, families: list[Family], kept: list[str]
) -> None:
    spec = controller.service_object(service(policy, V4, V6), families)["spec"]
    assert (spec["clusterIP"], spec["clusterIPs"]) == (kept[0], kept)


@pytest.mark.parametrize(
    ("document", "lacking"),
    [
        (service("RequireDualStack", V4, V6), "IPv4"),
        (service("SingleStack", V4), "IPv4"),
        (service("PreferDualStack", V4), "IPv4"),
    ],
)
def test_a_service_that_needs_a_family_which_the_lab_lacks_is_refused(
    document: dict[str, Any], lacking: str
) -> None:
    with pytest.raises(LabError, match=f"service 'shop' needs {lacking}, which the lab has not"):
        controller.service_object(document, [Family.V6])


def test_a_cluster_address_that_is_none_is_said() -> None:
    with pytest.raises(LabError, match=r"service 'shop': clusterIPs: '10\.96' does not"):
        controller.service_object(service("SingleStack", "10.96"), [Family.V4])
