"""What podwire relies on of the Kubernetes API, held by our server and by a real one: reads and writes.

https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import pytest

from tests.kubeapi.client import KubeClient, Refused
from tests.kubeapi.objects import Json, event, lease, names, piece, refused, service, version

# Objects


def test_the_server_sets_identity_version_and_time(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space))
    assert (made["kind"], made["apiVersion"]) == ("Service", "v1")
    assert {"uid", "resourceVersion", "creationTimestamp"} <= made["metadata"].keys()
    assert cluster.get("services", "web", namespace=space) == made


def test_a_service_gets_an_address_and_defaults(cluster: KubeClient, space: str) -> None:
    spec = cluster.create(service("web", space))["spec"]
    assert spec["clusterIPs"] == [spec["clusterIP"]] and spec["clusterIP"].startswith("10.")
    assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    wanted = {"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster"}
    assert wanted.items() <= spec.items()
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")


def test_a_name_is_generated_where_asked_for(cluster: KubeClient, space: str) -> None:
    obj = service("", space)
    obj["metadata"] = {"generateName": "web-", "namespace": space}
    name = cluster.create(obj)["metadata"]["name"]
    assert name.startswith("web-") and len(name) == len("web-") + 5


def test_what_is_there_cannot_be_created(cluster: KubeClient, space: str) -> None:
    cluster.create(lease("mine", space))
    status = refused(409, "AlreadyExists", cluster.create, lease("mine", space))
    assert status["details"] == {"name": "mine", "group": "coordination.k8s.io", "kind": "leases"}
    assert status["message"] == 'leases.coordination.k8s.io "mine" already exists'


def test_what_is_not_there_is_not_found(cluster: KubeClient, space: str) -> None:
    status = refused(404, "NotFound", cluster.get, "services", "none", namespace=space)
    assert status["details"] == {"name": "none", "kind": "services"}
    assert status["message"] == 'services "none" not found'
    refused(404, "NotFound", cluster.delete, "services", "none", namespace=space)
    refused(404, "NotFound", cluster.patch, "nodes", "none", {"metadata": {}})


def test_nothing_is_created_in_a_namespace_that_is_not_there(cluster: KubeClient) -> None:
    path = cluster.path("leases", namespace="nowhere")
    status = refused(404, "NotFound", cluster.call, "POST", path, lease("mine", "nowhere"))
    assert status["details"] == {"name": "nowhere", "kind": "namespaces"}


def test_a_name_has_to_be_one(cluster: KubeClient, space: str) -> None:
    status = refused(422, "Invalid", cluster.create, lease("Not_A_Name", space))
    assert [c["field"] for c in status["details"]["causes"]] == ["metadata.name"]


def test_a_wrong_token_is_unauthorized(cluster: KubeClient) -> None:
    stranger = KubeClient(cluster.url, "stranger", cluster.ca_file)
    refused(401, "Unauthorized", stranger.list, "services")


def test_nobody_in_particular_is_forbidden(cluster: KubeClient) -> None:
    nobody = KubeClient(cluster.url, "", cluster.ca_file)
    refused(403, "Forbidden", nobody.list, "services")


# Changes


def test_a_put_of_a_stale_version_is_a_conflict(cluster: KubeClient, space: str) -> None:
    first = cluster.create(lease("mine", space))
    second = cluster.update({**first, "spec": {"holderIdentity": "node-2"}})
    assert version(second) > version(first)
    stale = {**first, "spec": {"holderIdentity": "node-3"}}
    status = refused(409, "Conflict", cluster.update, stale)
    assert status["details"]["name"] == "mine"
    assert cluster.get("leases", "mine", namespace=space) == second


def test_a_lease_is_put_with_a_version_or_created(cluster: KubeClient, space: str) -> None:
    made = cluster.update(lease("mine", space))
    assert made["spec"] == {"holderIdentity": "node-1"}
    status = refused(422, "Invalid", cluster.update, lease("mine", space, "node-2"))
    assert [c["field"] for c in status["details"]["causes"]] == ["metadata.resourceVersion"]


def test_a_put_of_an_endpoint_slice_needs_no_version(cluster: KubeClient, space: str) -> None:
    refused(404, "NotFound", cluster.update, piece("web-1", space, "10.0.0.1"))
    made = cluster.create(piece("web-1", space, "10.0.0.1"))
    changed = cluster.update(piece("web-1", space, "10.0.0.2"))
    assert (made["metadata"]["generation"], changed["metadata"]["generation"]) == (1, 2)
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]


def test_a_change_of_nothing_writes_nothing(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space, app="web"))
    same = cluster.patch("services", "web", {"metadata": {"labels": {"app": "web"}}}, namespace=space)
    assert version(same) == version(made)


def test_a_patch_with_a_stale_version_is_a_conflict(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space))
    cluster.patch("services", "web", {"metadata": {"labels": {"a": "1"}}}, namespace=space)
    stale = {"metadata": {"resourceVersion": str(version(made)), "labels": {"a": "2"}}}
    refused(409, "Conflict", cluster.patch, "services", "web", stale, namespace=space)


def test_a_merge_patch_removes_what_is_null(cluster: KubeClient, space: str) -> None:
    cluster.create(service("web", space, a="1", b="2"))
    patch = {"metadata": {"labels": {"a": None, "c": "3"}}}
    changed = cluster.patch("services", "web", patch, namespace=space)
    assert changed["metadata"]["labels"] == {"b": "2", "c": "3"}


def test_a_json_patch_changes_what_it_names(cluster: KubeClient, space: str) -> None:
    cluster.create(service("web", space, a="1"))
    patch: list[Json] = [
        {"op": "test", "path": "/metadata/labels/a", "value": "1"},
        {"op": "add", "path": "/metadata/labels/b~1c", "value": "2"},
        {"op": "replace", "path": "/spec/ports/0/port", "value": 81},
    ]
    changed = cluster.patch("services", "web", patch, namespace=space, kind="json")
    assert changed["metadata"]["labels"] == {"a": "1", "b/c": "2"}
    assert [p["port"] for p in changed["spec"]["ports"]] == [81]
    patch[0]["value"] = "2"
    refused(422, "Invalid", cluster.patch, "services", "web", patch, namespace=space, kind="json")


def test_an_unknown_kind_of_patch_is_refused(cluster: KubeClient, space: str) -> None:
    cluster.create(service("web", space))
    path = cluster.path("services", "web", namespace=space)
    headers = {"Content-Type": "application/json"}
    refused(415, "UnsupportedMediaType", cluster.call, "PATCH", path, {}, headers=headers)


# Nodes


def test_conditions_merge_by_type_in_a_strategic_patch(cluster: KubeClient, node: str) -> None:
    def patch(*conditions: Json) -> list[tuple[str, str]]:
        body = {"status": {"conditions": conditions}}
        made = cluster.patch("nodes", node, body, kind="strategic", part="status")
        return sorted((c["type"], c["status"]) for c in made["status"]["conditions"])

    ready = {"type": "Ready", "status": "True"}
    assert patch({"type": "NetworkUnavailable", "status": "True"}, ready) == [
        ("NetworkUnavailable", "True"),
        ("Ready", "True"),
    ]
    assert patch({"type": "NetworkUnavailable", "status": "False"}) == [
        ("NetworkUnavailable", "False"),
        ("Ready", "True"),
    ]
    assert patch({"$patch": "delete", "type": "NetworkUnavailable"}) == [("Ready", "True")]


def test_taints_are_replaced_as_a_whole(cluster: KubeClient, node: str) -> None:
    for key in ("one", "two"):
        taints = [{"key": key, "effect": "NoSchedule"}]
        made = cluster.patch("nodes", node, {"spec": {"taints": taints}}, kind="strategic")
        assert [t["key"] for t in made["spec"]["taints"] if t["key"] in ("one", "two")] == [key]


def test_the_status_changes_by_its_own_path_only(cluster: KubeClient, node: str) -> None:
    patch = {
        "metadata": {"annotations": {"podwire.io/tunnel-address": "192.0.2.1"}},
        "spec": {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]},
        "status": {"phase": "Running"},
    }
    by_status = cluster.patch("nodes", node, patch, part="status")
    assert by_status["status"]["phase"] == "Running"
    assert "podCIDR" not in by_status["spec"]
    assert by_status["metadata"]["annotations"]["podwire.io/tunnel-address"] == "192.0.2.1"
    patch["status"] = {"phase": "Terminated"}
    by_itself = cluster.patch("nodes", node, patch)
    assert by_itself["status"]["phase"] == "Running"
    assert by_itself["spec"]["podCIDRs"] == ["10.244.9.0/24"]


def test_a_pod_range_is_set_once(cluster: KubeClient, node: str) -> None:
    ranges = ["10.244.1.0/24", "fd00:1::/64"]
    made = cluster.patch("nodes", node, {"spec": {"podCIDRs": ranges}})
    assert made["spec"] == {**made["spec"], "podCIDR": ranges[0], "podCIDRs": ranges}
    for other in ({"podCIDR": "10.244.2.0/24"}, {"podCIDR": None, "podCIDRs": None}):
        status = refused(422, "Invalid", cluster.patch, "nodes", node, {"spec": other})
        assert "spec.podCIDRs" in [c["field"] for c in status["details"]["causes"]]
    assert cluster.get("nodes", node)["spec"]["podCIDRs"] == ranges


def test_two_claims_of_one_version_have_one_winner(cluster: KubeClient, node: str) -> None:
    seen = cluster.get("nodes", node)["metadata"]["resourceVersion"]

    def claim(text: str) -> Json:
        spec = {"podCIDR": text, "podCIDRs": [text]}
        return cluster.patch("nodes", node, {"metadata": {"resourceVersion": seen}, "spec": spec})

    claim("10.244.1.0/24")
    refused(409, "Conflict", claim, "10.244.2.0/24")
    assert cluster.get("nodes", node)["spec"]["podCIDR"] == "10.244.1.0/24"


# Events and Leases


def test_an_event_is_created_and_counted_up(cluster: KubeClient, space: str) -> None:
    cluster.create(event(space))
    changed = cluster.patch("events", "something", {"count": 2}, namespace=space, kind="strategic")
    assert (changed["count"], changed["reason"]) == (2, "Unusable")
    selector = {"fieldSelector": "involvedObject.kind=Service,involvedObject.name=web,reason=Unusable"}
    assert names(cluster.list("events", namespace=space, **selector)) == ["something"]


def test_an_event_is_in_the_namespace_of_its_object(cluster: KubeClient, space: str) -> None:
    about_a_node = event(space, involvedObject={"kind": "Node", "name": "node-1"})
    status = refused(422, "Invalid", cluster.create, about_a_node)
    assert [c["field"] for c in status["details"]["causes"]] == ["involvedObject.namespace"]
    about_a_node["metadata"] = {"generateName": "node-1.", "namespace": "default"}
    made = cluster.create(about_a_node)
    cluster.delete("events", made["metadata"]["name"])


@pytest.mark.parametrize("text", ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123Z"])
def test_the_time_of_a_lease_has_six_digits(cluster: KubeClient, space: str, text: str) -> None:
    obj = lease("mine", space)
    obj["spec"]["renewTime"] = text
    refused(400, "BadRequest", cluster.create, obj)
    obj["spec"]["renewTime"] = "2026-01-02T03:04:05.123456Z"
    assert cluster.create(obj)["spec"] == obj["spec"]


def test_an_annotation_is_text(cluster: KubeClient, node: str) -> None:
    patch = {"metadata": {"annotations": {"podwire.io/tunnel-address": 5}}}
    with pytest.raises(Refused) as caught:
        cluster.patch("nodes", node, patch)
    assert caught.value.code in (400, 422)


# Deletion


def test_a_deletion_may_be_bound_to_an_identity_or_a_version(cluster: KubeClient, space: str) -> None:
    made = cluster.create(lease("mine", space))["metadata"]
    for wrong in ({"uid": "another"}, {"resourceVersion": "1"}):
        refused(409, "Conflict", cluster.delete, "leases", "mine", namespace=space, **wrong)
    right = {"uid": made["uid"], "resourceVersion": made["resourceVersion"]}
    cluster.delete("leases", "mine", namespace=space, **right)
    refused(404, "NotFound", cluster.get, "leases", "mine", namespace=space)


def test_an_object_with_finalizers_stays_until_they_are_gone(cluster: KubeClient, space: str) -> None:
    obj = lease("mine", space)
    obj["metadata"]["finalizers"] = ["example.com/wait"]
    cluster.create(obj)
    cluster.delete("leases", "mine", namespace=space)
    assert cluster.get("leases", "mine", namespace=space)["metadata"]["deletionTimestamp"]
    cluster.patch("leases", "mine", {"metadata": {"finalizers": None}}, namespace=space)
    refused(404, "NotFound", cluster.get, "leases", "mine", namespace=space)


# About the server


def test_health_and_version_need_no_token(cluster: KubeClient) -> None:
    stranger = KubeClient(cluster.url, "", cluster.ca_file)
    for path in ("/readyz", "/livez", "/healthz"):
        assert stranger.request("GET", path) == (200, b"ok")
    assert stranger.call("GET", "/version")["major"] == "1"


def test_discovery_names_what_is_there(cluster: KubeClient) -> None:
    groups = {g["name"] for g in cluster.call("GET", "/apis")["groups"]}
    assert {"discovery.k8s.io", "coordination.k8s.io"} <= groups
    found = cluster.call("GET", "/apis/discovery.k8s.io/v1")
    kinds = {r["name"]: r["kind"] for r in found["resources"]}
    assert (found["groupVersion"], kinds["endpointslices"]) == ("discovery.k8s.io/v1", "EndpointSlice")
    core = {r["name"] for r in cluster.call("GET", "/api/v1")["resources"]}
    assert {"services", "nodes", "nodes/status", "events", "namespaces", "configmaps"} <= core
    assert cluster.request("GET", "/apis/nothing.example.com/v1/things")[0] == 404
