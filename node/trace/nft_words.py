"""A rule of the kernel in words like nft's. What is not known is named as the kernel does, never guessed."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

from netlink.attributes import parsed
from netlink.family import Family
from node.trace.nft import (
    ACCEPT,
    CONTINUE,
    DROP,
    GOTO,
    JUMP,
    QUEUE,
    RETURN,
    Expr,
    Jump,
    Rule,
    Set,
    Table,
    verdict,
)
from node.trace.packet import PROTOCOLS

VERDICTS = {
    JUMP: "jump", GOTO: "goto", RETURN: "return", CONTINUE: "continue", DROP: "drop", ACCEPT: "accept",
    QUEUE: "queue",
}  # fmt: skip
META = {
    0: "length", 1: "protocol", 2: "priority", 3: "mark", 4: "iif", 5: "oif", 6: "iifname", 7: "oifname",
    8: "iiftype", 9: "oiftype", 10: "skuid", 11: "skgid", 12: "nftrace", 15: "nfproto", 16: "l4proto",
    17: "ibrname", 18: "obrname", 19: "pkttype", 20: "cpu", 21: "iifgroup", 22: "oifgroup", 23: "cgroup",
    26: "iifkind", 27: "oifkind",
}  # fmt: skip
META_TYPES = {
    1: "", 4: "number", 5: "number", 6: "name", 7: "name", 10: "number", 11: "number", 15: "family",
    16: "protocol",
}  # fmt: skip
META_SIZES = {1: 2, 6: 16, 7: 16, 15: 1, 16: 1, 19: 1}
CT = {
    0: "state", 1: "direction", 2: "status", 3: "mark", 5: "expiration", 8: "l3proto", 14: "packets",
    11: "original proto-src", 12: "original proto-dst", 15: "bytes", 17: "zone", 20: "original saddr",
}  # fmt: skip
SOCKET = {0: "transparent", 1: "mark", 2: "wildcard", 3: "cgroupv2"}
STATES = {1: "invalid", 2: "established", 4: "related", 8: "new", 64: "untracked"}
STATUS = {16: "snat", 32: "dnat"}
COMPARE = {0: "", 1: "!= ", 2: "< ", 3: "<= ", 4: "> ", 5: ">= "}
KINDS = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
}
TCP_FLAGS = {1: "fin", 2: "syn", 4: "rst", 8: "psh", 16: "ack", 32: "urg"}
STATEMENTS = {
    "notrack": "notrack", "log": "log", "quota": "quota", "connlimit": "ct count", "queue": "queue",
    "flow_offload": "flow add", "objref": "use an object", "synproxy": "synproxy", "tproxy": "tproxy",
    "dup": "dup", "fwd": "fwd", "last": "last",
}  # fmt: skip
MANY = 4
"""Of an anonymous set with more elements only the number is told."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a register holds: words for it, the type that its bytes are shown as, and how many there are."""

    words: str
    type: str = ""
    size: int = 4


def value(kind: str, raw: bytes) -> str:
    """Return bytes as a type shows them."""
    if kind == "address" and len(raw) in (4, 16):
        return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    if kind == "address":
        return f"{raw.hex()}…"
    if kind == "port":
        return str(int.from_bytes(raw[:2], "big"))
    if kind == "protocol":
        return PROTOCOLS.get(raw[0], str(raw[0]))
    if kind == "name":
        return string_of(raw)
    if kind == "family":
        return {2: "ipv4", 10: "ipv6"}.get(raw[0], str(raw[0]))
    host = _host(raw)
    if kind == "state":
        return ",".join(name for bit, name in (STATES | STATUS).items() if host & bit) or "none"
    if kind == "type":
        return KINDS.get(host, str(host))
    if kind == "tcp flags":
        return ",".join(name for bit, name in TCP_FLAGS.items() if raw[0] & bit) or "none"
    if kind == "number":
        return str(host)
    if kind == "flag":
        return str(raw[0])
    return f"0x{host:x}" if kind == "hex" and len(raw) == 4 else f"0x{raw.hex()}"


