"""Figures under kube-proxy's names, so that dashboards made for it go on working."""

from __future__ import annotations

import re
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from netlink.family import Family
from node.kube.events import RULES
from node.metrics import Followed, Metrics, Questions, without_local_endpoints
from node.store import Pending, Store
from proxy.frontends import frontends
from proxy.model import (
    EMPTY,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)
from proxy.topology import Place
from tests.node.fake_l7 import busy, stats

OPERATIONS = Path(__file__).resolve().parents[2] / "docs/operations.md"
NAME = ObjectName("shop", "web")
KUBE_PROXYS = (
    "kubeproxy_sync_proxy_rules_duration_seconds_bucket",
    "kubeproxy_sync_full_proxy_rules_duration_seconds_bucket",
    "kubeproxy_sync_partial_proxy_rules_duration_seconds_bucket",
    "kubeproxy_network_programming_duration_seconds_bucket",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
)


def figures(metrics: Metrics) -> dict[str, float]:
    lines = (line for line in metrics.page().decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def piece(triggered: float = 0.0, address: str = "10.0.0.2") -> EndpointSlice:
    ports = (EndpointPort("", Protocol.TCP, 8080),)
    endpoints = (Endpoint(address, "node2"),)
    return EndpointSlice(ObjectName("shop", "web-1"), NAME, Family.V4, ports, endpoints, triggered)


def service(internal: TrafficPolicy = TrafficPolicy.CLUSTER) -> Service:
    ports = (ServicePort("", Protocol.TCP, 80, 30080),)
    return Service(NAME, ("10.96.0.1",), ports, internal, TrafficPolicy.LOCAL)


def test_all_names_of_kube_proxy_that_mean_something_here_are_there() -> None:
    metrics = Metrics()
    metrics.healthz.labels(200).inc()
    metrics.livez.labels(200).inc()
    metrics.services(Store(), (), 0)
    names = {name.partition("{")[0] for name in figures(metrics)}
    assert set(KUBE_PROXYS) <= names


def test_changes_are_counted_and_wait_until_they_are_taken() -> None:
    store, metrics = Store(), Metrics()
    store.replace({("Service", "shop/web"): service(), ("EndpointSlice", "shop/web-1"): piece()})
    metrics.services(store, (), 0)
    found = figures(metrics)
    prefix = "kubeproxy_sync_proxy_rules"
    assert found[f"{prefix}_service_changes_pending"] == found[f"{prefix}_service_changes_total"] == 1
    assert found[f"{prefix}_endpoint_changes_pending"] == found[f"{prefix}_endpoint_changes_total"] == 1
    store.take(0)
    metrics.services(store, (), 0)
    metrics.services(store, (), 0)
    found = figures(metrics)
    assert found[f"{prefix}_service_changes_pending"] == found[f"{prefix}_endpoint_changes_pending"] == 0
    assert found[f"{prefix}_endpoint_changes_total"] == 1


def test_programming_latency_counts_from_when_the_endpoints_changed() -> None:
    metrics, now = Metrics(), time.time()
    metrics.synced(
        Pending(EMPTY, frozenset(), frozenset(), time.monotonic(), (now - 3.5, now + 60)), 0.1, full=True
    )
    found = figures(metrics)
    name = "kubeproxy_network_programming_duration_seconds"
    assert found[f"{name}_count"] == 2
    assert 3.5 <= found[f"{name}_sum"] < 5
    assert found["kubeproxy_sync_full_proxy_rules_duration_seconds_count"] == 1
    assert found["kubeproxy_sync_partial_proxy_rules_duration_seconds_count"] == 0


def test_only_changes_since_the_start_and_only_new_ones_have_a_trigger_time() -> None:
    store, later = Store(), time.time() + 10
    key = ("EndpointSlice", "shop/web-1")
    store.replace({key: piece(triggered=1000.0)})
    first = store.take(0)
    store.replace({key: piece(later, "10.0.0.3")})
    second = store.take(0)
    store.replace({key: piece(later, "10.0.0.4")})
    third = store.take(0)
    assert first and second and third
    assert (first.triggered, second.triggered, third.triggered) == ((), (later,), ())


def test_services_without_an_endpoint_here_are_counted_by_policy() -> None:
    found = frontends(service(TrafficPolicy.LOCAL), (piece(),), Place("node1"))
    assert without_local_endpoints(found) == {"internal": {"shop/web"}, "external": {"shop/web"}}
    found = frontends(service(), (piece(),), Place("node1"))
    assert without_local_endpoints(found) == {"internal": set(), "external": {"shop/web"}}
    assert without_local_endpoints(frontends(service(), (piece(),), Place("node2"))) == {
        "internal": set(),
        "external": set(),
    }


def test_what_others_know_is_asked_at_each_scrape() -> None:
    metrics, asked = Metrics(), []

    def followed() -> dict[str, Followed]:
        asked.append(1)
        return {"Node": Followed(1, 7, 3, 0.0, 12.5), "Service": Followed(0, 0, 9, 31.0, None)}

    metrics.ask(Questions(followed, lambda: 1000.0, lambda: ("one", "two"), lambda: 0.005))
    assert not asked, "not before somebody wants to know"
    found = figures(metrics)
    assert len(asked) == 1
    assert found['podwire_api_lists_total{kind="Node"}'] == 1
    assert found['podwire_api_watches_total{kind="Node"}'] == 7
    assert found['podwire_api_failures_total{kind="Service"}'] == 9
    assert found['podwire_api_failing_seconds{kind="Service"}'] == 31
    assert found['podwire_api_silence_seconds{kind="Node"}'] == 12.5
    assert 'podwire_api_silence_seconds{kind="Service"}' not in found, "it was never heard of"
    assert found["podwire_saved_state_timestamp_seconds"] == 1000
    assert found["podwire_problems"] == 2
    assert found["podwire_gather_seconds"] == 0.005


def test_a_folder_as_the_source_has_no_figures_of_an_api_server() -> None:
    metrics = Metrics()
    metrics.ask(Questions(dict, lambda: None, tuple, lambda: 0.005))
    names = figures(metrics)
    assert "podwire_problems" in names
    assert not [name for name in names if name.startswith(("podwire_api", "podwire_saved"))]


def test_all_figures_are_described_as_they_are_exposed() -> None:
    metrics = Metrics()
    metrics.healthz.labels(200).inc()
    metrics.livez.labels(200).inc()
    metrics.addresses.labels("10.0.0.0/24", "IPv4", "used").set(1)
    metrics.services(Store(), (), 0)
    every = {"Node": Followed(1, 1, 1, 1.0, 1.0)}
    metrics.ask(Questions(lambda: every, lambda: 1.0, tuple, float))
    metrics.proxy(stats(busy()))
    exposed: dict[str, tuple[str, frozenset[str], str]] = {}
    for family in text_string_to_metric_families(metrics.page().decode()):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            name = sample.name if family.type == "counter" else family.name
            labels = frozenset(sample.labels) - {"le"}
            exposed[name] = (family.type, labels, family.documentation.rstrip("."))
    assert {d.name: (d.kind, frozenset(d.labels), d.meaning) for d in metrics.described()} == exposed


def test_alerts_ask_for_figures_that_there_are() -> None:
    histograms = ("_bucket", "_count", "_sum")
    known = {
        d.name + s for d in Metrics().described() for s in (histograms if d.kind == "histogram" else ("",))
    }
    expressions = re.findall(r"^  expr: (.*)$", OPERATIONS.read_text(), re.MULTILINE)
    asked = {name for e in expressions for name in re.findall(r"\b(?:podwire|kubeproxy|process)_\w+", e)}
    assert asked
    assert asked <= known


def test_every_reason_of_an_event_is_documented() -> None:
    rows = set(re.findall(r"^\| ([A-Z]\w+) \| ", OPERATIONS.read_text(), re.MULTILINE))
    assert {rule.reason for rule in RULES} | {"PodCIDRConflict"} <= rows
