"""What an attachment in the ledger stands for in the kernel: its link, its rules. Pure.

How a pod was wired is kept with its attachment, because the node's settings may change while it runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import msgspec

from cni import wiring
from cni.bandwidth import guard
from cni.options import Bandwidth
from cni.settings import Mode, NodeSettings
from cni.tables import PodRules
from cni.wiring import PodLink
from ipam.ledger import Attachment


@dataclass(frozen=True, slots=True)
class Wired:
    """How a pod was wired; the ledger keeps it as text that it does not read."""

    mode: Mode = Mode.ROUTED
    uplink: str = ""
    bandwidth: Bandwidth | None = None

    def text(self) -> str:
        """Return it as the ledger keeps it."""
        return msgspec.json.encode(self).decode()


_WIRED = msgspec.json.Decoder(Wired)
"""Made once: two threads that are the first to decode a type, at the same time, crash the interpreter."""


@functools.lru_cache(maxsize=64)  # most pods of a node are wired alike
def parse_wired(text: str) -> Wired:
    """Return how a pod was wired; attachments of podwire's first version have no such text."""
    return _WIRED.decode(text) if text else Wired()


def wired(attachment: Attachment) -> Wired:
    """Return how an attachment was wired."""
    return parse_wired(attachment.wiring)


def link_of(attachment: Attachment, settings: NodeSettings) -> PodLink:
    """Return what the attachment's pod interface looks like."""
    how = wired(attachment)
    settings = replace(settings, mode=how.mode)
    key = attachment.key
    link = wiring.plan(key.container_id, key.ifname, attachment.addresses, settings, attachment.mac)
    return replace(link, bandwidth=how.bandwidth, from_loopback=_from_loopback(attachment))


def rules_of(attachment: Attachment) -> PodRules:
    """Return what nftables is to hold for an attachment."""
    how = wired(attachment)
    return PodRules(
        host_ifname=attachment.host_ifname,
        mac=attachment.mac or wiring.mac_of(str(attachment.addresses[0])),
        addresses=tuple(map(str, attachment.addresses)),
        host_ports=attachment.host_ports,
        bridge=how.mode is Mode.BRIDGE,
        egress=guard(how.bandwidth),
    )


def _from_loopback(attachment: Attachment) -> bool:
    """Whether a host port leads from the node's 127.0.0.1 to the pod."""
    return any(port.host_ip in ("", "0.0.0.0", "127.0.0.1") for port in attachment.host_ports)
