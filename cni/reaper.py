"""Remove the interfaces of released attachments in the background, and finish what a crash left.

Removing a veth pair costs the kernel about 20 ms; DEL does not wait for it. The address is not given
again before its interface is gone, because the ledger keeps the record until then.
"""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Self

from cni.plugin import finish
from ipam.ledger import Attachment, Ledger, State
from ipam.lock import LockTimeout, container_lock

log = logging.getLogger("podwire.cni")


class Reaper:
    """A thread that takes back one attachment after the other."""

    def __init__(self, ledger: Ledger, state_dir: Path) -> None:
        self._ledger = ledger
        self._state_dir = state_dir
        self._queue: queue.SimpleQueue[Attachment | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="reaper")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, attachment: Attachment) -> None:
        """Take back an attachment soon."""
        self._queue.put(attachment)

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
        while (attachment := self._queue.get()) is not None:
            try:
                finish(self._ledger, self._state_dir, attachment.key)
            except Exception as error:  # whatever it is, the next one must not wait for it
                # The record stays released: the next ADD that needs the address, or start, tries again.
                log.error("the interface %s could not be removed: %s", attachment.host_ifname, error)
