"""Print a table as `nft list table` does (1.0.6): text that `nft -f` loads to make the very table. Pure.

nft's language has no registers, so a rule is run with words in them: a load puts words into a register, a
comparison or lookup takes them out again and becomes a part of the sentence. An expression that the printer
does not know is an error, not a guess. Counters are printed as they begin, at nothing.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from netlink.family import Family
from netlink.nftables.expressions import (
    IP_CT_DIR_REPLY,
    IPS_DST_NAT,
    IPS_SRC_NAT,
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
    NoTrack,
    Payload,
    RandomIndex,
    Reject,
    Remember,
    RouteMss,
    Snat,
    SocketTransparent,
    TcpOptionSet,
    ToNetworkOrder,
    Verdict,
    VerdictLookup,
)
from netlink.nftables.fake import State
from netlink.nftables.objects import (
    PRIORITY_DSTNAT,
    PRIORITY_FILTER,
    PRIORITY_MANGLE,
    PRIORITY_RAW,
    PRIORITY_SRCNAT,
    Chain,
    Data,
    Elements,
    Field,
    Goto,
    Hook,
    Map,
    Rule,
    Table,
)

PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
PRIORITIES = {
    **{(hook, PRIORITY_RAW): "raw" for hook in Hook},
    **{(hook, PRIORITY_MANGLE): "mangle" for hook in Hook},
    **{(hook, PRIORITY_FILTER): "filter" for hook in Hook},
    (Hook.PREROUTING, PRIORITY_DSTNAT): "dstnat",
    (Hook.POSTROUTING, PRIORITY_SRCNAT): "srcnat",
}
DIRECTIONS = {1 - IP_CT_DIR_REPLY: "original", IP_CT_DIR_REPLY: "reply"}
STATUS = {IPS_SRC_NAT: "snat", IPS_DST_NAT: "dnat"}
TCP_FLAGS = {0x01: "fin", 0x02: "syn", 0x04: "rst", 0x08: "psh", 0x10: "ack", 0x20: "urg"}
MAXIMUM_SEGMENT_SIZE = TcpOptionSet(2, 2, 2)
MTU, HOST_MTU = "rt mtu", "rt mtu in host order"
ALL_BITS = 0xFFFFFFFF
ELEMENT_BREAK = ",\n\t\t\t     "


def listing(table: Table, state: State) -> str:
    """Return a table of an IP family as text; NotImplementedError names what cannot be printed."""
    if not isinstance(table.family, Family):
        raise _unknown(table)
    blocks = [_map(table.family, which, state.elements[which.name]) for which in state.maps.values()]
    for chain in state.chains.values():
        blocks.append(_chain(table.family, chain, state.rules[chain.name], state.maps))
    body = "\n\n".join("\n".join(lines) for lines in blocks)
    return f'table {table} {{\n\tcomment "{state.comment}"\n{body}\n}}\n'


def _unknown(what: object) -> NotImplementedError:
    return NotImplementedError(f"the printer does not know {what}")


def _map(family: Family, which: Map, elements: Elements) -> Iterator[str]:
    if which.limits:
        raise _unknown(which)
    kind, typeof = "set", _typeof(family, which.key)
    if which.data or which.verdicts:
        kind = "map"
        typeof += f" : {_typeof(family, which.data) if which.data else 'verdict'}"
    flags = {"interval": which.interval or which.ranges, "dynamic": which.dynamic, "timeout": which.timeout}
    yield f"\t{kind} {which.name} {{"
    yield f"\t\ttypeof {typeof}"
    if which.dynamic:
        yield f"\t\tsize {which.size}"
    if any(flags.values()):
        yield f"\t\tflags {','.join(flag for flag, is_set in flags.items() if is_set)}"
    if which.timeout:
        yield f"\t\ttimeout {_duration(which.timeout)}"
    if which.comment:
        yield f'\t\tcomment "{which.comment}"'
    if elements:
        yield f"\t\telements = {{ {_joined(family, which, list(_elements(family, which, elements)))} }}"
    yield "\t}"


def _joined(family: Family, which: Map, elements: list[str]) -> str:
    """Join elements as nft does: two short ones a line, or one that is an IPv6 address or several fields."""
    a_line = 5 if which.key == (Field.PRIORITY,) else 2 if which.key_size(family) == 4 else 1
    lines = (", ".join(elements[at : at + a_line]) for at in range(0, len(elements), a_line))
    return ELEMENT_BREAK.join(lines)


def _elements(family: Family, which: Map, elements: Elements) -> Iterator[str]:
    """Yield the elements in nft's order, which takes several fields, or an index, for one host number."""
    if which.interval:
        for first, last, data in _intervals(family, elements):
            words = _range(family, first, last)
            yield words if data is None else f"{words} : {_data(family, which, data)}"
        return
    if which.ranges:
        yield from (_element_range(family, which.key, key) for key in sorted(elements))
        return
    reverse = len(which.key) > 1 or which.key[0] in (Field.INDEX, Field.PRIORITY)
    for key in sorted(elements, key=(lambda k: k[::-1]) if reverse else None):
        words = " . ".join(_values(family, which.key, key))
        data = elements[key]
        yield words if data is None else f"{words} : {_data(family, which, data)}"


