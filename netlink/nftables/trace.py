"""Walk a packet through rules as values: what the kernel would do with a connection's first packet.

A random choice is followed down every branch. An expression that the walk does not know is an error,
not a guess. Only our own table is walked; what other tables do is not known here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from netlink.family import Family
from netlink.nftables.expressions import (
    IPS_DST_NAT,
    RTN_LOCAL,
    Base,
    Bitwise,
    Cmp,
    Compare,
    Constant,
    Counter,
    Ct,
    Dnat,
    Do,
    Expression,
    FibDestinationType,
    Lookup,
    MapLookup,
    Masquerade,
    Meta,
    MetaKey,
    MetaSet,
    Payload,
    RandomIndex,
    Reject,
    Remember,
    Snat,
    Verdict,
    VerdictLookup,
)
from netlink.nftables.fake import State
from netlink.nftables.objects import Data, Elements, Goto, Hook, Map, Rule


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection. `from_node`: sent by this machine itself, by a program of `group`."""

    source: str
    destination: str
    protocol: int
    port: int
    from_node: bool = False
    group: int = 0

    @property
    def family(self) -> Family:
        """The packet's IP family."""
        return Family(ip_address(self.source).version)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a packet ends up: `verdict` is accept, drop or reject; `rules` tells what matched.

    `source` is the address that a rule names for it; "" where the packet keeps its own or is masqueraded.
    """

    verdict: str
    destination: str
    port: int
    masqueraded: bool
    rules: tuple[str, ...]
    source: str = ""


class Ended(Exception):
    """The packet's way ends in this chain of hooks: verdict accept (this hook only), drop or reject."""

    def __init__(self, verdict: str) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def outcomes(state: State, packet: Packet, local: frozenset[str]) -> tuple[Outcome, ...]:
    """Return every outcome, one per branch of the random choices; `local` are this machine's addresses."""
    found: list[Outcome] = []
    choices: tuple[int, ...] | None = ()
    while choices is not None:
        walk = _Walk(state, packet, local, choices)
        found.append(walk.run())
        choices = walk.next_choices()
    return tuple(found)


