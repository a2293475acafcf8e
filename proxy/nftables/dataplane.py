"""Apply: bring the kernel's maps from what they hold to what the frontends say, one batch a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import BatchError, Nftables
from netlink.nftables.objects import Data, Elements, Map
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddRule,
    DeleteElements,
    DeleteTable,
    FlushMap,
    Operation,
)
from proxy.dataplane import NOTHING, NodeRanges
from proxy.frontends import Action, Frontend, FrontendKey, Origin
from proxy.l7 import places
from proxy.nftables import parts, ruleset, spans
from proxy.nftables.elements import (
    Pairs,
    address,
    affinity,
    allowed_sources,
    delta,
    difference,
    endpoint_data,
    hairpin,
    key_bytes,
    key_of,
    kind_of,
    led,
)
from proxy.nftables.parts import AffinityBalancer, Balancer, Part
from proxy.nftables.ruleset import (
    ALLOWED_SOURCES,
    CLUSTER_ADDRESSES,
    EGRESS,
    HAIRPIN,
    KINDS,
    MAPS,
    NODE_ADDRESSES,
    RANGE_FIELDS,
    RANGES,
    RESTRICTED,
    SHAPES,
)
from proxy.nftables.spans import Spans
from proxy.table import Change, merged

ENDPOINT_MAPS = frozenset(kind.endpoints for kind in KINDS)
LED_TO = ENDPOINT_MAPS | {kind.affinity for kind in KINDS}
"""Maps that are asked after the number of a shape has led there."""
MOST_LISTED = 65_536
"""Endpoints that a load compares; of more it writes them all, in the same transaction.

