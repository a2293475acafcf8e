"""What the pods of a node have in common, as the daemon decides it and the ledger keeps it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from netaddr import IPNetwork

from ipam.pools import IpamConfig


class Mode(StrEnum):
    """How pods are connected to their node.

    Routed: a veth and a host route each. Bridge: ports of `podwire0`. Flat: as routed, with addresses of the
    node's own subnet, for which the node answers on its uplink (proxy ARP and proxy NDP).
    """

    ROUTED = "routed"
    BRIDGE = "bridge"
    FLAT = "flat"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What an ADD needs to know; kept in the ledger so that it is known while the daemon is down.

    `uplink` is the interface of flat mode.
    """

    mode: Mode
    mtu: int
    pod_cidrs: tuple[IPNetwork, ...]
    ipam: IpamConfig = field(default_factory=IpamConfig)
    uplink: str = ""

    def to_mapping(self) -> dict[str, str]:
        """Return the settings as the ledger keeps them."""
        return {
            "mode": self.mode.value,
            "mtu": str(self.mtu),
            "pod_cidrs": " ".join(map(str, self.pod_cidrs)),
            "ipam": self.ipam.to_json(),
            "uplink": self.uplink,
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> NodeSettings | None:
        """Return the settings that the ledger holds; None when the daemon has never saved any."""
        return _settings(tuple(values.items())) if values.get("mode") else None


@functools.lru_cache(maxsize=4)  # they are the same for every ADD
def _settings(items: tuple[tuple[str, str], ...]) -> NodeSettings:
    values = dict(items)
    return NodeSettings(
        mode=Mode(values["mode"]),
        mtu=int(values["mtu"]),
        pod_cidrs=tuple(IPNetwork(c) for c in values["pod_cidrs"].split()),
        ipam=IpamConfig.from_json(values["ipam"]) if "ipam" in values else IpamConfig(),
        uplink=values.get("uplink", ""),
    )
