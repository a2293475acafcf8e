"""Apply: keep the tables of pods as the live attachments want them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from cni import tables
from cni.tables import TABLES, Contents, PodRules
from netlink.errors import NetlinkError
from netlink.nftables.batch import BatchError, NftSocket
from netlink.nftables.expressions import LimitOver
from netlink.nftables.objects import BRIDGE, Data, Elements, Map, Table, TableFamily
from netlink.nftables.operations import (
    AddElements,
    DeleteElements,
    DeleteTable,
    EnsureElements,
    Operation,
    Pairs,
)

RECONCILE_TRIES = 50
"""Each takes a few milliseconds, and fails only if the ruleset changes during it."""
REFUSALS = frozenset({errno.ENOENT, errno.EEXIST, errno.EBUSY})
"""What the kernel says when a table is missing, or an element is there with other data (by its age)."""

Part = tuple[Table, list[Operation]]


class RulesError(Exception):
    """The tables of pods are not as they should be, or cannot be made so; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is of a table: whether the rules are ours and complete, and what its maps hold."""

    intact: bool
    contents: dict[Map, Elements]


class Rules:
    """The tables of pods in the network namespace of the thread that opens this; used by any thread.

    `live` returns the rules of all live attachments, oldest first: of two pods with one host port, the newer
    has it. It must not call back. Callers put an attachment into the ledger, where `live` finds it, before
    `add`, and mark it released there before `remove`; so a `reconcile` at any moment does no harm.
    """

    def __init__(self, live: Callable[[], Iterable[PodRules]]) -> None:
        self._live = live
        self._nft = NftSocket()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._nft.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._nft.__exit__()

    def add(self, pod: PodRules) -> None:
        """Put a pod's elements into the tables, in one transaction; repeating it is harmless.

        What stands in the way, or a table that is missing, is set right first. Raises BatchError, RulesError.
        """
        parts: list[Part] = [
            (TABLES[family], [EnsureElements(m, list(e.items())) for m, e in maps.items()])
            for family, maps in tables.elements(pod).items()
        ]
        try:
            self._commit(parts)
        except BatchError as error:
            if error.errno not in REFUSALS:
                raise
            self.reconcile()
            self._commit(parts)

    def remove(self, pod: PodRules) -> None:
        """Take a pod's elements out of the tables; repeating it is harmless.

        A host port may be another pod's by now, and the kernel deletes an element whatever its data are: so
        what is a pod's with host ports is found out by comparing. Raises BatchError, RulesError.
        """
        if pod.host_ports:
            self.reconcile()
            return
        parts: list[Part] = [
            (TABLES[family], [DeleteElements(m, list(e.items())) for m, e in maps.items()])
            for family, maps in tables.elements(pod).items()
        ]
        try:
            self._commit(parts)
        except BatchError as error:
            if error.errno not in REFUSALS:
                raise
            self.reconcile()

    def check(self, pod: PodRules) -> None:
        """Raise RulesError naming what is missing: a table, rules of it, or one of the pod's elements."""
        with self._lock:
            for family, maps in tables.elements(pod).items():
                found = self._found(family)
                if found is None:
                    raise RulesError(f"the nftables table {TABLES[family]} is missing")
                if not found.intact:
                    raise RulesError(f"the nftables table {TABLES[family]} lacks rules")
                for which, elements in maps.items():
                    for key, data in elements.items():
                        _check_element(family, which, key, data, found.contents[which])

    def reconcile(self) -> int:
        """Make the tables hold exactly what the live attachments want; return how many elements changed.

        A table that is missing or lacks rules is made anew in the same transaction, elements included, and
        counts as one more. Raises RulesError if the ruleset does not hold still, BatchError if it is refused.
        """
        with self._lock:
            for _ in range(RECONCILE_TRIES):
                # First the generation: whoever changes the tables from now on makes the kernel refuse this
                # batch, and whoever did so before had told the ledger, which is read later.
                generation = self._nft.generation()
                try:
                    found = {family: self._found(family) for family in tables.FAMILIES}
                    parts, changes = _difference(found, tables.wanted(self._live()))
                    self._nft.commit(*parts, generation=generation)
                except BatchError as error:
                    if not error.outdated:
                        raise
                except NetlinkError as error:
                    if not error.gone:  # a table that was there a moment ago
                        raise
                else:
                    return changes
        raise RulesError(
            f"the nftables ruleset changed during each of {RECONCILE_TRIES} tries to set it right"
        )

    def generation(self) -> tuple[int, int]:
        """Return how many changes the ruleset of this namespace has seen, and how many were made here."""
        with self._lock:
            return self._nft.generation(), self._nft.commits

    def _commit(self, parts: list[Part]) -> None:
        with self._lock:
            self._nft.commit(*parts)

    def _found(self, family: TableFamily) -> _Found | None:
        """Return what there is of a family's table, None if there is none."""
        table = TABLES[family]
        comment = self._nft.table_comment(table)
        if comment is None:
            return None
        if comment != tables.layout_comment(family) or self._nft.rules(table) != tables.rule_comments(family):
            return _Found(intact=False, contents={})
        return _Found(True, {which: self._nft.elements(table, which) for which in tables.maps(family)})


def _difference(found: dict[TableFamily, _Found | None], wanted: Contents) -> tuple[list[Part], int]:
    """Return what turns the tables that are there into the wanted ones, and how many elements change."""
    parts: list[Part] = []
    changes = 0
    for family, there in found.items():
        here = wanted.get(family, {})
        operations: list[Operation] = []
        if there and there.intact:
            for which, elements in there.contents.items():
                old, new = _changed(elements, here.get(which, {}))
                operations += [DeleteElements(which, old)] if old else []
                operations += [AddElements(which, new)] if new else []
                changes += len({key for key, _ in (*old, *new)})
        elif there or here or family is not BRIDGE:
            operations += [DeleteTable()] if there else []
            operations += tables.structure(family)
            operations += [AddElements(which, list(elements.items())) for which, elements in here.items()]
            changes += 1 + sum(map(len, here.values()))
        if operations:
            parts.append((TABLES[family], operations))
    return parts, changes


def _changed(there: Elements, here: Elements) -> tuple[Pairs, Pairs]:
    """Return the elements to remove and to add so that a map that holds `there` holds `here`."""
    missing = object()
    old = [(key, data) for key, data in there.items() if here.get(key, missing) != data]
    return old, [(key, data) for key, data in here.items() if there.get(key, missing) != data]


def _check_element(family: TableFamily, which: Map, key: bytes, data: Data, there: Elements) -> None:
    name = f"{tables.words(which.key, family, key)} of {which.name} in the nftables table {TABLES[family]}"
    if key not in there:
        raise RulesError(f"the element {name} is missing")
    if there[key] == data:
        return
    match there[key]:
        case LimitOver(rate):
            raise RulesError(f"the element {name} has another limit: {rate} bytes/second")
        case bytes(found):
            other = tables.words(which.data, family, found)
            raise RulesError(f"the element {name} leads to {other}, which is not the pod")
