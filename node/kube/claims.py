"""Pod ranges of nodes where no controller gives them out, agreed through the API.

    cluster range ── cut into blocks ── the free ones, in this node's own order
       ── a Lease for the first that nobody else is quicker with ── Node.spec.podCIDRs

A block's Lease is its lock: of those who create it, the API server lets one succeed. The Node object owns it,
so the garbage collector removes it with the Node. Source: Lease coordination.k8s.io/v1; Node v1, whose
spec.podCIDRs cannot be changed once set.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import islice
from typing import Any

import msgspec

from node.kube.api import Api, ApiError
from proxy.model import Node

log = logging.getLogger("podwire.claims")

Network = IPv4Network | IPv6Network

LABEL = "podwire.io/pod-cidr"
"""On the Lease of a block: the block, written as in the Lease's name."""
PREFIX = "podwire-"
WIDEST = 16
"""Bits between a cluster range and its blocks, at most, as in kube-controller-manager."""
LARGEST_BLOCKS = {4: 30, 6: 126}
"""The longest prefixes that leave room for a pod."""
TRIES = 64
"""Blocks that are tried in one go: where others are quicker so often, a pause helps more."""
PAGE = 500
CONFLICT, GONE, INVALID = 409, 404, 422


class RangeError(ValueError):
    """A cluster range that cannot be used; one sentence."""


@dataclass(frozen=True, slots=True)
class ClusterRange:
    """A cluster's range of pod addresses, cut into blocks with prefixes of `mask` bits."""

    network: Network
    mask: int

    @property
    def count(self) -> int:
        """How many blocks it has."""
        return 1 << (self.mask - self.network.prefixlen)

    @property
    def _shift(self) -> int:
        return self.network.max_prefixlen - self.mask

    def block(self, index: int) -> Network:
        """Return a block by its number, from 0."""
        return ip_network((int(self.network.network_address) + (index << self._shift), self.mask))

    def touched(self, other: Network) -> range:
        """Return the numbers of the blocks that another range has a part of."""
        if other.version != self.network.version:
            return range(0)
        base, end = int(self.network.network_address), int(self.network.broadcast_address)
        first = max(int(other.network_address), base) - base
        last = min(int(other.broadcast_address), end) - base
        return range(first >> self._shift, (last >> self._shift) + 1)

    def has(self, block: Network) -> bool:
        """Say whether this is one of the blocks."""
        return block.prefixlen == self.mask and len(self.touched(block)) == 1 and self._contains(block)

    def _contains(self, block: Network) -> bool:
        base, end = self.network.network_address, self.network.broadcast_address
        return int(base) <= int(block.network_address) and int(block.broadcast_address) <= int(end)

    def __str__(self) -> str:
        return str(self.network)


@dataclass(frozen=True, slots=True)
class Claim:
    """A Lease for a block: whose it is, which Node object that is, and the Lease's own identity."""

    block: Network
    holder: str
    holder_uid: str
    uid: str
    version: str


def cluster_ranges(cidrs: Sequence[str], mask_sizes: tuple[int, int]) -> tuple[ClusterRange, ...]:
    """Return the ranges that nodes take blocks from. Raises RangeError, one sentence with the field's value.

    `mask_sizes` are the prefix lengths of IPv4 and IPv6 blocks.
    """
    found: dict[int, ClusterRange] = {}
    for text in cidrs:
        try:
            network = ip_network(text.strip())
        except ValueError as error:
            raise RangeError(f"cluster range {text!r}: {error}") from None
        mask = mask_sizes[network.version == 6]
        if network.version in found:
            raise RangeError(f"cluster range {text!r} is a second one of IPv{network.version}")
        if network.is_multicast or network.is_loopback or network.is_link_local or network.is_reserved:
            raise RangeError(f"cluster range {text!r} has no addresses that pods can have")
        longest = min(LARGEST_BLOCKS[network.version], network.prefixlen + WIDEST)
        if not network.prefixlen <= mask <= longest:
            raise RangeError(
                f"cluster range {text!r}: blocks of /{mask} are not in /{network.prefixlen} to /{longest}"
            )
        found[network.version] = ClusterRange(network, mask)
    return tuple(found.values())


