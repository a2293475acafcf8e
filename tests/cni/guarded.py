"""A node with guarded pods and a client outside, each in a namespace, and means to talk and to listen there.

The links are made here and not by cni.wiring: what is tested are the tables, whatever made the interfaces.

    client 192.0.2.2, fd09::2 ── 192.0.2.1, 192.0.2.7, fd09::1 node ── a, b: 10.1.0.2, .3, fd00:1::2, ::3
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cni.rules import Rules
from cni.tables import TABLES, PodRules
from ipam.records import HostPort
from netlink import announce, netns
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.operations import DeleteTable
from netlink.requests import (
    Request,
    Route,
    Veth,
    address_add,
    bridge_add,
    bridge_hairpin,
    link_set,
    link_up,
    neighbour_replace,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl

NODE, NODE_ALIAS, CLIENT = "192.0.2.1", "192.0.2.7", "192.0.2.2"
NODE6, CLIENT6 = "fd09::1", "fd09::2"
GATEWAY, GATEWAY6 = "10.1.0.1", "fd00:1::1"
LAN, BRIDGE = "lan0", "podwire0"
LAN_MAC, BRIDGE_MAC, CLIENT_MAC = "02:00:00:00:99:01", "02:00:00:00:99:02", "02:00:00:00:99:03"
PORT = 8080
"""Where every pod answers, by TCP and UDP."""
DEADLINE = 10.0
PATIENCE = 0.3
"""How long somebody waits for an answer that must not come (seconds)."""


@dataclass(slots=True)
class Pod:
    """A pod: its namespace, where its interface is eth0, and its rules."""

    name: str
    namespace: str
    rules: PodRules

    def address(self, family: Family) -> str:
        """Return the pod's address of a family."""
        return next(a for a in self.rules.addresses if (":" in a) == (family is Family.V6))


@dataclass(slots=True)
class World:
    """The node, the client and the pods. `rules` keeps the node's tables; `live` is what they are to hold."""

    node: str
    client: str
    bridge: bool
    pods: dict[str, Pod]
    live: dict[str, PodRules]
    rules: Rules

    def publish(self, name: str, *ports: HostPort) -> None:
        """Give a pod these host ports instead of those that it has."""
        pod = self.pods[name]
        if name in self.live:
            self.rules.remove(self.live.pop(name))
        pod.rules = replace(pod.rules, host_ports=ports)
        self.live[name] = pod.rules
        self.rules.add(pod.rules)

    def forget(self) -> None:
        """Remove the node's tables."""

        def work() -> None:
            with NftSocket() as nft:
                for table in TABLES.values():
                    if nft.table_comment(table) is not None:
                        nft.commit((table, [DeleteTable()]))

        netns.run(self.node, work)

    def correct_neighbours(self) -> None:
        """Let everybody on the bridge say where he is, after somebody said something else."""
        if self.bridge:
            for pod in self.pods.values():
                truth = [announce.frame(address, pod.rules.mac) for address in pod.rules.addresses]
                netns.run(pod.namespace, transmit, truth)
            truth = [announce.frame(address, BRIDGE_MAC) for address in (GATEWAY, GATEWAY6)]
            netns.run(self.node, transmit, truth, BRIDGE)

    def set_route_localnet(self) -> None:
        """Let the node's packets from 127.0.0.1 out to pods, and answers in."""
        for name in [BRIDGE] if self.bridge else [p.rules.host_ifname for p in self.pods.values()]:
            netns.run(self.node, sysctl, f"ipv4/conf/{name}/route_localnet", "1")


