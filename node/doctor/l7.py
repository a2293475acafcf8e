"""The check `l7`: HAProxy and what it needs, where services ask for the L7 proxy.

Whether some do is told by what there is: HAProxy's processes with our group, its addresses on `lo`, or the
daemon's sentences. What HAProxy is to do is in the configuration that it was started with.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from socket import inet_ntop

from netlink.errors import NetlinkError
from netlink.family import Family, with_port
from node import l7_network
from node.doctor.findings import Check, Finding, Severity
from node.doctor.view import Context, View
from proxy.l7.places import OWNER, PORT, RANGES, TRANSPARENT_TABLE
from proxy.l7.policy import ANNOTATIONS

NAME = "l7"
PROGRAM = "haproxy"
PATHS = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/sbin:/bin"
OLDEST = 2, 6
"""The first version with all that our configuration has; Debian 12's."""
INSTALL = "apt-get install haproxy (Debian 12 and later, Ubuntu 24.04 and later); then restart the daemon"
LOG = "see the daemon's log and HAProxy's own beside its configuration"
MUCH = 256 << 20
"""Bytes of old processes of HAProxy together; of one with 1,000 services it is 100 MB."""
LISTENING = "0A"  # TCP_LISTEN, net/tcp_states.h
L7_WORDS = "L7 proxy", "HAProxy", *ANNOTATIONS
"""What the daemon's sentences on it have."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of HAProxy that serves; `memory` in bytes, `begun` in ticks since boot."""

    number: int
    parent: int
    begun: int
    memory: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What was found. `program` is a path, "" if there is none; `version` what it says of itself.

    `workers` serve, the youngest new connections; `configuration` is their text, "" if it cannot be read.
    `kept` is what node.l7_network has made, in its words. `listeners` are addresses and ports of TCP sockets
    that listen, by whose they are ("" unknown); `problems` the daemon's sentences.
    """

    program: str = ""
    version: str = ""
    workers: tuple[Process, ...] = ()
    configuration: str = ""
    kept: frozenset[str] = frozenset()
    listeners: tuple[tuple[str, int, str], ...] = ()
    problems: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def binds(self) -> dict[str, int]:
        """Where HAProxy is to listen: ports by address."""
        found = re.findall(r"^\s*bind (\S+):(\d+)", self.configuration, re.MULTILINE)
        return {address.strip("[]"): int(port) for address, port in found}

    @property
    def families(self) -> tuple[Family, ...]:
        """The families that HAProxy listens in."""
        return tuple(f for f in Family if any((":" in a) is (f is Family.V6) for a in self.binds))

    @property
    def port(self) -> int:
        """Where HAProxy is to listen."""
        return next(iter(self.binds.values()), PORT)

    @property
    def transparent(self) -> bool:
        """Whether some service has connections with clients' own addresses."""
        return bool(re.search(r"^\s*(server .*)?source \S+ usesrc ", self.configuration, re.MULTILINE))


def judge(seen: Observed) -> Check:
    """Return what is wrong, where HAProxy is in use."""
    if not (seen.workers or seen.kept or seen.problems):
        return Check(NAME, skipped="no service asks for the L7 proxy, by what there is on this node")
    findings = [*_program(seen), *_running(seen)]
    remedy = "podwire l7 show has the services; docs/l7.md what the annotation can have"
    findings += [Finding(problem, remedy, Severity.WARNING) for problem in seen.problems]
    if seen.workers:
        findings += [*_network(seen), *_memory(seen)]
    notes = list(seen.notes)
    if not seen.workers and not seen.problems:
        notes.append("HAProxy does not run, though its addresses are there: right if no service asks for it")
    return Check(NAME, tuple(findings), tuple(notes))


def _program(seen: Observed) -> Iterator[Finding]:
    if not seen.program:
        yield Finding("the program haproxy is not installed, and services ask for the L7 proxy", INSTALL)
        return
    found = re.search(r"version (\d+)\.(\d+)", seen.version)
    if not found:
        yield Finding(f"{seen.program} -v does not say its version", INSTALL, Severity.WARNING)
    elif (int(found[1]), int(found[2])) < OLDEST:
        words = f"{seen.program} is version {found[1]}.{found[2]}, and {OLDEST[0]}.{OLDEST[1]} is needed"
        yield Finding(words, INSTALL)


def _running(seen: Observed) -> Iterator[Finding]:
    """Yield what keeps HAProxy from running, or from listening."""
    own = seen.binds.keys()
    others = [
        f"{with_port(address, port)} ({whose or 'of a program not known'})"
        for address, port, whose in seen.listeners
        if port == seen.port and address in ("0.0.0.0", "::", *own) and whose != PROGRAM
    ]
    mine = {address for address, port, whose in seen.listeners if port == seen.port and address in own}
    if seen.workers:
        for address in sorted(seen.binds.keys() - mine):
            yield Finding(f"HAProxy runs, and does not listen on {with_port(address, seen.port)}", LOG)
    elif seen.problems and seen.program:
        yield Finding("HAProxy does not run, and services ask for the L7 proxy", LOG)
    if others and not mine:
        words = f"another program listens on the L7 proxy's port: {', '.join(others)}"
        yield Finding(words, "end it, or give the L7 proxy another port")


