"""What podwire relies on of the Kubernetes API, held by our server and by a real one: lists and watches.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import time

import pytest

from tests.kubeapi.client import KubeClient, Refused
from tests.kubeapi.objects import Json, lease, names, refused, service, version

TIMEOUT: Json = {"timeoutSeconds": 30}


# Lists


def test_a_list_says_its_version_and_its_kind_once(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space))
    found = cluster.list("services", namespace=space)
    assert (found["kind"], found["apiVersion"]) == ("ServiceList", "v1")
    assert version(found) >= version(made)
    assert found["items"] == [{k: v for k, v in made.items() if k not in ("kind", "apiVersion")}]


def test_pages_are_of_one_moment(cluster: KubeClient, space: str) -> None:
    for number in range(5):
        cluster.create(lease(f"lease-{number}", space))
    first = cluster.list("leases", namespace=space, limit=2)
    assert names(first) == ["lease-0", "lease-1"]
    assert first["metadata"]["remainingItemCount"] == 3
    cluster.delete("leases", "lease-3", namespace=space)
    cluster.create(lease("lease-9", space))
    second = cluster.list("leases", namespace=space, limit=2, continue_=first["metadata"]["continue"])
    third = cluster.list("leases", namespace=space, limit=2, continue_=second["metadata"]["continue"])
    assert names(second) + names(third) == ["lease-2", "lease-3", "lease-4"]
    assert version(first) == version(second) == version(third)
    assert "continue" not in third["metadata"]


def test_a_list_of_an_exact_version_is_as_it_was_then(cluster: KubeClient, space: str) -> None:
    cluster.create(lease("old", space))
    then = cluster.list("leases", namespace=space)["metadata"]["resourceVersion"]
    cluster.create(lease("new", space))
    exact = {"resourceVersion": then, "resourceVersionMatch": "Exact"}
    assert names(cluster.list("leases", namespace=space, **exact)) == ["old"]
    least = {"resourceVersion": then, "resourceVersionMatch": "NotOlderThan"}
    assert version(cluster.list("leases", namespace=space, **least)) >= int(then)


def test_a_version_of_the_future_is_a_timeout(cluster: KubeClient, space: str) -> None:
    future = {"resourceVersion": "999999999", "resourceVersionMatch": "NotOlderThan"}
    status = refused(504, "Timeout", cluster.list, "leases", namespace=space, **future)
    assert [c["reason"] for c in status["details"]["causes"]] == ["ResourceVersionTooLarge"]
    assert status["details"]["retryAfterSeconds"] == 1


SELECTIONS = (
    ("app=web", ["a"]),
    ("app==web,tier=front", ["a"]),
    ("app!=web", ["b", "c"]),
    ("app in (web, db)", ["a", "b"]),
    ("app notin (web)", ["b", "c"]),
    ("app", ["a", "b"]),
    ("!app", ["c"]),
    ("!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name", ["a", "c"]),
)


@pytest.mark.parametrize(("selector", "wanted"), SELECTIONS, ids=[s for s, _ in SELECTIONS])
def test_labels_select(cluster: KubeClient, space: str, selector: str, wanted: list[str]) -> None:
    cluster.create(service("a", space, app="web", tier="front"))
    cluster.create(service("b", space, **{"app": "db", "service.kubernetes.io/headless": ""}))
    cluster.create(service("c", space))
    assert names(cluster.list("services", namespace=space, labelSelector=selector)) == wanted


def test_fields_select(cluster: KubeClient, space: str) -> None:
    for name in ("a", "b"):
        cluster.create(service(name, space))
    assert names(cluster.list("services", fieldSelector=f"metadata.name=a,metadata.namespace={space}")) == [
        "a"
    ]
    assert names(cluster.list("services", namespace=space, fieldSelector="metadata.name!=a")) == ["b"]
    query = {"fieldSelector": "spec.sessionAffinity=None"}
    refused(400, "BadRequest", cluster.list, "services", namespace=space, **query)


# Watches


def test_a_watch_goes_on_from_a_list(cluster: KubeClient, space: str) -> None:
    cluster.create(lease("before", space))
    since = cluster.list("leases", namespace=space)["metadata"]["resourceVersion"]
    with cluster.watch("leases", namespace=space, resourceVersion=since, **TIMEOUT) as watch:
        made = cluster.create(lease("mine", space))
        assert watch.next() == ("ADDED", made)
        changed = cluster.patch("leases", "mine", {"spec": {"holderIdentity": "node-2"}}, namespace=space)
        assert watch.next() == ("MODIFIED", changed)
        cluster.delete("leases", "mine", namespace=space)
        kind, last = watch.next()
        assert (kind, last["spec"]) == ("DELETED", changed["spec"])
        assert version(last) > version(changed)


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}], ids=["without-version", "version-0"])
def test_a_watch_without_a_version_begins_with_what_is_there(
    cluster: KubeClient, space: str, query: dict[str, str]
) -> None:
    made = {name: cluster.create(lease(name, space)) for name in ("a", "b")}
    with cluster.watch("leases", namespace=space, **query, **TIMEOUT) as watch:
        events = [watch.next(), watch.next()]
        assert {kind for kind, _ in events} == {"ADDED"}
        assert {obj["metadata"]["name"]: obj for _, obj in events} == made
        more = cluster.create(lease("c", space))
        assert watch.next() == ("ADDED", more)


def test_what_leaves_a_selection_is_deleted_and_what_comes_is_added(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space))
    query: Json = {"labelSelector": "!headless", "resourceVersion": str(version(made)), **TIMEOUT}
    with cluster.watch("services", namespace=space, **query) as watch:
        cluster.create(service("other", space, headless=""))
        left = cluster.patch("services", "web", {"metadata": {"labels": {"headless": ""}}}, namespace=space)
        kind, obj = watch.next()
        assert (kind, obj["metadata"]["name"]) == ("DELETED", "web")
        assert version(obj) == version(left)
        assert "headless" not in obj["metadata"].get("labels", {})
        back = cluster.patch("services", "web", {"metadata": {"labels": {"headless": None}}}, namespace=space)
        assert watch.next() == ("ADDED", back)


def test_one_object_can_be_watched_by_its_name(cluster: KubeClient, space: str) -> None:
    selector = "metadata.name=mine"
    with cluster.watch("leases", namespace=space, fieldSelector=selector, **TIMEOUT) as watch:
        cluster.create(lease("other", space))
        made = cluster.create(lease("mine", space))
        assert watch.next() == ("ADDED", made)


def test_a_watch_ends_after_its_time_with_a_bookmark_before(cluster: KubeClient, space: str) -> None:
    made = cluster.create(service("web", space))
    query: Json = {"timeoutSeconds": 3, "allowWatchBookmarks": "true"}
    query["resourceVersion"] = version(made)
    start = time.monotonic()
    with cluster.watch("services", **query) as watch:
        kind, obj = watch.next(bookmarks=True)
        assert (kind, obj["kind"], obj["apiVersion"]) == ("BOOKMARK", "Service", "v1")
        assert version(obj) >= version(made)
        assert obj["metadata"].keys() <= {"resourceVersion", "creationTimestamp"}
        with pytest.raises(EOFError):  # and not an IncompleteRead
            watch.next()
    assert 2.5 < time.monotonic() - start < 6


def test_a_forgotten_version_is_gone(cluster: KubeClient) -> None:
    try:
        with cluster.watch("leases", resourceVersion="1", timeoutSeconds=2) as watch:
            status = next((obj for kind, obj in watch if kind == "ERROR"), None)
        if status is None:
            pytest.skip("this server remembers its first version")
    except Refused as error:
        status = error.status
    assert (status["kind"], status["code"]) == ("Status", 410)
    assert status["reason"] in ("Expired", "Gone")


def test_a_version_that_is_no_number_is_refused(cluster: KubeClient) -> None:
    with pytest.raises(Refused) as caught:
        cluster.watch("leases", resourceVersion="soon", **TIMEOUT)
    assert caught.value.code in (400, 422)
