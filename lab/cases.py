"""What the demo expects: scenarios A to F and I as data, and how an observation is judged. Pure.

A case names places (hosts, nodes, pods), never addresses: those are known only once a lab is up, and
they are of the IP family that the case is run for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt

from lab.probe import Answer, Failure, Result
from lab.topology import Backend, Topology
from netlink.family import Family

SPREAD = 120
SIGMAS = 5  # a fair choice strays further than this once in a million runs


OUTSIDE = ("internet", "client", "neighbour", "router")


class Check(Enum):
    """What a case does; `ask` is the usual one."""

    ASK = "ask"  # requests from `source` by `via`; who answers, and which address did they see?
    TAKEN = "port taken"  # a second server on a port of the same pod is refused
    OUTLIVE = "outlive"  # the pod's namespace and address stay when its processes end
    GROW = "grow"  # one more endpoint is added, then as ASK
    LEAK = "leak"  # no service address reached the router unhandled
    BARE = "bare"  # no pod's address was on a packet where packets of pods travel inside others
    HEALTH = "health"  # what each node tells a balancer of the service: a count of the servers on it
    TURNS = "turns"  # requests are answered strictly in turns, and say in X-Forwarded-For whose they are
    RETRIED = "retried"  # of the servers the last one has ended: the others answer in its place
    PATH = "path"  # the packets of one connection, hop by hop


BY_PROXY = frozenset({Check.TURNS, Check.RETRIED})
"""What the L7 proxy does."""
ALONE = frozenset({Check.GROW, Check.PATH, Check.OUTLIVE, *BY_PROXY})
"""What changes the cluster, watches all traffic, or counts on being the only client."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: `source` asks for `servers` by `via`; they are to see one of the `seen` places' addresses.

    `localhost` is a place, too.

    `via` is "" for the server's own address, "localhost", "service/NAME", "lb/NAME" for the address of the
    service's load balancer, "lb/NAME:PORT" for another port there, "PLACE:PORT", or "PLACE.second:PORT";
    "udp" stands before it, or alone. No servers: no answer may come. With `count` over 1 each server must
    get its fair share.
    """

    scenario: str
    source: str
    servers: tuple[str, ...]
    via: str = ""
    seen: tuple[str, ...] = ()
    count: int = 1
    check: Check = Check.ASK
    dropped: bool = True  # no servers only: they time out; else how they fail is not laid down
    hops: tuple[str, ...] = ()  # PATH only: "PLACE SOURCE DESTINATION", in order

    @property
    def udp(self) -> bool:
        """Whether it asks with a datagram."""
        return self.via.partition(" ")[0] == "udp"

    @property
    def way(self) -> str:
        """`via` without the protocol."""
        return self.via.removeprefix("udp").lstrip()

    @property
    def alone(self) -> bool:
        """Whether it must not run beside others: it changes the cluster or watches all traffic."""
        return self.check in ALONE or self.last

    @property
    def last(self) -> bool:
        """Whether it is about all that went before."""
        return self.check in (Check.LEAK, Check.BARE)

    @property
    def at_hosts(self) -> bool:
        """Whether it needs addresses of hosts of the family that it is run for.

        A node without any has no route to a service address either, and so nothing that could be translated.
        """
        asked = self.way.partition("/")[0].partition(":")[0].partition(".")[0]
        if self.source in OUTSIDE or asked == "lb" or (asked == "service" and _is_host(self.source)):
            return True
        return any(map(_is_host, (asked, *self.servers)))

    @property
    def name(self) -> str:
        """A short name, unique in CASES."""
        parts = (self.scenario, self.source, "+".join(self.servers) or "nobody", self.via.replace(" ", "-"))
        return "-".join(filter(None, (*parts, "" if self.check is Check.ASK else self.check.name.lower())))


@dataclass(frozen=True, slots=True)
class Row:
    """A case's outcome in one IP family, as the table shows it."""

    scenario: str
    family: str
    source: str
    to: str
    via: str
    saw: str
    expected: str
    passed: bool
    path: tuple[str, ...] = ()  # PATH only: the packets, hop by hop


def _pod(scenario: str, source: str, server: str, via: str = "", seen: str = "") -> Case:
    """One request; the server is to see the source's own address unless `seen` says otherwise."""
    return Case(scenario, source, (server,), via, (seen or source,))


A = (
    _pod("A", "twin", "twin", "localhost", "localhost"),
    _pod("A", "twin", "twin", "twin:8080"),
    _pod("A", "customer", "twin", "twin:80"),
    _pod("A", "customer", "twin", "twin:8080"),
    Case("A", "twin", ("twin",), "twin:80", check=Check.TAKEN),
    Case("A", "customer", ("twin",), "twin:80", ("customer",), check=Check.OUTLIVE),
)

