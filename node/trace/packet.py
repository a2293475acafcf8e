"""What is traced and what is said of it: packets, steps, ends, branches."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction

from netlink.family import Family, with_port

PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection, at one place of its way.

    `sport` 0: any. `iif` and `oif` are the interfaces known at this place, "" none. `translated`, `renamed`:
    its destination, its source was changed on this node. `tracked`: connection tracking sees it; `known`: as
    part of a connection that there is already, which `becomes` from another source on its way out; `settled`:
    all translation was decided, as of a node's packet to itself that comes in by lo.
    """

    family: Family
    protocol: int
    source: str
    destination: str
    dport: int
    sport: int = 0
    iif: str = ""
    oif: str = ""
    mark: int = 0
    ct_mark: int = 0
    priority: int = 0
    translated: bool = False
    renamed: bool = False
    tracked: bool = True
    known: bool = False
    becomes: str = ""
    settled: bool = False

    @property
    def addresses(self) -> str:
        """Where from and where to, in words."""
        source = with_port(self.source, self.sport) if self.sport else self.source
        return f"{source} → {with_port(self.destination, self.dport)}"


class Kind(Enum):
    """What a step is."""

    START = "start"
    INTERFACE = "interface"
    RULE = "rule"
    CHAIN = "chain"
    CHOICE = "choice"
    NAT = "nat"
    CONNTRACK = "conntrack"
    ROUTE = "route"
    NEIGHBOUR = "neighbour"
    TUNNEL = "tunnel"
    UNDECIDED = "undecided"
    NOTE = "note"
    END = "end"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens, in order. `hook` is the column in which people look for it.

    Of a rule: its chain ("ip podwire prerouting"), text, handle, and the packets that its counter has seen
    (None: it has none); `elements` of sets and maps that matched. Of a translation: before and after.
    """

    kind: Kind
    place: str
    hook: str
    text: str
    chain: str = ""
    rule: str = ""
    handle: int = 0
    packets: int | None = None
    elements: tuple[str, ...] = ()
    before: str = ""
    after: str = ""


class Verdict(Enum):
    """How a way ends. LEFT: it goes on where nothing is known; UNKNOWN: at a node that cannot be asked."""

    DELIVERED = "delivered"
    LEFT = "left"
    REJECTED = "rejected"
    DROPPED = "dropped"
    UNROUTABLE = "unroutable"
    UNKNOWN = "unknown"

    @property
    def arrives(self) -> bool:
        """Whether nothing stands in the packet's way, as far as it could be followed."""
        return self in (Verdict.DELIVERED, Verdict.LEFT)

    @property
    def fails(self) -> bool:
        """Whether something is known to stand in its way."""
        return self in (Verdict.REJECTED, Verdict.DROPPED, Verdict.UNROUTABLE)


@dataclass(frozen=True, slots=True)
class End:
    """Where a way ends: `who` has the packet, and its addresses then; or why nobody has, what to look at."""

    verdict: Verdict
    place: str
    who: str
    packet: Packet
    reason: str = ""
    look: str = ""


@dataclass(frozen=True, slots=True)
class Translation:
    """What connection tracking of a node remembers: the packet before and after."""

    place: str
    before: Packet
    after: Packet


@dataclass(frozen=True, slots=True)
class Choice:
    """A random choice on the way: which of how many, and how likely that one is."""

    place: str
    chain: str
    number: int
    of: int
    weight: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Trail:
    """A way so far."""

    steps: tuple[Step, ...] = ()
    choices: tuple[Choice, ...] = ()
    translations: tuple[Translation, ...] = ()

    def then(self, *steps: Step) -> Trail:
        """Return the way with more steps."""
        return Trail((*self.steps, *steps), self.choices, self.translations)

    def translated(self, place: str, before: Packet, after: Packet) -> Trail:
        """Return the way with a translation that replies need undone; those of one place count together."""
        first = next((t.before for t in self.translations if t.place == place), before)
        others = tuple(t for t in self.translations if t.place != place)
        return Trail(self.steps, self.choices, (*others, Translation(place, first, after)))


@dataclass(frozen=True, slots=True)
class Branch:
    """One whole way, how likely it is, and the way back of the replies."""

    probability: Fraction
    steps: tuple[Step, ...]
    choices: tuple[Choice, ...]
    end: End
    back: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def masqueraded(self) -> bool:
        """Whether the receiver sees another source than the sender's."""
        return any(s.kind is Kind.NAT and s.text.startswith("source") for s in self.steps)


@dataclass(frozen=True, slots=True)
class Trace:
    """All that can become of a packet. `source`, `target` are what was asked for, in words."""

    packet: Packet
    source: str
    target: str
    branches: tuple[Branch, ...]
    others: tuple[str, ...] = field(default=())
    """Tables of others at the hooks on the way, each with what is known of it."""

    @property
    def common(self) -> int:
        """How many steps all branches have in common, from the start."""
        first = self.branches[0].steps
        length = min(len(b.steps) for b in self.branches)
        return next((n for n in range(length) if any(b.steps[n] != first[n] for b in self.branches)), length)
