"""Processes that die where they are told to.

    python -m tests.cni.faulty shim STATE_DIR STEP     the binary without a daemon; a request as usual
    python -m tests.cni.faulty daemon STATE_DIR STEP   the daemon's CNI half; prints a line when it serves
    python -m tests.cni.faulty slow STATE_DIR STEP     as `daemon`, but at STEP it makes the file `reached`
                                                       and goes on when there is a file `go`

Both daemons make a file named after each command that they are asked.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import cni.plugin
from api import podwire_pb2_grpc as rpc
from cni import shim
from cni.plugin import Plugin, Step
from cni.reaper import Reaper
from ipam.ledger import Key, Ledger, read_boot_id
from node.server import CniService, serving

SOCKET = "podwire.sock"


def dying(wanted: str) -> Step:
    def step(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # the signal may hit another thread first

    return step


def waiting(wanted: str, state_dir: Path) -> Step:
    def step(name: str) -> None:
        if name == wanted:
            (state_dir / "reached").touch()
            while not (state_dir / "go").exists():
                time.sleep(0.002)

    return step


class AskedPlugin(Plugin):
    """A plugin that leaves a trace of each request before it works on it."""

    def handle(self, env: Mapping[str, str], stdin: bytes) -> tuple[int, bytes]:
        (self.state_dir / env["CNI_COMMAND"]).touch()
        return super().handle(env, stdin)


class SteppingLedger(Ledger):
    """A ledger that names the reaper's only step, between the link's end and the record's."""

    step: Step = staticmethod(lambda _: None)

    def forget(self, key: Key) -> None:
        self.step("link removed")
        super().forget(key)


def daemon(state_dir: Path, step: Step) -> None:
    """Serve the binary until the input ends."""
    ledger = SteppingLedger(state_dir / cni.plugin.LEDGER_FILE, boot_id=read_boot_id())
    with ledger, Reaper(ledger, state_dir) as reaper:
        reaper.recover()
        ledger.step = step
        plugin = AskedPlugin(ledger, state_dir, defer=reaper.submit, step=step)
        with serving(state_dir / SOCKET, CniService(plugin), rpc.InspectServicer()):  # type: ignore[arg-type]
            print("serving", flush=True)
            sys.stdin.read()


def main() -> None:
    kind, state_dir, step = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if kind == "shim":
        cni.plugin.Plugin = functools.partial(Plugin, step=dying(step))  # type: ignore[misc, assignment]
        shim.main(str(state_dir / SOCKET), str(state_dir))
    daemon(state_dir, waiting(step, state_dir) if kind == "slow" else dying(step))


if __name__ == "__main__":
    main()
