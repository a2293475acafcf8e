"""A real containerd, asked as kubelet asks it, with podwire as its network."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest

from api import cri_pb2 as pb
from cli import cri
from cni import install
from lab import oci as image
from lab.oci import PORT
from netlink import netns
from tests.cni.test_crash import ADD_STEPS
from tests.runtimes.capsule import ROOT, capsule, program
from tests.runtimes.containerd import NAMESPACE, Containerd, Sandbox
from tests.runtimes.world import NODE, OUTSIDE, POD_CIDRS, World, seen, unreachable, wait_for, world

HOST_PORT = 8088


@pytest.fixture(scope="module")
def runtime(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A node with podwire's daemon and containerd."""
    root = tmp_path_factory.mktemp("containerd")
    with capsule() as inside, world(namespaces, inside, root) as found:
        runtime = Containerd(found)
        found.start_daemon()
        found.install()
        runtime.start()
        runtime.load(image.write(root / "image.tar"))
        yield runtime


@pytest.fixture
def containerd(runtime: Containerd) -> Iterator[Containerd]:
    """The runtime without pods; afterwards there are none, nor anything of them."""
    logs = [runtime.world.log(name) for name in ("containerd", "daemon")]
    sizes = [log.stat().st_size for log in logs]
    yield runtime
    for log, size in zip(logs, sizes, strict=True):
        print(f"--- {log.name}\n{log.read_text()[size:]}")  # shown when the test failed
    if runtime.process is None:
        runtime.start()
    if runtime.world.daemon is None:
        runtime.world.start_daemon()
    for sandbox in cri.sandboxes(runtime.socket):
        runtime.remove_pod(sandbox.id)
    runtime.world.assert_holds(set())


def listed(containerd: Containerd) -> dict[str, cri.Sandbox]:
    return {sandbox.id: sandbox for sandbox in cri.sandboxes(containerd.socket)}


def namespaces_of_pods(containerd: Containerd) -> list[str]:
    """Return the network namespaces that containerd keeps."""
    directory = containerd.root / "state/io.containerd.grpc.v1.cri/netns"
    return [file.name for file in Path(containerd.world.capsule.path(directory)).iterdir()]


def qdiscs(world: World, namespace: str, interface: str) -> list[dict[str, Any]]:
    """Return the tbf queues of an interface, as tc describes them; rates in bytes per second."""
    words = [program("tc", "iproute2"), "-j", "qdisc", "show", "dev", interface]
    found = json.loads(world.capsule.run(namespace, words).stdout)
    return [queue for queue in found if queue["kind"] == "tbf"]


def test_a_pod_has_the_addresses_that_the_runtime_tells_kubelet(containerd: Containerd) -> None:
    """One of each range, in the order of the podCIDRs; ledger, runtime and the pod itself agree."""
    pods = [containerd.add(name) for name in ("a", "b", "c")]
    assert len({pod.addresses for pod in pods}) == len(pods)
    rows = {row.key.container_id: row for row in containerd.world.attachments()}
    for pod in pods:
        assert len(pod.addresses) == len(POD_CIDRS)
        assert all(ip_address(a) in cidr for a, cidr in zip(pod.addresses, POD_CIDRS, strict=True))
        assert tuple(map(str, rows[pod.id].addresses)) == pod.addresses
        assert containerd.world.addresses(pod.netns) == set(pod.addresses)
    containerd.world.assert_holds({pod.id for pod in pods})


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_pods_are_reached_from_the_node_and_from_pods(containerd: Containerd, family: int) -> None:
    """A pod sees another pod's own address, and the node's when the node asks."""
    a, b = containerd.add("a"), containerd.add("b")
    assert seen(a.netns, b.addresses[family], PORT) == ("b", a.addresses[family])
    assert seen(b.netns, a.addresses[family], PORT) == ("a", b.addresses[family])
    assert seen(containerd.world.node, a.addresses[family], PORT) == ("a", NODE[family])
    assert seen(containerd.world.outside, a.addresses[family], PORT) == ("a", OUTSIDE[family])


