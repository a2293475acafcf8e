"""What needs modules that the machine under the lab may lack: WireGuard and IPVS."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from lab import capture, state
from lab.qemu import driver
from lab.qemu.scenarios.base import Trial, Verdict
from lab.qemu.scenarios.units import traffic
from lab.state import Lab
from lab.topology import Backend, LabError

NODE = "node2"
ANNOTATIONS = "/var/lib/podwire/annotations.json"
PUBLISH_SECONDS = 1.0


def wireguard(trial: Trial) -> Iterator[Verdict]:
    """Encrypt what pods send to other nodes, change a node's keys under traffic, and go back."""
    lab = trial.world.lab
    with published(lab), trial.configured(trial.nodes, {"network": {"backend": "wireguard"}}):
        for node in trial.nodes:
            trial.wait(f"{node} has met its peers", partial(_met, trial, node), 180)
        # What the lab knows of the other backend whose packets are never bare is true of this one.
        tunnelled = replace(lab, plan=replace(lab.plan, backend=Backend.VXLAN))
        lab.call("router", capture.forget_bare)
        lab.call("router", capture.count_bare, tunnelled.plan)
        inside = replace(trial, world=replace(trial.world, lab=tunnelled))
        yield trial.judged("pods, services and node ports", inside.cases("B", "C", "D"))
        for family in lab.plan.families:
            bare = lab.call("router", capture.bare, tunnelled.plan, family)
            yield trial.verdict(f"packets with a pod's IPv{family.value} address on the wire", bare, 0)
        key = trial.shell(NODE, "wg show pwwg0 public-key")
        with traffic(trial) as streams:
            trial.shell(NODE, "podwire wireguard rotate")
            trial.wait("another key", lambda: trial.shell(NODE, "wg show pwwg0 public-key") != key, 300)
            trial.wait("no detour", lambda: "detour" not in trial.shell(NODE, f"cat {ANNOTATIONS}"), 300)
        yield from streams.verdicts(trial, "while its keys change")
        mtu = trial.shell(NODE, "cat /sys/class/net/pwwg0/mtu")
        yield trial.verdict("the tunnel's MTU over IPv4", int(mtu), 1440)
    devices = trial.shell(NODE, "ls /sys/class/net | grep pwwg || true")
    yield trial.verdict("devices left after the way back", devices, "")
    lab.call("router", capture.forget_bare)
    yield trial.judged("pod to pod by the backend of before", trial.cases("B"))


def ipvs(trial: Trial) -> Iterator[Verdict]:
    """Make services of IPVS's virtual servers, by each scheduler, and go back."""
    nodes = trial.nodes
    with trial.configured(nodes, {"services": {"mode": "ipvs"}}):
        servers = trial.shell(NODE, "ipvsadm -Ln | grep -cE '^(TCP|UDP|FWM)'")
        yield trial.verdict("virtual servers", int(servers) > 5, True)
        yield trial.judged("services, node ports and load balancers", trial.cases("C", "D", "E"))
    for scheduler in ("lc", "sh", "wrr"):
        with trial.configured([NODE], {"services": {"mode": "ipvs", "ipvsScheduler": scheduler}}):
            said = trial.shell(NODE, f"ipvsadm -Ln | grep -c ' {scheduler}'")
            yield trial.verdict(f"virtual servers with scheduler {scheduler}", int(said) > 5, True)
    left = trial.shell(NODE, "ipvsadm -Ln | grep -cE '^(TCP|UDP|FWM)' || true; ip -br link show type dummy")
    yield trial.verdict("virtual servers and interfaces left after the way back", left, "0")


def leftovers(trial: Trial) -> Iterator[Verdict]:
    """Take away what kube-proxy's IPVS mode leaves on a node, and nothing else."""
    trial.shell(
        NODE,
        """
        modprobe ip_vs; modprobe dummy
        ip link add kube-ipvs0 type dummy && ip address add 10.96.0.99/32 dev kube-ipvs0
        ipvsadm -A -t 10.96.0.99:80 -s rr && ipvsadm -a -t 10.96.0.99:80 -r 10.244.9.9:80 -m
        ipset create KUBE-CLUSTER-IP hash:ip,port && ipset create OTHERS hash:ip
        ipvsadm -A -t 198.18.0.1:80 -s rr""",
    )
    _, said = trial.try_shell(NODE, "podwire doctor")
    yield trial.verdict("podwire doctor names kube-ipvs0", "kube-ipvs0" in said, True)
    with traffic(trial) as streams:
        said = trial.shell(NODE, "podwire cleanup --kube-proxy")
    yield from streams.verdicts(trial, "meanwhile")
    left = trial.shell(NODE, "ipvsadm -Ln | grep -c 10.96.0.99; ip -br link | grep -c kube-ipvs0;"
                             " ipset list -n | grep -c KUBE || true")  # fmt: skip
    yield trial.verdict("of kube-proxy's left", left.split(), ["0", "0", "0"])
    others = trial.shell(NODE, "ipvsadm -Ln | grep -c 198.18.0.1:80; ipset list -n | grep -c OTHERS")
    yield trial.verdict("of others' still there", others.split(), ["1", "1"])
    trial.shell(NODE, "ipvsadm -D -t 198.18.0.1:80; ipset destroy OTHERS")


def _met(trial: Trial, node: str) -> bool:
    """Whether a node's usual tunnel knows all peers."""
    return len(trial.shell(node, "wg show pwwg0 peers 2>/dev/null || true").split()) == len(trial.nodes) - 1


@contextmanager
def published(lab: Lab) -> Iterator[None]:
    """Be the control plane, all through a block: bring what nodes say of themselves into the manifests."""
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            for node in lab.plan.nodes:
                with suppress(LabError, OSError, ValueError):
                    publish_node(lab, node.name)
            stop.wait(PUBLISH_SECONDS)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def publish_node(lab: Lab, node: str) -> None:
    """Bring a node's own annotations into its Node object."""
    said = lab.call(node, driver.output, ["cat", ANNOTATIONS])
    wanted = json.loads(said)["metadata"]["annotations"]
    for document in state.manifests(lab, "Node"):
        if document["metadata"]["name"] == node:
            annotations = document["metadata"].get("annotations", {})
            kept = {
                key: value for key, value in annotations.items() if not key.startswith("podwire.io/wireguard")
            }
            state.write_manifest(
                lab, {**document, "metadata": {**document["metadata"], "annotations": kept | wanted}}
            )
