"""Bring snapshots to the kernel: service proxy, node rules and routes, as much as a change needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Self

from msgspec import structs
from netaddr import IPNetwork, iprange_to_cidrs

from cni import flat
from cni.settings import Mode, NodeSettings
from cni.wiring import ensure_bridge
from ipam.ledger import Ledger
from ipam.pools import IpamConfig
from ipam.ranges import address_of
from netlink.family import Family
from netlink.rtnl import Rtnl
from node import masquerade, underlay
from node.changes import told
from node.healthchecks import HealthCheck
from node.kube import own_node
from node.logs import fields
from node.routes import NodeRoute, plan
from node.services import ServiceProxy
from node.store import Pending
from proxy.frontends import Frontend
from proxy.model import EMPTY, Node, Snapshot
from proxy.nftables.dataplane import NodeRanges
from proxy.topology import Place

log = logging.getLogger("podwire.sync")

IPV6_MTU = 1280
FORMER = "former_cidrs"
"""Among the ledger's settings: podCIDRs of before, of which pods have addresses yet."""

RETRY_SECONDS, COMPARE_SECONDS = 5.0, 30.0
"""How often the kernel is compared with what it should hold: while something of it could not be had, and
otherwise. Others flush rulesets, links go down and come up, default routes appear late."""

REST_SECONDS = 2.0
SUSPECT_SECONDS = 60.0
"""At least so long apart are comparisons of every element, which a change by somebody else calls for:
10,000 services with 10 endpoints each take half a second."""


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """What the syncer is told once.

    `uplink` is the interface of flat mode; "" is the one that leads out. `node_port_addresses`: CIDRs of the
    node's addresses that have node ports; none: the addresses in its Node object.
    """

    node: str
    mode: Mode
    mtu: int | None = None
    no_masquerade: tuple[str, ...] = ()
    masquerade: frozenset[Family] = frozenset(Family)
    ipam: IpamConfig = field(default_factory=IpamConfig)
    uplink: str = ""
    node_port_addresses: tuple[str, ...] = ()


@dataclass(slots=True)
class Status:
    """What the daemon shows of its last sync. `last_sync` is seconds since the epoch; 0 = never.

    `ready` says that pods can be given addresses.
    """

    last_sync: float = 0.0
    ready: bool = False
    pod_cidrs: tuple[str, ...] = ()
    services: int = 0
    routes: tuple[NodeRoute, ...] = ()
    problems: tuple[str, ...] = ()
    node_deleting: bool = False


