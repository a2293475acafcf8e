"""Three nodes of which each is a namespace, with a pod each, behind a router; their networks in this process.

pod N ── node N ── router        pod: 10.244.N.2, fd00:N::2    node: 192.168.5N.10, fd00:5N::10

What the nodes write into their Node objects all of them read, as by a source: `settle` goes round until
nothing changes any more.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from netlink import netns
from netlink.rtnl import Rtnl
from node.network import Network, NetworkConfig
from node.settings import Settings
from node.sources.annotations import WIREGUARD_DETOUR, WIREGUARD_KEYS, wireguard_keys
from node.tunnel_rules import TunnelRules
from node.wireguard import Wireguard
from proxy.model import Node

DEADLINE = 60.0
NUMBERS = (1, 2, 3)
COUNTERS = """
table inet count { chain forward { type filter hook forward priority 0;
  ip saddr 10.244.0.0/16 counter comment "bare"; ip daddr 10.244.0.0/16 counter comment "bare"
  ip6 saddr fd00::/30 counter comment "bare"; ip6 daddr fd00::/30 counter comment "bare"
  udp dport 51820-51821 ip saddr 0.0.0.0/0 counter comment "over 4"
  udp dport 51820-51821 ip6 saddr ::/0 counter comment "over 6"
}
}
"""


def run(name: str, *command: str, stdin: str = "", check: bool = True) -> str:
    """Run a program in a namespace; return what it prints."""

    def work() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)

    done = netns.run(name, work)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{stdin}"
    return done.stdout


@dataclass(slots=True)
class Member:
    """A node: its namespaces, and what its daemon would have."""

    number: int
    space: str
    pod: str
    keys: Path
    node: Node
    wireguard: Wireguard
    network: Network
    rules: TunnelRules
    stack: ExitStack
    configured: Callable[[Member], NetworkConfig]
    before: dict[str, Node] = field(default_factory=dict)

    def compare(self, nodes: dict[str, Node]) -> None:
        """Have all of it compared, as at a start."""

        def work() -> None:
            self.network.compare(nodes, self.configured(self))
            self.rules.apply(self.network.tunnel_rules())

        netns.run(self.space, work)
        self.before = dict(nodes)

    def take(self, nodes: dict[str, Node]) -> None:
        """Bring what changed to the kernel, as little as that needs."""
        changed = {name for name in nodes if nodes[name] is not self.before.get(name)}
        if not changed:
            return
        if not netns.run(self.space, lambda: self.network.change(nodes, changed)):
            self.compare(nodes)
        self.before = dict(nodes)

    def tick(self, nodes: dict[str, Node]) -> None:
        """Go on with a change of keys, if there is one."""
        if netns.run(self.space, lambda: self.wireguard.tick(nodes, 0, self.network.wireguard)):
            self.compare(nodes)

    def published(self) -> Node:
        """Return the Node object as it is with what this node says of itself."""
        wanted, problems = self.wireguard.annotations, list[str]()
        keys = wireguard_keys(wanted.get(WIREGUARD_KEYS) or "", problems)
        assert not problems
        detour = wanted.get(WIREGUARD_DETOUR) == "true"
        if (keys, detour) == (self.node.wireguard_keys, self.node.wireguard_detour):
            return self.node
        return structs.replace(self.node, wireguard_keys=keys, wireguard_detour=detour)


@dataclass(slots=True)
class Secured:
    """The nodes by their numbers, and the router."""

    router: str
    members: dict[int, Member]

    @property
    def nodes(self) -> dict[str, Node]:
        return {member.node.name: member.node for member in self.members.values()}

    def settle(self) -> None:
        """Have everybody know what all say, until nobody says anything new."""
        for _ in range(10):
            for member in self.members.values():
                member.take(self.nodes)
            if not self.publish():
                return
        raise AssertionError("the nodes do not settle")

    def publish(self) -> bool:
        """Have each Node object say what its node says; whether one changed."""
        changed = False
        for member in self.members.values():
            published = member.published()
            changed = changed or published is not member.node
            member.node = published
        return changed

    def counted(self, what: str) -> int:
        """Return how many packets the router has forwarded of some kind."""
        text = run(self.router, "nft", "list", "table", "inet", "count")
        return sum(int(n) for n in re.findall(rf'packets (\d+) bytes \d+ comment "{what}"', text))


def build(namespaces: Callable[[], str]) -> tuple[str, dict[int, tuple[str, str]]]:
    """Make the namespaces; return the router's, and each node's and its pod's."""
    router = namespaces()
    spaces = {number: (namespaces(), namespaces()) for number in NUMBERS}
    lines: list[str] = ["link set lo up"]
    for number, (space, pod) in spaces.items():
        lines += [
            f"link add eth{number} type veth peer name eth0 netns {space}",
            f"link set eth{number} up",
            f"addr add 192.168.5{number}.1/24 dev eth{number}",
            f"addr add fd00:5{number}::1/64 dev eth{number} nodad",
        ]
        run(router, "ip", "-batch", "-", stdin="\n".join(lines))
        lines = []
        own = [
            "link set lo up",
            "link set eth0 up",
            f"addr add 192.168.5{number}.10/24 dev eth0",
            f"addr add fd00:5{number}::10/64 dev eth0 nodad",
            f"route add default via 192.168.5{number}.1",
            f"route add ::/0 via fd00:5{number}::1",
            f"link add pod0 type veth peer name eth0 netns {pod}",
            "link set pod0 up",
            "addr add 169.254.1.1/32 dev pod0",
            "addr add fe80::1/64 dev pod0 nodad",
            f"route add 10.244.{number}.2/32 dev pod0",
            f"route add fd00:{number}::2/128 dev pod0",
        ]
        run(space, "ip", "-batch", "-", stdin="\n".join(own))
        inside = [
            "link set eth0 up",
            f"addr add 10.244.{number}.2/32 dev eth0",
            f"addr add fd00:{number}::2/128 dev eth0 nodad",
            "route add 169.254.1.1 dev eth0 scope link",
            "route add default via 169.254.1.1",
            "route add ::/0 via fe80::1 dev eth0",
        ]
        run(pod, "ip", "-batch", "-", stdin="\n".join(inside))
    netns.run(router, lambda: Settings().assert_all())
    run(router, "nft", "-f", "-", stdin=COUNTERS)
    return router, spaces


