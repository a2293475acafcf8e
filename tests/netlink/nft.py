"""What tests of nftables share: the contract's two sides, nft's view of a ruleset, addresses of one's own."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterable
from typing import Protocol

from netlink.family import Family
from netlink.nftables.batch import Nftables
from netlink.requests import address_add, link_up
from netlink.rtnl import Rtnl


class Use(Protocol):
    """A function that runs a check against an empty table's place, in memory or in the kernel."""

    def __call__(self, check: Callable[[Nftables], None], family: Family = Family.V4) -> None: ...


def nft(*arguments: str, stdin: str = "") -> str:
    """Run the nft program in the calling thread's namespace; return what it prints."""
    done = subprocess.run(["nft", *arguments], input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


def reloaded() -> str:
    """Let nft print the ruleset, load what it printed and print that; return it if both are the same."""
    before, after = loaded_again()
    assert before == after
    return after


def loaded_again() -> tuple[str, str]:
    """Let nft print the ruleset, load what it printed and print that; return both."""
    printed = nft("list", "ruleset")
    nft("flush", "ruleset")
    nft("-f", "-", stdin=printed)
    return printed, nft("list", "ruleset")


def own(family: Family, addresses: Iterable[str]) -> None:
    """Give the calling thread's namespace addresses of its own, on its loopback interface."""
    index = socket.if_nametoindex("lo")
    with Rtnl() as rtnl:
        rtnl.commit(link_up(index), *(address_add(index, f"{a}/{family.bits}") for a in addresses))