class Syncer:
    """One snapshot after the other; used by one thread, the one that entered it."""

    def __init__(
        self, config: SyncConfig, ledger: Ledger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._clock = clock
        self._stack = ExitStack()
        self._proxy = ServiceProxy(self._own_addresses)
        self._snapshot = EMPTY
        self._loaded = False
        self._node_problems: tuple[str, ...] = ()
        self._nodes: Mapping[str, Node] = {}
        self._incomplete = False
        self._suspected, self._compared = False, 0.0
        self._synced: float | None = None  # the last time that everything but elements was looked at
        self._busy = 0.0
        self.served_addresses: tuple[str, ...] = ()
        self.status = Status()

    def __enter__(self) -> Self:
        self._rtnl = self._stack.enter_context(Rtnl())
        self._stack.enter_context(self._proxy)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def elements(self) -> int:
        """Map elements in the kernel."""
        return self._proxy.elements

    @property
    def frontends(self) -> tuple[Frontend, ...]:
        """All frontends, as they are in the kernel; for any thread."""
        return tuple(self._proxy.table)

    @property
    def snapshot(self) -> Snapshot:
        """What was brought to the kernel last, or is being brought there; for any thread."""
        return self._snapshot

    @property
    def place(self) -> Place:
        """Where this proxy runs; for any thread."""
        me = self._snapshot.nodes.get(self._config.node, Node(self._config.node))
        return Place(me.name, me.zone)

    @property
    def health_checks(self) -> dict[int, HealthCheck]:
        """What load balancers are to be told, by healthCheckNodePort."""
        return self._proxy.health_checks

    def sync(self, pending: Pending) -> bool:
        """Bring one change to the kernel; return whether everything was compared for it.

        Raises NetlinkError when the kernel refuses; the next sync then compares everything again.
        """
        snapshot = pending.snapshot
        if self._loaded:
            endpoints = log.isEnabledFor(logging.DEBUG)
            for line in told(
                self._snapshot, snapshot, pending.services, nodes=pending.nodes, endpoints=endpoints
            ):
                level = logging.INFO if line.important else logging.DEBUG
                log.log(level, line.text, extra=fields(**line.fields))
        self._snapshot = snapshot
        changes = self._proxy.take(snapshot, pending.services, self.place)
        # Until all of it is done, the kernel may lack what was decided.
        loaded, self._loaded = self._loaded, False
        if not loaded or pending.nodes:
            self._sync_node(snapshot)
        if not loaded or (pending.nodes and not self.intact()):
            self._proxy.compare()
        ranges = self._ranges() if not loaded or pending.nodes else None
        if ranges:
            self.served_addresses = self._among_own(ranges.node_ports)
        full = self._proxy.apply(changes, self._families(), ranges)
        if full:
            self._suspected, self._compared = False, self._clock()
        self._loaded = True
        self._busy = self._clock()
        if full or pending.nodes:
            self._synced = self._busy
        self._report(snapshot)
        return full

    @property
    def commits(self) -> int:
        """Batches that the service proxy has committed."""
        return self._proxy.commits

    def intact(self) -> bool:
        """Whether the service proxy's tables have all of their rules."""
        return self._proxy.intact()

    def again(self) -> Pending | None:
        """Return a change that compares the kernel with what it should hold, when it is time for that."""
        if self._suspected and self._clock() - self._compared >= SUSPECT_SECONDS:
            self._proxy.compare()
            return self.compare()
        wait = RETRY_SECONDS if self._incomplete else COMPARE_SECONDS
        if self._synced is None or self._clock() - self._synced < wait:
            return None
        return self.compare()

    def rest(self) -> None:
        """Do what can wait until changes pause; call it when there is nothing else to do."""
        if self._clock() - self._busy > REST_SECONDS:
            self._proxy.tidy()

    def suspect(self) -> None:
        """Somebody else changed some ruleset: have every element compared, though not at once each time."""
        self._suspected = True

    def reconfigure(self, config: SyncConfig) -> Pending:
        """Go by other ranges from now on, and return the change that brings them to the kernel."""
        self._config = config
        return self.compare()

    def compare(self) -> Pending:
        """Return a change that compares the kernel with what it should hold."""
        return Pending(self._snapshot, frozenset(), nodes=True, since=time.monotonic())

    def _ranges(self) -> NodeRanges:
        """Return whose address is replaced on the way out; pools are pods of this node too.

        Addresses of flat mode are the outside's own, so they are kept.
        """
        config = self._config
        ranges = masquerade.ranges(
            self._nodes, config.node, config.no_masquerade, config.masquerade, config.node_port_addresses
        )
        pools = pool_cidrs(config.ipam)
        leaving = [
            c
            for c in pools
            if config.mode is not Mode.FLAT and Family(ip_network(c).version) in config.masquerade
        ]
        return replace(
            ranges,
            pod_cidrs=(*ranges.pod_cidrs, *pools),
            local_pod_cidrs=(*ranges.local_pod_cidrs, *leaving),
            no_masquerade=(*ranges.no_masquerade, *pools),
            node_pods=(*ranges.node_pods, *pools),
        )

    def _among_own(self, cidrs: Iterable[str]) -> tuple[str, ...]:
        """Return those of the node's addresses that are in the ranges; "" stands for all that it has."""
        ranges = [ip_network(c) for c in cidrs]
        if any(r.prefixlen == 0 for r in ranges):
            return ("",)
        return tuple(a for a in self._own_addresses() if any(ip_address(a) in r for r in ranges))

    def _families(self) -> set[Family]:
        """Return the IP families that this node serves: IPv4, and what its pods' ranges have."""
        ranges = (*self.status.pod_cidrs, *pool_cidrs(self._config.ipam))
        return {Family.V4} | {Family(ip_network(c).version) for c in ranges}

    def _own_addresses(self) -> list[str]:
        return [a.cidr.split("/")[0] for a in self._rtnl.addresses()]

    def _sync_node(self, snapshot: Snapshot) -> None:
        """Set what depends on nodes: routes, the bridge, and the settings that the CNI plugin works by."""
        me = self._config.node
        self._nodes, missing = self._with_own_range(snapshot.nodes)
        routes, problems = plan(self._nodes, me, underlay.observe(self._rtnl))
        if self._config.mode is Mode.BRIDGE:
            # The bridge's own route to our range would come second to an unreachable one.
            routes = tuple(r for r in routes if r.node != me)
        changed, refused = underlay.sync_routes(self._rtnl, (r.route for r in routes))
        self._incomplete = bool(problems or refused)
        if changed:
            log.info("routes changed", extra=fields(changed=changed, total=len(routes)))
        node = self._nodes.get(me)
        cidrs = tuple(IPNetwork(c) for c in node.pod_cidrs) if node else ()
        found = [*missing, *problems, *refused]
        self.status.ready = bool(cidrs) or self._config.mode is Mode.FLAT
        if self.status.ready:
            found += self._settle(cidrs)
        self._node_problems = tuple(found)
        self.status.routes = routes
        self.status.pod_cidrs = tuple(map(str, cidrs))
        self.status.node_deleting = bool(node and node.deleting)

    def _settle(self, cidrs: tuple[IPNetwork, ...]) -> list[str]:
        """Set what the CNI plugin works by; return what is wrong, in sentences."""
        config = self._config
        mtu = config.mtu or underlay.egress_mtu(self._rtnl)
        found = []
        if mtu < IPV6_MTU and Family.V6 in self._families():
            found.append(f"MTU {mtu} is too small for IPv6: pods get {IPV6_MTU} (RFC 8200)")
            mtu = IPV6_MTU
        uplink = config.uplink or underlay.egress_name(self._rtnl) if config.mode is Mode.FLAT else ""
        settings = NodeSettings(config.mode, mtu, cidrs, config.ipam, uplink)
        found += self._keep(settings)
        if config.mode is Mode.BRIDGE:
            return found + ensure_bridge(cidrs)
        try:
            flat.sync(settings, self._ledger.attachments())
        except flat.NoUplink as error:
            found.append(str(error))
        return found

    def _keep(self, settings: NodeSettings) -> list[str]:
        """Save what the CNI plugin works by; a sentence while pods have addresses of podCIDRs of before."""
        before = self._ledger.settings()
        last = NodeSettings.from_mapping(before)
        known = (*map(IPNetwork, before.get(FORMER, "").split()), *(last.pod_cidrs if last else ()))
        former = tuple(c for c in dict.fromkeys(known) if c not in settings.pod_cidrs)
        told = ""
        if former:
            pods = (a.addresses for a in self._ledger.attachments())
            told = own_node.moved(self._config.node, former, settings.pod_cidrs, pods)
        mapping = settings.to_mapping() | ({FORMER: " ".join(map(str, former))} if told else {})
        if mapping != before:
            self._ledger.save_settings(mapping)
        return [told] if told else []

    def _with_own_range(self, nodes: Mapping[str, Node]) -> tuple[Mapping[str, Node], list[str]]:
        """Return the nodes, ours with its last known podCIDRs if it has none now, and a sentence then.

        Pods that have addresses of them need their routes and masquerade whatever becomes of the Node object.
        """
        me = self._config.node
        node = nodes.get(me, Node(me))
        if node.pod_cidrs or self._config.mode is Mode.FLAT:
            return nodes, []
        last = NodeSettings.from_mapping(self._ledger.settings())
        if last is None or not last.pod_cidrs:
            return nodes, [f"node {me} has no podCIDR yet: pods cannot be added"]
        cidrs = tuple(map(str, last.pod_cidrs))
        kept = structs.replace(node, pod_cidrs=cidrs)
        return {**nodes, me: kept}, [
            f"node {me} has no podCIDR any more: its last, {', '.join(cidrs)}, counts"
        ]

    def _report(self, snapshot: Snapshot) -> None:
        self.status.last_sync = time.time()
        self.status.services = len(snapshot.services)
        problems = (*self._node_problems, *self._proxy.problems)
        for problem in problems:
            if problem not in self.status.problems:
                log.warning("%s", problem)
        self.status.problems = problems


def pool_cidrs(config: IpamConfig) -> tuple[str, ...]:
    """Return what the named pools have, as CIDRs."""
    spans = (
        iprange_to_cidrs(address_of(part.version, part.first), address_of(part.version, part.last))
        for pool in config.pools
        for part in pool.ranges
    )
    return tuple(str(cidr) for span in spans for cidr in span)
