"""What a test needs of the kernel: the test is skipped, with the reason, where the kernel lacks it."""

from __future__ import annotations

import functools

import pytest

from netlink.errors import NetlinkError
from netlink.wireguard import WireGuard


@functools.cache
def has_wireguard() -> bool:
    """Whether the kernel has WireGuard, or loads it when asked for it."""
    try:
        with WireGuard():
            return True
    except NetlinkError:
        return False


def needs_wireguard() -> None:
    """Skip the test on a kernel without WireGuard."""
    if not has_wireguard():
        pytest.skip("this kernel has no WireGuard")