B = (
    _pod("B", "customer", "database"),  # same node
    _pod("B", "customer", "summary-1"),  # other node, same subnet
    _pod("B", "customer", "summary-2"),  # other node, across the router
    _pod("B", "summary-2", "customer"),
    _pod("B", "summary-1", "summary-2"),
    _pod("B", "customer", "customer"),
    _pod("B", "customer", "summary-1", "udp"),
    _pod("B", "customer", "summary-2", "udp"),
    _pod("B", "node1", "customer"),
    _pod("B", "node1", "summary-1"),
    _pod("B", "node1", "summary-2"),
    _pod("B", "node3", "customer"),
    _pod("B", "customer", "node1"),
    _pod("B", "customer", "node2"),
    _pod("B", "customer", "node3"),
    _pod("B", "summary-2", "node1"),
    _pod("B", "summary-2", "node2", "udp"),
    _pod("B", "node3", "summary-1", "udp"),
)

BARE = Case("C", "router", (), "pod ranges", check=Check.BARE)
SUMMARY = ("summary-1", "summary-2")
C = (
    _pod("C", "customer", "database", "service/database"),
    _pod("C", "summary-1", "database", "service/database"),
    _pod("C", "summary-2", "database", "service/database"),
    Case("C", "customer", SUMMARY, "service/summary", ("customer",), SPREAD),
    Case("C", "node1", SUMMARY, "service/summary", ("node1",), SPREAD),
    Case("C", "node3", SUMMARY, "service/summary", ("node3",), SPREAD),
    _pod("C", "customer", "customer", "service/customer", seen="node1"),  # hairpin
    _pod("C", "customer", "database", "udp service/database"),
    _pod("C", "summary-2", "database", "udp service/database"),
    _pod("C", "node2", "database", "udp service/database"),
    _pod("C", "customer", "customer", "udp service/customer", seen="node1"),  # hairpin
    Case("C", "summary-1", SUMMARY, "service/summary", ("summary-1", "node2"), SPREAD),  # hairpin, half of it
    Case("C", "neighbour", SUMMARY, "service/summary", ("node1",), SPREAD),  # from off the cluster
    Case("C", "customer", (*SUMMARY, "summary-3"), "service/summary", ("customer",), SPREAD, Check.GROW),
    Case("C", "router", (), "service range", check=Check.LEAK),
    BARE,
)

D = (
    _pod("D", "client", "customer", "node2:30180", "node2"),  # the pod is on node1
    _pod("D", "client", "customer", "node1:30180", "node1"),
    _pod("D", "client", "customer", "node3:30180", "node3"),
    _pod("D", "client", "customer", "node2.second:30180", "node2"),  # any local address
    _pod("D", "node2", "customer", "node2:30180", "node2"),
    _pod("D", "summary-1", "customer", "node2:30180", "node2"),
    _pod("D", "summary-1", "customer", "node1:30180", "node1"),
    _pod("D", "client", "customer", "udp node2:30180", "node2"),
    # Policy Local: the client's address is kept, a node without an endpoint drops.
    _pod("D", "client", "customer", "node1:30181", "client"),
    Case("D", "client", (), "node2:30181"),
    Case("D", "client", (), "node3:30181"),
    _pod("D", "client", "customer", "udp node1:30181", "client"),
    Case("D", "client", (), "udp node2:30181"),
    # From inside the cluster the policy is not applied: the pod is reached, with its client's address.
    _pod("D", "summary-1", "customer", "node2:30181", "summary-1"),
    # A pod of a third node would be answered past the node that it asked: so that one is in between.
    _pod("D", "summary-2", "customer", "node2:30181", "node2"),
)

E = (
    # Policy Cluster: the router leads the address to node2, the pod is on node1.
    _pod("E", "client", "customer", "lb/front", "node2"),
    _pod("E", "internet", "customer", "lb/front", "node2"),
    _pod("E", "client", "customer", "udp lb/front", "node2"),
    _pod("E", "summary-1", "customer", "lb/front", "node2"),  # a pod's packet is taken on its own node
    _pod("E", "node3", "customer", "lb/front", "node3"),
    # A port that the service has not. It need not be dropped: the address may have other uses.
    Case("E", "client", (), "lb/front:81", dropped=False),
    # Policy Local: the router leads the address to node1, where the pod is.
    _pod("E", "client", "customer", "lb/front-local", "client"),
    _pod("E", "client", "customer", "udp lb/front-local", "client"),
    _pod("E", "client", "customer", "node1:30183", "client"),
    Case("E", "client", (), "node2:30183"),
    _pod("E", "summary-1", "customer", "lb/front-local", "summary-1"),  # from inside: any endpoint
    Case("E", "router", ("customer",), "health/front-local", check=Check.HEALTH),
    # loadBalancerSourceRanges: only the client's network may come, and by a node port anybody.
    _pod("E", "client", "customer", "lb/front-ranges", "node2"),
    _pod("E", "client", "customer", "udp lb/front-ranges", "node2"),
    Case("E", "internet", (), "lb/front-ranges"),
    Case("E", "internet", (), "udp lb/front-ranges"),
    _pod("E", "internet", "customer", "node2:30184", "node2"),
)

