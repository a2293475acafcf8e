"""Follow a packet through rules as text: what the kernel would do with a connection's first packet. Pure.

`paths` goes past all hooks with the nat and filter tables, `ways` through one built-in chain of one table.
Every random choice is followed both ways. A form of rule that the walk does not know is an error, no guess.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from netlink.nftables.trace import Outcome, Packet
from proxy.iptables.names import ChainId
from proxy.iptables.text import Chains, Jump
from proxy.l7 import places
from proxy.model import Protocol

Tables = Mapping[str, Mapping[str, Iterable[str]]]
"""Rules, without "-A CHAIN", by table and chain."""

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\S+')
_DEEPEST = 32


class UnknownRule(Exception):
    """A rule of a form that the walk does not know."""


class Step(NamedTuple):
    """A rule that matched."""

    table: str
    chain: str
    rule: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet as rules see it at a hook. `states` are those of connection tracking: NEW, DNAT, …

    `group` is that of the program which sends it.
    """

    source: str
    destination: str
    protocol: int
    port: int
    sport: int = 0
    iif: str = ""
    oif: str = ""
    mark: int = 0
    states: frozenset[str] = frozenset({"NEW"})
    group: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """One way through a built-in chain: accept, drop or reject, and the packet after it.

    `source` is the address that a rule names for the packet's source, `masqueraded` that of its interface.
    `undecided` are rules of unknown forms that were passed over.
    """

    verdict: str
    seen: Seen
    masqueraded: bool
    source: str
    probability: float
    steps: tuple[Step, ...]
    undecided: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Path:
    """A way that a packet can take, how probable it is, and the rules that matched on it, in order."""

    outcome: Outcome
    probability: float
    steps: tuple[Step, ...]


class Option(NamedTuple):
    """One condition of a rule: `match` is the extension it belongs to, "" for those of every rule."""

    match: str
    name: str
    value: str
    inverted: bool


@dataclass(frozen=True, slots=True)
class Parsed:
    """A rule: its conditions, and its target with what was said to it. `goes`: -g instead of -j."""

    options: tuple[Option, ...]
    target: str
    to: Mapping[str, str]
    goes: bool


_FLAGS = {"--rcheck", "--set", "--reap", "--rsource", "--random-fully", "--random"}


@functools.lru_cache(maxsize=65_536)
def parse(text: str) -> Parsed:
    """Parse a rule as iptables-save prints it, without "-A CHAIN". Raises UnknownRule."""
    tokens = iter(_TOKEN.findall(text))
    options: list[Option] = []
    to: dict[str, str] = {}
    target, match, goes, inverted = "", "", False, False
    for token in tokens:
        if token == "!":
            inverted = True
            continue
        value = "" if token in _FLAGS else next(tokens, None)
        if value is None:
            raise UnknownRule(f"{token} without a value: {text}")
        if token in ("-j", "-g"):
            target, goes = value, token == "-g"
        elif target:
            to[token] = value
        elif token == "-m":
            match = value
        elif token in ("-s", "-d", "-p", "-i", "-o"):
            options.append(Option("", token, value, inverted))
        else:
            options.append(Option(match, token, value, inverted))
        inverted = False
    return Parsed(tuple(options), target, to, goes)


def tables(chains: Chains, jumps: Iterable[Jump]) -> dict[str, dict[str, list[str]]]:
    """Return tables with these chains, entered by these jumps."""
    found: dict[str, dict[str, list[str]]] = {}
    for (table, name), rules in chains.items():
        found.setdefault(table, {})[name] = list(rules)
    for jump in jumps:
        found.setdefault(jump.table, {}).setdefault(jump.chain, []).append(jump.rule)
    return found


@dataclass(frozen=True, slots=True)
class Around:
    """What rules ask beside the packet: this machine's addresses, clients in lists of xt_recent by name."""

    local: Collection[str]
    remembered: Mapping[str, Collection[str]] = field(default_factory=dict)


def paths(
    tables: Tables,
    packet: Packet,
    local: Collection[str],
    remembered: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Path]:
    """Yield every way of a packet past all hooks, one per branch of the random choices."""
    around = Around(local, remembered or {})
    seen = Seen(packet.source, packet.destination, packet.protocol, packet.port, group=packet.group)
    first = Way("accept", seen, False, "", 1.0, ())
    for translated in _onwards(
        tables, ("nat", "OUTPUT" if packet.from_node else "PREROUTING"), first, around
    ):
        here = translated.seen.destination in local
        hooks = [("filter", "OUTPUT")] if packet.from_node else [] if here else [("filter", "FORWARD")]
        hooks += [("nat", "POSTROUTING")] if packet.from_node or not here else []
        hooks += [("filter", "INPUT")] if here else []
        found = [translated]
        for hook in hooks:
            found = [after for way in found for after in _onwards(tables, hook, way, around)]
        for way in found:
            to, rules = way.seen, tuple(f"{s.chain}: {s.rule}" for s in way.steps)
            ended = Outcome(way.verdict, to.destination, to.port, way.masqueraded, rules, way.source)
            yield Path(ended, way.probability, way.steps)


