"""`podwire config`, and how flags and the file make the daemon's configuration."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import daemon, options
from cli.host import SOCKET, STATE_DIR
from cli.main import main, parser
from node import config
from node.config import ConfigError
from node.config_keys import Configuration

FILE = """
source: /file
pods: {mtu: 1400, noMasqueradeCIDRs: [10.0.0.0/8, 172.16.0.0/12]}
services: {conntrackTCPBeLiberal: true}
ipam: {exclude: [10.1.0.9], quarantine: 3s}
logs: {level: warning}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def _no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "DEFAULT_PATH", str(tmp_path / "usual.yaml"))


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `config show` prints."""
    assert main(["config", "show", "-o", "json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def arguments(*words: str) -> argparse.Namespace:
    return parser().parse_args(["daemon", *words])


def test_show_of_nothing_is_the_defaults_and_the_host_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)
    assert found["nodeName"] == socket.gethostname().lower()
    assert found == {**config.plain(Configuration()), "nodeName": found["nodeName"]}


def test_flags_count_over_the_file_and_the_file_over_defaults(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(
        capsys,
        *("--config", str(file), "--mtu", "1300", "--no-masquerade-cidr", "192.168.0.0/16"),
        *("--no-conntrack-tcp-be-liberal", "-v", "--mode", "bridge"),
    )
    assert found["source"] == "/file"
    assert found["pods"]["mtu"] == 1300
    assert found["pods"]["mode"] == "bridge"
    assert found["pods"]["noMasqueradeCIDRs"] == ["192.168.0.0/16"]  # a list replaces the file's
    assert found["services"]["conntrackTCPBeLiberal"] is False
    assert found["logs"] == {"format": "console", "level": "debug"}
    assert found["ipam"]["quarantine"] == "3s"


def test_lists_come_from_commas_and_from_repeated_flags(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--cluster-cidr", "10.244.0.0/16,fd00:10::/48", "--source", "kubernetes")
    assert shown(capsys, *words)["kubernetes"]["clusterCIDRs"] == ["10.244.0.0/16", "fd00:10::/48"]
    words = ("--nodeport-addresses", "10.0.0.0/8", "--nodeport-addresses", "192.168.0.0/16")
    assert shown(capsys, *words)["services"]["nodePortAddresses"] == ["10.0.0.0/8", "192.168.0.0/16"]


def test_what_show_prints_is_a_file_of_the_same_effect(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ipam.yaml").write_text("pools: [{name: a, ranges: [10.1.0.0/28]}]")
    assert main(["config", "show", "--config", str(file), "--ipam-config", str(tmp_path / "ipam.yaml")]) == 0
    text = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert main(["config", "check", str(again)]) == 0
    capsys.readouterr()
    assert main(["config", "show", "--config", str(again)]) == 0
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["ipam"]["pools"][0]["ranges"] == ["10.1.0.0-10.1.0.15"]


def test_the_usual_file_counts_if_it_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "usual.yaml").write_text(FILE)
    assert shown(capsys)["source"] == "/file"


def test_check_says_what_is_wrong_in_a_sentence_each(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: no mistakes found\n"
    file.write_text("pods:\n  mode: mesh\n  mtu: 9\n")
    assert main(["config", "check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"podwire: {file}:2: pods.mode: 'mesh' is not one of routed, bridge, flat",
        f"podwire: {file}:3: pods.mtu: 9 is not between 576 and 65535",
    ]


def test_check_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err == f"podwire: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_check_says_when_a_file_leaves_the_source_to_a_flag(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("pods: {mtu: 1400}")
    assert main(["config", "check", str(file)]) == 0
    assert "needs --source" in capsys.readouterr().out


def test_schema_is_json_with_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["$defs"]["Pods"]["properties"]["mtu"]["description"].startswith("MTU of pods")


def test_the_daemon_is_told_what_file_and_flags_say(file: Path) -> None:
    made = daemon.load(arguments("--config", str(file), "--node-name", "n1", "--masquerade", "ipv6"))
    assert made.source == Path("/file")
    assert (made.sync.node, made.sync.mtu) == ("n1", 1400)
    assert [family.value for family in made.sync.masquerade] == [6]
    assert made.sync.no_masquerade == ("10.0.0.0/8", "172.16.0.0/12")
    assert made.sync.ipam.quarantine == 3.0
    assert made.sync.node_port_addresses == ()  # primary
    assert made.sync.tcp_be_liberal


def test_a_reload_reads_the_file_again_and_keeps_the_flags(file: Path) -> None:
    args = arguments("--config", str(file), "--mtu", "1300")
    assert daemon.load(args).sync.no_masquerade == ("10.0.0.0/8", "172.16.0.0/12")
    file.write_text(FILE.replace("172.16.0.0/12", "192.168.0.0/16").replace("1400", "1500"))
    again = daemon.load(args)
    assert again.sync.no_masquerade == ("10.0.0.0/8", "192.168.0.0/16")
    assert again.sync.mtu == 1300
    file.write_text("pods: [")
    with pytest.raises(ConfigError):
        daemon.load(args)


def test_with_the_kubernetes_api_as_the_source(file: Path) -> None:
    file.write_text(
        "source: kubernetes\n"
        "kubernetes: {kubeconfig: /k, apiOverride: 'https://10.0.0.1:6443', clusterCIDRs: [10.244.0.0/16],"
        " nodeCIDRMaskSize: 25}"
    )
    made = daemon.load(arguments("--config", str(file)))
    assert made.source is None
    assert made.kubernetes
    assert made.kubernetes.kubeconfig == Path("/k")
    assert made.kubernetes.api_override == "https://10.0.0.1:6443"
    assert made.kubernetes.namespace == "kube-system"
    assert made.kubernetes.cluster_cidrs == ("10.244.0.0/16",)
    assert made.kubernetes.mask_sizes == (25, 64)


def test_the_daemon_refuses_a_file_without_a_source(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("pods: {mtu: 1400}")
    assert main(["daemon", "--config", str(file)]) == 1
    assert "source is missing" in capsys.readouterr().err


def test_the_daemon_says_every_mistake_in_its_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("sorce: /x\npods: {mod: flat}")
    assert main(["daemon", "--config", str(file), "--mtu", "5"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        f"{file}:1: unknown key sorce; did you mean source?",
        f"{file}:2: unknown key pods.mod; did you mean mode?",
        "--mtu 5 is not between 576 and 65535",
    ]


def test_other_commands_look_where_the_daemon_is_by_default() -> None:
    paths = Configuration().paths
    assert (paths.socket, paths.state_dir) == (SOCKET, STATE_DIR)


def test_every_flag_of_the_table_is_one_of_the_daemons() -> None:
    actions = parser()._subparsers
    assert actions
    choices: Any = actions._group_actions[0].choices
    known = set(choices["daemon"]._option_string_actions)
    assert {o.facts.flag for o in config.options().values() if o.facts.flag} <= known


def test_the_generated_page_is_current() -> None:
    script = Path(__file__).resolve().parents[2] / "scripts/docs"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_example_of_the_page_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text()
    (tmp_path / "example.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert main(["config", "check", str(tmp_path / "example.yaml")]) == 0, capsys.readouterr().err
