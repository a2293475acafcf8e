"""Figures for Prometheus: under kube-proxy's names where the meaning is the same, under podwire's otherwise.

Source of the names and buckets: Kubernetes documentation, "Kubernetes Metrics Reference"; SIG Scalability,
"Network programming latency SLO".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from node.l7_metrics import L7Figures, described
from node.l7_stats import L7Stats
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


class Described(NamedTuple):
    """A figure as the documentation has it; `name` is what Prometheus is asked for."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class Followed(NamedTuple):
    """How one kind of object is followed: how often it was listed, watched, and that failed so far.

    `failing` is for how many seconds nothing but failures came (0: it works), `silence` how long ago the
    server was heard last (None: never).
    """

    lists: int
    watches: int
    failures: int
    failing: float
    silence: float | None


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked whenever somebody wants the figures.

    `followed` has an entry for each kind, and none where a folder is the source. `saved` is when the last
    known state was written (seconds since the epoch; None: never). `gather` is for how long changes are
    gathered (seconds).
    """

    followed: Callable[[], Mapping[str, Followed]]
    saved: Callable[[], float | None]
    problems: Callable[[], Collection[str]]
    gather: Callable[[], float]


class Asked(Collector):
    """Figures that others know, asked for at each scrape."""

    KINDS = (
        (CounterMetricFamily, "podwire_api_lists", "Lists of a kind that were completed"),
        (CounterMetricFamily, "podwire_api_watches", "Watches of a kind that were begun"),
        (CounterMetricFamily, "podwire_api_failures", "Lists and watches of a kind that failed"),
        (
            GaugeMetricFamily,
            "podwire_api_failing_seconds",
            "For how long following a kind has failed; 0: it works",
        ),
        (
            GaugeMetricFamily,
            "podwire_api_silence_seconds",
            "Time since the API server was heard of a kind; it sends something once a minute",
        ),
    )
    """One for each field of `Followed`, in its order."""
    SAVED = "podwire_saved_state_timestamp_seconds", "When the last known state of the cluster was saved"
    PROBLEMS = "podwire_problems", "Sentences in the status on what is wrong"
    GATHER = "podwire_gather_seconds", "For how long changes are gathered before they go to the kernel"

    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    def collect(self) -> Iterator[Metric]:
        """Ask."""
        followed = self._questions.followed()
        for at, (family, name, meaning) in enumerate(self.KINDS):
            found = family(name, meaning, labels=("kind",))
            for kind, values in followed.items():
                value = values[at]
                if value is not None:
                    found.add_metric((kind,), value)
            if followed:
                yield found
        saved = self._questions.saved()
        if saved is not None:
            yield GaugeMetricFamily(*self.SAVED, value=saved)
        yield GaugeMetricFamily(*self.PROBLEMS, value=len(self._questions.problems()))
        yield GaugeMetricFamily(*self.GATHER, value=self._questions.gather())

    def describe(self) -> Iterator[Metric]:
        """Say which figures there may be: the daemon need not run for that."""
        yield from self.per_kind()
        yield from self.single()

    def per_kind(self) -> Iterator[Metric]:
        """Yield those with the label `kind`, without values."""
        return (family(name, meaning, labels=("kind",)) for family, name, meaning in self.KINDS)

    def single(self) -> Iterator[Metric]:
        """Yield the others, without values."""
        return (GaugeMetricFamily(*words) for words in (self.SAVED, self.PROBLEMS, self.GATHER))


class Metrics:
    """The daemon's figures, in a registry of their own, with those of the process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._own: list[Described] = []
        self._process = ProcessCollector(registry=self._registry)
        histogram, gauge, counter = self._histogram, self._gauge, self._counter
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

    def _histogram(self, name: str, help: str, buckets: Iterable[float] = SYNC_BUCKETS) -> Histogram:
        self._own.append(Described(name, "histogram", (), help))
        return Histogram(name, help, buckets=tuple(buckets), registry=self._registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        self._own.append(Described(name, "gauge", labels, help))
        return Gauge(name, help, labels, registry=self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        self._own.append(Described(f"{name}_total", "counter", labels, help))
        return Counter(name, help, labels, registry=self._registry)

    def ask(self, questions: Questions) -> None:
        """Have these asked at each scrape from now on; without it their figures are absent."""
        self._registry.register(Asked(questions))

    def proxy(self, stats: L7Stats) -> None:
        """Have the L7 proxy's figures told at each scrape from now on."""
        self._registry.register(L7Figures(stats))

    def described(self) -> tuple[Described, ...]:
        """Return all figures that there may be, for the documentation."""
        asked = Asked(Questions(dict, lambda: None, tuple, float))
        plain = (*asked.single(), *self._process.collect())
        return (
            *self._own,
            *(_described(metric, ("kind",)) for metric in asked.per_kind()),
            *(_described(metric, ()) for metric in plain),
            *(_described(metric, labels) for metric, labels in described()),
        )

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


def _described(metric: Metric, labels: tuple[str, ...]) -> Described:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    return Described(name, metric.type, labels, metric.documentation.rstrip("."))


def without_local_endpoints(frontends: Iterable[Frontend]) -> dict[str, set[str]]:
    """Return the service ports that drop packets for want of an endpoint here, by traffic policy."""
    found: dict[str, set[str]] = {"internal": set(), "external": set()}
    for frontend in frontends:
        if frontend.action is Action.DROP and frontend.key.origin is Origin.ANY:
            found["internal" if frontend.exclusive else "external"].add(frontend.service)
    return found