def _onwards(tables: Tables, hook: tuple[str, str], before: Way, around: Around) -> Iterator[Way]:
    """Yield the ways through one more hook of a packet that has come so far."""
    table, chain = hook
    if before.verdict != "accept" or chain not in tables.get(table, {}):
        yield before
        return
    for way in ways(tables[table], ChainId(table, chain), before.seen, around):
        yield replace(
            way,
            masqueraded=before.masqueraded or way.masqueraded,
            source=before.source or way.source,
            probability=before.probability * way.probability,
            steps=before.steps + way.steps,
        )


def ways(
    chains: Mapping[str, Iterable[str]], start: ChainId, seen: Seen, around: Around, *, strict: bool = True
) -> Iterator[Way]:
    """Yield every way through a built-in chain of a table, whose policy is ACCEPT.

    Rules of unknown forms raise UnknownRule, or, not `strict`, are passed over and told of.
    """
    choices: list[bool] | None = []
    while choices is not None:
        walk = _Walk(chains, start.table, seen, around, choices, strict)
        yield walk.run(start.name)
        choices = walk.next_choices()


class _Ended(Exception):
    """The packet's way ends: drop or reject."""


@dataclass(slots=True)
class _Walk:
    chains: Mapping[str, Iterable[str]]
    table: str
    seen: Seen
    around: Around
    choices: list[bool]
    strict: bool
    taken: list[bool] = field(default_factory=list)
    probability: float = 1.0
    masqueraded: bool = False
    source: str = ""
    steps: list[Step] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    def run(self, start: str) -> Way:
        """Walk a built-in chain."""
        verdict = "accept"
        try:
            self._chain(start, 0)
        except _Ended as end:
            verdict = str(end)
        done = self.masqueraded, self.source, self.probability, tuple(self.steps), tuple(self.undecided)
        return Way(verdict, self.seen, *done)

    def next_choices(self) -> list[bool] | None:
        """Return what the next walk chooses, in order (then always that it matches); None after the last."""
        left = list(self.taken)
        while left and not left[-1]:
            left.pop()
        return [*left[:-1], False] if left else None

    def _chain(self, chain: str, depth: int) -> bool:
        """Walk a chain; return whether the hook is done with the packet."""
        if depth > _DEEPEST:
            raise UnknownRule(f"chains of table {self.table} lead in a circle: {chain}")
        for text in self.chains[chain]:
            parsed = self._parsed(text)
            if parsed is None or not all(_matches(self, option, parsed) for option in parsed.options):
                continue
            self.steps.append(Step(self.table, chain, text))
            if parsed.target in self.chains:
                if self._chain(parsed.target, depth + 1):
                    return True
                if parsed.goes:
                    return False
            elif parsed.target == "RETURN":
                return False
            elif self._target(parsed):
                return True
        return False

    def _parsed(self, text: str) -> Parsed | None:
        """Return a rule; None for one that is passed over."""
        try:
            parsed = parse(text)
            if parsed.target not in self.chains:
                _check(parsed, text)
            _check_options(parsed, text)
        except UnknownRule:
            if self.strict:
                raise
            self.undecided.append(text)
            return None
        return parsed

    def _target(self, rule: Parsed) -> bool:
        """Do what a target does; return whether the hook is done with the packet."""
        if rule.target == "MARK":
            value, mask = (int(n, 0) for n in rule.to["--set-xmark"].split("/"))
            self.seen = replace(self.seen, mark=(self.seen.mark & ~mask & 0xFFFFFFFF) ^ value)
        elif rule.target in ("DROP", "REJECT"):
            raise _Ended(rule.target.lower())
        elif rule.target == "DNAT":
            address, _, port = rule.to["--to-destination"].rpartition(":")
            states = self.seen.states | {"DNAT"}
            self.seen = replace(self.seen, destination=address.strip("[]"), port=int(port), states=states)
        elif rule.target == "SNAT":
            self.source = rule.to["--to-source"]
        elif rule.target == "MASQUERADE":
            self.masqueraded = True
        return rule.target not in ("", "MARK")

    def choose(self, probability: float) -> bool:
        """Take the branch that is due."""
        number = len(self.taken)
        chosen = self.choices[number] if number < len(self.choices) else True
        self.taken.append(chosen)
        self.probability *= probability if chosen else 1 - probability
        return chosen


_TARGETS: dict[str, Collection[str]] = {
    **dict.fromkeys(("", "ACCEPT", "DROP", "RETURN"), ()),
    "REJECT": ("--reject-with",),
    "MARK": ("--set-xmark",),
    "DNAT": ("--to-destination",),
    "SNAT": ("--to-source", "--random-fully"),
    "MASQUERADE": ("--random-fully",),
}
"""The targets that the walk knows, and what may be said to them."""