def _network(seen: Observed) -> Iterator[Finding]:
    """Yield what HAProxy needs of the node's network and is not there."""
    again = "the daemon makes it again within seconds; if not, see its log"
    for family in seen.families:
        for each in RANGES.values():
            if f"local route to {each[family]}" not in seen.kept:
                words = f"the L7 proxy's {each[family]} is not local: connections to services are lost"
                yield Finding(words, again)
        back = (
            f"{family.keyword} rule {TRANSPARENT_TABLE}",
            f"{family.keyword} route of table {TRANSPARENT_TABLE}",
            f"table {l7_network.TABLES[family]}",
        )
        for part in back if seen.transparent else ():
            if part not in seen.kept:
                words = f"the {part} is missing: answers to transparent services do not come back to HAProxy"
                yield Finding(words, again)
    yield from (Finding(words, "set it to 0, or have no transparent service") for words in seen.obstacles)


def _memory(seen: Observed) -> Iterator[Finding]:
    """Yield what old processes take, that wait for their connections to end."""
    old = sorted(seen.workers, key=lambda p: p.begun)[:-1]
    memory = sum(process.memory for process in old)
    if memory >= MUCH:
        words = (
            f"{len(old)} old processes of HAProxy take {memory >> 20} MB: their connections have not ended"
        )
        numbers = " ".join(str(process.number) for process in old)
        remedy = f"wait, or end them and their connections: kill {numbers}"
        yield Finding(words, remedy, Severity.WARNING)


def look(context: Context) -> Observed:
    """Look at processes, sockets, addresses and rules."""
    found = tuple(_workers(context))
    parents = {process.parent for process in found}
    workers = tuple(p for p in found if p.number not in parents)  # the master may have our group, too
    program = shutil.which(PROGRAM, path=PATHS) or ""
    seen = Observed(
        program,
        _version(program) if program else "",
        workers,
        _configuration(context, workers),
        problems=_sentences(context.view),
    )
    notes = ["the configuration of HAProxy was not read"] if workers and not seen.configuration else []
    try:
        kept = frozenset(words for family in Family for words in l7_network.kept(family))
    except NetlinkError as error:
        kept = frozenset()
        notes.append(f"addresses, rules and routes were not looked at: {error}")
    return replace(
        seen,
        kept=kept,
        listeners=tuple(_listeners(context, seen.port)),
        obstacles=l7_network.obstacles(seen.transparent, context.proc("sys/net/ipv4/conf")),
        notes=tuple(notes),
    )


def _sentences(view: View | None) -> tuple[str, ...]:
    return tuple(p for p in view.problems if any(w in p for w in L7_WORDS)) if view else ()


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _workers(context: Context) -> Iterator[Process]:
    """Yield HAProxy's processes in this network namespace that have our group."""
    here = context.proc("thread-self/ns/net")
    for path in context.proc().glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() != PROGRAM or not (path.parent / "ns/net").samefile(here):
                continue
            status = dict(
                line.split(":", 1)
                for line in (path.parent / "status").read_text().splitlines()
                if ":" in line
            )
            if str(OWNER) in status["Gid"].split():
                stat = (path.parent / "stat").read_text().rpartition(")")[2].split()
                memory = int(status["VmRSS"].split()[0]) << 10
                yield Process(int(path.parent.name), int(status["PPid"]), int(stat[19]), memory)
        except (OSError, KeyError):
            continue  # it has ended, or ends


def _configuration(context: Context, workers: tuple[Process, ...]) -> str:
    """Return the text that HAProxy was started with: its command line has the file."""
    for worker in workers:
        for number in (worker.parent, worker.number):
            try:
                words = context.proc(str(number), "cmdline").read_text().split("\0")
                return (context.root / Path(words[words.index("-f") + 1]).relative_to("/")).read_text()
            except (OSError, ValueError, IndexError):
                continue
    return ""


def _listeners(context: Context, port: int) -> Iterator[tuple[str, int, str]]:
    """Yield addresses that somebody listens on with TCP and this port, and whose they are.

    Source: Documentation/networking/proc_net_tcp: an address is words in the host's byte order.
    """
    found: list[tuple[str, str]] = []
    for family, name in ((Family.V4, "tcp"), (Family.V6, "tcp6")):
        path = context.proc("thread-self/net", name)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            address, _, number = words[1].partition(":")
            if words[3] == LISTENING and int(number, 16) == port:
                raw = bytes.fromhex(address)
                parts = struct.unpack(f">{len(raw) // 4}I", raw)
                found.append((inet_ntop(family.af, struct.pack(f"={len(parts)}I", *parts)), words[9]))
    owners = _owners(context, {f"socket:[{inode}]" for _, inode in found})
    yield from ((address, port, owners.get(f"socket:[{inode}]", "")) for address, inode in found)


def _owners(context: Context, wanted: Set[str]) -> dict[str, str]:
    """Return the names of the programs that have sockets open."""
    found: dict[str, str] = {}
    for path in context.proc().glob("[0-9]*/fd/*") if wanted else ():
        try:
            target = str(path.readlink())
            if target in wanted:
                found[target] = (path.parents[1] / "comm").read_text().strip()
        except OSError:
            continue  # it has been closed
    return found


def check(context: Context) -> Check:
    """Look at HAProxy and what it needs, and judge it."""
    return judge(look(context))
