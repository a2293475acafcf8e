"""Walk a packet through the kernel's nftables rules as they are: ours and everybody's.

Registers hold bytes, or nothing where a value cannot be known beforehand. A rule that depends on such a
value, or on an expression that the walk does not know, is undecided: it is told as such and passed over.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from ipaddress import ip_address

from netlink.family import Family, with_port
from node.trace import nft_load, nft_words
from node.trace.nft import (
    ACCEPT,
    BRIDGE,
    CONTINUE,
    DROP,
    GOTO,
    INET,
    JUMP,
    NETDEV,
    RETURN,
    Expr,
    Jump,
    Rule,
    Set,
    Table,
    verdict,
)
from node.trace.packet import Choice, Kind, Packet, Step
from node.trace.rules import HOOKS, BaseChain, Passed, Ruling, Surroundings
from proxy.l7 import places

REGISTERS = 20
DEPTH = 16  # NFT_JUMP_STACK_SIZE
ACTS = frozenset(
    {"immediate", "nat", "masq", "redir", "reject", "target", "queue", "tproxy", "synproxy", "notrack"}
)
HARMLESS = frozenset({"counter", "log", "last", "dynset", "flow_offload", "objref", "dup", "quota"})


class Undecided(Exception):
    """What the rule depends on is not known beforehand."""


class Ended(Exception):
    """A verdict ends the chain's walk."""

    def __init__(self, ruling: Ruling) -> None:
        super().__init__(ruling)
        self.ruling = ruling


class NftRules:
    """The tables of a state that see a family's packets."""

    def __init__(self, tables: Sequence[Table], family: Family) -> None:
        self._family = family
        self._tables = [t for t in tables if t.family in (family.af, INET)]
        self._unseen = [t for t in tables if t.family in (BRIDGE, NETDEV)]

    def bases(self, hook: int) -> Sequence[BaseChain]:
        """Return the base chains of a hook."""
        return [
            BaseChain(f"{table} {chain.name}", hook, chain.base.priority, chain.base.kind == "nat")
            for table in self._tables
            for chain in table.chains.values()
            if chain.base and chain.base.hook == hook
        ]

    def walk(self, base: BaseChain, packet: Packet, place: str, around: Surroundings) -> Sequence[Passed]:
        """Return every way through a base chain."""
        table, name = self._find(base.title)
        found: list[Passed] = []
        choices: tuple[int, ...] | None = ()
        while choices is not None:
            walk = Walk(table, base, packet, place, around, choices)
            found.append(walk.run(name))
            choices = walk.next_choices()
        return found

    def others(self) -> Sequence[str]:
        """Return the tables that are not walked, and chains of the others that are not ours."""
        found = []
        for table in self._tables:
            if table.name.startswith("podwire"):
                continue
            for chain in table.chains.values():
                if chain.base:
                    hook = HOOKS[chain.base.hook] if chain.base.hook < len(HOOKS) else "ingress"
                    policy = "drop" if chain.base.drops else "accept"
                    place = f"{chain.base.kind} hook {hook} priority {chain.base.priority}"
                    found.append(f"{table} {chain.name}: {place}, policy {policy}, {len(chain.rules)} rules")
        chains = ((t, c) for t in self._unseen for c in t.chains.values() if c.base)
        found += [f"{t} {c.name}: for frames, not followed" for t, c in chains]
        return found

    def _find(self, title: str) -> tuple[Table, str]:
        table, _, chain = title.rpartition(" ")
        return next(t for t in self._tables if str(t) == table), chain


