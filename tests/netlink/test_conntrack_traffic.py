"""A client that goes on sending reaches the new pod once the entry of the old one is removed."""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

from netlink import netns
from netlink.conntrack import IPS_DST_NAT, Backend, Flow, Tuple, flow, served
from netlink.family import Family
from netlink.requests import address_add
from tests.netlink.joined import End, join, with_conntrack

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
PORT, OTHER_PORT = 5300, 5400
TIMEOUT = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """The node's address, the addresses of two pods, in one family."""

    family: Family
    node: str
    old: str
    new: str

    @property
    def af(self) -> socket.AddressFamily:
        return socket.AddressFamily(self.family.af)


PLANS = {
    "ipv4": Plan(Family.V4, "10.0.0.1", "10.1.0.2", "10.1.0.3"),
    "ipv6": Plan(Family.V6, "fd00::1", "fd01::2", "fd01::3"),
}


@dataclass(frozen=True, slots=True)
class World:
    """A client beside a node that translates two ports; its pods are addresses of its own."""

    plan: Plan
    node: End
    client: End

    def lead(self, target: str) -> None:
        """Send new connections to both ports to a pod."""
        host = f"[{target}]" if ":" in target else target
        self._rules(f"meta l4proto {{ udp, tcp }} th dport {{ {PORT}, {OTHER_PORT} }} dnat to {host}:53")

    def lead_nowhere(self) -> None:
        self._rules("")

    def _rules(self, rule: str) -> None:
        """Load a rule, and one that keeps connection tracking at work."""
        table = f"table {self.plan.family.keyword} try"
        script = (
            f"{table} {{}}; delete {table}; {table} {{"
            f" chain nat {{ type nat hook prerouting priority dstnat; {rule}; }};"
            f" chain track {{ type filter hook prerouting priority filter; ct state invalid counter; }}; }}"
        )
        netns.run(
            self.node.netns, lambda: subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True)
        )

    def socket(self, kind: socket.SocketKind, end: End, address: tuple[str, int] | None) -> socket.socket:
        """Return a socket in a namespace, bound to an address if there is one."""

        def make() -> socket.socket:
            made = socket.socket(self.plan.af, kind)
            made.settimeout(TIMEOUT)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address:
                made.bind(address)
            return made

        return netns.run(end.netns, make)

    def flows(self, protocol: int = UDP) -> tuple[Flow, ...]:
        return with_conntrack(self.node.netns, lambda c: c.flows(self.plan.family, protocol))

    def delete_stale(self, *backends: str, port: int = PORT) -> int:
        """Remove what is stale now that these pods serve the port, and no others."""
        now = served([self.plan.node], UDP, port, *(Backend(b, 53) for b in backends))
        return with_conntrack(self.node.netns, lambda c: c.delete_stale(now))


@pytest.fixture(params=list(PLANS))
def world(request: pytest.FixtureRequest, namespaces: Callable[[], str]) -> World:
    plan = PLANS[request.param]
    node, client = join(namespaces, "node", "client")
    made = World(plan, node, client)
    bits = plan.family.bits
    node.commit(*(address_add(node.index, f"{a}/{bits}") for a in (plan.old, plan.new)))
    made.lead(plan.old)
    return made


def ask(client: socket.socket, servers: Sequence[socket.socket]) -> str:
    """Send a datagram; return the address of the server that got it and answered."""
    client.send(b"who?")
    readable, _, _ = select.select(servers, [], [], TIMEOUT)
    assert len(readable) == 1, "one server gets the datagram"
    _, sender = readable[0].recvfrom(16)
    readable[0].sendto(b"I", sender)
    assert client.recv(16) == b"I"
    return str(readable[0].getsockname()[0])


def test_a_clients_next_packet_reaches_the_new_pod_once_the_entry_of_the_old_is_gone(world: World) -> None:
    """UDP black hole after a change of pods (kubernetes#139628): the client goes on with the same socket."""
    plan = world.plan
    with ExitStack() as stack:
        enter = stack.enter_context
        servers = [enter(world.socket(socket.SOCK_DGRAM, world.node, (a, 53))) for a in (plan.old, plan.new)]
        clients = [enter(world.socket(socket.SOCK_DGRAM, world.client, None)) for _ in range(2)]
        for client, port in zip(clients, (PORT, OTHER_PORT), strict=True):
            client.connect((plan.node, port))
            assert ask(client, servers) == plan.old

        world.lead(plan.new)
        assert ask(clients[0], servers) == plan.old  # what is wrong without a removal
        assert world.delete_stale(plan.new) == 1
        assert ask(clients[0], servers) == plan.new
        assert ask(clients[1], servers) == plan.old  # another port's entry is left alone
        assert world.delete_stale(plan.new) == 0


