"""The L7 proxy of this node: HAProxy brought to what services ask for, and the kernel told what it serves.

    Syncer ── take(backends) ──▶ L7's own thread ── bring ──▶ HAProxy
       ▲                              │
       └──── again(services) ─────────┘   when HAProxy serves something more, or less: `leads` says what

The kernel leads to HAProxy only what HAProxy has: a service that is new there is balanced without it until
then. What HAProxy no longer has to serve leaves it after the kernel has stopped leading there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import msgspec

from netlink.errors import NetlinkError
from netlink.family import Family
from node import l7_network
from node.l7_stats import Sampler
from node.logs import fields
from proxy.frontends import owner_of
from proxy.l7 import process, runtime
from proxy.l7.engine import Engine, EngineError
from proxy.l7.model import Backend, Backends, Route
from proxy.l7.stats import Kind, rows
from proxy.model import ObjectName

log = logging.getLogger("podwire.l7")

KEEP_SECONDS = 5.0
"""How often it is looked whether addresses and rules are there, and what is to go has no connections left."""
RETRY_SECONDS = (0.2, 30.0)
"""First and longest wait after HAProxy ended, or could not be brought to something."""
SERVED = "served.json"
"""In HAProxy's folder: what the kernel was led to last, for a daemon that starts anew."""

Served = dict[str, tuple[Route, ...]]
"""Backends that HAProxy has with at least one endpoint, and the routes that it has of each."""

