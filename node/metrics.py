"""Figures for Prometheus, under kube-proxy's names where the meaning is the same."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The daemon's figures, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.sync = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time to bring one change to the kernel",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.latency = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time from the oldest change's arrival to its effect in the kernel",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.last_sync = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the last sync ended",
            registry=self._registry,
        )
        self.failures = Gauge("podwire_sync_failures", "Syncs that failed in a row", registry=self._registry)
        self.elements = Gauge("podwire_map_elements", "Map elements in the kernel", registry=self._registry)
        self.frontends = Gauge(
            "podwire_frontends", "Addresses and ports that are served", registry=self._registry
        )
        self.addresses = Gauge(
            "podwire_pod_addresses",
            "Pod addresses of a podCIDR or pool: how many there are, and what became of them",
            ("range", "family", "kind"),
            registry=self._registry,
        )
        self.pods = Gauge("podwire_pods", "Pod attachments in the ledger", registry=self._registry)

    def page(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)
