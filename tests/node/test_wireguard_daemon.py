"""A real daemon whose backend is WireGuard: what it publishes, shows, keeps over a restart, and leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from netlink import netns
from netlink.rtnl import Rtnl
from netlink.wireguard import Device, WireGuard
from node.backends.wireguard import NAMES
from tests.netlink.kernel_with import has_wireguard, needs_wireguard
from tests.node.whole import cleanup, differences, everything, untouched
from tests.node.world import NODE, PEER, World, build, ended, podwire, service, wait_until

KEYS = f"{'a' * 42}A=,{'b' * 42}A="
HERE = f"""
kind: Node
metadata: {{name: node1, annotations: ANNOTATIONS}}
spec: {{podCIDRs: [10.244.1.0/24]}}
status: {{addresses: [{{type: InternalIP, address: {NODE}}}]}}
"""
THERE = f"""
---
kind: Node
metadata: {{name: node2, annotations: {{podwire.io/wireguard-keys: "{KEYS}"}}}}
spec: {{podCIDRs: [10.244.2.0/24]}}
status: {{addresses: [{{type: InternalIP, address: {PEER}}}]}}
---
kind: Node
metadata: {{name: node3}}
spec: {{podCIDRs: [10.244.3.0/24]}}
status: {{addresses: [{{type: InternalIP, address: 192.168.50.13}}]}}
"""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels with WireGuard may be those of an emulated machine, where a daemon starts in half a minute."""
    monkeypatch.setattr("tests.node.world.DEADLINE", 100.0)


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[World]:
    found = build(namespaces, tmp_path)
    found.options = ("--backend", "wireguard")
    with ended(found):
        yield found


def devices(world: World) -> list[Device]:
    def read() -> list[Device]:
        with WireGuard() as kernel:
            return [kernel.device(name) for name in NAMES]

    return netns.run(world.node, read)


def write_nodes(world: World, annotations: dict[str, str]) -> None:
    world.write("nodes.yaml", HERE.replace("ANNOTATIONS", json.dumps(annotations)) + THERE)


def test_it_publishes_its_keys_by_a_file_and_knows_its_peers(world: World) -> None:
    needs_wireguard()
    write_nodes(world, {})
    world.start()
    published = world.root / "state/annotations.json"
    wait_until(published.exists, "the daemon says what its Node object is to have")
    document = json.loads(published.read_text())
    keys = document["metadata"]["annotations"]["podwire.io/wireguard-keys"]
    assert document["metadata"]["name"] == "node1"
    assert keys == ",".join(device.key for device in devices(world))
    problems = world.json("status")["problems"]
    assert any(f"node node1: its manifest is to have the annotations in {published}" in p for p in problems)
    assert any(
        "node node3: no way to its pods in 10.244.3.0/24" in p and "has no keys" in p for p in problems
    )
    write_nodes(world, document["metadata"]["annotations"])
    wait_until(lambda: not any(str(published) in p for p in world.json("status")["problems"]), "it is copied")
    (route,) = (r for r in world.json("routes") if r["node"] == "node2")
    assert (route["backend"], route["device"], route["mtu"], route["via"]) == ("wireguard", "pwwg0", 1440, "")

    found = world.json("wireguard")
    assert found["keys"] == keys.split(",")
    assert [(p["node"], p["device"], p["endpoint"], p["route"]) for p in found["peers"]] == [
        ("node2", "pwwg0", f"{PEER}:51820", True), ("node2", "pwwg1", f"{PEER}:51821", False)
    ]  # fmt: skip
    assert "node2  pwwg0   192.168.50.12:51820  never" in world.ask("wireguard")
    before = devices(world)
    world.stop()
    world.start()
    assert devices(world) == before
    secret = (world.root / "state/wireguard/key0").read_text().strip()
    assert secret not in world.log + json.dumps(world.json("wireguard"))

    status, out, err = podwire("wireguard", "rotate", "--socket", str(world.socket))
    assert (status, err) == (0, "")
    assert "are being changed" in out
    wait_until(lambda: world.json("wireguard")["step"] == "spare", "a change of keys begins")
    assert published.read_text() != json.dumps(document), "the new key is to be published"
    world.stop()


def test_another_backend_by_reload_takes_its_devices_and_annotations_away(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    needs_wireguard()
    with ended(build(namespaces, tmp_path)) as world:
        config = world.root / "config.yaml"

        def configure(backend: str) -> None:
            config.write_text(yaml.safe_dump({
                "apiVersion": "podwire.io/v1alpha1", "kind": "Configuration", "network": {"backend": backend}
            }))  # fmt: skip

        def tunnels() -> set[str]:
            def read() -> set[str]:
                with Rtnl() as rtnl:
                    return {k.name for k in rtnl.links() if k.name.startswith(("pwwg", "pwvxlan"))}

            return netns.run(world.node, read)

        configure("vxlan")
        world.options = ("--config", str(config))
        write_nodes(world, {})
        world.start()
        assert tunnels() == {"pwvxlan4"}
        assert world.daemon
        for backend, names in (("wireguard", set(NAMES)), ("vxlan", {"pwvxlan4"})):
            configure(backend)
            world.daemon.send_signal(1)
            wait_until(lambda names=names: tunnels() == names, f"the devices are {names}")  # type: ignore[misc]
        wait_until(lambda: not (world.root / "state/annotations.json").exists(), "nothing is to be published")
        world.stop()


@pytest.mark.skipif(has_wireguard(), reason="this kernel has WireGuard")
def test_a_kernel_without_it_is_one_sentence_and_services_work(world: World) -> None:
    write_nodes(world, {})
    world.write("web.yaml", service())
    world.start()
    health = world.json("status")
    sentence = "the kernel has no WireGuard (module wireguard): no packet gets to other nodes' pods"
    assert [p for p in health["problems"] if "WireGuard (module" in p] == [sentence]
    assert health["ready"]
    assert health["services"] == 1
    assert world.json("wireguard")["problems"] == ["WireGuard: cannot find WireGuard in the kernel: "
                                                   "No such file or directory"]  # fmt: skip
    world.stop()


def test_cleanup_leaves_nothing_and_no_key(namespaces: Callable[[], str], tmp_path: Path) -> None:
    needs_wireguard()
    with untouched(namespaces, tmp_path) as world:
        before = everything(world)
        world.options = ("--backend", "wireguard")
        world.start()
        world.stop()
        assert len(list((world.root / "state/wireguard").iterdir())) == 2
        status, out, err = cleanup(world, "--state", "--stop-forwarding", "--yes")
        assert (status, err) == (0, "")
        assert {f"removed interface {name}" for name in NAMES} <= set(out.splitlines())
        assert differences(before, everything(world)) == {}
        assert not (world.root / "state").exists()
