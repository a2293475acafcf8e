"""nftables in memory: refuses what the kernel refuses, so that tests and rendering need no kernel.

The contract tests in tests/netlink run the same operations here and in a network namespace.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from netlink.family import Family
from netlink.nftables.batch import BatchError
from netlink.nftables.expressions import Do, Expression, Lookup, MapLookup, Remember, VerdictLookup
from netlink.nftables.objects import Chain, Data, Elements, Goto, Map, Rule
from netlink.nftables.operations import (
    AddChain,
    AddElements,
    AddMap,
    AddRule,
    AddTable,
    DeleteChain,
    DeleteElements,
    DeleteMap,
    DeleteTable,
    EnsureElements,
    FlushMap,
    Operation,
)


@dataclass(slots=True)
class State:
    """What a table holds."""

    comment: str
    chains: dict[str, Chain] = field(default_factory=dict)
    rules: dict[str, list[Rule]] = field(default_factory=dict)
    maps: dict[str, Map] = field(default_factory=dict)
    elements: dict[str, Elements] = field(default_factory=dict)


class FakeNft:
    """One table of nftables in memory."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.state: State | None = None
        self.commits = 0

    def commit(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or, with BatchError, none."""
        before = copy.deepcopy(self.state)
        try:
            for operation in operations:
                self._apply(operation)
        except BatchError:
            self.state = before
            raise
        self.commits += 1

    def table_comment(self) -> str | None:
        """Return the comment of the table, or None when there is no table."""
        return self.state.comment if self.state else None

    def chains(self) -> frozenset[str]:
        """Return the names of the table's chains."""
        return frozenset(self.state.chains) if self.state else frozenset()

    def rules(self) -> dict[str, tuple[str, ...]]:
        """Return the comments of the table's rules, in order, by chain."""
        rules = self.state.rules.items() if self.state else ()
        return {chain: tuple(r.comment for r in found) for chain, found in rules if found}

    def maps(self) -> frozenset[str]:
        """Return the names of the table's sets and maps."""
        return frozenset(self.state.maps) if self.state else frozenset()

    def elements(self, which: Map) -> Elements:
        """Return what is in a map."""
        return dict(self.state.elements[which.name]) if self.state else {}

    def _apply(self, operation: Operation) -> None:
        if isinstance(operation, AddTable):
            if self.state:
                raise _refusal(errno.EEXIST, operation)
            self.state = State(operation.comment)
            return
        if self.state is None:
            raise _refusal(errno.ENOENT, operation)
        match operation:
            case DeleteTable():
                self.state = None
            case AddChain(chain):
                if chain.name in self.state.chains:
                    raise _refusal(errno.EEXIST, operation)
                self.state.chains[chain.name] = chain
                self.state.rules[chain.name] = []
            case DeleteChain(name):
                if name not in self.state.chains:
                    raise _refusal(errno.ENOENT, operation)
                if self._in_use(name):
                    raise _refusal(errno.EBUSY, operation)
                del self.state.chains[name], self.state.rules[name]
            case AddMap(which):
                if which.name in self.state.maps:
                    raise _refusal(errno.EEXIST, operation)
                self.state.maps[which.name] = which
                self.state.elements[which.name] = {}
            case DeleteMap():
                if operation.name not in self.state.maps:
                    raise _refusal(errno.ENOENT, operation)
                if any(_map_of(e) == operation.name for e in self._expressions()):
                    raise _refusal(errno.EBUSY, operation)
                del self.state.maps[operation.name], self.state.elements[operation.name]
            case AddRule(rule):
                if rule.chain not in self.state.chains or not self._resolves(rule):
                    raise _refusal(errno.ENOENT, operation)
                self.state.rules[rule.chain].append(rule)
            case AddElements(which, elements):
                self._add(operation, which, elements)
            case EnsureElements(which, elements):
                here = self._elements_of(operation, which)
                self._add(operation, which, [(k, d) for k, d in elements if (k, d) not in here.items()])
            case FlushMap(which):
                self._elements_of(operation, which).clear()
            case DeleteElements(which, elements):
                here = self._elements_of(operation, which)
                for key, _ in elements:
                    there = next(self._holding(which, here, _first(key)), key) if which.ranges else key
                    if there not in here:
                        raise _refusal(errno.ENOENT, operation, key)
                    del here[there]

    def _resolves(self, rule: Rule) -> bool:
        """Whether every map and chain that the rule names is there."""
        assert self.state
        for expression in rule.expressions:
            name = _map_of(expression)
            if name and name not in self.state.maps:
                return False
            if isinstance(expression, Do) and expression.chain and expression.chain not in self.state.chains:
                return False
        return True

    def _in_use(self, chain: str) -> bool:
        """Whether a rule or an element goes to a chain."""
        assert self.state
        data = (d for elements in self.state.elements.values() for d in elements.values())
        return any(isinstance(e, Do) and e.chain == chain for e in self._expressions()) or Goto(chain) in data

    def _expressions(self) -> Iterator[Expression]:
        assert self.state
        return (e for rules in self.state.rules.values() for r in rules for e in r.expressions)

    def _holding(self, which: Map, here: Elements, key: bytes) -> Iterator[bytes]:
        """Yield the ranges of a set that hold a key."""
        return (there for there in here if which.spans(self.family, there, key))

    def _overlaps(self, which: Map, here: Elements, element: bytes) -> bool:
        """Whether a range begins or ends in another one: what the kernel sees of two that overlap."""
        ends = (_first(element), element[len(element) // 2 :])
        return any(True for key in ends for _ in self._holding(which, here, key))

    def _add(self, operation: Operation, which: Map, elements: Sequence[tuple[bytes, Data]]) -> None:
        assert self.state
        here = self._elements_of(operation, which)
        size = which.element_size(self.family)
        for key, data in elements:
            if len(key) != size:
                raise _refusal(errno.EINVAL, operation, key)
            if key in here or (which.ranges and self._overlaps(which, here, key)):
                raise _refusal(errno.EEXIST, operation, key)
            if isinstance(data, Goto) and data.chain and data.chain not in self.state.chains:
                raise _refusal(errno.ENOENT, operation, key)
            if which.dynamic and len(here) >= which.size:
                raise _refusal(errno.ENFILE, operation, key)
            here[key] = data

    def _elements_of(self, operation: Operation, which: Map) -> Elements:
        assert self.state
        if which.name not in self.state.elements:
            raise _refusal(errno.ENOENT, operation)
        return self.state.elements[which.name]


def _map_of(expression: Expression) -> str:
    """Return the name of the set or map that an expression uses, if it uses one."""
    return (
        expression.set_name if isinstance(expression, Lookup | MapLookup | VerdictLookup | Remember) else ""
    )


def _first(element: bytes) -> bytes:
    """Return the first key of a range."""
    return element[: len(element) // 2]


def _refusal(code: int, operation: Operation, element: bytes | None = None) -> BatchError:
    return BatchError(code, operation, element, "")
