"""What a user must fix is told as Events: of the right object, by one node, and not too often."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from node.backends.hops import Site, Underlay, Way
from node.kube import upkeep
from node.kube.api import Api, ApiError, Credentials
from node.kube.claims import cluster_ranges
from node.kube.events import Bucket, Events, Finding, Subject, finding, message, teller
from node.kube.upkeep import Upkeep, View, pause
from node.peers import Peers
from node.sources.objects import ObjectError, parse
from proxy.frontends import frontends
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    Snapshot,
)
from proxy.table import FrontendTable
from proxy.topology import Place
from tests.kubeapi import running
from tests.kubeapi.running import KubeApi

ME = Subject("Node", "node1")
WEB = Subject("Service", "web", "shop")
NODES = [f"node{i}" for i in range(1, 6)]
NOW = datetime(2026, 5, 1, 10, 0, 0, tzinfo=UTC)


def about(sentence: str, me: str = "node1") -> Finding | None:
    return finding(sentence, me)


def wrong(document: dict[str, Any]) -> str:
    with pytest.raises(ObjectError) as caught:
        parse(document)
    return str(caught.value)


def service_document(name: str = "web", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop"}
    whole = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]} | spec
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": whole}


def test_a_field_of_a_service_that_is_wrong_is_told_of_the_service_by_one() -> None:
    left_out: list[str] = []
    parse(service_document(externalIPs=["127.0.0.1"]), left_out)
    for sentence in (*left_out, wrong(service_document(clusterIP="10.96.0.256"))):
        assert about(sentence) == Finding(WEB, "InvalidField", shared=True)


def test_a_field_of_a_slice_that_is_wrong_is_told_of_the_slice() -> None:
    labels = {"kubernetes.io/service-name": "web"}
    document = {"kind": "EndpointSlice", "metadata": {"name": "web-x", "namespace": "shop", "labels": labels}}
    sentence = wrong({**document, "addressType": "IPv5"})
    assert about(sentence) == Finding(Subject("EndpointSlice", "web-x", "shop"), "InvalidField", shared=True)


def test_a_conflict_is_told_of_the_service_that_gets_nothing() -> None:
    table = FrontendTable()
    port = ServicePort("http", Protocol.TCP, 80)
    for name in ("api", "web"):
        service = Service(
            ObjectName("shop", name), (f"10.96.0.{len(name)}",), (port,), external_ips=("192.0.2.1",)
        )
        slice_ = EndpointSlice(
            ObjectName("shop", f"{name}-x"),
            service.name,
            Family.V4,
            (EndpointPort("http", Protocol.TCP, 8080),),
            (Endpoint("10.244.1.2", "node1"),),
        )
        table.replace(service.name, frontends(service, (slice_,), Place("node1", "")))
    sentences = table.conflicts()
    assert sentences
    assert {about(s) for s in sentences} <= {
        Finding(WEB, "AddressConflict", shared=True),
        Finding(Subject("Service", "api", "shop"), "AddressConflict", shared=True),
    }


def problems_of(nodes: dict[str, Node], me: str, underlay: Underlay) -> tuple[str, ...]:
    peers = Peers(me)
    peers.take(nodes, Site(nodes.get(me, Node(me)), underlay))
    return peers.problems


def test_overlapping_pod_ranges_are_told_by_the_two_and_by_nobody_else() -> None:
    nodes = {n: Node(n, ("10.244.1.0/24",), ("192.168.50.11",)) for n in ("node1", "node2")}
    nodes["node3"] = Node("node3", ("10.244.3.0/24",), ("192.168.50.13",))
    lan = Underlay((Way(ip_network("192.168.50.0/24"), 2),))
    told = {}
    for me in nodes:
        told[me] = [finding(p, me) for p in problems_of(nodes, me, lan)]
    assert told["node1"] == [Finding(ME, "PodCIDRConflict")]
    assert told["node2"] == [Finding(Subject("Node", "node2"), "PodCIDRConflict")]
    assert told["node3"] == [None]


def test_a_node_without_addresses_is_told_by_one_and_a_way_that_we_lack_by_us() -> None:
    nodes = {
        "node2": Node("node2", ("10.244.2.0/24",)),
        "node3": Node("node3", ("10.244.3.0/24",), ("192.168.60.13",)),
    }
    assert [about(p) for p in problems_of(nodes, "node1", Underlay())] == [
        Finding(Subject("Node", "node2"), "NoInternalIP", shared=True),
        Finding(ME, "NoRouteToPods"),
    ]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("node node1 has no podCIDR yet: pods cannot be added", Finding(ME, "NoPodCIDR")),
        ("node node1 gets no podCIDR: of the 4 /24 blocks", Finding(ME, "NoPodCIDR")),
        ("node node1: its podCIDR was 10.244.1.0/24 and is 10.244.7.0/24", Finding(ME, "PodCIDRChanged")),
        ("node node1: podCIDR 192.168.4.0/24 is not inside", Finding(ME, "PodCIDRMismatch")),
        ("Node node1: podCIDRs: 'all' is not a CIDR", Finding(ME, "InvalidField")),
        ("Node node2: podCIDRs: 'all' is not a CIDR", None),
        ("no route to 10.244.2.0/24 via 192.168.50.12: File exists", Finding(ME, "NoRouteToPods")),
        ("Service shop/web: its health check port 30000 cannot be opened on the node's addresses: in use",
         Finding(ME, "HealthCheckPortUnavailable")),
        ("service shop/web:http is not served: Invalid argument", Finding(ME, "ServiceNotProgrammed")),
        ("the last change is not in the kernel: No buffer space available", Finding(ME, "SyncFailed")),
        ("MTU 1200 is too small for IPv6: pods get 1280 (RFC 8200)", Finding(ME, "NetworkProblem")),
        ("what was known at 10:00:00 counts, as the API server fails: GET /api/v1/nodes: refused", None),
        ("the state of 2026-05-01 10:00 counts until the API server answers: refused", None),
        ("nothing is known of the cluster: no answer yet", None),
    ],
)  # fmt: skip
def test_what_is_wrong_on_this_node_is_told_of_its_node(sentence: str, expected: Finding | None) -> None:
    assert about(sentence) == expected


@given(st.text(max_size=60))
def test_every_sentence_is_about_something_or_nobodys_event(sentence: str) -> None:
    found = about(sentence)
    assert found is None or found.reason.isalnum()


@given(st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=60))
def test_a_message_fits(sentences: list[str]) -> None:
    assert 0 < len(message(sentences).encode()) <= 1024


def test_a_message_says_how_many_there_are_besides() -> None:
    sentences = [f"no route to 10.{i}.0.0/16: it is there already" for i in range(200)]
    text = message(sentences)
    assert text.startswith("no route to 10.0.0.0/16: it is there already; no route to 10.1.0.0/16")
    shown = text.count("no route")
    assert text.endswith(f"; and {200 - shown} more") and shown > 10
    assert message(["one", "two"]) == "one; two"


def test_one_node_tells_of_a_service_and_another_only_when_that_one_is_gone() -> None:
    subjects = [Subject("Service", f"web{i}", "shop") for i in range(500)]
    before = {s: teller(s, NODES) for s in subjects}
    assert before == {s: teller(s, reversed(NODES)) for s in subjects}
    assert min(Counter(before.values()).values()) > 50
    after = {s: teller(s, NODES[:-1]) for s in subjects}
    assert all(after[s] == before[s] for s in subjects if before[s] != "node5")


def test_there_are_only_so_many_at_once() -> None:
    clock = Clock()
    bucket = Bucket(clock, burst=3, seconds=10)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    clock.time = 10.0
    assert [bucket.take() for _ in range(2)] == [True, False]
    clock.time = 1000.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with running.start(tls=False) as server:
        yield server


@pytest.fixture
def cluster(server: KubeApi) -> Iterator[KubeApi]:
    yield server
    server.clear()
    for plural in ("events", "nodes", "services", "leases"):
        for item in server.list(plural)["items"]:
            meta = item["metadata"]
            server.delete(plural, meta["name"], namespace=meta.get("namespace", "default"))


@pytest.fixture
def api(server: KubeApi, tmp_path: Path) -> Api:
    return Api(Credentials(server.kubeconfig(tmp_path / "kubeconfig")))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(api: Api, clock: Clock) -> Events:
    return Events(api, "node1", clock, lambda: NOW)


def told(cluster: KubeApi) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.list("events")["items"]
    return found


def test_an_event_of_our_node_is_where_kubectl_describe_looks(
    cluster: KubeApi, events: Events, clock: Clock
) -> None:
    sentence = "node node1 has no podCIDR yet: pods cannot be added"
    events.tell([sentence], NODES)
    assert told(cluster) == []  # it may be over in a moment
    clock.time = 10.0
    events.tell([sentence], NODES)
    (event,) = told(cluster)
    assert event["metadata"]["namespace"] == "default"
    assert event["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node1", "uid": "node1"}
    assert {k: event[k] for k in ("type", "reason", "message", "count", "source", "reportingComponent")} == {
        "type": "Warning",
        "reason": "NoPodCIDR",
        "message": sentence,
        "count": 1,
        "source": {"component": "podwire", "host": "node1"},
        "reportingComponent": "podwire",
    }
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2026-05-01T10:00:00Z"


def test_what_goes_on_is_counted_up_every_ten_minutes(cluster: KubeApi, api: Api, clock: Clock) -> None:
    times = iter([NOW] * 2 + [NOW.replace(hour=11)] * 2 + [NOW.replace(hour=12)] * 9)
    events = Events(api, "node1", clock, lambda: next(times))
    for clock.time in (0.0, 10.0, 20.0, 300.0, 609.0, 611.0):
        events.tell(["MTU 1200 is too small"], NODES)
    (event,) = told(cluster)
    assert (event["count"], event["firstTimestamp"]) == (2, "2026-05-01T10:00:00Z")
    assert event["lastTimestamp"] > event["firstTimestamp"]
    cluster.delete("events", event["metadata"]["name"])  # an hour later
    clock.time = 4000.0
    events.tell(["MTU 1200 is too small"], NODES)
    assert [e["count"] for e in told(cluster)] == [1]


def test_after_a_restart_the_same_event_is_counted_up(cluster: KubeApi, api: Api) -> None:
    for _ in range(2):
        clock = Clock()
        events = Events(api, "node1", clock, lambda: NOW)
        for clock.time in (0.0, 10.0, 620.0):
            events.tell(["MTU 1200 is too small"], NODES)
    assert [e["count"] for e in told(cluster)] == [3]


def test_a_service_is_told_of_by_one_node_with_its_uid(cluster: KubeApi, api: Api) -> None:
    uid = cluster.create(service_document(externalIPs=["127.0.0.1"]))["metadata"]["uid"]
    left_out: list[str] = []
    parse(service_document(externalIPs=["127.0.0.1"]), left_out)
    cluster.reset_counters()
    for node in NODES:
        clock = Clock()
        events = Events(api, node, clock, lambda: NOW)
        for clock.time in (0.0, 10.0):
            events.tell(left_out, NODES)
    (event,) = told(cluster)
    assert event["metadata"]["namespace"] == "shop"
    assert event["involvedObject"]["uid"] == uid
    assert event["source"]["host"] == teller(WEB, NODES)
    assert cluster.counters().verbs["create"] == 1


def test_what_is_over_before_it_was_told_is_not_told(cluster: KubeApi, events: Events, clock: Clock) -> None:
    for clock.time, sentences in ((0.0, ["MTU"]), (5.0, []), (11.0, ["MTU"]), (20.0, ["MTU"])):
        events.tell(sentences, NODES)
    assert told(cluster) == []


def test_what_comes_and_goes_is_repeated_no_sooner_than_what_stays(
    cluster: KubeApi, events: Events, clock: Clock
) -> None:
    for second in range(0, 640, 10):
        clock.time = float(second)
        events.tell(["MTU 1200"] if second % 40 else [], NODES)
    assert [e["count"] for e in told(cluster)] == [2]


def test_a_storm_of_problems_is_a_trickle_of_events(cluster: KubeApi, events: Events, clock: Clock) -> None:
    sentences = [f"service shop/web{i}:http gets no 192.0.2.1:80: service shop/a has it" for i in range(100)]
    events.tell(sentences, ["node1"])
    for clock.time in (10.0, 11.0, 12.0, 30.0):
        events.tell(sentences, ["node1"])
    assert len(told(cluster)) == 25 + 2


def test_what_the_server_refuses_is_dropped_and_logged_once(
    cluster: KubeApi, events: Events, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.fail(403, verb="create")
    events.tell(["MTU 1200", "no route to 10.0.0.0/8"], NODES)
    clock.time = 10.0
    events.tell(["MTU 1200", "no route to 10.0.0.0/8"], NODES)
    assert caplog.text.count("not written") == 1


def test_a_server_in_trouble_is_left_alone_and_asked_again(
    cluster: KubeApi, events: Events, clock: Clock
) -> None:
    events.tell(["MTU 1200"], NODES)
    clock.time = 10.0
    cluster.fail(429, times=1, retry_after=7)
    with pytest.raises(ApiError) as caught:
        events.tell(["MTU 1200"], NODES)
    assert caught.value.retry_after == 7.0
    events.tell(["MTU 1200"], NODES)
    assert len(told(cluster)) == 1


@pytest.mark.parametrize(
    ("failures", "after", "least", "most"),
    [(1, None, 1.0, 1.5), (3, None, 4.0, 6.0), (100, None, 60.0, 90.0), (1, 30.0, 30.0, 45.0)],
)
def test_failures_are_followed_by_longer_waits_and_never_less_than_asked_for(
    failures: int, after: float | None, least: float, most: float
) -> None:
    assert all(least <= pause(failures, after) <= most for _ in range(50))


def snapshot_of(cluster: KubeApi) -> Snapshot:
    found = (parse({"kind": "Node", **item}) for item in cluster.list("nodes")["items"])
    return Snapshot({}, {}, {n.name: n for n in found if isinstance(n, Node)})


def test_the_loop_gives_a_node_its_range_annotations_and_condition(
    cluster: KubeApi, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "BACK_OFF_SECONDS", (0.01, 0.05))
    addresses = [{"type": "InternalIP", "address": "192.168.50.11"}]
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}})
    cluster.patch("nodes", "node1", {"status": {"addresses": addresses}}, part="status")
    for verb in ("create", "patch"):
        cluster.fail(500, times=2, verb=verb)
        cluster.close(times=1, verb=verb)
    seen: list[Snapshot | None] = [None]
    done = threading.Event()
    view = View(lambda: seen[0], lambda: True, lambda: ())
    loop = Upkeep(api, "node1", view, cluster_ranges(("10.244.0.0/16",), (24, 64)))
    thread = threading.Thread(target=loop.run, args=(done,))
    thread.start()
    try:
        seen[0] = snapshot_of(cluster)
        loop.wake()
        wait_for(cluster, lambda node: bool(node["spec"].get("podCIDRs")))
        seen[0] = snapshot_of(cluster)
        loop.wake()
        wait_for(cluster, lambda node: bool(node["metadata"].get("annotations")))
        node = wait_for(cluster, lambda node: bool(node["status"].get("conditions")))
    finally:
        done.set()
        thread.join()
    assert node["status"]["conditions"][0]["type"] == "NetworkUnavailable"
    assert loop.problems == ()


def wait_for(cluster: KubeApi, condition: Any, seconds: float = 10.0) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while not condition(node := cluster.get("nodes", "node1")):
        assert time.monotonic() < end, node
    return node


def test_a_round_without_a_change_asks_for_nothing(cluster: KubeApi, api: Api) -> None:
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}})
    seen = snapshot_of(cluster)
    loop = Upkeep(api, "node1", View(lambda: seen, lambda: True, lambda: ()))
    loop.round()
    cluster.reset_counters()
    loop.round()
    assert not cluster.counters().verbs


def test_what_podwire_may_not_do_is_told(cluster: KubeApi, api: Api) -> None:
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}})
    seen = snapshot_of(cluster)
    cluster.fail(403, verb="patch", times=1)
    loop = Upkeep(api, "node1", View(lambda: seen, lambda: True, lambda: ()))
    with pytest.raises(ApiError):
        loop.round()
    (sentence,) = loop.problems
    assert sentence.startswith(
        "node node1: the API server refuses what podwire keeps there: PATCH /api/v1/nodes/node1"
    )
    loop.round()
    assert loop.problems == ()
