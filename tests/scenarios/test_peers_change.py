"""Other nodes join, leave, move and change their ranges while pods talk: nobody else is to notice."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from lab import network, process, state
from lab.runtime import Pod
from lab.state import Json, Lab
from lab.topology import IpFamily, plan
from netlink import netns
from netlink.family import Family
from tests.scenarios.plain import difference, held, reaches, running, shell

CHANGES = 100
EVERY = 0.03
NUMBER = struct.Struct("=Q")
SO_RCVBUFFORCE = 33
BUFFER = 32 << 20
NAMES = tuple(f"other{i}" for i in range(12))
FORGET = """
for family in -4 -6; do
    ip $family route flush table all proto 112
    ip $family rule del pref 112
done
for device in pwvxlan4 pwvxlan6; do ip link del $device; done
for family in ip ip6; do nft delete table $family podwire_tunnels; done
"""


@dataclass(slots=True)
class Flow:
    """Numbered messages from one pod to another. What arrives waits in the socket until the end."""

    name: str
    sender: socket.socket
    receiver: socket.socket
    sent: int = 0
    received: list[int] = field(default_factory=list)

    def send(self) -> None:
        self.sender.send(NUMBER.pack(self.sent))
        self.sent += 1

    def collect(self) -> bool:
        """Take what has arrived; whether it is as much as was sent."""
        while True:
            try:
                data = self.receiver.recv(BUFFER if self.receiver.type is socket.SOCK_STREAM else NUMBER.size)
            except BlockingIOError:
                return len(self.received) >= self.sent
            if not data:
                return False
            self.received += (number for (number,) in NUMBER.iter_unpack(data))


@pytest.fixture(scope="module")
def found() -> Iterator[tuple[Lab, dict[str, Pod]]]:
    """Of node1 the one neighbour is on its own segment, the other behind a tunnel."""
    with running(plan("peers", ip_family=IpFamily.DUAL)) as made:
        yield made


def test_100_joins_leaves_and_changes_of_other_nodes_lose_and_reorder_nothing(
    found: tuple[Lab, dict[str, Pod]],
) -> None:
    lab, pods = found
    choose = random.Random(6)
    pace = threading.Event()
    with traffic(pods) as flows:
        for _ in range(CHANGES):
            change(lab, choose)
            pace.wait(EVERY)
        settle(lab)
    nothing_lost(flows)
    after = {node.name: held(node.namespace) for node in lab.plan.nodes}
    assert any("192.168.70." in line for line in after["node1"])
    start_afresh(lab)
    for node in lab.plan.nodes:
        fresh = held(node.namespace)
        assert fresh == after[node.name], node.name + difference(after[node.name], fresh)


def test_a_restart_of_all_daemons_loses_nothing(found: tuple[Lab, dict[str, Pod]]) -> None:
    lab, pods = found
    before = {node.name: held(node.namespace) for node in lab.plan.nodes}
    with traffic(pods) as flows:
        process.stop(lab.root.glob("node*/daemon.pid"))
        network.start_daemons(lab)
    nothing_lost(flows)
    for node in lab.plan.nodes:
        assert held(node.namespace) == before[node.name]


def test_a_node_replaced_under_its_name_is_the_new_one_only(found: tuple[Lab, dict[str, Pod]]) -> None:
    lab, _ = found
    namespace = lab.plan.node("node1").namespace
    state.write_manifest(lab, node_object("another", 7, 190, far=True, uid="first"))
    assert reaches(lambda: mentions(namespace, "10.244.190.0", "192.168.70.7"))
    before = held(namespace)
    state.write_manifest(lab, node_object("another", 8, 191, far=True, uid="second"))
    assert reaches(lambda: mentions(namespace, "10.244.191.0", "192.168.70.8"))
    now = held(namespace)
    assert not mentions(namespace, "10.244.190.0")
    assert not mentions(namespace, "192.168.70.7")
    assert len(now) == len(before)
    assert macs(now) - macs(before), "another node has another MAC, whatever its name"
    assert len(macs(now)) == len(macs(before))
    (lab.manifests / "node-another.yaml").unlink()
    assert reaches(
        lambda: not mentions(namespace, "10.244.191.0") and not mentions(namespace, "192.168.70.8")
    )


def nothing_lost(flows: list[Flow]) -> None:
    for flow in flows:
        assert flow.sent > CHANGES
        lost = set(range(flow.sent)).difference(flow.received)
        assert not lost, f"{flow.name}: {len(lost)} of {flow.sent} lost"
        assert flow.received == list(range(flow.sent)), f"{flow.name}: reordered"


def node_object(name: str, number: int, index: int, *, far: bool, uid: str = "") -> Json:
    """Return the Node object of a node that is not there, on the near segment or behind the router."""
    subnets = ("192.168.70.", "fd00:192:168:70::") if far else ("192.168.50.", "fd00:192:168:50::")
    cidrs = [f"10.244.{index}.0/24", f"fd00:10:244:{index}::/64"]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, **({"uid": uid} if uid else {})},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": f"{s}{number}"} for s in subnets]},
    }


def change(lab: Lab, choose: random.Random) -> None:
    """Have one of the other nodes join, leave, or become another one in some respect.

    There are fewer ranges and addresses than could be: now and then two nodes claim the same.
    """
    name = choose.choice(NAMES)
    path = lab.manifests / f"node-{name}.yaml"
    if path.exists() and choose.random() < 0.3:
        path.unlink()
        return
    number, index = choose.randrange(200, 215), choose.randrange(100, 115)
    uid = choose.choice(["", "", "one", "two"])
    state.write_manifest(lab, node_object(name, number, index, far=choose.random() < 0.5, uid=uid))


def settle(lab: Lab) -> None:
    """Wait until every node has taken the last change: its end is the rule about whom tunnels take."""
    state.write_manifest(lab, node_object("last", 230, 180, far=True))
    peers = "nft list set ip6 podwire_tunnels peers"
    for node in lab.plan.nodes:
        assert reaches(lambda n=node: "fd00:192:168:70::230" in shell(n.namespace, peers))  # type: ignore[misc]


def start_afresh(lab: Lab) -> None:
    """Stop the daemons, remove what they made of the network between nodes, and start them again."""
    process.stop(lab.root.glob("node*/daemon.pid"))
    for node in lab.plan.nodes:
        shell(node.namespace, FORGET)
        assert not mentions(node.namespace, "pwvxlan")
    network.start_daemons(lab)


def mentions(namespace: str, *words: str) -> bool:
    lines = "\n".join(held(namespace))
    return all(word in lines for word in words)


def macs(lines: list[str]) -> set[str]:
    """The MACs that frames are forwarded for."""
    return {line.split()[0] for line in lines if " dst " in line and line.endswith("permanent")}


@contextmanager
def traffic(pods: dict[str, Pod]) -> Iterator[list[Flow]]:
    """Send about 1,000 messages a second on each way from node1, by turns in each of its flows."""
    stop = threading.Event()
    with ExitStack() as stack:
        flows = [
            make(stack, pods["node1"], pods[other], family)
            for make in (datagrams, stream)
            for other in ("node2", "node3")
            for family in Family
        ]

        def send() -> None:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on two CPUs packets overtake each other
            for family in cycle_until(stop):
                for flow in flows[family :: len(Family)]:
                    flow.send()

        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(send)
            try:
                yield flows
            finally:
                stop.set()
            work.result()
        for flow in flows:
            reaches(flow.collect)


def cycle_until(stop: threading.Event) -> Iterator[int]:
    """Yield 0 and 1 by turns, one each millisecond."""
    turn = 0
    while not stop.wait(0.001):
        yield turn
        turn = 1 - turn


def datagrams(stack: ExitStack, one: Pod, other: Pod, family: Family) -> Flow:
    receiver = stack.enter_context(netns.run(other.netns, socket.socket, family.af, socket.SOCK_DGRAM))
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    receiver.bind((other.address(family), 0))
    sender = stack.enter_context(netns.run(one.netns, socket.socket, family.af, socket.SOCK_DGRAM))
    return connected("UDP", family, other, sender, receiver)


def stream(stack: ExitStack, one: Pod, other: Pod, family: Family) -> Flow:
    listener = stack.enter_context(netns.run(other.netns, socket.socket, family.af, socket.SOCK_STREAM))
    listener.bind((other.address(family), 0))
    listener.listen()
    sender = stack.enter_context(netns.run(one.netns, socket.socket, family.af, socket.SOCK_STREAM))
    sender.settimeout(5)
    flow = connected("TCP", family, other, sender, listener)
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    flow.receiver = stack.enter_context(listener.accept()[0])
    flow.receiver.setblocking(False)
    return flow


def connected(
    protocol: str, family: Family, other: Pod, sender: socket.socket, receiver: socket.socket
) -> Flow:
    sender.connect(receiver.getsockname())
    if protocol == "UDP":
        receiver.setblocking(False)
    return Flow(f"{protocol} over IPv{family.value} to {other.spec.name}", sender, receiver)