@dataclass(slots=True)
class Walk:
    """One run of a base chain, with the random choices that it is told to take, then always the first."""

    table: Table
    base: BaseChain
    packet: Packet
    place: str
    around: Surroundings
    choices: tuple[int, ...]
    taken: list[Choice] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    registers: list[bytes | None] = field(default_factory=lambda: [bytes(4)] * REGISTERS)
    kinds: dict[int, nft_words.Kind] = field(default_factory=dict)
    hits: list[str] = field(default_factory=list)
    masquerade: bool = False
    source: str = ""
    last: tuple[str, str] = ("", "")

    def run(self, name: str) -> Passed:
        """Walk the chain and what it leads to."""
        base = self.table.chains[name].base
        try:
            self._chain(name, 0)
            ruling = Ruling.DROP if base and base.drops else Ruling.ACCEPT
            if not self.steps or (base and base.drops):
                rules = len(self.table.chains[name].rules)
                what = f"none of {rules} rules matches" if rules else "no rules"
                text = f"{what}: policy {'drop' if base and base.drops else 'accept'}"
                self._say(Step(Kind.CHAIN, self.place, HOOKS[self.base.hook], text, f"{self.table} {name}"))
                self.last = (
                    self.last[0] or f"{self.table} {name}",
                    "policy drop" if base and base.drops else "",
                )
        except Ended as end:
            ruling = end.ruling
        choices = tuple(self.taken)
        return Passed(
            ruling, self.packet, tuple(self.steps), choices, self.masquerade, self.source, self.last
        )

    def next_choices(self) -> tuple[int, ...] | None:
        """Return what the next run chooses; None after the last branch."""
        last = [choice.number for choice in self.taken]
        while last and last[-1] + 1 == self.taken[len(last) - 1].of:
            last.pop()
        return (*last[:-1], last[-1] + 1) if last else None

    def _say(self, step: Step) -> None:
        self.steps.append(step)

    def _chain(self, name: str, depth: int) -> None:
        """Run a chain's rules; returning means that it decided nothing."""
        if depth > DEPTH:
            raise Ended(Ruling.DROP)
        for rule in self.table.chains[name].rules:
            target = self._rule(name, rule)
            if target is None or target.code == CONTINUE:
                continue
            if target.code in (JUMP, GOTO):
                self._chain(target.chain, depth + 1)
            if target.code in (GOTO, RETURN):
                return

    def _rule(self, chain: str, rule: Rule) -> Jump | None:
        """Run a rule; return where it leads, None if it does not match or decides nothing."""
        self.hits, at, choices = [], 0, len(self.taken)
        try:
            for expr in rule.expressions:
                at += 1
                result = self._step(expr)
                if result is False:
                    return None
                if isinstance(result, Jump):
                    self._matched(chain, rule, choices)
                    return self._decide(result)
                if callable(result):
                    self._matched(chain, rule, choices)
                    result()
            if any(e.name not in ("counter",) for e in rule.expressions):
                self._matched(chain, rule, choices)
        except nft_load.NoMatch:
            return None
        except Undecided as reason:
            left = rule.expressions[at - 1 :]
            if any(e.name in ACTS or (e.name == "lookup" and e.slot(3) < 0 and 3 in e.data) for e in left):
                words = nft_words.words(self.table, rule)
                self._say(self._told(Kind.UNDECIDED, f"not followed ({reason})", chain, rule, words))
        return None

    def _matched(self, chain: str, rule: Rule, choices: int) -> None:
        words = nft_words.words(self.table, rule)
        self._say(self._told(Kind.RULE, rule.comment or words, chain, rule, words))
        self.last = (f"{self.table} {chain}", rule.comment)
        for at in range(choices, len(self.taken)):
            choice = self.taken[at]
            text = f"one of {choice.of}, each with probability 1/{choice.of}: number {choice.number}"
            where = f"{self.table} {chain}"
            self.taken[at] = replace(choice, chain=where)
            if choice.of == 1:
                continue
            self._say(Step(Kind.CHOICE, self.place, HOOKS[self.base.hook], text, where))

    def _told(self, kind: Kind, text: str, chain: str, rule: Rule, words: str) -> Step:
        hook = HOOKS[self.base.hook]
        where = f"{self.table} {chain}"
        return Step(kind, self.place, hook, text, where, words, rule.handle, rule.packets, tuple(self.hits))

    def _decide(self, target: Jump) -> Jump:
        if target.code == ACCEPT:
            raise Ended(Ruling.ACCEPT)
        if target.code == DROP:
            raise Ended(Ruling.DROP)
        if target.code in (JUMP, GOTO, RETURN, CONTINUE):
            return target
        raise Undecided("a queue to a program decides")

    def _step(self, expr: Expr) -> bool | Jump | Callable[[], None]:
        """Run an expression: False ends the rule, a verdict or an action ends the chain."""
        match expr.name:
            case "payload" | "meta" | "ct" | "fib" | "numgen" if 1 in expr.data:
                self._load(expr)
            case "cmp" | "range":
                return self._compare(expr)
            case "bitwise" | "byteorder":
                self._compute(expr)
            case "immediate":
                target = verdict(expr.data.get(2, b""))
                if target:
                    return target
                self._write(expr.slot(1), nft_words.held_bytes(expr, 2))
            case "lookup":
                return self._lookup(expr)
            case "meta" | "ct":
                self._set(expr)
            case "nat" | "masq" | "redir":
                return lambda: self._translate(expr)
            case "reject":
                return lambda: _end(Ruling.REJECT)
            case "notrack":
                self.packet = replace(self.packet, tracked=False)
            case "limit":
                return not expr.number(5) & 1  # a single packet keeps within any rate
            case "exthdr":
                return self._option(expr)
            case "rt" | "hash" | "socket" | "osf" | "xfrm" | "tunnel":
                slot = nft_words.target(expr)
                self.kinds[slot] = nft_words.loaded(self.table.family, expr) or nft_words.Kind(expr.name)
                self._forget(slot)
            case "match" if expr.word(1) == "comment":
                pass
            case name if name in HARMLESS:
                pass
            case _:
                raise Undecided(
                    f"{expr.name} {expr.word(1) if expr.name in ('match', 'target') else ''}".strip()
                )
        return True

    def _option(self, expr: Expr) -> bool:
        """Run what reads or writes an option: first TCP packets have a largest segment, IPv6 has none."""
        if expr.number(6) == 1:
            if 7 not in expr.data:
                self._forget(expr.slot(1))
            return self.packet.protocol == socket.IPPROTO_TCP
        return False

    def _load(self, expr: Expr) -> None:
        packet, slot, kind = self.packet, expr.slot(1), nft_words.loaded(self.table.family, expr)
        if kind:
            self.kinds[slot] = kind
        match expr.name:
            case "payload":
                self._write(slot, nft_load.payload(packet, expr.number(2), expr.number(3), expr.number(4)))
            case "meta":
                self._write(slot, nft_load.meta(packet, self.around, expr.number(2)))
            case "ct":
                self._write(slot, nft_load.conntrack(packet, self.base, expr.number(2)))
            case "fib":
                self._write(slot, nft_load.fib(packet, self.around, expr))
            case "numgen":
                modulus = expr.number(2)
                at = len(self.taken)
                number = self.choices[at] if at < len(self.choices) else 0
                self.taken.append(Choice(self.place, str(self.table), number, modulus, Fraction(1, modulus)))
                self._write(slot, struct.pack("=I", number + expr.number(4)))

    def _compare(self, expr: Expr) -> bool:
        if expr.name == "range":
            first, last = nft_words.held_bytes(expr, 3), nft_words.held_bytes(expr, 4)
            held = self._read(expr.slot(1), len(first))
            return (first <= held <= last) != bool(expr.number(2))
        value = nft_words.held_bytes(expr, 3)
        if self._is_proxys_group(expr.slot(1), value) and expr.number(2) in (0, 1):
            return expr.number(2) == 1
        held = self._read(expr.slot(1), len(value))
        order = (held > value) - (held < value)
        return (order == 0, order != 0, order < 0, order <= 0, order > 0, order >= 0)[expr.number(2)]

    def _is_proxys_group(self, slot: int, value: bytes) -> bool:
        """Whether the sender's group, which is not known, is compared with the L7 proxy's.

        What is traced are its clients' packets, never its own.
        """
        kind = self.kinds.get(slot)
        asked = self.registers[slot] is None and kind is not None and kind.words == "meta skgid"
        return asked and value == struct.pack("=I", places.OWNER)

    def _compute(self, expr: Expr) -> None:
        source, into = expr.slot(1), expr.slot(2)
        if expr.name == "bitwise" and expr.number(6):
            self._forget(into)
            return
        try:
            size = expr.number(3 if expr.name == "bitwise" else 4)
            held = self._read(source, size)
        except Undecided:
            self._forget(into)
            return
        if expr.name == "byteorder":
            unit = expr.number(5)
            turn = -1 if sys.byteorder == "little" else 1
            swapped = b"".join(held[at : at + unit][::turn] for at in range(0, size, unit))
            self._write(into, swapped)
            return
        mask, flip = nft_words.held_bytes(expr, 4), nft_words.held_bytes(expr, 5)
        self._write(into, bytes((h & m) ^ f for h, m, f in zip(held, mask, flip, strict=True)))

    def _lookup(self, expr: Expr) -> bool | Jump:
        which = self.table.sets[expr.word(1)]
        slot = expr.slot(2)
        inverted = bool(expr.number(5) & 1)
        key = self._read(slot, self._key_size(which, slot))
        found = which.find(key)
        if which.limited:
            found = None  # a single packet keeps within any limit
        if found is None or inverted:
            return found is None and inverted
        name = "the set" if which.anonymous else f"@{which.name}"
        shown = nft_words.element(self._key_kinds(slot, len(key)), key)
        data = found[1]
        if isinstance(data, Jump):
            self.hits.append(f"{shown} in {name}: {nft_words.jump(data)}")
            return data
        if data is not None:
            self._write(expr.slot(3), data)
            self.hits.append(f"{shown} in {name}: {_data(data, self.packet.family)}")
        else:
            self.hits.append(f"{shown} in {name}")
        return True

    def _key_size(self, which: Set, slot: int) -> int:
        """Return the bytes of a set's keys: as its elements have, or as what was loaded for it."""
        size = nft_words.key_size(which)
        return size or (self.kinds[slot].size if slot in self.kinds else 4)

    def _key_kinds(self, slot: int, size: int) -> list[nft_words.Kind]:
        found, end = [], slot + (size + 3) // 4
        while slot in self.kinds and slot < end:
            found.append(self.kinds[slot])
            slot += (self.kinds[slot].size + 3) // 4
        return found

    def _set(self, expr: Expr) -> None:
        if expr.name == "ct":
            if expr.number(2) == 3:
                mark = struct.unpack("=I", self._read(expr.slot(4), 4))[0]
                self.packet = replace(self.packet, ct_mark=mark)
            return
        if expr.number(2) in (2, 3):
            value = struct.unpack("=I", self._read(expr.slot(3), 4))[0]
            what = {"priority": value} if expr.number(2) == 2 else {"mark": value}
            self.packet = replace(self.packet, **what)

    def _translate(self, expr: Expr) -> None:
        packet = self.packet
        if expr.name == "masq":
            self.masquerade = True
            raise Ended(Ruling.ACCEPT)
        if expr.name == "redir":
            address = self._own_address()
            port = struct.unpack(">H", self._read(expr.slot(1), 2))[0] if 1 in expr.data else packet.dport
            self.packet = replace(packet, destination=address, dport=port, translated=True)
            raise Ended(Ruling.ACCEPT)
        address = str(ip_address(self._read(expr.slot(3), packet.family.size))) if 3 in expr.data else ""
        if expr.number(1) == 0:
            self.source = address or packet.source
            raise Ended(Ruling.ACCEPT)
        port = struct.unpack(">H", self._read(expr.slot(5), 2))[0] if 5 in expr.data else packet.dport
        self.packet = replace(packet, destination=address or packet.destination, dport=port, translated=True)
        raise Ended(Ruling.ACCEPT)

    def _own_address(self) -> str:
        """Return where a redirect leads: loopback for the node's own packets, else the interface."""
        if self.base.hook == HOOKS.index("output"):
            return "127.0.0.1" if self.packet.family is Family.V4 else "::1"
        address = self.around.address_of(self.packet.iif)
        if not address:
            raise Ended(Ruling.DROP)  # as nf_nat_redirect does
        return address

    def _read(self, slot: int, size: int) -> bytes:
        parts = self.registers[slot : slot + (size + 3) // 4]
        if any(p is None for p in parts):
            words = next((self.kinds[s].words for s in range(slot, slot + len(parts)) if s in self.kinds), "")
            raise Undecided(f"{words or 'a value'} is not known beforehand")
        return b"".join(p for p in parts if p is not None)[:size]

    def _write(self, slot: int, value: bytes | None) -> None:
        if value is None:
            size = self.kinds[slot].size if slot in self.kinds else 4
            self.registers[slot : slot + (size + 3) // 4] = [None] * ((size + 3) // 4)
            return
        padded = value + bytes(-len(value) % 4)
        parts: list[bytes | None] = [padded[at : at + 4] for at in range(0, len(padded), 4)]
        self.registers[slot : slot + len(parts)] = parts

    def _forget(self, slot: int) -> None:
        self.registers[slot] = None


def _end(ruling: Ruling) -> None:
    raise Ended(ruling)


def _data(data: bytes, family: Family) -> str:
    """Return a map's data: an address and port, an address, or a number."""
    if len(data) == family.size + 4:
        port = int.from_bytes(data[family.size : family.size + 2], "big")
        return with_port(str(ip_address(data[: family.size])), port)
    if len(data) == family.size and family is Family.V6:
        return str(ip_address(data))
    return f"0x{int(struct.unpack('=I', data[:4])[0]):x}" if len(data) == 4 else f"0x{data.hex()}"