def name_of(block: Network) -> str:
    """Return a block as it can stand in names and labels: 10.244.3.0/24 is 10-244-3-0-24."""
    return str(block).translate(str.maketrans(".:/", "---"))


def block_of(name: str) -> Network | None:
    """Return the block that `name_of` wrote, None for what it never wrote."""
    address, _, length = name.rpartition("-")
    parts = address.split("-")
    text = ("." if len(parts) == 4 and all(parts) else ":").join(parts)
    try:
        return ip_network(f"{text}/{length}")
    except ValueError:
        return None


def order(node: str, count: int) -> Iterator[int]:
    """Yield the numbers of `count` (a power of two) blocks in the order in which this node tries them.

    Nodes that join at once begin at different places and go on in different steps, so that few of them
    ever try the same.
    """
    digest = sha256(node.encode()).digest()
    start, step = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big") | 1
    return ((start + step * i) % count for i in range(count))


def free(range_: ClusterRange, node: str, taken: Iterable[Network]) -> Iterator[Network]:
    """Yield the blocks that nothing of what is taken has a part of, in this node's order."""
    used: set[int] = set()
    for other in taken:
        used.update(range_.touched(other))
    return (range_.block(i) for i in order(node, range_.count) if i not in used)


def abandoned(claim: Claim, holder: Node | None) -> bool:
    """Say whether nobody needs a claim any more, as its holder's Node object is now (None: there is none).

    A Node that has podCIDRs keeps them for ever, so it will not use any other block.
    """
    if holder is None or (holder.uid and holder.uid != claim.holder_uid):
        return True
    return bool(holder.pod_cidrs) and str(claim.block) not in holder.pod_cidrs


def complaints(me: Node, ranges: Sequence[ClusterRange]) -> tuple[str, ...]:
    """Return what is wrong with the podCIDRs that a node has, in sentences."""
    found = []
    for range_ in ranges:
        version = range_.network.version
        own = [c for c in map(ip_network, me.pod_cidrs) if c.version == version]
        if not own:
            found.append(
                f"node {me.name}: podCIDRs {', '.join(me.pod_cidrs)} have no IPv{version} range, in spite of "
                f"cluster range {range_}; that cannot be changed: drain the node and delete its Node object"
            )
        found += [
            f"node {me.name}: podCIDR {c} is not inside the cluster range {range_}: it counts, but what is "
            "set up for that range (firewalls, masquerade elsewhere) leaves it out"
            for c in own
            if not c.subnet_of(range_.network)  # type: ignore[arg-type]
        ]
    return tuple(found)


