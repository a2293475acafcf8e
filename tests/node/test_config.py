"""The configuration's model and its file: what is right, what is wrong and how it is said, what differs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.settings import Mode
from node import config, config_keys
from node.config import ConfigError, build, changes, ipam_of, options
from node.config_file import MOST_PROBLEMS, Document, load, of_document
from node.config_keys import Configuration


def problems(tmp_path: Path, text: str | bytes, **flags: Any) -> list[str]:
    """What is wrong with a file, each without the file's name."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        load(path, flags)
    except ConfigError as error:
        return [problem.removeprefix(str(path)) for problem in error.problems]
    return []


def loaded(tmp_path: Path, text: str, flags: dict[str, Any] | None = None) -> Configuration:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path, flags or {})


@pytest.mark.parametrize(
    "text", ["", "---", "# nothing", "pods:", "pods: {mtu: null}", "kind: Configuration"]
)
def test_what_is_not_said_has_its_default(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text) == Configuration()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("services: {nodeportAdresses: []}",
         ":1: unknown key services.nodeportAdresses; did you mean nodePortAddresses?"),
        ("a: 1",
         ":1: unknown key a; known at the top are apiVersion, kind, source, nodeName, kubernetes, network, "
                 "pods, services, l7, ipam, metrics, healthz, logs, paths"),
        ("logs: {colour: red}", ":1: unknown key logs.colour; known in logs are format, level"),
        ("no-masquerade-cidr: []",
         ":1: unknown key no-masquerade-cidr; did you mean pods.noMasqueradeCIDRs?"),
        ("\npods:\n  mtu_: 5", ":3: unknown key pods.mtu_; did you mean mtu?"),
        ("1: 2", ":1: unknown key 1; known at the top are"),
        ("apiVersion: podwire.io/v2", ":1: apiVersion: 'podwire.io/v2' is not one of podwire.io/v1alpha1"),
        ("kind: Pod", ":1: kind: 'Pod' is not one of Configuration"),
        ("pods: {mode: vxlan}", ":1: pods.mode: 'vxlan' is not one of routed, bridge, flat"),
        ("pods: {mtu: 100}", ":1: pods.mtu: 100 is not between 576 and 65535"),
        ("pods: {mtu: true}", ":1: pods.mtu: True is not between 576 and 65535"),
        ("pods: {mtu: '1500'}", ":1: pods.mtu: '1500' is not between 576 and 65535"),
        ("pods: [1]", ":1: pods: [1] is no mapping with keys such as mode"),
        ("[1]", ": the file: [1] is no mapping with keys such as apiVersion"),
        ("source: Kubernetes", ":1: source: 'Kubernetes' is not kubernetes (a folder of that name is "),
        ("source: 5", ":1: source: 5 is not text"),
        ("nodeName: N_1", ":1: nodeName: 'N_1' is not a Node's name"),
        ("metrics: {bindAddress: 10249}", ":1: metrics.bindAddress: 10249 is not host:port"),
        ("healthz: {bindAddress: 'h:99999'}", ":1: healthz.bindAddress: 'h:99999' is not host:port"),
        ('healthz: {bindAddress: "h:1\\n"}',
         ":1: healthz.bindAddress: 'h:1\\n' is not host:port in one line"),
        ("kubernetes: {apiOverride: 10.0.0.1}",
         ":1: kubernetes.apiOverride: '10.0.0.1' is not a URL such as https://192.168.0.10:6443"),
        ("services: {conntrackTCPBeLiberal: 1}",
         ":1: services.conntrackTCPBeLiberal: 1 is not true or false"),
        ("pods: {noMasqueradeCIDRs: 10.0.0.0/8}", ":1: pods.noMasqueradeCIDRs: '10.0.0.0/8' is not a list"),
        ("pods:\n  noMasqueradeCIDRs:\n  - 10.0.0.0/8\n  - 10.0.0.1/8",
         ":4: pods.noMasqueradeCIDRs[1]: 10.0.0.1/8 has host bits set"),
        ("pods: {noMasqueradeCIDRs: [5]}", ":1: pods.noMasqueradeCIDRs[0]: 5 is not text in one line"),
        ("services: {nodePortAddresses: [primary, 10.0.0.0/8]}",
         ":1: services.nodePortAddresses primary stands alone: it is no range"),
        ("pods: {mode: flat}", ":1: pods.mode flat needs pods.flatAddresses, or pools in ipam.file"),
        ("pods: {flatInterface: eth0}", ":1: pods.flatInterface needs pods.mode flat"),
        ("pods: {mode: flat, flatAddresses: [x]}",
         ":1: pods.flatAddresses[0]: 'x' is not an address, a CIDR"),
        ("ipam: {exclude: [10.0.0.9-10.0.0.1]}",
         ":1: ipam.exclude[0]: '10.0.0.9-10.0.0.1' does not go upwards"),
        ("ipam: {quarantine: soon}", ":1: ipam.quarantine: 'soon' is not a time such as"),
        ("ipam: {pools: [{name: a}]}", ":1: ipam.pools[0].ranges is missing"),
        ("ipam: {pools: [5]}",
         ":1: ipam.pools[0]: 5 is not a mapping with the keys name, ranges, namespaces"),
        ("ipam:\n  pools:\n  - {name: a, ranges: [10.1.0.0/28]}\n  - {name: a, ranges: [10.2.0.0/28]}",
         ":4: ipam.pools[1].name: 'a' is the name of two pools"),
        ("ipam: {pools: [{name: a, ranges: [127.0.0.1]}]}",
         ":1: ipam.pools[0].ranges: 127.0.0.1 has addresses"),
        ("ipam: {file: /x, quarantine: 1s}", ":1: ipam.file stands alone"),
        ("ipam: {file: /no/such}", ":1: ipam.file /no/such: No such file or directory"),
        ("kubernetes: {clusterCIDRs: [10.0.0.0/8, 11.0.0.0/8]}",
         ":1: kubernetes.clusterCIDRs 11.0.0.0/8 is a second IPv4 range beside 10.0.0.0/8"),
        ("kubernetes:\n  clusterCIDRs: [10.0.0.0/16]\n  nodeCIDRMaskSize: 12",
         ":3: kubernetes.nodeCIDRMaskSize 12: a podCIDR of /12 does not fit into 10.0.0.0/16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_sentence_with_line_key_and_value(tmp_path: Path, text: str, problem: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_are_said_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "pods:\n  mtu: 1\n  mode: x\nlog: {}\nmetrics: {bindAddress: y}\n"
    assert [p.split(":")[1] for p in problems(tmp_path, text)] == ["2", "3", "4", "5"]


def test_of_very_many_problems_the_rest_is_counted(tmp_path: Path) -> None:
    found = problems(tmp_path, "\n".join(f"key{n}: 1" for n in range(100)))
    assert len(found) == MOST_PROBLEMS + 1
    assert found[-1] == f": {100 - MOST_PROBLEMS} more problems"


def test_a_key_given_twice_is_said_with_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, "pods:\n  mtu: 1400\n  mtu: 1500\n") == [":3: pods.mtu is in line 2 already"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pods:\n  mtu: [1", ":3: while parsing a flow sequence of line 2, did not find expected ',' or ']'"),
        ("a: b: c", ":1: mapping values are not allowed in this context"),
        ("a: *b", ":1: found undefined alias"),
        ("a: !!python/object:os.system {}", ":1: could not determine a constructor for the tag"),
        ("a: 1\n---\nb: 2", ":2: expected a single document in the stream, but found another document"),
        (b"a: \xff", ": 'utf-8' codec can't decode"),
        ("[" * 5000, ": nested more than"),
        (b"#" * ((1 << 20) + 1), ": more than 1048576 bytes are no configuration"),
        ("&a [*a]", ": found unconstructable recursive node"),
        ("source: \x00", ": "),
    ],
)  # fmt: skip
def test_a_file_that_is_no_yaml_is_one_sentence_with_the_line(
    tmp_path: Path, text: str | bytes, problem: str
) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(problem) or (problem.startswith(": found") and "the file: " in found[0])
    assert "\n" not in found[0]


