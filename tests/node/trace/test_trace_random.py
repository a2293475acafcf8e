"""Random rules of others beside ours, random packets: each ends where its trace says, on the kernel."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from netlink import netns
from netlink.family import Family
from node.trace.packet import Branch, Kind, Verdict
from node.trace.path import Tracer, World
from node.trace.read import read
from tests.node.trace.test_trace_kernel import NODE, Measured, end_of, programmed_by
from tests.node.trace.test_trace_kernel import built as built
from tests.proxy import world
from tests.proxy.dataplanes import KINDS
from tests.proxy.plan import TCP, place
from tests.proxy.plan_cases import CASES
from tests.proxy.plan_lines import Case

SEED, ROUNDS, PACKETS = 21, 8, 40
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
SOURCES = ("pod1", "pod1b", "pod1c", "pod2", "client", "stranger", "node1", "node2")


@pytest.fixture(scope="module", params=KINDS, ids=str)
def lab(built: world.World, request: pytest.FixtureRequest) -> Iterator[world.World]:
    with programmed_by(built, request.param):
        yield built


def _match(chance: random.Random, word: str, family: Family, hook: str) -> str:
    """Return a condition that some packets meet."""
    name = chance.choice(SOURCES)
    address, bits = place(name, family), chance.choice((family.bits, family.bits - 8, family.bits // 2))
    options = [
        f"{word} saddr {address}",
        f"{word} saddr {address}/{bits}",
        f"{word} daddr {{ {address}, {place('pod2b', family)} }}",
        f"{word} daddr != {address}",
        f"meta l4proto {chance.choice(('tcp', 'udp'))}",
        f"tcp dport {chance.choice(('80', '8080', '80-90', '{ 80, 30002, 30003 }', '!= 8080'))}",
        "udp dport { 53, 5353 }",
        "ct state new",
        "ct state established,related",
        "ct status dnat",
        f"meta mark {chance.choice(('0x0', '0x7', '& 0x4000 == 0x4000', '!= 0x0'))}",
        "tcp flags & (syn | ack) == syn",
        f"fib {chance.choice(('saddr', 'daddr'))} type {chance.choice(('local', 'unicast'))}",
        f"{word} saddr . {word} daddr {{ {address} . {place('pod1', family)} }}",
        "meta length > 2000",
        "limit rate 10000/second burst 10000 packets",
    ]
    if hook in ("prerouting", "input", "forward"):
        options.append(f"iifname {chance.choice(('pw0', 'pw*', 'lo'))}")
    if hook in ("forward", "output", "postrouting"):
        options.append(f"oifname {chance.choice(('pw1', 'pw*', 'lo'))}")
    return chance.choice(options)


def _about_protocol(condition: str) -> bool:
    return any(word in condition for word in ("tcp", "udp"))


def _rule(chance: random.Random, word: str, family: Family, hook: str, nat: bool) -> str:
    # Whatever is not a connection's first packet passes: what is to be known is that one's way.
    conditions = ["ct state new"]
    for _ in range(chance.choice((1, 1, 2, 3))):
        found = _match(chance, word, family, hook)
        if not (_about_protocol(found) and any(map(_about_protocol, conditions))):
            conditions.append(found)
    verdicts = [
        "accept",
        "return",
        "counter",
        "meta mark set 0x7",
        "jump more",
        "goto more",
        "ct mark set 0x1",
    ]
    if not nat:
        verdicts += ["drop"]
        verdicts += ["reject"] if hook in ("input", "forward", "output") else []
    elif hook in ("prerouting", "output"):
        pod = place(chance.choice(("pod1", "pod2")), family)
        where = f"[{pod}]:8080" if family is Family.V6 else f"{pod}:8080"
        verdicts += [f"dnat {word} to {pod}"]
        if not any(map(_about_protocol, conditions)):
            verdicts += [f"meta l4proto tcp dnat {word} to {where}"]
    elif hook == "postrouting":
        verdicts += ["masquerade", f"snat {word} to {place('second1', family)}"]
    return f"    {' '.join(dict.fromkeys(conditions))} {chance.choice(verdicts)}"


def _table(chance: random.Random, family: Family) -> str:
    """Return a table of somebody else's, with a few chains at hooks of chance."""
    word = family.keyword
    kind = chance.choice((word, "inet"))
    lines = [f"table {kind} others {{", "  chain more {"]
    lines += [f"    ct state new {_match(chance, word, family, 'any')} {v}" for v in ("counter", "accept")]
    lines += ["  }"]
    for number in range(chance.randint(1, 3)):
        nat = chance.random() < 0.35
        hook = chance.choice(("prerouting", "output", "postrouting") if nat else HOOKS)
        usual = 100 if hook == "postrouting" else -100
        priority = usual + chance.choice((-1, 1, 10)) if nat else chance.choice((-190, -150, -50, 0, 50, 150))
        policy = "drop" if not nat and chance.random() < 0.1 else "accept"
        base = f"type {'nat' if nat else 'filter'} hook {hook} priority {priority}; policy {policy};"
        lines += [f"  chain c{number} {{", f"    {base}", "    ct state != new accept"]
        lines += [_rule(chance, word, family, hook, nat) for _ in range(chance.randint(1, 4))]
        lines += ["  }"]
    return "\n".join([*lines, "}"])