def string_of(raw: bytes) -> str:
    """Return an interface's name; one that is cut off stands for all that begin so."""
    return raw.split(b"\0")[0].decode(errors="replace") + (
        "" if raw.endswith(b"\0") or len(raw) == 16 else "*"
    )


def loaded(family: int, expr: Expr) -> Kind | None:
    """Return what an expression loads into its register, None if it loads nothing that is known."""
    match expr.name:
        case "payload":
            return _field(family, expr.number(2), expr.number(3), expr.number(4))
        case "meta":
            key = expr.number(2)
            word = META.get(key, f"key {key}")
            return Kind(
                word if key in (4, 5, 6, 7) else f"meta {word}",
                META_TYPES.get(key, "hex"),
                META_SIZES.get(key, 4),
            )
        case "ct":
            key = expr.number(2)
            return Kind(f"ct {CT.get(key, key)}", "state" if key in (0, 2) else "hex", 1 if key == 1 else 4)
        case "fib":
            flags, result = expr.number(3), {1: "oif", 2: "oifname", 3: "type"}.get(expr.number(2), "?")
            words = ("saddr", "daddr", "mark", "iif", "oif")
            asked = " . ".join(w for bit, w in enumerate(words) if flags >> bit & 1)
            return Kind(f"fib {asked} {result}", "type" if result == "type" else "number")
        case "numgen":
            way = "inc" if expr.number(3) == 0 else "random"
            return Kind(f"numgen {way} mod {expr.number(2)}", "number")
        case "rt":
            return Kind("rt mtu" if expr.number(2) == 3 else "rt")
        case "socket":
            key = expr.number(1)
            return Kind(f"socket {SOCKET.get(key, key)}", "hex" if key == 1 else "flag", 4 if key == 1 else 1)
        case "hash" | "exthdr" | "osf" | "xfrm" | "tunnel":
            return Kind(expr.name)
    return None


def target(expr: Expr) -> int:
    """Return the register that an expression loads into."""
    return expr.slot(2 if expr.name in ("hash", "socket", "tunnel") else 1)


def _field(family: int, base: int, offset: int, size: int) -> Kind:
    ip = Family.V4 if family != 10 else Family.V6
    if base == 1 and size <= 16:
        for name, at in (("saddr", ip.source_offset), ("daddr", ip.destination_offset)):
            if offset == at and size <= ip.size:
                return Kind(f"{ip.keyword} {name}", "address", size)
        if (ip, offset, size) in ((Family.V4, 9, 1), (Family.V6, 6, 1)):
            return Kind(f"{ip.keyword} {'protocol' if ip is Family.V4 else 'nexthdr'}", "protocol", 1)
    if base == 2 and size == 2 and offset in (0, 2):
        return Kind("th dport" if offset else "th sport", "port", 2)
    if base == 2 and (offset, size) == (13, 1):
        return Kind("tcp flags", "tcp flags", 1)
    return Kind(f"@{('ll', 'nh', 'th')[base] if base < 3 else base},{offset * 8},{size * 8}", "", size)


def words(table: Table, rule: Rule) -> str:
    """Return a rule as a sentence, without its comment and counter."""
    sentence = _Sentence(table)
    for expr in rule.expressions:
        sentence.step(expr)
    return " ".join(s for s in sentence.said if s)


def element(kinds: list[Kind], key: bytes) -> str:
    """Return a key that was looked up, by what its registers hold."""
    shown, start = [], 0
    for kind in kinds:
        size = kind.size
        if start + size > len(key):
            break
        shown.append(value(kind.type, key[start : start + size]))
        start += size + 3 & ~3
    return " . ".join(shown) or f"0x{key.hex()}"


def jump(target: Jump) -> str:
    """Return a verdict in words."""
    return f"{VERDICTS.get(target.code, str(target.code))} {target.chain}".strip()


