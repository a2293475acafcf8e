"""What this node writes into its own Node object: where tunnels find it, and that its network is up.

Pure: a Node document → the patches that it needs. Small: one GET, at most two PATCHes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from netaddr import IPAddress, IPNetwork

from node.backends.vxlan import first_addresses, tunnel_mac
from node.sources.annotations import TUNNEL_MAC
from node.sources.objects import TUNNEL_ADDRESS, ObjectError, parse
from proxy.model import Node

if TYPE_CHECKING:
    from node.kube.api import Api

log = logging.getLogger("podwire.node")

NETWORK_UNAVAILABLE = "NetworkUnavailable"
"""While it is True, pods are kept away (taint node.kubernetes.io/network-unavailable). Some cloud providers
set it on a new node, and leave it to the network to clear it."""
REASON = "PodwireIsUp"
MESSAGE = "podwire can add pods on this node"
NOTHING: Mapping[str, str | None] = {}


@dataclass(frozen=True, slots=True)
class Patches:
    """A merge patch of the Node, and a strategic one of its status; None where nothing is to be done."""

    node: dict[str, Any] | None = None
    status: dict[str, Any] | None = None


def wanted(
    document: dict[str, Any], ready: bool, now: datetime, more: Mapping[str, str | None] = NOTHING
) -> Patches:
    """Return what the Node needs. `ready`: pods can be added; `more` are other annotations that it is to
    have, or (None) not to have. Raises ObjectError for a Node that is wrong.
    """
    me = parse({**document, "kind": "Node"})
    if not isinstance(me, Node) or not me.uid:
        return Patches()
    annotations = document["metadata"].get("annotations") or {}
    ours: dict[str, str | None] = {TUNNEL_MAC: tunnel_mac(me.name, me.uid), **more}
    if me.addresses:  # kubelet may know none yet
        ours[TUNNEL_ADDRESS] = ",".join(first_addresses(me))
    changed = {key: value for key, value in ours.items() if annotations.get(key) != value}
    # The uid is a precondition: of a Node that was made again meanwhile this must not become true.
    node = {"metadata": {"uid": me.uid, "annotations": changed}} if changed else None
    if not ready or _network_available(document):
        return Patches(node)
    status = {"metadata": {"uid": me.uid}, "status": {"conditions": [_condition(now)]}}
    return Patches(node, status)


def _network_available(document: dict[str, Any]) -> bool:
    """Say whether the condition is there and says so."""
    conditions = (document.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == NETWORK_UNAVAILABLE and c.get("status") == "False" for c in conditions)


def _condition(now: datetime) -> dict[str, str]:
    """Return the condition; a strategic merge keeps those of other types."""
    time = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": NETWORK_UNAVAILABLE,
        "status": "False",
        "reason": REASON,
        "message": MESSAGE,
        "lastHeartbeatTime": time,
        "lastTransitionTime": time,
    }


def settle(
    api: Api, name: str, ready: bool, now: datetime, more: Mapping[str, str | None] = NOTHING
) -> tuple[str, ...]:
    """Bring our Node object to what it should say; return what is wrong, in sentences. Raises ApiError."""
    from node.kube.api import DOCUMENT, STRATEGIC_MERGE_PATCH

    path = f"/api/v1/nodes/{name}"
    document = DOCUMENT.decode(api.get(path, {"resourceVersion": "0"}))
    try:
        patches = wanted(document, ready, now, more)
    except ObjectError as error:
        return (f"node {name}: its annotations are not set: {error}",)
    if patches.node:
        api.patch(path, patches.node)
        log.info("node %s: annotations set: %s", name, patches.node["metadata"]["annotations"])
    if patches.status:
        api.patch(f"{path}/status", patches.status, STRATEGIC_MERGE_PATCH)
        log.info("node %s: condition %s set to False", name, NETWORK_UNAVAILABLE)
    return ()


def moved(
    node: str, old: Sequence[IPNetwork], new: Sequence[IPNetwork], pods: Iterable[Sequence[IPAddress]]
) -> str:
    """Return a sentence about pods that still have addresses of the node's former ranges; "" without any.

    A node's podCIDRs change only when its Node object is deleted and made again. `pods` are the addresses
    of each attachment; those of neither range (pools, addresses asked for) are none of this.
    """
    gone = [c for c in old if c not in new]
    count = sum(any(a in c for a in addresses for c in gone) for addresses in pods)
    if not count:
        return ""
    before, after = (", ".join(map(str, ranges)) or "none" for ranges in (old, new))
    return (
        f"node {node}: its podCIDR was {before} and is {after}, which counts for new pods; {count} pods "
        f"still have addresses of the former one, which other nodes do not route here any more: drain it "
        f"(kubectl drain {node} --ignore-daemonsets), then uncordon it"
    )
