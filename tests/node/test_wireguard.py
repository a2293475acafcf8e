"""Nodes with WireGuard between them: what pods say is encrypted, and goes on whatever changes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

from netlink import netns
from netlink.rtnl import Rtnl
from netlink.wireguard import Change, Device, WireGuard
from node.backends.rotation import Step
from node.backends.wireguard import NAMES, OVERHEAD
from node.network import NetworkConfig
from tests.netlink.kernel_with import needs_wireguard
from tests.node.secured import (
    Member,
    Secured,
    build,
    default_config,
    joined,
    ping,
    run,
    secured,
    wait_until,
)

HEADERS = {4: 28, 6: 48}
"""Of a ping's packet: IP and ICMP."""

Built = tuple[str, dict[int, tuple[str, str]]]


@pytest.fixture(scope="module")
def built(namespaces: Callable[[], str]) -> Built:
    needs_wireguard()
    return build(namespaces)


@pytest.fixture
def world(built: Built, tmp_path: Path) -> Iterator[Secured]:
    with secured(built, tmp_path, (4, 6)) as found:
        yield found


def device(member: Member, slot: int = 0) -> Device:
    def read() -> Device:
        with WireGuard() as kernel:
            return kernel.device(NAMES[slot])

    return netns.run(member.space, read)


def tunnels(member: Member) -> set[str]:
    def read() -> set[str]:
        with Rtnl() as rtnl:
            return {link.name for link in rtnl.links() if link.name.startswith(("pwwg", "pwvxlan"))}

    return netns.run(member.space, read)


def problems(world: Secured) -> list[str]:
    return [p for m in world.members.values() for p in (*m.network.problems, *m.wireguard.problems)]


@pytest.mark.parametrize("outer", [4, 6])
def test_pods_and_nodes_of_both_families_talk_encrypted_over_either_underlay(
    built: Built, tmp_path: Path, outer: int
) -> None:
    with secured(built, tmp_path, (outer,)) as world:
        assert problems(world) == []
        bare, before = world.counted("bare"), world.counted(f"over {outer}")
        one, two = world.members[1], world.members[2]
        mtu = 1500 - OVERHEAD[outer]
        for number in (2, 3):
            for version, address in ((4, f"10.244.{number}.2"), (6, f"fd00:{number}::2")):
                assert ping(one, address), f"pod to pod {address}"
                assert ping(one, address, size=mtu - HEADERS[version]), f"{mtu} bytes to {address}"
                assert not ping(one, address, size=mtu - HEADERS[version] + 1), "and not one more"
                assert ping(one, address, space=one.space), f"node to pod {address}"
        node2 = {4: "192.168.52.10", 6: "fd00:52::10"}[outer]
        assert ping(one, node2), "pod to node"
        assert ping(two, "10.244.1.0"), "pod to a node's range address"
        assert world.counted("bare") == bare
        assert world.counted(f"over {outer}") > before