class _Meta(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    owner_references: list[_Owner] | None = None


class _Owner(msgspec.Struct, rename="camel"):
    kind: str = ""
    uid: str = ""


class _Spec(msgspec.Struct, rename="camel"):
    holder_identity: str | None = None


class _Lease(msgspec.Struct):
    metadata: _Meta
    spec: _Spec | None = None


class _ListMeta(msgspec.Struct):
    continue_: str = msgspec.field(name="continue", default="")


class _Leases(msgspec.Struct):
    items: list[_Lease] | None = None
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


_LEASE, _LEASES = msgspec.json.Decoder(_Lease), msgspec.json.Decoder(_Leases)


def _claim_of(lease: _Lease) -> Claim | None:
    """Return the claim that a Lease is; None for one of somebody else's making."""
    meta = lease.metadata
    block = block_of(meta.name.removeprefix(PREFIX)) if meta.name.startswith(PREFIX) else None
    if block is None:
        return None
    owner = next((o.uid for o in meta.owner_references or () if o.kind == "Node"), "")
    holder = (lease.spec.holder_identity if lease.spec else None) or ""
    return Claim(block, holder, owner, meta.uid, meta.resource_version)


class Allocator:
    """Gives this node its podCIDRs where nobody else does. For one thread."""

    def __init__(self, api: Api, namespace: str, node: str, ranges: Sequence[ClusterRange]) -> None:
        self._api, self._node, self._ranges = api, node, tuple(ranges)
        self._leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"

    def settle(self, nodes: Mapping[str, Node], served: Iterable[str] = ()) -> tuple[str, ...]:
        """Give this node podCIDRs if it has none; return what is wrong, in sentences. Raises ApiError.

        `served` are the cluster addresses of Services: no block with one of them is taken. What is left
        half done is finished by the next call, by this process or a later one.
        """
        me = nodes.get(self._node)
        if not self._ranges or me is None or not me.uid or me.deleting:
            return ()
        if me.pod_cidrs:
            return complaints(me, self._ranges)
        claims = {c.block: c for c in self._claims()}
        fixed = [ip_network(c) for name, n in nodes.items() if name != me.name for c in n.pod_cidrs]
        services = [ip_network(a) for a in served]
        odd = [self._misplaced(r, services) for r in self._ranges]
        choices = []
        for range_ in self._ranges:
            choice = self._choices(range_, me, claims, [*fixed, *services], nodes)
            if not choice:
                return (*filter(None, odd), _used_up(range_, me.name, fixed, claims.values()))
            choices.append(choice)
        got = [c for c in (self._first(me, choice, claims) for choice in choices) if c]
        mine = {c for c in claims.values() if self._ours(c, me)} | set(got)
        if len(got) < len(self._ranges):
            self._release(mine)
            raise ApiError(f"node {me.name} has no podCIDR yet: others were quicker each time", CONFLICT)
        has_them = self._set(me, [c.block for c in got])
        self._release(mine.difference(got) if has_them else mine)
        return tuple(filter(None, odd))

    def _choices(
        self,
        range_: ClusterRange,
        me: Node,
        claims: Mapping[Network, Claim],
        taken: Sequence[Network],
        nodes: Mapping[str, Node],
    ) -> list[Network]:
        """Return the blocks to try, in order: our own claim, free ones, those that seem given up."""
        used = {i for other in taken for i in range_.touched(other)}
        clean = [
            c for c in claims.values() if range_.has(c.block) and not used & set(range_.touched(c.block))
        ]
        own = [c.block for c in clean if c.holder == me.name]
        own.sort(key=lambda b: (claims[b].holder_uid != me.uid, b.network_address))
        left = [c.block for c in clean if c.holder != me.name and abandoned(c, nodes.get(c.holder))]
        others = (c.block for c in claims.values() if c.block not in own)
        return [*own, *islice(free(range_, me.name, [*taken, *others]), TRIES), *left][:TRIES]

    def _first(self, me: Node, choice: Iterable[Network], claims: Mapping[Network, Claim]) -> Claim | None:
        """Claim the first block that can be had."""
        return next((c for b in choice if (c := self._take(me, b, claims.get(b)))), None)

    def _take(self, me: Node, block: Network, known: Claim | None) -> Claim | None:
        """Claim one block; None when somebody else has it."""
        if known is None:
            try:
                return self._read(self._api.post(self._leases, _document(me, block)))
            except ApiError as error:
                if error.status != CONFLICT:
                    raise
            # It may be ours all the same: of a request whose answer never came.
            found = self._get(block)
            return found if found and self._ours(found, me) else None
        if self._ours(known, me):
            return known
        if known.holder != me.name and not abandoned(known, self._node_now(known.holder)):
            return None  # the list of nodes was older than the claim
        log.info("taking over pod range %s: node %r, which had it, is gone", block, known.holder)
        try:
            return self._read(self._api.put(self._path(block), _document(me, block, known)))
        except ApiError as error:
            if error.status not in (CONFLICT, GONE):
                raise
            return None

    def _set(self, me: Node, blocks: Sequence[Network]) -> bool:
        """Write Node.spec.podCIDRs; say whether the Node has these now, or else can never have them.

        Raises ApiError when that is open: the claims then stay, as the request may yet be carried out.
        """
        texts = [str(b) for b in blocks]
        document = {"metadata": {"uid": me.uid}, "spec": {"podCIDR": texts[0], "podCIDRs": texts}}
        try:
            self._api.patch(f"/api/v1/nodes/{self._node}", document)
        except ApiError as error:
            if error.status not in (CONFLICT, GONE, INVALID):
                raise
            now = self._node_now(me.name)
            if now and now.uid == me.uid and not now.pod_cidrs:
                raise
            if not now or now.uid != me.uid or now.pod_cidrs != tuple(texts):
                log.warning("node %s: podCIDRs %s not set: %s", me.name, ", ".join(texts), error)
                return False
        log.info("node %s: podCIDRs set to %s", me.name, ", ".join(texts))
        return True

    def _misplaced(self, range_: ClusterRange, services: Iterable[Network]) -> str:
        inside = [s for s in services if range_.touched(s)]
        if not inside:
            return ""
        return (
            f"cluster range {range_} overlaps that of Services: {len(inside)} have addresses in it, such as "
            f"{inside[0].network_address}; their blocks are left out, and the ranges must not overlap"
        )

    def _ours(self, claim: Claim, me: Node) -> bool:
        return claim.holder == me.name and claim.holder_uid == me.uid

    def _claims(self) -> list[Claim]:
        """Return all claims."""
        query = {"labelSelector": LABEL, "limit": str(PAGE)}
        found: list[Claim] = []
        while True:
            page = _LEASES.decode(self._api.get(self._leases, query))
            found += [c for c in map(_claim_of, page.items or ()) if c]
            if not page.metadata.continue_:
                return found
            query["continue"] = page.metadata.continue_

    def _get(self, block: Network) -> Claim | None:
        try:
            return self._read(self._api.get(self._path(block)))
        except ApiError as error:
            if error.status != GONE:
                raise
            return None

    def _node_now(self, name: str) -> Node | None:
        """Return a node as the API has it at this moment: what was watched may be older."""
        if not name:
            return None
        try:
            document: dict[str, Any] = msgspec.json.decode(self._api.get(f"/api/v1/nodes/{name}"))
        except ApiError as error:
            if error.status != GONE:
                raise
            return None
        spec = document.get("spec") or {}
        cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
        return Node(name, tuple(cidrs), uid=document["metadata"]["uid"])

    def _release(self, claims: Iterable[Claim]) -> None:
        """Delete claims that nothing came of; what cannot be deleted is taken over by others some time."""
        for claim in claims:
            options = {
                "apiVersion": "v1",
                "kind": "DeleteOptions",
                "preconditions": {"uid": claim.uid, "resourceVersion": claim.version},
            }
            with contextlib.suppress(ApiError):
                self._api.delete(self._path(claim.block), options)

    def _path(self, block: Network) -> str:
        return f"{self._leases}/{PREFIX}{name_of(block)}"

    def _read(self, data: bytes) -> Claim | None:
        return _claim_of(_LEASE.decode(data))


def _document(me: Node, block: Network, before: Claim | None = None) -> dict[str, Any]:
    """Return the Lease by which a node claims a block; `before` is the one that it replaces, if any."""
    metadata: dict[str, Any] = {
        "name": PREFIX + name_of(block),
        "labels": {LABEL: name_of(block)},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": me.name, "uid": me.uid}],
    }
    if before:
        metadata |= {"uid": before.uid, "resourceVersion": before.version}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {"holderIdentity": me.name},
    }


def _used_up(range_: ClusterRange, node: str, fixed: Iterable[Network], claims: Iterable[Claim]) -> str:
    by_nodes = {i for other in fixed for i in range_.touched(other)}
    claimed = {i for c in claims for i in range_.touched(c.block)} - by_nodes
    return (
        f"node {node} gets no podCIDR: of the {range_.count} /{range_.mask} blocks in cluster range {range_} "
        f"Nodes have {len(by_nodes)}, and {len(claimed)} more are claimed; delete Node objects of nodes that "
        "are gone, or use a larger range"
    )
