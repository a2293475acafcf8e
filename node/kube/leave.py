"""What a node that podwire leaves has in the API: annotations of its Node, and its claims on pod ranges.

Found by `survey`, removed by node.uninstall.remove. Its Events go by themselves, within the hour; podCIDRs
cannot be taken from a Node, and need no claim any more: other nodes leave out what Nodes have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from node.kube.api import DOCUMENT, Api, ApiError
from node.kube.claims import LABEL, PAGE, PREFIX, block_of
from node.kube.own_node import NETWORK_UNAVAILABLE, REASON
from node.leftovers import Leftover

ANNOTATIONS = "podwire.io/"
GONE = 404


@dataclass(frozen=True, slots=True)
class Annotations:
    """Annotations of the Node."""

    node: str
    uid: str
    names: tuple[str, ...]
    api: Api = field(repr=False, compare=False)
    kind = "annotation"

    def __str__(self) -> str:
        return f"annotations {', '.join(self.names)} of node {self.node}"

    def remove(self) -> None:
        """Take them off the Node, if it is the same one still. Raises ApiError."""
        document = {"metadata": {"uid": self.uid, "annotations": dict.fromkeys(self.names)}}
        try:
            self.api.patch(f"/api/v1/nodes/{self.node}", document)
        except ApiError as error:
            if error.status != GONE:
                raise


@dataclass(frozen=True, slots=True)
class Lease:
    """The Lease by which the node claimed a pod range."""

    path: str
    uid: str
    version: str
    api: Api = field(repr=False, compare=False)
    kind = "lease"

    @property
    def names(self) -> tuple[str, ...]:
        """The Lease."""
        return (self.path.rpartition("/")[2],)

    def __str__(self) -> str:
        return f"lease {self.names[0]}"

    def remove(self) -> None:
        """Delete it, if it is the same one still. Raises ApiError."""
        same = {"uid": self.uid, "resourceVersion": self.version}
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": same}
        try:
            self.api.delete(self.path, options)
        except ApiError as error:
            if error.status != GONE:
                raise


def survey(api: Api, node: str, namespace: str) -> tuple[tuple[Leftover, ...], tuple[str, ...]]:
    """Return what a node has there, and sentences on what stays. Raises ApiError, MsgspecError."""
    found: list[Leftover] = []
    remarks: list[str] = []
    document = _node(api, node)
    if document is None:
        remarks.append(f"there is no node {node}")
    else:
        metadata = document["metadata"]
        ours = sorted(name for name in metadata.get("annotations") or () if name.startswith(ANNOTATIONS))
        if ours:
            found.append(Annotations(node, metadata["uid"], tuple(ours), api))
        conditions = (document.get("status") or {}).get("conditions") or ()
        if any((c.get("type"), c.get("reason")) == (NETWORK_UNAVAILABLE, REASON) for c in conditions):
            remarks.append(
                f"condition {NETWORK_UNAVAILABLE} of node {node} stays: the next network is to set it"
            )
    found += _leases(api, node, namespace)
    return tuple(found), tuple(remarks)


def _node(api: Api, name: str) -> dict[str, Any] | None:
    try:
        return DOCUMENT.decode(api.get(f"/api/v1/nodes/{name}"))
    except ApiError as error:
        if error.status != GONE:
            raise
        return None


def _leases(api: Api, node: str, namespace: str) -> Iterator[Lease]:
    """Yield the node's claims; Leases of others stay, and those that only look like one."""
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    query = {"labelSelector": LABEL, "limit": str(PAGE)}
    while True:
        page = DOCUMENT.decode(api.get(path, query))
        for item in page.get("items") or ():
            metadata, name = item["metadata"], item["metadata"]["name"]
            mine = ((item.get("spec") or {}).get("holderIdentity") or "") == node
            if mine and name.startswith(PREFIX) and block_of(name.removeprefix(PREFIX)):
                yield Lease(f"{path}/{name}", metadata["uid"], metadata["resourceVersion"], api)
        if not (following := (page.get("metadata") or {}).get("continue")):
            return
        query["continue"] = following