def test_an_entry_whose_pod_still_is_one_of_the_backends_is_left_alone(world: World) -> None:
    """Deleting all UDP entries at a restart moves QUIC connections (kubernetes#122740)."""
    plan = world.plan
    with ExitStack() as stack:
        server = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.node, (plan.old, 53)))
        client = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.client, None))
        client.connect((plan.node, PORT))
        assert ask(client, [server]) == plan.old
        before = world.flows()
        assert world.delete_stale(plan.new, plan.old) == 0
        assert world.flows() == before


def test_the_entry_of_a_port_that_nobody_serves_any_more_goes(world: World) -> None:
    plan = world.plan
    with ExitStack() as stack:
        pod = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.node, (plan.old, 53)))
        own = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.node, (plan.node, PORT)))
        client = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.client, None))
        client.connect((plan.node, PORT))
        assert ask(client, [own, pod]) == plan.old
        world.lead_nowhere()
        assert world.delete_stale() == 1
        assert ask(client, [own, pod]) == plan.node
        assert world.delete_stale() == 0, "the node's own connection is nobody's stale entry"
        world.lead(plan.old)
        assert world.delete_stale(plan.old) == 1, "but it is when a pod serves the port again"
        assert ask(client, [own, pod]) == plan.old


def test_tcp_is_left_alone(world: World) -> None:
    plan = world.plan
    with ExitStack() as stack:
        listener = stack.enter_context(world.socket(socket.SOCK_STREAM, world.node, (plan.old, 53)))
        listener.listen()
        client = stack.enter_context(world.socket(socket.SOCK_STREAM, world.client, None))
        client.connect((plan.node, PORT))
        accepted, _ = listener.accept()
        stack.enter_context(accepted)
        world.lead(plan.new)
        now = served([plan.node], TCP, PORT, Backend(plan.new, 53))
        assert with_conntrack(world.node.netns, lambda c: c.delete_stale(now)) == 0
        assert world.delete_stale(plan.new) == 0
        client.sendall(b"still here")
        assert accepted.recv(16) == b"still here"


def test_an_entry_is_read_as_pyroute2_reads_it(world: World) -> None:
    plan = world.plan
    with ExitStack() as stack:
        server = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.node, (plan.old, 53)))
        client = stack.enter_context(world.socket(socket.SOCK_DGRAM, world.client, None))
        client.connect((plan.node, PORT))
        assert ask(client, [server]) == plan.old
        sport = client.getsockname()[1]
        source = client.getsockname()[0]
    (message,) = with_conntrack(world.node.netns, lambda c: c._dump(plan.family, UDP, PORT))
    found = flow(message)
    assert found
    assert (found.family, found.protocol) == (plan.family, UDP)
    assert found.original == Tuple(source, plan.node, sport, PORT)
    assert found.reply == Tuple(plan.old, source, 53, sport)
    assert found.status & IPS_DST_NAT
    theirs = nfct_msg(message)
    theirs.decode()
    word = plan.family.keyword.replace("ip6", "v6").replace("ip", "v4").upper()
    for attribute_name, direction in (("ORIG", found.original), ("REPLY", found.reply)):
        halves = theirs.get_attr(f"CTA_TUPLE_{attribute_name}")
        addresses, ports = halves.get_attr("CTA_TUPLE_IP"), halves.get_attr("CTA_TUPLE_PROTO")
        assert direction == Tuple(
            addresses.get_attr(f"CTA_IP_{word}_SRC"),
            addresses.get_attr(f"CTA_IP_{word}_DST"),
            ports.get_attr("CTA_PROTO_SRC_PORT"),
            ports.get_attr("CTA_PROTO_DST_PORT"),
        )
    numbers = [theirs.get_attr(name) for name in ("CTA_STATUS", "CTA_ID", "CTA_MARK")]
    assert numbers == [found.status, found.id, found.mark]
