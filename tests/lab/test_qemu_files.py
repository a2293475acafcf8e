"""What machines get is what the plan says, whatever the plan."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from lab.qemu import files
from lab.qemu.kernels import Kernel
from lab.qemu.machine import Machine, command, ssh_config
from lab.state import Lab
from lab.topology import Backend, Between, Driver, IpFamily, Mode, Topology, apart, plan

PLANS = [
    apart(plan("vm", 3), Driver.QEMU),
    apart(plan("vm", 2, far=1, mode=Mode.BRIDGE, ip_family=IpFamily.DUAL), Driver.QEMU),
    apart(plan("vm", 4, ip_family=IpFamily.IPV6, between=Between(Backend.DIRECT)), Driver.QEMU),
    apart(plan("vm", 3, ip_family=IpFamily.IPV4, between=Between(underlay=IpFamily.IPV6)), Driver.QEMU),
]


@pytest.fixture(params=PLANS, ids=lambda found: found.about.replace(" ", "-"))
def made(request: pytest.FixtureRequest) -> Topology:
    found: Topology = request.param
    return found


def test_every_address_of_a_host_is_on_its_eth0(made: Topology) -> None:
    for host in (h for h in made.hosts if h.name in made.machines):
        text = files.files(made, host.name, "key")["etc/systemd/network/20-eth0.network"]
        for interface in host.interfaces:
            assert f"Address={interface}\n" in text
        for family in made.underlay.families:
            assert f"Gateway={host.gateway(family)}\n" in text


def test_the_router_has_every_subnet_and_every_cable(made: Topology) -> None:
    found = files.files(made, "router", "key")
    networks = "".join(text for path, text in found.items() if path.endswith(".network"))
    for port in made.router_ports:
        if port.bridge or port.name in made.machines:
            assert all(f"Address={address}\n" in networks for address in port.addresses)
    for machine in made.machines[1:]:
        assert f"Name={machine}\n" in found[f"etc/systemd/network/20-{machine}.link"]
        assert f"etc/systemd/network/30-{machine}.network" in found
    assert networks.count("Gateway=") == len(made.shared) * 2 + (
        len(made.nodes) * len(made.shared) if made.backend is Backend.DIRECT else 0
    )


def test_only_nodes_run_the_daemon_and_know_all_nodes(made: Topology) -> None:
    for machine in made.machines:
        found = files.files(made, machine, "key")
        is_node = machine.startswith("node")
        assert bool(files.links(made, machine)) == is_node
        assert sum("manifests" in path for path in found) == (len(made.nodes) if is_node else 0)
    config = json.loads(files.files(made, "node1", "key")["etc/podwire/config.yaml"])
    assert config["network"]["backend"] == made.backend.value
    assert config["pods"]["mode"] == made.mode.value


def test_no_two_interfaces_have_one_mac(made: Topology) -> None:
    macs = [
        files.mac(machine, port)
        for machine in made.machines
        for port in (*files.ports(made, machine), "mgmt0")
    ]
    assert len(set(macs)) == len(macs)


def test_the_archive_holds_files_and_links_of_root(made: Topology) -> None:
    content, links = files.files(made, "node1", "key"), files.links(made, "node1")
    with tarfile.open(fileobj=io.BytesIO(files.archive(content, links))) as tar:
        found = {member.name.removeprefix("./"): member for member in tar}
        assert found.keys() == content.keys() | links.keys()
        assert {member.uid for member in found.values()} == {0}
        text = tar.extractfile(found["etc/hostname"])
        assert text is not None and text.read() == b"node1\n"
        assert found["root/.ssh/authorized_keys"].mode == 0o600


def test_both_ends_of_a_cable_are_each_others(made: Topology, tmp_path: Path) -> None:
    kernel = Kernel("stable", "6.1", tmp_path, tmp_path, tmp_path)
    ends: dict[str, str] = {}
    for name in made.machines:
        for word in command(Machine(name, tmp_path), made, kernel, "tcg", 2222):
            if word.startswith("dgram,"):
                options = dict(option.split("=", 1) for option in word.split(",")[1:])
                ends[options["local.path"]] = options["remote.path"]
    assert len(ends) == 2 * (len(made.machines) - 1)
    assert all(ends[there] == here for here, there in ends.items())


def test_a_lab_of_machines_is_loaded_as_it_was(made: Topology, tmp_path: Path) -> None:
    from lab import state

    lab = Lab(made, tmp_path / made.name)
    state.save(lab)
    assert state.load(made.name, tmp_path).plan == made
    assert "Port 2222" in ssh_config([Machine("node1", tmp_path)], [2222], tmp_path / "key")
