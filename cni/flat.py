"""Flat mode: the node answers on its uplink for the addresses of its pods.

The neighbours of the node then find the pods where they find the node; no route for them is needed anywhere.
Source: ip-neighbour(8), proxy entries; Documentation/networking/ip-sysctl, proxy_ndp.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from netaddr import IPAddress

from cni import sysctls
from cni.settings import Mode, NodeSettings
from ipam.ledger import Attachment, State
from netlink.announce import announce
from netlink.errors import NetlinkError
from netlink.requests import Request, proxy_add, proxy_delete
from netlink.rtnl import Rtnl


class NoUplink(Exception):
    """The interface of flat mode is not there; the text is one sentence."""


def answer_for(uplink: str, addresses: Iterable[str]) -> None:
    """Answer for addresses on the uplink, and tell its neighbours at once. Raises NoUplink."""
    with Rtnl() as rtnl:
        link = rtnl.link(uplink)
        if link is None:
            raise NoUplink(_missing(uplink))
        rtnl.commit(*(proxy_add(link.index, address) for address in addresses))
    for address in addresses:
        # Nobody depends on it: a neighbour without a stale entry asks.
        with contextlib.suppress(OSError):
            announce(uplink, address, link.mac)


def answer_no_more(uplink: str, addresses: Iterable[str]) -> None:
    """Stop answering for addresses; harmless when the uplink or the entries are gone."""
    with contextlib.suppress(NoUplink), Rtnl() as rtnl:
        index = _index(uplink)
        for address in addresses:
            try:
                rtnl.commit(proxy_delete(index, address))
            except NetlinkError as error:
                if not error.gone:
                    raise


def sync(settings: NodeSettings, attachments: Iterable[Attachment]) -> int:
    """Answer for exactly the pods that there are; return how many entries changed. Raises NoUplink.

    An interface that goes down and comes up, or is renamed, loses its entries; entries for addresses that
    no pod may have are somebody else's and stay.
    """
    if settings.mode is not Mode.FLAT:
        return 0
    index = _index(settings.uplink)
    with contextlib.suppress(OSError):  # a kernel without IPv6 has no such file
        sysctls.put(Path(f"/proc/sys/net/ipv6/conf/{settings.uplink}/proxy_ndp"), "1")
    wanted = {str(a) for entry in attachments if entry.state is not State.RELEASED for a in entry.addresses}
    with Rtnl() as rtnl:
        present = {address for where, address in rtnl.proxies() if where == index}
        stale = {a for a in present - wanted if _from_a_pool(settings, a)}
        requests: list[Request] = [proxy_delete(index, a) for a in sorted(stale)]
        requests += [proxy_add(index, a) for a in sorted(wanted - present)]
        rtnl.commit(*requests)
    return len(requests)


def _from_a_pool(settings: NodeSettings, address: str) -> bool:
    ip = IPAddress(address)
    return any(ip in part for pool in settings.ipam.pools for part in pool.ranges)


def _index(uplink: str) -> int:
    try:
        return socket.if_nametoindex(uplink)
    except OSError:
        raise NoUplink(_missing(uplink)) from None


def _missing(uplink: str) -> str:
    return f"the interface {uplink!r}, on which flat mode answers for pods, is missing"
