"""What a Service asks of the L7 proxy, from either source: its policy, or a sentence and plain balancing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from node.kube.events import Finding, Subject, finding
from node.sources import saved
from node.sources.manifests import ManifestFolder
from node.sources.objects import ObjectError, decode, parse
from proxy.l7.annotation import parse as policy_of
from proxy.l7.policy import Balance, Policy
from proxy.model import Service
from tests.node.test_objects import service
from tests.proxy.l7.test_annotation import FULL, POLICY

OURS, F5S = "podwire.io/proxy", "asp.f5.com/config"
BAD = '{"health-check": {"interval": 2}}'
SENTENCE = (
    f"Service shop/web: metadata.annotations['{OURS}']: health-check.interval: 2 is not a time: it needs a "
    'unit, as in "500ms", "2s", "1m" or "1h": plain balancing'
)


def annotated(annotations: dict[str, Any] | None, **spec: Any) -> dict[str, Any]:
    document = service(**spec)
    document["metadata"]["annotations"] = annotations
    return document


def read(document: dict[str, Any]) -> tuple[Service, list[str]]:
    """Return what both ways of reading a document say, which is the same."""
    left_out: list[str] = []
    found = parse(document, left_out)
    assert isinstance(found, Service)
    decoded = decode("Service", json.dumps(document).encode())
    assert (decoded.value, decoded.problems, decoded.wrong) == (found, tuple(left_out), False)
    return found, left_out


@pytest.mark.parametrize("key", [OURS, F5S])
def test_a_service_asks_by_either_annotation(key: str) -> None:
    assert read(annotated({key: "{}", "other": "x"})) == (found := read(annotated({key: "{}"})))
    assert found[0].policy == Policy()
    assert read(annotated({key: json.dumps(FULL)}))[0].policy == POLICY


def test_of_two_annotations_ours_counts() -> None:
    found, left_out = read(annotated({F5S: '{"load-balancing-mode": "source"}', OURS: "{}"}))
    assert (found.policy, left_out) == (Policy(), [])
    found, left_out = read(annotated({F5S: "{}", OURS: BAD}))
    assert (found.policy, left_out) == (None, [SENTENCE])
    found, _ = read(annotated({F5S: '{"load-balancing-mode": "source"}'}))
    assert found.policy and found.policy.balance is Balance.SOURCE


@pytest.mark.parametrize("annotations", [None, {}, {"other": "{}"}, {OURS: None}])
def test_a_service_without_the_annotation_asks_for_nothing(annotations: Any) -> None:
    assert read(annotated(annotations)) == (parse(service()), [])
    assert read(annotated(annotations))[0].policy is None


@pytest.mark.parametrize("text", [BAD, "", "[]", "{", '{"a": 1}', "[" * 60_000, '{"a": "\\ud800"}'])
def test_a_bad_annotation_leaves_all_else_as_it_is(text: str) -> None:
    found, left_out = read(annotated({OURS: text}))
    assert found == parse(service())
    (sentence,) = left_out
    assert sentence.startswith(f"Service shop/web: metadata.annotations['{OURS}']: ")
    assert sentence.endswith(": plain balancing")
    assert sentence.isprintable()


def test_a_service_without_tcp_has_nothing_for_the_proxy() -> None:
    dns = {"name": "dns", "port": 53, "protocol": "UDP"}
    found, left_out = read(annotated({OURS: "{}"}, ports=[dns]))
    assert found.policy is None
    assert left_out == [
        f"Service shop/web: metadata.annotations['{OURS}']: spec.ports has none with TCP, and the proxy "
        "serves no other: plain balancing"
    ]
    both, left_out = read(annotated({OURS: "{}"}, ports=[dns, {"name": "tcp", "port": 53}]))
    assert (both.policy, left_out) == (Policy(), [])


def test_an_annotation_that_is_no_text_is_none_that_kubernetes_knows() -> None:
    with pytest.raises(ObjectError) as caught:
        parse(annotated({OURS: {"ip-protocol": "http"}}))
    assert str(caught.value).startswith(f"Service shop/web: metadata.annotations.{OURS}: Expected")


def test_a_bad_annotation_is_an_event_of_the_service_that_one_node_tells() -> None:
    assert finding(SENTENCE, "node1") == Finding(Subject("Service", "web", "shop"), "InvalidField", True)


def test_a_bad_annotation_in_a_folder_is_a_problem_that_goes_with_it(tmp_path: Path) -> None:
    folder = ManifestFolder(tmp_path)
    path = tmp_path / "web.json"
    path.write_text(json.dumps(annotated({OURS: BAD})))
    content = folder.read()
    assert content.problems == (f"web.json: {SENTENCE}",)
    assert content.objects == {("Service", "shop/web"): parse(service())}
    path.write_text(json.dumps(annotated({OURS: '{"fail": "closed"}'})))
    content = folder.read()
    assert content.problems == ()
    (found,) = content.objects.values()
    assert isinstance(found, Service)
    assert found.policy == policy_of('{"fail": "closed"}')


def test_the_saved_state_has_the_policy(tmp_path: Path) -> None:
    found, _ = read(annotated({OURS: json.dumps(FULL)}))
    saved.save(tmp_path, "node1", {("Service", "shop/web"): found}, 1.0)
    objects, _ = saved.load(tmp_path, "node1")
    again = objects["Service", "shop/web"]
    assert again == found
    assert hash(again) == hash(found)
