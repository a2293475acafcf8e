"""The daemon: composed of a source, the syncer, the CNI plugin and the servers, each in its threads.

Start adopts what the kernel and the ledger hold; stop leaves both as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from netaddr import IPNetwork

from cni import install
from cni.plugin import Plugin, ledger_of, rules_for
from cni.reaper import Reaper
from cni.rules import RulesError
from ipam.ledger import Ledger, LedgerError, State
from ipam.pools import groups
from node import underlay, web
from node.healthchecks import HealthChecks
from node.keeper import Keeper
from node.metrics import Metrics
from node.server import CniService, InspectService, serving
from node.sources.manifests import Content, ManifestFolder
from node.store import Pending, Store
from node.syncer import SyncConfig, Syncer
from proxy.nftables.dataplane import Dataplane

log = logging.getLogger("podwire")

HEALTHY_LAG = 60.0
"""Seconds that a change may wait before the node is unhealthy (kube-proxy: twice its sync period)."""

RETRY_SECONDS = (0.1, 5.0)
"""First and longest wait after a failed sync."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What the command line decides. Addresses are host:port; an empty one is not served.

    `cni_conf_dir` is where the conflist goes once pods can be added; None leaves that to `podwire install`.
    """

    sync: SyncConfig
    source: Path
    state_dir: Path
    socket: Path
    metrics_address: str
    healthz_address: str
    cni_conf_dir: Path | None = None
    tcp_be_liberal: bool = False


class Daemon:
    """One node's daemon."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._stop = threading.Event()
        self._store = Store()
        self._metrics = Metrics()
        self._synced = threading.Event()
        self._pending: Pending | None = None
        self._source_failed = False
        self._announced = False  # the conflist is written

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        config = self._config
        with ExitStack() as stack:
            ledger = stack.enter_context(ledger_of(config.state_dir, background_checkpoints=True))
            if ledger.reclaimed:
                log.info("%d attachments of an earlier boot were freed", ledger.reclaimed)
            liberal = underlay.be_liberal() if config.tcp_be_liberal else []
            for problem in (*underlay.forward_packets(), *liberal):
                log.warning("%s", problem)
            reaper = stack.enter_context(Reaper(ledger, config.state_dir))
            reaper.recover()
            syncer = stack.enter_context(Syncer(config.sync, ledger))
            rules = stack.enter_context(rules_for(ledger))
            self._health = stack.enter_context(HealthChecks(self._ready))
            inspect = InspectService(config.sync, ledger, syncer, self._health, self._ready)
            keeper = Keeper(
                rules,
                intact=syncer.intact,
                commits=lambda: syncer.commits,
                mended=lambda: _forget_stale_flows(ledger, reaper),
                suspect=syncer.suspect,
            )
            plugin = Plugin(ledger, config.state_dir, reaper.submit, reaper.settle, rules)
            pages = self._pages(syncer, ledger)
            health = {path: pages[path] for path in ("/healthz", "/livez")}  # all that strangers may see
            stack.enter_context(web.serving(config.metrics_address, pages))
            stack.enter_context(web.serving(config.healthz_address, health))
            stack.enter_context(serving(config.socket, CniService(plugin), inspect))
            gc.disable()  # until the first sync: nothing that is loaded for it is garbage
            source = threading.Thread(target=self._follow, args=(inspect,), name="source")
            source.start()
            stack.callback(source.join)
            stack.callback(self._stop.set)
            self._sync_until_stopped(syncer, inspect, keeper)
        log.info("stopped; rules, routes and pods stay as they are")
        return 1 if self._source_failed else 0

    def _follow(self, inspect: InspectService) -> None:
        """Deliver the source's objects to the store; the daemon ends with it."""

        def deliver(content: Content) -> None:
            for problem in content.problems:
                if problem not in inspect.source_problems:
                    log.warning("%s", problem)
            inspect.source_problems = content.problems
            self._store.replace(content.objects)

        try:
            ManifestFolder(self._config.source).follow(deliver, self._stop.is_set)
        except Exception as error:
            log.error("the source ended: %s", error)
            self._source_failed = True
            self._stop.set()

    def _sync_until_stopped(self, syncer: Syncer, inspect: InspectService, keeper: Keeper) -> None:
        wait = RETRY_SECONDS[0]
        while not self._stop.is_set():
            pending = self._pending or self._store.take(timeout=0.2)
            if again := syncer.again():  # also while changes keep coming
                pending = _with_nodes(pending) or again
            self._pending = pending
            try:
                if not keeper.look():
                    pending = _with_nodes(pending) or syncer.compare()
                if pending is None:
                    syncer.rest()
                    continue
                self._sync(syncer, pending)
            except (OSError, LedgerError, RulesError) as error:
                log.error("sync failed, trying again in %.1f s: %s", wait, error)
                inspect.sync_problems = (f"the last change is not in the kernel: {error}",)
                self._metrics.failed()
                self._stop.wait(wait)
                wait = min(wait * 2, RETRY_SECONDS[1])
                self._pending = _merged(pending or syncer.compare(), self._store.take(timeout=0))
            else:
                self._pending, wait = None, RETRY_SECONDS[0]
                inspect.sync_problems = ()

    def _sync(self, syncer: Syncer, pending: Pending) -> None:
        first = not self._synced.is_set()
        start = time.monotonic()
        try:
            full = syncer.sync(pending)
        finally:
            gc.enable()
        self._metrics.synced(pending, time.monotonic() - start, full=full)
        self._health.update(syncer.health_checks, syncer.served_addresses)
        if first:
            self._synced.set()
            # What is here now stays: no collection needs to walk it again.
            gc.collect()
            gc.freeze()
            with contextlib.suppress(AttributeError):  # a C library without it
                ctypes.CDLL(None).malloc_trim(0)  # the load needed more than what it leaves
            log.info("ready: %d services, %d elements", syncer.status.services, syncer.elements)
        if syncer.status.ready and self._config.cni_conf_dir and not self._announced:
            # The runtime believes in a network from here on.
            log.info("wrote %s", install.install_conflist(self._config.cni_conf_dir))
            self._announced = True

    def _ready(self) -> bool:
        """Whether the first snapshot is in the kernel and changes are not stuck."""
        pending = self._pending
        oldest = pending.since if pending else self._store.oldest
        lagging = oldest is not None and time.monotonic() - oldest > HEALTHY_LAG
        return self._synced.is_set() and not lagging

    def _pages(self, syncer: Syncer, ledger: Ledger) -> dict[str, web.Page]:
        def healthz() -> tuple[int, str, bytes]:
            eligible = not syncer.status.node_deleting
            body = {
                "lastUpdated": _timestamp(syncer.status.last_sync),
                "currentTime": _timestamp(time.time()),
                "nodeEligible": eligible,
            }
            code = 200 if self._ready() and eligible else 503
            self._metrics.healthz.labels(code).inc()
            return web.document(body, code)

        def livez() -> tuple[int, str, bytes]:
            code = 200 if self._ready() else 503
            self._metrics.livez.labels(code).inc()
            return web.text("ok\n" if code == 200 else "not synced\n", code)

        def metrics() -> tuple[int, str, bytes]:
            self._metrics.services(self._store, syncer.frontends, syncer.elements)
            self._metrics.pods.set(len(ledger.attachments()))
            cidrs = tuple(IPNetwork(c) for c in syncer.status.pod_cidrs)
            ipam = self._config.sync.ipam
            for usage in ledger.usage(groups(ipam, cidrs), ipam.quarantine):
                family = f"IPv{usage.version}"
                for state in ("capacity", "used", "releasing", "quarantined", "kept"):
                    self._metrics.addresses.labels(usage.name, family, state).set(getattr(usage, state))
            return 200, "text/plain; version=0.0.4; charset=utf-8", self._metrics.page()

        def proxy_mode() -> tuple[int, str, bytes]:
            return web.text(Dataplane.name)

        return {"/healthz": healthz, "/livez": livez, "/metrics": metrics, "/proxyMode": proxy_mode}


def _forget_stale_flows(ledger: Ledger, reaper: Reaper) -> None:
    """Host ports led nowhere for a moment, and whoever sent to them is remembered so."""
    for attachment in ledger.attachments(State.ATTACHED):
        if attachment.host_ports:
            reaper.settle(attachment)


def _with_nodes(pending: Pending | None) -> Pending | None:
    """Return a change that has everything looked at as well."""
    return replace(pending, nodes=True) if pending else None


def _merged(failed: Pending, newer: Pending | None) -> Pending:
    """Return one change that stands for a failed one and what came after it."""
    if newer is None:
        return failed
    return Pending(
        newer.snapshot,
        failed.services | newer.services,
        failed.nodes or newer.nodes,
        failed.since,
        (*failed.triggered, *newer.triggered),
    )


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
