"""The L7 proxy's figures for Prometheus, asked for at each scrape; none while no service wants the proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from node.l7_stats import BOUNDS, STEPS, Counted, L7Stats, Seen, State
from proxy.l7.policy import Protocol
from proxy.l7.stats import Totals

UP = ("UP", "no check")
"""How HAProxy's words for an endpoint that gets requests begin."""


@dataclass(slots=True)
class Port:
    """A service port in a family: its backends together, of which there are two under a policy Local."""

    service: str
    family: str
    protocol: Protocol
    own: list[Counted] = field(default_factory=list)
    servers: dict[str, list[Counted]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def totals(self) -> Totals:
        """What all of it has done."""
        return together(self.own)

    def add(self, seen: Seen) -> None:
        """Add a backend."""
        self.own.append(seen.own)
        for name, counted in seen.servers.items():
            self.servers.setdefault(name, []).append(counted)
        if seen.times:
            counts = seen.times.counts
            self.counts = list(map(int.__add__, self.counts or [0] * len(counts), counts))
            self.seconds += seen.times.seconds


def together(counted: Iterable[Counted]) -> Totals:
    """Return the sums."""
    return reduce(Totals.plus, (c.totals for c in counted), Totals())


def ports(seen: Iterable[Seen]) -> tuple[Port, ...]:
    """Return what was seen by service port and family."""
    found: dict[tuple[str, str], Port] = {}
    for one in seen:
        backend = one.backend
        key = backend.service, f"IPv{backend.family.value}"
        found.setdefault(key, Port(*key, backend.protocol)).add(one)
    return tuple(found.values())


Sample = tuple[tuple[str, ...], float]
"""Values of the labels after service and family, and the figure."""


class Figure(NamedTuple):
    """A figure of each service port, `labels` being those after service and family."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    meaning: str
    labels: tuple[str, ...]
    samples: Callable[[Port], Iterable[Sample]]


def _codes(port: Port) -> Iterator[Sample]:
    if port.protocol is Protocol.HTTP:
        yield from (((code,), number) for code, number in port.totals.codes.items())


def _connected(port: Port) -> Iterator[Sample]:
    if port.protocol is Protocol.TCP:  # of HTTP, HAProxy counts requests there
        yield (), port.totals.connections


def _errors(totals: Totals) -> Iterator[Sample]:
    yield ("connect",), totals.connect_errors
    yield ("response",), totals.response_errors
    yield ("client_abort",), totals.client_aborts
    yield ("server_abort",), totals.server_aborts


def _total(of: Callable[[Totals], int]) -> Callable[[Port], Iterable[Sample]]:
    return lambda port: (((), of(port.totals)),)


def _connections(counted: Iterable[Counted]) -> int:
    return sum(c.now.connections for c in counted if c.now)


def _queued(port: Port) -> Iterator[Sample]:
    yield (), sum(c.now.queued for c in port.own if c.now)


def _of_endpoints(of: Callable[[list[Counted]], float]) -> Callable[[Port], Iterable[Sample]]:
    return lambda port: (((name,), of(counted)) for name, counted in port.servers.items())


def _failures(port: Port) -> Iterator[Sample]:
    for name, counted in port.servers.items():
        totals = together(counted)
        yield (name, "5xx"), totals.code_5xx
        yield (name, "connect"), totals.connect_errors
        yield (name, "response"), totals.response_errors


def _gets(counted: Iterable[Counted]) -> float:
    return float(any(c.now and c.now.status.startswith(UP) for c in counted))


COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily
FIGURES = (
    Figure(COUNTER, "requests", "Answers to requests, by the class of their status", ("code",), _codes),
    Figure(COUNTER, "connections", "Connections of clients, of TCP", (), _connected),
    Figure(COUNTER, "retries", "Connections to endpoints tried again", (), _total(lambda t: t.retries)),
    Figure(
        COUNTER, "redispatches", "Requests given to another endpoint", (), _total(lambda t: t.redispatches)
    ),
    Figure(COUNTER, "denied", "Requests refused by path rules or limits", (), _total(lambda t: t.denied)),
    Figure(
        COUNTER,
        "errors",
        "Connections to endpoints that failed, answers that broke off, clients and endpoints that went away",
        ("kind",),
        lambda port: _errors(port.totals),
    ),
    Figure(
        GAUGE, "connections_now", "Requests or connections now", (), lambda p: (((), _connections(p.own)),)
    ),
    Figure(GAUGE, "queued", "Requests that wait for an endpoint", (), _queued),
    Figure(
        COUNTER,
        "endpoint_requests",
        "Requests (of TCP: connections) that an endpoint got",
        ("endpoint",),
        _of_endpoints(lambda c: together(c).requests),
    ),
    Figure(
        COUNTER,
        "endpoint_errors",
        "Answers 5xx of an endpoint, connections to it that failed, answers that broke off",
        ("endpoint", "kind"),
        _failures,
    ),
    Figure(
        GAUGE,
        "endpoint_connections_now",
        "Requests or connections that an endpoint has now",
        ("endpoint",),
        _of_endpoints(_connections),
    ),
    Figure(
        GAUGE,
        "endpoint_up",
        "Whether an endpoint gets requests: 0 after failed checks and errors, and of one that leaves",
        ("endpoint",),
        _of_endpoints(_gets),
    ),
)
PORT_LABELS = ("service", "family")
PREFIX = "podwire_l7_"
DURATION = "request_duration_seconds"


class L7Figures(Collector):
    """The collector."""

    def __init__(self, stats: L7Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Ask."""
        view, seen = self._stats.view, self._stats.seen()
        if not seen and not view.up:
            return
        up, reloads, restarts, backends = _process()
        up.add_metric((), float(view.up))
        reloads.add_metric((), view.reloads)
        restarts.add_metric((), view.restarts)
        for state in State:
            backends.add_metric((state.value,), sum(s.state is state for s in seen))
        yield from (up, reloads, restarts, backends)
        found = ports(seen)
        for figure, family in zip(FIGURES, _families(), strict=True):
            for port in found:
                for values, number in figure.samples(port):
                    family.add_metric((port.service, port.family, *values), number)
            yield family
        yield _durations(found)

    def describe(self) -> Iterator[Metric]:
        """Say which figures there may be."""
        yield from (metric for metric, _ in described())


def described() -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Yield each figure without values, and its labels."""
    yield from zip(_process(), ((), (), (), ("state",)), strict=True)
    yield from ((m, (*PORT_LABELS, *f.labels)) for f, m in zip(FIGURES, _families(), strict=True))
    yield _durations(()), PORT_LABELS


def _process() -> tuple[GaugeMetricFamily, CounterMetricFamily, CounterMetricFamily, GaugeMetricFamily]:
    return (
        GAUGE(f"{PREFIX}up", "Whether HAProxy runs", labels=()),
        COUNTER(f"{PREFIX}reloads", "Times that HAProxy was given another configuration", labels=()),
        COUNTER(f"{PREFIX}restarts", "Times that HAProxy ended by itself and was started again", labels=()),
        GAUGE(
            f"{PREFIX}backends",
            "Service ports that ask for the proxy, by family: served by it, balanced plainly, or not served",
            labels=("state",),
        ),
    )


def _families() -> tuple[CounterMetricFamily | GaugeMetricFamily, ...]:
    return tuple(f.kind(PREFIX + f.name, f.meaning, labels=(*PORT_LABELS, *f.labels)) for f in FIGURES)


def _durations(found: Iterable[Port]) -> Metric:
    """Return how long requests of the sample took; every fourth bucket of those that are kept."""
    family = HistogramMetricFamily(
        PREFIX + DURATION,
        "Time of a request to the end of its answer (of TCP: of a connection), of a sample",
        labels=PORT_LABELS,
    )
    for port in found:
        if port.counts:
            sums = tuple(accumulate(port.counts))
            buckets = [(f"{BOUNDS[at]:.4g}", sums[at]) for at in range(0, len(BOUNDS), STEPS)]
            buckets.append(("+Inf", sums[-1]))
            family.add_metric((port.service, port.family), buckets, port.seconds)
    return family