@dataclass(slots=True)
class _Sentence:
    table: Table
    said: list[str] = field(default_factory=list)
    registers: dict[int, Kind] = field(default_factory=dict)
    constants: dict[int, bytes] = field(default_factory=dict)

    def step(self, expr: Expr) -> None:
        """Take in one expression."""
        if expr.name in ("meta", "ct") and 1 not in expr.data:
            source = expr.slot(3 if expr.name == "meta" else 4)
            name = f"meta {META.get(expr.number(2), expr.number(2))}" if expr.name == "meta" else "ct mark"
            self.said.append(f"{name} set {self._held(source)}")
            return
        if expr.name == "exthdr" and 7 in expr.data:
            option = "maxseg size" if expr.number(2) == 2 else str(expr.number(2))
            self.said.append(f"tcp option {option} set {self._held(expr.slot(7))}")
            return
        kind = loaded(self.table.family, expr)
        if kind:
            slot = target(expr)
            self.registers[slot] = kind
            self.constants.pop(slot, None)
            return
        self._say(self._statement(expr))

    def _say(self, part: str) -> None:
        """Add a part; a field's name says of which protocol the packet is, so that this need not be said."""
        before = self.said[-1] if self.said else ""
        if before in ("meta l4proto tcp", "meta l4proto udp") and part.startswith(("th ", "tcp flags ")):
            part = part.replace("th ", f"{before.rpartition(' ')[2]} ", 1) if part.startswith("th ") else part
            self.said.pop()
        elif (before, part.partition(" ")[0]) in (("meta nfproto ipv4", "ip"), ("meta nfproto ipv6", "ip6")):
            self.said.pop()
        if part:
            self.said.append(part)

    def _statement(self, expr: Expr) -> str:
        match expr.name:
            case "cmp":
                return self._compared(expr)
            case "range":
                first, last = (self._shown(expr.slot(1), held_bytes(expr, k)) for k in (3, 4))
                sign = "!= " if expr.number(2) else ""
                return f"{self._name(expr.slot(1))} {sign}{first}-{last}"
            case "bitwise":
                return self._masked(expr)
            case "byteorder" | "counter":
                return ""
            case "lookup":
                return self._lookup(expr)
            case "immediate":
                return self._immediate(expr)
            case "nat" | "masq" | "redir":
                return self._translation(expr)
            case "reject":
                return "reject with tcp reset" if expr.number(1) == 1 else "reject"
            case "limit":
                over = "over " if expr.number(5) & 1 else ""
                return f"limit rate {over}{expr.number(1)}/{expr.number(2)} s"
            case "dynset":
                return f"update @{expr.word(1)} {{ {self._name(expr.slot(4))} }}"
            case "match" | "target":
                return f"xt {expr.name} {expr.word(1)}"
        return STATEMENTS.get(expr.name, f"({expr.name})")

    def _name(self, slot: int) -> str:
        return self.registers[slot].words if slot in self.registers else "?"

    def _shown(self, slot: int, raw: bytes) -> str:
        kind = self.registers.get(slot, Kind("?"))
        if kind.type == "address" and len(raw) < (16 if kind.words.startswith("ip6") else 4):
            size = 16 if kind.words.startswith("ip6") else 4
            return f"{value('address', raw.ljust(size, bytes(1)))}/{8 * len(raw)}"
        return value(kind.type, raw)

    def _compared(self, expr: Expr) -> str:
        slot, raw = expr.slot(1), held_bytes(expr, 3)
        kind = self.registers.get(slot, Kind("?"))
        mask = self.constants.get(slot)
        sign = COMPARE.get(expr.number(2), "? ")
        if mask is None:
            return f"{kind.words} {sign}{self._shown(slot, raw)}"
        if not any(raw) and sign == "!= ":
            return (
                f"{kind.words} {value(kind.type, mask)}"
                if kind.type == "state"
                else (f"{kind.words} & {value(kind.type, mask)} != 0")
            )
        if kind.type == "address":
            return f"{kind.words} {sign}{value('address', raw)}/{sum(b.bit_count() for b in mask)}"
        return f"{kind.words} & {value(kind.type, mask)} {sign or '== '}{value(kind.type, raw)}"

    def _masked(self, expr: Expr) -> str:
        source, into = expr.slot(1), expr.slot(2)
        if source in self.registers:
            self.registers[into] = self.registers[source]
        mask, flip = held_bytes(expr, 4), held_bytes(expr, 5)
        self.constants[into] = mask
        if any(flip):
            old = self._name(source)
            bits = (
                f"| 0x{_host(flip):x}"
                if _host(mask) & _host(flip) == 0
                else f"& 0x{_host(mask):x} ^ 0x{_host(flip):x}"
            )
            clears = _host(mask) == 0xFFFFFFFF
            self.registers[into] = Kind(f"{old} ^ 0x{_host(flip):x}" if clears else f"{old} {bits}")
        return ""

    def _lookup(self, expr: Expr) -> str:
        found = self.table.sets.get(expr.word(1))
        names, slot = [], expr.slot(2)
        for _ in range(16):
            if slot not in self.registers:
                break
            names.append(self.registers[slot].words)
            slot += (self.registers[slot].size + 3) // 4
            if found is not None and slot * 4 >= expr.slot(2) * 4 + key_size(found):
                break
        key = " . ".join(names) or "?"
        if 3 in expr.data:
            word = "vmap" if expr.slot(3) < 0 else "map"
            if expr.slot(3) >= 0:
                self.registers[expr.slot(3)] = Kind(f"{key} map @{expr.word(1)}", "")
                return ""
            return f"{key} {word} {self._set(found, expr)}"
        return f"{key} {'!= ' if expr.number(5) & 1 else ''}{self._set(found, expr)}"

    def _set(self, found: Set | None, expr: Expr) -> str:
        if found is None or not found.anonymous:
            return f"@{expr.word(1)}"
        kind = self.registers.get(expr.slot(2), Kind("?"))
        if len(found.elements) > MANY or found.interval or found.ranges:
            return f"{{ {len(found.elements)} elements }}"
        shown = (
            value(kind.type, k) + (f" : {jump(d)}" if isinstance(d, Jump) else "")
            for k, d in sorted(found.elements.items())
        )
        return f"{{ {', '.join(shown)} }}"

    def _immediate(self, expr: Expr) -> str:
        target = verdict(expr.data.get(2, b""))
        if target:
            return jump(target)
        self.registers[expr.slot(1)] = Kind(
            f"0x{held_bytes(expr, 2).hex()}", "constant", len(held_bytes(expr, 2))
        )
        self.constants[expr.slot(1)] = held_bytes(expr, 2)
        return ""

    def _translation(self, expr: Expr) -> str:
        if expr.name == "masq":
            return "masquerade"
        if expr.name == "redir":
            return f"redirect to :{self._port(expr.slot(1))}" if 1 in expr.data else "redirect"
        word = "snat" if expr.number(1) == 0 else "dnat"
        address = self._held(expr.slot(3), "address") if 3 in expr.data else ""
        own = 5 in expr.data and expr.slot(5) in self.constants
        return f"{word} to {address}{f':{self._port(expr.slot(5))}' if own else ''}"

    def _port(self, slot: int) -> str:
        return self._held(slot, "port")

    def _held(self, slot: int, kind: str = "") -> str:
        """Return what is in a register: a constant, or the words for what was loaded."""
        held = self.registers.get(slot)
        if held and held.type == "constant":
            raw = self.constants[slot]
            return value(kind, raw) if kind else f"0x{_host(raw):x}"
        return held.words if held else "?"


def key_size(which: Set) -> int:
    """Return the bytes of a set's keys as rules load them, 0 if it is empty."""
    key = next((k for k in which.elements if k), b"")
    return (len(key) - which.interval) // (2 if which.ranges else 1)


def held_bytes(expr: Expr, kind: int) -> bytes:
    """Return the value in an attribute with data (NFTA_DATA_VALUE)."""
    return parsed(expr.data.get(kind, b"")).get(1, b"")


def _host(raw: bytes) -> int:
    return int(struct.unpack("=I", raw.ljust(4, b"\0")[:4])[0])
