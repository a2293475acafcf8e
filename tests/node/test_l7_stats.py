"""What the L7 proxy has done is told whole, and only grows, whatever HAProxy does meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from node.describe import in_short
from node.l7_metrics import PREFIX, described
from node.l7_stats import BOUNDS, LEAST_SECONDS, WINDOW_SECONDS, Counts, Sampler, State, by_word, judged
from node.metrics import Metrics
from proxy.l7.model import Backend
from proxy.l7.stats import Totals
from tests.node.fake_l7 import DB, WEB, FakeL7, busy, line, stats
from tests.node.world import wait_until

KEY = WEB.name, ""
ENDPOINT = WEB.name, "10.0.0.1:8080"


def counts(proxy: FakeL7) -> Counts:
    return Counts(proxy.ask, proxy.clock)


def after(proxy: FakeL7, requests: int, **more: int) -> None:
    """A second later, so many requests are counted."""
    proxy.now += LEAST_SECONDS
    proxy.stat = {
        key: {"status": "UP", "req_tot": requests, "stot": requests, **more} for key in (KEY, ENDPOINT)
    }


def test_sums_go_on_over_reloads_and_restarts() -> None:
    proxy = FakeL7()
    counted, seen = counts(proxy), []
    for requests, process in ((5, 100), (9, 100), (2, 101), (3, 101), (50, 102), (50, 102), (0, 103)):
        proxy.process = process
        after(proxy, requests)
        seen.append(counted.read()[KEY].totals.requests)
    assert seen == [5, 9, 11, 12, 62, 62, 62]


def test_an_endpoint_that_comes_again_begins_at_zero_and_its_service_does_not() -> None:
    proxy = FakeL7()
    counted = counts(proxy)
    after(proxy, 10)
    counted.read()
    after(proxy, 12)
    del proxy.stat[ENDPOINT]
    found = counted.read()
    assert (set(found), found[KEY].totals.requests) == ({KEY}, 12)
    after(proxy, 20)
    proxy.stat[ENDPOINT]["req_tot"] = 3
    found = counted.read()
    assert (found[ENDPOINT].totals.requests, found[KEY].totals.requests) == (3, 20)


def test_an_endpoint_made_anew_between_two_looks_counts_on() -> None:
    proxy = FakeL7()
    counted = counts(proxy)
    after(proxy, 10)
    counted.read()
    after(proxy, 4)
    assert counted.read()[ENDPOINT].totals.requests == 14


def test_haproxy_is_asked_at_most_once_a_second() -> None:
    proxy = FakeL7()
    counted = counts(proxy)
    after(proxy, 1)
    for _ in range(5):
        counted.read()
    assert proxy.asked.count("show stat") == 1
    proxy.now += LEAST_SECONDS
    counted.read()
    assert proxy.asked.count("show stat") == 2


def test_while_haproxy_does_not_answer_the_sums_stay_and_nothing_is_known_of_now() -> None:
    proxy = FakeL7()
    counted = counts(proxy)
    after(proxy, 7, scur=3)
    found = counted.read()[KEY]
    assert found.now is not None
    assert found.now.connections == 3
    proxy.up = False
    proxy.now += LEAST_SECONDS
    assert counted.read()[KEY] == (Totals(requests=7, connections=7), None)
    proxy.up, proxy.process = True, 101
    after(proxy, 2)
    assert counted.read()[KEY].totals.requests == 9


def test_rows_are_those_of_the_process_that_is_named_with_them() -> None:
    """A reload between the two questions would have the new process' counters added twice."""
    proxy = FakeL7()
    after(proxy, 10)

    def ask(command: str) -> str:
        answer = proxy.ask(command)
        if command == "show stat" and proxy.process == 100 and proxy.now > LEAST_SECONDS:
            proxy.process = 101
            proxy.stat = {KEY: {"req_tot": 4, "stot": 4}}
        return answer

    counted = Counts(ask, proxy.clock)
    assert counted.read()[KEY].totals.requests == 10
    after(proxy, 15)
    assert counted.read()[KEY].totals.requests == 14
    proxy.now += LEAST_SECONDS
    assert counted.read()[KEY].totals.requests == 14


def test_answers_of_something_else_are_none() -> None:
    assert Counts(lambda command: "Permission denied\n").read() == {}


def test_quantiles_are_estimated_within_a_fifth() -> None:
    proxy = FakeL7()
    for milliseconds in range(1, 1001):
        proxy.sampler.take(line(WEB.name, milliseconds))
    found = proxy.sampler.times()[WEB.name]
    for share in (0.5, 0.9, 0.99):
        assert found.quantile(share) == pytest.approx(share, rel=0.2)
    assert found.seconds == pytest.approx(500.5)
    assert sum(found.counts) == 1000


