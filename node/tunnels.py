"""What the network asks of tunnel devices, whatever kind they are.

    Site, what hops need ──make──▶ devices       hops ──compare──▶ their entries, all of them
                                                 what changed ──change──▶ a change's entries

`node.vxlan_tunnels` and `node.wireguard_tunnels` are the kinds there are. All of it is for one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple, Protocol

from netlink.requests import Request
from node.backends.hops import Hop, Site
from node.peers import Moved, Peers
from node.tunnel_rules import Outer


class Entries(NamedTuple):
    """What a change of peers asks of route netlink, before the routes are changed and after that."""

    before: tuple[Request, ...] = ()
    after: tuple[Request, ...] = ()


class Tunnels(Protocol):
    """The tunnel devices of a kind. `refused` are sentences about what could not be had, by what it was."""

    names: tuple[str, ...]
    refused: dict[str, str]

    def make(self, site: Site, needed: Set[str]) -> dict[str, int]:
        """Make the devices what they should be, remove others of the kind; return their indexes by name.

        `needed` are the devices that some hop needs.
        """

    def compare(self, site: Site, hops: Iterable[Hop]) -> tuple[Request, ...]:
        """Return what makes the devices' entries exactly those of the hops, after `make`."""

    def change(self, moved: Moved, peers: Peers) -> Entries | None:
        """Return what a change asks for; None: everything has to be compared instead. Raises NetlinkError."""

    def outer(self, site: Site) -> Mapping[int, Outer]:
        """Return what rules there are to be about outer packets, by the IP version of the underlay."""
