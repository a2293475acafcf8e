"""What a node leaves behind in the API goes, and what others have there stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.kube import claims
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi
from tests.node.test_claims import NAMESPACE, lease
from tests.node.world import podwire

OURS = {"podwire.io/tunnel-address": "192.168.50.11", "podwire.io/tunnel-mac": "02:00:00:00:00:01"}
THEIRS = {"node.alpha.kubernetes.io/ttl": "0", "not-podwire.io/x": "y"}


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with running.start(tls=False) as server:
        yield server


@pytest.fixture
def api(server: KubeApi) -> Iterator[KubeApi]:
    """Two nodes with annotations and claims, and leases of others."""
    for name in ("node1", "node2"):
        metadata = {"name": name, "annotations": OURS | THEIRS}
        server.create({"apiVersion": "v1", "kind": "Node", "metadata": metadata})
    for name, holder in (
        ("podwire-10-244-1-0-24", "node1"),
        ("podwire-fd00-10-244-1---64", "node1"),
        ("podwire-10-244-2-0-24", "node2"),
        ("podwire-leader", "node1"),
    ):
        server.create(lease(name, holder, "u"))
    plain = lease("node1", "node1", "u")
    del plain["metadata"]["labels"]
    server.create(plain)
    yield server
    server.clear()
    for plural, namespace in (("nodes", "default"), ("leases", NAMESPACE)):
        for item in server.list(plural)["items"]:
            server.delete(plural, item["metadata"]["name"], namespace=namespace)


def leave(api: KubeApi, tmp_path: Path, *words: str, node: str = "node1") -> tuple[int, str, str]:
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
    places = ["--socket", str(tmp_path / "none.sock"), "--node-name", node]
    return podwire("cleanup", "--kubernetes", "--kubeconfig", str(kubeconfig), *places, *words)


def annotations(api: KubeApi, node: str) -> dict[str, str]:
    found: dict[str, str] = api.get("nodes", node)["metadata"]["annotations"]
    return found


def names(api: KubeApi) -> set[str]:
    return {item["metadata"]["name"] for item in api.list("leases", namespace=NAMESPACE)["items"]}


LINES = """\
removed annotations podwire.io/tunnel-address, podwire.io/tunnel-mac of node node1
removed lease podwire-10-244-1-0-24
removed lease podwire-fd00-10-244-1---64
"""


def test_annotations_and_claims_of_this_node_go_and_no_others(api: KubeApi, tmp_path: Path) -> None:
    before = names(api)
    dry = leave(api, tmp_path, "--dry-run")
    assert dry == (0, LINES.replace("removed", "would remove"), "")
    assert (names(api), annotations(api, "node1")) == (before, OURS | THEIRS)

    assert leave(api, tmp_path) == (0, LINES, "")
    assert annotations(api, "node1") == THEIRS
    assert annotations(api, "node2") == OURS | THEIRS
    assert names(api) == {"podwire-10-244-2-0-24", "podwire-leader", "node1"}
    assert leave(api, tmp_path) == (0, "nothing of podwire's was found for node node1\n", "")


def test_claims_go_over_several_pages(api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.kube.leave.PAGE", 1)
    assert leave(api, tmp_path)[1] == LINES
    assert claims.PAGE > 1


def test_claims_of_a_node_that_is_gone_go_too(api: KubeApi, tmp_path: Path) -> None:
    api.delete("nodes", "node1")
    status, out, err = leave(api, tmp_path)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "removed lease podwire-10-244-1-0-24"
    assert out.splitlines()[-1] == "note: there is no node node1"


def test_what_the_server_refuses_is_a_sentence_and_the_others_go(api: KubeApi, tmp_path: Path) -> None:
    api.fail(403, verb="patch", path="/nodes/")
    status, out, err = leave(api, tmp_path)
    assert (status, out) == (1, LINES.partition("\n")[2])
    assert err.startswith(
        "podwire: cannot remove annotations podwire.io/tunnel-address, podwire.io/tunnel-mac"
    )
    assert len(err.splitlines()) == 1


def test_a_server_that_does_not_answer_is_a_sentence(api: KubeApi, tmp_path: Path) -> None:
    api.down()
    try:
        status, out, err = leave(api, tmp_path)
    finally:
        api.up()
    assert (status, out) == (1, "")
    assert err == "podwire: GET /api/v1/nodes/node1: Connection refused\n"


def test_the_condition_is_told_of_and_stays(api: KubeApi, tmp_path: Path) -> None:
    condition = {"type": "NetworkUnavailable", "status": "False", "reason": "PodwireIsUp"}
    body: dict[str, Any] = {"status": {"conditions": [condition]}}
    api.patch("nodes", "node1", body, part="status")
    _, out, _ = leave(api, tmp_path, "-o", "json")
    (note,) = json.loads(out)["notes"]
    assert note.startswith("condition NetworkUnavailable of node node1 stays")
    assert api.get("nodes", "node1")["status"]["conditions"] == [condition]
