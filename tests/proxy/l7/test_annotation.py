"""The annotation: what it says is a policy, or it is refused with one sentence; the schema says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.l7.annotation import AnnotationError, parse
from proxy.l7.fields import places, time_text
from proxy.l7.keys import FIELDS
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

DOCS = Path(__file__).parents[3] / "docs"
FULL = {
    "ip-protocol": "http",
    "load-balancing-mode": "cookie",
    "hash-on": "session",
    "flags": {
        "x-forwarded-for": False,
        "x-served-by": True,
        "external": True,
        "transparent": False,
        "access-log": True,
    },
    "proxy-protocol": "v2",
    "fail": "closed",
    "timeouts": {
        "connect": "500ms",
        "client": "1m",
        "server": "30s",
        "request": "5s",
        "keep-alive": "15s",
        "queue": "1s",
        "tunnel": "2h",
    },
    "retries": {"attempts": 2, "on": ["connect-failure", "503"], "unsafe": True},
    "health-check": {
        "path": "/healthz?full=1",
        "host": "web.shop.example",
        "status": "200-299,404",
        "interval": "5s",
        "timeout": "2s",
        "healthy": 1,
        "unhealthy": 5,
        "port": 9000,
    },
    "circuit-breaker": {"errors": 5, "open-for": "30s", "answers": True},
    "limits": {
        "client-connections": 10,
        "client-rate": 50,
        "endpoint-requests": 20,
        "endpoint-queue": 100,
    },
    "tls": {"verify": True, "ca": "shop.pem", "server-name": "web.shop.example"},
    "headers": {
        "request": {"remove": ["X-Debug"], "set": {"Host": "web", "X-A": "50% off; a 'b' #c"}},
        "response": {"add": {"X-B": "1"}},
    },
    "paths": [
        {"exact": "/status"},
        {"prefix": "/admin", "deny": 403},
        {"prefix": "/old/", "rewrite": "/new/"},
        {"regex": "^/v1/([0-9]+)", "rewrite": "/v2/\\1"},
        {"exact": "/", "redirect": "https://www.example/?a=b#c", "code": 308},
    ],
}
POLICY = Policy(
    protocol=Protocol.HTTP,
    balance=Balance.COOKIE,
    hash_on="session",
    x_forwarded_for=False,
    served_by=True,
    external=True,
    proxy_protocol=ProxyProtocol.V2,
    access_log=True,
    fail_open=False,
    timeouts=Timeouts(500, 60_000, 30_000, 5_000, 15_000, 1_000, 7_200_000),
    retries=Retries(2, (Retry.CONNECT_FAILURE, Retry.STATUS_503), True),
    check=ActiveCheck("/healthz?full=1", "web.shop.example", "200-299,404", 5_000, 2_000, 1, 5, 9000),
    breaker=Breaker(5, 30_000, True),
    limits=Limits(10, 50, 20, 100),
    tls=Tls(True, "shop.pem", "web.shop.example"),
    request_headers=HeaderChanges(("X-Debug",), (("Host", "web"), ("X-A", "50% off; a 'b' #c"))),
    response_headers=HeaderChanges(add=(("X-B", "1"),)),
    paths=(
        PathRule(Match.EXACT, "/status"),
        PathRule(Match.PREFIX, "/admin", deny=403),
        PathRule(Match.PREFIX, "/old/", rewrite="/new/"),
        PathRule(Match.REGEX, "^/v1/([0-9]+)", rewrite="/v2/\\1"),
        PathRule(Match.EXACT, "/", redirect="https://www.example/?a=b#c", code=308),
    ),
)


def said(document: Any) -> Policy:
    return parse(json.dumps(document))


def wrong(text: str) -> str:
    with pytest.raises(AnnotationError) as caught:
        parse(text)
    return str(caught.value)


def test_every_field_is_read() -> None:
    assert said(FULL) == POLICY
    given = {place for place, _ in leaves(FULL)}
    told = {place.replace("[]", "") for place, field in places(FIELDS) if not field.kind.fields}
    unused = {f"headers.{way}" for way in ("request.add", "response.remove", "response.set")}
    assert told - {re.sub(r"(set|add)\..*", r"\1", place) for place in given} == unused


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, place)
    else:
        yield place, value


def test_an_empty_object_is_all_defaults() -> None:
    assert parse("{}") == Policy()
    empty: dict[str, Any] = {key: {} for key in ("flags", "timeouts", "retries", "limits", "headers")}
    assert said(empty | {"paths": []}) == Policy()
    assert said({"health-check": {}, "tls": {}}) == Policy(check=ActiveCheck(), tls=Tls())
    assert said({"tls": True}) == Policy(tls=Tls())
    assert said({"tls": False}) == Policy()
    assert said({"circuit-breaker": {"errors": 3}}) == Policy(breaker=Breaker(3))


def test_a_default_that_is_told_is_the_one_that_counts() -> None:
    told: dict[str, Any] = {}
    for place, field in places(FIELDS):
        if field.default is None or place.startswith(("paths", "circuit-breaker", "tls")):
            continue
        *parents, key = place.split(".")
        target = told
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = field.default
    del told["health-check"]["status"]  # it needs a path
    assert len(told) == 9
    assert said(told) == Policy(check=ActiveCheck())
    assert said({"circuit-breaker": {"errors": 1, "open-for": "10s", "answers": False}}).breaker == Breaker(1)
    assert said({"paths": [{"exact": "/", "redirect": "/a", "code": 302}]}).paths[0].code == 302


def test_the_example_of_f5s_proxy_means_the_same_here() -> None:
    document = {
        "ip-protocol": "http",
        "load-balancing-mode": "round-robin",
        "flags": {"x-forwarded-for": True, "x-served-by": True},
    }
    assert said(document) == Policy(served_by=True)
    assert said({"load-balancing-mode": "least-connections-member"}).balance is Balance.LEAST_CONNECTIONS


def test_what_tcp_has_is_taken_for_tcp() -> None:
    document = {
        "ip-protocol": "tcp",
        "load-balancing-mode": "source",
        "flags": {"x-forwarded-for": False, "transparent": True, "access-log": True},
        "timeouts": {"connect": "1s", "tunnel": "1h", "queue": "1s"},
        "retries": {"attempts": 1, "on": ["connect-failure"], "unsafe": False},
        "health-check": {"path": "/healthz", "port": 8081},
        "circuit-breaker": {"errors": 2, "answers": False},
        "limits": {"client-connections": 5},
        "tls": {"server-name": "db.example"},
    }
    assert said(document).protocol is Protocol.TCP


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1ms", 1), ("500ms", 500), ("2s", 2_000), ("90s", 90_000), ("1m", 60_000), ("24h", 86_400_000)],
)
def test_a_time_is_a_number_with_a_unit(text: str, milliseconds: int) -> None:
    assert said({"timeouts": {"server": text}}).timeouts.server == milliseconds
    assert time_text(milliseconds) in (text, "90s")


REFUSED: list[tuple[Any, str]] = [
    ([], "the annotation: a list is not an object with keys such as ip-protocol"),
    ({"a": 1}, "a: there is no such key; known here are ip-protocol, load-balancing-mode, hash-on, "),
    ({"timeout": {}}, "timeout: there is no such key; did you mean timeouts?"),
    (
        {"flags": {"xForwardedFor": True}},
        "flags.xForwardedFor: there is no such key; did you mean x-forwarded",
    ),
    ({"x-forwarded-for": True}, "x-forwarded-for: there is no such key; did you mean flags.x-forwarded-for?"),
    ({"a\nb": 1}, '"a\\nb": there is no such key'),
    ({"ip-protocol": "HTTP"}, 'ip-protocol: "HTTP" is not one of http, tcp'),
    ({"ip-protocol": None}, "ip-protocol: null is not one of"),
    ({"load-balancing-mode": "round robin"}, 'load-balancing-mode: "round robin" is not one of round-robin'),
    ({"load-balancing-mode": "header"}, 'load-balancing-mode: "header" needs hash-on'),
    ({"hash-on": "X-A"}, 'hash-on: "X-A" needs load-balancing-mode header or cookie; it is "round-robin"'),
    ({"load-balancing-mode": "cookie", "hash-on": "a=b"}, 'hash-on: "a=b" is not the name of a header'),
    ({"flags": {"external": "yes"}}, 'flags.external: "yes" is not true or false'),
    ({"flags": {"external": 1}}, "flags.external: 1 is not true or false"),
    ({"flags": []}, "flags: a list is not an object with keys such as x-forwarded-for"),
    (
        {"flags": {"transparent": True}, "proxy-protocol": "v1"},
        'flags.transparent: true does not go with proxy-protocol "v1"',
    ),
    (
        {"flags": {"transparent": True, "external": True}},
        "flags.transparent: true does not go with flags.external true",
    ),
    ({"fail": "close"}, 'fail: "close" is not one of open, closed; did you mean closed?'),
    ({"timeouts": {"client": 5}}, "timeouts.client: 5 is not a time: it needs a unit, as in"),
    ({"timeouts": {"client": True}}, 'timeouts.client: true is not a time such as "500ms"'),
    ({"timeouts": {"client": "1.5s"}}, 'timeouts.client: "1.5s" is not a time such as "500ms"'),
    ({"timeouts": {"client": "5s\n"}}, 'timeouts.client: "5s\\n" is not a time'),
    ({"timeouts": {"client": "٣s"}}, 'timeouts.client: "\\u0663s" is not a time'),
    ({"timeouts": {"client": "0s"}}, 'timeouts.client: "0s" is not a time from 1ms to 24h'),
    ({"timeouts": {"connect": "2m"}}, 'timeouts.connect: "2m" is not a time from 1ms to 1m'),
    ({"retries": {"attempts": 11}}, "retries.attempts: 11 is not a whole number from 0 to 10"),
    ({"retries": {"attempts": 1.5}}, "retries.attempts: 1.5 is not a whole number"),
    ({"retries": {"attempts": True}}, "retries.attempts: true is not a whole number"),
    ({"retries": {"on": "503"}}, 'retries.on: "503" is not a list with 1 to 7 entries'),
    ({"retries": {"on": []}}, "retries.on: a list of 0 is not a list with 1 to 7 entries"),
    ({"retries": {"on": ["404"]}}, 'retries.on[0]: "404" is not one of connect-failure'),
    ({"retries": {"on": ["503", "503"]}}, 'retries.on[1]: "503" is the same as retries.on[0]'),
    ({"health-check": {"interval": "1ms"}}, 'health-check.interval: "1ms" is not a time from 100ms to 1h'),
    ({"health-check": {"path": "healthz"}}, 'health-check.path: "healthz" is not a path that begins with /'),
    ({"health-check": {"status": "200"}}, 'health-check.status: "200" needs health-check.path'),
    (
        {"health-check": {"path": "/", "status": "2xx"}},
        'health-check.status: "2xx" is not status codes such as',
    ),
    (
        {"health-check": {"path": "/", "status": "300-200"}},
        'health-check.status: "300-200" is not status codes',
    ),
    ({"health-check": {"path": "/", "host": "a b"}}, 'health-check.host: "a b" is not a host name'),
    ({"health-check": {"port": 0}}, "health-check.port: 0 is not a whole number from 1 to 65535"),
    ({"circuit-breaker": {}}, "circuit-breaker.errors is missing"),
    ({"limits": {"client-rate": -1}}, "limits.client-rate: -1 is not a whole number from 0 to 1000000"),
    ({"limits": {"client-rate": 1e300}}, "limits.client-rate: 1e+300 is not a whole number"),
    ({"limits": {"endpoint-queue": 3}}, "limits.endpoint-queue: 3 needs limits.endpoint-requests"),
    ({"tls": 1}, "tls: 1 is not true, false or an object with keys such as verify"),
    ({"tls": {"ca": "../shadow"}}, 'tls.ca: "../shadow" is not the plain name of a file'),
    ({"tls": {"ca": ".."}}, 'tls.ca: ".." is not the plain name of a file'),
    ({"tls": {"ca": "a", "verify": False}}, 'tls.ca: "a" does not go with tls.verify false'),
    ({"tls": {"server-name": "10.0.0.1"}}, 'tls.server-name: "10.0.0.1" is not a host name'),
    ({"headers": {"request": {"set": {"X A": "1"}}}}, 'headers.request.set: "X A" is not a header\'s name'),
    (
        {"headers": {"request": {"set": {"X": "a\r\nb"}}}},
        'headers.request.set.X: "a\\r\\nb" is not a header\'s',
    ),
    ({"headers": {"request": {"set": {"X": "a\0"}}}}, 'headers.request.set.X: "a\\u0000" is not a header'),
    ({"headers": {"request": {"set": {"X": "é"}}}}, 'headers.request.set.X: "\\u00e9" is not a header'),
    ({"headers": {"request": {"set": {"X": "\ud800"}}}}, 'headers.request.set.X: "\\ud800" is not a header'),
    ({"headers": {"request": {"set": {"X": ""}}}}, 'headers.request.set.X: "" is not a header\'s value'),
    ({"headers": {"request": {"set": {"X": " a"}}}}, 'headers.request.set.X: " a" is not without spaces'),
    (
        {"headers": {"request": {"set": {"X": "1", "x": "2"}}}},
        "headers.request.set.x: it is there already, as X",
    ),
    (
        {"headers": {"request": {"add": {"host": "a"}}}},
        'headers.request.add: "host" is not a header that can',
    ),
    ({"headers": {"request": {"remove": ["HOST"]}}}, 'headers.request.remove[0]: "HOST" is not a header'),
    (
        {"headers": {"response": {"set": {f"X-{n}": "a" * 1000 for n in range(3)}}}},
        "headers.response: set and add have 3009 bytes together, more than 2048",
    ),
    ({"paths": {}}, "paths: an object is not a list with 0 to 100 entries"),
    ({"paths": [{"prefix": "/"}] * 101}, "paths: a list of 101 is not a list with 0 to 100 entries"),
    ({"paths": [{}]}, "paths[0]: it has nothing; a rule has one of prefix, exact and regex"),
    ({"paths": [{"exact": "/", "regex": "a"}]}, "paths[0]: it has exact and regex; a rule has one of"),
    ({"paths": [{"exact": "/a"}, {"exact": "/b", "deny": 200}]}, "paths[1].deny: 200 is not a whole number"),
    (
        {"paths": [{"exact": "/a", "deny": 403, "rewrite": "/b"}]},
        "paths[0]: deny and rewrite: a rule has one",
    ),
    ({"paths": [{"exact": "/a", "code": 301}]}, "paths[0].code: 301 needs paths[0].redirect"),
    (
        {"paths": [{"exact": "/a", "redirect": "/b", "code": 304}]},
        "paths[0].code: 304 is not one of 301, 302",
    ),
    ({"paths": [{"exact": "/a", "redirect": "b"}]}, 'paths[0].redirect: "b" is not a URL, or a path'),
    ({"paths": [{"exact": "/a?b"}]}, 'paths[0].exact: "/a?b" is not a path that begins with /'),
    ({"paths": [{"exact": "/a", "rewrite": ""}]}, 'paths[0].rewrite: "" leaves no / at the beginning'),
    (
        {"paths": [{"prefix": "/a", "rewrite": "b"}]},
        'paths[0].rewrite: "b" does not begin with /; prefix is "/a"',
    ),
    (
        {"paths": [{"prefix": "/a", "rewrite": "/\\1"}]},
        'paths[0].rewrite: "/\\\\1" has a \\, which is for groups',
    ),
    ({"paths": [{"regex": "^/(a)", "rewrite": "/\\2"}]}, 'paths[0].rewrite: "/\\\\2" has \\2; the groups of'),
    ({"paths": [{"regex": "(", "deny": 403}]}, 'paths[0].regex: "(" is not a regular expression: missing )'),
    (
        {"paths": [{"regex": "(a+)+$", "deny": 403}]},
        'paths[0].regex: "(a+)+$" is not soon decided: a repeated',
    ),
    ({"ip-protocol": "tcp", "paths": []}, "paths: ip-protocol tcp has no such key, only http"),
    (
        {"ip-protocol": "tcp", "timeouts": {"request": "1s"}},
        "timeouts.request: ip-protocol tcp has no such key, only http",
    ),
    (
        {"ip-protocol": "tcp", "flags": {"x-forwarded-for": True}},
        "flags.x-forwarded-for: true needs ip-protocol http; it is tcp",
    ),
    (
        {"ip-protocol": "tcp", "retries": {"on": ["connect-failure", "503"]}},
        'retries.on: "503" needs ip-protocol http; it is tcp',
    ),
    (
        {"ip-protocol": "tcp", "load-balancing-mode": "cookie", "hash-on": "a"},
        'load-balancing-mode: "cookie" needs ip-protocol http; it is tcp',
    ),
]


@pytest.mark.parametrize(("document", "sentence"), REFUSED, ids=[s[:40] for _, s in REFUSED])
def test_what_cannot_be_is_one_sentence_with_field_and_value(document: Any, sentence: str) -> None:
    told = wrong(json.dumps(document))
    assert told.startswith(sentence)
    assert told.isprintable()
    assert len(told) < 400


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the annotation is no JSON: Expecting value in line 1, column 1"),
        ('{"fail":\n open}', "the annotation is no JSON: Expecting value in line 2, column 2"),
        ('{"fail": "open", "fail": "closed"}', "fail: an object has this key twice"),
        ('{"headers": {"request": {"set": {"X": "1", "X": "2"}}}}', "X: an object has this key twice"),
        ('{"limits": {"client-rate": NaN}}', "the annotation is no JSON: NaN is no number in JSON"),
        ('{"limits": {"client-rate": 1e999}}', "limits.client-rate: Infinity is not a whole number"),
        ("9" * 5000, "the annotation: it has a number with too many digits"),
        ("[" * 60_000, "the annotation: its lists and objects go too deep"),
        ('{"a":' * 10_000, "the annotation: its lists and objects go too deep"),
        ('"' + "x" * 65_536 + '"', "the annotation: 65538 bytes are more than 65536"),
        ('"' + "x" * 65_000 + '"', 'the annotation: "' + "x" * 39 + "…" + "x" * 9 + '" is not an object'),
    ],
)
def test_what_is_no_json_or_too_much_is_one_sentence(text: str, sentence: str) -> None:
    assert wrong(text).startswith(sentence)
