"""The table's content: what frontends, ranges and virtual servers put into its maps."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from netlink.family import Family
from netlink.ipvs import Virtual
from netlink.nftables.objects import Data, Elements, Map
from netlink.nftables.operations import AddElements, DeleteElements, Operation
from proxy.dataplane import NodeRanges
from proxy.frontends import Action, FrontendKey, Origin
from proxy.ipvs import elements, ruleset
from proxy.ipvs.ruleset import DELIVERED, DELIVERED_ADDRESSES, LEADS, MAPS, MARKS
from proxy.ipvs.ways import Moves, Way, way
from proxy.nftables import spans
from proxy.nftables.elements import Pairs, allowed_sources, difference, hairpin, key_bytes, key_of, kind_of
from proxy.nftables.ruleset import (
    ALLOWED_SOURCES,
    CLUSTER_ADDRESSES,
    EGRESS,
    HAIRPIN,
    KINDS,
    NODE_ADDRESSES,
    RANGE_FIELDS,
    RANGES,
    RESTRICTED,
    SHAPES,
)
from proxy.nftables.spans import Spans
from proxy.table import Change

Contents = Mapping[Map, Elements]

Use = tuple[Map, bytes]
"""A set, and an element that is in it while somebody needs it there."""


@dataclass(slots=True)
class Edit:
    """Elements on their way into one batch, by map; and how much more or less often others are needed."""

    removed: dict[Map, Pairs] = field(default_factory=dict)
    added: dict[Map, Pairs] = field(default_factory=dict)
    uses: Counter[Use] = field(default_factory=Counter)

    def take(self, which: Map, removed: Pairs, added: Pairs) -> None:
        """Note elements to remove from a map and to add to it."""
        if removed:
            self.removed.setdefault(which, []).extend(removed)
        if added:
            self.added.setdefault(which, []).extend(added)

    def replace(self, which: Map, key: bytes, old: Data, new: Data) -> None:
        """Note what an element of a map of data was and is; None: not there."""
        if old != new:
            self.take(which, [(key, old)] if old else [], [(key, new)] if new else [])

    def operations(self) -> list[Operation]:
        """Return what brings it to the kernel."""
        gone = [DeleteElements(which, pairs) for which, pairs in self.removed.items()]
        return [*gone, *(AddElements(which, pairs) for which, pairs in self.added.items())]

    @property
    def size(self) -> tuple[int, int]:
        """How many elements come, and how many go."""
        return sum(map(len, self.added.values())), sum(map(len, self.removed.values()))


def uses_of(virtual: Virtual, key: FrontendKey | None) -> tuple[Use, ...]:
    """Return what has to be in sets for a virtual server, as long as it has connections.

    `key`: the frontend that it is for, if it is one.
    """
    if not virtual.mark:
        return ((CLUSTER_ADDRESSES, packed(virtual.family, virtual.address)),)
    if key is None or not key.address:
        return ()
    return (DELIVERED, key_bytes(key)), (DELIVERED_ADDRESSES, packed(key.family, key.address))


def packed(family: Family, address: str) -> bytes:
    """Return an address as registers have it."""
    return socket.inet_pton(family.af, address)


class Rules:
    """What the table of a family holds beside what is always there; only counts of what is shared."""

    def __init__(self, family: Family, port: int) -> None:
        self._family = family
        self._port = port
        self._spans = {which: Spans(family) for which in RANGES}
        self.uses: Counter[Use] = Counter()

    def note(self, edit: Edit, change: Change) -> None:
        """Add one frontend's change to an edit, but for what depends on other frontends."""
        old, new = change
        kind, key = kind_of(change.key), key_bytes(change.key)
        edit.replace(kind.shapes, key, *(elements.shape(f) if f else None for f in change))
        to = [elements.proxy_of(f, self._port) if f else None for f in change]
        edit.replace(LEADS[kind], key, *(elements.lead(self._family, t) if t else None for t in to))
        for frontend, count in ((old, -1), (new, 1)):
            if frontend is None:
                continue
            if frontend.exclusive:
                edit.uses[CLUSTER_ADDRESSES, packed(self._family, frontend.key.address)] += count
            if frontend.action is Action.BALANCE and way(frontend) is not Way.PROXY:
                for endpoint in frontend.endpoints:
                    if endpoint.local:
                        edit.uses[HAIRPIN, hairpin(self._family, endpoint.address)[0]] += count
        if (old and old.sources) != (new and new.sources) or bool(old) != bool(new):
            self._note_sources(edit, change)

    def note_moves(self, edit: Edit, moves: Moves) -> None:
        """Add to an edit which marks frontends have, and where to those are led that share a server."""
        for key, marks in moves.marks.items():
            pair = (elements.mark(m) if m else None for m in marks)
            edit.replace(MARKS[kind_of(key)], key_bytes(key), *pair)
        for key, to in moves.leads.items():
            pair = (elements.lead(self._family, t) if t else None for t in to)
            edit.replace(LEADS[kind_of(key)], key_bytes(key), *pair)

    def note_ranges(self, edit: Edit, old: NodeRanges, new: NodeRanges) -> None:
        """Add to an edit what differs between two values of the ranges."""
        for which, name in RANGE_FIELDS.items():
            gone, come = spans.difference(getattr(old, name), getattr(new, name))
            if gone or come:
                edit.take(which, *self._spans[which].change(gone, come))
        nodes = spans.difference(old.node_addresses, new.node_addresses)
        found: list[Pairs] = [[(packed(self._family, a), None) for a in self._own(s)] for s in nodes]
        edit.take(NODE_ADDRESSES, *found)
        if (old.egress, old.local_pod_cidrs) != (new.egress, new.local_pod_cidrs):
            edit.take(EGRESS, *difference(self._egress(old), self._egress(new), interval=True))

    def settle(self, edit: Edit) -> None:
        """Turn what is needed more or less often into elements that come and go, and keep count."""
        for use, count in edit.uses.items():
            before = self.uses[use]
            if bool(before) != bool(before + count):
                element: Pairs = [(use[1], None)]
                edit.take(use[0], element if before else [], [] if before else element)
            self.uses[use] = before + count
            if not self.uses[use]:
                del self.uses[use]

    def difference(self, there: Contents, edit: Edit) -> list[Operation]:
        """Return what turns a table that is there into one that holds what an edit adds, and no more."""
        wanted = {which: dict(pairs) for which, pairs in edit.added.items()}
        wanted[SHAPES] = dict(ruleset.constant_shapes())
        removals: list[Operation] = []
        additions: list[Operation] = []
        for which in MAPS:
            old, new = difference(there[which], wanted.get(which, {}), interval=which.interval)
            removals += [DeleteElements(which, old)] if old else []
            additions += [AddElements(which, new)] if new else []
        return [*removals, *additions]

    def unwanted(self, there: Contents, edit: Edit) -> Iterator[FrontendKey]:
        """Yield the frontends that are there, and not in what an edit adds."""
        for kind in KINDS:
            wanted = dict(edit.added.get(kind.shapes, ()))
            for key in there.get(kind.shapes, {}).keys() - wanted.keys():
                with contextlib.suppress(ValueError):  # of a protocol that no service has: not ours
                    yield key_of(kind, self._family, key)

    def _note_sources(self, edit: Edit, change: Change) -> None:
        """Add to an edit who may come; a frontend for clients inside has the same ranges as its twin."""
        for frontend, is_new in ((change.old, False), (change.new, True)):
            if frontend and frontend.sources is not None and frontend.key.origin is Origin.ANY:
                restricted: Pairs = [(key_bytes(frontend.key), None)]
                for which, found in ((RESTRICTED, restricted), (ALLOWED_SOURCES, allowed_sources(frontend))):
                    edit.take(which, [] if is_new else found, found if is_new else [])

    def _egress(self, ranges: NodeRanges) -> Elements:
        """Return the ranges of this node's pods and the address that they get, if one is chosen."""
        chosen = next(self._own(ranges.egress), "")
        if not chosen:
            return {}
        data = packed(self._family, chosen)
        _, added = Spans(self._family).change((), ranges.local_pod_cidrs)
        return {key: None if key[-1] else data for key, _ in added}

    def _own(self, addresses: Iterable[str]) -> Iterator[str]:
        """Yield those of the table's family."""
        return (a for a in addresses if (":" in a) is (self._family is Family.V6))