def _packets(chance: random.Random, lab: world.World, family: Family) -> list[Case]:
    """Return packets between whoever is not in one namespace; of half of them the plan knows the address."""
    usable = [c for c in CASES if c.family is family and not c.sticky]
    found: list[Case] = []
    while len(found) < PACKETS:
        one = chance.choice(usable)
        source = place(chance.choice(SOURCES), family)
        if chance.random() < 0.3:
            one = replace(one, destination=place(chance.choice(SOURCES), family), port=8080, protocol=TCP)
        here, there = lab.namespace_of(source), lab.places.get(one.destination, "")
        if here != there and one.destination not in ("127.0.0.1", "::1"):
            found.append(replace(one, source=source, expected=frozenset({"drop"})))
    return found


def _heard(branch: Branch) -> set[str]:
    """Return what the sender may hear: of a translated packet that is refused perhaps nothing."""
    refused = branch.end.verdict is Verdict.REJECTED and branch.end.packet.translated
    return {end_of(branch), "drop"} if refused else {end_of(branch)}


def _text(branches: tuple[Branch, ...]) -> str:
    return "\n".join(f"{s.hook:12} {s.chain:24} {s.text} {s.rule}" for b in branches for s in b.steps)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_random_packets_end_where_their_traces_say(lab: world.World, number: int) -> None:
    """300 pairs of state and packet, the same ones at every run."""
    chance = random.Random(f"{SEED} {number}")
    family = (Family.V4, Family.V6)[number % 2]
    table = _table(chance, family)

    def load(text: str) -> None:
        done = subprocess.run(["nft", "-f", "-"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{text}"

    packets = _packets(chance, lab, family)
    netns.run(lab.node, load, table)
    try:
        state = netns.run(lab.node, read, NODE, family)
        measured = Measured(Tracer(World(lambda name, asked: state if asked is family else None)))
        traces = [measured.trace(p) for p in packets]
        with ThreadPoolExecutor(PACKETS) as pool:
            answers = pool.map(lambda c: netns.run(lab.namespace_of(c.source), world.send, c), packets)
            ends = [end for end, _ in answers]
    finally:
        netns.run(lab.node, load, f"delete {table.partition(' {')[0]}")
    for packet, branches, end in zip(packets, traces, ends, strict=True):
        if not any(s.kind is Kind.UNDECIDED for b in branches for s in b.steps):
            assert end in set().union(*map(_heard, branches)), f"{packet}\n{table}\n{_text(branches)}"
