"""What a load balancer is told on a healthCheckNodePort, on real sockets; and what hostile clients cannot."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from netlink.requests import address_add, link_up
from netlink.rtnl import Rtnl
from node import healthchecks
from node.healthchecks import HealthCheck, HealthChecks, answer, check, checks
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service

DEADLINE = 5.0
V4, V6 = "192.0.2.5", "2001:db8::5"
WEB = HealthCheck("shop", "web", 2)
GET = b"GET /healthz HTTP/1.1\r\nHost: node1\r\n\r\n"


@pytest.fixture(scope="module")
def place(namespaces: Callable[[], str]) -> str:
    def up() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_up(1))
            rtnl.commit(address_add(1, f"{V4}/32"))
            rtnl.commit(address_add(1, f"{V6}/128"))

    name = namespaces()
    netns.run(name, up)
    return name


class Checked:
    """A server in a namespace, and its clients."""

    def __init__(self, place: str, addresses: tuple[str, ...] = ("",)) -> None:
        self.place = place
        self.healthy = True
        self.server = HealthChecks(lambda: self.healthy, addresses)

    def update(self, wanted: dict[int, HealthCheck], addresses: tuple[str, ...] | None = None) -> None:
        netns.run(self.place, self.server.update, wanted, addresses)

    def connect(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        return netns.run(self.place, socket.create_connection, (host, port), DEADLINE)

    def ask(self, port: int, host: str = "127.0.0.1", method: str = "GET", path: str = "/") -> Answer:
        client = http.client.HTTPConnection(host, port, timeout=DEADLINE)
        client.sock = self.connect(port, host)
        with closing(client):
            client.request(method, path)
            return Answer(client.getresponse())

    def refuses(self, port: int, host: str = "127.0.0.1") -> bool:
        try:
            self.connect(port, host).close()
        except ConnectionRefusedError:
            return True
        return False


class Answer:
    """A response, read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = dict(response.headers)
        self.body = response.read()
        self.json = json.loads(self.body) if self.body else None


@pytest.fixture
def checked(place: str) -> Iterator[Checked]:
    made = Checked(place)
    with made.server:
        yield made


def test_an_answer_is_kube_proxys(checked: Checked) -> None:
    checked.update({32100: WEB})
    found = checked.ask(32100, path="/healthz?x=1")
    assert found.status == 200
    assert found.json == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    assert found.headers == {
        "Content-Type": "application/json",
        "X-Content-Type-Options": "nosniff",
        "X-Load-Balancing-Endpoint-Weight": "2",
        "Content-Length": str(len(found.body)),
        "Connection": "close",
    }


@pytest.mark.parametrize("host", ["127.0.0.1", V4, "::1", V6])
def test_all_addresses_of_both_families_answer(checked: Checked, host: str) -> None:
    checked.update({32100: WEB})
    assert checked.ask(32100, host).status == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/a/b?c", "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_any_path_and_method_will_do(checked: Checked, method: str, path: str) -> None:
    checked.update({32100: WEB})
    found = checked.ask(32100, method=method, path=path)
    assert found.status == 200
    assert bool(found.body) is (method != "HEAD")


