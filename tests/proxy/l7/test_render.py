"""Every part of a policy, in a configuration that HAProxy takes, and on real traffic."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from netlink.family import Family
from proxy.l7.engine import Engine
from proxy.l7.model import Route, Server
from proxy.l7.policy import (
    ActiveCheck,
    Balance,
    Breaker,
    HeaderChanges,
    Limits,
    Match,
    PathRule,
    Policy,
    Protocol,
    ProxyProtocol,
    Retries,
    Retry,
    Timeouts,
    Tls,
)
from proxy.l7.render import Settings
from tests.proxy.l7.test_engine import until
from tests.proxy.l7.traffic import World, backend, bring, endpoint, route, world

A, B = endpoint(1), endpoint(2)
V6 = endpoint(1, Family.V6), endpoint(2, Family.V6)
TCP_A, TCP_B = Server("10.8.0.11", 9000), Server("10.8.0.12", 9000)
SECURE, STRANGE = Server("10.8.0.21", 8443), Server("10.8.0.22", 8443)
GONE = endpoint(99)

NASTY = (
    "%[src] %{+Q}o %%",
    "a  b   c",
    '\'; } # "x" \\n $HOME ${HOME}',
    "if { always_true }",
    "-i -f /etc/passwd",
    "')]%[srv_name],\\",
    "\\x41\\0\\1",
    "ends with \\",
)
PATHS = (
    PathRule(Match.EXACT, "/denied", deny=403),
    PathRule(Match.PREFIX, "/denied/but", rewrite=None),
    PathRule(Match.PREFIX, "/denied/", deny=451),
    PathRule(Match.PREFIX, "/old", redirect="https://new.example/%[src] x?a='1'", code=308),
    PathRule(Match.PREFIX, "/api/", rewrite="/v2/100%/"),
    PathRule(Match.PREFIX, "/cut", rewrite=""),
    PathRule(Match.EXACT, "/exact", rewrite="/%[src]\"'x"),
    PathRule(Match.REGEX, r"(?i)/user/([a-z']+)/(\d{1,3}),?", rewrite=r"/\2\u/\1%"),
    PathRule(Match.REGEX, r"^/[)}#\"' ]{2}$", deny=418),
    PathRule(Match.PREFIX, "/v2/", deny=500),
)
HEADERS = HeaderChanges(
    remove=("X-Secret",),
    set=(("X-Set", "one"), *((f"X-N{n}", text) for n, text in enumerate(NASTY))),
    add=(("X-Set", "two"), ("X-'odd'|`name`", "yes")),
)


def _tls(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make an authority with a certificate for endpoint.example, and one that nobody knows."""
    found = []
    for name in ("known", "strange"):
        key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
        subprocess.run(
            (
                *("openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-days", "2"),
                *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=endpoint.example"),
                *("-addext", "subjectAltName=DNS:endpoint.example"),
                *("-keyout", str(key), "-out", str(certificate)),
            ),
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        found.append(context)
    return found[0], found[1]


POLICIES: dict[str, tuple[Policy, tuple[Server, ...]]] = {
    "plain": (Policy(), (A, B)),
    "least": (Policy(balance=Balance.LEAST_CONNECTIONS), (A, B)),
    "random": (Policy(balance=Balance.RANDOM), (A, B)),
    "source": (Policy(balance=Balance.SOURCE), (A, B)),
    "header": (Policy(balance=Balance.HEADER, hash_on="X-'Odd"), (A, B)),
    "cookie": (Policy(balance=Balance.COOKIE, hash_on="se'ss"), (A, B)),
    "quiet": (Policy(x_forwarded_for=False), (A,)),
    "served": (Policy(served_by=True), (A, B)),
    "headers": (Policy(request_headers=HEADERS, response_headers=HEADERS), (A,)),
    "paths": (Policy(paths=PATHS), (A,)),
    "v1": (Policy(proxy_protocol=ProxyProtocol.V1), (A,)),
    "v2": (Policy(proxy_protocol=ProxyProtocol.V2, check=ActiveCheck(path="/")), (A,)),
    "empty": (Policy(retries=Retries(on=(Retry.CONNECT_FAILURE, Retry.EMPTY_RESPONSE))), (A, B)),
    "retry503": (Policy(retries=Retries(on=(Retry.STATUS_503,))), (A, B)),
    "retry503unsafe": (Policy(retries=Retries(on=(Retry.STATUS_503,), unsafe=True)), (A, B)),
    "once": (Policy(retries=Retries(attempts=0)), (A, GONE)),
    "tls": (Policy(tls=Tls(ca="known.pem", server_name="endpoint.example")), (SECURE,)),
    "tlshost": (Policy(tls=Tls(ca="known.pem"), retries=Retries(attempts=0)), (SECURE,)),
    "tlsstrange": (
        Policy(tls=Tls(ca="known.pem", server_name="endpoint.example"), retries=Retries(attempts=0)),
        (STRANGE,),
    ),
    "tlsany": (Policy(tls=Tls(verify=False)), (STRANGE,)),
    "tlslater": (Policy(tls=Tls(ca="strange.pem", server_name="endpoint.example")), ()),
    "rate": (Policy(limits=Limits(client_rate=5)), (A,)),
    "crowd": (Policy(limits=Limits(client_connections=2)), (A,)),
    "checked": (
        Policy(check=ActiveCheck(path="/", interval=100, timeout=100, healthy=1, unhealthy=1, host="x%y")),
        (A, endpoint(3)),
    ),
    "breaker": (
        Policy(breaker=Breaker(errors=3, open_for=300, answers=True), retries=Retries(attempts=0)),
        (A, endpoint(4)),
    ),
    "logged": (Policy(access_log=True), (A,)),
    "slow": (Policy(timeouts=Timeouts(connect=100, server=100, queue=100)), (Server("10.8.66.1", 80),)),
    "tcp": (Policy(protocol=Protocol.TCP), (TCP_A, TCP_B)),
    "tcpcrowd": (Policy(protocol=Protocol.TCP, limits=Limits(client_connections=1)), (TCP_A,)),
    "tcprate": (Policy(protocol=Protocol.TCP, limits=Limits(client_rate=2)), (TCP_A,)),
    "tcpdead": (Policy(protocol=Protocol.TCP), (GONE, TCP_A)),
    "tcplogged": (Policy(protocol=Protocol.TCP, access_log=True), (TCP_A,)),
}


@dataclass
class Served(World):
    """The world with its HAProxy."""

    engine: Engine


NUMBERS = {name: number for number, name in enumerate(POLICIES, 1)}


def to(name: str) -> Route:
    """Return the cluster address of a service."""
    return route(NUMBERS[name], POLICIES[name][0])


@pytest.fixture(scope="module")
def node(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All services of the table, and one of IPv6, in one HAProxy."""
    directory = tmp_path_factory.mktemp("l7")
    known, strange = _tls(directory)
    engine = Engine(
        Settings(
            directory,
            threads=1,
            max_connections=1000,
            sample=1,
            access_log=directory / "access.log",
            authorities=directory,
        )
    )
    with world(namespaces) as found:
        for server in (A, B, endpoint(3), endpoint(4), *V6):
            found.endpoints.serve(server)
        for server in (TCP_A, TCP_B):
            found.endpoints.echo(server)
        for server, context in ((SECURE, known), (STRANGE, strange)):
            context.sni_callback = lambda s, name, c: found.endpoints.names.update({s: name})
            found.endpoints.serve(server, context)
        served = bring(
            engine,
            found,
            *(backend(name, NUMBERS[name], servers, policy) for name, (policy, servers) in POLICIES.items()),
            backend("six", 1, V6, family=Family.V6),
            backend("six-tcp", 1, (Server("fd08::1", 8080),), Policy(protocol=Protocol.TCP), Family.V6),
        )
        assert served == POLICIES.keys() | {"six", "six-tcp"}, engine.problems
        yield Served(found.pod, found.node, found.endpoints, engine)
        engine.stop()


def names(node: World, name: str, times: int = 8, **options: object) -> list[str]:
    """Return the endpoints of several requests."""
    return [node.get(to(name), **options).endpoint for _ in range(times)]  # type: ignore[arg-type]


def test_requests_are_spread_as_asked(node: World) -> None:
    assert set(names(node, "plain")) == {A.name, B.name}
    assert set(names(node, "least")) <= {A.name, B.name}
    assert set(names(node, "random", 30)) == {A.name, B.name}
    assert len(set(names(node, "source"))) == 1
    for name, headers in (
        ("header", [{"X-'Odd": f"user {n}"} for n in range(12)]),
        ("cookie", [{"Cookie": f"a=b; se'ss={n}"} for n in range(12)]),
    ):
        chosen = [set(names(node, name, 4, headers=each)) for each in headers]
        assert all(len(each) == 1 for each in chosen)
        assert set.union(*chosen) == {A.name, B.name}


def test_endpoints_see_who_asks_in_x_forwarded_for_if_that_is_on(node: World) -> None:
    seen = node.get(to("plain")).seen
    assert ["x-forwarded-for", "10.9.0.2"] in seen["headers"]
    assert seen["client"] != "10.9.0.2"
    assert not any(key.lower() == "x-forwarded-for" for key, _ in node.get(to("quiet")).seen["headers"])


def test_answers_say_where_they_are_from_if_that_is_on(node: World) -> None:
    answer = node.get(to("served"))
    assert answer.headers["x-served-by"] == answer.endpoint
    assert "x-served-by" not in node.get(to("plain")).headers


def test_headers_are_changed_and_values_arrive_as_they_were_written(node: World) -> None:
    answer = node.get(to("headers"), headers={"X-Secret": "1", "X-Set": "0", "X-N0": "old"})
    asked = [(key, value) for key, value in answer.seen["headers"] if key.startswith("x-")]
    for got in (asked, list(answer.headers.items())):
        found = dict(got)
        assert "x-secret" not in found
        assert found["x-'odd'|`name`"] == "yes"
        for number, text in enumerate(NASTY):
            assert found[f"x-n{number}"] == text
    assert [value for key, value in asked if key == "x-set"] == ["one", "two"]


@pytest.mark.parametrize(
    ("asked", "status", "result"),
    [
        ("/denied", 403, "Denied."),
        ("/denied/this", 451, "Denied."),
        ("/denied/but/not/this", 200, "/denied/but/not/this"),
        ("/old/way", 308, "https://new.example/%[src] x?a='1'"),
        ("/api/x?q=1", 200, "/v2/100%/x?q=1"),
        ("/cut/off", 200, "/off"),
        ("/cut?q", 200, "/?q"),
        ("/cute", 200, "/e"),
        ("/exact?q", 200, "/%[src]\"'x?q"),
        ("/exact/ly", 200, "/exact/ly"),
        ("/in/USER/o'Neil/42,/x", 200, "/in/42\\u/o'Neil%/x"),
        ("/}'", 418, "Denied."),
        ("/}'x", 200, "/}'x"),
        ("/v2/", 500, "Denied."),
        ("/", 200, "/"),
    ],
)
def test_the_first_path_rule_that_matches_counts(node: World, asked: str, status: int, result: str) -> None:
    answer = node.get(to("paths"), asked)
    assert answer.status == status
    if status == 200:
        assert answer.seen["path"] == result
    elif status == 308:
        assert answer.headers["location"] == result
    else:
        assert answer.body.decode() == result


def test_endpoints_get_the_proxy_protocol_if_they_want_it(node: World) -> None:
    assert node.get(to("v1")).seen["preface"].startswith(f"PROXY TCP4 10.9.0.2 {to('v1').address} ")
    assert node.get(to("v2")).seen["preface"] == f"v2 10.9.0.2 {to('v2').address}"
    assert node.get(to("plain")).seen["preface"] == ""


def test_what_an_endpoint_fails_at_another_does_but_never_twice_what_is_not_idempotent(node: World) -> None:
    node.endpoints.statuses[A.name] = 503
    try:
        assert names(node, "retry503") == [B.name] * 8
        statuses = [node.get(to("retry503"), method="POST", body=b"x").status for _ in range(4)]
        assert sorted(statuses) == [200, 200, 503, 503]
        statuses = [node.get(to("retry503unsafe"), method="POST", body=b"x").status for _ in range(4)]
        assert statuses == [200] * 4
        node.endpoints.statuses[A.name] = 0  # it hangs up
        assert names(node, "empty") == [B.name] * 8
        before = len(node.endpoints.requests)
        statuses = [node.get(to("empty"), method="POST", body=b"x").status for _ in range(4)]
        assert sorted(statuses) == [200, 200, 502, 502]
        assert len(node.endpoints.requests) == before + 4
    finally:
        node.endpoints.statuses.clear()
    statuses = [node.get(to("once")).status for _ in range(4)]
    assert sorted(statuses) == [200, 200, 503, 503]


def test_endpoints_are_spoken_to_in_tls_and_have_to_be_who_they_should(node: World) -> None:
    answer = node.get(to("tls"))
    assert (answer.status, answer.seen["sni"]) == (200, "endpoint.example")
    assert node.get(to("tlshost"), headers={"Host": "endpoint.example:80"}).status == 200
    assert node.get(to("tlshost"), headers={"Host": "other.example"}).status == 503
    assert node.get(to("tlsstrange")).status == 503
    assert node.get(to("tlsany")).status == 200


def test_an_endpoint_with_tls_is_added_to_a_service_that_had_none(node: Served) -> None:
    engine = node.engine
    assert node.get(to("tlslater")).status == 503
    reloads = engine.reloads
    served = dict(engine._served)
    served["tlslater"] = structs.replace(served["tlslater"], servers=(STRANGE,))
    bring(engine, node, *served.values())
    assert node.get(to("tlslater")).status == 200
    assert engine.reloads == reloads


def test_a_client_has_so_many_requests_in_a_second(node: World) -> None:
    with node.client(to("rate")) as client:
        statuses = [client.get().status for _ in range(10)]
    assert statuses == [200] * 5 + [429] * 5


def test_a_client_has_so_many_connections_at_a_time(node: World) -> None:
    with node.client(to("crowd")) as first, node.client(to("crowd")) as second:
        for client in (first, second):
            assert client.get().status == 200
        with node.client(to("crowd")) as third:
            answer = third.get()
            assert (answer.status, answer.headers["connection"]) == (429, "close")
        assert first.get().status == second.get().status == 200
    until(lambda: node.get(to("crowd")).status == 200)


def test_an_endpoint_that_is_unwell_gets_no_requests_until_it_is_well(node: World) -> None:
    sick = endpoint(3)
    assert set(names(node, "checked")) == {A.name, sick.name}
    node.endpoints.statuses[sick.name] = 500
    until(lambda: set(names(node, "checked", 4)) == {A.name})
    node.endpoints.statuses.clear()
    until(lambda: set(names(node, "checked", 4)) == {A.name, sick.name})
    assert (sick.name, "GET", "/") in node.endpoints.requests


def test_an_endpoint_that_fails_time_and_again_gets_nothing_for_a_while(node: World) -> None:
    failing = endpoint(4)
    node.endpoints.statuses[failing.name] = 500
    with node.client(to("breaker")) as client:
        statuses = [client.get().status for _ in range(20)]
        assert statuses.count(500) == 3, statuses
        node.endpoints.statuses.clear()
        until(lambda: client.get().endpoint == failing.name)


def test_an_endpoint_that_does_not_answer_costs_the_times_that_were_set(node: World) -> None:
    assert node.get(to("slow")).status == 503


def hello(node: World, name: str) -> str:
    with contextlib.closing(node.connect(to(name))) as connection:
        try:
            return connection.recv(100).decode().strip()
        except ConnectionResetError:
            return ""


def test_tcp_is_balanced_and_passed_through(node: World) -> None:
    assert sorted(hello(node, "tcp") for _ in range(4)) == [TCP_A.name] * 2 + [TCP_B.name] * 2
    assert [hello(node, "tcpdead") for _ in range(4)] == [TCP_A.name] * 4
    with contextlib.closing(node.connect(to("tcp"))) as connection:
        connection.recv(100)
        connection.sendall(b"\x00\xff GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(100) == b"\x00\xff GET / HTTP/1.1\r\n\r\n"


def test_tcp_has_its_limits(node: World) -> None:
    with contextlib.closing(node.connect(to("tcpcrowd"))) as first:
        assert first.recv(100).decode().strip() == TCP_A.name
        assert hello(node, "tcpcrowd") == ""
    until(lambda: hello(node, "tcpcrowd") == TCP_A.name)
    assert [hello(node, "tcprate") for _ in range(4)] == [TCP_A.name] * 2 + [""] * 2


def test_both_families_are_served(node: World) -> None:
    got = [node.get(route(1, family=Family.V6)) for _ in range(4)]
    assert sorted(a.endpoint for a in got) == [V6[0].name] * 2 + [V6[1].name] * 2
    assert ["x-forwarded-for", "fd09::2"] in got[0].seen["headers"]
    assert node.get(route(1, Policy(protocol=Protocol.TCP), Family.V6)).status == 200


def test_what_leads_nowhere_is_answered_or_refused(node: World) -> None:
    answer = node.get(route(3000))
    assert (answer.status, answer.headers["content-type"]) == (503, "text/plain")
    with contextlib.closing(node.connect(route(3000, Policy(protocol=Protocol.TCP)))) as connection:
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            pass


def test_node_originated_requests_go_the_same_way(node: World) -> None:
    here = World(node.node, node.node, node.endpoints)
    assert set(names(here, "plain")) == {A.name, B.name}


def test_only_services_that_ask_for_it_are_in_the_access_log(node: Served) -> None:
    engine = node.engine
    path = engine.settings.access_log
    assert path
    before = path.read_text()
    assert node.get(to("plain")).status == 200
    assert node.get(to("logged"), '/a"b?secret').status == 200
    assert hello(node, "tcplogged")
    until(lambda: path.read_text().count("\n") >= before.count("\n") + 2)
    lines = [json.loads(line) for line in path.read_text().removeprefix(before).splitlines()]
    assert sorted(line["backend"] for line in lines) == ["logged", "tcplogged"]
    assert {line.get("path") for line in lines} == {'/a"b', None}
    assert lines[0]["us"].isdigit()


def test_a_sample_of_requests_is_told_to_a_socket_in_the_jail(node: Served) -> None:
    engine = node.engine
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sampler:
        sampler.bind(str(engine.settings.sample_socket))
        engine.settings.sample_socket.chmod(0o666)
        sampler.settimeout(10)
        assert node.get(to("plain"), "/sampled").status == 200
        line = json.loads(sampler.recv(9000))
    engine.settings.sample_socket.unlink()
    assert (line["backend"], line["path"], line["status"]) == ("plain", "/sampled", 200)
