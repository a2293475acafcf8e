"""The dataplanes that the tests of packets run on: how each is programmed, and taken away again."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.ipvs import Ipvs
from netlink.nftables.fake import FakeNft
from netlink.nftables.operations import Operation
from netlink.xtables import Variant
from node import dataplanes
from proxy.dataplane import Dataplane, NodeRanges
from proxy.frontends import Frontend


@dataclass(frozen=True, slots=True)
class Kind:
    """A dataplane: opened, and taken away, in the calling thread's namespace."""

    name: str

    def __str__(self) -> str:
        return self.name

    def opened(self, family: Family) -> AbstractContextManager[Dataplane]:
        """Open it."""
        return dataplanes.opened(self.name, family)

    def load(self, family: Family, frontends: Iterable[Frontend], ranges: NodeRanges) -> None:
        """Make the kernel hold exactly this."""
        with self.opened(family) as dataplane:
            dataplane.load(frontends, ranges)

    def remove(self, family: Family) -> None:
        """Take it away."""
        with self.opened(family) as dataplane:
            dataplane.remove()


NFTABLES = Kind(dataplanes.NFTABLES)
IPVS = Kind(dataplanes.IPVS)
KINDS = (NFTABLES, *(Kind(f"{dataplanes.IPTABLES}-{variant.value}") for variant in Variant))
"""Those that every kernel here has."""
ALL_KINDS = (*KINDS, IPVS)


@functools.cache
def needs_ipvs() -> None:
    """Skip the test that asks, where the kernel has no IPVS; asking loads its module."""
    try:
        with Ipvs():
            return
    except NetlinkError:
        pytest.skip("this kernel has no IPVS")


class Recorded(FakeNft):
    """Tables in memory that keep what was committed."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.batches: list[Sequence[Operation]] = []

    def commit(self, operations: Sequence[Operation]) -> None:
        super().commit(operations)
        self.batches.append(operations)
