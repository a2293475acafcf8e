"""The Kubernetes API as the source: whatever goes wrong, what is known ends as what the API has."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.kube.api import Api, ApiError, Credentials
from node.sources import kubernetes
from node.sources.reflector import PAGE
from proxy.model import EMPTY, ObjectName
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi
from tests.node.following import DEADLINE, Follower, following, node, piece, service, truth

WEB, DB = ObjectName("shop", "web"), ObjectName("shop", "db")


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with running.start(bookmark_seconds=0.2) as server:
        for document in (
            service("web"),
            service("db"),
            piece("web-1", "web", "10.244.1.2", "10.244.2.2"),
            piece("db-1", "db", "10.244.2.3"),
            node("node1", "10.244.1.0/24", "192.0.2.1"),
            node("node2", "10.244.2.0/24", "192.0.2.2"),
        ):
            server.create(document)
        yield server


@pytest.fixture
def follower(api: KubeApi, tmp_path: Path) -> Iterator[Follower]:
    with following(api, tmp_path) as found:
        found.converges()
        found.keep_stable("db")
        yield found


def change(api: KubeApi, number: int = 9) -> None:
    """Change an endpoint, so that there is something to learn."""
    api.patch(
        "endpointslices", "web-1", {"endpoints": [{"addresses": [f"10.244.1.{number}"]}]}, namespace="shop"
    )


def test_what_is_added_changed_and_deleted_is_known_soon(api: KubeApi, follower: Follower) -> None:
    change(api)
    api.create(service("new"))
    api.delete("nodes", "node2")
    follower.converges()
    api.delete("services", "new", namespace="shop")
    follower.converges()
    assert follower.lists() == 3, "each kind was listed once, and only watched from then on"


def test_long_lists_come_in_pages(api: KubeApi, tmp_path: Path) -> None:
    count = PAGE + 20
    for number in range(count):
        api.create(piece(f"many-{number}", "many", "10.244.9.9"))
    api.reset_counters()
    api.fail(410, verb="watch", path="endpointslices", times=1)
    with following(api, tmp_path) as follower:
        api.wait_for(lambda c: c.open_watches == 3)
        follower.wait(lambda found: len(found.slices.get(ObjectName("shop", "many"), ())) == count, "all")
    lists = [line.target for line in api.requests("list", "endpointslices")]
    assert all(f"limit={PAGE}" in target for target in lists)
    assert "resourceVersion=0" in lists[0], "the server's cache is good enough for a start"
    assert "resourceVersion" not in lists[1], "but what it has may be too old now"
    assert "continue=" in lists[2]


def test_headless_services_and_those_of_other_proxies_are_not_even_sent(api: KubeApi, tmp_path: Path) -> None:
    api.create(service("headless", clusterIP="None"))
    foreign = service("foreign")
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    api.create(foreign)
    api.reset_counters()
    with following(api, tmp_path) as follower:
        follower.wait(lambda found: found.services.keys() == {WEB, DB}, "both services")
        targets = [line.target for line in api.requests() if "test" in line.agent]
    for line in [t for t in targets if "services?" in t and "continue" not in t]:
        assert "spec.clusterIP" in line
        assert "service-proxy-name" in line
        assert "headless" in line
    assert all("service-proxy-name" in t for t in targets if "endpointslices?" in t)


def test_a_server_that_cannot_select_by_cluster_ip_is_asked_without(api: KubeApi, tmp_path: Path) -> None:
    api.create(service("headless", clusterIP="None"))
    api.fail(400, verb="list", path="fieldSelector")
    with following(api, tmp_path) as follower:
        follower.wait(lambda found: found.services.keys() == {WEB, DB}, "both services")


def test_nothing_is_delivered_before_everything_is_known(api: KubeApi, tmp_path: Path) -> None:
    api.hang(verb="list", path="endpointslices")
    with following(api, tmp_path) as follower:
        api.wait_for(lambda c: c.open_watches == 2)
        assert follower.look(0.3) is EMPTY, "services without endpoints would refuse everybody"
        api.clear()
        follower.converges()
        assert follower.taken == 1


@pytest.mark.parametrize("form", ["event", "status"])
def test_after_410_gone_everything_is_listed_anew(api: KubeApi, follower: Follower, form: str) -> None:
    api.set(expired_as=form)
    api.down()
    api.up()
    api.cut_watches()
    api.hang(verb="watch", times=3)
    api.delete("services", "web", namespace="shop")
    api.create(service("other"))
    api.compact()
    api.clear()
    follower.converges()


def test_a_server_that_starts_again_is_watched_again_without_a_list(api: KubeApi, follower: Follower) -> None:
    api.restart()
    change(api)
    follower.converges()
    assert follower.lists() == 3


def test_a_server_that_forgot_its_history_is_listed_anew(api: KubeApi, follower: Follower) -> None:
    api.down()
    api.compact()
    api.up()
    change(api)
    follower.converges()


@pytest.mark.parametrize("code", [429, 500, 503])
@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_server_that_refuses_for_a_while_is_asked_again(
    api: KubeApi, tmp_path: Path, code: int, verb: str
) -> None:
    wanted = truth(api)
    api.fail(code, verb=verb, times=4)
    with following(api, tmp_path) as follower:
        follower.converges(wanted)
        change(api)
        follower.converges()


def test_a_server_that_asks_to_wait_is_not_asked_before(api: KubeApi, tmp_path: Path) -> None:
    wanted = truth(api)
    api.reset_counters()
    api.fail(429, verb="list", path="/nodes", times=1, retry_after=1)
    with following(api, tmp_path) as follower:
        follower.converges(wanted)
    first, second = (line.at for line in api.requests("list", "/nodes"))
    assert second - first >= 1.0


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_half_an_object_is_none(api: KubeApi, tmp_path: Path, verb: str) -> None:
    change(api)
    wanted = truth(api)
    api.half(verb=verb, times=3)
    with following(api, tmp_path) as follower:
        follower.converges(wanted)


@pytest.mark.parametrize("partial", [False, True])
def test_a_stream_that_stalls_is_noticed(api: KubeApi, follower: Follower, partial: bool) -> None:
    api.stall_watches(partial=partial)
    change(api)
    follower.converges()
    assert follower.lists() == 3, "it is taken up where it stopped"


def test_a_server_that_hangs_is_left(api: KubeApi, follower: Follower) -> None:
    api.cut_watches()
    api.hang(verb="watch", times=3)
    change(api)
    follower.converges()


def test_a_watch_that_is_cut_all_the_time_is_taken_up_where_it_stopped(
    api: KubeApi, follower: Follower
) -> None:
    api.watch_life(0.06)
    end = time.monotonic() + 5
    number = 0
    while time.monotonic() < end:
        number += 1
        change(api, number % 200 + 20)
        follower.look()
    follower.converges()
    api.watch_life(None)
    watches = sum(r.state.watches for r in follower.reflectors.values())
    assert watches > 60
    assert follower.lists() == 3
    assert follower.cluster.problems == ()


def test_bookmarks_move_on_the_version_of_what_does_not_change(api: KubeApi, follower: Follower) -> None:
    for number in range(10):
        change(api, number)
    nodes = follower.reflectors["Node"].state
    newest = str(api.counters().version)
    follower.wait(lambda _: nodes.version == newest, "a bookmark of nodes")
    api.compact()
    api.cut_watches()
    api.wait_for(lambda c: c.open_watches == 3)
    change(api, 99)
    follower.converges()
    assert follower.lists() == 3, "nodes need no list although their last change is forgotten"


def test_a_new_certificate_of_the_same_authority_is_no_matter(api: KubeApi, follower: Follower) -> None:
    api.new_certificate()
    api.restart()
    change(api)
    follower.converges()


def test_a_new_authority_counts_once_it_is_in_the_kubeconfig(
    api: KubeApi, follower: Follower, tmp_path: Path
) -> None:
    api.new_certificate(new_authority=True)
    api.restart()
    nodes = follower.reflectors["Node"].state
    follower.wait(lambda _: "certificate" in nodes.error, "its certificate is refused")
    change(api)
    api.kubeconfig(tmp_path / "kubeconfig")
    follower.converges()


def test_a_token_that_expires_is_read_again(api: KubeApi, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(api.token)
    credentials = Credentials(api.kubeconfig(tmp_path / "kubeconfig", token_file=token))
    with following(api, tmp_path, credentials) as follower:
        follower.converges()
        api.set_tokens("fresh")
        api.token = "fresh"
        api.cut_watches()
        nodes = follower.reflectors["Node"].state
        follower.wait(lambda _: "401" in nodes.error, "the old token is refused")
        change(api)
        token.write_text("fresh")
        follower.converges()


def test_a_token_of_an_exec_plugin_is_asked_for_again(api: KubeApi, tmp_path: Path) -> None:
    token, plugin = tmp_path / "token", tmp_path / "plugin"
    token.write_text(api.token)
    plugin.write_text(
        "#!/bin/sh\n"
        """echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","""
        f""""status":{{"token":"'"$(cat {token})"'"}}}}'\n"""
    )
    plugin.chmod(0o755)
    path = api.kubeconfig(tmp_path / "kubeconfig")
    version = "client.authentication.k8s.io/v1"
    command = f"exec: {{apiVersion: {version}, command: {plugin}, interactiveMode: Never}}"
    path.write_text(path.read_text().replace(f"token: {api.token}", command))
    with following(api, tmp_path, Credentials(path)) as follower:
        follower.converges()
        api.set_tokens("fresh")
        api.token = "fresh"
        token.write_text("fresh")
        api.cut_watches()
        change(api)
        follower.converges()


