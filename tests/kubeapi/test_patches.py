"""The directives of strategic merge patches and the paths of JSON patches, which kubectl sends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kubeapi import patches
from tests.kubeapi.status import ApiError

OLD: dict[str, Any] = {
    "metadata": {"finalizers": ["a", "b"], "labels": {"app": "web"}},
    "spec": {"ports": [{"port": 80, "name": "one"}, {"port": 81, "name": "two"}], "type": "ClusterIP"},
}


def ports(patch: Any) -> list[int]:
    return [p["port"] for p in patches.strategic(OLD, {"spec": patch}, "Service")["spec"]["ports"]]


def test_elements_are_merged_added_and_removed_by_their_key() -> None:
    assert ports({"ports": [{"port": 81, "name": "new"}, {"port": 82}]}) == [80, 81, 82]
    assert ports({"ports": [{"$patch": "delete", "port": 80}]}) == [81]
    assert ports({"ports": [{"port": 90}, {"$patch": "replace"}]}) == [90]


def test_an_order_is_kept() -> None:
    order = {"$setElementOrder/ports": [{"port": 81}, {"port": 80}]}
    assert ports(order) == [81, 80]
    assert ports({**order, "ports": [{"port": 80, "name": "new"}]}) == [81, 80]


def test_an_element_without_its_key_is_refused() -> None:
    with pytest.raises(ApiError, match="merge key: port"):
        ports({"ports": [{"name": "new"}]})


def test_values_are_added_and_removed() -> None:
    def finalizers(patch: Any) -> Any:
        return patches.strategic(OLD, {"metadata": patch})["metadata"]["finalizers"]

    assert finalizers({"finalizers": ["b", "c"]}) == ["a", "b", "c"]
    assert finalizers({"$deleteFromPrimitiveList/finalizers": ["a"]}) == ["b"]


def test_a_map_can_be_replaced_or_reduced() -> None:
    replaced = patches.strategic(OLD, {"metadata": {"$patch": "replace", "labels": {"b": "c"}}})
    assert replaced["metadata"] == {"labels": {"b": "c"}}
    reduced = patches.strategic(OLD, {"spec": {"$retainKeys": ["type"], "type": "ExternalName"}})
    assert reduced["spec"] == {"type": "ExternalName"}


def test_the_lists_of_an_endpoint_slice_are_replaced() -> None:
    old = {"ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}]}
    patch = {"ports": [{"port": 81}], "endpoints": []}
    assert patches.strategic(old, patch, "EndpointSlice") == patch


def test_json_patches_add_move_copy_and_remove() -> None:
    operations = [
        {"op": "add", "path": "/list/1", "value": "new"},
        {"op": "add", "path": "/list/-", "value": "last"},
        {"op": "copy", "from": "/list/0", "path": "/copied"},
        {"op": "move", "from": "/old", "path": "/moved"},
        {"op": "remove", "path": "/gone"},
    ]
    old = {"list": [1, 2], "old": {"a": 1}, "gone": None}
    wanted = {"list": [1, "new", 2, "last"], "copied": 1, "moved": {"a": 1}}
    assert patches.json_patch(old, operations) == wanted
    assert old == {"list": [1, 2], "old": {"a": 1}, "gone": None}


@pytest.mark.parametrize("operation", [{"op": "remove", "path": "/none"}, {"op": "jump", "path": "/a"}])
def test_a_json_patch_that_leads_nowhere_is_refused(operation: dict[str, str]) -> None:
    with pytest.raises(ApiError) as caught:
        patches.json_patch({"a": 1}, [operation])
    assert caught.value.code == 422