@dataclass(slots=True)
class _Walk:
    state: State
    packet: Packet
    local: frozenset[str]
    choices: tuple[int, ...]
    moduli: list[int] = field(default_factory=list)
    mark: int = 0
    priority: bytes = bytes(4)
    translated: bool = False
    masqueraded: bool = False
    source: str = ""
    registers: bytearray = field(default_factory=lambda: bytearray(64))
    matched: list[str] = field(default_factory=list)

    def run(self) -> Outcome:
        """Walk the hooks in the kernel's order."""
        verdict = "accept"
        first = Hook.OUTPUT if self.packet.from_node else Hook.PREROUTING
        try:
            self._hook(first)
            if not self.packet.from_node:
                self._hook(Hook.INPUT if self.packet.destination in self.local else Hook.FORWARD)
            if self.packet.from_node or self.packet.destination not in self.local:
                self._hook(Hook.POSTROUTING)
        except Ended as end:
            verdict = end.verdict
        to = self.packet
        rules = tuple(self.matched)
        return Outcome(verdict, to.destination, to.port, self.masqueraded, rules, self.source)

    def next_choices(self) -> tuple[int, ...] | None:
        """Return what the next walk chooses, in order (then always 0); None after the last branch."""
        last = [*self.choices, *(0 for _ in self.moduli[len(self.choices) :])]
        while last and last[-1] + 1 == self.moduli[len(last) - 1]:
            last.pop()
        return (*last[:-1], last[-1] + 1) if last else None

    def _hook(self, hook: Hook) -> None:
        chains = [c for c in self.state.chains.values() if c.base and c.base.hook == hook]
        for chain in sorted(chains, key=lambda c: c.base.priority if c.base else 0):
            try:
                self._chain(chain.name)
            except Ended as end:
                if end.verdict != "accept":
                    raise

    def _chain(self, name: str) -> None:
        for rule in self.state.rules[name]:
            jump = self._rule(rule)
            if jump is None:
                continue
            self._chain(jump.chain)
            return

    def _rule(self, rule: Rule) -> Goto | None:
        """Run a rule; return where it goes to, if it matched and goes somewhere."""
        for number, expression in enumerate(rule.expressions):
            last = number == len(rule.expressions) - 1
            if last:
                self.matched.append(f"{rule.chain}: {rule.comment}")
            result = self._step(expression)
            if isinstance(result, Goto):
                return result
            if not result:
                if last:
                    self.matched.pop()
                return None
        return None

    def _step(self, expression: Expression) -> Goto | bool:
        """Run an expression: False if the rule does not match, a Goto if it leaves the chain."""
        match expression:
            case Payload() | Meta() | Ct() | FibDestinationType() | RandomIndex():
                self._load(expression)
            case Bitwise(mask, flip, slot):
                value = self._read(slot, len(mask))
                self._write(slot, bytes((v & m) ^ f for v, m, f in zip(value, mask, flip, strict=True)))
            case Constant(value, slot):
                self._write(slot, value)
            case MetaSet(MetaKey.PRIORITY, slot):
                self.priority = self._read(slot, 4)
            case MetaSet(MetaKey.MARK, slot):
                self.mark = struct.unpack("=I", self._read(slot, 4))[0]
            case Cmp(operator, value, slot):
                return (self._read(slot, len(value)) == value) == (operator is Compare.EQ)
            case Lookup(name, slot, invert):
                return self._contains(self.state.maps[name], slot) != invert
            case MapLookup(name, slot, into):
                data = self._data(self.state.maps[name], slot)
                if not isinstance(data, bytes):
                    return False
                self._write(into, data)
            case VerdictLookup(name, slot):
                data = self._data(self.state.maps[name], slot)
                return self._go(data) if isinstance(data, Goto) else False
            case Do() | Dnat() | Snat() | Masquerade() | Reject():
                return self._act(expression)
            case Counter() | Remember():
                pass  # a first packet meets what was remembered before it
            case _:
                raise NotImplementedError(f"the walk does not know {expression}")
        return True

    def _load(self, expression: Expression) -> None:
        family = self.packet.family
        match expression:
            case Payload(Base.NETWORK, offset, length, slot) if length == family.size:
                sources = {
                    family.source_offset: self.packet.source,
                    family.destination_offset: self.packet.destination,
                }
                self._write(slot, ip_address(sources[offset]).packed)
            case Payload(Base.NETWORK, offset, length, slot) if offset == family.destination_offset:
                self._write(slot, ip_address(self.packet.destination).packed[:length])
            case Payload(Base.TRANSPORT, 2, 2, slot):
                self._write(slot, struct.pack(">H", self.packet.port))
            case Meta(MetaKey.L4PROTO, slot):
                self._write(slot, bytes([self.packet.protocol]))
            case Meta(MetaKey.PRIORITY, slot):
                self._write(slot, self.priority)
            case Meta(MetaKey.MARK, slot):
                self._write(slot, struct.pack("=I", self.mark))
            case Meta(MetaKey.SKGID, slot):
                self._write(slot, struct.pack("=I", self.packet.group))
            case Ct(_, slot):
                self._write(slot, struct.pack("=I", IPS_DST_NAT if self.translated else 0))
            case FibDestinationType(slot):
                kind = RTN_LOCAL if self.packet.destination in self.local else 1
                self._write(slot, struct.pack("=I", kind))
            case RandomIndex(modulus, slot):
                choice = self.choices[len(self.moduli)] if len(self.moduli) < len(self.choices) else 0
                self.moduli.append(modulus)
                self._write(slot, struct.pack("=I", choice))
            case _:
                raise NotImplementedError(f"the walk does not know {expression}")

    def _act(self, expression: Expression) -> Goto | bool:
        match expression:
            case Do(Verdict.GOTO, chain):
                return Goto(chain)
            case Do(Verdict.ACCEPT | Verdict.DROP | Verdict.RETURN as verdict):
                # Chains are entered by goto only, so that to return is to be accepted by the base chain.
                raise Ended("drop" if verdict is Verdict.DROP else "accept")
            case Do():
                raise NotImplementedError(f"the walk does not know {expression}")
            case Dnat(_, address_slot, port_slot):
                address = str(ip_address(self._read(address_slot, self.packet.family.size)))
                port = struct.unpack(">H", self._read(port_slot, 2))[0]
                self.packet = replace(self.packet, destination=address, port=port)
                self.translated = True
            case Snat(_, slot):
                self.source = str(ip_address(self._read(slot, self.packet.family.size)))
            case Masquerade():
                self.masqueraded = True
            case Reject():
                raise Ended("reject")
        raise Ended("accept")

    def _go(self, target: Goto) -> Goto:
        if not target.chain:
            raise Ended("drop")
        return target

    def _data(self, which: Map, slot: int) -> Data:
        """Return what a map says of the key in registers; None if nothing."""
        elements, key = self.state.elements[which.name], self._key(which, slot)
        if which.interval:
            key = _below(elements, key) or key + b"\0"
        return elements.get(key)

    def _contains(self, which: Map, slot: int) -> bool:
        elements = self.state.elements[which.name]
        key = self._key(which, slot)
        if which.ranges:
            return any(which.spans(self.packet.family, element, key) for element in elements)
        if not which.interval:
            return key in elements
        return _below(elements, key)[-1:] == b"\0"

    def _key(self, which: Map, slot: int) -> bytes:
        return self._read(slot, which.key_size(self.packet.family))

    def _read(self, slot: int, length: int) -> bytes:
        return bytes(self.registers[slot * 4 : slot * 4 + length])

    def _write(self, slot: int, value: bytes) -> None:
        padded = value + bytes(-len(value) % 4)
        self.registers[slot * 4 : slot * 4 + len(padded)] = padded


def _below(elements: Elements, key: bytes) -> bytes:
    """Return the boundary at or below a key, which says whether it lies inside a range; b"" if there is none.

    Where one range ends and the next one begins, the beginning counts.
    """
    return max((e for e in elements if e[:-1] <= key), key=lambda e: (e[:-1], -e[-1]), default=b"")
