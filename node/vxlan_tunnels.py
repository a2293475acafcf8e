"""VXLAN in the kernel: a device for each family of the underlay, its neighbours and forwarding entries."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Set
from dataclasses import replace

from netlink.errors import NetlinkError
from netlink.requests import (
    NUD_PERMANENT,
    Request,
    Vxlan,
    fdb_delete,
    fdb_replace,
    link_delete,
    link_set,
    link_up,
    neighbour_delete,
    neighbour_replace,
    vxlan_add,
)
from netlink.rtnl import Rtnl
from node.backends import vxlan
from node.backends.hops import Forwarding, Hop, Neighbour, Site
from node.logs import fields
from node.peers import Moved, Peers
from node.tunnel_rules import Outer
from node.tunnels import Entries

log = logging.getLogger("podwire.network")


class VxlanTunnels:
    """The VXLAN devices of the network namespace of the thread that uses this."""

    names: tuple[str, ...] = tuple(vxlan.NAMES.values())

    def __init__(self, rtnl: Rtnl) -> None:
        self._rtnl = rtnl
        self.refused: dict[str, str] = {}
        self.forwarding: set[Forwarding] = set()
        """The forwarding entries that the kernel is to have."""

    def make(self, site: Site, needed: Set[str]) -> dict[str, int]:
        """See Tunnels."""
        self.refused = {}
        found = {name: self._device(site, version, needed) for version, name in vxlan.NAMES.items()}
        return {name: index for name, index in found.items() if index}

    def compare(self, site: Site, hops: Iterable[Hop]) -> tuple[Request, ...]:
        """See Tunnels."""
        hops = tuple(hops)
        neighbours = {(n.device, n.address): n for hop in hops for n in hop.neighbours}
        forwarding = {(f.device, f.mac): f for hop in hops for f in hop.forwarding}
        self.forwarding = set(forwarding.values())
        requests: list[Request] = []
        for index in (site.tunnels[name] for name in self.names if name in site.tunnels):
            there = {
                (index, n.address): n.mac for n in self._rtnl.neighbours(index) if n.state == NUD_PERMANENT
            }
            known = {(index, f.mac): f.address for f in self._rtnl.forwarding(index)}
            requests += [neighbour_delete(*key) for key in there.keys() - neighbours.keys()]
            requests += [
                fdb_delete(index, mac, known[index, mac]) for _, mac in known.keys() - forwarding.keys()
            ]
            requests += [
                _forward(f)
                for key, f in forwarding.items()
                if key[0] == index and known.get(key) != f.address
            ]
            requests += [
                _meet(n) for key, n in neighbours.items() if key[0] == index and there.get(key) != n.mac
            ]
        return tuple(requests)

    def change(self, moved: Moved, peers: Peers) -> Entries:
        """See Tunnels."""
        neighbours = {n[:2]: n for hop in moved.new for n in hop.neighbours}
        forwarding = {f[:2]: f for hop in moved.new for f in hop.forwarding}
        met = {n[:2] for hop in moved.gone for n in hop.neighbours} - neighbours.keys()
        forwarded = {f for hop in moved.gone for f in hop.forwarding if f[:2] not in forwarding}
        for hop in moved.gone:  # the node's other hops may need the same entry
            forwarded.difference_update(f for left in peers.of(hop.node) for f in left.forwarding)
        self.forwarding -= forwarded | {
            f for hop in moved.gone for f in hop.forwarding if f[:2] in forwarding
        }
        self.forwarding |= set(forwarding.values())
        return Entries(
            (*map(_forward, forwarding.values()), *map(_meet, neighbours.values())),
            (*(neighbour_delete(*key) for key in met), *(fdb_delete(*f) for f in forwarded)),
        )

    def outer(self, site: Site) -> dict[int, Outer]:
        """See Tunnels."""
        return {v: Outer(site.config.port) for v, name in vxlan.NAMES.items() if name in site.tunnels}

    def _device(self, site: Site, version: int, needed: Set[str]) -> int | None:
        """Make a device what it should be, or remove it; return its index if it is there."""
        name = vxlan.NAMES[version]
        wanted = vxlan.device(site, version, site.config) if name in needed else None
        found = self._rtnl.link(name)
        if found and (wanted is None or found.vxlan is None or not _alike(found.vxlan, wanted)):
            log.info("tunnel device %s removed", name)
            self._rtnl.commit(link_delete(name))
            found = None
        if wanted is None:
            return None
        try:
            if found is None:
                self._rtnl.commit(vxlan_add(wanted))
                log.info("tunnel device %s made", name, extra=fields(local=wanted.local, mtu=wanted.mtu))
                return socket.if_nametoindex(name)
            if (found.mac, found.mtu) != (wanted.mac, wanted.mtu):
                self._rtnl.commit(link_set(found.index, mac=wanted.mac, mtu=wanted.mtu))
            if not found.up:
                self._rtnl.commit(link_up(found.index))
        except NetlinkError as error:
            port, vni = wanted.port, wanted.vni
            self.refused[name] = (
                f"no tunnel device {name} (UDP port {port}, VNI {vni}): {os.strerror(error.errno or 0)}"
            )
            return None
        return found.index


def _alike(found: Vxlan, wanted: Vxlan) -> bool:
    """Whether a device is the one that is wanted, but for what can be changed."""
    return replace(found, mac=wanted.mac, mtu=wanted.mtu) == wanted


def _forward(entry: Forwarding) -> Request:
    return fdb_replace(*entry)


def _meet(neighbour: Neighbour) -> Request:
    return neighbour_replace(*neighbour)
