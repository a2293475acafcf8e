"""Fixtures: a cluster's API, ours and a real one, and a namespace in it for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.kubeapi import real, running
from tests.kubeapi.client import KubeClient
from tests.kubeapi.running import KubeApi

_numbers = itertools.count()


@pytest.fixture(scope="session", params=["stand-in", "kube-apiserver"])
def cluster(request: pytest.FixtureRequest) -> Iterator[KubeClient]:
    """An API server; what it is asked here has to be answered the same by both."""
    if request.param == "stand-in":
        with running.start() as api:
            yield api
        return
    if why := real.missing():
        pytest.skip(why)
    with real.start() as client:
        yield client


@pytest.fixture
def space(cluster: KubeClient) -> str:
    """The name of a namespace of the test's own."""
    name = f"space-{next(_numbers)}"
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
def node(cluster: KubeClient) -> Iterator[str]:
    """The name of a Node of the test's own."""
    name = f"node-{next(_numbers)}"
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    cluster.delete("nodes", name)


@pytest.fixture(scope="module")
def shared() -> Iterator[KubeApi]:
    """A server that a module's tests share: `api` sets it back between them."""
    with running.start() as api:
        yield api


@pytest.fixture
def api(shared: KubeApi) -> Iterator[KubeApi]:
    """The server without faults, and counting from nothing."""
    shared.reset_counters()
    yield shared
    shared.clear()
    shared.up()
    shared.cut_watches()
    shared.set_tokens(shared.token)
    shared.set(bookmark_seconds=60, expired_as="event", watch_life=None, gzip=False)
    shared.wait_for(lambda c: not c.open_watches)