def test_flags_are_named_in_what_is_wrong_with_them(tmp_path: Path) -> None:
    flags = {"pods.mtu": 5, "pods.noMasqueradeCIDRs": ("10.0.0.0/8", "x"), "metrics.bindAddress": "y"}
    assert [p.partition(" does")[0] for p in problems(tmp_path, "", **flags)] == [
        "--mtu 5 is not between 576 and 65535",
        "--no-masquerade-cidr x: 'x'",
        "--metrics-bind-address 'y' is not host:port",
    ]


def test_flags_of_the_api_need_it_as_the_source(tmp_path: Path) -> None:
    text = "source: kubernetes\nkubernetes: {clusterCIDRs: [10.0.0.0/8]}"
    assert problems(tmp_path, text, source="/dir") == []  # what the file says of it rests
    found = problems(tmp_path, text, source="/dir", **{"kubernetes.kubeconfig": "/k"})
    assert found == ["--kubeconfig needs --source kubernetes"]


def test_a_file_of_pools_stands_for_the_section_and_its_mistakes_are_said(tmp_path: Path) -> None:
    file = tmp_path / "ipam.yaml"
    file.write_text("pools: [{name: a, ranges: [10.1.0.0/28]}]\nquarantine: 5s\nexhausted_status: false")
    found = loaded(tmp_path, "ipam: {exclude: [10.1.0.1]}", {"ipam.file": str(file)})
    assert found.ipam.exclude == ()  # the flag stands for the whole section
    assert (found.ipam.file, found.ipam.quarantine, found.ipam.exhausted_status) == (str(file), 5.0, False)
    assert [pool.name for pool in ipam_of(found).pools] == ["a"]
    file.write_text("pools:\n- {nam: a}")
    assert problems(tmp_path, "", **{"ipam.file": str(file)}) == [
        f"--ipam-config {file}: pools[0]: 'nam' is not a known key; did you mean 'name'?"
    ]
    file.write_text("pools: [")
    assert problems(tmp_path, "", **{"ipam.file": str(file)})[0].startswith(f"--ipam-config {file}:2: while")