def test_quantiles_are_those_of_the_last_minutes() -> None:
    proxy = FakeL7()
    proxy.sampler.take(line(WEB.name, 5000))
    proxy.now += WINDOW_SECONDS
    proxy.sampler.take(line(WEB.name, 1))
    assert proxy.sampler.times()[WEB.name].quantile(0.99) > 4
    proxy.now += WINDOW_SECONDS
    found = proxy.sampler.times()[WEB.name]
    assert 0 < found.quantile(0.99) < 0.0015
    assert sum(found.counts) == 2
    proxy.now += 2 * WINDOW_SECONDS  # without a request, those of all time are better than nothing
    assert proxy.sampler.times()[WEB.name].quantile(0.99) > 4


def test_nothing_is_kept_of_backends_that_are_not_there() -> None:
    proxy = FakeL7()
    proxy.sampler.take(line("http", 1))  # no backend was found for it
    proxy.sampler.take(line(WEB.name, 1))
    assert proxy.sampler.times().keys() == {WEB.name}
    proxy.backends = {DB.name: DB}
    assert proxy.sampler.times() == {}
    proxy.backends = {WEB.name: WEB}
    assert proxy.sampler.times() == {}


def test_requests_without_a_time_and_very_long_ones_have_a_bucket() -> None:
    proxy = FakeL7()
    for milliseconds in (0, -3, 1e9):
        proxy.sampler.take(line(WEB.name, milliseconds))
    found = proxy.sampler.times()[WEB.name]
    assert (found.counts[0], found.counts[-1]) == (2, 1)
    assert found.quantile(1) == BOUNDS[-1]


