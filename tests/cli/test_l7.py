"""`podwire l7`: what the proxy does for services, why it does not, and what is wrong in an annotation."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.l7 import COLUMNS
from node.server import CniService, InspectService, Report, serving
from tests.node.fake_l7 import DB, WEB, FakeL7, busy, stats
from tests.node.world import podwire

REFUSED = "Service shop/shy: metadata.annotations['podwire.io/proxy']: retries.attempts: 99: plain balancing"
NONE: Any = None

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """A function that runs `podwire l7` against a daemon with some proxy and problems."""
    with contextlib.ExitStack() as stack:
        numbers = iter(range(100))

        def run(proxy: FakeL7 | None, *words: str, problems: tuple[str, ...] = ()) -> tuple[int, str, str]:
            path = tmp_path / f"{next(numbers)}.sock"
            report = Report(lambda: True, lambda: problems, lambda: "a test")
            inspect = InspectService(NONE, NONE, NONE, report, stats(proxy) if proxy else None)
            stack.enter_context(serving(path, CniService(NONE), inspect))
            return podwire("l7", *words, "--socket", str(path))

        yield run


def cells(line: str) -> list[str]:
    """A table's cells; single spaces are within one."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_services_with_their_figures(ask: Ask) -> None:
    status, out, err = ask(busy(), "show")
    assert (status, err) == (0, "")
    head, db, web = (cells(line) for line in out.splitlines())
    assert head == [column.upper() for column in COLUMNS]
    assert db[:8] == ["shop/db:sql", "IPv6", "tcp", "round-robin", "served", "1 of 1", "7", "-"]
    assert web[:8] == ["shop/web", "IPv4", "http", "round-robin", "served", "1 of 2", "12", "2"]
    assert web[8].endswith(" ms")
    assert 1.5 < float(web[8].removesuffix(" ms")) < 2.5
    assert 70 < float(web[10].removesuffix(" ms")) < 110
    assert web[11:] == ["3", "1", "5", "2 (5 wait)"]


def test_endpoints(ask: Ask) -> None:
    proxy = busy()
    proxy.stat[WEB.name, "10.0.0.9:8080"] = {"status": "DRAIN", "req_tot": 40, "scur": 1}
    status, out, _ = ask(proxy, "show", "shop/web", "--endpoints")
    assert status == 0
    services, endpoints = out.split("\n\n")
    assert "shop/db" not in services
    assert [cells(line)[1:5] for line in endpoints.splitlines()[1:]] == [
        ["10.0.0.1:8080", "UP", "L7OK", "12"],
        ["10.0.0.2:8080", "DOWN", "L4CON", "0"],
        ["10.0.0.9:8080", "DRAIN", "-", "40"],  # leaves
    ]
    _, out, _ = ask(busy(), "show", "shop/db", "--endpoints")
    assert "[fd00::1]:5432" in out


def test_what_is_not_served_is_followed_by_why(ask: Ask) -> None:
    proxy = busy()
    proxy.up, proxy.served, proxy.problems = False, frozenset(), ("the program haproxy is not installed",)
    status, out, _ = ask(proxy, "show", problems=(REFUSED, "something else is wrong"))
    assert status == 0
    table, why = out.split("\n\n")
    states = {cells(line)[0]: cells(line)[4] for line in table.splitlines()[1:]}
    assert states == {"shop/db:sql": "closed", "shop/web": "plain", "shop/shy": "refused"}
    assert why.splitlines() == [
        "shop/db:sql (IPv6) is closed: HAProxy does not run",
        "shop/web (IPv4) is plain: HAProxy does not run",
        f"shop/shy (annotation) is refused: {REFUSED}",
        "the program haproxy is not installed",
    ]


def test_services_as_json_have_all_figures(ask: Ask) -> None:
    status, out, _ = ask(busy(), "show", "-o", "json", problems=(REFUSED,))
    assert status == 0
    found = json.loads(out)
    assert (found["running"], found["reloads"], found["restarts"]) == (True, 3, 1)
    db, web, shy = found["services"]
    assert web["addresses"] == ["10.96.0.1:80", "nodeport:30080"]
    assert (web["backend"], web["state"], web["why"]) == (WEB.name, "served", "")
    figures = web["figures"]
    assert (figures["code_2xx"], figures["code_5xx"], figures["retries"], figures["queued_now"]) == (
        10,
        2,
        3,
        5,
    )
    assert 0.0015 < web["p50"] < 0.0025
    assert [e["address"] for e in web["endpoints"]] == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert db["figures"]["requests"] == 7
    assert (shy["service"], shy["state"], shy["why"]) == ("shop/shy", "refused", REFUSED)
    assert "configuration" not in found


