"""Base chains of other programs, of nftables and legacy iptables: what becomes of pods' packets there.

    kernel ──`Reader.chains`──▶ ChainState (steps: verdict, condition, is it about us)  ──`passes`──▶ Passes
    iptables-legacy-save ──`legacy`──▶ ┘

Not a simulation: a rule is about us if it names our interfaces, pods' ranges or the tunnel's port. What a set
holds is not looked at, and makes the answer a perhaps.
Source of numbers: linux/netfilter/nf_tables.h, linux/netfilter.h.
"""

from __future__ import annotations

import functools
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_network

from netlink.attributes import parse, parsed
from netlink.errors import NetlinkError
from netlink.messages import NLMSG_DONE, NLMSG_ERROR, error_code
from netlink.nftables.batch import NftSocket
from netlink.nftables.dump import BODY, GETCHAIN, GETRULE, Ask
from netlink.nftables.expressions import Verdict
from netlink.nftables.objects import Hook
from node.backends.hops import Network

FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
IIFNAME, OIFNAME = 6, 7
NETWORK, TRANSPORT, DPORT_OFFSET = 1, 2, 2
ADDRESSES = {2: {12, 16}, 10: {8, 24}}
"""Where source and destination begin in a network header, by family (inet tables have either)."""
VERDICTS = {
    Verdict.ACCEPT: "accept",
    Verdict.DROP: "drop",
    Verdict.JUMP: "jump",
    Verdict.GOTO: "goto",
    Verdict.RETURN: "return",
}
HARMLESS = frozenset({"counter", "immediate", "log", "meta", "payload", "bitwise", "ct", "limit", "notrack"})
DEPTH = 8


class Passes(Enum):
    """Whether packets of pods get past a chain."""

    NO = 0
    PERHAPS = 1
    YES = 2


@dataclass(frozen=True, slots=True)
class Ours:
    """What rules about pods' packets name: interfaces by how they begin, ranges, the tunnel's UDP port."""

    interfaces: tuple[str, ...]
    networks: tuple[Network, ...] = ()
    port: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A rule: what it does, to which chain it leads, whether always, and whether it is about us.

    `interface_only`: its only condition is the interface that packets leave by. `sets`: it looks into a set.
    """

    verdict: str
    chain: str = ""
    always: bool = False
    ours: bool = False
    interface_only: bool = False
    sets: bool = False


@dataclass(frozen=True, slots=True)
class ChainState:
    """A base chain, and the steps of all chains of its table."""

    place: str
    table: str
    name: str
    kind: str
    hook: int
    priority: int
    drops: bool
    steps: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)


def passes(chain: ChainState) -> Passes:
    """Say whether a base chain lets packets about us pass."""
    found = _walk(chain.steps, chain.name, DEPTH)
    if found is None:
        return Passes.NO if chain.drops else Passes.YES
    return found


def _walk(steps: Mapping[str, tuple[Step, ...]], name: str, depth: int) -> Passes | None:
    """Say what becomes of packets about us in a chain; None if it does not decide."""
    perhaps = False
    for step in steps.get(name, ()):
        if not (step.always or step.ours):
            perhaps = perhaps or (step.sets and step.verdict in ("accept", "jump", "goto"))
            continue
        if step.verdict == "accept":
            return Passes.YES
        if step.verdict in ("drop", "reject"):
            return Passes.PERHAPS if perhaps else Passes.NO
        if step.verdict == "return":
            break
        if step.verdict in ("jump", "goto") and depth:
            below = _walk(steps, step.chain, depth - 1)
            if below is Passes.PERHAPS:
                perhaps = True
            elif below is not None:
                return Passes.PERHAPS if perhaps and below is Passes.NO else below
            if step.verdict == "goto":
                break
    return Passes.PERHAPS if perhaps else None


class Reader(NftSocket):
    """Reads base chains of all families; rules only where they matter."""

    def base_chains(self, ours: Ours) -> tuple[ChainState, ...]:
        """Return the base chains of tables that are not podwire's."""
        ask = functools.partial(self._ask, 0)
        found = []
        rules: dict[tuple[int, str], dict[str, tuple[Step, ...]]] = {}
        for family, attributes in list(_dump(ask, GETCHAIN)):  # the next question uses the same socket
            table = _string(attributes[1])
            if 4 not in attributes or family not in FAMILIES or table.startswith("podwire"):
                continue
            if (family, table) not in rules:
                rules[family, table] = self._rules(family, table, ours)
            hook = parsed(attributes[4])
            found.append(
                ChainState(
                    f"table {FAMILIES[family]} {table} of nftables",
                    table,
                    _string(attributes[3]),
                    _string(attributes.get(7, b"")),
                    int.from_bytes(hook[1], "big"),
                    int(struct.unpack(">i", hook[2])[0]),
                    int.from_bytes(attributes.get(5, b"\1"), "big") == Verdict.DROP,
                    rules[family, table],
                )
            )
        return tuple(found)

    def _rules(self, family: int, table: str, ours: Ours) -> dict[str, tuple[Step, ...]]:
        found: dict[str, list[Step]] = {}
        for _, attributes in _dump(functools.partial(self._ask, family), GETRULE, _text(1, table)):
            if _string(attributes[1]) == table:
                steps = found.setdefault(_string(attributes[2]), [])
                steps.append(step_of(family, _expressions(attributes.get(4, b"")), ours))
        return {chain: tuple(steps) for chain, steps in found.items()}


