"""Fixtures of the netlink tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft, Nftables
from netlink.nftables.fake import FakeNft

if TYPE_CHECKING:
    from tests.netlink.nft import Use


@pytest.fixture(params=["fake", "kernel"])
def use(request: pytest.FixtureRequest, namespaces: Callable[[], str]) -> Use:
    """A function that runs a check against an empty table's place, in memory or in the kernel."""

    def on_kernel(check: Callable[[Nftables], None], family: Family = Family.V4) -> None:
        def inside() -> None:
            with Nft(family, "contract") as nft:
                check(nft)

        netns.run(namespaces(), inside)

    def in_memory(check: Callable[[Nftables], None], family: Family = Family.V4) -> None:
        check(FakeNft(family))

    return on_kernel if request.param == "kernel" else in_memory
