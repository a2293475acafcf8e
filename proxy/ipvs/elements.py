"""From a frontend to elements of the table's maps. Pure."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from netlink.family import Family
from netlink.ipvs import Real
from netlink.nftables.objects import Elements, Map
from proxy.frontends import Action, Frontend, FrontendKey, Masquerade
from proxy.ipvs.ruleset import DROPPED, LEADS, MARKS, REJECTED, shape_id
from proxy.ipvs.ways import Way, way
from proxy.l7 import places
from proxy.nftables.elements import key_of, kind_of
from proxy.nftables.ruleset import KINDS

_PORT = struct.Struct(">HH")


def shape(frontend: Frontend) -> bytes:
    """Return the number that tells what happens to packets to a frontend."""
    found = way(frontend)
    if found is Way.NONE:
        return REJECTED if frontend.action is Action.REJECT else DROPPED
    kind = kind_of(frontend.key)
    if found is Way.PROXY:
        return shape_id(kind, found, Masquerade.NEVER)
    return shape_id(kind, found, frontend.masquerade)


def proxy_of(frontend: Frontend, port: int) -> Real | None:
    """Return where the node's L7 proxy listens for a frontend; None if it does not."""
    if frontend.proxied is None or way(frontend) is not Way.PROXY:
        return None
    return Real(places.address(frontend.proxied, frontend.key.family, frontend.service), port)


def lead(family: Family, to: Real) -> bytes:
    """Encode where to a frontend is led, as the registers that dnat reads."""
    return socket.inet_pton(family.af, to.address) + _PORT.pack(to.port, 0)


def mark(number: int) -> bytes:
    """Encode a mark, in host order."""
    return struct.pack("=I", number)


def found_marks(family: Family, there: Mapping[Map, Elements]) -> dict[FrontendKey, int]:
    """Return which mark each frontend has, from what is in the maps."""
    return {
        key_of(kind, family, key): struct.unpack("=I", data)[0]
        for kind in KINDS
        for key, data in there.get(MARKS[kind], {}).items()
        if isinstance(data, bytes)
    }


def found_ports(family: Family, made: str, there: Mapping[Map, Elements]) -> dict[FrontendKey, int]:
    """Return the port of the made address to which each frontend is led, from what is in the maps."""
    packed = socket.inet_pton(family.af, made)
    return {
        key_of(kind, family, key): _PORT.unpack_from(data, family.size)[0]
        for kind in KINDS
        for key, data in there.get(LEADS[kind], {}).items()
        if isinstance(data, bytes) and data.startswith(packed)
    }
