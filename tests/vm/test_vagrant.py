"""vm-lab/Vagrantfile and what makes its machines: what can be known of them without starting one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import guest
from lab.qemu import box, files
from lab.topology import POD_CIDRS, SERVICE_CIDRS, LabError
from netlink.family import Family

CHECKOUT = Path(__file__).parents[2]
FOLDER = CHECKOUT / "vm-lab"
RECORDER = Path(__file__).with_name("record.rb")
SCRIPTS = sorted((FOLDER / "provision").glob("*.sh"))
SECONDS = 120


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def run(words: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=FOLDER, env={**os.environ, **variables}, timeout=SECONDS, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def recorded(**variables: str) -> dict[str, Any]:
    """What the Vagrantfile asks of Vagrant."""
    done = run([need("ruby"), RECORDER, "Vagrantfile"], **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def networks(calls: list[Any]) -> Iterator[dict[str, Any]]:
    return (options for name, _, options in calls if name == "vm.network")


def provisioned(calls: list[Any]) -> dict[str, dict[str, Any]]:
    return {words[0]: options for name, words, options in calls if name == "vm.provision"}


def section(text: str, title: str, key: str) -> list[str]:
    """The values of a key in the sections of a title."""
    parts = [part for part in text.split("\n\n") if part.startswith(f"[{title}]")]
    return [
        line.partition("=")[2] for part in parts for line in part.splitlines() if line.startswith(f"{key}=")
    ]


@pytest.mark.parametrize("variables", [{}, {"NODES": "6", "KUBERNETES": "1", "ACCEL": "qemu"}])
def test_vagrant_takes_the_vagrantfile_as_valid(tmp_path: Path, variables: dict[str, str]) -> None:
    vagrant = need("vagrant")
    homes = {"VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot")}
    # No provider of its own: without libvirt's plugin nothing knows the settings of machines by libvirt.
    homes["VAGRANT_DEFAULT_PROVIDER"] = "libvirt"
    done = run([vagrant, "validate"], **homes, **variables)
    if "provider 'libvirt' could not be found" in done.stderr:
        pytest.skip("vagrant-libvirt is not installed")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("nodes", [1, 2, 3, 6])
def test_machines_and_macs_of_the_vagrantfile_are_those_of_the_plan(nodes: int) -> None:
    plan = guest.vagrant_plan(nodes)
    machines = recorded(NODES=str(nodes))["machines"]
    assert tuple(machines) == plan.machines
    for name, calls in machines.items():
        macs = [options["mac"] for options in networks(calls)]
        assert macs == [files.mac(name, port).replace(":", "") for port in files.ports(plan, name)]


def test_each_cable_of_the_vagrantfile_has_two_ends_that_know_each_other() -> None:
    ends: dict[str, list[tuple[int, int]]] = {}
    for calls in recorded(NODES="6")["machines"].values():
        for options in networks(calls):
            ports = options["libvirt__tunnel_local_port"], options["libvirt__tunnel_port"]
            ends.setdefault(options["virtualbox__intnet"], []).append(ports)
    assert all(len(pair) == 2 and pair[0] == pair[1][::-1] for pair in ends.values())
    assert len({port for pair in ends.values() for end in pair for port in end}) == 2 * len(ends) == 14


def test_machines_are_provisioned_by_the_scripts_and_ready_boxes_by_one() -> None:
    plain = provisioned(recorded()["machines"]["node2"])
    assert list(plain) == ["packages", "podwire", "host"]
    assert plain["host"]["args"] == ["node2", "3"]
    assert list(provisioned(recorded(BOX="podwire/lab")["machines"]["node2"])) == ["host"]
    for options in plain.values():
        script = options.get("path") or options["inline"].removeprefix("sh /vagrant/vm-lab/")
        assert FOLDER / script in SCRIPTS


def test_only_nodes_join_kubernetes(tmp_path: Path) -> None:
    # The token is kept beside Vagrant's state.
    machines = recorded(KUBERNETES="1", VAGRANT_DOTFILE_PATH=str(tmp_path))["machines"]
    assert recorded(KUBERNETES="1", VAGRANT_DOTFILE_PATH=str(tmp_path))["machines"] == machines
    joining = {name: provisioned(calls).get("kubernetes") for name, calls in machines.items()}
    assert [name for name, options in joining.items() if options] == ["node1", "node2", "node3"]
    tokens = {options["env"]["TOKEN"] for options in joining.values() if options}
    assert len(tokens) == 1 and re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", tokens.pop())


@pytest.mark.parametrize("value", ["0", "7", "three"])
def test_a_number_of_nodes_that_cannot_be_is_refused_in_a_sentence(value: str) -> None:
    done = run([need("ruby"), RECORDER, "Vagrantfile"], NODES=value)
    assert (done.returncode, done.stderr) == (1, f"NODES={value} must be a number from 1 to 6\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_of_machines_are_valid_shell(script: Path) -> None:
    done = run(["sh", "-n", script])
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = run(["shellcheck", script])
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("machine", ["node1", "node3", "client"])
def test_a_host_has_its_addresses_on_the_cable_and_the_lab_behind_the_router(machine: str) -> None:
    plan = guest.vagrant_plan(3)
    host = plan.host(machine)
    found = guest.own_files(plan, machine)
    assert section(found[f"{files.NETWORKD}/20-lab0.link"], "Link", "Name") == ["lab0"]
    network = found[f"{files.NETWORKD}/20-lab0.network"]
    assert section(network, "Match", "Name") == ["lab0"]
    assert set(section(network, "Address", "Address")) == set(host.interfaces)
    destinations = section(network, "Route", "Destination")
    assert "192.0.2.0/24" in destinations and "2001:db8:2::/64" in destinations
    assert not {"0.0.0.0/0", "::/0"} & set(destinations), "the world is by the management interface"
    for subnet in host.subnets:
        assert not any(cidr.startswith(subnet.prefix) for cidr in destinations)
    assert set(section(network, "Route", "Gateway")) == {host.gateway(Family.V4), host.gateway(Family.V6)}
    assert "eth0" not in "".join(found.values())


def test_the_router_is_as_in_the_lab_of_qemu_but_for_its_management() -> None:
    plan = guest.vagrant_plan(3)
    whole = files.files(plan, "router", "key")
    assert guest.own_files(plan, "router") == {path: whole[path] for path in whole.keys() - set(guest.GIVEN)}
    assert set(guest.GIVEN) <= set(whole)


def test_nodes_have_manifests_and_configuration_and_others_have_none(tmp_path: Path) -> None:
    for machine, expected in (("node2", True), ("client", False), ("router", False)):
        root = tmp_path / machine
        assert guest.main([machine, "--nodes", "3", "--root", str(root)]) == 0
        manifests = sorted(path.name for path in root.glob("etc/podwire/manifests/*"))
        assert manifests == (["node-node1.yaml", "node-node2.yaml", "node-node3.yaml"] if expected else [])
        assert (root / "etc/podwire/config.yaml").exists() is expected
        assert not (root / "root").exists(), "the keys are Vagrant's"


def test_a_machine_that_the_lab_has_not_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guest.main(["node4", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "python -m lab.guest: host 'node4' is none of the lab's machines: "
        "router, node1, node2, node3, client\n"
    )
    with pytest.raises(LabError, match="--nodes 99"):
        guest.vagrant_plan(99)


def test_kubernetes_has_the_ranges_and_addresses_of_the_plan() -> None:
    text = (FOLDER / "provision/kubernetes.sh").read_text()
    values = dict(re.findall(r"^([A-Z_]+)=(\S+)$", text, re.MULTILINE))
    plan = guest.vagrant_plan(3)
    assert values["SERVER"] == plan.nodes[0].address(Family.V4)
    assert values["POD_CIDRS"].split(",") == list(POD_CIDRS.values())
    assert values["SERVICE_CIDRS"].split(",") == list(SERVICE_CIDRS.values())


def test_a_box_says_what_vagrant_libvirt_reads(tmp_path: Path) -> None:
    found = json.loads(box.metadata(6))
    assert (found["provider"], found["virtual_size"], found["disks"][0]["path"]) == (
        "libvirt",
        6,
        "box.qcow2",
    )
    text = box.vagrantfile(tmp_path)
    (tmp_path / "Vagrantfile").write_text(text)
    done = run([need("ruby"), RECORDER, tmp_path / "Vagrantfile"])
    calls = {name: words for name, words, _ in json.loads(done.stdout)["calls"]}
    assert calls["vm.provider.libvirt.kernel"] == [str(tmp_path / "vmlinuz")]
    assert calls["ssh.username"] == ["root"]


def test_files_of_a_box_are_written_into_its_disk_without_mounting_it(tmp_path: Path) -> None:
    need("debugfs")
    tree, disk, source = tmp_path / "tree", tmp_path / "disk", tmp_path / "source"
    (tree / "root").mkdir(parents=True)
    (tree / "root/old").write_text("old\n")
    source.write_text("new\n")
    disk.write_bytes(b"")
    os.truncate(disk, 8 << 20)
    for words in (
        ["mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, disk],
        ["debugfs", "-w", "-f", tmp_path / "script", disk],
    ):
        (tmp_path / "script").write_text(box.debugfs_script({"root/old": source, "root/.ssh/keys": source}))
        assert run(list(words)).returncode == 0
    for name in ("/root/old", "/root/.ssh/keys"):
        assert run(["debugfs", "-R", f"cat {name}", disk]).stdout == "new\n"
        assert "Mode:  0644" in run(["debugfs", "-R", f"stat {name}", disk]).stdout
