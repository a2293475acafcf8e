"""`podwire doctor`: says what makes trouble and what mends it, changes nothing, and tells by its status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.doctor import CHECKS
from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from node.doctor.findings import Check, Finding, Severity
from node.doctor.view import Context, View
from tests.node.kube_proxy import (
    EVERYWHERE,
    load,
    load_everywhere,
    rules,
    ruleset,
    running_in,
    saved_everywhere,
)
from tests.node.world import podwire

KUBE_PROXY = "--check", "kube-proxy"
ABSENT = "--socket", "/nonexistent/podwire.sock"
VIEW = View("node1", version="0", last_sync=1.0)


def test_a_clean_node_is_ok(namespaces: Callable[[], str]) -> None:
    status, out, err = netns.run(namespaces(), podwire, "doctor", *KUBE_PROXY)
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["CHECK", "SEVERITY", "FINDING", "REMEDY"],
        ["kube-proxy", "-", "ok", "-"],
    ]


def test_a_node_of_kubelet_and_others_is_ok_and_notes_name_what_looks_like_kube_proxys(
    namespaces: Callable[[], str],
) -> None:
    node = namespaces()
    for variant, family in EVERYWHERE:
        netns.run(node, load, variant, family, rules(family, kube_proxys=False))
    status, out, _ = netns.run(node, podwire, "doctor", *KUBE_PROXY)
    assert status == 0
    assert "kube-proxy  -         ok" in out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    place = "table nat of iptables-nft (IPv6)"
    mine = f"note: kube-proxy: left alone in {place}, not known to be kube-proxy's: KUBE-SERVICES-OF-MINE"
    assert mine in notes
    assert not any("KUBE-KUBELET-CANARY" in note for note in notes)


def test_each_leftover_is_a_finding_with_its_remedy(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(node, load_everywhere)
    before = netns.run(node, saved_everywhere), netns.run(node, ruleset)
    status, out, err = netns.run(node, podwire, "doctor", *KUBE_PROXY)
    assert (status, err) == (1, "")
    for variant, family in EVERYWHERE:
        place = f"in table nat of iptables-{variant.value} (IPv{family.value})"
        finding = (
            f"kube-proxy left 9 chains with 15 rules and 3 jumps from PREROUTING, OUTPUT, POSTROUTING {place}"
        )
        assert f"kube-proxy  error     {finding}" in out
    assert out.count("podwire cleanup --kube-proxy") == 12
    assert (netns.run(node, saved_everywhere), netns.run(node, ruleset)) == before


def test_findings_as_json(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(
        node, load, Variant.LEGACY, Family.V4, "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-X - [0:0]\nCOMMIT\n"
    )
    status, out, _ = netns.run(node, podwire, "doctor", "-o", "json", *KUBE_PROXY)
    assert status == 1
    place = "in table nat of iptables-legacy (IPv4)"
    finding = {
        "sentence": f"kube-proxy left 1 chain with 0 rules {place}",
        "remedy": "podwire cleanup --kube-proxy",
        "severity": "error",
    }
    assert json.loads(out) == [
        {
            "name": "kube-proxy",
            "findings": [finding],
            "notes": [f"left alone {place}, not known to be kube-proxy's: KUBE-X"],
            "skipped": "",
        }
    ]
    status, out, _ = netns.run(namespaces(), podwire, "doctor", "-o", "json", *KUBE_PROXY)
    assert status == 0
    assert json.loads(out) == [{"name": "kube-proxy", "findings": [], "notes": [], "skipped": ""}]


def test_a_running_kube_proxy_is_a_finding(namespaces: Callable[[], str], tmp_path: Path) -> None:
    node = namespaces()
    with running_in(node, tmp_path) as process:
        status, out, _ = netns.run(node, podwire, "doctor", *KUBE_PROXY)
    assert status == 1
    assert f"kube-proxy runs (process {process})  remove it from this node" in out


def test_missing_programs_are_notes(
    namespaces: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("netlink.xtables.DIRECTORIES", str(tmp_path))
    status, out, err = netns.run(namespaces(), podwire, "doctor", *KUBE_PROXY)
    assert (status, err) == (0, "")
    for family in Family:
        program = Variant.NFT.program(family, "save")
        place = f"iptables-nft (IPv{family.value})"
        assert f"note: kube-proxy: {place} was not looked at: the program {program} is not installed" in out


def test_without_root_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert podwire("doctor") == (1, "", "podwire: doctor needs root\n")


def test_without_the_daemon_that_is_a_finding_and_what_needs_it_is_skipped(
    namespaces: Callable[[], str],
) -> None:
    status, out, err = netns.run(namespaces(), podwire, "doctor", *ABSENT)
    assert (status, err) == (1, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(CHECKS) <= set(lines)
    assert "error     no daemon answers on /nonexistent/podwire.sock" in lines["daemon"]
    for name in ("podcidrs", "routes", "peers", "mtu"):
        assert "skipped: " in lines[name]
    assert "ok" in lines["kernel"]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Severity], int]]:
    """A function that has the check `daemon` find something, and returns the exit status."""

    def run(severity: Severity) -> int:
        check = Check("daemon", (Finding("a", "b", severity),))
        monkeypatch.setattr("node.doctor.daemon.check", lambda context: check)
        return podwire("doctor", "--check", "daemon", *ABSENT)[0]

    yield run


def test_the_exit_status_tells_errors_from_warnings(found: Callable[[Severity], int]) -> None:
    assert found(Severity.ERROR) == 1
    assert found(Severity.WARNING) == 3


def test_checks_are_chosen_and_left_out(namespaces: Callable[[], str]) -> None:
    words = ("--check", "kube-proxy", "--check", "kernel", "--skip", "kube-proxy", *ABSENT)
    status, out, _ = netns.run(namespaces(), podwire, "doctor", "-o", "json", *words)
    assert status == 0
    assert [check["name"] for check in json.loads(out)] == ["kernel"]


def test_checks_are_listed_and_are_in_the_help() -> None:
    status, out, _ = podwire("doctor", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(CHECKS)
    status, out, _ = podwire("doctor", "--help")
    assert all(f"  {name} " in out for name in CHECKS)
    assert "3   only warnings were found" in out


@pytest.mark.parametrize(
    "words", [("--check", "x"), ("--peers", "0"), ("--peers", "some"), ("--timeout", "0"), ("--timeout", "x")]
)
def test_what_is_no_option_is_wrong_usage(words: tuple[str, ...]) -> None:
    assert podwire("doctor", *words)[0] == 2


def test_the_daemon_is_asked_once_and_checks_get_what_they_were_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Context] = []

    def check(context: Context) -> Check:
        seen.append(context)
        return Check("peers")

    monkeypatch.setattr("cli.doctor._ask", lambda socket, services: VIEW)
    monkeypatch.setattr("node.doctor.peers.check", check)
    assert podwire("doctor", "--check", "peers", "--peers", "3", "--timeout", "0.5")[0] == 0
    [context] = seen
    assert (context.view, context.peers, context.timeout) == (VIEW, 3, 0.5)