def default_config(member: Member) -> NetworkConfig:
    """What a node does whose backend is WireGuard."""
    return NetworkConfig("wireguard", turning=member.wireguard.turning)


def joined(number: int, spaces: tuple[str, str], keys: Path, versions: tuple[int, ...]) -> Member:
    """Return a node as its daemon starts; it has addresses of these IP versions."""
    stack, (space, pod), name = ExitStack(), spaces, f"node{number}"
    rtnl = netns.run(space, lambda: stack.enter_context(Rtnl()))
    rules = netns.run(space, lambda: stack.enter_context(TunnelRules()))
    wireguard = Wireguard(keys, name)
    wireguard.used = True
    addresses = {4: f"192.168.5{number}.10", 6: f"fd00:5{number}::10"}
    node = Node(
        name,
        (f"10.244.{number}.0/24", f"fd00:{number}::/64"),
        tuple(addresses[version] for version in versions),
        uid=f"u{number}",
    )
    network = Network(rtnl, name, Settings(), wireguard.keys)
    return Member(number, space, pod, keys, node, wireguard, network, rules, stack, default_config)


@contextmanager
def secured(
    built: tuple[str, dict[int, tuple[str, str]]], root: Path, versions: tuple[int, ...]
) -> Iterator[Secured]:
    """Have the nodes know each other; their devices and rules are gone afterwards."""
    router, spaces = built
    members = {n: joined(n, spaces[n], root / str(n) / "wireguard", versions) for n in NUMBERS}
    world = Secured(router, members)
    try:
        world.settle()
        yield world
    finally:
        for member in world.members.values():
            member.configured = lambda _: NetworkConfig("direct")
            member.compare({})
            netns.run(member.space, lambda member=member: member.rules.apply({}))
            member.stack.close()


def ping(member: Member, address: str, *, size: int = 56, space: str = "") -> bool:
    """Whether a node's pod (or the namespace named) gets an answer; of a size that may not be fragmented."""
    words = ("ping", "-c1", "-W5", "-Mdo", f"-s{size}", address)
    return " 0% packet loss" in run(space or member.pod, *words, check=False)


def wait_until(good: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Wait for a condition, at most until the deadline."""
    deadline = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