def _data(family: Family, which: Map, data: Data) -> str:
    match data:
        case Goto(chain):
            return f"goto {chain}" if chain else "drop"
        case bytes():
            return " . ".join(_values(family, which.data, data))
    raise _unknown(data)


def _intervals(family: Family, boundaries: Elements) -> Iterator[tuple[int, int, Data]]:
    """Yield the ranges of an interval set, and the data of each, which is its start's.

    A range's end is the address after it, and it is missing after the last one.
    """
    start, data = None, None
    # At one address the end of a range comes before the start of the next.
    for key in sorted(boundaries, key=lambda k: (k[:-1], -k[-1])):
        address = int.from_bytes(key[:-1], "big")
        if not key[-1]:
            start, data = address, boundaries[key]
        elif start is not None:
            yield start, address - 1, data
            start = None
    if start is not None:
        yield start, (1 << family.bits) - 1, data


def _element_range(family: Family, fields: tuple[Field, ...], element: bytes) -> str:
    """Return an element of a set with ranges, whose key is the first key and then the last."""
    middle = len(element) // 2
    words = []
    firsts, lasts = _parts(family, fields, element[:middle]), _parts(family, fields, element[middle:])
    for (kind, first), (_, last) in zip(firsts, lasts, strict=True):
        if kind in (Field.SOURCE, Field.DESTINATION):
            words.append(_range(family, int.from_bytes(first, "big"), int.from_bytes(last, "big")))
        elif first == last:
            words.append(_value(family, kind, first))
        else:
            words.append(f"{_value(family, kind, first)}-{_value(family, kind, last)}")
    return " . ".join(words)


def _range(family: Family, first: int, last: int) -> str:
    """Return a range of addresses as an address, a CIDR, or, if it is neither, as first and last."""
    count = last - first + 1
    start, end = (_address(family, n.to_bytes(family.size, "big")) for n in (first, last))
    if first == last:
        return start
    if count & (count - 1) or first % count:
        return f"{start}-{end}"
    return f"{start}/{family.bits - count.bit_length() + 1}"


def _typeof(family: Family, fields: tuple[Field, ...]) -> str:
    return " . ".join(_words(family, kind) for kind in fields)


def _words(family: Family, kind: Field) -> str:
    words = {
        Field.SOURCE: f"{family.keyword} saddr",
        Field.DESTINATION: f"{family.keyword} daddr",
        Field.L4PROTO: "meta l4proto",
        Field.DPORT: "th dport",
        Field.PRIORITY: "meta priority",
        Field.INDEX: "numgen random mod 2",  # what a set's typeof says of any modulus
    }
    if kind not in words:
        raise _unknown(kind)
    return words[kind]


