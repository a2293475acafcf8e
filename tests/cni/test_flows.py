"""13 h of UDP black hole: a client that keeps its port keeps its connection, whatever became of the pod."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from cni.reaper import Reaper
from netlink import netns
from netlink.requests import Route, Veth, address_add, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from tests.cni.world import Node, Runtime

NODE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
CLIENT = {socket.AF_INET: "192.0.2.2", socket.AF_INET6: "2001:db8::2"}
HOST_PORT, PORT = 5353, 53
CONFIG: dict[str, Any] = {
    "runtimeConfig": {
        "portMappings": [{"hostPort": HOST_PORT, "containerPort": PORT, "protocol": "udp"}],
    }
}


@pytest.fixture
def outside(runtime: Runtime) -> str:
    """A client on a cable to the node; return its namespace."""
    client = runtime.node.make_namespace()

    def cable(other: int) -> None:
        with Rtnl() as rtnl:
            rtnl.commit(veth_add(Veth("eth0", "eth0", peer_netns=other)))

    def configure(addresses: dict[int, str]) -> None:
        index = socket.if_nametoindex("eth0")
        with Rtnl() as rtnl:
            lengths = {socket.AF_INET: 24, socket.AF_INET6: 64}
            requests = [address_add(index, f"{a}/{lengths[f]}") for f, a in addresses.items()]
            rtnl.commit(link_up(1), link_up(index), *requests)

    with netns.opened(client) as other:
        netns.run(runtime.node.namespace, cable, other)
    netns.run(runtime.node.namespace, configure, NODE)
    netns.run(client, configure, CLIENT)
    netns.run(client, routes_back)
    netns.run(runtime.node.namespace, forward)
    return client


def routes_back() -> None:
    with Rtnl() as rtnl:
        for destination, via in (
            ("10.1.0.0/24", NODE[socket.AF_INET]),
            ("fd00:1::/64", NODE[socket.AF_INET6]),
        ):
            rtnl.commit(route_replace(Route(destination, gateway=via)))


def forward() -> None:
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        with open(f"/proc/sys/net/{name}", "w") as file:
            file.write("1")


@contextmanager
def server(node: Node, container: str, family: int) -> Iterator[socket.socket]:
    """A UDP server in a pod that waits at most a moment."""
    with closing(netns.run(node.pods[container], socket.socket, family, socket.SOCK_DGRAM)) as listener:
        listener.bind(("", PORT))
        listener.settimeout(2)
        yield listener


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("daemon", [True, False], ids=["daemon", "no daemon"])
def test_a_client_that_keeps_its_port_reaches_the_next_pod(
    runtime: Runtime, outside: str, family: int, daemon: bool
) -> None:
    """First nobody has the port, then a pod, then another: each change counts for the same client socket."""
    client = netns.run(outside, socket.socket, family, socket.SOCK_DGRAM)
    with closing(client):
        client.bind((CLIENT[family], 4000))
        say = partial(client.sendto, b"hello", (NODE[family], HOST_PORT))
        say()
        for container in ("c1", "c2"):
            if daemon:
                netns.run(runtime.node.namespace, with_reaper, runtime, container)
            else:
                runtime.add(container, **CONFIG)
            with server(runtime.node, container, family) as listener:
                say()
                assert listener.recvfrom(16) == (b"hello", listener_sees(family))
            if container == "c1":
                runtime.delete("c1")


def listener_sees(family: int) -> tuple[Any, ...]:
    return (CLIENT[family], 4000) if family == socket.AF_INET else (CLIENT[family], 4000, 0, 0)


def with_reaper(runtime: Runtime, container: str) -> None:
    """Add a pod as the daemon does, which forgets connections later, and wait for that."""
    with Reaper(runtime.ledger, runtime.node.state_dir) as reaper:
        runtime.plugin = replace(runtime.plugin, settle=reaper.settle)
        runtime.add(container, **CONFIG)
