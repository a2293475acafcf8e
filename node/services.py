"""Bring services to the kernel: frontends, the tables of each IP family, stale connections."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from typing import Self

from msgspec import structs

from netlink.conntrack import KEEPS_GOING, Backend, Conntrack, Destination
from netlink.errors import NetlinkError
from netlink.family import Family
from node.dataplanes import NFTABLES, REFUSED, opened
from node.healthchecks import HealthCheck, checks
from node.leads import Leads, NoProxy
from node.logs import fields
from proxy.dataplane import Dataplane, NodeRanges
from proxy.frontends import Frontend, behind, frontends, owner_of, title_of
from proxy.l7.backends import with_proxied
from proxy.l7.model import Backend as L7Backend
from proxy.l7.model import Backends, Route
from proxy.l7.places import PORT
from proxy.model import EMPTY, ObjectName, Protocol, Snapshot
from proxy.table import Change, FrontendTable
from proxy.topology import Place

log = logging.getLogger("podwire.sync")

Addressed = tuple[Family, str, Protocol, int]
"""A frontend's key, whoever its clients are."""

MOST_REFUSED = 20
"""Services that one sync leaves out because the kernel refused them, before it gives up."""


class ServiceProxy:
    """The service proxy of a node; used by one thread, the one that entered it.

    `addresses` returns the node's own addresses, where node ports are; `kind` says what the rules are made
    of (node.dataplanes); `l7` which services are for the L7 proxy now, and `port` where that listens;
    `scheduler` how IPVS balances.
    """

    def __init__(
        self,
        addresses: Callable[[], Iterable[str]],
        kind: str = NFTABLES,
        l7: Leads | None = None,
        port: int = PORT,
        scheduler: str = "rr",
    ) -> None:
        self._addresses = addresses
        self._kind, self._l7, self._port, self._scheduler = kind, l7 or NoProxy(), port, scheduler
        self._asking: dict[ObjectName, tuple[L7Backend, ...]] = {}
        self._asked: dict[ObjectName, tuple[str, ...]] = {}
        self.backends: Backends = {}
        """What services ask of the L7 proxy."""
        self._stack = ExitStack()
        self._dataplanes: dict[Family, Dataplane] = {}
        self._refused: dict[ObjectName, str] = {}
        self._place = Place("")
        self._checked: set[ObjectName] = set()
        self._ranges = NodeRanges()
        self._loaded = False
        self._snapshot = EMPTY
        self._unsettled: set[Addressed] = set()
        """What changed since connections were last looked at."""
        self.table = FrontendTable()

    def __enter__(self) -> Self:
        self._conntrack = self._stack.enter_context(Conntrack())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def elements(self) -> int:
        """Map elements in the kernel."""
        return sum(d.elements for d in self._dataplanes.values())

    @property
    def commits(self) -> int:
        """Batches that were committed."""
        return sum(d.commits for d in self._dataplanes.values())

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not served as asked for, in sentences."""
        return (*self.table.conflicts(), *self._refused.values())

    def intact(self) -> bool:
        """Whether nobody removed or emptied the tables."""
        for family, dataplane in self._dataplanes.items():
            if not dataplane.intact():
                log.warning(
                    "somebody removed rules of services (%s, %s): setting them again",
                    self._kind,
                    family.keyword,
                )
                return False
        return True

    def take(self, snapshot: Snapshot, changed: Iterable[ObjectName], place: Place) -> list[Change]:
        """Decide what the changed services look like now; all of them if the node's place changed."""
        if place != self._place:
            self._place, changed = place, snapshot.services.keys() | set(changed)
        changed = set(changed)
        self._snapshot = snapshot
        changes: list[Change] = []
        for name in changed:
            self._refused.pop(name, None)
            service = snapshot.services.get(name)
            if service and service.health_port:
                self._checked.add(name)
            else:
                self._checked.discard(name)
            found = frontends(service, snapshot.slices.get(name, ()), place) if service else ()
            self._asking.pop(name, None)
            if service and service.policy:
                found, self._asking[name] = with_proxied(service, found, self._l7.leads)
            changes += self.table.replace(name, found)
        holders = (f.service for c in changes for f in (c.old, c.new) if f)
        self._note_backends({*changed, *map(owner_of, holders)})
        return changes

    def _note_backends(self, services: Set[ObjectName]) -> None:
        """Note what services ask of the L7 proxy; an address that another one has leads to none of it."""
        touched = services & (self._asking.keys() | self._asked.keys())
        if not touched:
            return
        found = dict(self.backends)
        for name in touched:
            before = {n: found.pop(n) for n in self._asked.pop(name, ())}
            asked = {
                b.name: structs.replace(b, routes=tuple(filter(self._held(b), b.routes)))
                for b in self._asking.get(name, ())
            }
            if asked:
                self._asked[name] = tuple(asked)
            found |= {n: before[n] if before.get(n) == b else b for n, b in asked.items()}
        self.backends = found

    def _held(self, backend: L7Backend) -> Callable[[Route], bool]:
        """Return whether the service of a backend has a route."""
        return lambda r: self.table.holder(r.family, r.address, Protocol.TCP, r.port) == backend.service

    @property
    def health_checks(self) -> dict[int, HealthCheck]:
        """What load balancers are to be told, by healthCheckNodePort."""
        services = (self._snapshot.services[name] for name in self._checked)
        return checks(services, self._snapshot.slices, self._place.node)

    def apply(self, changes: list[Change], families: set[Family], ranges: NodeRanges | None) -> bool:
        """Bring changes to the kernel; everything is compared if the last time failed, or a family is new.

        Return whether everything was. A service that the kernel refuses is left out, with a sentence, and
        the rest is set. Raises NetlinkError when it refuses anything else; the next call then compares
        everything. `ranges` None: they are as they were.
        """
        loaded, self._loaded = self._loaded and families <= self._dataplanes.keys(), False
        for family in families - self._dataplanes.keys():
            self._dataplanes[family] = self._stack.enter_context(
                opened(self._kind, family, self._port, self._scheduler)
            )
        self._ranges = ranges or self._ranges
        self._unsettled |= {c.key[:4] for c in changes}
        if loaded:
            try:
                self._change(changes, ranges)
            except REFUSED as error:
                log.warning("the kernel has not what was left there, comparing everything: %s", error)
                loaded = False
        if not loaded:
            try:
                self._load()
            except REFUSED as error:
                self._leave_out(error)
        self._loaded = True
        if not loaded:
            self._unsettled |= {f.key[:4] for f in self.table}
        self._forget_connections()
        return not loaded

    def tidy(self) -> None:
        """Remove what changes have left behind; for moments when nothing else is to be done."""
        if self._loaded:
            try:
                for dataplane in self._dataplanes.values():
                    dataplane.tidy()
            except REFUSED as error:
                log.warning("somebody changed what was to be removed, comparing everything: %s", error)
                self.compare()

    def compare(self) -> None:
        """Let the next `apply` compare everything with the kernel."""
        self._loaded = False

    def _load(self) -> None:
        for family, dataplane in self._dataplanes.items():
            adopted = dataplane.load((f for f in self.table if f.key.family is family), self._ranges)
            self._unsettled |= {key[:4] for key in dataplane.gone}
            how = "adopted what the kernel had" if adopted else "made a new table"
            log.info(
                "service proxy: %s", how, extra=fields(family=family.keyword, elements=dataplane.elements)
            )

    def _change(self, changes: list[Change], ranges: NodeRanges | None) -> None:
        for family, dataplane in self._dataplanes.items():
            own = [c for c in changes if c.key.family is family]
            if own or ranges:
                moved = dataplane.apply(own, ranges)
                log.debug("service proxy changed", extra=fields(family=family.keyword, elements=moved))

    def _leave_out(self, error: NetlinkError) -> None:
        """Load without the service that the kernel refused, and so on."""
        for _ in range(MOST_REFUSED):
            culprit = self._culprit(error)
            if culprit is None:
                break
            name = owner_of(culprit.service)
            self._refused[name] = f"service {culprit.service} is not served: {error}"
            log.warning("%s", self._refused[name])
            self.table.replace(name, ())
            self._note_backends({name})
            try:
                return self._load()
            except REFUSED as another:
                error = another
        raise error

    def _culprit(self, error: NetlinkError) -> Frontend | None:
        """Return the frontend that a refused element belongs to."""
        found = (d.culprit(error, self.table) for d in self._dataplanes.values())
        return next(filter(None, found), None)

    def _forget_connections(self) -> None:
        """Remove UDP and SCTP connections of changed frontends that lead to what serves no more.

        Where policies and hints send new connections does not matter: those that are there go on while their
        endpoint serves (kube-proxy's pkg/proxy/conntrack). What could not be done is done the next time.
        """
        self._unsettled = {key for key in self._unsettled if key[2].value in KEEPS_GOING}
        if not self._unsettled:
            return
        node = tuple(self._addresses()) if any(not address for _, address, *_ in self._unsettled) else ()
        served: dict[Destination, frozenset[Backend]] = {}
        for key in self._unsettled:
            family, address, protocol, port = key
            own = (address,) if address else (a for a in node if (":" in a) == (family is Family.V6))
            destinations = (Destination(protocol.value, a, port) for a in own)
            served |= dict.fromkeys(destinations, self._serving(self.table.holder(*key), family))
        try:
            gone = self._conntrack.delete_stale(served)
        except NetlinkError as error:
            log.warning("connections to endpoints that are gone stay for now: %s", error)
            return
        self._unsettled.clear()
        if gone:
            log.info("connections to endpoints that are gone were forgotten", extra=fields(number=gone))

    def _serving(self, title: str, family: Family) -> frozenset[Backend]:
        """Return the endpoints of a service port that serve, be they ready or on their way out."""
        name = owner_of(title) if title else None
        service = self._snapshot.services.get(name) if name else None
        if not name or not service:
            return frozenset()
        slices = self._snapshot.slices.get(name, ())
        ports = [port for port in service.ports if title_of(service, port) == title]
        return frozenset(
            Backend(endpoint.address, number)
            for port in ports
            for number, endpoint in behind(slices, port, family)
            if endpoint.ready or endpoint.serving
        )
