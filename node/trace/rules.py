"""The seam between the walk over a node and a kind of packet filter: what each kind tells and decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from node.trace.packet import Choice, Packet, Step

HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""The hooks by number (NF_INET_*)."""


class Ruling(Enum):
    """What a base chain says of a packet: go on with the next one, or end."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that a hook calls: in words ("ip podwire prerouting"), and where it stands among others.

    All chains that translate run where connection tracking translates, in the order of their priorities.
    """

    title: str
    hook: int
    priority: int
    translates: bool

    @property
    def order(self) -> tuple[int, int]:
        """Where it stands: translation has one place at each hook (NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC)."""
        place = -100 if self.hook in (0, 3) else 100
        return (place, self.priority) if self.translates else (self.priority, 0)


@dataclass(frozen=True, slots=True)
class Passed:
    """One way through a base chain: what became of the packet, what happened, which random choices it took.

    `masquerade`: its source becomes an address of the interface that it leaves by. `source`, `target`:
    translations. `last`: chain and comment of the rule that decided; `xtables`: the program that lists it, if
    that is not nft.
    """

    ruling: Ruling
    packet: Packet
    steps: tuple[Step, ...] = ()
    choices: tuple[Choice, ...] = ()
    masquerade: bool = False
    source: str = ""
    last: tuple[str, str] = ("", "")
    xtables: str = ""


class Surroundings(Protocol):
    """What rules can ask of the node."""

    def kind_of(self, address: str) -> int:
        """Return the type of an address (RTN_*)."""
        ...

    def index_of(self, interface: str) -> int:
        """Return an interface's number, 0 for none."""
        ...

    def address_of(self, interface: str) -> str:
        """Return the first address of an interface; "" if it has none."""
        ...

    def way_out(self, packet: Packet, address: str) -> str:
        """Return the interface by which packets to an address leave; "" if nothing leads there."""
        ...


class Rules(Protocol):
    """One packet filter of a node at one moment, for one family."""

    def bases(self, hook: int) -> Sequence[BaseChain]:
        """Return the chains that a hook (NF_INET_*) calls."""
        ...

    def walk(self, base: BaseChain, packet: Packet, place: str, around: Surroundings) -> Sequence[Passed]:
        """Return every way of a packet through a chain: one for each branch of its random choices."""
        ...

    def others(self) -> Sequence[str]:
        """Return tables that see packets and are not walked, each in words."""
        ...
