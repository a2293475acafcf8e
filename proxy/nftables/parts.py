"""What is in the table only while a frontend needs it: balancing chains beyond the usual, and affinity. Pure.

A service with session affinity has a set of clients for each endpoint, filled by the packets themselves:

    services ─▶ affinity_from_… ─┬─ the client is in an endpoint's set ─────▶ affinity_to_…: remember, dnat
                                 └─ in none: one by chance (affinity_choice_…) ──▶ affinity_to_…

The names are digests of all that a part depends on: a part with the right name is the right part, and an
endpoint that stays keeps its clients whatever happens to the others.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from netlink.family import Family, with_port
from netlink.nftables.expressions import (
    Do,
    Lookup,
    RandomIndex,
    Remember,
    Verdict,
    VerdictLookup,
)
from netlink.nftables.objects import Chain, Data, Field, Goto, Map, Rule
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    DeleteChain,
    DeleteElements,
    DeleteMap,
    Operation,
)
from proxy.frontends import Action, Frontend, Masquerade
from proxy.model import Protocol
from proxy.nftables.ruleset import (
    COMMON_SHAPES,
    Kind,
    balance_chain,
    balance_rules,
    dnat_to,
    mark_rules,
    shape_id,
    source,
)

FROM, TO, CHOICE, CLIENTS = "affinity_from_", "affinity_to_", "affinity_choice_", "affinity_clients_"
MOST_CLIENTS = 65536
"""Clients that an endpoint remembers; the next one is balanced anew with each connection."""
LONGEST_COMMENT = 128
"""What nft loads; the kernel takes more."""


@dataclass(frozen=True, slots=True)
class Balancer:
    """A chain that balances over a number of endpoints of a kind."""

    kind: Kind
    endpoints: int
    masquerade: Masquerade

    @property
    def chain(self) -> str:
        """The name of its chain."""
        return balance_chain(self.kind, self.endpoints, self.masquerade)

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of its own maps."""
        return ()

    @property
    def shape(self) -> tuple[bytes, Data]:
        """The element that leads to it from the number of its shape."""
        return shape_id(self.kind, self.endpoints, self.masquerade), Goto(self.chain)

    def make(self, family: Family) -> tuple[Operation, ...]:
        """Return what makes it."""
        return balance_rules(family, self.kind, self.endpoints, self.masquerade)

    def remove(self) -> tuple[Operation, ...]:
        """Return what removes it."""
        return (DeleteChain(self.chain),)


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint of a service port with affinity, and the clients that go there."""

    service: str
    protocol: Protocol
    address: str
    port: int
    seconds: int

    @property
    def chain(self) -> str:
        """The name of its chain."""
        return TO + _digest(self.service, self.protocol.value, self.address, self.port, self.seconds)

    @property
    def clients(self) -> Map:
        """The set of its clients, each forgotten `seconds` after its last connection."""
        name = CLIENTS + self.chain.removeprefix(TO)
        comment = _short(f"clients that go to {with_port(self.address, self.port)} of {self.service}")
        return Map(
            name, (Field.SOURCE,), dynamic=True, timeout=self.seconds, size=MOST_CLIENTS, comment=comment
        )

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of its own maps."""
        return (self.clients.name,)

    def make(self, family: Family) -> tuple[Operation, ...]:
        """Return what makes it."""
        # Two rules: one that finds the set full ends, and its packet goes on.
        remember = (source(family), Remember(self.clients.name))
        go = dnat_to(family, self.protocol.value, self.address, self.port)
        there = _short(f"{with_port(self.address, self.port)} of {self.service}")
        return (
            AddMap(self.clients),
            AddChain(Chain(self.chain)),
            AddRule(Rule(self.chain, remember, "remember the client")),
            AddRule(Rule(self.chain, go, there)),
        )

    def remove(self) -> tuple[Operation, ...]:
        """Return what removes it; nothing may lead to it any more."""
        return DeleteChain(self.chain), DeleteMap(self.clients)