def test_without_services_that_is_said(ask: Ask) -> None:
    assert ask(FakeL7(backends={}), "show") == (0, "no service asks for the L7 proxy\n", "")
    assert ask(None, "show") == (0, "no service asks for the L7 proxy\n", "")


@pytest.mark.parametrize("verb", ["show", "config"])
def test_a_service_that_does_not_ask_for_it_is_an_error(ask: Ask, verb: str) -> None:
    status, out, err = ask(busy(), verb, "web")
    assert (status, out) == (1, "")
    assert err.startswith("podwire: service default/web ")
    assert len(err.splitlines()) == 1


def test_the_configuration_whole_and_of_one_service(ask: Ask) -> None:
    proxy = busy()
    assert ask(proxy, "config") == (0, proxy.configuration(), "")
    assert ask(proxy, "config", "shop/db") == (0, f"backend {DB.name}\n    mode tcp\n", "")
    assert ask(proxy, "config", "shop/web")[1] == f"backend {WEB.name}\n    balance roundrobin\n"
    status, out, err = ask(FakeL7(backends={}, up=False), "config")
    assert (status, out) == (1, "")
    assert "no service asks for the L7 proxy" in err


def test_the_schema_is_printed() -> None:
    status, out, _ = podwire("l7", "schema")
    assert status == 0
    assert json.loads(out)["$schema"].endswith("2020-12/schema")


SERVICE = """\
kind: Service
metadata:
  name: web
  namespace: shop
  annotations:
    {key}: '{value}'
spec:
  ports: [{{port: 80, protocol: {protocol}}}]
"""


def service(value: str, protocol: str = "TCP", key: str = "podwire.io/proxy") -> str:
    return SERVICE.format(value=value, protocol=protocol, key=key)


PLACE = "Service shop/web: metadata.annotations['podwire.io/proxy']"
GOOD = '{"ip-protocol": "tcp"}'
FILES = [
    ("an annotation", GOOD, ""),
    ("with a mistake", '{"ip-protocol": "udp"}', "ip-protocol: "),
    ("with a key twice", '{"ip-protocol": "tcp", "ip-protocol": "http"}', "ip-protocol: "),
    ("broken off", '{"ip-protocol": ', "no JSON"),
    ("manifests", f"{service(GOOD)}---\nkind: ConfigMap\n---\n---\n{service(GOOD)}", ""),
    ("F5's annotation", service(GOOD, key="asp.f5.com/config"), ""),
    ("a list", json.dumps({"kind": "ServiceList", "items": [{"kind": "Service"}, None]}), "no Service with"),
    ("a mistake in a manifest", service('{"ip-protocol": "udp"}'), f"{PLACE}: ip-protocol: "),
    ("nothing to proxy", service(GOOD, "UDP"), f"{PLACE}: spec.ports has none with TCP"),
    (
        "not a string",
        "{kind: Service, metadata: {annotations: {podwire.io/proxy: {a: 1}}}}",
        "is a dict, not",
    ),
    ("no manifests", "kind: [", "neither an annotation nor manifests"),
    ("other manifests", "kind: Pod", "no Service with the annotation"),
    ("strange ones", "kind: Service\nmetadata: [1]\nspec: 2\n---\n3", "no Service with the annotation"),
    ("nothing", "", "no Service with the annotation"),
]


@pytest.mark.parametrize(("content", "mistake"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_mistakes_are_sentences_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, mistake: str
) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    status, out, err = podwire("l7", "check", str(path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert podwire("l7", "check", "-")[0] == status
    if mistake:
        assert (status, out) == (1, "")
        assert err.startswith(f"podwire: {path}: ")
        assert mistake in err
        assert len(err.splitlines()) == 1
    else:
        assert (status, err) == (0, "")
        assert "no mistakes found" in out


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    status, _, err = podwire("l7", "check", str(tmp_path / "none"))
    assert (status, err) == (1, f"podwire: {tmp_path}/none: No such file or directory\n")
    path = tmp_path / "file"
    path.write_bytes(b"{\xff}")
    assert "not UTF-8 at byte 1" in podwire("l7", "check", str(path))[2]
