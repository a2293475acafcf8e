"""The plugin on a real ledger, wiring real namespaces."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni import spec, wiring
from cni.plugin import in_process
from cni.reaper import Reaper
from ipam.ledger import Attachment, Exhausted, Key, Ledger, State
from netlink import netns
from netlink.errors import NetlinkError
from netlink.requests import link_delete
from tests.cni.world import (
    BRIDGED,
    CIDRS,
    ROUTED,
    SMALL,
    Node,
    Runtime,
    assert_consistent,
    commit,
    reconcile,
    request_env,
    stdin,
)


def test_add_answers_with_both_interfaces_addresses_and_routes(runtime: Runtime) -> None:
    result = runtime.add()
    path = str(netns.path(runtime.node.pods["c1"]))
    host = wiring.host_ifname("c1", "eth0")
    assert result == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": host, "mac": wiring.mac_of(host), "mtu": 1400},
            {"name": "eth0", "mac": wiring.mac_of("10.1.0.2"), "sandbox": path, "mtu": 1400},
        ],
        "ips": [
            {"address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 1},
            {"address": "fd00:1::2/128", "gateway": "fe80::1", "interface": 1},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
    }
    assert_consistent(runtime.node, {"c1"})


def test_add_in_bridge_mode_answers_with_the_bridges_gateway(runtime: Runtime) -> None:
    runtime.configure(BRIDGED)
    netns.run(runtime.node.namespace, wiring.ensure_bridge, CIDRS)
    assert runtime.add()["ips"] == [
        {"address": "10.1.0.2/24", "gateway": "10.1.0.1", "interface": 1},
        {"address": "fd00:1::2/64", "gateway": "fd00:1::1", "interface": 1},
    ]
    assert runtime.call("CHECK") == (0, {})
    runtime.delete()
    assert_consistent(runtime.node, set())


@pytest.mark.parametrize("version", spec.SUPPORTED_VERSIONS)
def test_the_answer_has_the_version_asked_for_and_the_dns_as_it_came(runtime: Runtime, version: str) -> None:
    dns = {"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]}
    code, result = runtime.call("ADD", cniVersion=version, dns=dns)
    assert (code, result["cniVersion"], result["dns"]) == (0, version, dns)
    assert ("version" in result["ips"][0]) == (version < "1")
    assert runtime.call("CHECK", cniVersion=version, prevResult=result) == (0, {})


def test_a_container_can_have_two_interfaces(runtime: Runtime) -> None:
    node = runtime.node
    for ifname in ("eth0", "net1"):
        code, result = node.handle(runtime.plugin, node.env("ADD", "c1", IFNAME=ifname))
        assert code == 0, result
    assert len(node.host_links()) == 2
    node.handle(runtime.plugin, node.env("DEL", "c1", IFNAME="net1"))
    assert node.host_links() == {wiring.host_ifname("c1", "eth0")}
    assert runtime.ledger.get(Key("c1", "net1")) is None


def test_a_second_add_is_refused_and_changes_nothing(runtime: Runtime) -> None:
    runtime.add()
    assert runtime.refused("ADD") == (101, "interface 'eth0' of container 'c1' is attached already")
    assert_consistent(runtime.node, {"c1"})
    assert runtime.call("CHECK") == (0, {})


def test_the_same_execution_is_answered_again(runtime: Runtime) -> None:
    """The daemon did it, its answer was lost, and the binary tries by itself."""
    env = runtime.node.env("ADD", "c1") | {"PODWIRE_REQUEST_ID": "7-1"}
    first = runtime.node.handle(runtime.plugin, env)
    assert first[0] == 0
    assert runtime.node.handle(runtime.plugin, env) == first
    again = runtime.node.handle(runtime.plugin, env | {"PODWIRE_REQUEST_ID": "7-2"})
    assert again[1]["code"] == 101
    assert_consistent(runtime.node, {"c1"})


def test_an_interface_that_the_pod_has_is_refused_and_frees_the_address(runtime: Runtime) -> None:
    runtime.add("c1")
    runtime.node.pods["c2"] = runtime.node.pods["c1"]
    code, sentence = runtime.refused("ADD", "c2")
    assert (code, sentence) == (101, "CNI_IFNAME eth0 exists already: the pod has one")
    del runtime.node.pods["c2"]
    assert_consistent(runtime.node, {"c1"})


def test_a_namespace_that_is_gone_is_named_and_frees_the_address(runtime: Runtime) -> None:
    env = request_env("ADD", "c1", "/run/netns/missing")
    code, error = runtime.node.handle(runtime.plugin, env)
    assert (code, error["code"]) == (1, 3)
    assert error["msg"] == "CNI_NETNS /run/netns/missing cannot be opened: No such file or directory"
    assert_consistent(runtime.node, set())


def test_del_can_be_repeated_and_needs_no_namespace(runtime: Runtime) -> None:
    runtime.add()
    env = request_env("DEL", "c1")
    for _ in range(2):
        assert runtime.node.handle(runtime.plugin, env) == (0, {})
        assert_consistent(runtime.node, set())


def test_del_of_a_pod_whose_namespace_went_first_frees_the_address(runtime: Runtime) -> None:
    runtime.add()
    netns.delete(runtime.node.pods.pop("c1"))
    env = request_env("DEL", "c1", "/run/netns/gone")
    assert runtime.node.handle(runtime.plugin, env) == (0, {})
    assert_consistent(runtime.node, set())


def test_del_after_a_failed_add_succeeds(runtime: Runtime) -> None:
    runtime.node.handle(runtime.plugin, request_env("ADD", "c1", "/run/netns/missing"))
    runtime.delete()
    assert_consistent(runtime.node, set())


def test_del_removes_a_link_that_the_ledger_lost(runtime: Runtime) -> None:
    runtime.add()
    runtime.ledger.forget(Key("c1", "eth0"))
    assert netns.run(runtime.node.namespace, reconcile, runtime.ledger) == 2  # as the daemon does
    runtime.delete()
    assert_consistent(runtime.node, set())


def test_del_before_the_first_sync_and_without_any_pod_succeeds(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node = Node(namespaces, tmp_path / "new", settings=None)
    assert node.cni("DEL", "c1") == (0, {})


def test_check_is_silent_until_something_is_missing(runtime: Runtime) -> None:
    result = runtime.add()
    assert runtime.call("CHECK", prevResult=result) == (0, {})
    host = wiring.host_ifname("c1", "eth0")
    netns.run(runtime.node.namespace, commit, link_delete(host))
    assert runtime.refused("CHECK", prevResult=result) == (102, f"the host interface {host} is missing")


def test_check_of_a_container_that_is_not_attached_fails(runtime: Runtime) -> None:
    assert runtime.refused("CHECK") == (3, "the ledger has no attachment of c1")
    runtime.add()
    runtime.ledger.release(Key("c1", "eth0"))
    assert runtime.refused("CHECK")[0] == 3


def test_check_compares_the_previous_result_but_not_what_other_plugins_added(runtime: Runtime) -> None:
    result = runtime.add()
    other = {"interfaces": [*result["interfaces"], {"name": "tunnel"}]}
    foreign = {"address": "192.0.2.1/24", "interface": 2}
    result |= other | {"ips": [*result["ips"], foreign, {"address": "192.0.2.2/24"}]}
    assert runtime.call("CHECK", prevResult=result) == (0, {})
    result["ips"][0]["address"] = "10.1.0.99/32"
    assert runtime.refused("CHECK", prevResult=result) == (
        102,
        "prevResult has 10.1.0.99, which the ledger does not",
    )


@pytest.mark.parametrize("deferred", [False, True], ids=["removed", "removal pending"])
def test_a_full_range_says_so_and_works_again_after_one_del(runtime: Runtime, deferred: bool) -> None:
    """A deferred removal is done by the ADD that needs the address: it does not wait for the reaper."""
    runtime.configure(SMALL)
    if deferred:
        runtime.plugin = replace(runtime.plugin, defer=lambda _: None)
    addresses = [runtime.address(f"c{number}") for number in range(5)]
    assert addresses == [f"10.1.0.{last}" for last in range(2, 7)]
    code, sentence = runtime.refused("ADD", "c5")
    assert code == 11
    assert "no free pod address in podCIDR 10.1.0.0/29 (5 addresses)" in sentence
    runtime.delete("c3")
    states = [a.state for a in runtime.ledger.attachments()]
    assert states.count(State.RELEASED) == (1 if deferred else 0)
    assert runtime.address("c5") == "10.1.0.5"
    runtime.node.recover()
    assert_consistent(runtime.node, {"c0", "c1", "c2", "c4", "c5"})


def test_an_add_right_after_the_del_of_the_same_container_does_not_wait(runtime: Runtime) -> None:
    runtime.plugin = replace(runtime.plugin, defer=lambda _: None)
    runtime.add()
    runtime.delete()
    runtime.add()
    assert_consistent(runtime.node, {"c1"})


def test_a_released_address_is_given_again_last(runtime: Runtime) -> None:
    runtime.configure(SMALL)
    given = [runtime.address(name) for name in ("c1", "c2")]
    for name in ("c2", "c1"):
        runtime.delete(name)
    given += [runtime.address(name) for name in ("c3", "c4", "c5", "c6", "c7")]
    assert [address.rpartition(".")[2] for address in given] == ["2", "3", "4", "5", "6", "3", "2"]


def test_an_add_that_looks_for_room_leaves_a_container_alone_that_was_added_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between "it is on its way out" and the removal, the reaper ended it and the runtime started it anew."""
    runtime.configure(SMALL)
    for number in range(5):
        runtime.add(f"c{number}")
    runtime.plugin = replace(runtime.plugin, defer=lambda _: None)
    runtime.delete("c0")
    reserve = Ledger.reserve

    def late(*arguments: Any) -> Attachment:
        try:
            return reserve(*arguments)
        except Exhausted:
            monkeypatch.undo()
            runtime.node.recover()
            runtime.add("c0")
            raise

    monkeypatch.setattr(Ledger, "reserve", late)
    assert runtime.refused("ADD", "c5")[0] == 11
    assert_consistent(runtime.node, {f"c{number}" for number in range(5)})


