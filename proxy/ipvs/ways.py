"""Which virtual server a frontend's connections go to, and what that is to be. Pure.

    cluster address                            its own, by address and port, as people know them
    external address, node port                one known by a mark, which nftables gives: it depends on the
                                               source, or on which of the node's addresses it is
    external address, node port, with affinity that of the service's cluster address, if it has the same
                                               endpoints; else one at an address that is made for it

A virtual server that keeps a client at its real server remembers that under its address and port; one known
by a mark cannot translate the port then (ip_vs_sched_persist). So such frontends are led to an address
before, by nftables, and whatever address a client uses, it is remembered once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from netlink.family import Family
from netlink.ipvs import Real, Schedule, Virtual
from proxy.frontends import Action, Frontend, FrontendKey, Origin
from proxy.ipvs.places import MADE_ADDRESSES, MOST_MARKS, MOST_PORTS, is_ours, mark_of, number_of
from proxy.model import Protocol
from proxy.table import Change

SCHEDULERS = ("rr", "lc", "sh", "wrr")


class Way(Enum):
    """How connections get to endpoints."""

    NONE = "refused or dropped"
    PROXY = "by the node's L7 proxy"
    ADDRESS = "by the virtual server of its own address and port"
    MARK = "by a virtual server known by a mark"
    LED = "by the virtual server of another address"

    __hash__ = object.__hash__


class Want(NamedTuple):
    """What a virtual server is to be. `graceful`: connections end by themselves when an endpoint goes.

    `key`: the one frontend that it is for; None if others are led to it.
    """

    schedule: Schedule
    reals: tuple[Real, ...]
    graceful: bool
    key: FrontendKey | None


class Numbers:
    """Numbers that are given out once each, from 1 to below `most`; a number asked for again comes last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used: set[int] = set()
        self._last = 0

    def take(self) -> int:
        """Return a number that nobody has. Raises OverflowError if there is none."""
        if len(self._used) >= self._most - 1:
            raise OverflowError("no number is free")
        while True:
            self._last = self._last % (self._most - 1) + 1
            if self._last not in self._used:
                self._used.add(self._last)
                return self._last

    def hold(self, number: int) -> None:
        """Note that a number is in use."""
        self._used.add(number)

    def release(self, number: int) -> None:
        """Let a number be given out again."""
        self._used.discard(number)


@dataclass(slots=True)
class Moves:
    """What changes of frontends mean: virtual servers before and after, marks, and where to others are led.

    A virtual server that is in neither is as it was.
    """

    before: dict[Virtual, Want] = field(default_factory=dict)
    after: dict[Virtual, Want] = field(default_factory=dict)
    marks: dict[FrontendKey, tuple[int, int]] = field(default_factory=dict)
    """0: none."""
    leads: dict[FrontendKey, tuple[Real | None, Real | None]] = field(default_factory=dict)


def way(frontend: Frontend | None) -> Way:
    """Return how connections to a frontend get to its endpoints."""
    if frontend is None or frontend.action is not Action.BALANCE:
        return Way.NONE
    if frontend.proxied is not None:
        return Way.PROXY
    if frontend.exclusive and frontend.key.origin is Origin.ANY:
        return Way.ADDRESS
    return Way.LED if frontend.affinity else Way.MARK


def own(key: FrontendKey) -> Virtual:
    """Return the virtual server of a frontend's own address and port."""
    return Virtual(key.family, key.protocol.value, key.address, key.port)


def reals(frontend: Frontend) -> tuple[Real, ...]:
    """Return a frontend's endpoints, each once."""
    return tuple(dict.fromkeys(Real(address, port) for address, port, _ in frontend.endpoints))


GroupName = tuple[str, Protocol]
"""A service port, by its title."""
Group = dict[FrontendKey, Frontend]
"""The frontends of a service port that have affinity."""