@pytest.mark.parametrize(
    ("count", "healthy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503), (0, False, 503)]
)
def test_without_local_endpoints_or_health_it_is_503(
    checked: Checked, count: int, healthy: bool, status: int
) -> None:
    checked.update({32100: HealthCheck("shop", "web", count)})
    checked.healthy = healthy
    found = checked.ask(32100)
    assert found.status == status
    assert found.headers["X-Load-Balancing-Endpoint-Weight"] == str(count)
    assert (found.json["localEndpoints"], found.json["serviceProxyHealthy"]) == (count, healthy)


def test_a_proxy_whose_health_cannot_be_told_is_not_healthy(place: str) -> None:
    def broken() -> bool:
        raise RuntimeError("no idea")

    made = Checked(place)
    made.server = HealthChecks(broken)
    with made.server:
        made.update({32100: WEB})
        assert [made.ask(32100).status for _ in range(2)] == [503, 503]


def test_drained_is_503_with_the_next_request_even_on_a_connection_made_before(checked: Checked) -> None:
    checked.update({32100: WEB})
    with checked.connect(32100) as early:
        checked.update({32100: HealthCheck("shop", "web", 0)})
        assert checked.ask(32100).status == 503
        early.sendall(GET)
        assert early.recv(4096).startswith(b"HTTP/1.1 503 ")


def test_a_port_that_changes_hands_stays_open(checked: Checked) -> None:
    checked.update({32100: WEB})
    with checked.connect(32100) as early:
        checked.update({32100: HealthCheck("shop", "api", 1)})
        early.sendall(GET)
        assert b'"api"' in early.recv(4096)


def test_no_request_is_refused_while_other_ports_come_and_go(checked: Checked) -> None:
    checked.update({32100: WEB})
    done = threading.Event()

    def churn() -> None:
        for i in range(100):
            checked.update({32100: WEB} | dict.fromkeys(range(32200 + i, 32205 + i), WEB))
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    asked = 0
    try:
        while not done.is_set() or not asked:
            assert checked.ask(32100).status == 200
            asked += 1
    finally:
        thread.join()
    assert checked.server.problems == ()


def test_a_port_no_longer_wanted_is_closed_with_its_connections(checked: Checked) -> None:
    checked.update({32100: WEB, 32101: WEB})
    with checked.connect(32101) as early:
        assert checked.ask(32101).status == 200
        checked.update({32100: WEB})
        assert checked.refuses(32101)
        assert checked.ask(32100).status == 200
        early.sendall(GET)
        assert early.recv(4096) == b""
    checked.update({})
    assert checked.refuses(32100)


def test_only_the_given_addresses_answer_and_they_may_change(place: str) -> None:
    made = Checked(place, (V4, V6))
    with made.server:
        made.update({32100: WEB})
        assert [made.ask(32100, host).status for host in (V4, V6)] == [200, 200]
        assert made.refuses(32100, "127.0.0.1")
        assert made.refuses(32100, "::1")
        made.update({32100: WEB}, ("127.0.0.1",))
        assert made.ask(32100).status == 200
        assert made.refuses(32100, V4)
        made.update({32100: WEB}, ())
        assert made.refuses(32100)
        assert made.server.problems == ()


def test_an_address_that_is_not_there_is_a_problem_of_its_own(place: str) -> None:
    made = Checked(place, ("192.0.2.99", V4))
    with made.server:
        made.update({32100: WEB})
        assert made.ask(32100, V4).status == 200
        (problem,) = made.server.problems
        assert problem == (
            "Service shop/web: its health check port 32100 cannot be opened on 192.0.2.99: "
            "Cannot assign requested address"
        )


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_port_that_somebody_has_is_a_sentence_and_tried_again(checked: Checked, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    somebody = netns.run(checked.place, socket.socket, family, socket.SOCK_STREAM)
    with somebody:
        somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        somebody.bind((address, 32100))
        somebody.listen()
        for _ in range(2):
            checked.update({32100: WEB, 32101: WEB})
            assert checked.server.problems == (
                "Service shop/web: its health check port 32100 cannot be opened on the node's addresses: "
                "Address already in use",
            )
            assert checked.ask(32101).status == 200
    checked.update({32100: WEB, 32101: WEB})
    assert checked.server.problems == ()
    assert checked.ask(32100).status == 200


def test_a_port_no_longer_wanted_is_no_problem_any_more(checked: Checked) -> None:
    checked.update({70000: WEB})
    (problem,) = checked.server.problems
    assert "port 70000 cannot be opened" in problem
    checked.update({})
    assert checked.server.problems == ()


def test_silent_and_slow_clients_delay_nobody(checked: Checked) -> None:
    checked.update({32100: WEB, 32101: WEB})
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(checked.connect(port)) for port in (32100, 32101) for _ in range(50)]
        for client in stalled[::2]:
            client.sendall(GET[:10])
        start = time.monotonic()
        assert [checked.ask(port).status for port in (32100, 32101) for _ in range(20)] == [200] * 40
        assert time.monotonic() - start < healthchecks.PATIENCE / 2
        for client in stalled[::2]:  # slow is not wrong
            client.sendall(GET[10:])
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", GET[:-1], GET], ids=["silent", "unfinished", "does not go away"])
def test_patience_with_a_client_ends(checked: Checked, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthchecks, "PATIENCE", 0.2)
    before = descriptors()
    checked.update({32100: WEB})
    listening = descriptors()
    with checked.connect(32100) as client:
        client.sendall(sent)
        wait_until(lambda: descriptors() == listening + 1)
    assert listening > before
    assert checked.ask(32100).status == 200


def test_there_are_never_more_connections_than_allowed(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds them all loses the oldest; a proper client is answered."""
    monkeypatch.setattr(healthchecks, "MOST_CONNECTIONS", 8)
    checked.update({32100: WEB})
    listening = descriptors()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(checked.connect(32100)) for _ in range(100)]
        assert checked.ask(32100).status == 200
        assert descriptors() <= listening + len(held) + 8
        assert held[0].recv(1) == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET / HTTP/2.0\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\n\n", b"400"),
        (b"GET / HTTP/1.1 \xff\n\n", b"400"),
        (b"GET / HTTP/1.0\n\n", b"200"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 7000 + b"\r\n\r\n", b"200"),
        (b"x" * 8193, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"431"),
        (b"POST / HTTP/1.1\r\nContent-Length: 30000\r\n\r\n" + b"x" * 30000, b"200"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_request_of_any_kind_is_answered_and_the_next_one_too(
    checked: Checked, request_: bytes, status: bytes
) -> None:
    checked.update({32100: WEB})
    with checked.connect(32100) as client:
        client.sendall(request_)
        received = b"".join(iter(lambda: client.recv(4096), b""))
    assert received.startswith(b"HTTP/1.1 " + status + b" ")
    assert checked.ask(32100).status == 200


def test_who_talks_on_and_on_is_cut_off(checked: Checked) -> None:
    checked.update({32100: WEB})
    with checked.connect(32100) as client, pytest.raises(ConnectionError):
        for _ in range(10000):
            client.sendall(b"x" * 4096)
    assert checked.ask(32100).status == 200


def test_running_out_of_descriptors_is_a_sentence_and_passes(checked: Checked) -> None:
    wanted = {32100: WEB, 32101: WEB}
    checked.update({32100: WEB})
    before, listening = resource.getrlimit(resource.RLIMIT_NOFILE), descriptors()
    with checked.connect(32100) as early, netns.opened(checked.place) as inside:
        early.sendall(GET[:-1])
        wait_until(lambda: descriptors() == listening + 3)  # both ends are open, and the namespace
        spare = os.open("/", os.O_RDONLY)  # one is needed for the way back out of the namespace
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, before[1]))
            os.close(spare)
            netns.run(inside, checked.server.update, wanted)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert checked.server.problems == (
            "Service shop/web: its health check port 32101 cannot be opened on the node's addresses: "
            "Too many open files",
        )
        early.sendall(GET[-1:])
        assert early.recv(4096).startswith(b"HTTP/1.1 200 ")
    checked.update(wanted)
    assert checked.server.problems == ()
    assert checked.ask(32101).status == 200


def test_a_client_that_there_is_no_descriptor_for_waits(checked: Checked) -> None:
    """The kernel refuses accept; the thread neither spins nor ends."""
    checked.update({32100: WEB})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with netns.run(checked.place, socket.socket) as client, open("/dev/null") as last:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), before[1]))
            client.connect(("127.0.0.1", 32100))
            client.sendall(GET)
            used = time.process_time()
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert time.process_time() - used < 0.15
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        client.settimeout(DEADLINE)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_two_hundred_ports_are_one_thread_and_leave_nothing_behind(place: str) -> None:
    before, threads = descriptors(), threading.active_count()
    wanted = {port: HealthCheck("shop", f"web-{port}", 1) for port in range(32000, 32200)}
    made = Checked(place)
    assert (descriptors(), threading.active_count()) == (before, threads)
    with made.server:
        for _ in range(3):
            made.update(wanted)
            assert made.server.problems == ()
            assert threading.active_count() == threads + 1
            assert descriptors() == before + 200 + 2
            assert {made.ask(port).json["service"]["name"] for port in wanted} == {
                told.name for told in wanted.values()
            }
            made.update({})
            wait_until(lambda: descriptors() == before + 2)
        made.update(wanted)
        early = made.connect(32000)
    with early:
        assert early.recv(1) == b""
    assert all(made.refuses(port) for port in wanted)
    wait_until(lambda: descriptors() == before)
    assert threading.active_count() == threads
    made.update(wanted)
    made.server.close()
    assert (descriptors(), threading.active_count()) == (before, threads)


def test_an_unfinished_request_has_no_answer_yet() -> None:
    assert all(answer(GET[:n], WEB, True) is None for n in range(len(GET)))
    assert answer(GET, WEB, True) is not None


def service(name: str = "web", health_port: int = 32100) -> Service:
    return Service(ObjectName("shop", name), ("10.96.0.1",), (), health_port=health_port)


def piece(
    *endpoints: Endpoint, name: str = "a", family: Family = Family.V4, port: int = 8080
) -> EndpointSlice:
    ports = (EndpointPort("", Protocol.TCP, port),) if port else ()
    return EndpointSlice(ObjectName("shop", name), ObjectName("shop", "web"), family, ports, endpoints)


HERE = [Endpoint(f"10.244.1.{n}", "node1") for n in range(1, 4)]


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        ((), 0),
        ((piece(),), 0),
        ((piece(*HERE),), 3),
        ((piece(HERE[0], Endpoint("10.244.2.1", "node2"), Endpoint("10.244.3.1")),), 1),
        ((piece(Endpoint("10.244.1.1", "node1", ready=False)),), 0),
        ((piece(Endpoint("10.244.1.1", "node1", ready=False, serving=True, terminating=True)),), 0),
        ((piece(Endpoint("10.244.1.1", "node1", ready=True, terminating=True)),), 0),
        ((piece(*HERE), piece(*HERE[:2], name="b", port=9090)), 3),
        ((piece(*HERE[:1]), piece(*HERE[1:], name="b")), 3),
        ((piece(*HERE, port=0),), 0),
        ((piece(*HERE), piece(Endpoint("fd00::1", "node1"), name="b", family=Family.V6)), 3),
    ],
    ids=[
        "no slices",
        "an empty slice",
        "all here",
        "elsewhere and nowhere",
        "not ready",
        "serving and terminating",
        "published while terminating",
        "the same by another port",
        "spread over slices",
        "without ports",
        "both families",
    ],
)
def test_ready_endpoints_of_this_node_count_once(slices: tuple[EndpointSlice, ...], count: int) -> None:
    assert check(service(), slices, "node1") == HealthCheck("shop", "web", count)


def test_services_with_a_health_port_are_checked_and_the_first_by_name_has_it() -> None:
    services = [service("web"), service("other", 0), service("zeta"), service("api", 32101)]
    slices = {ObjectName("shop", "web"): (piece(*HERE),), ObjectName("shop", "zeta"): (piece(),)}
    assert checks(services, slices, "node1") == {
        32100: HealthCheck("shop", "web", 3),
        32101: HealthCheck("shop", "api", 0),
    }
    assert checks([], slices, "node1") == {}


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    pause = threading.Event()
    while not good():
        assert time.monotonic() < end
        pause.wait(0.01)
