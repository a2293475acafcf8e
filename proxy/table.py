"""All frontends by key: who owns which, and what a change changes.

Two services can claim the same key (the same external address, a node port set by hand). Then the one
whose name sorts first has it, whatever the order of events, and the other waits. A cluster address is
nobody's external one: externalIPs take nothing from another service.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from netlink.family import Family
from proxy.frontends import Frontend, FrontendKey, Origin
from proxy.model import ObjectName, Protocol


class Change(NamedTuple):
    """A frontend before and after: None where there is none."""

    old: Frontend | None
    new: Frontend | None

    @property
    def key(self) -> FrontendKey:
        """What can be addressed, before and after."""
        some = self.new or self.old
        assert some
        return some.key


def merged(changes: Iterable[Change]) -> list[Change]:
    """Return one change for each key: from the first version to the last.

    A key changes twice in one go when a service gives it up, the next one takes it over and goes too.
    """
    net: dict[FrontendKey, Change] = {}
    for change in changes:
        earlier = net.get(change.key)
        net[change.key] = Change(earlier.old, change.new) if earlier else change
    return [c for c in net.values() if c.old != c.new]


class FrontendTable:
    """The frontends of all services."""

    def __init__(self) -> None:
        self._keys: dict[ObjectName, tuple[FrontendKey, ...]] = {}
        self._winners: dict[FrontendKey, Frontend] = {}
        self._waiting: dict[FrontendKey, list[Frontend]] = {}

    def __iter__(self) -> Iterator[Frontend]:
        return iter(self._winners.values())

    def __len__(self) -> int:
        return len(self._winners)

    def replace(self, service: ObjectName, new: Iterable[Frontend]) -> list[Change]:
        """Set the frontends of a service (none: it is gone); return what changed, key by key."""
        desired = {f.key: f for f in new}
        changes = []
        for key in self._in_order((*self._keys.get(service, ()), *desired)):
            before = self._winners.get(key)
            self._claim(key, service, desired.get(key))
            after = self._winners.get(key)
            if before is not after and before != after:
                changes.append(Change(before, after))
        if desired:
            self._keys[service] = tuple(desired)
        else:
            self._keys.pop(service, None)
        return changes

    def holder(self, family: Family, address: str, protocol: Protocol, port: int) -> str:
        """Return the title of the service port that has an address and port; "" if none has."""
        found = self._winners.get(FrontendKey(family, address, protocol, port, Origin.ANY))
        return found.service if found else ""

    def conflicts(self) -> list[str]:
        """Return a sentence for each key that more than one service claims."""
        return [
            f"service {loser.service} gets no {_place(key)}: service {self._winners[key].service} has it"
            for key, losers in self._waiting.items()
            if key.origin is Origin.ANY
            for loser in losers
        ]

    def _in_order(self, keys: Iterable[FrontendKey]) -> Iterator[FrontendKey]:
        """Yield keys, each for clients inside after the one for any, which decides on it."""
        wanted = dict.fromkeys(keys)
        for key in [k for k in wanted if k.origin is Origin.ANY]:
            yield key
            inside = key._replace(origin=Origin.INTERNAL)
            if inside in wanted or inside in self._winners or inside in self._waiting:
                yield inside
        yield from (k for k in wanted if k._replace(origin=Origin.ANY) not in wanted)

    def _claim(self, key: FrontendKey, service: ObjectName, claim: Frontend | None) -> None:
        """Set what one service claims of a key, and decide who has it."""
        holder = self._winners.get(key)
        waiting = self._waiting.pop(key, [])
        others = [f for f in ([holder, *waiting] if holder else waiting) if _owner(f) != str(service)]
        claims = sorted([*others, claim] if claim else others, key=_rank)
        if key.origin is Origin.INTERNAL:
            # Whoever has the address has it for clients inside, too. A cluster address that another service
            # names as an external one of its own is served to them as to any.
            whole = self._winners.get(key._replace(origin=Origin.ANY))
            claims.sort(key=lambda f: whole is None or _owner(f) != _owner(whole))
            if whole is None or (claims and _owner(claims[0]) != _owner(whole)):
                self._winners.pop(key, None)
                self._waiting |= {key: claims} if claims else {}
                return
        if not claims:
            self._winners.pop(key, None)
            return
        self._winners[key] = claims[0]
        if claims[1:]:
            self._waiting[key] = claims[1:]


def _rank(frontend: Frontend) -> tuple[bool, str]:
    """Order claims: a cluster address goes before an external one that somebody chose to be the same."""
    return not frontend.exclusive, _owner(frontend)


def _owner(frontend: Frontend) -> str:
    """Return "namespace/name" of a frontend's service, without the port's name."""
    return frontend.service.partition(":")[0]


def _place(key: FrontendKey) -> str:
    if not key.address:
        return f"node port {key.port}/{key.protocol.name}"
    return f"{key.address} port {key.port}/{key.protocol.name}"