@contextlib.contextmanager
def world(make: Callable[[], str], *, bridge: bool) -> Iterator[World]:
    """Make the node, the client and pods a and b, whose servers answer in the block."""
    node, client = make(), make()
    for namespace in (node, client):
        netns.run(namespace, _hurry)
    netns.run(node, _configure_node, client, bridge)
    netns.run(client, _configure_client)
    pods: dict[str, Pod] = {}
    for number, name in enumerate(("a", "b"), start=2):
        mac = f"02:00:00:00:00:{number:02x}"
        rules = PodRules(f"pwpod{number:010x}", mac, (f"10.1.0.{number}", f"fd00:1::{number}"), (), bridge)
        pods[name] = Pod(name, make(), rules)
        netns.run(pods[name].namespace, _hurry)
        (_connect_bridged if bridge else _connect_routed)(node, pods[name])
    live = {pod.name: pod.rules for pod in pods.values()}
    servers = {pod.name: netns.run(pod.namespace, listen, PORT) for pod in pods.values()}
    with contextlib.ExitStack() as stack:
        rules = Rules(lambda: list(live.values()))
        netns.run(node, stack.enter_context, rules)
        stack.enter_context(answering(servers))
        rules.reconcile()
        made = World(node, client, bridge, pods, live, rules)
        _wait_for_neighbours(made)
        yield made


def _hurry() -> None:
    """Use addresses at once, without duplicate address detection; believe no router, as pods do."""
    for name in ("all", "default"):
        for key in ("accept_dad", "accept_ra", "accept_redirects"):
            sysctl(f"ipv6/conf/{name}/{key}", "0")


def _wait_for_neighbours(made: World) -> None:
    """Wait until everybody has found everybody, so that in the tests a packet that is lost was dropped."""
    for pod in made.pods.values():
        for address in pod.rules.addresses:
            for where in (made.client, made.node, *(p.namespace for p in made.pods.values() if p != pod)):

                def answered(where: str = where, address: str = address) -> bool:
                    return netns.run(where, ask, address, patience=PATIENCE) != ("", "")

                eventually(answered, f"{address} answers in {where}")


def sysctl(name: str, value: str) -> None:
    """Set a network sysctl of the calling thread's namespace."""
    (Path("/proc/sys/net") / name).write_text(value)


def commit(*requests: Request) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(*requests)


def _configure_node(client: str, bridge: bool) -> None:
    commit(link_up(socket.if_nametoindex("lo")))
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        sysctl(name, "1")
    for name in ("all", "default"):
        sysctl(f"ipv4/conf/{name}/rp_filter", "0")  # what it would drop is for the guard to drop
    with netns.opened(client) as fd:
        commit(veth_add(Veth(LAN, "eth0", LAN_MAC, CLIENT_MAC, peer_netns=fd)))
    addresses = (f"{NODE}/24", f"{NODE_ALIAS}/24", f"{NODE6}/64")
    commit(*(address_add(socket.if_nametoindex(LAN), a) for a in addresses))
    if bridge:
        commit(bridge_add(BRIDGE, BRIDGE_MAC))
        gateways = (f"{GATEWAY}/24", f"{GATEWAY6}/64")
        commit(*(address_add(socket.if_nametoindex(BRIDGE), a) for a in gateways))
        for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
            sysctl(f"bridge/{name}", "1")


def _configure_client() -> None:
    index = socket.if_nametoindex("eth0")
    commit(
        link_up(socket.if_nametoindex("lo")),
        link_up(index),
        address_add(index, f"{CLIENT}/24"),
        address_add(index, f"{CLIENT6}/64"),
        # Only for forged packets to be answered, and for pods that are spoken to directly.
        route_replace(Route("10.1.0.0/24", gateway=NODE, oif=index)),
        route_replace(Route("fd00:1::/64", gateway=NODE6, oif=index)),
    )


def _connect_routed(node: str, pod: Pod) -> None:
    rules = pod.rules
    host_mac = rules.mac.replace("02:00", "02:01")

    def on_node() -> None:
        with netns.opened(pod.namespace) as fd:
            commit(veth_add(Veth(rules.host_ifname, "eth0", host_mac, rules.mac, peer_netns=fd)))
        index = socket.if_nametoindex(rules.host_ifname)
        for address in rules.addresses:
            bits = 128 if ":" in address else 32
            commit(
                route_replace(Route(f"{address}/{bits}", oif=index)),
                neighbour_replace(index, address, rules.mac),
            )

    def in_pod() -> None:
        index = socket.if_nametoindex("eth0")
        commit(link_up(socket.if_nametoindex("lo")), link_up(index))
        for address, family in zip(rules.addresses, Family, strict=True):
            commit(
                address_add(index, f"{address}/{family.bits}"),
                route_replace(Route(f"{family.gateway}/{family.bits}", oif=index)),
                neighbour_replace(index, family.gateway, host_mac),
                route_replace(
                    Route("0.0.0.0/0" if family is Family.V4 else "::/0", gateway=family.gateway, oif=index)
                ),
            )

    netns.run(node, on_node)
    netns.run(pod.namespace, in_pod)