def _values(family: Family, fields: tuple[Field, ...], raw: bytes) -> list[str]:
    return [_value(family, kind, part) for kind, part in _parts(family, fields, raw)]


def _parts(family: Family, fields: tuple[Field, ...], raw: bytes) -> Iterator[tuple[Field, bytes]]:
    """Yield the bytes of each field, whole registers."""
    start = 0
    for kind in fields:
        end = start + kind.layout(family).size
        yield kind, raw[start:end]
        start = end


def _value(family: Family, kind: Field, raw: bytes) -> str:
    match kind:
        case Field.SOURCE | Field.DESTINATION:
            return _address(family, raw)
        case Field.L4PROTO:
            return PROTOCOLS.get(raw[0], str(raw[0]))
        case Field.DPORT:
            return str(int.from_bytes(raw[:2], "big"))
        case Field.INDEX:
            return str(_host(raw))
        case Field.PRIORITY:
            return _handle(_host(raw))
    raise _unknown(kind)


def _handle(priority: int) -> str:
    """Return a priority as nft writes it: as a handle of traffic control."""
    if not priority:
        return "none"
    major, minor = divmod(priority, 1 << 16)
    return f"{major:x}:{minor:x}"


def _address(family: Family, raw: bytes) -> str:
    """Return an address, or the range of those that begin with some bytes."""
    if len(raw) < family.size:
        return f"{_address(family, raw.ljust(family.size, bytes(1)))}/{8 * len(raw)}"
    return socket.inet_ntop(family.af, raw)


def _host(raw: bytes) -> int:
    """Return a four-byte number in host order."""
    return int(struct.unpack("=I", raw)[0])


def _flags(names: Mapping[int, str], value: int, mask: int) -> str:
    """Return which flags are set, and which are looked at, as nft writes it."""
    if not value or (value | mask) & ~sum(names):
        raise _unknown((names, value, mask))
    return " / ".join(",".join(name for bit, name in names.items() if bits & bit) for bits in (value, mask))


def _alike(family: Family, one: Field, other: Field) -> bool:
    """Whether two fields are of one type: a set of sources may be asked for a destination."""
    return one.layout(family).datatype == other.layout(family).datatype


def _hex(raw: bytes) -> str:
    return f"0x{_host(raw):08x}"


def _duration(seconds: int) -> str:
    """Return a time as nft writes it: 1d2h3m4s, without what is zero."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = zip((days, hours, minutes, seconds), "dhms", strict=True)
    return "".join(f"{n}{unit}" for n, unit in parts if n)


def _chain(family: Family, chain: Chain, rules: list[Rule], maps: Mapping[str, Map]) -> Iterator[str]:
    yield f"\tchain {chain.name} {{"
    if chain.base:
        base = chain.base
        priority = PRIORITIES.get((base.hook, base.priority), base.priority)
        yield f"\t\ttype {base.kind} hook {base.hook.name.lower()} priority {priority}; policy accept;"
    for rule in rules:
        sentence = _Sentence(family, maps)
        for expression in rule.expressions:
            sentence.step(expression)
        comment = f' comment "{rule.comment}"' if rule.comment else ""
        yield f"\t\t{' '.join(sentence.said)}{comment}"
    yield "\t}"


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a register holds: the words for it, its field if it is one, and what was computed with it."""

    words: str
    kind: Field | None = None
    mask: bytes = b""
    flip: bytes = b""