def test_stopping_twice_and_removing_twice_leave_nothing(containerd: Containerd) -> None:
    """Kubelet stops a sandbox any number of times; the first time frees everything."""
    pod = containerd.add("a")
    containerd.stop_pod(pod.id)
    containerd.world.assert_holds(set())
    assert not listed(containerd)[pod.id].ready
    assert namespaces_of_pods(containerd) == []
    containerd.stop_pod(pod.id)
    containerd.remove_pod(pod.id)
    containerd.remove_pod(pod.id)
    assert listed(containerd) == {}


def test_the_sandboxes_are_listed_with_pod_state_and_annotations(containerd: Containerd) -> None:
    pods = containerd.add("b", annotations={"team": "red"}), containerd.add("a")
    containerd.stop_pod(pods[1].id)
    assert cri.sandboxes(containerd.socket) == (
        cri.Sandbox(pods[1].id, NAMESPACE, "a", False, {}),
        cri.Sandbox(pods[0].id, NAMESPACE, "b", True, {"team": "red"}),
    )
    assert listed(containerd)[pods[0].id].pod == f"{NAMESPACE}/b"


def host_port() -> list[pb.PortMapping]:
    return [pb.PortMapping(container_port=PORT, host_port=HOST_PORT)]


def test_a_host_port_is_reached_from_outside_the_node(containerd: Containerd) -> None:
    """At the node's address of each family; the pod sees who asks. It ends with the pod."""
    pod = containerd.add("web", port_mappings=host_port())
    outside = containerd.world.outside
    for node, client in zip(NODE, OUTSIDE, strict=True):
        assert seen(outside, node, HOST_PORT) == ("web", client)
    containerd.remove_pod(pod.id)
    assert all(unreachable(outside, node, HOST_PORT) for node in NODE)


def test_a_host_port_in_use_is_refused_and_the_first_pod_keeps_it(containerd: Containerd) -> None:
    first = containerd.add("first", port_mappings=host_port())
    with pytest.raises(grpc.RpcError, match=str(HOST_PORT)):
        containerd.add("second", port_mappings=host_port())
    containerd.world.assert_holds({first.id})
    assert seen(containerd.world.outside, NODE[0], HOST_PORT) == ("first", OUTSIDE[0])