def _text(kind: int, value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _dump(ask: Ask, kind: int, body: bytes = b"") -> Iterator[tuple[int, dict[int, bytes]]]:
    """Yield (family, attributes) of the messages of a dump; what changes meanwhile is as it comes."""
    for answer, _, message in ask(kind, 0x300, body):
        if answer == NLMSG_ERROR:
            if code := error_code(message):
                raise NetlinkError(code, "cannot list the rules of nftables")
        elif answer != NLMSG_DONE:
            yield message[16], parsed(message, BODY)


def _expressions(data: bytes) -> Iterator[tuple[str, dict[int, bytes]]]:
    for _, element in parse(data):
        attributes = parsed(element)
        yield _string(attributes[1]), parsed(attributes.get(2, b""))


def _number(data: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(data.get(kind, b""), "big")


def step_of(family: int, expressions: Iterable[tuple[str, dict[int, bytes]]], ours: Ours) -> Step:
    """Return what a rule does, of its expressions as (name, attributes)."""
    verdict, chain, conditions, matched, left, sets = "", "", 0, False, 0, False
    loaded: tuple[str, int, int] = ("", 0, 0)
    mask: bytes | None = None
    for name, data in expressions:
        if name == "immediate" and 2 in (value := parsed(data.get(2, b""))):
            found = parsed(value[2])
            verdict = VERDICTS.get(Verdict(struct.unpack(">i", found[1])[0]), "")
            chain = _string(found.get(2, b""))
        elif name in ("reject", "masq"):
            verdict = {"reject": "reject", "masq": "translate"}[name]
        elif name == "nat":
            verdict = "translate"
        elif name == "target":
            word = _string(data.get(1, b""))
            verdict = {"REJECT": "reject", "MASQUERADE": "translate", "SNAT": "translate"}.get(word, verdict)
        elif name in ("meta", "payload"):
            loaded, mask = _load(name, data), None
        elif name == "bitwise":
            mask = parsed(data.get(4, b"")).get(1)
        elif name == "cmp":
            conditions += 1
            compared = parsed(data.get(3, b"")).get(1, b"")
            equal = _number(data, 2) == 0
            matched = matched or (equal and _about(family, loaded, compared, mask, ours))
            left += loaded == ("meta", OIFNAME, 0)
        elif name == "lookup":
            conditions, sets = conditions + 1, True
        elif name == "match":
            conditions += _string(data.get(1, b"")) != "comment"
        elif name not in HARMLESS:
            conditions += 1
    always = not conditions
    return Step(verdict, chain, always, matched, bool(left) and left == conditions, sets)


def _load(name: str, data: dict[int, bytes]) -> tuple[str, int, int]:
    """Return what is loaded: a kind of metadata, or a place in a header."""
    if name == "meta":
        return "meta", _number(data, 2), 0
    return "payload", _number(data, 2), _number(data, 3)


def _about(family: int, loaded: tuple[str, int, int], value: bytes, mask: bytes | None, ours: Ours) -> bool:
    """Whether a comparison names an interface, a range or the port of ours."""
    what, place, offset = loaded
    if what == "meta" and place in (IIFNAME, OIFNAME):
        name = _string(value)
        return any(name.startswith(own) or (own.startswith(name) and name != "") for own in ours.interfaces)
    if what == "payload" and place == TRANSPORT and offset == DPORT_OFFSET:
        return bool(ours.port) and value == struct.pack(">H", ours.port)
    if what != "payload" or place != NETWORK or not value:
        return False
    for network in ours.networks:
        af = 2 if network.version == 4 else 10
        if family in (af, 1) and offset in ADDRESSES[af]:
            start = network.network_address.packed[: len(value)]
            if bytes(a & b for a, b in zip(start, mask or b"\xff" * len(value), strict=False)) == value:
                return True
    return False


def legacy(output: str, version: int, ours: Ours) -> tuple[ChainState, ...]:
    """Return the base chains in what iptables-legacy-save has printed of a table that filters."""
    steps: dict[str, list[Step]] = {}
    drops: dict[str, bool] = {}
    for line in output.splitlines():
        if line.startswith(":"):
            name, policy, _ = line[1:].rsplit(" ", 2)
            if policy != "-":
                drops[name] = policy == "DROP"
        elif line.startswith("-A "):
            words = shlex.split(line)
            steps.setdefault(words[1], []).append(_legacy_step(words[2:], ours))
    table = {chain: tuple(some) for chain, some in steps.items()}
    place = f"table filter of iptables-legacy (IPv{version})"
    hooks = {"FORWARD": Hook.FORWARD, "INPUT": Hook.INPUT}
    return tuple(
        ChainState(place, "filter", name, "filter", hook, 0, drops[name], table)
        for name, hook in hooks.items()
        if name in drops
    )


def _legacy_step(words: list[str], ours: Ours) -> Step:
    verdict, chain, matched, conditions = "", "", False, 0
    pairs = list(zip(words, [*words[1:], ""], strict=True))
    for at, (word, value) in enumerate(pairs):
        negated = at > 0 and words[at - 1] == "!"
        if word in ("-j", "-g"):
            known = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return"}
            verdict = known.get(value, "jump" if word == "-j" else "goto")
            chain = value
        elif word in ("-i", "-o"):
            conditions += 1
            name = value.rstrip("+")
            about = any(name.startswith(own) or own.startswith(name) for own in ours.interfaces)
            matched = matched or (about and not negated)
        elif word in ("-s", "-d"):
            conditions += 1
            matched = matched or (not negated and _holds(value, ours))
        elif word == "--dport":
            conditions += 1
            matched = matched or (not negated and value == str(ours.port) != "0")
        elif (word == "-m" and value != "comment") or word == "-p":
            conditions += 1
    return Step(verdict, chain, not conditions, matched)


def _holds(text: str, ours: Ours) -> bool:
    """Whether a range of iptables holds one of pods' ranges."""
    network = ip_network(text, strict=False)
    return any(n.version == network.version and n.overlaps(network) for n in ours.networks)
