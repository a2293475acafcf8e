"""All chains that are to be there, and which of them a change changes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from netlink.family import Family
from proxy.dataplane import NOTHING, NodeRanges
from proxy.frontends import Action, Frontend, FrontendKey
from proxy.iptables import shared
from proxy.iptables.names import CLUSTER_ADDRESSES, ChainId, PortName
from proxy.iptables.rules import PortRules, Setting, port_rules
from proxy.iptables.shared import ENTRY_CHAINS
from proxy.iptables.text import Chains, Rules
from proxy.l7 import places
from proxy.table import Change

MOST_COMMENTED = 1000
"""Endpoints up to which their chains have comments, as in kube-proxy (largeClusterEndpointsThreshold)."""

Frontends = dict[FrontendKey, Frontend]


class Difference(NamedTuple):
    """Chains to write, with all of their rules, and chains to remove."""

    written: dict[ChainId, Rules]
    removed: list[ChainId]


class Plan:
    """What an IP family's tables should hold.

    It keeps the frontends, and the rules of service ports in shared chains; the chains of a service port are
    made again, before and after, when its frontends change.
    """

    def __init__(self, family: Family, *, drop_invalid: bool = False, port: int = places.PORT) -> None:
        self._family = family
        self._port = port
        self._constant = shared.constant_chains(family, drop_invalid=drop_invalid)
        self.reset((), NOTHING)

    def reset(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> dict[ChainId, Rules]:
        """Forget everything, and take this; return all chains."""
        self._ports: dict[PortName, Frontends] = {}
        for frontend in frontends:
            self._ports.setdefault(port_of(frontend), {})[frontend.key] = frontend
        self._addresses = Counter(a for found in self._ports.values() for a in _cluster_addresses(found))
        self._endpoints = sum(map(_endpoints, self._ports.values()))
        self._unused = shared.cluster_addresses(self._family, self._addresses)
        self._take_ranges(ranges)
        self._entries: dict[ChainId, dict[PortName, Rules]] = {chain: {} for chain in ENTRY_CHAINS}
        return self.chains()

    def chains(self) -> dict[ChainId, Rules]:
        """Return all chains."""
        found = self._general()
        for port in sorted(self._ports, key=_order):
            rules = self._rules(port, self._ports[port], self._setting)
            self._note_entries(port, rules)
            found |= rules.chains
        return found | {chain: self._entry_chain(chain) for chain in ENTRY_CHAINS}

    def change(self, changes: Iterable[Change], ranges: NodeRanges | None) -> Difference:
        """Take changes of frontends, and ranges if given; return what differs from before."""
        before = self._take(changes)
        old_setting, old_general = self._setting, self._general()
        touched = {a for port, was in before.items() for a in self._recount(port, was)}
        if touched:
            self._unused = shared.cluster_addresses(self._family, self._addresses)
        self._take_ranges(ranges)
        found, dirty = Difference({}, []), set[ChainId]()
        if self._setting != old_setting:  # the same frontends have other rules now
            before = {**self._ports, **before}
            dirty |= set(ENTRY_CHAINS)
        for port in sorted(before, key=_order):
            old = self._rules(port, before[port], old_setting)
            new = self._rules(port, self._ports.get(port, {}), self._setting)
            found.written.update((c, r) for c, r in new.chains.items() if old.chains.get(c) != r)
            found.removed.extend(c for c in old.chains if c not in new.chains)
            dirty |= self._note_entries(port, new)
        found.written.update((c, r) for c, r in self._general().items() if old_general[c] != r)
        found.written.update((c, self._entry_chain(c)) for c in ENTRY_CHAINS if c in dirty)
        return found

    def rules_of(self, frontend: Frontend) -> PortRules:
        """Return the rules of a frontend as if it were the only one of its service port."""
        return self._rules(port_of(frontend), {frontend.key: frontend}, self._setting)

    def _rules(self, port: PortName, frontends: Frontends, setting: Setting) -> PortRules:
        return port_rules(port, sorted(frontends.values(), key=_key_order), setting)

    def _take(self, changes: Iterable[Change]) -> dict[PortName, Frontends]:
        """Take changes; return the frontends that the service ports had which they are of."""
        before: dict[PortName, Frontends] = {}
        for change in changes:
            for frontend, comes in ((change.old, False), (change.new, True)):
                if frontend is None:
                    continue
                port = port_of(frontend)
                held = self._ports.setdefault(port, {})
                before.setdefault(port, dict(held))
                if comes:
                    held[frontend.key] = frontend
                else:
                    held.pop(frontend.key, None)
        for port in before:
            if not self._ports[port]:
                del self._ports[port]
        return before

    def _recount(self, port: PortName, was: Frontends) -> Iterator[str]:
        """Count what a service port needs now, and before; yield cluster addresses that came or went."""
        now = self._ports.get(port, {})
        self._endpoints += _endpoints(now) - _endpoints(was)
        for frontends, step in ((now, 1), (was, -1)):
            for address in _cluster_addresses(frontends):
                self._addresses[address] += step
                if not self._addresses[address]:
                    del self._addresses[address]
                    yield address
                elif step == self._addresses[address]:
                    yield address

    def _take_ranges(self, ranges: NodeRanges | None) -> None:
        if ranges is not None:
            self._ranges = ranges
            self._of_ranges: Chains = shared.range_chains(self._family, ranges)
        terse = self._endpoints > MOST_COMMENTED
        self._setting = shared.setting(self._family, self._ranges, terse=terse, port=self._port)

    def _general(self) -> dict[ChainId, Rules]:
        """Return the chains that depend on no service's rules."""
        return {**self._constant, **self._of_ranges, CLUSTER_ADDRESSES: self._unused}

    def _note_entries(self, port: PortName, rules: PortRules) -> set[ChainId]:
        """Keep a service port's rules in shared chains; return the chains that they change."""
        changed = set[ChainId]()
        for chain, held in self._entries.items():
            new = rules.entries.get(chain, ())
            if held.get(port, ()) != new:
                changed.add(chain)
                if new:
                    held[port] = new
                else:
                    del held[port]
        return changed

    def _entry_chain(self, chain: ChainId) -> Rules:
        held = self._entries[chain]
        return shared.entry_chain(chain, (held[p] for p in sorted(held, key=_order)), self._setting)


def port_of(frontend: Frontend) -> PortName:
    """Return the service port that a frontend is of."""
    return PortName(frontend.service, frontend.key.protocol)


def _order(port: PortName) -> tuple[str, int]:
    return port.title, port.protocol.value


def _key_order(frontend: Frontend) -> tuple[str, int, str]:
    return frontend.key.address, frontend.key.port, frontend.key.origin.value


def _endpoints(frontends: Frontends) -> int:
    """Return how many endpoints one of the chains of a service port has at most."""
    return max((len(f.endpoints) for f in frontends.values() if f.action is Action.BALANCE), default=0)


def _cluster_addresses(frontends: Frontends) -> Iterable[str]:
    return (f.key.address for f in frontends.values() if f.exclusive)
