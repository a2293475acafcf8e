"""Which addresses a pod may get: pools, exclusions, reservations, and what the pod itself asks for. Pure.

IpamConfig (the node) + podCIDRs + Wish (the pod) ──demands──▶ Demand, one for each address it is to get
IpamConfig (the node) + podCIDRs                  ──groups───▶ Group, what figures are kept of
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from netaddr import IPAddress, IPNetwork

from ipam.ranges import (
    AddressRange,
    RangeError,
    limit,
    overlapping,
    parse_range,
    pod_addresses,
    single,
    special,
    subtract,
    whole,
)

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NUMBER = r"(\d+(?:\.\d+)?)"
DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?|{_NUMBER}", re.ASCII)
LONGEST = 1e9  # seconds; what is longer is a mistake

# Addresses that mean something else on every node, so that no pod can have them.
NOT_FOR_PODS = tuple(
    parse_range(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0-255.255.255.255",
        "::/8",
        "fe80::/10",
        "ff00::/8",
    )
)


@dataclass(frozen=True, slots=True)
class Pool:
    """A named set of ranges for the pods of some namespaces, and for those that ask for it by name.

    `namespaces` are names or patterns (`*`, `?`, `[…]`); "*" takes pods of no known namespace too.
    """

    name: str
    ranges: tuple[AddressRange, ...]
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IpamConfig:
    """How a node gives addresses.

    Addresses of `exclude` are never given, those of `reserve` only when asked for by name. An address is not
    given again before it has been free for `quarantine` seconds. `exhausted_status`: whether STATUS fails
    while there is no address left.
    """

    pools: tuple[Pool, ...] = ()
    exclude: tuple[AddressRange, ...] = ()
    reserve: tuple[AddressRange, ...] = ()
    quarantine: float = 10.0
    exhausted_status: bool = True

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> IpamConfig:
        """Read a configuration as JSON or YAML has it; what is absent has its default.

        Keys are the names of the fields. Ranges are texts as `parse_range` takes them, `quarantine` a number
        of seconds or a text such as "30s". Raises RangeError, one sentence with the field and its value.
        """
        _known_keys("ipam", raw, [field.name for field in fields(cls)])
        default = cls()
        status = raw.get("exhausted_status", default.exhausted_status)
        if not isinstance(status, bool):
            raise RangeError(f"exhausted_status: {status!r} is neither true nor false")
        config = cls(
            pools=tuple(_pool(i, entry) for i, entry in enumerate(_list("pools", raw.get("pools", ())))),
            exclude=_ranges("exclude", raw.get("exclude", ())),
            reserve=_ranges("reserve", raw.get("reserve", ())),
            quarantine=parse_duration(raw.get("quarantine", default.quarantine), "quarantine"),
            exhausted_status=status,
        )
        _check_pools(config.pools)
        return config

    def to_json(self) -> str:
        """Return the configuration as text that `from_json` reads: equal text for equal configurations."""
        raw = {
            "pools": [
                {"name": p.name, "ranges": [*map(str, p.ranges)], "namespaces": [*p.namespaces]}
                for p in self.pools
            ],
            "exclude": [*map(str, self.exclude)],
            "reserve": [*map(str, self.reserve)],
            "quarantine": self.quarantine,
            "exhausted_status": self.exhausted_status,
        }
        return json.dumps(raw, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> IpamConfig:
        """Return the configuration that `to_json` wrote; of no text, the default. Free the second time."""
        return _from_json(text)


@dataclass(frozen=True, slots=True)
class Wish:
    """What one pod asks for: a pool, addresses, or (CNI's ipRanges) one address out of each set of ranges.

    `namespace` is the pod's, "" when it is not known.
    """

    namespace: str = ""
    pool: str = ""
    addresses: tuple[IPAddress, ...] = ()
    range_sets: tuple[tuple[AddressRange, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """One address that an attachment is to get: out of these ranges, in their order, or the one requested.

    All ranges are of one family and do not overlap. `source` is for messages.
    """

    source: str
    ranges: tuple[AddressRange, ...]
    requested: IPAddress | None = None

    @property
    def version(self) -> int:
        """The IP version of the address."""
        return self.ranges[0].version

    def allows(self, address: IPAddress) -> bool:
        """Say whether the address is one that the demand asks for."""
        if self.requested is not None:
            return address == self.requested
        return any(address in range_ for range_ in self.ranges)


@dataclass(frozen=True, slots=True)
class Group:
    """The addresses of a podCIDR, or of a pool and one family: given freely, on request, and never."""

    name: str  # "10.1.0.0/24", or the pool's
    version: int
    ranges: tuple[AddressRange, ...]
    reserved: tuple[AddressRange, ...]
    excluded: tuple[AddressRange, ...]


def parse_duration(value: object, field: str = "duration") -> float:
    """Return seconds: of a number of seconds, or of a text such as "10s", "1.5s", "5m", "1h30m", "90".

    Raises RangeError, which names the field.
    """
    seconds = -1.0
    if isinstance(value, str) and value and (match := DURATION.fullmatch(value)):
        numbers = zip(match.groups("0"), (3600, 60, 1, 1), strict=True)
        seconds = sum(float(number) * unit for number, unit in numbers)
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST:
        seconds = float(value)
    if not 0 <= seconds <= LONGEST:
        raise RangeError(f"{field}: {value!r} is not a time such as 10, '10s', '5m' or '1h'")
    return seconds


def demands(config: IpamConfig, cidrs: Sequence[IPNetwork], wish: Wish) -> tuple[Demand, ...]:
    """Return what a pod is to get: one address of each family, or of each range set it brings.

    Exclusions and reservations are taken out already; a requested address may be a reserved one. Empty when
    the node has no podCIDR and the pod's pool none either. Raises RangeError when the wish cannot be met by
    any ledger, one sentence.
    """
    cidrs = tuple(cidrs)
    if wish.range_sets:
        found = [_of_range_set(config, cidrs, index, set_) for index, set_ in enumerate(wish.range_sets)]
    else:
        found = list(_automatic(config, cidrs, _pool_of(config, wish)))
    _check_requested(wish.addresses)
    for address in wish.addresses:
        source = _source_of(config, cidrs, wish, address)
        _replace_automatic(found, address, Demand(source, (single(address),), address))
    for _, demand in found:
        if not demand.ranges:
            raise RangeError(
                f"{demand.source} has no address to give: exclude, reserve and pools have all of it"
            )
    return tuple(demand for _, demand in found)


@functools.lru_cache(maxsize=16)
def groups(config: IpamConfig, cidrs: tuple[IPNetwork, ...]) -> tuple[Group, ...]:
    """Return the groups of addresses that figures are kept of: the podCIDRs, then the pools by family."""
    pooled = [range_ for pool in config.pools for range_ in pool.ranges]
    special_ = [range_ for cidr in cidrs for range_ in special(cidr)]
    made = [_group(config, str(cidr), pod_addresses(cidr), pooled) for cidr in cidrs]
    for pool in config.pools:
        for version in sorted({range_.version for range_ in pool.ranges}):
            ranges = tuple(range_ for range_ in pool.ranges if range_.version == version)
            made.append(_group(config, pool.name, ranges, special_))
    return tuple(made)


def _group(
    config: IpamConfig, name: str, ranges: tuple[AddressRange, ...], others: Iterable[AddressRange]
) -> Group:
    ours = subtract(ranges, others)
    usable = subtract(ours, config.exclude)
    free = subtract(usable, config.reserve)
    return Group(
        name,
        ranges[0].version,
        limit(free),
        reserved=subtract(usable, free),
        excluded=subtract(ours, usable),
    )


# A demand and its IP version, which it does not know itself while it has no ranges.
_Slot = tuple[int, Demand]


@functools.lru_cache(maxsize=64)
def _automatic(config: IpamConfig, cidrs: tuple[IPNetwork, ...], pool: Pool | None) -> tuple[_Slot, ...]:
    """Return one demand for each family, the podCIDRs' families first; a plain ADD asks this every time."""
    found = groups(config, cidrs)
    by_pool = {g.version: g for g in found[len(cidrs) :] if pool and g.name == pool.name}
    made = []
    for group in found[: len(cidrs)]:
        ours = by_pool.pop(group.version, None)
        source = f"pool {ours.name!r}" if ours else f"podCIDR {group.name}"
        made.append((group.version, Demand(source, (ours or group).ranges)))
    made += [(g.version, Demand(f"pool {g.name!r}", g.ranges)) for g in by_pool.values()]
    return tuple(made)


def _of_range_set(
    config: IpamConfig, cidrs: tuple[IPNetwork, ...], index: int, ranges: tuple[AddressRange, ...]
) -> _Slot:
    field = f"ipRanges[{index}]"
    if len({range_.version for range_ in ranges}) != 1:
        raise RangeError(f"{field}: {_words(ranges)} is not a set of ranges of one family")
    _check_ranges(field, ranges)
    not_given = [*config.exclude, *config.reserve, *(r for c in cidrs for r in special(c))]
    demand = Demand(f"{field} {_words(ranges)}", limit(subtract(ranges, not_given)))
    return ranges[0].version, demand


def _pool_of(config: IpamConfig, wish: Wish) -> Pool | None:
    """Return the pool that the pod names, else its namespace's: by name first, then by the first pattern."""
    if wish.pool:
        for pool in config.pools:
            if pool.name == wish.pool:
                return pool
        known = (
            f"the node has {', '.join(repr(p.name) for p in config.pools)}" if config.pools else "it has none"
        )
        raise RangeError(f"pool: the node has no pool {wish.pool!r}; {known}")
    for pool in config.pools:
        if wish.namespace in pool.namespaces:
            return pool
    for pool in config.pools:
        if any(fnmatch.fnmatchcase(wish.namespace, pattern) for pattern in pool.namespaces):
            return pool
    return None


def _check_requested(addresses: Sequence[IPAddress]) -> None:
    for index, address in enumerate(addresses):
        for other in addresses[:index]:
            if other.version == address.version:
                raise RangeError(
                    f"addresses: {address} is a second IPv{address.version} address beside {other}"
                )


def _source_of(config: IpamConfig, cidrs: tuple[IPNetwork, ...], wish: Wish, address: IPAddress) -> str:
    """Say where a requested address is from; RangeError when it is not one that a pod can have here."""
    for range_ in config.exclude:
        if address in range_:
            raise RangeError(f"addresses: {address} is never given, it lies in exclude {range_}")
    for cidr in cidrs:
        if any(address in range_ for range_ in special(cidr)):
            raise RangeError(
                f"addresses: {address} is the network, gateway or broadcast address of podCIDR {cidr}"
            )
    sources = [
        *((f"pool {pool.name!r}", range_) for pool in config.pools for range_ in pool.ranges),
        *((f"reserve {range_}", range_) for range_ in config.reserve),
        *((f"podCIDR {cidr}", whole(cidr)) for cidr in cidrs),
        *((f"ipRanges[{i}] {_words(set_)}", r) for i, set_ in enumerate(wish.range_sets) for r in set_),
    ]
    for source, range_ in sources:
        if address in range_:
            return source
    known = ", ".join(dict.fromkeys(source for source, _ in sources)) or "none"
    raise RangeError(f"addresses: {address} lies in no range of this node ({known})")


def _replace_automatic(found: list[_Slot], address: IPAddress, demand: Demand) -> None:
    """Put a requested address in the place of its family's automatic choice, best of the one it lies in."""
    slots = [
        index
        for index, (version, other) in enumerate(found)
        if version == address.version and other.requested is None
    ]
    if slots:
        around = [index for index in slots if found[index][1].allows(address)]
        found[(around or slots)[0]] = address.version, demand
    else:
        found.append((address.version, demand))


@functools.lru_cache(maxsize=16)
def _from_json(text: str) -> IpamConfig:
    try:
        raw = json.loads(text or "{}")
    except ValueError as error:
        raise RangeError(f"ipam: the configuration is not JSON: {error}") from None
    return IpamConfig.parse(raw)


def _pool(index: int, raw: object) -> Pool:
    where = f"pools[{index}]"
    known = _known_keys(where, raw, [field.name for field in fields(Pool)])
    name = known.get("name")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise RangeError(
            f"{where}.name: {name!r} is not a name of up to 63 small letters, digits and hyphens"
        )
    ranges = _ranges(f"{where}.ranges", known.get("ranges", ()))
    if not ranges:
        raise RangeError(f"{where}.ranges: the pool {name!r} has no ranges")
    _check_ranges(f"{where}.ranges", ranges)
    namespaces = _list(f"{where}.namespaces", known.get("namespaces", ()))
    for namespace in namespaces:
        if not (isinstance(namespace, str) and namespace):
            raise RangeError(f"{where}.namespaces: {namespace!r} is not a namespace's name or pattern")
    return Pool(name, ranges, tuple(namespaces))


def _check_pools(pools: Sequence[Pool]) -> None:
    """Raise RangeError when two pools have the same name, claim the same namespace or share an address."""
    owner: dict[str, str] = {}
    for index, pool in enumerate(pools):
        if any(pool.name == other.name for other in pools[:index]):
            raise RangeError(f"pools[{index}].name: {pool.name!r} is the name of two pools")
        for namespace in pool.namespaces:
            first = owner.setdefault(namespace, pool.name)
            if first != pool.name:
                raise RangeError(
                    f"pools[{index}].namespaces: {namespace!r} is claimed by pool {first!r} already"
                )
    ranges = sorted((range_, pool.name) for pool in pools for range_ in pool.ranges)
    for (one, first), (other, second) in itertools.pairwise(ranges):
        if one.overlaps(other):
            raise RangeError(f"pools: {one} of pool {first!r} overlaps {other} of pool {second!r}")


def _check_ranges(field: str, ranges: Sequence[AddressRange]) -> None:
    for range_ in ranges:
        for other in NOT_FOR_PODS:
            if range_.overlaps(other):
                raise RangeError(f"{field}: {range_} has addresses that no pod can have ({other})")
    if pair := overlapping(ranges):
        raise RangeError(f"{field}: {pair[0]} overlaps {pair[1]}")


def _known_keys(where: str, raw: object, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RangeError(f"{where}: {raw!r} is not a mapping with the keys {', '.join(known)}")
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise RangeError(f"{where}: {key!r} is not a known key; {hint}")
    return raw


def _list(field: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise RangeError(f"{field}: {value!r} is not a list")
    return value


def _ranges(field: str, value: object) -> tuple[AddressRange, ...]:
    found = []
    for text in _list(field, value):
        if not isinstance(text, str):
            raise RangeError(f"{field}: {text!r} is not an address, a CIDR or a range")
        found.append(parse_range(text, field))
    return tuple(found)


def _words(ranges: Iterable[AddressRange]) -> str:
    return ", ".join(map(str, ranges)) or "nothing"
