"""The loop that writes to the API: pod ranges, our Node object, events. Nothing waits for it.

Most rounds ask the server for nothing: only what changed is looked at, and all of it now and then.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from node.kube import own_node
from node.kube.api import Api, ApiError
from node.kube.claims import Allocator, ClusterRange
from node.kube.events import Events
from proxy.model import Node, Snapshot

log = logging.getLogger("podwire.upkeep")

ROUND_SECONDS = 10.0
PAUSE_SECONDS = 0.2
"""Between rounds, however often something changes."""
CHECK_SECONDS = 300.0
"""How often our Node is fetched though nothing that we know of changed: others may write to it."""
BACK_OFF_SECONDS = (1.0, 60.0)
POLL_SECONDS = 0.2
PASSING = (401, 404, 409, 429)
"""Refusals that are over by themselves: tokens are renewed, Nodes are made again, others were quicker."""


class View(NamedTuple):
    """What the daemon knows, as functions that may be called at any time.

    `snapshot` is None while the cluster's state is not the API's own (none yet, or one that was saved):
    nothing may be claimed by that. `ready` says whether pods can be added; `problems` are sentences;
    `annotations` are what our Node is to have beside those of tunnels, or (None) not to have.
    """

    snapshot: Callable[[], Snapshot | None]
    ready: Callable[[], bool]
    problems: Callable[[], tuple[str, ...]]
    annotations: Callable[[], Mapping[str, str | None]] = dict


class Upkeep:
    """Keeps up what this node has in the API. `run` is for a thread of its own.

    `problems` are what is wrong, in sentences.
    """

    def __init__(
        self,
        api: Api,
        node: str,
        view: View,
        ranges: Sequence[ClusterRange] = (),
        namespace: str = "kube-system",
    ) -> None:
        self._api, self._node, self._view = api, node, view
        self._allocator = Allocator(api, namespace, node, ranges)
        self._events = Events(api, node)
        self._woken = threading.Event()
        self._settled: tuple[Node, bool, Mapping[str, str | None]] | None = None
        self._settled_at = 0.0
        self._claim_problems: tuple[str, ...] = ()
        self._node_problems: tuple[str, ...] = ()
        self._refusal = ""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong; for any thread."""
        refusal = (self._refusal,) if self._refusal else ()
        return (*refusal, *self._claim_problems, *self._node_problems)

    def wake(self) -> None:
        """Look at once; for any thread, and cheap: call it after every change of Nodes or of readiness."""
        self._woken.set()

    def run(self, stopped: threading.Event) -> None:
        """Go round until stopped."""
        failures = 0
        while not stopped.is_set():
            self._woken.clear()
            try:
                self.round()
            except (ApiError, msgspec.MsgspecError) as error:
                failures += 1
                wait = pause(failures, error.retry_after if isinstance(error, ApiError) else None)
                log.debug("trying again in %.1f s: %s", wait, error)
                stopped.wait(wait)  # whatever changes meanwhile: the server has trouble
                continue
            failures = 0
            stopped.wait(PAUSE_SECONDS)
            until = time.monotonic() + ROUND_SECONDS * random.uniform(0.8, 1.2)
            while not stopped.is_set() and time.monotonic() < until and not self._woken.wait(POLL_SECONDS):
                pass

    def round(self) -> None:
        """Do what is to be done now. Raises ApiError, the last one, after all that could be done was."""
        snapshot = self._view.snapshot()
        if snapshot is None:
            return
        failed = None
        for step in (self._claim, self._settle, self._tell):
            try:
                step(snapshot)
            except ApiError as error:
                failed = error
                if error.status in (0, 429):
                    break  # the others would get the same answer
        # What the server cannot do now is said by those who follow it; what it refuses, only we know.
        refused = failed is not None and 400 <= failed.status < 500 and failed.status not in PASSING
        refusal = (
            f"node {self._node}: the API server refuses what podwire keeps there: {failed}" if refused else ""
        )
        if refusal and refusal != self._refusal:
            log.warning("%s", refusal)
        self._refusal = refusal
        if failed:
            raise failed

    def _claim(self, snapshot: Snapshot) -> None:
        served = (address for service in snapshot.services.values() for address in service.cluster_ips)
        self._claim_problems = self._allocator.settle(snapshot.nodes, served)

    def _settle(self, snapshot: Snapshot) -> None:
        me = snapshot.nodes.get(self._node)
        if me is None or me.deleting:
            return
        state = me, self._view.ready(), self._view.annotations()
        if state == self._settled and time.monotonic() - self._settled_at < CHECK_SECONDS:
            return
        self._node_problems = own_node.settle(self._api, self._node, state[1], datetime.now(UTC), state[2])
        self._settled, self._settled_at = state, time.monotonic()

    def _tell(self, snapshot: Snapshot) -> None:
        # One of those that podwire keeps up, which is seen by its annotation, tells of a Service.
        nodes = [n for n, node in snapshot.nodes.items() if node.tunnel_mac and not node.deleting]
        self._events.tell(self._view.problems(), nodes)


def pause(failures: int, retry_after: float | None = None) -> float:
    """Return how long to wait after so many failures in a row (seconds): never less than the server asks for.

    Spread widely, as all nodes fail at once.
    """
    first, longest = BACK_OFF_SECONDS
    wait: float = min(first * 2 ** (min(failures, 10) - 1), longest)
    return max(wait, retry_after or 0.0) * random.uniform(1.0, 1.5)