def _connect_bridged(node: str, pod: Pod) -> None:
    rules = pod.rules

    def on_node() -> None:
        with netns.opened(pod.namespace) as fd:
            commit(
                veth_add(Veth(rules.host_ifname, "eth0", rules.mac.replace("02:00", "02:01"), rules.mac, fd))
            )
        index = socket.if_nametoindex(rules.host_ifname)
        commit(link_set(index, master=socket.if_nametoindex(BRIDGE)), bridge_hairpin(index))

    def in_pod() -> None:
        index = socket.if_nametoindex("eth0")
        commit(
            link_up(socket.if_nametoindex("lo")),
            link_up(index),
            address_add(index, f"{rules.addresses[0]}/24"),
            address_add(index, f"{rules.addresses[1]}/64"),
            route_replace(Route("0.0.0.0/0", gateway=GATEWAY, oif=index)),
            route_replace(Route("::/0", gateway=GATEWAY6, oif=index)),
        )

    netns.run(node, on_node)
    netns.run(pod.namespace, in_pod)


def listen(port: int, address: str = "::") -> list[socket.socket]:
    """Open a TCP and a UDP server in the calling thread's namespace; "::" stands for both families."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen(16)
        server.setblocking(False)
        found.append(server)
    return found


@contextlib.contextmanager
def answering(servers: dict[str, list[socket.socket]]) -> Iterator[None]:
    """Answer everybody with "name client-address", in a thread, for the length of a block."""
    stop_read, stop_write = socket.socketpair()
    selector = selectors.DefaultSelector()
    selector.register(stop_read, selectors.EVENT_READ, "")
    for name, some in servers.items():
        for server in some:
            selector.register(server, selectors.EVENT_READ, name)

    def work() -> None:
        while True:
            for key, _ in selector.select():
                if not key.data:
                    return
                assert isinstance(key.fileobj, socket.socket)
                _answer(key.fileobj, key.data)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop_write.send(b"x")
        thread.join()
        selector.close()
        for one in (stop_read, stop_write, *(s for some in servers.values() for s in some)):
            one.close()


def _answer(server: socket.socket, name: str) -> None:
    with contextlib.suppress(OSError):
        if server.type == socket.SOCK_STREAM:
            connection, peer = server.accept()
            with connection:
                connection.sendall(f"{name} {peer[0].removeprefix('::ffff:')}".encode())
        else:
            _, peer = server.recvfrom(100)
            server.sendto(f"{name} {peer[0].removeprefix('::ffff:')}".encode(), peer)


def ask(
    destination: str, port: int = PORT, protocol: int = socket.IPPROTO_TCP, *, patience: float = 2.0
) -> tuple[str, str]:
    """Ask from the calling thread's namespace; return who answered and the client it saw ("", "": nobody)."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == socket.IPPROTO_TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as client:
        client.settimeout(patience)
        try:
            client.connect((destination, port))
            client.send(b"who")
            name, seen = client.recv(100).decode().split()
        except OSError:
            return "", ""
        return name, seen


def eventually(good: Callable[[], bool], what: str) -> None:
    """Look until something holds."""
    deadline = time.monotonic() + DEADLINE
    while not good():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"


def bound(kind: int, protocol: int, ifname: str) -> socket.socket:
    """Open a raw socket of a namespace's interface: all frames (AF_PACKET kinds), or a protocol's packets."""
    if kind == socket.AF_PACKET:
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        sniffer.bind((ifname, protocol))
    else:
        sniffer = socket.socket(kind, socket.SOCK_RAW, protocol)
        sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, ifname.encode())
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return sniffer


def transmit(frames: list[bytes], ifname: str = "eth0") -> None:
    """Send frames as they are, from the calling thread's namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind((ifname, 0))
        for frame in frames:
            sender.send(frame)
