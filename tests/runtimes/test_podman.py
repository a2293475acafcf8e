"""A real podman, which asks for addresses and ports in its own ways, with podwire as its network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab import oci as image
from lab.oci import PORT
from tests.runtimes.capsule import capsule
from tests.runtimes.podman import NETWORK, Podman
from tests.runtimes.world import NODE, OUTSIDE, POD_CIDRS, seen, unreachable, wait_for, world

HOST_PORT = 8089
FIXED_IP, FIXED_MAC = "10.244.1.50", "02:11:22:33:44:55"


@pytest.fixture(scope="module")
def runtime(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """A node with podwire's daemon and podman."""
    root = tmp_path_factory.mktemp("podman")
    with capsule() as inside, world(namespaces, inside, root) as found:
        found.start_daemon()
        found.install()
        runtime = Podman(found)
        runtime.setup(image.write(root / "image.tar"))
        yield runtime


@pytest.fixture
def podman(runtime: Podman) -> Iterator[Podman]:
    """Without containers; afterwards there are none, nor anything of them."""
    log = runtime.world.log("daemon")
    size = log.stat().st_size
    yield runtime
    print(f"--- {log.name}\n{log.read_text()[size:]}")  # shown when the test failed
    if runtime.world.daemon is None:
        runtime.world.start_daemon()
    runtime.remove_all()
    runtime.world.assert_holds(set())


def namespaces_of_containers(podman: Podman) -> list[Path]:
    return list(Path(podman.world.capsule.path("/run/netns")).iterdir())


def test_the_conflist_is_a_network_of_podman(podman: Podman) -> None:
    assert podman("network", "ls", "--format", "{{.Name}}").split() == [NETWORK]


def test_a_container_has_the_addresses_that_podman_shows(podman: Podman) -> None:
    """One of each range; ledger, podman and the container itself agree."""
    container = podman.add("a")
    assert all(ip_address(a) in cidr for a, cidr in zip(container.addresses, POD_CIDRS, strict=True))
    (row,) = podman.world.attachments()
    assert tuple(map(str, row.addresses)) == container.addresses
    assert podman.world.addresses(container.netns) == set(container.addresses)
    assert podman.world.links(container.netns)["eth0"] == container.mac


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_two_containers_talk(podman: Podman, family: int) -> None:
    """By their own addresses, asked by a program in the container."""
    a, b = podman.add("a"), podman.add("b")
    host = f"[{b.addresses[family]}]" if family else b.address
    answer = podman("exec", "a", "wget", "-q", "-O", "-", f"http://{host}:{PORT}/")
    assert '"name": "b"' in answer
    assert a.addresses[family] in answer
    assert seen(podman.world.node, a.addresses[family], PORT) == ("a", NODE[family])


def test_an_address_that_was_asked_for_is_given(podman: Podman) -> None:
    """By --ip; of the other family it is any. A second container cannot have it."""
    container = podman.add("a", "--ip", FIXED_IP)
    assert container.address == FIXED_IP
    assert podman.world.addresses(container.netns) == set(container.addresses)
    with pytest.raises(AssertionError, match=FIXED_IP):
        podman.add("b", "--ip", FIXED_IP)
    podman.world.assert_holds({container.id})


def test_a_mac_address_that_was_asked_for_is_given(podman: Podman) -> None:
    """By --mac-address; the node knows it too."""
    container = podman.add("a", "--mac-address", FIXED_MAC)
    assert container.mac == FIXED_MAC
    assert podman.world.links(container.netns)["eth0"] == FIXED_MAC
    assert seen(podman.world.node, container.address, PORT) == ("a", NODE[0])


def test_a_host_port_is_reached_from_outside_the_node(podman: Podman) -> None:
    """At the node's address of each family; the container sees who asks. It ends with the container."""
    podman.add("web", "--publish", f"{HOST_PORT}:{PORT}")
    outside = podman.world.outside
    for node, client in zip(NODE, OUTSIDE, strict=True):
        assert seen(outside, node, HOST_PORT) == ("web", client)
    podman("rm", "--force", "--time", "0", "web")
    assert all(unreachable(outside, node, HOST_PORT) for node in NODE)


def test_a_reloaded_container_keeps_address_mac_and_port(podman: Podman) -> None:
    """`podman network reload` is DEL, then at once ADD of the same container, asking for what it had.

    That it has only just been freed is no reason to refuse it.
    """
    before = podman.add("web", "--publish", f"{HOST_PORT}:{PORT}")
    podman("network", "reload", "web")
    assert podman.get("web") == before
    assert podman.world.addresses(before.netns) == set(before.addresses)
    podman.world.assert_holds({before.id})
    assert seen(podman.world.node, before.address, PORT) == ("web", NODE[0])
    assert seen(podman.world.outside, NODE[0], HOST_PORT) == ("web", OUTSIDE[0])


def test_a_removed_container_leaves_nothing(podman: Podman) -> None:
    containers = [podman.add(name) for name in ("a", "b")]
    podman.world.assert_holds({container.id for container in containers})
    podman("rm", "--force", "--time", "0", "a", "b")
    podman.world.assert_holds(set())
    assert namespaces_of_containers(podman) == []


def test_a_container_that_ends_by_itself_is_taken_back(podman: Podman) -> None:
    """Its monitor calls podman, which calls DEL; started again it has an address again."""
    first = podman.add("a")
    podman("kill", "a")
    podman.world.assert_holds(set())
    wait_for(lambda: namespaces_of_containers(podman) == [], "the namespace goes")
    podman("start", "a")
    again = podman.get("a")
    assert again.id == first.id
    podman.world.assert_holds({first.id})


def test_containers_come_and_go_while_the_daemon_is_down(podman: Podman) -> None:
    before = podman.add("before")
    podman.world.stop_daemon()
    during = podman.add("during")
    assert seen(before.netns, during.address, PORT) == ("during", before.address)
    podman("rm", "--force", "--time", "0", "before")
    podman.world.assert_holds({during.id})


def test_a_failed_command_of_podman_is_told(podman: Podman) -> None:
    with pytest.raises(AssertionError, match="no such container"):
        podman("inspect", "--type", "container", "missing")


def test_containers_are_started_side_by_side(podman: Podman) -> None:
    """Four at once have eight different addresses."""
    names = ("a", "b", "c", "d")
    processes: list[subprocess.Popen[bytes]] = [podman.start(name) for name in names]
    for process in processes:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, (out + err).decode()
    containers = [podman.get(name) for name in names]
    assert len({address for container in containers for address in container.addresses}) == 8
    podman.world.assert_holds({container.id for container in containers})
