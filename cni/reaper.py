"""What DEL and ADD leave for later: removing interfaces, forgetting stale connections; and what a crash left.

Removing a veth pair costs the kernel about 20 ms, looking for connections 10 ms; nobody waits for either. An
address is not given again before its interface is gone, because the ledger keeps the record until then. The
thread's idle moments go to SQLite's checkpoints, which would cost an ADD up to 100 ms on a slow disk, and to
collecting what pods that came and went left in memory.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from cni.plugin import finish, forget_stale_flows
from cni.rules import Rules
from ipam.ledger import Attachment, Ledger, LedgerError, State
from ipam.lock import LockTimeout, container_lock

log = logging.getLogger("podwire.cni")

IDLE_SECONDS = 2.0
"""How long there is nothing to do before the thread writes the ledger's log back and tidies memory."""


class Reaper:
    """A thread that does one thing after the other; `rules` are the daemon's, which counts its changes."""

    def __init__(self, ledger: Ledger, state_dir: Path, rules: Rules | None = None) -> None:
        self._ledger = ledger
        self._state_dir = state_dir
        self._rules = rules
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="reaper")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, attachment: Attachment) -> None:
        """Take back an attachment soon."""
        self._queue.put(partial(finish, self._ledger, self._state_dir, attachment.key, rules=self._rules))

    def settle(self, attachment: Attachment) -> None:
        """Forget connections to an attachment's host ports that lead elsewhere, soon."""
        self._queue.put(partial(forget_stale_flows, attachment))

    def recover(self) -> None:
        """Finish what earlier processes did not: ADDs that died half way, DELs whose link is still there."""
        for attachment in self._ledger.attachments():
            if attachment.state is State.ATTACHED:
                continue
            if attachment.state is State.PENDING and not self._abandon(attachment):
                continue
            self.submit(attachment)

    def _abandon(self, attachment: Attachment) -> bool:
        """Release an attachment whose ADD died; False when somebody is still working on it."""
        try:
            with container_lock(self._state_dir, attachment.key.container_id, timeout=0):
                current = self._ledger.get(attachment.key)
                if current is None or current.state is not State.PENDING:
                    return False
                self._ledger.release(attachment.key)
        except LockTimeout:
            return False
        log.info("an ADD of %s had died half way: taken back", attachment.key.container_id)
        return True

    def _work(self) -> None:
        worked = False
        while True:
            try:
                work = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._checkpoint()
                if worked:
                    gc.collect()
                worked = False
                continue
            if work is None:
                return
            worked = True
            try:
                work()
            except Exception as error:  # whatever it is, the next one must not wait for it
                # A record stays released: the next ADD that needs the address, or start, tries again.
                log.error("what was left for later could not be done: %s", error)

    def _checkpoint(self) -> None:
        try:
            self._ledger.checkpoint()
        except LedgerError as error:
            log.warning("%s", error)
