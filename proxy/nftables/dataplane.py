"""Apply: bring the kernel's maps from what they hold to what the frontends say, one batch a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netlink.nftables.batch import (
    AddChain,
    AddElements,
    AddRule,
    DeleteChain,
    DeleteElements,
    DeleteTable,
    Nftables,
    Operation,
)
from netlink.nftables.objects import Elements, Map
from proxy.frontends import Action, Frontend
from proxy.nftables import ruleset
from proxy.nftables.elements import Pairs, delta, difference, hairpin, intervals, kind_of
from proxy.nftables.ruleset import (
    COMMON_SHAPES,
    HAIRPIN,
    KINDS,
    LOCAL_POD_CIDRS,
    NO_MASQUERADE,
    POD_CIDRS,
    SETS,
    Shape,
)
from proxy.table import Change, merged


@dataclass(frozen=True, slots=True)
class NodeRanges:
    """What the node rules need to know beside services; CIDRs of any family, in any order."""

    pod_cidrs: tuple[str, ...] = ()
    local_pod_cidrs: tuple[str, ...] = ()
    no_masquerade: tuple[str, ...] = ()


@dataclass(slots=True)
class _Edit:
    """Elements on their way into one batch, by map."""

    removed: dict[Map, Pairs] = field(default_factory=dict)
    added: dict[Map, Pairs] = field(default_factory=dict)
    shapes: Counter[Shape] = field(default_factory=Counter)
    hairpins: Counter[str] = field(default_factory=Counter)

    def take(self, which: Map, removed: Pairs, added: Pairs) -> None:
        """Note elements to remove from a map and to add to it."""
        if removed:
            self.removed.setdefault(which, []).extend(removed)
        if added:
            self.added.setdefault(which, []).extend(added)


class Dataplane:
    """The nftables service proxy of one IP family.

    Holds no copy of the elements, only counts: which uncommon balancing chains and hairpin pairs are in use.
    After a failed `apply` the counts may be wrong: call `load` before anything else.
    """

    name = "nftables"

    def __init__(self, nft: Nftables) -> None:
        self._nft = nft
        self._family = nft.family
        self._shapes: Counter[Shape] = Counter()
        self._hairpins: Counter[str] = Counter()
        self._ranges: dict[Map, Elements] = {}
        self.elements = 0

    def load(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> bool:
        """Make the kernel hold exactly this; return whether a table of our layout was there to start from.

        Elements that are right already stay untouched, so connections and counters do not notice. A
        table of another layout, or one that somebody took rules from, is replaced in one transaction.
        """
        edit = _Edit()
        for frontend in frontends:
            self._note(edit, None, frontend)
        sets = self._set_elements(ranges)
        pairs = {HAIRPIN: [hairpin(self._family, a) for a in edit.hairpins]}
        wanted: dict[Map, Elements] = {m: dict(p) for m, p in (edit.added | pairs).items()} | sets
        there = self._nft.table_comment() is not None
        adopted = there and self.intact()
        if adopted:
            operations = self._difference(wanted, edit.shapes)
        else:
            operations = [DeleteTable()] if there else []
            operations += ruleset.base(self._family)
            operations += self._new_chains(edit.shapes)
            operations += [AddElements(m, list(e.items())) for m, e in wanted.items() if e]
        self._nft.commit(operations)
        self._shapes, self._hairpins, self._ranges = edit.shapes, edit.hairpins, sets
        self.elements = sum(len(e) for e in wanted.values())
        return adopted

    def intact(self) -> bool:
        """Whether the table is there with our layout and all of its rules, told by their comments."""
        if self._nft.table_comment() != ruleset.layout_comment(self._family):
            return False
        wanted: dict[str, tuple[str, ...]] = {}
        for operation in (*ruleset.base(self._family), *self._new_chains(self._shapes)):
            if isinstance(operation, AddRule):
                chain = operation.rule.chain
                wanted[chain] = (*wanted.get(chain, ()), operation.rule.comment)
        found = self._nft.rules()
        return all(found.get(chain) == comments for chain, comments in wanted.items())

    def apply(self, changes: Iterable[Change], ranges: NodeRanges | None = None) -> int:
        """Bring changes of frontends, and ranges if given, to the kernel; return how many elements moved.

        Raises BatchError, in which case the kernel is as it was.
        """
        edit = _Edit()
        for change in merged(changes):
            self._note(edit, change.old, change.new)
        sets = self._ranges if ranges is None else self._set_elements(ranges)
        for which, elements in sets.items():
            edit.take(which, *difference(self._ranges[which], elements, interval=True))
        for address, count in edit.hairpins.items():
            before, after = self._hairpins[address], self._hairpins[address] + count
            if bool(before) != bool(after):
                pair = [hairpin(self._family, address)]
                edit.take(HAIRPIN, pair if before else [], pair if after else [])
        begun = [s for s, n in edit.shapes.items() if n and not self._shapes[s]]
        ended = [s for s, n in edit.shapes.items() if n and not self._shapes[s] + n]
        self._nft.commit(
            [
                *(DeleteElements(m, p) for m, p in edit.removed.items()),
                *self._new_chains(begun),
                *(AddElements(m, p) for m, p in edit.added.items()),
                *(DeleteChain(ruleset.balance_chain(*shape)) for shape in ended),
            ]
        )
        self._shapes.update(edit.shapes)
        self._hairpins.update(edit.hairpins)
        self._ranges = sets
        added, removed = (sum(map(len, side.values())) for side in (edit.added, edit.removed))
        self.elements += added - removed
        return added + removed

    def _note(self, edit: _Edit, old: Frontend | None, new: Frontend | None) -> None:
        """Add one frontend's change to an edit."""
        some = new or old
        assert some
        kind = kind_of(some.key)
        found = delta(old, new)
        edit.take(kind.verdicts, found.old_verdicts, found.new_verdicts)
        edit.take(kind.endpoints, found.old_endpoints, found.new_endpoints)
        for frontend, count in ((old, -1), (new, 1)):
            if frontend and frontend.action is Action.BALANCE:
                shape = (kind, len(frontend.endpoints), frontend.masquerade)
                if shape not in COMMON_SHAPES:
                    edit.shapes[shape] += count
                for endpoint in frontend.endpoints:
                    if endpoint.local:
                        edit.hairpins[endpoint.address] += count

    def _set_elements(self, ranges: NodeRanges) -> dict[Map, Elements]:
        return {
            POD_CIDRS: intervals(self._family, ranges.pod_cidrs),
            LOCAL_POD_CIDRS: intervals(self._family, ranges.local_pod_cidrs),
            NO_MASQUERADE: intervals(self._family, ranges.no_masquerade),
        }

    def _difference(self, wanted: Mapping[Map, Elements], shapes: Counter[Shape]) -> list[Operation]:
        """Return what turns the table that is there into the one that is wanted."""
        removals: list[Operation] = []
        additions: list[Operation] = []
        for which in (*SETS, *(m for kind in KINDS for m in (kind.verdicts, kind.endpoints))):
            there = self._nft.elements(which)
            old, new = difference(there, wanted.get(which, {}), interval=which.interval)
            if old:
                removals.append(DeleteElements(which, old))
            if new:
                additions.append(AddElements(which, new))
        present = self._nft.chains()
        names = {ruleset.balance_chain(*shape): shape for shape in shapes}
        missing = self._new_chains(shape for name, shape in names.items() if name not in present)
        constant = {op.chain.name for op in ruleset.base(self._family) if isinstance(op, AddChain)}
        unused = [DeleteChain(name) for name in sorted(present - constant - names.keys())]
        return [*removals, *missing, *additions, *unused]

    def _new_chains(self, shapes: Iterable[Shape]) -> list[Operation]:
        return [op for shape in shapes for op in ruleset.balance_rules(self._family, *shape)]