def test_before_the_first_sync_an_add_is_to_be_tried_again(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node = Node(namespaces, tmp_path, settings=None)
    code, error = node.cni("ADD", "c1")
    assert (code, error["code"], error["msg"]) == (
        1, 11, "no podCIDR is known: the daemon has not synced yet",
    )  # fmt: skip
    code, error = node.cni("STATUS", "c1")
    assert (code, error["code"]) == (1, 50)


def test_status_is_silent_when_pods_can_be_added(runtime: Runtime) -> None:
    assert runtime.node.handle(runtime.plugin, {"CNI_COMMAND": "STATUS"}) == (0, {})


def test_gc_removes_what_is_not_valid_and_keeps_the_rest(runtime: Runtime) -> None:
    for name in ("c1", "c2", "c3"):
        runtime.add(name)
    env = {"CNI_COMMAND": "GC"}
    valid = [{"containerID": "c2", "ifname": "eth0"}, {"containerID": "c3", "ifname": "other"}]
    for config, kept in (
        (stdin(), {"c1", "c2", "c3"}),  # an absent list removes nothing
        (stdin(**{"cni.dev/valid-attachments": valid}), {"c2"}),
        (stdin(**{"cni.dev/valid-attachments": []}), set()),
    ):
        assert runtime.node.handle(runtime.plugin, env, config) == (0, {})
        assert_consistent(runtime.node, kept)


def test_gc_of_another_network_leaves_ours_alone(runtime: Runtime) -> None:
    runtime.add()
    assert runtime.call("GC", name="another", **{"cni.dev/valid-attachments": []}) == (0, {})
    assert_consistent(runtime.node, {"c1"})


def test_the_nodes_own_namespace_is_no_pod(runtime: Runtime) -> None:
    env = request_env("ADD", "c1", str(netns.path(runtime.node.namespace)))
    code, error = runtime.node.handle(runtime.plugin, env)
    assert (code, error["code"]) == (1, 3)
    assert "is the node's own network namespace" in error["msg"]
    assert_consistent(runtime.node, set())


def test_gc_goes_on_past_errors_and_reports_them(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("c1", "c2", "c3"):
        runtime.add(name)
    stuck, remove = wiring.host_ifname("c2", "eth0"), wiring.remove

    def remove_some(name: str) -> None:
        if name == stuck:
            raise NetlinkError(16, f"cannot remove interface {name}")
        remove(name)

    monkeypatch.setattr(wiring, "remove", remove_some)
    code, sentence = runtime.refused("GC", **{"cni.dev/valid-attachments": []})
    assert (code, sentence) == (5, f"cannot remove interface {stuck}: Device or resource busy")
    assert runtime.node.host_links() == {stuck}
    monkeypatch.undo()
    runtime.node.recover()
    assert_consistent(runtime.node, set())


GOOD = request_env("ADD", "c1", "/run/netns/x")
BAD: dict[str, tuple[dict[str, str], bytes, int, str]] = {
    "no command": ({}, stdin(), 4, "CNI_COMMAND is '', not one of ADD, DEL"),
    "unknown command": (GOOD | {"CNI_COMMAND": "PLUG"}, stdin(), 4, "CNI_COMMAND is 'PLUG', not one of"),
    "no container": (GOOD | {"CNI_CONTAINERID": ""}, stdin(), 4, "ADD needs CNI_CONTAINERID: not set"),
    "no variables": ({"CNI_COMMAND": "ADD"}, stdin(), 4, "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME: not set"),
    "container name": (GOOD | {"CNI_CONTAINERID": "../x"}, stdin(), 4, "CNI_CONTAINERID is '../x', not a"),
    "interface name": (GOOD | {"CNI_IFNAME": "a/b"}, stdin(), 4, "CNI_IFNAME is 'a/b', which has a '/'"),
    "long name": (GOOD | {"CNI_IFNAME": "e" * 16}, stdin(), 4, "which is longer than 15 bytes"),
    "relative path": (GOOD | {"CNI_NETNS": "x"}, stdin(), 4, "CNI_NETNS is 'x', which is not an absolute"),
    "arguments": (GOOD | {"CNI_ARGS": "COLOR=red"}, stdin(), 4, "CNI_ARGS has the unknown key 'COLOR'"),
    "not JSON": (GOOD, b"{", 6, "the network configuration is not JSON"),
    "nothing": (GOOD, b"", 6, "the network configuration on standard input is empty"),
    "a list": (GOOD, b"[]", 6, "the network configuration is [], not an object"),
    "version": (GOOD, stdin(cniVersion="9.9.9"), 1, "cniVersion '9.9.9' is not supported"),
    "no name": (GOOD, stdin(name=""), 7, "name is missing from the network configuration"),
    "previous result": (GOOD, stdin(prevResult=5), 7, "prevResult is 5, which is not an object"),
    "namespace": (
        GOOD | {"CNI_NETNS": "/dev/null"},
        stdin(),
        3,
        "CNI_NETNS /dev/null is not a network namespace",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_code_and_a_sentence_and_leaves_nothing(runtime: Runtime, case: str) -> None:
    env, config, expected, sentence = BAD[case]
    code, error = runtime.node.handle(runtime.plugin, env, config)
    assert (code, error["code"]) == (1, expected)
    assert sentence in error["msg"]
    assert "Traceback" not in error["msg"] + error["details"]
    assert_consistent(runtime.node, set())


def test_a_fault_of_our_own_is_an_answer_too(runtime: Runtime) -> None:
    runtime.ledger.save_settings(ROUTED.to_mapping() | {"mode": "magic"})
    code, sentence = runtime.refused("ADD")
    assert (code, sentence) == (100, "internal error: ValueError: 'magic' is not a valid Mode")


def test_a_ledger_that_cannot_be_used_is_an_answer_too(runtime: Runtime) -> None:
    runtime.ledger.close()
    code, sentence = runtime.refused("DEL")
    assert (code, sentence) == (5, f"ledger {runtime.node.state_dir / 'ledger.db'} is not open")


def test_version_is_answered_without_a_ledger(tmp_path: Path) -> None:
    code, out = in_process({"CNI_COMMAND": "VERSION"}, b'{"cniVersion": "1.0.0"}', str(tmp_path / "absent"))
    assert code == 0
    assert out.startswith(b'{"cniVersion":"1.0.0","supportedVersions":["0.3.0"')
    assert not (tmp_path / "absent").exists()


def test_32_adds_at_once_get_32_addresses(runtime: Runtime) -> None:
    names = [f"c{number}" for number in range(32)]
    for name in names:
        runtime.node.env("ADD", name)  # makes the namespace
    with ThreadPoolExecutor(32) as pool:
        addresses = list(pool.map(runtime.address, names))
    assert len(set(addresses)) == 32
    assert_consistent(runtime.node, set(names))
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(runtime.delete, names))
    assert_consistent(runtime.node, set())


def test_adds_and_dels_of_one_container_at_once_end_consistent(runtime: Runtime) -> None:
    runtime.node.env("ADD", "c1")
    commands = ["ADD", "DEL"] * 4

    def fight() -> None:
        start = threading.Barrier(len(commands))

        def work(command: str) -> tuple[int, dict[str, Any]]:
            start.wait()
            return runtime.call(command)

        with ThreadPoolExecutor(len(commands)) as pool:
            answers = list(pool.map(work, commands))
        for command, (code, answer) in zip(commands, answers, strict=True):
            assert (code, answer.get("code")) in ((0, None), (1, 101) if command == "ADD" else (0, None))

    def fight_with_reaper() -> None:
        with Reaper(runtime.ledger, runtime.node.state_dir) as reaper:
            runtime.plugin = replace(runtime.plugin, defer=reaper.submit)
            fight()

    for work in (fight, fight, lambda: netns.run(runtime.node.namespace, fight_with_reaper)):
        work()
        assert_consistent(runtime.node)
    runtime.plugin = replace(runtime.plugin, defer=None)
    runtime.delete()
    assert_consistent(runtime.node, set())


def test_adds_that_compete_for_addresses_still_going_never_share_one(runtime: Runtime) -> None:
    """Five pods go, five come, and all of the newcomers want to remove the old links at once."""
    runtime.configure(SMALL)
    old, new = [f"old{n}" for n in range(5)], [f"new{n}" for n in range(5)]
    for name in old:
        runtime.add(name)
    pending: list[Attachment] = []
    runtime.plugin = replace(runtime.plugin, defer=pending.append)
    for name in old:
        runtime.delete(name)
    for name in new:
        runtime.node.env("ADD", name)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda name: runtime.call("ADD", name), new))
    assert [code for code, _ in answers] == [0] * 5, answers
    assert len(pending) == 5
    assert_consistent(runtime.node, set(new))