def _send(path: Path, *lines: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for one in lines:
            sender.sendto(one, str(path))


def test_lines_are_taken_from_a_socket_that_anybody_may_send_to(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with Sampler(path, lambda: [WEB.name]) as sampler:
        assert path.stat().st_mode & 0o777 == 0o666
        _send(path, b"", b"{}", b"\xff" * 9000, line("other", 1), line(WEB.name, 1), line(WEB.name, 2))
        wait_until(lambda: sum(t.counts[-1] + sum(t.counts[:-1]) for t in sampler.times().values()) == 2, "2")
    with pytest.raises(ConnectionRefusedError):
        _send(path, line(WEB.name, 1))


def test_a_daemon_that_starts_again_takes_the_socket_over(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with Sampler(path, lambda: [WEB.name]) as first, Sampler(path, lambda: [WEB.name]) as second:
        _send(path, line(WEB.name, 1))
        wait_until(lambda: bool(second.times()), "a line")
        assert first.times() == {}


def test_a_socket_that_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Sampler(tmp_path / "no" / "log.sock", list):
        pass


def test_threads_may_ask_and_take_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with Sampler(path, lambda: [WEB.name]) as sampler:

        def send() -> None:
            for _ in range(10):
                _send(path, *[line(WEB.name, 1)] * 50)

        with contextlib.ExitStack() as stack:
            for _ in range(2):
                thread = threading.Thread(target=send)
                thread.start()
                stack.callback(thread.join)
            for _ in range(200):
                sampler.times()
        wait_until(lambda: sum(sampler.times()[WEB.name].counts) == 1000, "all lines")


CLOSED = DB
NO_ENDPOINTS = Backend(WEB.name, WEB.service, WEB.family, WEB.policy, WEB.routes, ())


@pytest.mark.parametrize(
    ("backend", "served", "up", "problems", "expected"),
    [
        (WEB, True, True, (), (State.SERVED, "")),
        (WEB, False, True, (), (State.PLAIN, "HAProxy does not have it yet")),
        (WEB, False, False, (), (State.PLAIN, "HAProxy does not run")),
        (WEB, True, False, (), (State.PLAIN, "HAProxy does not run")),
        (CLOSED, False, False, (), (State.CLOSED, "HAProxy does not run")),
        (NO_ENDPOINTS, False, True, (), (State.PLAIN, "it has no endpoints")),
        (
            WEB,
            False,
            True,
            ("service shop/web2: no", "shop/web: its regex is refused"),
            (State.PLAIN, "shop/web: its regex is refused"),
        ),
        (DB, False, True, ("backend 'shop_db_sql_tcp6' is refused",),
         (State.CLOSED, "backend 'shop_db_sql_tcp6' is refused")),
    ],
)  # fmt: skip
def test_why_a_service_is_not_served(
    backend: Backend, served: bool, up: bool, problems: tuple[str, ...], expected: tuple[State, str]
) -> None:
    assert judged(backend, served=served, up=up, told=by_word(problems)) == expected


def test_without_services_nobody_is_asked_and_there_are_no_figures() -> None:
    proxy = FakeL7(backends={}, served=frozenset(), up=False)
    metrics = Metrics()
    metrics.proxy(stats(proxy))
    assert PREFIX not in metrics.page().decode()
    assert proxy.asked == []


LABELS = ("service", "family", "endpoint", "kind", "code", "state", "le")


def figures(proxy: FakeL7) -> dict[tuple[str, tuple[str, ...]], float]:
    """Figures of the proxy, by name and values of labels."""
    metrics = Metrics()
    metrics.proxy(stats(proxy))
    return {
        (sample.name.removeprefix(PREFIX), tuple(sample.labels[n] for n in LABELS if n in sample.labels)): (
            sample.value
        )
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def test_figures_of_services_and_endpoints() -> None:
    found = figures(busy())
    web, db = ("shop/web", "IPv4"), ("shop/db:sql", "IPv6")
    one, two, sql = "10.0.0.1:8080", "10.0.0.2:8080", "[fd00::1]:5432"
    expected = {
        ("up", ()): 1,
        ("reloads_total", ()): 3,
        ("restarts_total", ()): 1,
        ("backends", ("served",)): 2,
        ("backends", ("plain",)): 0,
        ("requests_total", (*web, "2xx")): 10,
        ("requests_total", (*web, "5xx")): 2,
        ("requests_total", (*web, "4xx")): 0,
        ("connections_total", db): 7,
        ("retries_total", web): 3,
        ("redispatches_total", web): 1,
        ("errors_total", (*web, "connect")): 4,
        ("errors_total", (*web, "response")): 1,
        ("connections_now", web): 2,
        ("queued", web): 5,
        ("endpoint_requests_total", (*web, one)): 12,
        ("endpoint_requests_total", (*db, sql)): 7,
        ("endpoint_errors_total", (*web, one, "5xx")): 2,
        ("endpoint_errors_total", (*web, two, "connect")): 4,
        ("endpoint_connections_now", (*db, sql)): 1,
        ("endpoint_up", (*web, one)): 1,
        ("endpoint_up", (*web, two)): 0,
        ("endpoint_up", (*db, sql)): 1,
        ("request_duration_seconds_count", web): 10,
        ("request_duration_seconds_bucket", (*web, "+Inf")): 10,
        ("request_duration_seconds_bucket", (*web, "0.0032")): 7,
        ("request_duration_seconds_count", db): 1,
        ("request_duration_seconds_sum", db): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert ("requests_total", (*db, "2xx")) not in found
    assert ("connections_total", web) not in found


def test_two_backends_of_a_port_are_one_figure() -> None:
    """Under a policy Local there is another one for those who come from outside."""
    proxy = busy()
    local = Backend(f"{WEB.name}_local", WEB.service, WEB.family, WEB.policy, (), WEB.servers[:1])
    proxy.backends = {**proxy.backends, local.name: local}
    proxy.stat[local.name, ""] = {"req_tot": 1, "hrsp_2xx": 1}
    proxy.stat[local.name, "10.0.0.1:8080"] = {"req_tot": 1, "hrsp_2xx": 1, "scur": 1}
    proxy.sampler.take(line(local.name, 1))
    found = figures(proxy)
    web = ("shop/web", "IPv4")
    assert found["requests_total", (*web, "2xx")] == 11
    assert found["endpoint_requests_total", (*web, "10.0.0.1:8080")] == 13
    assert found["endpoint_connections_now", (*web, "10.0.0.1:8080")] == 3
    assert found["request_duration_seconds_count", web] == 11


def test_every_figure_is_described_with_its_labels() -> None:
    metrics = Metrics()
    metrics.proxy(stats(busy()))
    exposed = {
        f.name: (frozenset(s.labels) - {"le"}, f.documentation)
        for f in text_string_to_metric_families(metrics.page().decode())
        for s in f.samples[:1]
        if f.name.startswith(PREFIX)
    }
    assert {m.name: (frozenset(labels), m.documentation) for m, labels in described()} == exposed


def test_how_far_it_serves_in_short() -> None:
    assert in_short(FakeL7(backends={}, served=frozenset())) == ""
    served = frozenset({WEB.name, "one that has just gone"})
    assert in_short(FakeL7(served=served)) == "1 of 2 service ports are served by HAProxy"
    assert in_short(FakeL7(up=False)) == "0 of 2 service ports are served by HAProxy, which does not run"
