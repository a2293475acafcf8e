"""That the faults of our server are the ones that they say."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from tests.kubeapi import running
from tests.kubeapi.client import KubeClient, Refused
from tests.kubeapi.objects import lease, refused, version
from tests.kubeapi.running import KubeApi

LEASES = "/apis/coordination.k8s.io/v1/leases"


def label(api: KubeApi, value: str) -> int:
    """Change the Namespace default; return the version."""
    return version(api.patch("namespaces", "default", {"metadata": {"labels": {"value": value}}}))


# Answers


@pytest.mark.parametrize("code", [429, 500, 503, 410])
def test_so_many_requests_fail_and_the_next_does_not(api: KubeApi, code: int) -> None:
    api.fail(code, times=2, verb="list", path="leases", retry_after=1)
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            api.list("leases")
        assert caught.value.code == code
        assert caught.value.status["details"] == {"retryAfterSeconds": 1}
    api.list("leases")
    assert api.counters().codes == {str(code): 2, "200": 1}


def test_other_requests_do_not_meet_the_fault(api: KubeApi) -> None:
    api.fail(500, verb="list", path="^/api/v1/services")
    api.list("leases")
    api.get("namespaces", "default")
    refused(500, "InternalError", api.list, "services")
    api.clear()
    api.list("services")


def test_the_header_says_when_to_come_back(api: KubeApi) -> None:
    api.fail(429, times=1, retry_after=7)
    connection = api.connect()
    connection.request("GET", LEASES, headers=api.credentials)
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Retry-After")) == (429, "7")
    connection.close()


def test_a_failure_can_be_without_a_status_object(api: KubeApi) -> None:
    api.fail(429, times=1, plain=True, message="Too many requests, please try again later.")
    assert api.request("GET", LEASES) == (429, b"Too many requests, please try again later.\n")


def test_half_an_answer_ends_in_the_middle(api: KubeApi) -> None:
    api.half(verb="list")
    with pytest.raises(http.client.IncompleteRead) as caught:
        api.list("namespaces")
    assert caught.value.partial.startswith(b'{"kind":"NamespaceList"') and caught.value.expected
    api.list("namespaces")


def test_a_closed_connection_answers_nothing(api: KubeApi) -> None:
    api.close(verb="list")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        api.list("namespaces")


def test_what_hangs_answers_nothing_until_cleared(api: KubeApi) -> None:
    api.hang(times=1, verb="list")
    connection = api.connect(timeout=0.3)
    connection.request("GET", LEASES, headers=api.credentials)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()
    api.wait_for(lambda c: c.connections == 0)
    api.list("leases")


def test_an_answer_can_be_late(api: KubeApi) -> None:
    api.delay(0.3, times=1)
    start = time.monotonic()
    api.list("leases")
    assert time.monotonic() - start >= 0.3


def test_a_large_list_is_compressed_where_asked_for(api: KubeApi) -> None:
    data = {"text": "x" * 200_000}
    configmap = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "data": data}
    api.create(configmap)
    api.set(gzip=True)
    code, body = api.request("GET", api.path("configmaps"), headers={"Accept-Encoding": "gzip"})
    assert (code, body[:2]) == (200, b"\x1f\x8b") and len(body) < 20_000
    api.delete("configmaps", "large")


# Watches


def test_a_cut_watch_has_no_end_and_a_clean_one_has(api: KubeApi) -> None:
    with api.watch("leases") as watch:
        assert api.cut_watches() == 1
        with pytest.raises((http.client.IncompleteRead, OSError)):
            watch.next()
    with api.watch("leases") as watch:
        assert api.cut_watches(clean=True) == 1
        with pytest.raises(EOFError):
            watch.next()
    api.wait_for(lambda c: c.open_watches == 0)


def test_watches_live_no_longer_than_is_said(api: KubeApi) -> None:
    api.watch_life(0.3)
    for _ in range(2):
        start = time.monotonic()
        with api.watch("leases") as watch, pytest.raises((http.client.IncompleteRead, OSError)):
            watch.next()
        assert 0.2 < time.monotonic() - start < 3
    assert api.counters().verbs["watch"] == 2


def test_half_an_event_ends_in_the_middle(api: KubeApi) -> None:
    api.half(verb="watch")
    with api.watch("namespaces") as watch, pytest.raises((http.client.IncompleteRead, ValueError)):
        watch.next()


@pytest.mark.parametrize("partial", [False, True])
def test_a_stalled_watch_is_open_and_silent(api: KubeApi, partial: bool) -> None:
    since = label(api, "before")
    with api.watch("namespaces", resourceVersion=since) as watch:
        assert api.stall_watches(partial=partial) == 1
        label(api, f"after-{partial}")
        watch._connection.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            watch.next()
        assert api.counters().open_watches == 1
    with api.watch("namespaces", resourceVersion=since) as watch:
        assert watch.next()[0] == "MODIFIED"


def test_a_watch_that_hangs_begins(api: KubeApi) -> None:
    api.hang(verb="watch", times=1)
    with api.watch("namespaces") as watch:
        watch._connection.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            watch.next()


def test_bookmarks_come_as_often_as_is_said(api: KubeApi) -> None:
    api.set(bookmark_seconds=0.1)
    with api.watch("leases", resourceVersion=label(api, "now"), allowWatchBookmarks="true") as watch:
        first, second = watch.next(bookmarks=True), watch.next(bookmarks=True)
        assert (first[0], second[0]) == ("BOOKMARK", "BOOKMARK")
        later = label(api, "later")  # of another kind: the bookmark's version goes on all the same
        for kind, obj in watch:
            assert kind == "BOOKMARK"
            if version(obj) == later:
                break


def test_a_watch_list_ends_its_beginning_with_a_bookmark(api: KubeApi) -> None:
    query = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
    }
    with api.watch("namespaces", **query) as watch:
        kind, obj = watch.next()
        while kind == "ADDED":
            kind, obj = watch.next(bookmarks=True)
        assert kind == "BOOKMARK"
        assert obj["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    api.set(watch_list=False)
    refused(422, "Invalid", api.watch, "namespaces", **query)


# History


@pytest.mark.parametrize("form", ["event", "status"])
def test_forgotten_versions_are_expired(api: KubeApi, form: str) -> None:
    since = label(api, f"old-{form}")
    label(api, f"new-{form}")
    api.compact()
    api.set(expired_as=form)
    if form == "status":
        refused(410, "Expired", api.watch, "namespaces", resourceVersion=since)
        return
    with api.watch("namespaces", resourceVersion=since) as watch:
        kind, status = watch.next()
        assert (kind, status["code"], status["reason"]) == ("ERROR", 410, "Expired")
        with pytest.raises(EOFError):
            watch.next()


def test_pages_of_a_forgotten_moment_are_expired(api: KubeApi) -> None:
    page = api.list("namespaces", limit=1)
    label(api, "paged")
    api.compact()
    token = page["metadata"]["continue"]
    refused(410, "Expired", api.list, "namespaces", limit=1, continue_=token)


def test_history_is_as_long_as_is_said() -> None:
    with running.start(tls=False, history=10) as api:
        versions = [label(api, str(number)) for number in range(30)]
        refused_as = [api.watch("namespaces", resourceVersion=v) for v in (versions[0], versions[-5])]
        kinds = [watch.next()[0] for watch in refused_as]
        for watch in refused_as:
            watch.close()
        assert kinds == ["ERROR", "MODIFIED"]


# The server itself


def test_a_server_that_is_down_refuses_and_comes_back_with_its_state(api: KubeApi) -> None:
    since = label(api, "down")
    with api.watch("namespaces", resourceVersion=since) as watch:
        api.down()
        with pytest.raises((http.client.IncompleteRead, OSError)):
            watch.next()
    with pytest.raises(ConnectionRefusedError):
        api.list("namespaces")
    api.up()
    assert version(api.get("namespaces", "default")) == since
    with api.watch("namespaces", resourceVersion=since) as watch:
        label(api, "up")
        assert watch.next()[0] == "MODIFIED"


def test_a_restart_can_forget_history(api: KubeApi) -> None:
    since = label(api, "one")
    label(api, "two")
    api.restart(forget=True)
    with api.watch("namespaces", resourceVersion=since) as watch:
        assert watch.next()[0] == "ERROR"


def test_tokens_can_change(api: KubeApi, tmp_path: Path) -> None:
    api.set_tokens("new")
    refused(401, "Unauthorized", api.list, "leases")
    KubeClient(api.url, "new", api.ca_file).list("leases")


def test_new_connections_get_the_new_certificate(api: KubeApi) -> None:
    def presented() -> bytes | None:
        connection = api.connect()
        try:
            sock = connection.sock
            assert isinstance(sock, ssl.SSLSocket)
            return sock.getpeercert(binary_form=True)
        finally:
            connection.close()

    before = presented()
    api.new_certificate()
    assert presented() != before
    stranger = KubeClient(api.url, api.token, api.ca_file)
    api.new_certificate(new_authority=True)
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.list("leases")
    api.list("leases")


def test_an_open_connection_outlives_the_change_of_the_certificate(api: KubeApi) -> None:
    with api.watch("namespaces", resourceVersion=label(api, "old")) as watch:
        api.new_certificate()
        label(api, "new")
        assert watch.next()[0] == "MODIFIED"


def test_the_server_runs_in_a_namespace(namespaces: Callable[[], str]) -> None:
    namespace = namespaces()

    def loopback() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_up(socket.if_nametoindex("lo")))

    netns.run(namespace, loopback)
    with running.start(namespace, listen="127.0.0.1:6443") as api:
        assert api.list("leases")["items"] == []
        api.namespace = None
        with pytest.raises(ConnectionRefusedError):  # not in ours
            api.list("leases")


# Load


def test_a_large_cluster_is_there_at_once_and_changes_by_itself() -> None:
    size = {"services": 1_000, "endpoints": 10, "nodes": 500}
    with running.start(generate=size) as api:
        nodes = api.list("nodes", limit=1)
        assert nodes["metadata"]["remainingItemCount"] == 499
        assert 9_000 < len(json.dumps(nodes["items"][0])) < 12_000
        slices = api.list("endpointslices")
        assert len(slices["items"]) == 1_000
        assert {len(s["endpoints"]) for s in slices["items"]} == {10}
        assert len({a for s in slices["items"] for e in s["endpoints"] for a in e["addresses"]}) == 10_000
        with api.watch("endpointslices", resourceVersion=str(version(slices))) as watch:
            api.churn(rate=1_000, seconds=0.5)
            changed = [watch.next() for _ in range(500)]
        assert {kind for kind, _ in changed} == {"MODIFIED"}
        assert len({obj["metadata"]["name"] for _, obj in changed}) == 500
        assert "endpoints.kubernetes.io/last-change-trigger-time" in changed[0][1]["metadata"]["annotations"]
        assert api.wait_for(lambda c: not c.churning).churned == 500
        before = {s["metadata"]["name"]: s["endpoints"] for s in slices["items"]}
        assert all(obj["endpoints"] != before[obj["metadata"]["name"]] for _, obj in changed)


def test_a_file_of_objects_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "objects.json"
    file.write_text(json.dumps({"kind": "List", "items": [lease("mine", "default")]}))
    with running.start(tls=False, load=file) as api:
        assert api.get("leases", "mine")["spec"] == {"holderIdentity": "node-1"}


def test_requests_are_counted_and_remembered(api: KubeApi) -> None:
    api.list("leases", limit=5)
    api.get("namespaces", "default")
    with api.watch("leases", labelSelector="!a"):
        counters = api.wait_for(lambda c: c.open_watches == 1)
    assert counters.verbs == {"list": 1, "get": 1, "watch": 1}
    assert counters.paths[f"list {LEASES}"] == 1
    assert counters.watches == [f"{LEASES}?watch=1&labelSelector=%21a"]
    lines = api.requests("list")
    assert [(line.target, line.code, line.agent) for line in lines] == [(f"{LEASES}?limit=5", 200, "test")]
    api.wait_for(lambda c: c.open_watches == 0)


def test_an_unknown_setting_is_refused_in_words(api: KubeApi) -> None:
    with pytest.raises(RuntimeError, match="there is no setting bookmarks"):
        api.set(bookmarks=1)
