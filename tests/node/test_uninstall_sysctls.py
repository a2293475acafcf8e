"""Sysctls are set back: those that podwire has set, and nobody else since."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cni import sysctls
from netlink import netns
from node.settings import TCP_BE_LIBERAL, Settings
from tests.node.whole import cleanup, differences, everything, launch, noting, shell, untouched
from tests.node.world import (
    World,
)


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    with untouched(namespaces, tmp_path) as made:
        yield made


def test_forwarding_stays_on_and_what_depends_on_it_unless_asked_for(world: World) -> None:
    launch(world)
    world.stop()
    out = cleanup(world, "--yes")[1]
    kept = "stays 1, it was 0: other networks may need that by now; --stop-forwarding sets it back"
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        assert f"note: {name} {kept}\n" in out
        assert world.run("sysctl", "-n", name) == "1\n"
    assert "removed net.netfilter.nf_conntrack_tcp_be_liberal = 1: 0 as before\n" in out
    assert "removed net.ipv4.ip_forward = 1: 0 as before\n" in cleanup(world, "--yes", "--stop-forwarding")[1]
    assert world.run("sysctl", "-n", "net.ipv4.ip_forward") == "0\n"


def test_what_somebody_else_set_meanwhile_stays(world: World) -> None:
    liberal, accept_ra = "net.netfilter.nf_conntrack_tcp_be_liberal", "net.ipv6.conf.eth0.accept_ra"
    redirects = "net.ipv4.conf.all.accept_redirects"
    shell(world, f"sysctl -qw {redirects}=0")
    netns.run(world.node, noting, world.root / "state", Path("/proc/sys/net/ipv6/conf/eth0/accept_ra"), "2")
    launch(world)
    world.stop()
    shell(world, f"sysctl -qw {liberal}=0 {redirects}=1 {accept_ra}=0")
    out = cleanup(world, "--yes", "--stop-forwarding")[1]
    assert liberal not in out, "it is as before anyway"
    assert f"note: {accept_ra} stays 0, it was 1: somebody else set it, podwire had set 2\n" in out
    assert world.run("sysctl", "-n", redirects, accept_ra) == "1\n0\n"


def test_what_the_kernel_sets_along_with_forwarding_is_as_before(world: World) -> None:
    """A hardened node accepts no redirects; the kernel turns them on whenever forwarding goes off."""
    shell(world, "sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv6.conf.pwother.forwarding=1")
    before = everything(world)
    launch(world)
    world.stop()
    assert cleanup(world, "--yes", "--stop-forwarding", "--state")[0] == 0
    assert differences(before, everything(world)) == {}


def test_forwarding_of_new_interfaces_alone_is_as_before(world: World) -> None:
    """The node forwards already, and somebody has turned it off for interfaces that come."""
    names = "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.default.forwarding=0"
    shell(world, f"sysctl -qw {names}")
    before = everything(world)
    launch(world)
    world.stop()
    kept = "note: net.ipv4.conf.default.forwarding stays 1, it was 0: other networks may need that by now"
    assert kept in cleanup(world, "--yes")[1]
    assert cleanup(world, "--yes", "--stop-forwarding", "--state")[0] == 0
    assert differences(before, everything(world)) == {}


def test_a_bridge_of_others_keeps_br_netfilter(world: World) -> None:
    shell(world, "ip link add name cni0 type bridge")
    launch(world, "--mode", "bridge")
    world.stop()
    out = cleanup(world, "--yes")[1]
    name = "net.bridge.bridge-nf-call-iptables"
    assert f"note: {name} stays 1, it was 0: the bridge cni0 may need that\n" in out
    assert "removed interface podwire0\n" in out


def test_router_advertisements_count_as_before_when_forwarding_does(world: World) -> None:
    """While the node forwards, the default route that it was advertised needs accept_ra = 2."""
    state = world.root / "state"
    accept_ra = Path("/proc/sys/net/ipv6/conf/eth0/accept_ra")

    def set_both() -> None:
        sysctls.keep_in(state)
        try:
            sysctls.put(accept_ra, "2")
            assert Settings().assert_all() == []
        finally:
            sysctls.keep_in(None)

    before = everything(world)
    netns.run(world.node, set_both)
    assert "note: net.ipv6.conf.eth0.accept_ra stays 2, it was 1: " in cleanup(world, "--yes")[1]
    told = cleanup(world, "--yes", "--stop-forwarding")[1].splitlines()
    assert told[-1] == "removed net.ipv6.conf.eth0.accept_ra = 2: 1 as before"
    assert "removed net.ipv6.conf.all.forwarding = 1: 0 as before" in told
    assert differences(before, everything(world)) == {}


def test_an_interface_that_is_gone_is_nothing_to_set_back(world: World) -> None:
    path = Path("/proc/sys/net/ipv6/conf/pwother/proxy_ndp")
    netns.run(world.node, noting, world.root / "state", path, "1")
    shell(world, "ip link delete pwother")
    assert cleanup(world, "--yes") == (0, "nothing of podwire's was found\n", "")


def test_notes_of_another_namespace_or_boot_do_not_count(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note() -> None:
        sysctls.keep_in(tmp_path / "notes")
        try:
            sysctls.put(TCP_BE_LIBERAL, "1")
        finally:
            sysctls.keep_in(None)

    netns.run(world.node, note)
    assert [*netns.run(world.node, sysctls.noted, tmp_path / "notes")] == [TCP_BE_LIBERAL]
    assert netns.run(world.peer, sysctls.noted, tmp_path / "notes") == {}
    file = tmp_path / "notes" / sysctls.FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"boot": "another"}))
    assert netns.run(world.node, sysctls.noted, tmp_path / "notes") == {}
    file.write_text("{")
    assert netns.run(world.node, sysctls.noted, tmp_path / "notes") == {}


def test_a_second_cleanup_does_not_undo_what_others_set_after_the_first(world: World) -> None:
    name = "net.netfilter.nf_conntrack_tcp_be_liberal"
    launch(world)
    world.stop()
    cleanup(world, "--yes")
    shell(world, f"sysctl -qw {name}=1")
    cleanup(world, "--yes", "--stop-forwarding")
    assert world.run("sysctl", "-n", name) == "1\n"
