"""iptables as its programs print it, of both variants: read, and walked by `proxy.iptables.walk`.

The nft variant is read so only where its rules hold extensions of xtables, which nftables carries and does
not explain; what is all nftables' own is walked as such.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from netlink.family import Family
from netlink.xtables import Variant, XtablesError, run
from node.trace.nft import Table
from node.trace.packet import Choice, Kind, Packet, Step
from node.trace.rules import HOOKS, BaseChain, Passed, Ruling, Surroundings
from node.trace.state import LOCAL, IpRule, IpTable
from proxy.iptables import walk
from proxy.iptables.names import ChainId

PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
EXTENSIONS = frozenset({"match", "target"})
POLICY = "(policy)"
"""A chain of our own around a built-in one: what comes back from that meets the policy."""
MOST_ENDPOINTS = 1_000_000
_COUNTED = re.compile(r"\[(\d+):\d+\] -A (\S+) ?(.*)")
_COMMENT = re.compile(r'--comment (?:"((?:\\.|[^"\\])*)"|(\S+))')


def parse(output: str, variant: Variant) -> Iterator[IpTable]:
    """Yield the tables in what iptables-save has printed with counters (-c)."""
    name, policies, chains = "", dict[str, str](), dict[str, list[IpRule]]()
    for line in output.splitlines():
        if line.startswith("*"):
            name, policies, chains = line[1:], {}, {}
        elif line.startswith(":"):
            chain, policy, _ = line[1:].rsplit(" ", 2)
            chains[chain] = []
            if policy != "-":
                policies[chain] = policy
        elif found := _COUNTED.fullmatch(line):
            rules = chains.setdefault(found[2], [])
            rules.append(IpRule(found[3], int(found[1]), len(rules) + 1))
        elif line == "COMMIT":
            yield IpTable(variant.value, name, {c: tuple(r) for c, r in chains.items()}, policies)


def read(
    family: Family, tables: Sequence[Table], missing: list[str]
) -> tuple[tuple[Table, ...], tuple[IpTable, ...]]:
    """Return the tables of nftables that are to be walked as such, and those of iptables.

    What cannot be read is told in `missing`.
    """
    found: list[IpTable] = []
    if _legacy_names(family):
        found += _saved(Variant.LEGACY, family, missing)
    foreign = {t.name: t for t in tables if t.family == family.af and _extended(t)}
    if foreign:
        nft = [t for t in _saved(Variant.NFT, family, missing) if t.name in foreign]
        found += [_with_handles(t, foreign[t.name]) for t in nft]
        read_so = {t.name for t in nft}
        tables = [t for t in tables if t.family != family.af or t.name not in read_so]
    return tuple(tables), tuple(found)


def _legacy_names(family: Family) -> list[str]:
    try:
        return Path(f"/proc/thread-self/net/{family.keyword}_tables_names").read_text().split()
    except OSError:
        return []


def _extended(table: Table) -> bool:
    rules = (rule for chain in table.chains.values() for rule in chain.rules)
    return table.name in PRIORITIES and any(e.name in EXTENSIONS for r in rules for e in r.expressions)


def _saved(variant: Variant, family: Family, missing: list[str]) -> list[IpTable]:
    try:
        return list(parse(run(variant.program(family, "save"), "-c"), variant))
    except XtablesError as error:
        missing.append(f"iptables-{variant.value} is not followed: {error}")
        return []


def _with_handles(table: IpTable, kernel: Table) -> IpTable:
    """Give rules the handles that they have in nftables, where both tell of as many."""
    chains = dict(table.chains)
    for name, rules in table.chains.items():
        there = kernel.chains[name].rules if name in kernel.chains else ()
        if len(there) == len(rules):
            chains[name] = tuple(
                IpRule(r.text, r.packets, k.handle) for r, k in zip(rules, there, strict=True)
            )
    return IpTable(table.variant, table.name, chains, table.policies)


def remembered(root: Path = Path("/proc/thread-self/net/xt_recent")) -> dict[str, tuple[str, ...]]:
    """Return the clients in each list of xt_recent; one whose time is over is there until the next looks."""
    try:
        return {
            path.name: tuple(line.split()[0].removeprefix("src=") for line in path.read_text().splitlines())
            for path in sorted(root.iterdir())
        }
    except OSError:
        return {}


@dataclass(frozen=True, slots=True)
class Own(Collection[str]):
    """The addresses of a node, as far as it is asked for one."""

    around: Surroundings

    def __contains__(self, address: object) -> bool:
        return isinstance(address, str) and self.around.kind_of(address) == LOCAL

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class IptablesRules:
    """The tables of iptables of a state."""

    def __init__(
        self, tables: Sequence[IpTable], family: Family, recent: Mapping[str, Collection[str]]
    ) -> None:
        self._recent = recent
        self._tables: dict[str, IpTable] = {}
        self._texts: dict[str, dict[str, list[str]]] = {}
        self._program = "iptables" if family is Family.V4 else "ip6tables"
        for table in tables:
            place = f"{self._program}-legacy" if table.variant == "legacy" else family.keyword
            title = f"{place} {table.name}"
            self._tables[title] = table
            self._texts[title] = {c: [r.text for r in rules] for c, rules in table.chains.items()}

    def bases(self, hook: int) -> Sequence[BaseChain]:
        """Return the built-in chains of a hook."""
        name = HOOKS[hook].upper()
        return [
            BaseChain(f"{title} {name}", hook, PRIORITIES.get(table.name, 0), table.name == "nat")
            for title, table in self._tables.items()
            if name in table.policies
        ]

    def walk(self, base: BaseChain, packet: Packet, place: str, around: Surroundings) -> Sequence[Passed]:
        """Return every way through a built-in chain."""
        title, _, name = base.title.rpartition(" ")
        table = self._tables[title]
        chains = {**self._texts[title], POLICY: [f"-j {name}", f"-j {table.policies[name]}"]}
        seen = walk.Seen(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.dport,
            packet.sport,
            packet.iif,
            packet.oif,
            packet.mark,
            _states(packet),
        )
        asked = walk.Around(Own(around), self._recent)
        start = ChainId(table.name, POLICY)
        ways = list(walk.ways(chains, start, seen, asked, strict=False))
        told = _Told(place, HOOKS[base.hook], title, name, table, f"{self._program}-{table.variant}")
        return [told.passed(packet, way, at, len(ways)) for at, way in enumerate(ways)]

    def others(self) -> Sequence[str]:
        """Return the tables, which are everybody's: iptables does not say whose a rule is."""
        return [
            f"{title}: {sum(map(len, table.chains.values()))} rules of iptables"
            for title, table in self._tables.items()
        ]