class Ways:
    """Where all frontends of a family go. A mark or made port stays with a frontend while it needs one."""

    def __init__(self, family: Family, scheduler: str) -> None:
        self._family = family
        self._scheduler = scheduler
        self._marks: dict[FrontendKey, int] = {}
        self._ports: dict[FrontendKey, int] = {}  # of led frontends whose group has a made address
        self._groups: dict[GroupName, Group] = {}
        self._free_marks, self._free_ports = Numbers(MOST_MARKS), Numbers(MOST_PORTS)
        self._earlier: tuple[Mapping[FrontendKey, int], Mapping[FrontendKey, int]] = {}, {}

    def remember(
        self, marks: Mapping[FrontendKey, int], ports: Mapping[FrontendKey, int], there: Iterable[Virtual]
    ) -> None:
        """Go by the marks and ports that frontends had, and keep from giving out those of what is there."""
        self._earlier = marks, ports
        for virtual in there:
            self._hold(virtual)

    def forget(self) -> None:
        """Frontends that come from now on are new ones."""
        self._earlier = {}, {}

    def key_of(self, virtual: Virtual) -> FrontendKey | None:
        """Return a frontend whose connections go to a virtual server; None if it is of none."""
        if virtual.mark:
            return next((key for key, mark in self._marks.items() if mark == virtual.mark), None)
        if virtual.address == MADE_ADDRESSES[self._family]:
            return next((key for key, port in self._ports.items() if port == virtual.port), None)
        return FrontendKey(
            virtual.family, virtual.address, Protocol(virtual.protocol), virtual.port, Origin.ANY
        )

    def release(self, virtual: Virtual) -> None:
        """Let the number of a virtual server be used again: it is gone."""
        if virtual.mark:
            self._free_marks.release(number_of(virtual.mark))
        elif virtual.address == MADE_ADDRESSES[self._family]:
            self._free_ports.release(virtual.port)

    def _hold(self, virtual: Virtual) -> None:
        if is_ours(virtual.mark):
            self._free_marks.hold(number_of(virtual.mark))
        elif virtual.address == MADE_ADDRESSES[self._family]:
            self._free_ports.hold(virtual.port)

    def move(self, changes: Iterable[Change]) -> Moves:
        """Take changes of frontends, each key at most once; return what they mean."""
        moves = Moves()
        touched: dict[GroupName, dict[FrontendKey, Frontend | None]] = {}
        for old, new in changes:
            self._alone(moves, old, new)
            for frontend, now in ((old, None), (new, new)):
                if frontend and frontend.affinity and way(frontend) in (Way.ADDRESS, Way.LED):
                    group = frontend.service, frontend.key.protocol
                    touched.setdefault(group, {})[frontend.key] = now
        # A frontend can go from one service to another: first all that was, then all that is.
        had = {group: self._leave(moves, self._groups.pop(group, {})) for group in touched}
        for group, members in touched.items():
            self._enter(moves, group, members, had[group])
        return moves

    def _alone(self, moves: Moves, old: Frontend | None, new: Frontend | None) -> None:
        """Note a change of one frontend that no other one shares its virtual server with."""
        for frontend, wants in ((old, moves.before), (new, moves.after)):
            if frontend and way(frontend) is Way.ADDRESS:
                wants[own(frontend.key)] = self._want(frontend)
        was, now = way(old) is Way.MARK, way(new) is Way.MARK
        if not was and not now:
            return
        key = (new or old).key  # type: ignore[union-attr]
        before = self._marks.pop(key, 0) if was else 0
        after = before or (self._mark(key) if now else 0)
        if was and old:
            moves.before[Virtual(self._family, mark=before)] = self._want(old)
        if now and new:
            self._marks[key] = after
            moves.after[Virtual(self._family, mark=after)] = self._want(new)
        else:
            after = 0
        if before != after:
            moves.marks[key] = before, after

    def _mark(self, key: FrontendKey) -> int:
        if mark := self._earlier[0].get(key, 0):
            self._free_marks.hold(number_of(mark))
            return mark
        return mark_of(self._free_marks.take())

    def _leave(self, moves: Moves, there: Group) -> tuple[Group, dict[FrontendKey, int]]:
        """Note what frontends with affinity were that have a service port in common; return their ports."""
        leads = self._leads(there)
        self._note(moves.before, there, leads)
        for key, to in leads.items():
            moves.leads[key] = to, None
        return there, {key: self._ports.pop(key) for key in there if key in self._ports}

    def _enter(
        self,
        moves: Moves,
        name: GroupName,
        changed: Mapping[FrontendKey, Frontend | None],
        had: tuple[Group, dict[FrontendKey, int]],
    ) -> None:
        """Note what they are; None: no longer one of them. `had`: who was, and the ports."""
        there, ports = had
        here = {key: f for key, f in {**there, **changed}.items() if f}
        if here:
            self._groups[name] = here
        self._ports |= self._made_ports(here, ports)
        leads = self._leads(here)
        self._note(moves.after, here, leads)
        for key, to in leads.items():
            moves.leads[key] = moves.leads.get(key, (None, None))[0], to

    def _leads(self, members: Mapping[FrontendKey, Frontend]) -> dict[FrontendKey, Real]:
        """Return where each member that is led goes to."""
        anchors = {
            frozenset(reals(f)): Real(f.key.address, f.key.port) for f in members.values() if _anchor(f)
        }
        made = MADE_ADDRESSES[self._family]
        return {
            key: Real(made, self._ports[key]) if key in self._ports else anchors[frozenset(reals(f))]
            for key, f in members.items()
            if not _anchor(f)
        }

    def _note(
        self,
        wants: dict[Virtual, Want],
        members: Mapping[FrontendKey, Frontend],
        leads: Mapping[FrontendKey, Real],
    ) -> None:
        for key, to in leads.items():
            if key in self._ports:
                virtual = Virtual(self._family, key.protocol.value, to.address, to.port)
                wants[virtual] = self._want(members[key])._replace(key=None)

    def _made_ports(
        self, members: Mapping[FrontendKey, Frontend], had: Mapping[FrontendKey, int]
    ) -> dict[FrontendKey, int]:
        """Return the port at the made address of each member that needs one; those with one set share it."""
        anchored = {frozenset(reals(f)) for f in members.values() if _anchor(f)}
        parts: dict[frozenset[Real], list[FrontendKey]] = {}
        for key, frontend in members.items():
            if not _anchor(frontend) and (ends := frozenset(reals(frontend))) not in anchored:
                parts.setdefault(ends, []).append(key)
        found: dict[FrontendKey, int] = {}
        given: set[int] = set()
        for keys in sorted(parts.values(), key=lambda keys: (-len(keys), *map(_order, keys[:1]))):
            known = Counter(had.get(k) or self._earlier[1].get(k, 0) for k in keys)
            port = next((p for p, _ in known.most_common() if p and p not in given), 0)
            port = port or self._free_ports.take()
            self._free_ports.hold(port)
            given.add(port)
            found |= dict.fromkeys(keys, port)
        return found

    def _want(self, frontend: Frontend) -> Want:
        graceful = frontend.key.protocol is Protocol.TCP
        schedule = Schedule(self._scheduler, frontend.affinity)
        return Want(schedule, reals(frontend), graceful, frontend.key)


def _anchor(frontend: Frontend) -> bool:
    return way(frontend) is Way.ADDRESS


def _order(key: FrontendKey) -> tuple[str, int, str]:
    return key.address, key.port, key.origin.value