@dataclass(slots=True)
class _Sentence:
    """A rule on its way into words; `said` are the parts so far."""

    family: Family
    maps: Mapping[str, Map]
    said: list[str] = field(default_factory=list)
    registers: dict[int, _Loaded | bytes] = field(default_factory=dict)

    def step(self, expression: Expression) -> None:
        """Take in one expression."""
        match expression:
            case (
                Payload()
                | Meta()
                | Ct()
                | FibDestinationType()
                | RandomIndex()
                | RouteMss()
                | SocketTransparent()
            ):
                self.registers[expression.slot] = self._load(expression)
            case ToNetworkOrder(slot):
                self.registers[slot] = _Loaded(self._mtu(slot, HOST_MTU, expression))
            case Constant(value, slot):
                self.registers[slot] = value
            case Bitwise(mask, flip, slot):
                self.registers[slot] = replace(self._loaded(slot, expression), mask=mask, flip=flip)
            case MapLookup(name, slot, into):
                found = _Loaded(f"{self._key(name, slot)} map @{name}")
                for kind in self.maps[name].data:
                    self.registers[into] = found
                    into += kind.layout(self.family).size // 4
            case Lookup(name, slot, invert):
                self.said.append(f"{self._key(name, slot)} {'!= ' if invert else ''}@{name}")
            case VerdictLookup(name, slot):
                self.said.append(f"{self._key(name, slot)} vmap @{name}")
            case Cmp():
                self.said.append(self._comparison(expression))
            case _:
                self.said.append(self._statement(expression))

    def _load(self, expression: Expression) -> _Loaded:
        """Return what an expression puts into its register."""
        family = self.family
        match expression:
            case Payload(Base.NETWORK, offset, length) if length <= family.size:
                kinds = {family.source_offset: Field.SOURCE, family.destination_offset: Field.DESTINATION}
                if offset in kinds:
                    return _Loaded(_words(family, kinds[offset]), kinds[offset])
            case Payload(Base.TRANSPORT, 2, 2):
                return _Loaded(_words(family, Field.DPORT), Field.DPORT)
            case Payload(Base.TRANSPORT, 13, 1):
                return _Loaded("tcp flags")
            case Meta(MetaKey.L4PROTO):
                return _Loaded(_words(family, Field.L4PROTO), Field.L4PROTO)
            case Meta(MetaKey.MARK | MetaKey.SKGID as key):
                return _Loaded(f"meta {key.name.lower()}")
            case Meta(MetaKey.PRIORITY):
                return _Loaded(_words(family, Field.PRIORITY), Field.PRIORITY)
            case Ct(key):
                return _Loaded(f"ct {key.name.lower()}")
            case SocketTransparent():
                return _Loaded("socket transparent")
            case FibDestinationType():
                return _Loaded("fib daddr type")
            case RouteMss():
                return _Loaded(HOST_MTU)
            case RandomIndex(modulus):
                return _Loaded(f"numgen random mod {modulus}", Field.INDEX)
        raise _unknown(expression)

    def _comparison(self, compared: Cmp) -> str:
        loaded = self._loaded(compared.slot, compared, plain=False)
        sign = "!= " if compared.operator is Compare.NEQ else ""
        if loaded.mask:
            has_bits = sign and not any(loaded.flip) and not any(compared.value)
            if has_bits and loaded.words == "meta mark":
                return f"meta mark & {_hex(loaded.mask)} != {_hex(compared.value)}"
            if has_bits and loaded.words == "ct status" and _host(loaded.mask) in STATUS:
                return f"ct status {STATUS[_host(loaded.mask)]}"
            if not sign and not any(loaded.flip) and loaded.words == "ct status":
                return f"ct status {_flags(STATUS, _host(compared.value), _host(loaded.mask))}"
            if not sign and not any(loaded.flip) and loaded.words == "tcp flags" and self._implied("tcp"):
                return f"tcp flags {_flags(TCP_FLAGS, compared.value[0], loaded.mask[0])}"
        elif loaded.kind is Field.DPORT and self._implied("udp"):
            return f"udp dport {sign}{_value(self.family, loaded.kind, compared.value)}"
        elif loaded.kind:
            return f"{loaded.words} {sign}{_value(self.family, loaded.kind, compared.value)}"
        elif loaded.words == "fib daddr type" and _host(compared.value) == RTN_LOCAL:
            return f"{loaded.words} {sign}local"
        elif loaded.words == "ct direction":
            return f"{loaded.words} {sign}{DIRECTIONS[compared.value[0]]}"
        elif loaded.words in ("meta skgid", "socket transparent"):
            return f"{loaded.words} {sign}{int.from_bytes(compared.value, sys.byteorder)}"
        raise _unknown((loaded, compared))

    def _implied(self, protocol: str) -> bool:
        """Take back that the packet is of a protocol, which the name of a field of that protocol says too."""
        if self.said[-1:] != [f"meta l4proto {protocol}"]:
            return False
        self.said.pop()
        return True

    def _mtu(self, slot: int, words: str, user: Expression) -> str:
        """Return nft's words for the route's MTU, which is in a register in one byte order or the other."""
        if self._loaded(slot, user).words != words:
            raise _unknown((user, words))
        return MTU

    def _statement(self, expression: Expression) -> str:
        match expression:
            case MetaSet(MetaKey.PRIORITY, slot):
                found = self.registers.get(slot)
                words = found.words if isinstance(found, _Loaded) else _handle(_host(found or b""))
                return f"meta priority set {words}"
            case MetaSet(MetaKey.MARK, slot):
                return f"meta mark set {self._marked(slot, expression)}"
            case Remember(name, slot):
                return f"update @{name} {{ {self._key(name, slot)} }}"
            case Dnat(_, address_slot, port_slot):
                return self._dnat(address_slot, port_slot, expression)
            case Snat(_, slot):
                return f"snat to {self._loaded(slot, expression).words} fully-random"
            case Masquerade():
                return "masquerade fully-random"
            case NoTrack():
                return "notrack"
            case TcpOptionSet(slot=slot) if replace(expression, slot=0) == MAXIMUM_SEGMENT_SIZE:
                return f"tcp option maxseg size set {self._mtu(slot, MTU, expression)}"
            case Reject(None):
                self._implied("tcp")  # nft finds out by itself that only TCP can be reset
                return "reject with tcp reset"
            case Reject(code) if code == self.family.port_unreachable:
                return "reject"
            case Counter():
                return "counter packets 0 bytes 0"
            case Do(Verdict.JUMP | Verdict.GOTO as verdict, chain):
                return f"{verdict.name.lower()} {chain}"
            case Do(verdict):
                return verdict.name.lower()
        raise _unknown(expression)

    def _marked(self, slot: int, expression: Expression) -> str:
        """Return what a mark is set to: itself with bits set or flipped."""
        loaded = self._loaded(slot, expression, plain=False)
        if loaded.words == "meta mark" and loaded.mask:
            mask, flip = _host(loaded.mask), _host(loaded.flip)
            if mask == ALL_BITS:
                return f"meta mark ^ {_hex(loaded.flip)}"
            if mask == ALL_BITS ^ flip:
                return f"meta mark | {_hex(loaded.flip)}"
        raise _unknown((loaded, expression))

    def _dnat(self, address_slot: int, port_slot: int, expression: Expression) -> str:
        match self.registers.get(address_slot), self.registers.get(port_slot):
            case bytes(address), bytes(port):
                text = _address(self.family, address)
                place = f"[{text}]" if self.family is Family.V6 else text
                return f"dnat to {place}:{int.from_bytes(port, 'big')}"
            case _Loaded() as address, port if port is address and address_slot < port_slot:
                return f"dnat {self.family.keyword} to {address.words}"
        raise _unknown((expression, self.registers))

    def _key(self, name: str, slot: int) -> str:
        """Return the words for the key of a map that is in consecutive registers."""
        words = []
        for kind in self.maps[name].key:
            loaded = self._loaded(slot, kind)
            if loaded.kind is None or not _alike(self.family, loaded.kind, kind):
                raise _unknown((name, loaded))
            words.append(loaded.words)
            slot += kind.layout(self.family).size // 4
        return " . ".join(words)

    def _loaded(self, slot: int, user: object, *, plain: bool = True) -> _Loaded:
        """Return what was loaded into a register; `plain`: and not changed since."""
        loaded = self.registers.get(slot)
        if not isinstance(loaded, _Loaded) or (plain and loaded.mask):
            raise _unknown((user, loaded))
        return loaded
