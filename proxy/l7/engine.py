"""HAProxy, brought to what services ask for: started, changed while it runs, reloaded where it has to be.

    bring(backends) ─┬─ none runs: start
                     ├─ another structure: check, write, reload the master: a new worker, the old one drains
                     └─ endpoints and routes: commands to the worker

Used by one thread, but for `ask`, `alive` and `problems`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from msgspec import structs

from proxy.l7 import process, runtime
from proxy.l7.model import Backend, Backends, Route, Server
from proxy.l7.policy import Protocol
from proxy.l7.render import Settings, backend_at, render, routes_of, structure_digest
from proxy.l7.runtime import CommandError, Session

log = logging.getLogger("podwire.l7")

START_SECONDS = 20.0
"""How long a worker may take to answer first."""
END_SECONDS = 5.0
POLL_SECONDS = 0.005
AGAIN_SECONDS = 60.0
"""After this, what HAProxy has refused is tried again: a file may be there by then."""

_PLACE = re.compile(r"parsing \[[^\]]*:(\d+)\]")
_NAMED = re.compile(r"(?:[Bb]ackend|[Pp]roxy) '([^']+)'|'([^'/]+)/[^']+'")


class EngineError(Exception):
    """HAProxy cannot be started, or does not take a configuration that it has checked."""


class Engine:
    """A node's HAProxy. It goes on when the daemon ends, and the next one adopts it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reloads = 0
        self.starts = 0
        self._process: process.Watched | None = None
        self._ended: Callable[[], None] | None = None
        self._digest = ""  # of the structure that the worker has
        self._wanted: Backends | None = None  # as brought last, all of it
        self._served: Backends = {}  # what of it HAProxy has
        self._ready: dict[str, set[Server]] = {}
        self._held: dict[str, set[Server]] = {}  # removed, but for connections that they have yet
        self._routes: dict[Protocol, Mapping[str, str]] = {}
        self._refused: dict[str, tuple[Backend, str]] = {}
        self._tried = 0.0  # when a configuration was checked last

    @property
    def alive(self) -> bool:
        """Whether HAProxy runs."""
        found = self._process
        return found is not None and found.running

    @property
    def problems(self) -> tuple[str, ...]:
        """What is left out, in sentences."""
        return tuple(
            f"{b.service}: HAProxy refuses what it asks for: {told}" for b, told in self._refused.values()
        )

    @property
    def text(self) -> str:
        """The configuration of what is served now, as the next reload would write it."""
        return render(self._served, self.settings) if self._served else ""

    def ask(self, command: str) -> str:
        """Return the worker's answer to a command. Raises OSError where none answers."""
        return runtime.ask(self.settings.worker_socket, command)

    def on_end(self, call: Callable[[], None]) -> None:
        """Have a function called, in a thread of its own, when HAProxy ends by itself, now or later."""
        self._ended = call
        if self._process:
            self._process.on_end(call)

    def adopt(self) -> bool:
        """Go on with the HAProxy that a process before this one has started; return whether there is one."""
        try:
            pid = self._master()
            worker = runtime.worker_of(self.ask("show info"))
            self._process = process.Watched(pid)
        except (OSError, CommandError):
            return False
        if self._ended:
            self._process.on_end(self._ended)
        self._digest = worker.description
        try:
            self._read()
        except (OSError, CommandError) as error:
            log.info("the HAProxy that runs is reloaded: %s", error)
            self._digest = ""
        return True

    def bring(self, backends: Backends) -> frozenset[str]:
        """Have HAProxy serve these; return the names of those that it does: others are in `problems`.

        Raises EngineError or OSError where it serves what it did before, or does not run.
        """
        if self._settled(backends):
            self.settle()
            return frozenset(self._served)
        self._wanted = None  # until it is done
        again = time.monotonic() - self._tried > AGAIN_SECONDS
        accepted = {n: b for n, b in backends.items() if again or not self._is_refused(b)}
        self._refused = {n: r for n, r in self._refused.items() if n in backends and n not in accepted}
        if not self.alive or not (self._is_structure(accepted)):
            self._load(accepted)
        else:
            self._change(accepted)
        self._wanted = dict(backends)
        return frozenset(self._served)

    def settle(self) -> None:
        """Remove endpoints that were removed before, but had connections then."""
        process.trim_messages(self.settings)
        if not any(self._held.values()):
            return
        with Session(self.settings.worker_socket) as session:
            for name, servers in self._held.items():
                for server in tuple(servers):
                    with contextlib.suppress(CommandError):
                        session.do(runtime.delete_server(name, server))
                        servers.remove(server)

    def stop(self) -> None:
        """End HAProxy, with all connections, and remove its files."""
        if self._process:
            self._process.forget()
            self._process.end(END_SECONDS)
            self.close()
        self._end_strays()
        for path in (
            self.settings.worker_socket,
            self.settings.master_socket,
            self.settings.configuration,
            *map(self.settings.map_of, Protocol),
        ):
            path.unlink(missing_ok=True)
        self._digest, self._served, self._wanted = "", {}, None

    def _end_strays(self) -> None:
        for stray in process.strays(self.settings):
            log.warning("a HAProxy that could not be adopted is ended", extra={"pid": stray.pid})
            stray.end(END_SECONDS)
            stray.close()

    def close(self) -> None:
        """Look after HAProxy no longer; it goes on."""
        if self._process:
            self._process.close()
            self._process = None

    def _settled(self, backends: Backends) -> bool:
        due = self._refused and time.monotonic() - self._tried > AGAIN_SECONDS
        return self.alive and bool(self._digest) and not due and backends == self._wanted

    def _is_structure(self, backends: Backends) -> bool:
        """Whether only endpoints and routes differ from what the worker has."""
        served = self._served
        if self._digest and backends.keys() == served.keys():
            known = ((b, served[name]) for name, b in backends.items())
            if all((b.policy, b.service, b.family) == (s.policy, s.service, s.family) for b, s in known):
                return True
        return structure_digest(backends, self.settings) == self._digest

    def _is_refused(self, backend: Backend) -> bool:
        known = self._refused.get(backend.name)
        return known is not None and known[0] == _policy_of(backend)

    # A start, or another structure.

    def _load(self, backends: Backends) -> None:
        """Write files that HAProxy can use, and have it use them."""
        if not backends and not self.alive:
            self._served = {}
            return
        process.prepare(self.settings)
        accepted = self._checked(backends)
        digest = structure_digest(accepted, self.settings)
        if not accepted and not self.alive:
            self._served = {}
            return
        if not self.alive or digest != self._digest:
            self._draft.replace(self.settings.configuration)
            if self.alive:
                self._reload(digest)
            else:
                self._start(digest)
            self._loaded(accepted, digest)
        else:
            self._change(accepted)

    @property
    def _draft(self) -> Path:
        return self.settings.configuration.with_suffix(".new")

    def _checked(self, backends: Backends) -> Backends:
        """Write a configuration of all but those that HAProxy refuses; return what is in it."""
        self._tried = time.monotonic()
        accepted = dict(backends)
        while wrong := self._write(accepted):
            blamed = _culprits(self._draft.read_text(), wrong, accepted)
            if not blamed:
                blamed = self._one_by_one(accepted, wrong)
            for name, told in blamed.items():
                self._refused[name] = (_policy_of(accepted.pop(name)), told)
                log.warning("HAProxy refuses a service: %s: %s", name, told)
        return accepted

    def _write(self, backends: Backends) -> tuple[str, ...]:
        """Write a draft and the maps that it reads; return what HAProxy finds wrong with it."""
        for protocol in Protocol:
            lines = "".join(
                f"{key} {name}\n" for key, name in routes_of(backends, protocol, self.settings).items()
            )
            _replace(self.settings.map_of(protocol), lines)
        _replace(self._draft, render(backends, self.settings))
        return process.check(self.settings, self._draft) if backends else ()

    def _one_by_one(self, backends: Backends, wrong: tuple[str, ...]) -> dict[str, str]:
        """Find who is refused when HAProxy does not say: one of them, in as many halves as it takes."""
        suspects, told = dict(backends), wrong
        while len(suspects) > 1:
            names = sorted(suspects)
            half = {name: suspects[name] for name in names[: len(names) // 2]}
            if found := self._write(half):
                suspects, told = half, found
            else:
                suspects = {n: b for n, b in suspects.items() if n not in half}
                told = self._write(suspects)
                if not told:
                    raise EngineError(f"HAProxy refuses all services together: {'; '.join(wrong)}")
        if self._write({}) or not suspects:
            raise EngineError(f"HAProxy refuses its configuration: {'; '.join(told)}")
        return dict.fromkeys(suspects, told[0])

    def _start(self, digest: str) -> None:
        self.close()
        self._end_strays()
        place = _size(self.settings.messages)
        self._process = process.start(self.settings)
        self.starts += 1
        try:
            self._await(digest, other_than=0)
        except EngineError as error:
            self._process.end(END_SECONDS)
            self.close()
            told = process.alerts(_after(self.settings.messages, place))
            raise EngineError(f"{error}: {'; '.join(told)}" if told else str(error)) from None
        if self._ended:
            self._process.on_end(self._ended)

    def _reload(self, digest: str) -> None:
        """Have the master start a worker with the new files; it takes over the listening sockets."""
        before = runtime.worker_of(self.ask("show info")).pid
        place = _size(self.settings.messages)
        # The answer is that the connection ends.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            runtime.ask(self.settings.master_socket, "reload")
        self.reloads += 1
        try:
            self._await(digest, other_than=before)
        except EngineError as error:
            self._digest = ""
            told = process.alerts(_after(self.settings.messages, place))
            raise EngineError(f"{error}: {'; '.join(told)}" if told else str(error)) from None

    def _master(self) -> int:
        """Return the master's process, if it answers."""
        return runtime.master_of(runtime.ask(self.settings.master_socket, "show proc"))

    def _await(self, digest: str, other_than: int) -> None:
        """Wait until a new worker answers, and the master."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError, CommandError):
                worker = runtime.worker_of(self.ask("show info"))
                if worker.pid != other_than and worker.description == digest:
                    self._master()
                    return
            if not self.alive:
                raise EngineError("HAProxy has ended at its start")
            time.sleep(POLL_SECONDS)
        raise EngineError(f"HAProxy's new worker does not answer within {START_SECONDS:.0f} s")

    def _loaded(self, backends: Backends, digest: str) -> None:
        self._digest, self._served = digest, backends
        self._ready = {name: set(backend.servers) for name, backend in backends.items()}
        self._held = {name: set() for name in backends}
        self._routes = {protocol: routes_of(backends, protocol, self.settings) for protocol in Protocol}

    # The same structure.

    def _read(self) -> None:
        """Find out which endpoints and routes the worker has."""
        self._ready, self._held = {}, {}
        for state in runtime.server_states(self.ask("show servers state")):
            kept = self._ready if state.ready else self._held
            kept.setdefault(state.backend, set()).add(state.server)
        known = self.ask("show map")
        for protocol in Protocol:
            path = str(self.settings.map_of(protocol))
            self._routes[protocol] = (
                runtime.map_entries(self.ask(f"show map {path}")) if path in known else {}
            )

    def _change(self, backends: Backends) -> None:
        """Have the worker have these endpoints and routes; reload where it does not take them."""
        try:
            with Session(self.settings.worker_socket) as session:
                changed = {n: b for n, b in backends.items() if b is not self._served.get(n)}
                for name, backend in changed.items():
                    self._add(session, name, backend)
                if any(b.routes != self._routes_of(n) for n, b in changed.items()):
                    for protocol in Protocol:
                        self._lead(session, protocol, routes_of(backends, protocol, self.settings))
                for name, backend in changed.items():
                    self._hold(session, name, set(backend.servers))
            self._served = backends
            self.settle()
        except (CommandError, OSError) as error:
            log.warning("HAProxy is reloaded, as it does not take a change: %s", error)
            self._digest = ""
            self._load(backends)

    def _routes_of(self, name: str) -> tuple[Route, ...]:
        """Return the routes that a backend has had; none of one that is new here, as after an adoption."""
        known = self._served.get(name)
        return known.routes if known else ()

    def _add(self, session: Session, name: str, backend: Backend) -> None:
        ready, held = self._ready.setdefault(name, set()), self._held.setdefault(name, set())
        for server in backend.servers:
            if server in held:
                session.do(runtime.resume_server(name, server))
                held.remove(server)
            elif server not in ready:
                for command in runtime.add_server(backend, server, self.settings.authorities):
                    session.do(command)
            ready.add(server)

    def _hold(self, session: Session, name: str, wanted: Set[Server]) -> None:
        ready, held = self._ready[name], self._held[name]
        for server in sorted(ready - wanted):
            session.do(runtime.hold_server(name, server))
            ready.remove(server)
            held.add(server)

    def _lead(self, session: Session, protocol: Protocol, routes: Mapping[str, str]) -> None:
        before, path = self._routes.get(protocol, {}), self.settings.map_of(protocol)
        changed = before.items() ^ routes.items()
        if not changed:
            return
        if len({key for key, _ in changed}) == 1:
            commands = runtime.change_map(path, before, routes)
        else:
            commands = runtime.replace_map(path, session.new_version(path), routes)
        for command in commands:
            session.do(command)
        self._routes[protocol] = routes


def _policy_of(backend: Backend) -> Backend:
    """Return a backend without what changes while HAProxy runs."""
    return structs.replace(backend, routes=(), servers=())


def _culprits(text: str, wrong: tuple[str, ...], backends: Backends) -> dict[str, str]:
    """Return which backends HAProxy complains of, each with the first complaint."""
    found: dict[str, str] = {}
    for told in wrong:
        place, named = _PLACE.search(told), _NAMED.search(told)
        name = backend_at(text, int(place[1])) if place else ""
        if name not in backends and named:
            name = named[1] or named[2]
        if name in backends:
            found.setdefault(name, _PLACE.sub("", told).removeprefix(" : ").strip())
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: who reads it reads the old or the new one."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(text)
    staging.replace(path)


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _after(path: Path, place: int) -> str:
    with open(path, "rb") as file:
        file.seek(min(place, os.fstat(file.fileno()).st_size))
        return file.read().decode(errors="replace")
