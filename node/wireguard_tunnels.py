"""WireGuard in the kernel: both devices with their keys and ports, and every peer on each of them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

from cni import sysctls
from netlink.errors import NetlinkError
from netlink.requests import Request, link_delete, link_set, link_up, wireguard_add
from netlink.rtnl import Rtnl
from netlink.wireguard import NAME as KIND
from netlink.wireguard import Device, Known, WireGuard
from node.backends import wireguard
from node.backends.hops import Hop, Site
from node.backends.wireguard import Entry, difference
from node.logs import fields
from node.peers import Moved, Peers
from node.tunnel_rules import Outer
from node.tunnels import Entries
from node.wireguard_keys import KeyFileError, Keys

log = logging.getLogger("podwire.network")

SEND_REDIRECTS = Path("/proc/sys/net/ipv4/conf/all/send_redirects")
MISSING = "the kernel has no WireGuard (module wireguard): no packet gets to other nodes' pods"

Seen = tuple[Mapping[str, Known], Mapping[str, Known]]
"""What each device knows of nodes, by their names."""


class WireguardTunnels:
    """The WireGuard devices of the network namespace of the thread that uses this.

    They are there as long as the backend is in use, be it that no peer is known: peers need our keys first.
    """

    names: tuple[str, ...] = wireguard.NAMES

    def __init__(self, rtnl: Rtnl, keys: Keys | None, clock: Callable[[], float] = time.time) -> None:
        self._rtnl = rtnl
        self._keys = keys
        self._clock = clock
        self.refused: dict[str, str] = {}
        self._devices: dict[int, Device] = {}
        self._entries: dict[str, Entry] = {}
        self._holders: dict[str, str] = {}
        self._contested = False
        self._site: Site | None = None

    def make(self, site: Site, needed: Set[str]) -> dict[str, int]:
        """See Tunnels."""
        self.refused, self._devices, self._site = {}, {}, None
        if site.backend != KIND:
            self._remove()
            return {}
        if self._keys is None:
            self.refused[KIND] = "WireGuard needs a folder for its keys"
            return {}
        self._site = site
        found: dict[str, int] = {}
        try:
            with WireGuard() as kernel:
                for slot, name in enumerate(self.names):
                    if index := self._device(kernel, self._keys, site, slot):
                        found[name] = index
        except NetlinkError as error:
            self.refused[KIND] = MISSING if error.gone else f"no WireGuard: {error}"
        return found

    def compare(self, site: Site, hops: Iterable[Hop]) -> tuple[Request, ...]:
        """See Tunnels; peers are compared and set here, at once."""
        self._entries, self._contested = wireguard.entries(hops)
        self._holders = {cidr: name for name, entry in self._entries.items() for cidr in entry.allowed}
        for slot, device in self._devices.items():
            wanted = wireguard.peers(self._entries.values(), slot, site)
            changes = difference(device.peers, wanted, self._clock())
            try:
                with WireGuard() as kernel:
                    kernel.change(device.name, changes)
            except NetlinkError as error:
                self.refused[device.name] = f"the kernel refuses peers of {device.name}: {error}"
                continue
            if changes:
                log.info("peers of %s compared", device.name, extra=fields(changed=len(changes)))
        self._devices = {}
        return ()

    def change(self, moved: Moved, peers: Peers) -> Entries | None:
        """See Tunnels; one message for each device takes all peers that changed."""
        names = {hop.node for hop in (*moved.gone, *moved.new) if hop.peering}
        if not names or self._site is None:
            return Entries()
        now, contested = wireguard.entries(hop for name in names for hop in peers.of(name))
        new = {cidr: name for name, entry in now.items() for cidr in entry.allowed}
        others = {self._holders.get(cidr) for cidr in new} - names - {None}
        if contested or self._contested or others:  # one range, two nodes: an order is to be found
            return None
        before = {name: self._entries[name] for name in names if name in self._entries}
        with WireGuard() as kernel:
            for slot, name in enumerate(self.names):
                was = wireguard.peers(before.values(), slot, self._site)
                wanted = wireguard.peers(now.values(), slot, self._site)
                there = {key: Known(peer) for key, peer in was.items()}
                kernel.change(name, difference(there, wanted, self._clock()))
        for name, entry in before.items():
            del self._entries[name]
            for cidr in entry.allowed:
                del self._holders[cidr]
        self._entries |= now
        self._holders |= new
        return Entries()

    def outer(self, site: Site) -> dict[int, Outer]:
        """See Tunnels."""
        used = any(name in site.tunnels for name in self.names)
        return {v: Outer(site.config.wireguard_port, True) for v in site.tunnel_versions if used}

    def seen(self) -> Seen:
        """Return what the devices know of nodes now; for any thread. Raises NetlinkError."""
        entries = dict(self._entries)
        found: list[Mapping[str, Known]] = []
        with WireGuard() as kernel:
            for slot, name in enumerate(self.names):
                known = kernel.device(name).peers
                found.append(
                    {node: known[e.keys[slot]] for node, e in entries.items() if e.keys[slot] in known}
                )
        return found[0], found[1]

    def _device(self, kernel: WireGuard, keys: Keys, site: Site, slot: int) -> int | None:
        """Make a device what it should be; return its index if it is."""
        name, port = self.names[slot], site.config.wireguard_port + slot
        mtu = wireguard.device_mtu(site)
        try:
            private = keys.private(slot)
            link = self._rtnl.link(name)
            if link and link.kind != KIND:
                self._rtnl.commit(link_delete(name))
                link = None
            if link is None:
                self._rtnl.commit(wireguard_add(name, mtu))
                log.info("tunnel device %s made", name, extra=fields(port=port, mtu=mtu))
                link = self._rtnl.link(name)
            device = kernel.device(name)
            # Which public key is ours is not known yet after a start. The kernel leaves sessions alone if it
            # has that private key already (wg_set_device, drivers/net/wireguard/netlink.c).
            if not device.key or device.key != keys.public.get(slot):
                kernel.configure(name, private_key=private)
                device = kernel.device(name)
                keys.public[slot] = device.key
            if device.port != port:
                kernel.configure(name, port=port)
            assert link
            if link.mtu != mtu:
                self._rtnl.commit(link_set(link.index, mtu=mtu))
            if not link.up:
                _note_redirects()
                self._rtnl.commit(link_up(link.index))
        except KeyFileError as error:
            self.refused[name] = f"no tunnel device {name}: {error}"
            return None
        except NetlinkError as error:
            self.refused[name] = f"no tunnel device {name} (UDP port {port}): {os.strerror(error.errno or 0)}"
            return None
        self._devices[slot] = device
        return link.index

    def _remove(self) -> None:
        self._entries, self._holders, self._contested = {}, {}, False
        for name in self.names:
            if self._rtnl.link(name):
                log.info("tunnel device %s removed", name)
                self._rtnl.commit(link_delete(name))


def _note_redirects() -> None:
    """Turn off what a device turns off for the whole node when it comes up (wg_open, device.c of WireGuard).

    So `podwire cleanup` knows what it was.
    """
    with contextlib.suppress(OSError):
        if SEND_REDIRECTS.read_text().strip() != "0":
            sysctls.put(SEND_REDIRECTS, "0")