The kernel lists a map from its beginning for each 32 kB that it has told, so the time grows with the square:
100,000 elements took 1 s and 440,000 took 12; writing them takes 4 µs each.
"""


_Contents = Mapping[Map, Elements]

Use = tuple[Map, str]
"""A set, and an address that is in it while some frontend needs it there."""


@dataclass(slots=True)
class _Edit:
    """Elements on their way into one batch, by map."""

    removed: dict[Map, Pairs] = field(default_factory=dict)
    added: dict[Map, Pairs] = field(default_factory=dict)
    parts: Counter[Part] = field(default_factory=Counter)
    uses: Counter[Use] = field(default_factory=Counter)
    left: dict[Map, Pairs] = field(default_factory=dict)
    """Those to remove when nothing leads there any more."""

    def take(self, which: Map, removed: Pairs, added: Pairs) -> None:
        """Note elements to remove from a map and to add to it."""
        if removed:
            self.removed.setdefault(which, []).extend(removed)
        if added:
            self.added.setdefault(which, []).extend(added)

    def leave(self, which: Map, removed: Pairs) -> None:
        """Note elements to remove from a map once all others are as they are to be."""
        if removed:
            self.left.setdefault(which, []).extend(removed)

    @property
    def size(self) -> tuple[int, int]:
        """How many elements come, and how many go."""
        added, removed, left = (
            sum(map(len, side.values())) for side in (self.added, self.removed, self.left)
        )
        return added, removed + left


class Dataplane:
    """The nftables service proxy of one IP family.

    Holds no copy of the elements, only counts of what several frontends can need: parts, addresses in sets.
    Chains that went out of use stay until `tidy`, as the next change may want them again.
    After a failed `apply` the counts may be wrong: call `load` before anything else. `port` is where the
    node's L7 proxy listens.
    """

    name = "nftables"

    def __init__(self, nft: Nftables, port: int = places.PORT) -> None:
        self._nft = nft
        self._family = nft.family
        self._port = port
        self._parts: Counter[Part] = Counter()
        self._uses: Counter[Use] = Counter()
        self._ranges = NOTHING
        self._spans: dict[Map, Spans] = {}
        self._idle: set[Balancer] = set()
        self.elements = 0
        self.gone: tuple[FrontendKey, ...] = ()
        """What the last load took out of the kernel: frontends that went while nobody looked."""

    def load(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> bool:
        """Make the kernel hold exactly this; return whether a table of our layout was there to start from.

        Elements that are right already stay untouched, so connections and counters do not notice. A
        table of another layout, or one that somebody took rules from, is replaced in one transaction.
        """
        edit = _Edit()
        for frontend in frontends:
            self._note(edit, None, frontend)
        for use in edit.uses:
            edit.take(use[0], [], [self._element(use)])
        self._spans = {which: Spans(self._family) for which in RANGES}
        self._note_ranges(edit, NOTHING, ranges)
        edit.take(SHAPES, [], [p.shape for p in edit.parts if isinstance(p, Balancer)])
        comment = self._nft.table_comment()
        known = comment == ruleset.layout_comment(self._family) and self.intact()
        wanted = {m: dict(p) for m, p in edit.added.items()} if known else {}
        wanted[SHAPES] = wanted.get(SHAPES, {}) | dict(ruleset.constant_shapes())
        listed = [m for m in MAPS if m not in ENDPOINT_MAPS or len(wanted.get(m, ())) <= MOST_LISTED]
        there = {which: self._nft.elements(which) for which in listed} if known else {}
        self.gone = tuple(self._unwanted(there, wanted))
        adopted = known and self._are_whole(edit.parts)
        if adopted:
            self._commit(*self._difference(there, wanted, edit.parts))
        else:
            operations: list[Operation] = [DeleteTable()] if comment is not None else []
            operations += ruleset.base(self._family)
            operations += parts.made(self._family, edit.parts)
            operations += [AddElements(m, p) for m, p in edit.added.items()]
            self._nft.commit(operations)
        self._parts, self._uses, self._ranges = edit.parts, edit.uses, ranges
        self._idle.clear()
        self.elements = sum(map(len, edit.added.values()))
        return adopted

    @property
    def commits(self) -> int:
        """Batches that were committed."""
        return self._nft.commits

    def remove(self) -> None:
        """Take the table away, with all in it."""
        if self._nft.table_comment() is not None:
            self._nft.commit([DeleteTable()])

    def intact(self) -> bool:
        """Whether the table is there with our layout and all of its rules, told by their comments."""
        if self._nft.table_comment() != ruleset.layout_comment(self._family):
            return False
        wanted: dict[str, tuple[str, ...]] = {}
        for operation in (*ruleset.base(self._family), *parts.made(self._family, self._parts)):
            if isinstance(operation, AddRule):
                chain = operation.rule.chain
                wanted[chain] = (*wanted.get(chain, ()), operation.rule.comment)
        found = self._nft.rules()
        return all(found.get(chain) == comments for chain, comments in wanted.items())

    def apply(self, changes: Iterable[Change], ranges: NodeRanges | None = None) -> int:
        """Bring changes of frontends, and ranges if given, to the kernel; return how many elements moved.

        Raises BatchError, in which case no element has moved.
        """
        edit = _Edit()
        for change in merged(changes):
            self._note(edit, change.old, change.new)
        if ranges:
            self._note_ranges(edit, self._ranges, ranges)
        for use, count in edit.uses.items():
            before, after = self._uses[use], self._uses[use] + count
            if bool(before) != bool(after):
                element = [self._element(use)]
                edit.take(use[0], element if before else [], element if after else [])
        begun = {p for p, n in edit.parts.items() if n and not self._parts[p]}
        ended = {p for p, n in edit.parts.items() if n and not self._parts[p] + n}
        idle = {p for p in ended if isinstance(p, Balancer)}
        edit.take(SHAPES, [], [p.shape for p in begun - self._idle if isinstance(p, Balancer)])
        self._commit(
            parts.made(self._family, begun - self._idle),
            [
                *(DeleteElements(m, p) for m, p in edit.removed.items()),
                *(AddElements(m, p) for m, p in edit.added.items()),
            ],
            [DeleteElements(m, p) for m, p in edit.left.items()],
            parts.removed(ended - idle),
        )
        self._parts.update(edit.parts)
        self._uses.update(edit.uses)
        self._ranges = ranges or self._ranges
        self._idle = (self._idle - begun) | idle
        for part in ended:
            del self._parts[part]
        for use in [u for u in edit.uses if not self._uses[u]]:
            del self._uses[use]
        added, removed = edit.size
        self.elements += added - removed
        return added + removed

    def _commit(self, *steps: Sequence[Operation]) -> None:
        """Make what the change leads to before it, and remove what it leads away from after it.

        A packet on its way sees the rules of one moment and the elements of several: in one transaction, an
        element could lead it to a chain that has no rules in its eyes yet, or from one whose map is empty.
        """
        for operations in steps:
            if operations:
                self._nft.commit(operations)

    def tidy(self) -> None:
        """Remove chains that nothing leads to any more, which makes the kernel wait for a grace period."""
        if self._idle:
            shapes = [p.shape for p in self._idle]
            self._nft.commit([DeleteElements(SHAPES, shapes), *parts.removed(self._idle)])
            self.elements -= len(shapes)
            self._idle.clear()

    def culprit(self, error: NetlinkError, frontends: Iterable[Frontend]) -> Frontend | None:
        """Return the frontend that an element belongs to which the kernel refused; None for anything else."""
        if not isinstance(error, BatchError):
            return None
        operation, element = error.operation, error.element
        if not isinstance(operation, AddElements | DeleteElements) or element is None:
            return None
        for frontend in frontends:
            kind = kind_of(frontend.key)
            maps = (kind.shapes, kind.endpoints, kind.affinity, RESTRICTED, ALLOWED_SOURCES)
            if operation.map in maps and element.startswith(key_bytes(frontend.key)):
                return frontend
        return None

    def _note(self, edit: _Edit, old: Frontend | None, new: Frontend | None) -> None:
        """Add one frontend's change to an edit."""
        old, new = (frontend and led(frontend, self._port) for frontend in (old, new))
        some = new or old
        assert some
        kind = kind_of(some.key)
        found = delta(old, new)
        edit.take(kind.shapes, found.old_shapes, found.new_shapes)
        for which, before, after, encoded in (
            (kind.endpoints, found.old_endpoints, found.new_endpoints, endpoint_data),
            (kind.affinity, found.old_affinity, found.new_affinity, affinity),
        ):
            if new and not encoded(new):  # a packet on its way may have been told a number that leads here
                edit.leave(which, before)
            else:
                edit.take(which, before, after)
        for frontend, count in ((old, -1), (new, 1)):
            if frontend is None:
                continue
            for part in parts.parts(kind, frontend):
                edit.parts[part] += count
            if frontend.exclusive:
                edit.uses[CLUSTER_ADDRESSES, frontend.key.address] += count
            if frontend.action is Action.BALANCE:
                for endpoint in frontend.endpoints:
                    if endpoint.local:
                        edit.uses[HAIRPIN, endpoint.address] += count
        if (old and old.sources) != (new and new.sources) or bool(old) != bool(new):
            self._note_sources(edit, old, new)

    def _note_sources(self, edit: _Edit, old: Frontend | None, new: Frontend | None) -> None:
        """Add to an edit who may come; a frontend for clients inside has the same ranges as its twin."""
        for frontend, is_new in ((old, False), (new, True)):
            if frontend and frontend.sources is not None and frontend.key.origin is Origin.ANY:
                restricted: Pairs = [(key_bytes(frontend.key), None)]
                for which, found in ((RESTRICTED, restricted), (ALLOWED_SOURCES, allowed_sources(frontend))):
                    edit.take(which, [] if is_new else found, found if is_new else [])

    def _element(self, use: Use) -> tuple[bytes, Data]:
        which, text = use
        return hairpin(self._family, text) if which is HAIRPIN else address(self._family, text)

    def _note_ranges(self, edit: _Edit, old: NodeRanges, new: NodeRanges) -> None:
        """Add to an edit what differs between two values of the ranges."""
        for which, name in RANGE_FIELDS.items():
            gone, come = spans.difference(getattr(old, name), getattr(new, name))
            if gone or come:
                edit.take(which, *self._spans[which].change(gone, come))
        nodes = spans.difference(old.node_addresses, new.node_addresses)
        edit.take(NODE_ADDRESSES, *([address(self._family, a) for a in self._own(s)] for s in nodes))
        if (old.egress, old.local_pod_cidrs) != (new.egress, new.local_pod_cidrs):
            edit.take(EGRESS, *difference(self._egress(old), self._egress(new), interval=True))

    def _egress(self, ranges: NodeRanges) -> Elements:
        """Return the ranges of this node's pods and the address that they get, if one is chosen."""
        chosen = next(self._own(ranges.egress), "")
        if not chosen:
            return {}
        data, _ = address(self._family, chosen)
        _, added = Spans(self._family).change((), ranges.local_pod_cidrs)
        return {key: None if key[-1] else data for key, _ in added}

    def _own(self, addresses: Iterable[str]) -> Iterator[str]:
        """Yield those of the table's family."""
        return (a for a in addresses if (":" in a) is (self._family is Family.V6))

    def _are_whole(self, wanted: Iterable[Part]) -> bool:
        """Whether of each part that is there nothing is missing: their rules are known by their names."""
        chains, maps = self._nft.chains(), self._nft.maps()
        return all(
            len({part.chain in chains, *(name in maps for name in part.maps)}) == 1
            and (
                not isinstance(part, AffinityBalancer)
                or part.chain not in chains
                or self._nft.elements(part.choice) == dict(part.choices)
            )
            for part in wanted
        )

    def _unwanted(self, there: _Contents, wanted: _Contents) -> Iterator[FrontendKey]:
        """Yield the frontends that are there and not wanted."""
        for kind in KINDS:
            for key in there.get(kind.shapes, {}).keys() - wanted.get(kind.shapes, {}).keys():
                with contextlib.suppress(ValueError):  # of a protocol that no service has: not ours
                    yield key_of(kind, self._family, key)

    def _difference(
        self, there: _Contents, wanted: _Contents, needed: Counter[Part]
    ) -> tuple[list[Operation], ...]:
        """Return what turns the table that is there into the one that is wanted, in steps."""
        removals: list[Operation] = []
        additions: list[Operation] = []
        left: list[Operation] = []
        last: list[Operation] = []
        for which in MAPS:
            if which not in there:
                removals.append(FlushMap(which))
                additions.append(AddElements(which, list(wanted[which].items())))
                continue
            old, new = difference(there[which], wanted.get(which, {}), interval=which.interval)
            if which in LED_TO:  # a packet on its way may have been told a number of endpoints
                kept = wanted.get(which, {})
                left += _deleted(which, [pair for pair in old if pair[0] not in kept])
                old = [pair for pair in old if pair[0] in kept]
            if old:
                (last if which is SHAPES else removals).append(DeleteElements(which, old))
            if new:
                additions.append(AddElements(which, new))
        chains, maps = self._nft.chains(), self._nft.maps()
        missing = parts.made(self._family, (p for p in needed if p.chain not in chains))
        constant = {op.chain.name for op in ruleset.base(self._family) if isinstance(op, AddChain)}
        unused = parts.unknown_removed(
            chains - constant - {p.chain for p in needed},
            maps - {m.name for m in MAPS} - {name for p in needed for name in p.maps},
        )
        return missing, [*removals, *additions], left, [*last, *unused]


def _deleted(which: Map, pairs: Pairs) -> list[Operation]:
    return [DeleteElements(which, pairs)] if pairs else []
