"""The control channel: JSON lines on a unix socket, one command and one answer each.

It does not depend on the server's port, so that faults can be ended while that is down.
"""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tests.kubeapi.faults import Counters, Fault, Settings
from tests.kubeapi.generate import Churn, Rate
from tests.kubeapi.server import Server

Json = dict[str, Any]


class Control:
    """The commands. Each is a method; its arguments come from the line."""

    def __init__(self, server: Server, stop: Callable[[], None]) -> None:
        self._server = server
        self._churn = Churn(server.store)
        self.stop = stop

    def run(self, line: bytes) -> bytes:
        """Run one command, `{"do": NAME, ...}`; return `{"ok": ...}` or `{"error": ...}`."""
        try:
            arguments: Json = msgspec.json.decode(line)
            name = arguments.pop("do", "")
            method = getattr(self, f"do_{name}", None)
            if method is None:
                return msgspec.json.encode({"error": f"there is no command {name!r}"})
            return msgspec.json.encode({"ok": method(**arguments)})
        except Exception as error:  # whatever it is, the test has to see it
            return msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})

    def _wake(self) -> None:
        with self._server.store.changed:
            self._server.store.changed.notify_all()

    def do_address(self) -> int:
        """Return the port."""
        return self._server.address.port

    def do_fault(self, **fields: Any) -> None:
        """Put a fault in force."""
        self._server.faults.add(msgspec.convert(fields, Fault))

    def do_clear(self) -> None:
        """End all faults, also a watch's life and delays."""
        self._server.faults.clear()
        self._server.settings.watch_life = None
        self._server.settings.delay = 0.0
        self._wake()

    def do_set(self, **settings: Any) -> None:
        """Change settings."""
        known = msgspec.structs.asdict(self._server.settings)
        if unknown := settings.keys() - known.keys():
            raise ValueError(f"there is no setting {', '.join(sorted(unknown))}")
        new = msgspec.convert(known | settings, Settings, strict=False)
        for name in settings:
            setattr(self._server.settings, name, getattr(new, name))
        self._server.store.history = new.history
        self._wake()

    def do_watches(self, cut: str | None = None, stall: str | None = None, path: str | None = None) -> int:
        """Cut or stall the watches that are open now; return how many."""
        watches = self._server.faults.watching(path)
        for watch in watches:
            if stall:
                watch.stalled = stall
            if cut:
                watch.cut = cut
            if cut == "abrupt":
                watch.connection.cut()
        self._wake()
        return len(watches)

    def do_down(self) -> None:
        """Stop listening, end all connections."""
        self._server.down()

    def do_up(self) -> None:
        """Listen again."""
        self._server.up()

    def do_compact(self) -> None:
        """Forget history."""
        self._server.store.compact()

    def do_certificate(self, certificate: str, key: str) -> None:
        """Use another certificate."""
        self._server.certificate(Path(certificate), Path(key))

    def do_tokens(self, tokens: list[str]) -> None:
        """Set the tokens that count."""
        self._server.tokens = frozenset(tokens)

    def do_churn(self, **rate: Any) -> None:
        """Begin changes."""
        self._churn.start(msgspec.convert(rate, Rate))

    def do_calm(self) -> int:
        """End changes; return how many were made."""
        self._churn.stop()
        return self._churn.made

    def do_counters(self) -> Counters:
        """Return the counters."""
        server, faults = self._server, self._server.faults
        return Counters(
            verbs=dict(faults.verbs),
            paths=dict(faults.paths),
            codes=dict(faults.codes),
            watches=sorted(w.target for w in faults.watching()),
            connections=server.connections,
            version=server.store.version,
            churned=self._churn.made,
            churning=self._churn.running,
        )

    def do_requests(self) -> list[Any]:
        """Return the last requests."""
        return list(self._server.faults.log)

    def do_reset(self) -> None:
        """Set the counters to nothing."""
        self._server.faults.reset()

    def do_stop(self) -> None:
        """End the process."""
        self.stop()


class _Listener(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    control: Control


class _Handler(socketserver.StreamRequestHandler):
    server: _Listener

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(self.server.control.run(line) + b"\n")


def serve(path: Path, control: Control) -> None:
    """Serve the commands in threads of their own."""
    listener = _Listener(str(path), _Handler)
    listener.control = control
    threading.Thread(target=listener.serve_forever, name="control", daemon=True).start()
