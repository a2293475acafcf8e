"""The bridge of a mode that was: `podwire0` goes when pods are connected in another way and none is on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from cni.attachments import wired
from cni.settings import Mode
from cni.wiring import BRIDGE
from ipam.ledger import Attachment
from netlink.errors import NetlinkError
from netlink.requests import link_delete
from netlink.rtnl import Rtnl

log = logging.getLogger("podwire.bridge")


def leftover_bridge(mode: Mode, rtnl: Rtnl, attachments: Iterable[Attachment]) -> list[str]:
    """Remove podwire0, with its addresses, when it is no longer needed; a sentence while pods are on it.

    Otherwise its route to the podCIDR would lead packets for addresses of no pod onto it. Call it when the
    CNI plugin goes by the mode already, so that no pod comes to the bridge meanwhile.
    """
    bridge = rtnl.link(BRIDGE) if mode is not Mode.BRIDGE else None
    if bridge is None:
        return []
    pods = {a.host_ifname: _name(a) for a in attachments if wired(a).mode is Mode.BRIDGE}
    ports = {link.name for link in rtnl.links() if link.master == bridge.index}
    if there := sorted({*pods.values(), *(ports - pods.keys())}):
        return [f"the bridge {BRIDGE} of mode bridge stays until these are made again: {', '.join(there)}"]
    try:
        rtnl.commit(link_delete(BRIDGE))
    except NetlinkError as error:
        return [] if error.gone else [f"the bridge {BRIDGE} of mode bridge stays: {error}"]
    log.info("removed the bridge %s: the mode is %s, and no pod is on it", BRIDGE, mode.value)
    return []


def _name(attachment: Attachment) -> str:
    return attachment.pod or attachment.key.container_id