def test_in_mode_flat_everybody_gets_an_address_of_the_list(tmp_path: Path) -> None:
    text = (
        "pods: {mode: flat, flatAddresses: [192.168.0.64/29]}\nipam: {pools: [{name: a, ranges: [10.1.0.1]}]}"
    )
    pools = ipam_of(loaded(tmp_path, text)).pools
    assert [(pool.name, pool.namespaces) for pool in pools] == [("a", ()), ("flat", ("*",))]


CHANGED: dict[str, Any] = {
    "pods.noMasqueradeCIDRs": ("10.0.0.0/8",),
    "pods.masquerade": "ipv4",
    "services.nodePortAddresses": ("10.0.0.0/8",),
    "logs.level": "debug",
    "ipam.exclude": ("10.1.0.1",),
    "ipam.reserve": ("10.1.0.2",),
    "ipam.quarantine": "1s",
    "ipam.pools": (config_keys.AddressPool(name="a", ranges=("10.1.0.0/28",)),),
}


@pytest.mark.parametrize("key", CHANGED)
def test_these_changes_need_no_restart(key: str) -> None:
    assert changes(Configuration(), build({key: CHANGED[key]})) == ((key,), ())


@pytest.mark.parametrize("key", ["source", "nodeName", "pods.mode", "paths.socket", "metrics.bindAddress"])
def test_these_changes_need_a_restart(key: str) -> None:
    value = "bridge" if key == "pods.mode" else "other:1"
    assert changes(Configuration(), build({key: value})) == ((), (key,))


def test_nothing_changed_is_no_change() -> None:
    assert changes(Configuration(), Configuration()) == ((), ())


def test_a_change_inside_the_file_of_pools_is_one(tmp_path: Path) -> None:
    file = tmp_path / "ipam.yaml"
    file.write_text("exclude: [10.1.0.1]")
    before = load(None, {"ipam.file": str(file)})
    file.write_text("exclude: [10.1.0.2]")
    assert changes(before, load(None, {"ipam.file": str(file)})) == (("ipam.exclude",), ())


def test_every_key_is_described_and_flags_are_unique() -> None:
    flags = [o.facts.flag for o in options().values() if o.facts.flag]
    assert len(flags) == len(set(flags))
    for option in options().values():
        assert option.description, option.key
        assert option.items or option.wanted, option.key


def test_modes_are_those_of_the_plugin() -> None:
    assert options()["pods.mode"].choices == get_args(get_args(options()["pods.mode"].type)[0])
    assert set(options()["pods.mode"].choices) == {mode.value for mode in Mode}


def test_the_schema_has_descriptions_defaults_bounds_and_patterns() -> None:
    found = config.schema()
    pods = found["$defs"]["Pods"]
    assert pods["additionalProperties"] is False
    assert pods["properties"]["mode"]["enum"] == ["bridge", "flat", "routed"]
    mtu = pods["properties"]["mtu"]
    assert mtu["anyOf"][0] == {"type": "integer", "minimum": 576, "maximum": 65535}
    assert found["$defs"]["Metrics"]["properties"]["bindAddress"]["pattern"] == config_keys.HOST_PORT
    for definition in found["$defs"].values():
        for name, field in definition["properties"].items():
            assert "description" in field or "$ref" in field, name
            assert "default" in field or name in definition["required"], name


def test_a_configuration_survives_the_way_through_its_file() -> None:
    changed = build(CHANGED)
    assert msgspec.convert(config.plain(changed), Configuration) == changed


SIMPLE = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False)
KEYS = st.sampled_from([*{part for key in options() for part in key.split(".")}, "x", "name", "ranges"])
ANYTHING = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4)
    ),
)


@given(ANYTHING)
def test_whatever_a_document_says_the_answer_is_values_or_sentences(value: Any) -> None:
    values, found = of_document(Document("f", value, {}))
    assert isinstance(build(values), Configuration)
    for problem in found:
        assert re.match(r"f: .", problem)