TO_INTERNET = ("customer customer internet", "node1 customer internet", "node1 node1 internet",
               "router node1 internet", "internet node1 internet")  # fmt: skip
FROM_CLIENT = ("client client node2", "router client node2", "node2 client node2",
               "node2 node2 customer", "node1 node2 customer", "customer node2 customer")  # fmt: skip
F = (
    _pod("F", "customer", "internet", seen="node1"),
    _pod("F", "summary-1", "internet", seen="node2.second"),  # the address that node2 has for it
    _pod("F", "summary-2", "internet", seen="node3"),
    _pod("F", "customer", "internet", "udp", "node1"),
    _pod("F", "summary-1", "internet", "udp", "node2.second"),
    _pod("F", "node1", "internet"),
    _pod("F", "summary-2", "summary-1"),  # cluster and node ranges are not masqueraded
    _pod("F", "summary-1", "node3"),
    Case("F", "customer", ("internet",), "", ("node1",), check=Check.PATH, hops=TO_INTERNET),
    Case("F", "client", ("customer",), "node2:30180", ("node2",), check=Check.PATH, hops=FROM_CLIENT),
)

TURNS = 20
PROXIED = (
    Case("I", "customer", SUMMARY, "service/summary-l7", ("node1",), TURNS, Check.TURNS),
    Case("I", "node1", SUMMARY, "service/summary-l7", ("node1",), TURNS, Check.TURNS),
    Case("I", "summary-2", SUMMARY, "service/summary-l7", ("node3",), TURNS, Check.TURNS),
    Case("I", "customer", SUMMARY, "service/summary-l7", ("node1",), TURNS, Check.RETRIED),
    # Transparent: the pod sees the client's own address, on its node and on another one.
    _pod("I", "customer", "database", "service/database-l7"),
    _pod("I", "summary-1", "database", "service/database-l7"),
    _pod("I", "summary-2", "database", "service/database-l7"),
    # All others are balanced as before.
    _pod("I", "customer", "database", "service/database"),
)

CASES = A + B + C + D + E + F + PROXIED


def possible(case: Case, plan: Topology, family: Family) -> bool:
    """Whether a case is about something that this lab has."""
    if case.check is Check.BARE:
        return plan.backend is not Backend.DIRECT
    return family in plan.shared or not case.at_hosts


def judge(case: Case, results: Sequence[Result], seen: Sequence[str]) -> tuple[str, str, bool]:
    """Return what was seen, what was expected and whether they agree.

    `seen` are the addresses that the case's `seen` places stand for.
    """
    if not case.servers:
        saw = " ".join(sorted({_words(result) for result in results}))
        if not case.dropped:
            return saw, "no answer", all(isinstance(result, Failure) for result in results)
        return saw, "timed out", all(result == Failure("timed out") for result in results)
    expected = " or ".join(dict.fromkeys(seen))
    failures = [result for result in results if isinstance(result, Failure)]
    answers = [result for result in results if isinstance(result, Answer)]
    saw = " ".join(sorted({answer.seen for answer in answers}))
    passed = not failures and {a.seen for a in answers} <= set(seen)
    by_server = Counter(answer.server for answer in answers)
    if case.count == 1 and set(by_server) - set(case.servers):
        saw = f"{saw} at {' '.join(by_server)}"
    if case.count > 1:
        low, high = fair_share(case.count, len(case.servers))
        saw = f"{saw}, {' '.join(str(by_server[server]) for server in case.servers)}"
        expected = f"{expected}, {low} to {high} each"
        passed = passed and all(low <= by_server[server] <= high for server in case.servers)
    if failures:
        saw = f"{saw} {failures[0].reason} (request {len(results)})".strip()
    return saw, expected, passed and set(by_server) <= set(case.servers)


def fair_share(count: int, servers: int) -> tuple[int, int]:
    """Return how few and how many of `count` connections one of `servers` gets from a fair choice."""
    mean = count / servers
    margin = SIGMAS * sqrt(mean * (1 - 1 / servers))
    return max(1, int(mean - margin)), int(mean + margin) + 1


def _is_host(place: str) -> bool:
    return place in OUTSIDE or place.startswith("node")


def _words(result: Result) -> str:
    return result.reason if isinstance(result, Failure) else f"{result.seen} at {result.server}"