@dataclass(frozen=True, slots=True)
class AffinityBalancer:
    """A chain that sends a client to the endpoint that remembers it, else to any."""

    targets: tuple[Target, ...]
    masquerade: Masquerade

    @property
    def chain(self) -> str:
        """The name of its chain."""
        return FROM + _digest(self.masquerade, *(t.chain for t in self.targets))

    @property
    def choice(self) -> Map:
        """The map from a random number to an endpoint."""
        name = CHOICE + self.chain.removeprefix(FROM)
        comment = _short(f"endpoints for new clients of {self.targets[0].service}")
        return Map(name, (Field.INDEX,), verdicts=True, comment=comment)

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of its own maps."""
        return (self.choice.name,)

    @property
    def choices(self) -> list[tuple[bytes, Data]]:
        """The elements of that map."""
        return [(struct.pack("=I", at), Goto(t.chain)) for at, t in enumerate(self.targets)]

    def make(self, family: Family) -> tuple[Operation, ...]:
        """Return what makes it; its targets are there."""
        rules = [*mark_rules(family, self.chain, self.masquerade)]
        for t in self.targets:
            known = (source(family), Lookup(t.clients.name), Do(Verdict.GOTO, t.chain))
            rules.append(Rule(self.chain, known, f"its clients go to {with_port(t.address, t.port)}"))
        new = (RandomIndex(len(self.targets)), VerdictLookup(self.choice.name))
        rules.append(Rule(self.chain, new, f"a new client: one of {len(self.targets)}"))
        return (
            AddMap(self.choice),
            AddElements(self.choice, self.choices),
            AddChain(Chain(self.chain)),
            *map(AddRule, rules),
        )

    def remove(self) -> tuple[Operation, ...]:
        """Return what removes it; its targets stay."""
        return DeleteChain(self.chain), DeleteElements(self.choice, self.choices), DeleteMap(self.choice)


Part = Balancer | Target | AffinityBalancer


def balancer(kind: Kind, frontend: Frontend) -> Balancer | AffinityBalancer:
    """Return what balances a frontend's connections."""
    if not frontend.affinity:
        return Balancer(kind, len(frontend.endpoints), frontend.masquerade)
    return AffinityBalancer(_targets(frontend), frontend.masquerade)


def parts(kind: Kind, frontend: Frontend) -> tuple[Part, ...]:
    """Return what must be in the table for a frontend, beside what always is."""
    if frontend.action is not Action.BALANCE:
        return ()
    if frontend.affinity:
        return (*_targets(frontend), balancer(kind, frontend))
    if (kind, len(frontend.endpoints), frontend.masquerade) in COMMON_SHAPES:
        return ()
    return (balancer(kind, frontend),)


def made(family: Family, wanted: Iterable[Part]) -> list[Operation]:
    """Return what makes parts, targets before what leads to them."""
    return [op for part in sorted(wanted, key=_is_a_way) for op in part.make(family)]


def removed(unwanted: Iterable[Part]) -> list[Operation]:
    """Return what removes parts, targets after what leads to them."""
    return [op for part in sorted(unwanted, key=_is_a_way, reverse=True) for op in part.remove()]


def unknown_removed(chains: Iterable[str], maps: Iterable[str]) -> list[Operation]:
    """Return what removes parts of which only the names are known."""
    names = sorted(chains)
    ways = [n for n in names if not n.startswith(TO)]
    targets = [n for n in names if n.startswith(TO)]
    choices = sorted(m for m in maps if m.startswith(CHOICE))
    clients = sorted(m for m in maps if not m.startswith(CHOICE))
    return [
        *map(DeleteChain, ways),
        *(DeleteMap(Map(n, ())) for n in choices),
        *map(DeleteChain, targets),
        *(DeleteMap(Map(n, ())) for n in clients),
    ]


def _is_a_way(part: Part) -> bool:
    return not isinstance(part, Target)


def _targets(frontend: Frontend) -> tuple[Target, ...]:
    """Return the endpoints as targets; all frontends of a service port share them."""
    service, protocol, seconds = frontend.service, frontend.key.protocol, frontend.affinity
    return tuple(Target(service, protocol, b.address, b.port, seconds) for b in frontend.endpoints)


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _short(comment: str) -> str:
    return comment if len(comment) <= LONGEST_COMMENT else f"{comment[: LONGEST_COMMENT - 3]}..."
