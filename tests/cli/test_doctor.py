"""`podwire doctor`: says what kube-proxy left and what mends it, changes nothing, and tells by its status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from node.xtables import Variant
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


def test_a_clean_node_is_ok(namespaces: Callable[[], str]) -> None:
    status, out, err = netns.run(namespaces(), podwire, "doctor")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["CHECK", "FINDING", "REMEDY"],
        ["kube-proxy", "ok", "-"],
    ]


def test_a_node_of_kubelet_and_others_is_ok_and_notes_name_what_looks_like_kube_proxys(
    namespaces: Callable[[], str],
) -> None:
    node = namespaces()
    for variant, family in EVERYWHERE:
        netns.run(node, load, variant, family, rules(family, kube_proxys=False))
    status, out, _ = netns.run(node, podwire, "doctor")
    assert status == 0
    assert "kube-proxy  ok" in out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    place = "table nat of iptables-nft (IPv6)"
    assert f"note: left alone in {place}, not known to be kube-proxy's: KUBE-SERVICES-OF-MINE" in notes
    assert not any("KUBE-KUBELET-CANARY" in note for note in notes)


def test_each_leftover_is_a_finding_with_its_remedy(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(node, load_everywhere)
    before = netns.run(node, saved_everywhere), netns.run(node, ruleset)
    status, out, err = netns.run(node, podwire, "doctor")
    assert (status, err) == (1, "")
    for variant, family in EVERYWHERE:
        place = f"in table nat of iptables-{variant.value} (IPv{family.value})"
        finding = (
            f"kube-proxy left 9 chains with 15 rules and 3 jumps from PREROUTING, OUTPUT, POSTROUTING {place}"
        )
        assert f"kube-proxy  {finding}" in out
    assert out.count("podwire cleanup --kube-proxy") == 12
    assert (netns.run(node, saved_everywhere), netns.run(node, ruleset)) == before


def test_findings_as_json(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(
        node, load, Variant.LEGACY, Family.V4, "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-X - [0:0]\nCOMMIT\n"
    )
    status, out, _ = netns.run(node, podwire, "doctor", "-o", "json")
    assert status == 1
    place = "in table nat of iptables-legacy (IPv4)"
    finding = {
        "sentence": f"kube-proxy left 1 chain with 0 rules {place}",
        "remedy": "podwire cleanup --kube-proxy",
    }
    assert json.loads(out) == [
        {
            "name": "kube-proxy",
            "findings": [finding],
            "notes": [f"left alone {place}, not known to be kube-proxy's: KUBE-X"],
        }
    ]
    status, out, _ = netns.run(namespaces(), podwire, "doctor", "-o", "json")
    assert status == 0
    assert json.loads(out) == [{"name": "kube-proxy", "findings": [], "notes": []}]


def test_a_running_kube_proxy_is_a_finding(namespaces: Callable[[], str], tmp_path: Path) -> None:
    node = namespaces()
    with running_in(node, tmp_path) as process:
        status, out, _ = netns.run(node, podwire, "doctor")
    assert status == 1
    assert f"kube-proxy runs (process {process})  remove it from this node" in out


def test_missing_programs_are_notes(
    namespaces: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("node.xtables.DIRECTORIES", str(tmp_path))
    status, out, err = netns.run(namespaces(), podwire, "doctor")
    assert (status, err) == (0, "")
    for family in Family:
        program = Variant.NFT.program(family, "save")
        place = f"iptables-nft (IPv{family.value})"
        assert f"note: {place} was not looked at: the program {program} is not installed" in out


def test_without_root_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert podwire("doctor") == (1, "", "podwire: doctor needs root\n")
