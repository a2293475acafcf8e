"""`podwire cleanup`: takes away what doctor reports, or podwire, and says what it did or could not do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import install
from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from node.leftovers import Leftover, Removal
from node.leftovers import remove as remove_leftovers
from tests.node.kube_proxy import SVC, load, load_everywhere, ruleset, running_in, saved, saved_everywhere
from tests.node.world import podwire

NAT = "*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT\n"
WHERE = "in table nat of iptables-legacy (IPv4)"
WHAT = f"1 chain with 0 rules and 1 jump from OUTPUT {WHERE}"


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    """A node with one chain of kube-proxy."""
    name = namespaces()
    netns.run(name, load, Variant.LEGACY, Family.V4, NAT)
    return name


def cleanup(node: str, *words: str) -> tuple[int, str, str]:
    return netns.run(node, podwire, "cleanup", "--kube-proxy", *words)


def test_what_doctor_reports_goes_and_a_second_time_finds_nothing(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(node, load_everywhere)
    status, out, err = cleanup(node)
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 12
    assert all(line.startswith("removed ") for line in lines)
    assert netns.run(node, podwire, "doctor", "--check", "kube-proxy")[0] == 0
    status, out, err = cleanup(node)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "nothing of kube-proxy's was found"


def test_a_dry_run_says_the_same_and_changes_nothing(namespaces: Callable[[], str]) -> None:
    node = namespaces()
    netns.run(node, load_everywhere)
    before = netns.run(node, saved_everywhere), netns.run(node, ruleset)
    status, dry, err = cleanup(node, "--dry-run")
    assert (status, err) == (0, "")
    assert (netns.run(node, saved_everywhere), netns.run(node, ruleset)) == before
    _, out, _ = cleanup(node)
    assert dry.replace("would remove ", "removed ") == out


def test_what_was_removed_as_json(node: str) -> None:
    status, out, _ = cleanup(node, "-o", "json")
    assert status == 0
    assert json.loads(out) == {
        "dry_run": False,
        "removed": [{"kind": "iptables", "what": WHAT, "names": ["KUBE-SERVICES"]}],
        "failures": [],
        "notes": [],
    }


def test_while_kube_proxy_runs_it_refuses_but_with_force(node: str, tmp_path: Path) -> None:
    with running_in(node, tmp_path) as process:
        sentence = (
            f"kube-proxy runs (process {process}) and would write it all again: stop it, or use --force"
        )
        assert cleanup(node) == (1, "", f"podwire: {sentence}\n")
        assert "KUBE-SERVICES" in netns.run(node, saved, Variant.LEGACY, Family.V4)
        assert cleanup(node, "--dry-run") == (0, f"would remove {WHAT}\n", "")
        assert cleanup(node, "--force") == (0, f"removed {WHAT}\n", "")
    assert "KUBE-SERVICES" not in netns.run(node, saved, Variant.LEGACY, Family.V4)


def test_what_could_not_be_removed_is_one_sentence_and_status_1(
    namespaces: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody uses a chain between the look and the removal."""
    node = namespaces()
    netns.run(node, load_everywhere)

    def remove(leftovers: tuple[Leftover, ...]) -> Removal:
        load(Variant.NFT, Family.V6, f"*nat\n-A MINE -j {SVC}\nCOMMIT\n")
        return remove_leftovers(leftovers)

    monkeypatch.setattr("node.leftovers.remove", remove)
    status, out, err = cleanup(node)
    assert status == 1
    assert len([line for line in out.splitlines() if line.startswith("removed ")]) == 11
    place = "in table nat of iptables-nft (IPv6): ip6tables-nft-restore failed: "
    assert err.startswith("podwire: cannot remove 9 chains ")
    assert place in err
    assert len(err.splitlines()) == 1
    assert SVC in netns.run(node, saved, Variant.NFT, Family.V6)


def test_what_to_clean_up_must_be_said() -> None:
    status, out, err = podwire("cleanup")
    assert (status, out) == (2, "")
    assert "--kube-proxy" in err


def test_without_root_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert podwire("cleanup", "--kube-proxy") == (1, "", "podwire: cleanup needs root\n")


def test_what_belongs_to_podwire_alone_needs_it() -> None:
    for option in ("--all", "--state", "--with-pods", "--stop-forwarding", "--yes"):
        status, out, err = podwire("cleanup", "--kube-proxy", option)
        assert (status, out) == (2, "")
        assert err.endswith(f"{option} needs --podwire\n")


def test_one_thing_at_a_time() -> None:
    status, _, err = podwire("cleanup", "--kube-proxy", "--podwire")
    assert (status, "not allowed with" in err) == (2, True)


def places(root: Path) -> list[str]:
    names = ("state-dir", "bin-dir", "conf-dir")
    return [f"--socket={root / 'sock'}", *(f"--{name}={root / name}" for name in names)]


def test_podwire_as_json(node: str, tmp_path: Path) -> None:
    netns.run(node, lambda: subprocess.run(["nft", "add table ip podwire"], check=True))
    words = ("cleanup", "--podwire", *places(tmp_path), "-o", "json")
    status, out, err = netns.run(node, podwire, *words)
    assert (status, out) == (1, "")
    assert "use --yes, or --dry-run" in err
    for option, dry in (("--dry-run", True), ("--yes", False)):
        status, out, _ = netns.run(node, podwire, *words, option)
        assert status == 0
        what = "table ip podwire of nftables with 0 chains"
        assert json.loads(out) == {
            "dry_run": dry,
            "removed": [{"kind": "nftables", "what": what, "names": []}],
            "failures": [],
            "notes": ["connections of table ip podwire stay: it is of another version of podwire"],
        }
    assert "KUBE-SERVICES" in netns.run(node, saved, Variant.LEGACY, Family.V4)


def test_a_node_without_podwire_has_nothing_to_be_asked_about(node: str, tmp_path: Path) -> None:
    found = netns.run(node, podwire, "cleanup", "--podwire", "--all", *places(tmp_path))
    assert found == (0, "nothing of podwire's was found\n", "")


def test_without_all_the_plugin_stays_and_that_is_told(node: str, tmp_path: Path) -> None:
    conflist = install.install_conflist(tmp_path / "conf-dir")
    note = "note: the plugin and its conflist stay, and the runtime goes on making pods with them: --all\n"
    _, out, _ = netns.run(node, podwire, "cleanup", "--podwire", "--yes", *places(tmp_path))
    assert out == f"nothing of podwire's was found\n{note}"
    _, out, _ = netns.run(node, podwire, "cleanup", "--podwire", "--all", "--yes", *places(tmp_path))
    assert out == f"removed plugin {conflist}\n"
    assert not conflist.exists()


def test_a_host_root_that_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "none"
    _, _, err = podwire("cleanup", "--podwire", "--host-root", str(root))
    assert err == f"podwire: --host-root {root} is not a folder\n"


def test_podwire_without_root_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert podwire("cleanup", "--podwire", "--yes") == (1, "", "podwire: cleanup needs root\n")
