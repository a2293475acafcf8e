"""Names of chains: kube-proxy's, and our own beside them. Pure.

kube-proxy names a chain for a service port or endpoint by a digest: base32(sha256(text))[:16].
"""

from __future__ import annotations

import hashlib
import re
from base64 import b32encode
from typing import NamedTuple

from netlink.family import with_port
from proxy.frontends import Backend
from proxy.model import Protocol


class ChainId(NamedTuple):
    """A chain: its table and its name."""

    table: str
    name: str


class PortName(NamedTuple):
    """A service port: its title is "namespace/name:port", or "namespace/name" where it has no name."""

    title: str
    protocol: Protocol

    @property
    def word(self) -> str:
        """The protocol as iptables writes it."""
        return self.protocol.name.lower()

    @property
    def digested(self) -> str:
        """What kube-proxy's digests begin with: the colon stays when the port has no name."""
        return f"{self.title}{'' if ':' in self.title else ':'}{self.word}"


NAT_SERVICES = ChainId("nat", "KUBE-SERVICES")
NAT_NODEPORTS = ChainId("nat", "KUBE-NODEPORTS")
MARK_MASQ = ChainId("nat", "KUBE-MARK-MASQ")
NAT_POSTROUTING = ChainId("nat", "KUBE-POSTROUTING")
MARK_OFF_CLUSTER = ChainId("nat", "PODWIRE-MARK-OFF-CLUSTER")
MARK_OTHER_PODS = ChainId("nat", "PODWIRE-MARK-OTHER-PODS")
POD_POSTROUTING = ChainId("nat", "PODWIRE-POSTROUTING")
POD_OUTSIDE = ChainId("nat", "PODWIRE-OUTSIDE")

PROXY_FIREWALL = ChainId("filter", "KUBE-PROXY-FIREWALL")
FORWARD = ChainId("filter", "KUBE-FORWARD")
SERVICES = ChainId("filter", "KUBE-SERVICES")
EXTERNAL_SERVICES = ChainId("filter", "KUBE-EXTERNAL-SERVICES")
NODEPORTS = ChainId("filter", "KUBE-NODEPORTS")
CLUSTER_ADDRESSES = ChainId("filter", "PODWIRE-CLUSTER-ADDRESSES")
REJECT = ChainId("filter", "PODWIRE-REJECT")

TABLES = ("nat", "filter")
SHARED = (
    *(NAT_SERVICES, NAT_NODEPORTS, MARK_MASQ, NAT_POSTROUTING),
    *(MARK_OFF_CLUSTER, MARK_OTHER_PODS, POD_POSTROUTING, POD_OUTSIDE),
    *(PROXY_FIREWALL, FORWARD, SERVICES, EXTERNAL_SERVICES, NODEPORTS, CLUSTER_ADDRESSES),
    REJECT,
)
"""The chains that are always there."""

_HASHED = re.compile(r"(KUBE-(SVC|SVL|SEP|FW|EXT)|PODWIRE-SVC)-[A-Z2-7]{16}")


def service_chain(kind: str, port: PortName) -> ChainId:
    """Return a chain of a service port: SVC (all endpoints), SVL (those here), EXT (from outside) or FW."""
    return ChainId("nat", f"KUBE-{kind}-{_digest(port.digested)}")


def direct_chain(port: PortName) -> ChainId:
    """Return the chain with all endpoints of a service port whose KUBE-SVC leads to the L7 proxy."""
    return ChainId("nat", f"PODWIRE-SVC-{_digest(port.digested)}")


def endpoint_chain(port: PortName, endpoint: Backend) -> ChainId:
    """Return the chain of an endpoint of a service port."""
    text = f"{port.digested}{with_port(endpoint.address, endpoint.port)}"
    return ChainId("nat", f"KUBE-SEP-{_digest(text)}")


def is_ours(chain: ChainId) -> bool:
    """Whether a chain of this name is for this dataplane to write; kubelet's and others' KUBE-… are not."""
    return chain in SHARED or (chain.table in TABLES and bool(_HASHED.fullmatch(chain.name)))


def _digest(text: str) -> str:
    return b32encode(hashlib.sha256(text.encode()).digest())[:16].decode()
