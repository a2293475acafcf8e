"""HAProxy's configuration as text: what it depends on, and that HAProxy takes whatever a policy can say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import structs

from netlink.family import Family
from proxy.l7 import process
from proxy.l7.model import Backend
from proxy.l7.places import address
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
    Tls,
)
from proxy.l7.render import Settings, backend_at, render, routes_of, structure
from proxy.l7.words import argument, command_word, literal, replacement, word
from tests.proxy.l7.traffic import backend, endpoint, route

A, B = endpoint(1), endpoint(2)


def test_the_structure_is_the_same_whatever_endpoints_and_routes_there_are(tmp_path: Path) -> None:
    config = Settings(tmp_path)
    one, other = backend("one", 1, (A,)), structs.replace(backend("one", 2, (B,)))
    assert structure({"one": one}, config) == structure({"one": other}, config)
    policy = Policy(balance=Balance.RANDOM)
    changed = structs.replace(one, policy=policy)
    assert structure({"one": one}, config) != structure({"one": changed}, config)


def test_routes_are_by_address_and_port_those_of_ipv6_by_the_listening_address(
    tmp_path: Path,
) -> None:
    node_port = route(1)._replace(address="", port=30000)
    four = structs.replace(backend("four", 1, ()), routes=(route(1), node_port))
    six = structs.replace(
        backend("six", 1, (), family=Family.V6), routes=(node_port._replace(family=Family.V6),)
    )
    config = Settings(tmp_path)
    assert routes_of({"four": four, "six": six}, Protocol.HTTP, config) == {
        "10.96.0.1:80": "four",
        "0.0.0.0:30000": "four",
        f"{address(Protocol.HTTP, Family.V6, 'test/six')}:10000": "six",
    }
    assert routes_of({"four": four}, Protocol.TCP, config) == {}


def test_lines_before_and_within_backends_are_told_apart(tmp_path: Path) -> None:
    text = render({"one": backend("one", 1, (A,)), "two": backend("two", 2, (A,))}, Settings(tmp_path))
    lines = text.splitlines()
    first, second = lines.index("backend one") + 1, lines.index("backend two") + 1
    assert [backend_at(text, n) for n in (1, first, second - 1, second, len(lines))] == [
        "", "one", "one", "two", "two"
    ]  # fmt: skip


def test_there_are_as_many_lines_for_listeners_whatever_services_there_are(tmp_path: Path) -> None:
    def front(count: int) -> int:
        many = {f"s{n}": backend(f"s{n}", n, (A,)) for n in range(1, count + 1)}
        return render(many, Settings(tmp_path)).splitlines().index("backend s1")

    assert front(1) == front(500)


def test_words_keep_what_is_in_them() -> None:
    assert word("10.8.0.1:80") == "10.8.0.1:80"
    assert word("it's") == "'it'\\x27's'"
    assert word("a\nb") == "'a'\\x0a'b'"
    assert word("") == "''"
    with pytest.raises(ValueError, match="NUL"):
        word("\0")
    assert (literal("100%"), literal("")) == ("100%%", "%[str('')]")
    assert argument("a,b'") == "'a,b'\\'''"
    assert replacement(r"\1\x\\") == r"\1\\x\\\\"
    assert command_word("a b;c\\") == r"a\ b\;c\\"


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30)
TOKENS = st.text("!#$%&'*+.^_`|~0aZ-", min_size=1, max_size=12)
PATH = TEXT.map(lambda text: "/" + text.translate({ord(c): None for c in " ?#"}))
CHANGES = st.builds(
    HeaderChanges,
    remove=st.tuples(TOKENS),
    set=st.tuples(st.tuples(TOKENS, TEXT)),
    add=st.tuples(st.tuples(TOKENS, TEXT)),
)
RULES = st.one_of(
    st.builds(PathRule, st.sampled_from([Match.PREFIX, Match.EXACT]), PATH, deny=st.integers(400, 599)),
    st.builds(PathRule, st.just(Match.PREFIX), PATH, redirect=PATH, code=st.sampled_from([301, 308])),
    st.builds(PathRule, st.sampled_from([Match.PREFIX, Match.EXACT]), PATH, rewrite=PATH),
    st.builds(
        PathRule, st.just(Match.REGEX), st.sampled_from(["^(a|b')c", "[)(]}#", "(?i)x y"]), rewrite=PATH
    ),
)
HTTP = st.builds(
    Policy,
    balance=st.sampled_from(Balance),
    hash_on=TOKENS,
    served_by=st.booleans(),
    transparent=st.just(False),
    access_log=st.booleans(),
    proxy_protocol=st.sampled_from(ProxyProtocol),
    retries=st.builds(
        Retries,
        attempts=st.integers(0, 10),
        on=st.lists(st.sampled_from(Retry), min_size=1, unique=True).map(tuple),
        unsafe=st.booleans(),
    ),
    check=st.none()
    | st.builds(ActiveCheck, path=PATH, host=st.just("x.example"), port=st.integers(0, 65535)),
    breaker=st.none() | st.builds(Breaker, errors=st.integers(1, 1000), answers=st.booleans()),
    limits=st.builds(Limits, *(st.integers(0, 10**6) for _ in range(4))),
    tls=st.none() | st.builds(Tls, verify=st.booleans(), server_name=st.sampled_from(["", "a.example"])),
    request_headers=CHANGES,
    response_headers=CHANGES,
    paths=st.lists(RULES, max_size=5).map(tuple),
)
OF_TCP = st.builds(
    Policy,
    protocol=st.just(Protocol.TCP),
    balance=st.sampled_from([Balance.ROUND_ROBIN, Balance.LEAST_CONNECTIONS, Balance.RANDOM, Balance.SOURCE]),
    x_forwarded_for=st.just(False),
    access_log=st.booleans(),
    proxy_protocol=st.sampled_from(ProxyProtocol),
    check=st.none() | st.builds(ActiveCheck, path=st.just("") | PATH),
    breaker=st.none() | st.builds(Breaker, errors=st.integers(1, 1000)),
    limits=st.builds(Limits, *(st.integers(0, 10**6) for _ in range(4))),
    tls=st.none() | st.builds(Tls, verify=st.booleans(), server_name=st.sampled_from(["", "a.example"])),
)


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(policies=st.lists(HTTP | OF_TCP, min_size=4, max_size=20), transparent=st.booleans())
def test_haproxy_takes_whatever_a_policy_can_say(
    tmp_path: Path, policies: list[Policy], transparent: bool
) -> None:
    config = Settings(tmp_path, access_log=tmp_path / "log", threads=2, drain_seconds=5)
    process.prepare(config)
    found: dict[str, Backend] = {}
    for number, policy in enumerate(policies):
        family = Family.V4 if number % 2 else Family.V6
        policy = structs.replace(policy, transparent=transparent)
        found[f"s{number}"] = backend(f"s{number}", number, (endpoint(1, family),), policy, family)
    for protocol in Protocol:
        config.map_of(protocol).write_text("")
    config.configuration.write_text(render(found, config))
    assert process.check(config, config.configuration) == ()
