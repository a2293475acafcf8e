"""Flat mode: pods with addresses of the node's own subnet, which its neighbours find without any route."""

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cni.flat import sync
from cni.plugin import ledger_of
from cni.settings import Mode, NodeSettings
from ipam.pools import IpamConfig, Pool
from ipam.ranges import parse_range
from netlink import netns
from netlink.requests import Veth, address_add, link_up, proxy_add, veth_add
from netlink.rtnl import Rtnl
from tests.cni.world import Node

POOL = Pool("flat", (parse_range("192.168.7.100-192.168.7.110"), parse_range("fd07::100-fd07::110")), ("*",))
FLAT = NodeSettings(Mode.FLAT, 1500, (), IpamConfig(pools=(POOL,), quarantine=0.0), "eth0")
NODE, NEIGHBOUR = ("192.168.7.1", "fd07::1"), ("192.168.7.2", "fd07::2")


class Flat(Node):
    """A node with settings of flat mode and a neighbour on its subnet."""

    def __init__(self, make: Callable[[], str], state_dir: Path) -> None:
        super().__init__(make, state_dir, FLAT)
        self.neighbour = make()
        with netns.opened(self.neighbour) as other:
            netns.run(self.namespace, self._cable, other)
        for place, addresses in ((self.namespace, NODE), (self.neighbour, NEIGHBOUR)):
            netns.run(place, self._configure, addresses)
        netns.run(self.namespace, self._forward)
        netns.run(self.namespace, sync, FLAT, ())

    @staticmethod
    def _cable(other: int) -> None:
        with Rtnl() as rtnl:
            rtnl.commit(veth_add(Veth("eth0", "eth0", peer_netns=other)))

    @staticmethod
    def _configure(addresses: tuple[str, str]) -> None:
        index = socket.if_nametoindex("eth0")
        with Rtnl() as rtnl:
            requests = (address_add(index, f"{a}/{64 if ':' in a else 24}") for a in addresses)
            rtnl.commit(link_up(1), link_up(index), *requests)

    @staticmethod
    def _forward() -> None:
        for file in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", file).write_text("1")

    def proxies(self) -> set[str]:
        def look() -> set[str]:
            with Rtnl() as rtnl:
                return {address for _, address in rtnl.proxies()}

        return netns.run(self.namespace, look)


@pytest.fixture
def node(namespaces: Callable[[], str], tmp_path: Path) -> Flat:
    return Flat(namespaces, tmp_path)


def addresses_of(answer: dict[str, list[dict[str, str]]]) -> list[str]:
    return [ip["address"].split("/")[0] for ip in answer["ips"]]


def heard(server: str, client: str, address: str) -> str:
    """Send one datagram from a namespace to an address served in another; return the source seen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.run(server, socket.socket, family, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind((address, 7000))
        with netns.run(client, socket.socket, family, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (address, 7000))
            return str(listener.recvfrom(16)[1][0])


def test_a_neighbour_finds_the_pod_and_the_pod_the_neighbour(node: Flat) -> None:
    """Both ways with the real addresses, in both families, and no route anywhere but on the node."""
    code, answer = node.cni("ADD", "c1")
    assert code == 0, answer
    pod = node.pods["c1"]
    for address, neighbour in zip(addresses_of(answer), NEIGHBOUR, strict=True):
        assert heard(pod, node.neighbour, address) == neighbour
        assert heard(node.neighbour, pod, neighbour) == address


def test_pods_of_one_node_reach_each_other(node: Flat) -> None:
    one, two = (node.cni("ADD", name)[1] for name in ("c1", "c2"))
    for source, target in zip(addresses_of(one), addresses_of(two), strict=True):
        assert heard(node.pods["c2"], node.pods["c1"], target) == source


def test_the_node_answers_for_its_pods_and_for_nobody_else(node: Flat) -> None:
    answer = node.cni("ADD", "c1")[1]
    assert node.proxies() == set(addresses_of(answer))
    assert node.cni("CHECK", "c1") == (0, {})
    assert node.cni("DEL", "c1") == (0, {})
    assert node.proxies() == set()
    assert node.cni("DEL", "c1") == (0, {})


def test_entries_that_an_interface_lost_come_back_and_stale_ones_go(node: Flat) -> None:
    """An interface that was down lost its entries; a crash can leave one. Somebody else's entry stays."""
    addresses = addresses_of(node.cni("ADD", "c1")[1])
    foreign, stale = "192.168.7.50", "192.168.7.109"

    def disturb() -> None:
        index = socket.if_nametoindex("eth0")
        with Rtnl() as rtnl:
            rtnl.commit(proxy_add(index, foreign), proxy_add(index, stale))

    netns.run(node.namespace, disturb)
    with ledger_of(node.state_dir) as ledger:
        assert netns.run(node.namespace, sync, FLAT, ledger.attachments()) == 1
        assert node.proxies() == {*addresses, foreign}
        assert netns.run(node.namespace, sync, FLAT, ledger.attachments()) == 0


def test_a_pod_on_an_address_that_was_elsewhere_a_moment_ago_is_found_at_once(node: Flat) -> None:
    """New pod unreachable for ~10 s: the neighbour still has the MAC of the machine that had the address."""
    elsewhere = "02:00:00:00:00:99"

    def neighbours() -> dict[str, str]:
        with Rtnl() as rtnl:
            return {n.address: n.mac for n in rtnl.neighbours()}

    for address in ("192.168.7.100", "fd07::100"):
        command = ["ip", "neigh", "replace", address, "lladdr", elsewhere, "dev", "eth0", "nud", "stale"]
        netns.run(node.neighbour, subprocess.run, command, check=True)
    answer = node.cni("ADD", "c1")[1]
    for address, neighbour in zip(addresses_of(answer), NEIGHBOUR, strict=True):
        assert netns.run(node.neighbour, neighbours)[address] != elsewhere
        assert heard(node.pods["c1"], node.neighbour, address) == neighbour


def test_a_missing_uplink_is_named_and_leaves_nothing(namespaces: Callable[[], str], tmp_path: Path) -> None:
    bare = Node(namespaces, tmp_path, FLAT)
    code, error = bare.cni("ADD", "c1")
    assert (code, error["code"]) == (1, 11)
    assert error["msg"] == "the interface 'eth0', on which flat mode answers for pods, is missing"
    assert bare.host_links() == set()
    with ledger_of(tmp_path) as ledger:
        assert ledger.attachments() == ()
