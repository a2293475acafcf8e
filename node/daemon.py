"""The daemon: composed of a source, the syncer, the CNI plugin and the servers, each in its threads.

Start adopts what the kernel and the ledger hold; stop leaves both as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from netaddr import IPNetwork

from cni import install, sysctls
from cni.plugin import Plugin, ledger_of, rules_for
from cni.reaper import Reaper
from cni.rules import RulesError
from cni.settings import Mode
from ipam.ledger import Ledger, LedgerError, State
from ipam.pools import groups
from node import logs
from node.annotations import AnnotationFile
from node.config import ConfigError, changes, taken_over
from node.config_keys import Configuration
from node.healthchecks import HealthChecks
from node.keeper import Keeper
from node.l7 import L7
from node.l7_stats import L7Stats
from node.logs import fields
from node.notify import Notifier
from node.pacing import Pacer
from node.settings import Settings
from node.store import Pending, Store
from node.syncer import SyncConfig, Syncer
from proxy.l7.engine import Engine
from proxy.l7.render import Settings as L7Settings

if TYPE_CHECKING:
    from node import web
    from node.kube.upkeep import Upkeep
    from node.metrics import Followed, Metrics
    from node.sources.kubernetes import Cluster, KubernetesConfig
    from node.sources.manifests import Manifests

log = logging.getLogger("podwire")

HEALTHY_LAG = 60.0
"""Seconds that a change may wait before the node is unhealthy (kube-proxy: twice its sync period)."""

SERVE_SECONDS = 2.0
"""How long the first sync may take before socket and pages are served without it. What serves them is most of
what a start loads, and meanwhile the plugin does without the daemon."""

SWITCH_SECONDS = 0.0001
"""How long a thread that computes keeps the interpreter from the others. An ADD takes it dozens of times, and
with Python's 5 ms would wait for a sync each time."""

RETRY_SECONDS = (0.1, 5.0)
"""First and longest wait after a failed sync."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What the command line decides. Addresses are host:port; an empty one is not served.

    Objects come from the API server that `kubernetes` names, or else from the folder `source`.
    `cni_conf_dir` is where the conflist goes once pods can be added; None leaves that to `podwire install`.
    `l7` is how HAProxy runs; None: it does not.
    `configuration` is where all of it comes from, and `reload` reads that again; it raises ConfigError.
    """

    sync: SyncConfig
    source: Path | None
    state_dir: Path
    socket: Path
    metrics_address: str
    healthz_address: str
    cni_conf_dir: Path | None = None
    l7: L7Settings | None = None
    kubernetes: KubernetesConfig | None = None
    configuration: Configuration = field(default_factory=Configuration)
    reload: Callable[[], DaemonConfig] | None = None


