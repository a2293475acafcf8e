"""Figures for Prometheus: under kube-proxy's names where the meaning is the same, under podwire's otherwise.

Source of the names and buckets: Kubernetes documentation, "Kubernetes Metrics Reference"; SIG Scalability,
"Network programming latency SLO".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from node.store import Pending, Store
from proxy.frontends import Action, Frontend, Origin

SYNC_BUCKETS = tuple(0.0005 * 2**i for i in range(16))
"""Half a millisecond to 16 s: kube-proxy's begin at one and double as well."""
PROGRAMMING_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *map(float, range(1, 60)),
    *map(float, range(60, 120, 5)),
    *map(float, range(120, 301, 30)),
)


class Metrics:
    """The daemon's figures, in a registry of their own, with those of the process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def histogram(name: str, help: str, buckets: Iterable[float] = SYNC_BUCKETS) -> Histogram:
            return Histogram(name, help, buckets=tuple(buckets), registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(name, help, labels, registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=registry)

        sync = "kubeproxy_sync_proxy_rules"
        self._sync, self._full, self._partial = (
            histogram(
                f"kubeproxy_sync{kind}_proxy_rules_duration_seconds", f"Time to bring {what} to the kernel"
            )
            for kind, what in (("", "one change"), ("_full", "everything"), ("_partial", "what changed"))
        )
        self._programming = histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time from a change of endpoints in the cluster to its effect in the kernel",
            PROGRAMMING_BUCKETS,
        )
        self._latency = histogram(
            "podwire_change_duration_seconds", "Time from the oldest change's arrival to its effect"
        )
        self._last_sync = gauge(f"{sync}_last_timestamp_seconds", "When the last sync ended")
        self._last_queued = gauge(
            f"{sync}_last_queued_timestamp_seconds", "When the last sync that had to be done was asked for"
        )
        self._changes = {
            kind: (
                gauge(f"{sync}_{kind}_changes_pending", f"Changes of {what} not yet in the kernel"),
                counter(f"{sync}_{kind}_changes", f"Changes of {what}"),
            )
            for kind, what in (("service", "Services"), ("endpoint", "EndpointSlices"))
        }
        self._counted = (0, 0)
        self._lock = threading.Lock()  # several may ask at once
        self._no_local = gauge(
            f"{sync}_no_local_endpoints_total",
            "Service ports with policy Local, endpoints, and none of them on this node",
            "traffic_policy",
        )
        self.healthz = counter("kubeproxy_proxy_healthz", "Answers of /healthz", "code")
        self.livez = counter("kubeproxy_proxy_livez", "Answers of /livez", "code")
        self._refused = counter(
            f"{sync}_nftables_sync_failures", "Syncs that failed; nothing of them is in the kernel"
        )
        self._failing = gauge("podwire_sync_failures", "Syncs that failed in a row")
        self._elements = gauge("podwire_map_elements", "Map elements in the kernel")
        self._frontends = gauge("podwire_frontends", "Addresses and ports that are served")
        self.addresses = gauge(
            "podwire_pod_addresses",
            "Pod addresses of a podCIDR or pool: how many there are, and what became of them",
            *("range", "family", "kind"),
        )
        self.pods = gauge("podwire_pods", "Pod attachments in the ledger")

    def synced(self, pending: Pending, seconds: float, *, full: bool) -> None:
        """Note a sync that took so long."""
        self._sync.observe(seconds)
        (self._full if full else self._partial).observe(seconds)
        now = time.time()
        self._last_sync.set(now)
        waited = time.monotonic() - pending.since
        self._last_queued.set(now - waited)
        self._latency.observe(waited)
        for triggered in pending.triggered:
            self._programming.observe(max(0.0, now - triggered))
        self._failing.set(0)

    def failed(self) -> None:
        """Note a sync that failed."""
        self._refused.inc()
        self._failing.inc()

    def services(self, store: Store, frontends: Collection[Frontend], elements: int) -> None:
        """Set what can be told at any moment."""
        with self._lock:
            totals = store.service_changes, store.endpoint_changes
            for (pending, total), waiting, before, now in zip(
                self._changes.values(), store.waiting, self._counted, totals, strict=True
            ):
                pending.set(waiting)
                total.inc(now - before)
            self._counted = totals
        for policy, names in without_local_endpoints(frontends).items():
            self._no_local.labels(policy).set(len(names))
        self._frontends.set(len(frontends))
        self._elements.set(elements)

    def page(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)


def without_local_endpoints(frontends: Iterable[Frontend]) -> dict[str, set[str]]:
    """Return the service ports that drop packets for want of an endpoint here, by traffic policy."""
    found: dict[str, set[str]] = {"internal": set(), "external": set()}
    for frontend in frontends:
        if frontend.action is Action.DROP and frontend.key.origin is Origin.ANY:
            found["internal" if frontend.exclusive else "external"].add(frontend.service)
    return found
