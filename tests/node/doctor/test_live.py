"""`podwire doctor` beside a real daemon: what works is no finding, and what is gone is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netlink import netns
from netlink.requests import address_add, address_delete
from netlink.rtnl import Rtnl
from tests.node.world import NODES, World, build, ended, podwire, service

LOOPBACK = 1
THERE = "10.244.2.0/32"
BY_DAEMON = ("daemon", "podcidrs", "routes", "peers", "mtu")


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = build(namespaces, tmp_path_factory.mktemp("node"))
    world.write("nodes.yaml", NODES)
    world.write("web.yaml", service())
    with ended(world):
        world.start()
        yield world


def doctor(world: World) -> tuple[int, dict[str, Any]]:
    """Run the checks that go by the daemon; return the exit status and them by name."""
    words = [word for name in BY_DAEMON for word in ("--check", name)]
    words += ["-o", "json", "--timeout", "0.6", "--socket", str(world.socket)]
    status, out, err = netns.run(world.node, podwire, "doctor", *words)
    assert err == ""
    return status, {check["name"]: check for check in json.loads(out)}


def test_what_works_is_no_finding_and_a_range_that_is_gone_is_one(world: World) -> None:
    def change(request: Any) -> None:
        with Rtnl() as rtnl:
            rtnl.commit(request)

    netns.run(world.peer, change, address_add(LOOPBACK, THERE))
    status, checks = doctor(world)
    assert [c["findings"] for c in checks.values()] == [[]] * len(BY_DAEMON)
    assert not any(c["skipped"] for c in checks.values())
    assert status == 0
    netns.run(world.peer, change, address_delete(LOOPBACK, THERE))
    status, checks = doctor(world)
    assert status == 1
    [finding] = checks["peers"]["findings"]
    told = "node node2 answers on 192.168.50.12, but its pods' range 10.244.2.0/24"
    assert finding["sentence"].startswith(told)