def _states(packet: Packet) -> frozenset[str]:
    found = {"UNTRACKED" if not packet.tracked else "ESTABLISHED" if packet.known else "NEW"}
    found |= {"DNAT"} if packet.translated else set()
    return frozenset(found | ({"SNAT"} if packet.renamed else set()))


@dataclass(frozen=True, slots=True)
class _Told:
    """Says the ways through a chain as the trace does."""

    place: str
    hook: str
    title: str
    name: str
    table: IpTable
    program: str

    def passed(self, packet: Packet, way: walk.Way, number: int, of: int) -> Passed:
        """Return one way, of several by chance."""
        seen = way.seen
        after = replace(packet, destination=seen.destination, dport=seen.port, mark=seen.mark)
        if "DNAT" in seen.states:
            after = replace(after, translated=True)
        steps = [self._undecided(text) for text in dict.fromkeys(way.undecided)]
        steps += [self._step(s) for s in way.steps if s.chain != POLICY]
        last = way.steps[-1]
        ended = (f"{self.title} {last.chain}", _comment(last.rule))
        if last.chain == POLICY:
            policy = f"policy {self.table.policies[self.name].lower()}"
            ended = (f"{self.title} {self.name}", policy)
            steps.append(Step(Kind.CHAIN, self.place, self.hook, policy, ended[0]))
        choices: tuple[Choice, ...] = ()
        if of > 1:
            weight = Fraction(way.probability).limit_denominator(MOST_ENDPOINTS)
            choices = (Choice(self.place, f"{self.title} {self.name}", number, of, weight),)
            steps.append(Step(Kind.CHOICE, self.place, self.hook, f"by chance, with probability {weight}"))
        ruling = {"drop": Ruling.DROP, "reject": Ruling.REJECT}.get(way.verdict, Ruling.ACCEPT)
        renamed = way.masqueraded, way.source
        return Passed(ruling, after, tuple(steps), choices, *renamed, ended, self.program)

    def _step(self, step: walk.Step) -> Step:
        rule = next((r for r in self.table.chains[step.chain] if r.text == step.rule), IpRule(step.rule))
        chain = f"{self.title} {step.chain}"
        text = _comment(step.rule) or step.rule
        return Step(Kind.RULE, self.place, self.hook, text, chain, step.rule, rule.handle, rule.packets)

    def _undecided(self, text: str) -> Step:
        chain = next((c for c, rules in self.table.chains.items() if any(r.text == text for r in rules)), "")
        rule = next((r for r in self.table.chains.get(chain, ()) if r.text == text), IpRule(text))
        words = "not followed (it has a form that is not known)"
        chain = f"{self.title} {chain}"
        return Step(Kind.UNDECIDED, self.place, self.hook, words, chain, text, rule.handle, rule.packets)


def _comment(rule: str) -> str:
    found = _COMMENT.search(rule)
    return (found[1] or found[2] or "").replace('\\"', '"') if found else ""