_SERVED = msgspec.json.Decoder(Served)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the syncer asked for last."""

    backends: Backends
    families: Set[Family]


class L7:
    """HAProxy and its thread. `again` is called with services whose frontends are to be looked at anew."""

    def __init__(self, engine: Engine, again: Callable[[Set[ObjectName]], None]) -> None:
        self._engine, self._again = engine, again
        self._changed = threading.Condition()
        self._wanted: Wanted | None = None
        self._done: Wanted | None = None  # tried, at least
        self._ended = False  # HAProxy, by itself
        self._stopped = False
        self._leaving = False
        self._served: Served = {}
        self._known: Served = {}  # what was served at some time, and is wanted yet
        self._failing = False
        self._transparent = False  # since HAProxy was started: a worker before may have such connections
        self._problems: tuple[str, ...] = ()
        self._stack = contextlib.ExitStack()
        self._sampled = False
        self._thread = threading.Thread(target=self._run, name="l7")
        self.sampler = Sampler(engine.settings.sample_socket, lambda: self.backends)
        self.restarts = 0

    def start(self) -> None:
        """Go on with the HAProxy of before, if there is one."""
        self._known = _load(self._engine.settings.directory / SERVED)
        if self._engine.adopt():
            self._served = self._known
            log.info("the HAProxy of before goes on", extra=fields(backends=len(self._served)))
        self._engine.on_end(self._note_end)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; HAProxy goes on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._engine.close()
        self._stack.close()

    def leave(self) -> frozenset[ObjectName]:
        """HAProxy is going to end with this process: lead nobody there who can do without, for good.

        Return the services whose frontends are to be looked at for that.
        """
        self._leaving = True
        return frozenset(owner_of(b.service) for b in self.backends.values())

    def take(self, backends: Backends, families: Set[Family]) -> None:
        """Let HAProxy have these; what the kernel no longer leads there may end in it from now on."""
        with self._changed:
            if self._wanted is None or self._wanted.backends != backends or self._wanted.families != families:
                self._wanted = Wanted(backends, families)
                self._changed.notify_all()

    def leads(self, backend: Backend, route: Route) -> bool:
        """Whether packets for a route of a backend are for the proxy now; for any thread.

        A service that fails closed is the proxy's also while that does not run: nobody answers then. Before
        the proxy had it for the first time it is balanced without, unless the proxy cannot have it.
        """
        if route in self._served.get(backend.name, ()) and not self._leaving:
            return True
        return not backend.policy.fail_open and (self._failing or route in self._known.get(backend.name, ()))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences; for any thread."""
        return self._problems

    @property
    def up(self) -> bool:
        """Whether HAProxy runs."""
        return self._engine.alive

    @property
    def backends(self) -> Backends:
        """What services ask for."""
        return self._wanted.backends if self._wanted else {}

    @property
    def served(self) -> Set[str]:
        """What packets are led to."""
        return self._served.keys()

    @property
    def reloads(self) -> int:
        """How often HAProxy has taken another configuration."""
        return self._engine.reloads

    def ask(self, command: str) -> str:
        """Return HAProxy's answer. Raises OSError where it gives none."""
        return self._engine.ask(command)

    def configuration(self) -> str:
        """Return the text in force; "" where there is none."""
        return self._engine.text

    def _note_end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        wait, due = RETRY_SECONDS[0], 0.0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or self._ended or self._wanted not in (None, self._done),
                    timeout=max(0.0, due - time.monotonic()),
                )
                if self._stopped:
                    return
                wanted, ended, self._ended = self._wanted, self._ended, False
            if ended:
                log.warning("HAProxy has ended by itself; it is started again")
                self.restarts += 1
                self._serve({})
            try:
                self._bring(wanted)
            except Exception as error:  # a fault of ours, too, must not end it
                self._fail(error, wait)
                due, wait = time.monotonic() + wait, min(2 * wait, RETRY_SECONDS[1])
            else:
                due, wait = time.monotonic() + KEEP_SECONDS, RETRY_SECONDS[0]
            self._done = wanted

    def _bring(self, wanted: Wanted | None) -> None:
        """Have addresses, rules and HAProxy as wanted, then lead the kernel there."""
        if wanted is None:
            return
        backends = wanted.backends
        if not backends:
            self._end_if_idle()
            return
        asked = any(b.policy.transparent for b in backends.values())
        self._transparent = asked or (self._transparent and self._engine.alive)
        backends, refused = self._with_network(wanted)
        self._sample()
        served = self._engine.bring(backends)
        self._problems = (*self._engine.problems, *refused, *l7_network.obstacles(asked))
        self._failing = False
        self._serve({n: backends[n].routes for n in served if backends[n].servers})

    def _with_network(self, wanted: Wanted) -> tuple[Backends, tuple[str, ...]]:
        """Have addresses and rules; return the backends that can be served with them, and what cannot.

        A kernel may lack what transparent services need: the others are served all the same.
        """
        try:
            l7_network.ensure(wanted.families, transparent=self._transparent)
        except NetlinkError as error:
            if not self._transparent:
                raise
            l7_network.ensure(wanted.families, transparent=False)
            lost = sorted({b.service for b in wanted.backends.values() if b.policy.transparent})
            told = tuple(f"{name} cannot be transparent, and is not proxied: {error}" for name in lost)
            return {n: b for n, b in wanted.backends.items() if not b.policy.transparent}, told
        return wanted.backends, ()

    def _end_if_idle(self) -> None:
        """End HAProxy when nobody asks for it any more, and its last connection has ended."""
        self._serve({})
        self._problems, self._failing = (), False
        if self._engine.alive and self._is_idle():
            log.info("no service asks for the L7 proxy any more: HAProxy is ended")
            self._engine.stop()
            l7_network.remove()

    def _is_idle(self) -> bool:
        """Whether no client has a connection, be it to a worker that was replaced."""
        processes = runtime.ask(self._engine.settings.master_socket, "show proc")
        replaced = processes.partition("# old workers")[2].partition("# programs")[0].strip()
        connections = (row.connections for row in rows(self.ask("show stat")) if row.kind is Kind.FRONTEND)
        return not any(connections) and not replaced

    def _sample(self) -> None:
        """Take lines of the sample from now on."""
        if not self._sampled:
            process.prepare(self._engine.settings)
            self._stack.enter_context(self.sampler)
            self._sampled = True

    def _fail(self, error: Exception, wait: float) -> None:
        known = isinstance(error, EngineError | NetlinkError | OSError)
        sentence = f"the L7 proxy does not do what services ask for: {error if known else repr(error)}"
        log.error("%s; trying again in %.1f s", sentence, wait, exc_info=not known)
        self._problems, before, self._failing = (sentence,), self._failing, True
        self._serve(self._served if self._engine.alive else {})
        if not before:
            closed = {b.service for b in self.backends.values() if not b.policy.fail_open}
            self._again({owner_of(title) for title in closed})

    def _serve(self, served: Served) -> None:
        """Let the kernel lead there, and nowhere else."""
        before, self._served = self._served, served
        changed = {n for n in before.keys() | served.keys() if before.get(n) != served.get(n)}
        if not changed:
            return
        wanted = self.backends
        self._known = {n: r for n, r in {**self._known, **served}.items() if n in wanted}
        _save(self._engine.settings.directory / SERVED, self._known)
        log.info("the L7 proxy serves", extra=fields(backends=len(served)))
        self._again({owner_of(wanted[name].service) for name in changed if name in wanted})


def _load(path: Path) -> Served:
    try:
        return _SERVED.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return {}


def _save(path: Path, served: Served) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_bytes(msgspec.json.encode(served))
    staging.replace(path)