class Daemon:
    """One node's daemon."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._stop = threading.Event()
        self._hangup = threading.Event()
        self._notifier = Notifier()
        self._started = False  # the service manager knows
        self._served = False  # plugin and commands reach us
        self._store = Store()
        self._synced = threading.Event()
        self._pending: Pending | None = None
        self._pacer = Pacer()
        self._trimmed = False
        self._source = self._make_source()
        self._upkeep: Upkeep | None = None
        self._l7 = L7(Engine(config.l7), self._store.again) if config.l7 else None
        self._source_failed = False
        self._sync_problem = ""
        self._announced = False  # the conflist is written
        self._published: Mapping[str, str | None] = {}
        self._annotations = AnnotationFile(config.state_dir, config.sync.node)

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        sys.setswitchinterval(SWITCH_SECONDS)
        signal.signal(signal.SIGHUP, lambda *_: self._hangup.set())
        config = self._config
        with ExitStack() as stack:
            ledger = stack.enter_context(ledger_of(config.state_dir, background_checkpoints=True))
            if ledger.reclaimed:
                log.info("attachments of an earlier boot were freed", extra=fields(number=ledger.reclaimed))
            sysctls.keep_in(config.state_dir)  # what they were, for `podwire cleanup`
            settings = Settings()
            for problem in settings.assert_all(liberal=config.sync.tcp_be_liberal):
                log.warning("%s", problem)
            rules = stack.enter_context(rules_for(ledger))
            reaper = stack.enter_context(Reaper(ledger, config.state_dir, rules))
            reaper.recover()
            if self._l7:
                self._l7.start()
                stack.callback(self._l7.stop)
            syncer = stack.enter_context(Syncer(config.sync, ledger, settings=settings, l7=self._l7))
            self._health = stack.enter_context(HealthChecks(self._ready))
            self._upkeep = self._make_upkeep(syncer)
            l7 = L7Stats(self._l7) if self._l7 else None
            keeper = Keeper(
                rules,
                intact=syncer.intact,
                commits=lambda: syncer.commits,
                mended=lambda: _forget_stale_flows(ledger, reaper),
                suspect=syncer.suspect,
            )
            plugin = Plugin(ledger, config.state_dir, reaper.submit, reaper.settle, rules)
            gc.disable()  # until the first sync: nothing that is loaded for it is garbage
            source = threading.Thread(target=self._follow, name="source")
            source.start()
            stack.callback(source.join)
            if self._upkeep:  # nobody waits for its end: it may be waiting for an answer
                threading.Thread(
                    target=self._upkeep.run, args=(self._stop,), name="upkeep", daemon=True
                ).start()
            stack.callback(self._stop.set)
            serve = partial(self._serve, stack, plugin, ledger, syncer, l7)
            self._sync_until_stopped(syncer, keeper, serve)
            self._notifier.stopping()
            if self._l7 and os.getpid() == 1:  # a container ends with all that is in it
                self._leave_proxy(syncer, self._l7)
        log.info("stopped; rules, routes and pods stay as they are")
        return 1 if self._source_failed else 0

    @cached_property
    def _metrics(self) -> Metrics:
        """What is counted; loaded when the first sync is done."""
        from node.metrics import Metrics

        return Metrics()

    def _serve(
        self, stack: ExitStack, plugin: Plugin, ledger: Ledger, syncer: Syncer, l7: L7Stats | None
    ) -> None:
        """Serve the socket and the pages until the stack is left."""
        from node import web
        from node.metrics import Questions
        from node.server import CniService, InspectService, Report, serving

        config = self._config
        if l7:
            self._metrics.proxy(l7)
        self._metrics.ask(
            Questions(self._followed, self._saved, lambda: self._problems(syncer), self._pacer.gather)
        )
        pages = self._pages(syncer, ledger)
        health = {path: pages[path] for path in ("/healthz", "/livez")}  # all that strangers may see
        stack.enter_context(web.serving(config.metrics_address, pages))
        stack.enter_context(web.serving(config.healthz_address, health))
        report = Report(self._ready, lambda: self._problems(syncer), lambda: self._source.described)
        inspect = InspectService(config.sync, ledger, syncer, report, l7)
        stack.enter_context(serving(config.socket, CniService(plugin), inspect))
        self._served = True

    def _make_source(self) -> Cluster | Manifests:
        config = self._config
        if config.kubernetes:
            from node.kube.api import Api
            from node.sources.kubernetes import Cluster

            api = Api(config.kubernetes.credentials, f"node {config.sync.node}")
            return Cluster(api, self._store, config.sync.node, config.state_dir)
        if config.source is None:
            raise ValueError("neither a folder nor a cluster")
        from node.sources.manifests import Manifests

        return Manifests(config.source, self._store)

    def _make_upkeep(self, syncer: Syncer) -> Upkeep | None:
        """Return what keeps up our Node, our podCIDRs and Events in the cluster, if there is one."""
        kubernetes = self._config.kubernetes
        if kubernetes is None:
            return None
        from node.kube.claims import cluster_ranges
        from node.kube.upkeep import Upkeep, View

        source = cast("Cluster", self._source)
        view = View(
            snapshot=lambda: syncer.snapshot if source.complete and self._synced.is_set() else None,
            ready=lambda: syncer.status.ready and self._synced.is_set(),
            problems=lambda: self._problems(syncer),
            annotations=lambda: syncer.wireguard.annotations,
        )
        flat = self._config.sync.mode is Mode.FLAT  # its pods have addresses of the outside
        ranges = () if flat else cluster_ranges(kubernetes.cluster_cidrs, kubernetes.mask_sizes)
        return Upkeep(source.api, self._config.sync.node, view, ranges, kubernetes.namespace)

    def _followed(self) -> dict[str, Followed]:
        return cast("Cluster", self._source).followed if self._config.kubernetes else {}

    def _saved(self) -> float | None:
        """Return when the cluster's state was saved (seconds since the epoch)."""
        from node.sources import saved

        try:
            return (self._config.state_dir / saved.FILE).stat().st_mtime
        except FileNotFoundError:
            return None

    def _follow(self) -> None:
        """Deliver the source's objects to the store; the daemon ends with it."""
        try:
            self._source.run(self._stop.wait)
        except Exception as error:
            log.error("the source ended: %s", error)
            self._source_failed = True
            self._stop.set()

    def _problems(self, syncer: Syncer) -> tuple[str, ...]:
        """Return what is wrong, in sentences."""
        own = (self._sync_problem,) if self._sync_problem else ()
        kept = self._upkeep.problems if self._upkeep else ()
        proxy = self._l7.problems if self._l7 else ()
        found = (*own, *self._source.problems, *kept, *self._annotations.problems, *syncer.status.problems)
        return (*found, *proxy, *self._health.problems)

    def _sync_until_stopped(self, syncer: Syncer, keeper: Keeper, serve: Callable[[], None]) -> None:
        wait = RETRY_SECONDS[0]
        serve_at = time.monotonic() + SERVE_SECONDS
        while not self._stop.is_set():
            if not self._served and (self._synced.is_set() or time.monotonic() > serve_at):
                serve()
            pending = self._pending or self._store.take(0.2, self._pacer.gather())
            self._pending = pending
            try:
                self._tell(syncer)
                self._announce(syncer)
                if again := self._reloaded(syncer) or syncer.again():  # also while changes keep coming
                    self._pending = pending = _compared(pending) or again
                if not keeper.look():
                    pending = _compared(pending) or syncer.compare()
                if pending is None:
                    syncer.rest()
                    self._trim()
                    continue
                self._sync(syncer, pending)
            except Exception as error:  # a fault of ours, too, must not end the node's network
                known = isinstance(error, OSError | LedgerError | RulesError)
                log.error("sync failed, trying again in %.1f s: %s", wait, error, exc_info=not known)
                self._sync_problem = (
                    f"the last change is not in the kernel: {error if known else repr(error)}"
                )
                self._metrics.failed()
                self._stop.wait(wait)
                wait = min(wait * 2, RETRY_SECONDS[1])
                self._pending = _merged(pending or syncer.compare(), self._store.take(timeout=0))
            else:
                self._pending, wait = None, RETRY_SECONDS[0]
                self._sync_problem = ""

    def _leave_proxy(self, syncer: Syncer, l7: L7) -> None:
        """Lead services that can do without the L7 proxy past it, which is about to end."""
        pending = replace(syncer.compare(), services=l7.leave(), compare=False)
        try:
            syncer.sync(pending)
        except (OSError, LedgerError, RulesError) as error:
            log.error("services of the L7 proxy are refused until it is back: %s", error)

    def _trim(self) -> None:
        """Once, when nothing goes on: give back what the first load needed and does not leave behind."""
        if self._trimmed or not self._synced.is_set():
            return
        self._trimmed = True
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        with contextlib.suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)

    def _tell(self, syncer: Syncer) -> None:
        """Tell the service manager how it goes; a cluster that does not answer is no reason to start anew."""
        self._notifier.alive()
        synced = self._synced.is_set()
        text = f"services: {syncer.status.services}" if synced else next(iter(self._source.problems), "")
        if text and self._served and not self._started:
            self._notifier.ready(text)
            self._started = True
        elif text:
            self._notifier.status(text)

    def _reloaded(self, syncer: Syncer) -> Pending | None:
        """After a SIGHUP, take over what needs no restart, and return what to do for it."""
        if not self._hangup.is_set() or self._config.reload is None:
            return None
        self._hangup.clear()
        self._notifier.reloading()
        before = self._config
        try:
            after = self._config.reload()
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)
            return None
        finally:
            self._notifier.ready("reloaded")
        at_once, later = changes(before.configuration, after.configuration)
        if later:
            log.warning("these need a restart: %s", ", ".join(later))
        log.info("reloaded: %s", ", ".join(at_once) or "nothing has changed")
        sync = replace(
            before.sync,
            no_masquerade=after.sync.no_masquerade,
            masquerade=after.sync.masquerade,
            ipam=after.sync.ipam,
            node_port_addresses=after.sync.node_port_addresses,
            backend=after.sync.backend,
            network_mtu=after.sync.network_mtu,
            tunnel=after.sync.tunnel,
            rotate_days=after.sync.rotate_days,
            egress=after.sync.egress,
        )
        logs.set_level(after.configuration.logs.level)
        running = taken_over(before.configuration, after.configuration)
        self._config = replace(before, sync=sync, configuration=running)
        return syncer.reconfigure(sync)

    def _sync(self, syncer: Syncer, pending: Pending) -> None:
        first = not self._synced.is_set()
        start = time.monotonic()
        try:
            full = syncer.sync(pending)
        finally:
            if first:
                gc.freeze()  # what is here now stays: no collection needs to walk it again
                gc.enable()
        seconds = time.monotonic() - start
        self._metrics.synced(pending, seconds, full=full)
        if not full:
            self._pacer.synced(seconds)
        self._health.update(syncer.health_checks, syncer.served_addresses)
        self._publish(syncer, anew=first or bool(pending.nodes))
        if first:
            self._synced.set()
            counts = fields(services=syncer.status.services, elements=syncer.elements)
            log.info("ready", extra=counts)

    def _announce(self, syncer: Syncer) -> None:
        """Once, when pods can be added: have the runtime believe in a network."""
        directory = self._config.cni_conf_dir
        if self._served and syncer.status.ready and directory and not self._announced:
            log.info("wrote %s", install.install_conflist(directory))
            self._announced = True

    def _publish(self, syncer: Syncer, *, anew: bool) -> None:
        """Have our Node object say what it is to say of this node."""
        wanted, nodes = syncer.wireguard.annotations, syncer.snapshot.nodes
        if self._upkeep is None:
            self._annotations.keep(wanted, syncer.wireguard.lacking(nodes))
        elif anew or wanted != self._published:
            self._upkeep.wake()
        self._published = wanted

    def _ready(self) -> bool:
        """Whether the first snapshot is in the kernel, the socket is served, and changes are not stuck."""
        pending = self._pending
        oldest = pending.since if pending else self._store.oldest
        lagging = oldest is not None and time.monotonic() - oldest > HEALTHY_LAG
        return self._synced.is_set() and self._served and not lagging

    def _pages(self, syncer: Syncer, ledger: Ledger) -> dict[str, web.Page]:
        from node import web

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
            return web.text(syncer.config.dataplane)

        return {"/healthz": healthz, "/livez": livez, "/metrics": metrics, "/proxyMode": proxy_mode}


def _forget_stale_flows(ledger: Ledger, reaper: Reaper) -> None:
    """Host ports led nowhere for a moment, and whoever sent to them is remembered so."""
    for attachment in ledger.attachments(State.ATTACHED):
        if attachment.host_ports:
            reaper.settle(attachment)


def _compared(pending: Pending | None) -> Pending | None:
    """Return a change that has everything looked at as well."""
    return replace(pending, compare=True) if pending else None


def _merged(failed: Pending, newer: Pending | None) -> Pending:
    """Return one change that stands for a failed one and what came after it."""
    if newer is None:
        return failed
    return Pending(
        newer.snapshot,
        failed.services | newer.services,
        failed.nodes | newer.nodes,
        failed.since,
        (*failed.triggered, *newer.triggered),
        failed.compare or newer.compare,
    )


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