def test_a_rotated_service_account_token_counts_although_the_clock_jumped_back(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    token = tmp_path / "token"
    token.write_text(api.token)
    host, port = api.url.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(api.ca_file))

    class Yesterday(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) - datetime.timedelta(days=1)

    with following(api, tmp_path, Credentials(None)) as follower:
        follower.converges()
        clock = SimpleNamespace(datetime=Yesterday, timedelta=datetime.timedelta)
        monkeypatch.setattr(incluster_config, "datetime", clock)
        api.set_tokens("fresh")
        api.token = "fresh"
        token.write_text("fresh")
        api.cut_watches()
        change(api)
        follower.converges()


def test_a_page_that_came_too_late_starts_the_list_anew(api: KubeApi, tmp_path: Path) -> None:
    for number in range(PAGE + 1):
        api.create(piece(f"many-{number}", "many", "10.244.9.9"))
    wanted = truth(api)
    api.fail(410, verb="watch", path="endpointslices", times=1)
    api.fail(410, verb="list", path="continue=", times=1)
    with following(api, tmp_path) as follower:
        api.wait_for(lambda c: c.open_watches == 3)
        follower.converges(wanted)
        assert follower.reflectors["EndpointSlice"].state.lists == 2


def test_an_object_that_cannot_be_read_counts_as_it_was_and_is_named(
    api: KubeApi, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server would refuse it; one with a newer API may have values that are unknown here."""
    before = follower.snapshot.services[WEB]
    raw = b'{"type":"MODIFIED","object":{"metadata":{"name":"web","namespace":"shop","resourceVersion":"7"},'
    raw += b'"spec":{"clusterIP":"10.96.0.1","ports":[{"port":99999}]}}}'
    follower.reflectors["Service"]._events([raw])
    assert follower.look(0).services[WEB] == before
    assert (
        "Service shop/web: spec.ports[0].port 99999 is not a port (1 to 65535)" in follower.cluster.problems
    )
    follower.reflectors["Service"].state.version = None
    api.cut_watches()
    follower.wait(lambda _: follower.cluster.problems == (), "the problem is gone with the object")


def test_a_fault_of_our_own_does_not_end_the_following(
    api: KubeApi, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = follower.reflectors["EndpointSlice"]
    with monkeypatch.context() as patched:
        patched.setattr(pieces, "_deliver", lambda _: {}["a fault"])
        change(api)
        follower.wait(lambda _: "cannot be followed" in pieces.state.error, "the fault is noticed")
    follower.converges()


def test_while_the_server_is_away_the_saved_state_counts_then_a_diff(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "PATIENCE", 0.2)
    with following(api, tmp_path) as follower:
        follower.converges()
        known = follower.snapshot
    api.down()
    with following(api, tmp_path) as follower:
        follower.wait(lambda found: found == known, "the saved state")
        assert "counts until the API server answers: GET" in follower.cluster.problems[0]
        assert "Connection refused" in follower.cluster.problems[0]
        assert not follower.cluster.complete
        follower.keep_stable("db")
        api.up()
        change(api)
        follower.converges()
        assert follower.cluster.complete
        assert follower.cluster.problems == ()


def test_without_server_and_without_saved_state_nothing_is_known_and_that_is_said(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "PATIENCE", 0.2)
    api.down()
    with following(api, tmp_path) as follower:
        follower.wait(lambda _: bool(follower.cluster.problems), "a sentence")
        assert "nothing is known of the cluster" in follower.cluster.problems[0]
        assert follower.look(0) is EMPTY
        api.up()
        follower.converges()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "cannot be used"),
        ("contexts: 3", "cannot be used"),
        ("{", "cannot be used"),
        ("current-context: x\ncontexts: []", "Expected object with name x"),
    ],
)
def test_a_wrong_kubeconfig_is_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content)
    with pytest.raises(ApiError, match=sentence) as found:
        Api(Credentials(path)).get("/version")
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_an_override_is_asked_instead_of_the_server_in_the_kubeconfig(api: KubeApi, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "kubeconfig")
    path.write_text(path.read_text().replace(api.url, "https://192.0.2.99:6443"))
    began = time.monotonic()
    assert b"gitVersion" in Api(Credentials(path, api.url)).get("/version")
    assert time.monotonic() - began < DEADLINE
