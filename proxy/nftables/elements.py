"""From a frontend to map elements, and from two versions of it to the elements that differ. Pure."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_network
from typing import NamedTuple

from msgspec.structs import replace

from netlink.family import Family
from netlink.nftables.objects import Data, Elements, Goto
from proxy.frontends import Action, Backend, Frontend, FrontendKey, Masquerade, Origin
from proxy.l7 import places
from proxy.model import Protocol
from proxy.nftables.parts import balancer
from proxy.nftables.ruleset import (
    DROPPED,
    NODE_PORTS,
    NODE_PORTS_INTERNAL,
    REJECTED,
    SERVICES,
    SERVICES_INTERNAL,
    Kind,
    affinity_id,
    shape_id,
)

_PORT = struct.Struct(">HH")
_INDEX: list[bytes] = []

Pairs = list[tuple[bytes, Data]]


class Delta(NamedTuple):
    """Elements to take out of a kind's maps and to put in, map by map."""

    old_shapes: Pairs
    new_shapes: Pairs
    old_endpoints: Pairs
    new_endpoints: Pairs
    old_affinity: Pairs
    new_affinity: Pairs


def led(frontend: Frontend, port: int) -> Frontend:
    """Return a frontend as packets see it: what the node's L7 proxy balances has that for its endpoint."""
    if frontend.proxied is None or frontend.action is not Action.BALANCE:
        return frontend
    proxy = Backend(places.address(frontend.proxied, frontend.key.family, frontend.service), port, False)
    return replace(frontend, masquerade=Masquerade.NEVER, endpoints=(proxy,), affinity=0, proxied=None)


def kind_of(key: FrontendKey) -> Kind:
    """Return which maps a frontend belongs in."""
    if key.address:
        return SERVICES_INTERNAL if key.origin is Origin.INTERNAL else SERVICES
    return NODE_PORTS_INTERNAL if key.origin is Origin.INTERNAL else NODE_PORTS


def key_bytes(key: FrontendKey) -> bytes:
    """Encode a frontend's key as the registers that the rules load."""
    tail = bytes((key.protocol.value, 0, 0, 0)) + _PORT.pack(key.port, 0)
    return socket.inet_pton(key.family.af, key.address) + tail if key.address else tail


def key_of(kind: Kind, family: Family, encoded: bytes) -> FrontendKey:
    """Return the frontend's key that an element of a kind's shapes stands for."""
    size = family.size if kind.by_address else 0
    address = socket.inet_ntop(family.af, encoded[:size]) if size else ""
    port, _ = _PORT.unpack_from(encoded, size + 4)
    origin = Origin.INTERNAL if kind in (SERVICES_INTERNAL, NODE_PORTS_INTERNAL) else Origin.ANY
    return FrontendKey(family, address, Protocol(encoded[size]), port, origin)


def shape(frontend: Frontend) -> bytes:
    """Return the number that tells what happens to packets to a frontend."""
    if frontend.action is Action.BALANCE:
        kind = kind_of(frontend.key)
        if frontend.affinity:
            return affinity_id(kind)
        return shape_id(kind, len(frontend.endpoints), frontend.masquerade)
    return REJECTED if frontend.action is Action.REJECT else DROPPED


def affinity(frontend: Frontend) -> Goto | None:
    """Return where packets to a frontend with session affinity go; None for any other."""
    if frontend.action is Action.BALANCE and frontend.affinity:
        return Goto(balancer(kind_of(frontend.key), frontend).chain)
    return None


def endpoint_data(frontend: Frontend) -> list[bytes]:
    """Encode a frontend's endpoints, in order, as the registers that dnat reads; affinity needs none."""
    if frontend.affinity:
        return []
    af, pton, pack = frontend.key.family.af, socket.inet_pton, _PORT.pack
    return [pton(af, address) + pack(port, 0) for address, port, _ in frontend.endpoints]


