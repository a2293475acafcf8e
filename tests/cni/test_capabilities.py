"""What a pod can ask for, through the whole plugin: capabilities, arguments, annotations, pools, chaining."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni import wiring
from cni.settings import Mode
from ipam.ledger import Key
from ipam.pools import IpamConfig
from netlink import netns
from netlink.requests import Route, link_delete, link_up, route_replace
from tests.cni.world import (
    AT_ONCE,
    CIDRS,
    ROUTED,
    SMALL,
    Runtime,
    assert_consistent,
    commit,
    link,
    reconcile,
    stdin,
)

POOLS = IpamConfig.parse(
    {
        "quarantine": 0,
        "pools": [{"name": "dmz", "ranges": ["10.1.0.64/28"], "namespaces": ["edge", "dmz-*"]}],
        "exclude": ["10.1.0.3", "10.1.0.5-10.1.0.9"],
        "reserve": ["10.1.0.4"],
    }
)
PORTS = [
    {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
    {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
]
LIMITS = {"ingressRate": 10_000_000, "ingressBurst": 800_000, "egressRate": 5_000_000, "egressBurst": 400_000}


def annotated(**annotations: str) -> dict[str, Any]:
    return {
        "runtimeConfig": {
            "io.kubernetes.cri.pod-annotations": {f"podwire.io/{k}": v for k, v in annotations.items()}
        }
    }


def add_of(runtime: Runtime, pod: str, container: str, **config: Any) -> str:
    """Add a pod "namespace/name" and return its first address."""
    namespace, name = pod.split("/")
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"
    env = runtime.node.env("ADD", container, ARGS=args)
    code, result = runtime.node.handle(runtime.plugin, env, stdin(**config))
    assert code == 0, result
    return str(result["ips"][0]["address"]).split("/")[0]


def test_host_ports_and_bandwidth_come_and_go_with_the_pod(runtime: Runtime) -> None:
    config = {"runtimeConfig": {"portMappings": PORTS, "bandwidth": LIMITS}}
    result = runtime.add(**config)
    assert_consistent(runtime.node, {"c1"})
    assert runtime.call("CHECK", **config, prevResult=result) == (0, {})
    row = runtime.ledger.get(Key("c1", "eth0"))
    assert row
    assert [(p.host_port, p.container_port) for p in row.host_ports] == [(8080, 80), (5353, 53)]
    shown = tc(runtime.node.namespace, row.host_ifname) + tc(runtime.node.pods["c1"], "eth0")
    assert "tbf" in shown
    assert ("rate 10Mbit" in shown, "rate 5Mbit" in shown) == (True, True)
    runtime.delete()
    assert_consistent(runtime.node, set())


def tc(namespace: str, device: str) -> str:
    command = ["tc", "qdisc", "show", "dev", device]
    return netns.run(namespace, lambda: subprocess.check_output(command, text=True))


def test_check_fails_when_a_host_port_or_a_limit_is_missing(runtime: Runtime) -> None:
    runtime.add(runtimeConfig={"portMappings": PORTS, "bandwidth": LIMITS})
    host = wiring.host_ifname("c1", "eth0")
    netns.run(runtime.node.namespace, subprocess.run, ["tc", "qdisc", "del", "dev", host, "root"], check=True)
    assert "limit of 10000000 bit/s" in runtime.refused("CHECK")[1]
    netns.run(runtime.node.namespace, subprocess.run, ["nft", "flush", "ruleset"], check=True)
    assert runtime.refused("CHECK")[0] == 102
    assert netns.run(runtime.node.namespace, reconcile, runtime.ledger) > 0


def test_a_host_port_that_another_pod_has_is_refused_and_named(runtime: Runtime) -> None:
    config = {"runtimeConfig": {"portMappings": PORTS[:1]}}
    add_of(runtime, "shop/web-0", "c1", **config)
    code, sentence = runtime.refused("ADD", "c2", **config)
    assert code == 11
    assert "8080" in sentence
    assert "shop/web-0" in sentence
    runtime.delete("c1")
    runtime.add("c2", **config)
    assert_consistent(runtime.node, {"c2"})


def test_an_address_and_a_mac_can_be_asked_for(runtime: Runtime) -> None:
    wanted = {"ips": ["10.1.0.77/24"], "mac": "02:AA:bb:00:00:01"}
    result = runtime.add(runtimeConfig=wanted)
    assert result["ips"][0]["address"] == "10.1.0.77/32"
    assert result["ips"][1]["address"] == "fd00:1::2/128"
    assert result["interfaces"][1]["mac"] == "02:aa:bb:00:00:01"
    inside = netns.run(runtime.node.pods["c1"], link, "eth0")
    assert inside
    assert inside.mac == "02:aa:bb:00:00:01"
    assert runtime.call("CHECK", runtimeConfig=wanted, prevResult=result) == (0, {})
    code, sentence = runtime.refused("ADD", "c2", runtimeConfig=wanted)
    assert code == 11
    assert "10.1.0.77" in sentence
    code, sentence = runtime.refused("ADD", "c2", runtimeConfig={"ips": ["192.0.2.1"]})
    assert code == 7
    assert "192.0.2.1" in sentence
    assert_consistent(runtime.node, {"c1"})


def test_args_beat_cni_args(runtime: Runtime) -> None:
    env = runtime.node.env("ADD", "c1", ARGS="IP=10.1.0.50")
    config = stdin(args={"cni": {"ips": ["10.1.0.60"]}})
    code, result = runtime.node.handle(runtime.plugin, env, config)
    assert (code, result["ips"][0]["address"]) == (0, "10.1.0.60/32")


def test_ip_ranges_replace_the_nodes_own(runtime: Runtime) -> None:
    ranges = [[{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.10", "rangeEnd": "10.9.0.10"}]]
    result = runtime.add(runtimeConfig={"ipRanges": ranges})
    assert [ip["address"] for ip in result["ips"]] == ["10.9.0.10/32"]
    assert runtime.refused("ADD", "c2", runtimeConfig={"ipRanges": ranges})[0] == 11


def test_pools_go_by_namespace_and_by_annotation(runtime: Runtime) -> None:
    runtime.configure(replace(ROUTED, ipam=POOLS))
    assert add_of(runtime, "default/a", "c1") == "10.1.0.2"
    assert add_of(runtime, "edge/b", "c2") == "10.1.0.64"
    assert add_of(runtime, "dmz-east/c", "c3") == "10.1.0.65"
    assert add_of(runtime, "default/d", "c4", **annotated(pool="dmz")) == "10.1.0.66"
    assert add_of(runtime, "default/e", "c5") == "10.1.0.10"  # 3 and 5 to 9 are excluded, 4 is reserved
    assert add_of(runtime, "default/f", "c6", **annotated(ip="10.1.0.4")) == "10.1.0.4"
    code, sentence = runtime.refused("ADD", "c7", **annotated(pool="nowhere"))
    assert code == 7
    assert "nowhere" in sentence
    code, sentence = runtime.refused("ADD", "c7", **annotated(ip="10.1.0.3"))
    assert code == 7
    assert "10.1.0.3" in sentence
    assert_consistent(runtime.node, {f"c{n}" for n in range(1, 7)})


def test_a_stateful_pod_gets_its_address_back(runtime: Runtime) -> None:
    runtime.configure(SMALL)
    first = add_of(runtime, "db/pg-0", "c1", **annotated(sticky="10m"))
    runtime.delete("c1")
    others = {add_of(runtime, f"db/other-{n}", f"o{n}") for n in range(4)}
    assert first not in others
    assert runtime.refused("ADD", "o5")[0] == 11  # kept, although the range is full otherwise
    assert add_of(runtime, "db/pg-0", "c2", **annotated(sticky="10m")) == first


@pytest.mark.parametrize("honest", [True, False])
def test_status_tells_that_the_range_is_exhausted(runtime: Runtime, honest: bool) -> None:
    runtime.configure(replace(SMALL, ipam=replace(AT_ONCE, exhausted_status=honest)))
    for number in range(5):
        assert runtime.call("STATUS") == (0, {})
        runtime.add(f"c{number}")
    if honest:
        assert runtime.refused("STATUS") == (
            50,
            "exhausted: no free pod address in podCIDR 10.1.0.0/29 (5 addresses)",
        )
    else:
        assert runtime.call("STATUS") == (0, {})
    runtime.delete("c0")
    assert runtime.call("STATUS") == (0, {})


def test_the_result_of_earlier_plugins_is_passed_through(runtime: Runtime) -> None:
    """An interface's index in `ips` moves with the interfaces before it."""
    earlier = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "dummy0", "sandbox": "/run/netns/x", "mtu": 9000}],
        "ips": [{"address": "192.0.2.9/32", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24", "mtu": 1300}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    result = runtime.add(prevResult=earlier)
    assert result["interfaces"][0]["name"] == "dummy0"
    assert len(result["interfaces"]) == 3
    assert result["ips"][0] == earlier["ips"][0]
    assert result["ips"][1] == {"address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 2}
    assert result["routes"][0] == {"dst": "192.0.2.0/24", "mtu": 1300}
    assert result["dns"] == earlier["dns"]
    assert runtime.call("CHECK", prevResult=result) == (0, {})


def test_a_second_interface_leaves_the_default_route_to_the_first(runtime: Runtime) -> None:
    runtime.add()
    env = runtime.node.env("ADD", "c1", IFNAME="net1")
    code, second = runtime.node.handle(runtime.plugin, env)
    assert (code, second["routes"]) == (0, [])
    assert runtime.call("CHECK") == (0, {})
    env["CNI_COMMAND"] = "CHECK"
    assert runtime.node.handle(runtime.plugin, env, stdin(prevResult=second)) == (0, {})


def test_an_address_that_a_stranger_uses_is_refused_and_the_next_one_given(runtime: Runtime) -> None:
    """One address given twice: the ledger was lost, the pods were not."""
    loopback = 1
    taken = route_replace(Route("10.1.0.2/32", oif=loopback))
    netns.run(runtime.node.namespace, commit, link_up(loopback), taken)
    code, sentence = runtime.refused("ADD")
    assert code == 5
    assert "10.1.0.2" in sentence
    assert runtime.address("c1") == "10.1.0.3"


def test_gc_removes_interfaces_that_nobody_knows(runtime: Runtime) -> None:
    """The ledger was lost: what the runtime names stays, the rest goes."""
    for name in ("c1", "c2"):
        runtime.add(name)
        runtime.ledger.forget(Key(name, "eth0"))
    valid = [{"containerID": "c1", "ifname": "eth0"}]
    assert runtime.call("GC", **{"cni.dev/valid-attachments": valid}) == (0, {})
    assert runtime.node.host_links() == {wiring.host_ifname("c1", "eth0")}
    netns.run(runtime.node.namespace, commit, link_delete(wiring.host_ifname("c1", "eth0")))


def test_a_pod_of_another_mode_is_still_checked_and_removed_as_it_was_wired(runtime: Runtime) -> None:
    """The node was switched to bridge mode while the pod ran."""
    result = runtime.add()
    runtime.configure(replace(ROUTED, mode=Mode.BRIDGE))
    netns.run(runtime.node.namespace, wiring.ensure_bridge, CIDRS)
    assert runtime.call("CHECK", prevResult=result) == (0, {})
    assert_consistent(runtime.node, {"c1"})
    runtime.delete()
    assert_consistent(runtime.node, set())


def test_an_ipv6_pod_works_where_the_runtime_turned_ipv6_off(runtime: Runtime) -> None:
    runtime.node.env("ADD", "c1")

    def turn_off() -> None:
        for name in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")

    netns.run(runtime.node.pods["c1"], turn_off)
    assert json.dumps(runtime.add()).count("fd00:1::2") == 1
    assert runtime.call("CHECK") == (0, {})