def test_the_bandwidth_annotations_limit_the_pods_interface(containerd: Containerd) -> None:
    """Towards the pod at the node's end of its cable, from the pod at its own."""
    limits = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    pod = containerd.add("slow", annotations=limits)
    (row,) = containerd.world.attachments()
    (ingress,) = qdiscs(containerd.world, containerd.world.node, row.host_ifname)
    (egress,) = qdiscs(containerd.world, pod.netns, "eth0")
    assert (ingress["options"]["rate"], egress["options"]["rate"]) == (10_000_000 // 8, 20_000_000 // 8)
    assert seen(containerd.world.node, pod.address, PORT)[0] == "slow"


def test_a_pod_without_annotations_has_no_limit(containerd: Containerd) -> None:
    pod = containerd.add("fast")
    (row,) = containerd.world.attachments()
    assert qdiscs(containerd.world, containerd.world.node, row.host_ifname) == []
    assert qdiscs(containerd.world, pod.netns, "eth0") == []


def test_an_annotation_asks_for_an_address(containerd: Containerd) -> None:
    """The runtime hands a pod's annotations on to a plugin that says it wants them."""
    pod = containerd.add("fixed", annotations={"podwire.io/ip": "10.244.1.77"})
    assert pod.address == "10.244.1.77"
    with pytest.raises(grpc.RpcError, match=r"10\.244\.1\.77"):
        containerd.add("late", annotations={"podwire.io/ip": "10.244.1.77"})
    containerd.world.assert_holds({pod.id})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_pods_outlive_a_restart_of_containerd(containerd: Containerd, number: signal.Signals) -> None:
    """They answer while it is down, keep their addresses, and can be stopped afterwards."""
    a, b = containerd.add("a"), containerd.add("b")
    containerd.stop(number)
    assert seen(a.netns, b.address, PORT) == ("b", a.address)
    containerd.start()
    assert [containerd.get(pod.id) for pod in (a, b)] == [a, b]
    assert {pod.ready for pod in listed(containerd).values()} == {True}
    c = containerd.add("c")
    assert c.address not in (a.address, b.address)
    containerd.stop_pod(a.id)
    containerd.world.assert_holds({b.id, c.id})


def test_sandboxes_come_and_go_while_the_daemon_is_down(containerd: Containerd) -> None:
    """What was made with it is removed without it, and the other way round."""
    node = containerd.world
    before = containerd.add("before")
    node.stop_daemon(signal.SIGKILL)
    during = containerd.add("during")
    gone = containerd.add("gone")
    assert seen(before.netns, during.address, PORT) == ("during", before.address)
    containerd.remove_pod(gone.id)
    containerd.remove_pod(before.id)
    node.assert_holds({during.id})
    node.start_daemon()
    node.assert_holds({during.id})
    assert seen(node.node, during.address, PORT)[0] == "during"
    containerd.remove_pod(during.id)
    node.assert_holds(set())


def test_a_plugin_that_dies_in_add_leaks_nothing_after_the_runtimes_cleanup(containerd: Containerd) -> None:
    """Killed at every step in turn: the sandbox fails, containerd calls DEL, everything is free again."""
    node = containerd.world
    node.stop_daemon()
    plugin, real = node.bin_dir / install.BINARY, node.bin_dir / "real"
    plugin.rename(real)
    try:
        for step in ADD_STEPS:
            faulty = shlex.join([sys.executable, "-m", "tests.cni.faulty", "shim", str(node.state_dir), step])
            test = f'[ "$CNI_COMMAND" = ADD ] && exec {faulty}'
            plugin.write_text(
                f"#!/bin/sh\ncd {shlex.quote(str(ROOT))}\n{test}\nexec {shlex.quote(str(real))}\n"
            )
            plugin.chmod(0o755)
            with pytest.raises(grpc.RpcError, match=r"failed \(add\)"):
                containerd.add("a")
            node.assert_holds(set())
            assert namespaces_of_pods(containerd) == []
    finally:
        real.replace(plugin)
    assert containerd.add("a").address in {str(address) for address in POD_CIDRS[0]}


def test_a_daemon_that_dies_in_add_costs_the_sandbox_nothing(containerd: Containerd) -> None:
    """The plugin finishes what the daemon began; the addresses are not lost."""
    node = containerd.world
    node.stop_daemon()
    for step in ADD_STEPS:
        words: list[str | Path] = [sys.executable, "-m", "tests.cni.faulty", "daemon", node.state_dir, step]
        log = node.log(f"dying-{step.replace(' ', '-')}")
        daemon = node.start(log.stem, words, stdin=subprocess.PIPE)
        wait_for(lambda file=log: "serving" in file.read_text(), "the daemon serves")  # type: ignore[misc]
        pod = containerd.add("a")
        assert daemon.wait(10) in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert daemon.stdin
        daemon.stdin.close()
        node.assert_holds({pod.id})
        assert seen(node.node, pod.address, PORT)[0] == "a"
        containerd.remove_pod(pod.id)
        node.assert_holds(set())


def test_a_rewritten_conflist_counts_at_once(containerd: Containerd) -> None:
    """The runtime watches the folder, but not every kind of change; the file is replaced in one step.

    A pod that was made under another name of the network can still be removed.
    """
    node = containerd.world
    old = containerd.add("old")
    with restored(containerd):
        node.conflist |= {"name": "other"}
        wait_for(lambda: containerd.network() == (True, "other"), "containerd notices the new conflist")
        new = containerd.add("new")
        networks = {row.key.container_id: row.network for row in node.attachments()}
        assert networks == {old.id: "podwire", new.id: "other"}
        for pod in (old, new):
            containerd.remove_pod(pod.id)
        node.assert_holds(set())


def test_there_is_no_network_before_the_conflist(containerd: Containerd) -> None:
    """Kubelet is told so until `podwire install` has written it, and no pod is made."""
    node = containerd.world
    with restored(containerd):
        node.podwire("install", "--remove", "--bin-dir", node.bin_dir, "--conf-dir", node.conf_dir)
        wait_for(lambda: not containerd.network()[0], "containerd notices that there is no network")
        with pytest.raises(grpc.RpcError, match="cni plugin not initialized"):
            containerd.add("early")
    assert containerd.network() == (True, "podwire")
    containerd.add("ready")


def test_another_plugin_can_follow_podwire(containerd: Containerd) -> None:
    """The next one in the chain gets podwire's result, and podwire its own back for DEL."""
    node = containerd.world
    node.link_plugin("tuning")
    setting = "net.core.somaxconn"
    with restored(containerd):
        plugins = [*node.conflist["plugins"], {"type": "tuning", "sysctl": {setting: "77"}}]
        node.conflist |= {"name": "chain", "plugins": plugins}
        wait_for(lambda: containerd.network() == (True, "chain"), "containerd notices the new conflist")
        pod = containerd.add("a")
        found = node.capsule.run(pod.netns, ["cat", f"/proc/sys/{setting.replace('.', '/')}"])
        assert found.stdout.strip() == "77"
        assert seen(node.node, pod.address, PORT)[0] == "a"
        containerd.remove_pod(pod.id)
        node.assert_holds(set())


@contextmanager
def restored(containerd: Containerd) -> Iterator[None]:
    """Write plugin and conflist anew after a block, and wait until containerd knows."""
    try:
        yield
    finally:
        containerd.world.install()
        wait_for(lambda: containerd.network() == (True, "podwire"), "containerd notices podwire's conflist")


def config_of(node: World, **more: Any) -> dict[str, Any]:
    """Return what the plugin reads when a runtime that speaks CNI 1.1.0 executes it."""
    (plugin,) = (plugin for plugin in node.conflist["plugins"] if plugin["type"] == install.BINARY)
    return {**plugin, "name": node.conflist["name"], "cniVersion": "1.1.0", **more}


def valid(containerd: Containerd) -> list[dict[str, str]]:
    return [{"containerID": pod, "ifname": "eth0"} for pod in listed(containerd)]


def test_gc_keeps_the_sandboxes_of_containerd_and_removes_the_rest(containerd: Containerd) -> None:
    """As containerd 2 calls it when it starts, with what it lists."""
    node = containerd.world
    pods = [containerd.add(name) for name in ("a", "b")]
    node.run(program("ip", "iproute2"), "netns", "add", "lost")
    variables = {"CONTAINERID": "lost", "NETNS": "/run/netns/lost", "IFNAME": "eth0"}
    code, result = node.plugin("ADD", config_of(node), **variables)
    assert code == 0, result
    node.assert_holds({pod.id for pod in pods} | {"lost"})
    request = config_of(node, **{"cni.dev/valid-attachments": valid(containerd)})
    assert node.plugin("GC", request) == (0, {})
    node.assert_holds({pod.id for pod in pods})
    assert seen(pods[0].netns, pods[1].address, PORT) == ("b", pods[0].address)


def test_status_is_silent_while_pods_can_be_added(containerd: Containerd) -> None:
    """As containerd 2 asks every few seconds: with the daemon, and without it, as ADD works then too."""
    node = containerd.world
    assert node.plugin("STATUS", config_of(node)) == (0, {})
    node.stop_daemon()
    assert node.plugin("STATUS", config_of(node)) == (0, {})


def test_nothing_of_a_pod_is_in_the_nodes_own_namespace(containerd: Containerd) -> None:
    """The namespaces are separate: the node has no pod address, the pod none of the node's interfaces."""
    pod: Sandbox = containerd.add("a")
    ranges = ("10.244.1.0", "fd00:244:1::")  # the node's own, which no pod gets
    assert containerd.world.addresses(containerd.world.node) == {*NODE, *ranges}
    assert set(containerd.world.links(pod.netns)) == {"lo", "eth0"}
    with netns.opened(pod.netns) as descriptor:
        assert netns.is_namespace(descriptor)
