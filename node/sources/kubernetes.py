"""The Kubernetes API as the source: Services, EndpointSlices and Nodes, followed by a thread each.

Nothing is delivered before all three are known, as a part would look like objects that are gone. While the
server is away at the start, the state that was saved last counts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from node.kube.api import Api, Credentials
from node.metrics import Followed
from node.sources import saved
from node.sources.objects import HEADLESS, OTHER_PROXY, Object
from node.sources.reflector import Delivery, Reflector, Resource, Timing
from node.store import Identity, Store

log = logging.getLogger("podwire.source")

NOT_OURS = f"!{OTHER_PROXY},!{HEADLESS}"
"""What kube-proxy leaves to others: the server does not even send it."""
RESOURCES = (
    Resource("Service", "/api/v1/services", NOT_OURS, "spec.clusterIP!=None"),
    Resource("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices", NOT_OURS),
    Resource("Node", "/api/v1/nodes"),
)
PATIENCE = 3.0
"""Seconds that the server may take to answer before the saved state counts."""
SAVE_SECONDS = 60.0
SILENT_SECONDS = 10.0
"""How long following may fail before people are told."""


@dataclass(frozen=True, slots=True)
class KubernetesConfig:
    """Where the API server is, and what we may do there.

    `api_override` is used instead of the server that kubeconfig or environment name. `namespace` is where
    our claims of podCIDRs are; `cluster_cidrs`, at most one per IP family, is what they are taken from (none:
    a controller gives them), in blocks of `mask_sizes` (IPv4, IPv6).
    """

    kubeconfig: Path | None
    api_override: str = ""
    namespace: str = "kube-system"
    cluster_cidrs: tuple[str, ...] = ()
    mask_sizes: tuple[int, int] = (24, 64)

    @property
    def credentials(self) -> Credentials:
        """What to connect with."""
        return Credentials(self.kubeconfig, self.api_override)


class Cluster:
    """Follows the cluster for one node; `run` is for a thread of its own."""

    def __init__(
        self,
        api: Api,
        store: Store,
        node: str,
        state_dir: Path,
        timing: Timing = Timing(),  # noqa: B008 (a frozen value)
    ) -> None:
        self.api = api
        self._store, self._node, self._state_dir = store, node, state_dir
        self._stopped = threading.Event()
        self._first: dict[str, dict[Identity, Object]] = {}
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self._restored = ""  # what is told while the server has not answered
        self._has_saved = False
        self._unsaved = False
        self._reflectors = [Reflector(api, r, self._take, self._stopped, timing) for r in RESOURCES]

    @property
    def complete(self) -> bool:
        """Whether the server has told everything at least once since the start."""
        return self._complete.is_set()

    @property
    def described(self) -> str:
        """Where objects come from, and since when nothing was heard from there."""
        heard = min((r.state.heard for r in self._reflectors), default=0.0)
        age = f"heard {time.monotonic() - heard:.0f} s ago" if heard else "not heard yet"
        counts = "" if self._complete.is_set() else "; the saved state counts" if self._has_saved else ""
        return f"API server {self.api.server}, {age}{counts}"

    @property
    def followed(self) -> dict[str, Followed]:
        """How each kind is followed; for any thread."""
        now, found = time.monotonic(), {}
        for reflector in self._reflectors:
            state = reflector.state
            failing = 0.0 if state.failing_since is None else now - state.failing_since
            silence = now - state.heard if state.heard else None
            found[reflector.kind] = Followed(state.lists, state.watches, state.failures, failing, silence)
        return found

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences."""
        found = [self._restored] if self._restored else []
        now = time.monotonic()
        for reflector in self._reflectors:
            state = reflector.state
            if state.failing_since is not None and now - state.failing_since > SILENT_SECONDS:
                since = _clock(time.time() - (now - state.failing_since))
                found.append(f"what was known at {since} counts, as the API server fails: {state.error}")
            found += [sentence for sentences in tuple(state.wrong.values()) for sentence in sentences]
        return tuple(dict.fromkeys(found))

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Follow until `stopped`, which waits so many seconds, says so; save the state now and then."""
        threads = [threading.Thread(target=r.run, name="reflector", daemon=True) for r in self._reflectors]
        for thread in threads:
            thread.start()
        began = saved_at = time.monotonic()
        while not stopped(0.1):
            now = time.monotonic()
            if not self._complete.is_set() and not self._restored and now - began > PATIENCE:
                self._restore()
            if self._unsaved and now - saved_at > SAVE_SECONDS:
                self._save()
                saved_at = now
        self._stopped.set()
        for reflector in self._reflectors:
            reflector.end()
        if self._unsaved:
            self._save()

    def _take(self, delivery: Delivery) -> None:
        """Hand on what a reflector has, once all have told everything."""
        with self._lock:
            self._unsaved = True
            if self._complete.is_set():
                if delivery.complete:
                    self._store.relist(delivery.kind, delivery.changes, delivery.keep)
                else:
                    self._store.update(delivery.changes)
                return
            known = {} if delivery.complete else self._first.get(delivery.kind, {})
            for name, value in delivery.changes.items():
                known.pop(name, None)
                if value is not None:
                    known[name] = value
            self._first[delivery.kind] = known
            if len(self._first) == len(RESOURCES):
                self._store.replace({n: v for found in self._first.values() for n, v in found.items()})
                self._first, self._restored = {}, ""
                self._complete.set()

    def _restore(self) -> None:
        """Let the saved state count until the server answers."""
        error = next((r.state.error for r in self._reflectors if r.state.error), "no answer yet")
        objects: dict[Identity, Object] | None = None
        try:
            objects, written = saved.load(self._state_dir, self._node)
            sentence = f"the state of {_clock(written)} counts until the API server answers: {error}"
        except saved.SavedError as reason:
            sentence = f"nothing is known of the cluster: {error}; {reason}"
        with self._lock:
            if self._complete.is_set():  # meanwhile
                return
            if objects is not None:
                self._store.replace(objects)
                self._has_saved = True
            self._restored = sentence
        log.warning("%s", sentence)

    def _save(self) -> None:
        self._unsaved = False
        if not self._complete.is_set():
            return
        try:
            saved.save(self._state_dir, self._node, self._store.objects, time.time())
        except OSError as error:
            log.warning("the state of the cluster cannot be saved: %s", error)


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