def delta(old: Frontend | None, new: Frontend | None) -> Delta:
    """Return the elements that turn one version of a frontend into another; at least one is given."""
    found = Delta([], [], [], [], [], [])
    some = new or old
    assert some
    prefix = key_bytes(some.key)
    for of, removed, added in (
        (shape, found.old_shapes, found.new_shapes),
        (affinity, found.old_affinity, found.new_affinity),
    ):
        before, after = of(old) if old else None, of(new) if new else None
        if before != after:
            removed.extend([(prefix, before)] if before else [])
            added.extend([(prefix, after)] if after else [])
    was = endpoint_data(old) if old else []
    now = endpoint_data(new) if new else []
    if not was:  # as in a load of everything
        found.new_endpoints.extend(
            (prefix + index, data) for index, data in zip(_indexes(len(now)), now, strict=True)
        )
        return found
    keys = [prefix + index for index in _indexes(max(len(was), len(now)))]
    for key, here, there in zip(keys, was, now, strict=False):
        if here != there:
            found.old_endpoints.append((key, here))
            found.new_endpoints.append((key, there))
    found.old_endpoints.extend(zip(keys[len(now) :], was[len(now) :], strict=True))
    found.new_endpoints.extend(zip(keys[len(was) :], now[len(was) :], strict=True))
    return found


def _indexes(count: int) -> list[bytes]:
    """Return the first indexes, encoded in host order as `numgen` makes them."""
    while len(_INDEX) < count:
        _INDEX.append(struct.pack("=I", len(_INDEX)))
    return _INDEX[:count]


def hairpin(family: Family, address: str) -> tuple[bytes, Data]:
    """Return the element that lets an endpoint reach itself."""
    packed = socket.inet_pton(family.af, address)
    return packed + packed, None


def address(family: Family, text: str) -> tuple[bytes, Data]:
    """Return the element of a set of addresses."""
    return socket.inet_pton(family.af, text), None


def allowed_sources(frontend: Frontend) -> Pairs:
    """Return the ranges of sources that may come to a frontend, each as first and last key."""
    family, prefix = frontend.key.family, key_bytes(frontend.key)
    return [
        (prefix + start.to_bytes(family.size, "big") + prefix + (end - 1).to_bytes(family.size, "big"), None)
        for start, end in _joined(family, frontend.sources or ())
    ]


def difference(there: Elements, here: Elements, *, interval: bool) -> tuple[Pairs, Pairs]:
    """Return the elements to remove and to add so that a map that holds `there` holds `here`.

    Ranges are removed and added whole, each start before its end, in order of address: recent kernels look
    for the start just before when an end is removed or added.
    """
    if not interval:
        old = [(k, d) for k, d in there.items() if k not in here or here[k] != d]
        return old, [(k, d) for k, d in here.items() if k not in there or there[k] != d]
    was, now = _ranges(there), _ranges(here)
    return _flat(was - now), _flat(now - was)


def _ranges(boundaries: Elements) -> set[tuple[tuple[bytes, Data], ...]]:
    """Return the start and the end of each range of an interval set; the last address needs no end."""
    ranges: set[tuple[tuple[bytes, Data], ...]] = set()
    start: tuple[bytes, Data] | None = None
    # At one address the end of a range comes before the start of the next.
    for key in sorted(boundaries, key=lambda k: (k[:-1], -k[-1])):
        if key[-1] and start:
            ranges.add((start, (key, None)))
            start = None
        elif not key[-1]:
            start = key, boundaries[key]
    return ranges | ({(start,)} if start else set())


def _flat(ranges: set[tuple[tuple[bytes, Data], ...]]) -> Pairs:
    return [element for ends in sorted(ranges, key=lambda r: r[0][0]) for element in ends]


def _joined(family: Family, cidrs: Iterable[str]) -> list[tuple[int, int]]:
    networks = (ip_network(c) for c in cidrs)
    spans = sorted(
        (int(n.network_address), int(n.broadcast_address) + 1) for n in networks if n.version == family.value
    )
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
