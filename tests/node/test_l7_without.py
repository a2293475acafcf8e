"""What a kernel lacks costs the services that need it, and no others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from netlink.errors import NetlinkError
from netlink.family import Family
from node import l7_network
from node.l7 import L7, Wanted
from proxy.l7.engine import Engine
from proxy.l7.model import Backend, Backends, Server
from proxy.l7.policy import Policy
from proxy.l7.render import Settings


def backend(name: str, *, transparent: bool) -> Backend:
    policy = Policy(transparent=transparent)
    return Backend(name, f"shop/{name}", Family.V4, policy, (), (Server("10.0.0.1", 80),))


ALL: Backends = {"web": backend("web", transparent=False), "db": backend("db", transparent=True)}


def without_nft_socket(families: Collection[Family], *, transparent: bool) -> None:
    """Stand in for a kernel without that match, which cannot be had here."""
    if transparent:
        raise NetlinkError(2, "cannot add a rule")


def test_transparent_services_stay_with_the_kernel_where_it_has_no_socket_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(l7_network, "ensure", without_nft_socket)
    l7 = L7(Engine(Settings(tmp_path)), lambda _: None)
    l7._transparent = True
    served, told = l7._with_network(Wanted(ALL, {Family.V4}))
    assert served == {"web": ALL["web"]}
    assert len(told) == 1
    assert told[0].startswith("shop/db cannot be transparent")
    l7._transparent = False
    assert l7._with_network(Wanted(ALL, {Family.V4})) == (ALL, ())