def _check(rule: Parsed, text: str) -> None:
    known = _TARGETS.get(rule.target)
    to = rule.to.get("--to-destination", rule.to.get("--to-source", ""))
    if known is None or not rule.to.keys() <= set(known) or "-" in to:
        raise UnknownRule(f"target {rule.target}: {text}")
    if (rule.target == "DNAT" and not _WITH_PORT.fullmatch(to)) or (rule.target == "MARK" and not rule.to):
        raise UnknownRule(f"target {rule.target}: {text}")


def _check_options(rule: Parsed, text: str) -> None:
    for option in rule.options:
        if (option.match, option.name) not in _CONDITIONS or (
            option.value not in _KNOWN_VALUES.get(option.name, (option.value,))
        ):
            raise UnknownRule(f"{option.match} {option.name} {option.value}: {text}".strip())


def _matches(walk: _Walk, option: Option, rule: Parsed) -> bool:
    """Whether a condition holds."""
    return _CONDITIONS[option.match, option.name](walk, option.value, rule) is not option.inverted


_PROTOCOLS = {
    **{protocol.name.lower(): protocol.value for protocol in Protocol},
    "all": 0,
    "icmp": 1,
    "ipv6-icmp": 58,
    **{str(number): number for number in range(256)},
}
"""Protocols as iptables-save writes them (IANA numbers); 0 is any."""


def _inside(address: str, cidr: str) -> bool:
    return ip_address(address) in _network(cidr)


_network = functools.lru_cache(maxsize=65_536)(ip_network)
_WITH_PORT = re.compile(r"[0-9.]+:\d+|\[[0-9a-f:.]+\]:\d+")


_KNOWN_VALUES: dict[str, Collection[str]] = {
    "-p": _PROTOCOLS,
    "--src-type": ("LOCAL",),
    "--dst-type": ("LOCAL",),
    "--mode": ("random",),
    "--gid-owner": (str(places.OWNER),),
}


def _always(_walk: _Walk, _value: str, _rule: Parsed) -> bool:
    return True


def _is_protocol(walk: _Walk, value: str, _: Parsed) -> bool:
    return _PROTOCOLS.get(value, -1) in (0, walk.seen.protocol)


def _among(port: int, value: str) -> bool:
    first, _, last = value.partition(":")
    return int(first or 0) <= port <= int(last or first)


def _is_interface(name: str, value: str) -> bool:
    return name.startswith(value[:-1]) if value.endswith("+") else name == value


def _has_mark(walk: _Walk, value: str, _rule: Parsed) -> bool:
    wanted, _, mask = value.partition("/")
    return walk.seen.mark & int(mask or "0xffffffff", 0) == int(wanted, 0)


def _is_remembered(walk: _Walk, _: str, rule: Parsed) -> bool:
    name = next(o.value for o in rule.options if o.name == "--name")
    return walk.seen.source in walk.around.remembered.get(name, ())


def _to_port(walk: _Walk, value: str, _: Parsed) -> bool:
    return _among(walk.seen.port, value)


def _from_port(walk: _Walk, value: str, _: Parsed) -> bool:
    return _among(walk.seen.sport, value)


_Condition = Callable[[_Walk, str, Parsed], bool]
_CONDITIONS: dict[tuple[str, str], _Condition] = {
    ("", "-s"): lambda walk, value, _: _inside(walk.seen.source, value),
    ("", "-d"): lambda walk, value, _: _inside(walk.seen.destination, value),
    ("", "-i"): lambda walk, value, _: _is_interface(walk.seen.iif, value),
    ("", "-o"): lambda walk, value, _: _is_interface(walk.seen.oif, value),
    ("", "-p"): _is_protocol,
    ("comment", "--comment"): _always,
    **{(word, "--dport"): _to_port for word in ("tcp", "udp", "sctp")},
    **{(word, "--sport"): _from_port for word in ("tcp", "udp", "sctp")},
    ("addrtype", "--src-type"): lambda walk, _, rule: walk.seen.source in walk.around.local,
    ("addrtype", "--dst-type"): lambda walk, _, rule: walk.seen.destination in walk.around.local,
    ("mark", "--mark"): _has_mark,
    ("owner", "--gid-owner"): lambda walk, value, _: walk.seen.group == int(value),
    ("conntrack", "--ctstate"): lambda walk, value, _: not walk.seen.states.isdisjoint(value.split(",")),
    ("statistic", "--mode"): _always,
    ("statistic", "--probability"): lambda walk, value, _: walk.choose(float(value)),
    ("recent", "--rcheck"): _is_remembered,
    **{
        ("recent", name): _always
        for name in ("--set", "--reap", "--seconds", "--name", "--mask", "--rsource")
    },
}