def test_a_second_start_changes_nothing_and_keeps_the_sessions(
    world: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    one = world.members[1]
    assert ping(one, "10.244.2.2")
    before = device(one)
    again = joined(1, (one.space, one.pod), one.keys, (4, 6))
    again.node = one.node
    with again.stack, caplog.at_level("INFO", "podwire.network"):
        again.compare(world.nodes)
        assert (again.published() is one.node, "changed" in caplog.text) == (True, False)
    assert ping(one, "10.244.2.2")
    after = device(one)
    handshakes = [[(k, known.handshake) for k, known in d.peers.items()] for d in (before, after)]
    assert handshakes[0] == handshakes[1]
    key = world.nodes["node2"].wireguard_keys[0]
    assert after.peers[key].received > before.peers[key].received, "the counters go on"


def peers_gone(member: Member) -> None:
    def work() -> None:
        with WireGuard() as kernel:
            for name in NAMES:
                kernel.change(name, [Change(key, remove=True) for key in kernel.device(name).peers])

    netns.run(member.space, work)


def ranges_gone(member: Member) -> None:
    def work() -> None:
        with WireGuard() as kernel:
            kernel.change(
                NAMES[0], [Change(key, allowed=frozenset()) for key in kernel.device(NAMES[0]).peers]
            )

    netns.run(member.space, work)


def another_key(member: Member) -> None:
    def work() -> None:
        with WireGuard() as kernel:
            kernel.configure(NAMES[0], private_key=bytes([1] * 32), port=4000)

    netns.run(member.space, work)


DAMAGE: dict[str, Callable[[Member], object]] = {
    "devices": lambda m: [run(m.space, "ip", "link", "del", name) for name in NAMES],
    "peers": peers_gone,
    "their ranges": ranges_gone,
    "key and port": another_key,
    "up": lambda m: run(m.space, "ip", "link", "set", "pwwg0", "down"),
    "mtu": lambda m: run(m.space, "ip", "link", "set", "pwwg0", "mtu", "1300"),
    "routes": lambda m: run(m.space, "ip", "route", "flush", "dev", "pwwg0"),
    "other kind": lambda m: run(
        m.space, "sh", "-c", "ip link del pwwg0; ip link add pwwg0 type veth peer name other"
    ),
}


def test_what_somebody_removes_comes_back(world: Secured) -> None:
    one = world.members[1]
    for what, damage in DAMAGE.items():
        damage(one)
        one.compare(world.nodes)
        assert problems(world) == [], what
        assert ping(one, "10.244.2.2"), what
        assert ping(one, "fd00:3::2"), what
        assert device(one).port == 51820, what


def test_nothing_leaves_as_it_is_while_there_is_no_tunnel(world: Secured) -> None:
    """Without the devices, and to a node whose keys are not known (any more)."""
    one = world.members[1]
    bare = world.counted("bare")
    for name in NAMES:
        run(one.space, "ip", "link", "del", name)
    refused = ("10.244.2.2", "fd00:3::2", "192.168.52.10")
    assert not any(ping(one, address) for address in refused)
    assert not ping(one, "10.244.2.2", space=one.space)
    one.compare(world.nodes)
    nodes = {**world.nodes, "node2": structs.replace(world.nodes["node2"], wireguard_keys=())}
    assert netns.run(one.space, lambda: one.network.change(nodes, {"node2"}))
    assert not ping(one, "10.244.2.2")
    assert ping(one, "10.244.3.2")
    assert netns.run(one.space, lambda: one.network.change(world.nodes, {"node2"}))
    assert ping(one, "10.244.2.2")
    assert world.counted("bare") == bare


def test_one_nodes_change_touches_its_peer_only(world: Secured, caplog: pytest.LogCaptureFixture) -> None:
    one, three = world.members[1], world.members[3]
    assert ping(one, "10.244.2.2")
    handshake = device(one).peers[world.nodes["node2"].wireguard_keys[0]].handshake
    nodes = {name: node for name, node in world.nodes.items() if name != "node3"}
    assert netns.run(one.space, lambda: one.network.change(nodes, {"node3"}))
    assert device(one).peers.keys() == {world.nodes["node2"].wireguard_keys[0]}
    assert netns.run(one.space, lambda: one.network.change(world.nodes, {"node3"}))
    with caplog.at_level("INFO", "podwire.network"):
        one.compare(world.nodes)
    assert "changed" not in caplog.text, "a change ends as a comparison does"
    assert ping(three, "10.244.1.2")
    assert device(one).peers[world.nodes["node2"].wireguard_keys[0]].handshake == handshake


def test_a_node_that_is_replaced_is_reached_by_its_new_keys(world: Secured, tmp_path: Path) -> None:
    three = world.members[3]
    assert ping(world.members[1], "10.244.3.2")
    three.stack.close()
    run(three.space, "sh", "-c", "ip link del pwwg0; ip link del pwwg1")
    world.members[3] = joined(3, (three.space, three.pod), tmp_path / "new", (4, 6))
    world.settle()
    assert set(world.members[3].node.wireguard_keys).isdisjoint(three.node.wireguard_keys)
    assert ping(world.members[1], "10.244.3.2")
    assert ping(world.members[3], "fd00:2::2")
    assert len(device(world.members[1]).peers) == 2


def test_changing_the_backend_removes_the_devices_of_the_other(world: Secured) -> None:
    one = world.members[1]
    assert tunnels(one) == set(NAMES)
    run(one.space, "ip", "link", "add", "pwwg2", "type", "wireguard")
    one.configured = lambda _: NetworkConfig("vxlan")
    one.compare(world.nodes)
    assert tunnels(one) == {"pwvxlan4", "pwvxlan6", "pwwg2"}
    one.configured = default_config
    one.compare(world.nodes)
    assert tunnels(one) == {*NAMES, "pwwg2"}
    assert ping(one, "10.244.2.2")
    run(one.space, "ip", "link", "del", "pwwg2")


def test_private_keys_are_roots_alone_and_in_no_answer(
    world: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    one = world.members[1]
    files = sorted(one.keys.iterdir())
    assert [f.name for f in files] == ["key0", "key1"]
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert one.keys.stat().st_mode & 0o777 == 0o700
    secret = files[0].read_text().strip()
    told = f"{one.wireguard.annotations} {device(one)} {one.network.wireguard} {one.wireguard.keys!r}"
    assert secret not in told + caplog.text


LOST = re.compile(r"(\d+) packets transmitted, (\d+) received")


def test_keys_change_under_traffic_without_loss(world: Secured) -> None:
    one, two = world.members[1], world.members[2]
    before = world.nodes["node1"].wireguard_keys
    assert ping(one, "10.244.2.2")
    assert ping(one, "10.244.3.2")
    streams = [
        netns.run(
            member.pod,
            lambda address=address: subprocess.Popen(
                ("ping", "-q", "-i0.1", "-W5", address), stdout=subprocess.PIPE, text=True
            ),
        )
        for member, address in ((one, "10.244.2.2"), (one, "fd00:3::2"), (two, "10.244.1.2"))
    ]
    try:
        assert one.wireguard.ask() == ""
        steps: list[Step] = []

        def through() -> bool:
            for member in world.members.values():
                member.tick(world.nodes)
            world.publish()
            for member in world.members.values():
                member.take(world.nodes)
            step = one.wireguard.rotation.step
            steps.extend([step] if step not in steps[-1:] else [])
            return len(steps) > 1 and step is Step.IDLE

        wait_until(through, "the keys have changed", 120)
        assert steps[-4:] == [Step.SPARE, Step.DETOUR, Step.USUAL, Step.IDLE]
        assert problems(world) == []
        assert set(world.nodes["node1"].wireguard_keys).isdisjoint(before)
        assert ping(one, "10.244.2.2")
    finally:
        for stream in streams:
            stream.send_signal(2)
        told = [stream.communicate(timeout=20)[0] for stream in streams]
    for text in told:
        found = LOST.search(text)
        assert found and int(found[1]) > 50 and found[1] == found[2], text
