"""A box for Vagrant (provider libvirt) of the same root disk and kernel as the lab's machines.

    python -m lab.qemu.box        print the box's path; `vagrant box add --name podwire/lab PATH` takes it

The image has no boot loader: the box's Vagrantfile has libvirt start the kernel, which stays beside the box.
So a box is for the machine it was made on. Root comes in by Vagrant's well-known key, which Vagrant replaces.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.qemu import cache, image, kernels
from lab.qemu.cache import Tell
from lab.qemu.kernels import Kernel
from lab.topology import LabError

NAME = "podwire.box"
CHECKOUT = Path(__file__).parents[2]

# https://github.com/hashicorp/vagrant/blob/main/keys/vagrant.pub: what Vagrant tries first.
VAGRANT_KEY = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v"
    "1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4"
    "O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk"
    "1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure pu"
    "blic key"
)

# All machines have the image's machine-id, so only their MACs tell them apart.
MANAGEMENT = """\
[Match]
Name=eth0

[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no

[DHCPv4]
ClientIdentifier=mac
"""

# Vagrant's ssh library may not know the image's only one; sshd takes what the first file says, by name.
SSH = "KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256\n"

VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.ssh.username = "root"
  config.ssh.sudo_command = "%c"
  config.vm.provider "libvirt" do |libvirt|
    libvirt.kernel = {kernel}
    libvirt.initrd = {initrd}
    libvirt.cmd_line = "console=ttyS0 quiet mitigations=off net.ifnames=0"
    libvirt.random model: "random"
  end
end
"""

OWN = {
    "root/.ssh/authorized_keys": f"{VAGRANT_KEY}\n",
    "etc/systemd/network/80-management.network": MANAGEMENT,
    "etc/ssh/sshd_config.d/box.conf": SSH,
}
"""What a box has that the image has not, by path."""


def prepare(checkout: Path, tell: Tell) -> Path:
    """Return the box of this checkout, made when there is none yet. Raises LabError."""
    kernel = kernels.prepare("stable", tell)
    disk = image.prepare(checkout, tell)
    key = cache.digest(disk.name, kernel.release, kernel.initrd.parent.name, VAGRANTFILE, *OWN.values())
    return (
        cache.layer(
            "box", key, lambda part: _make(kernel, disk, cache.root() / "box" / key, part, tell), tell
        )
        / NAME
    )


def metadata(virtual_size: int) -> str:
    """Return what vagrant-libvirt wants to know: the disks in order, and the first one's size in GiB."""
    disks = [{"path": "box.qcow2", "format": "qcow2"}, {"path": "modules.qcow2", "format": "qcow2"}]
    return json.dumps(
        {"provider": "libvirt", "format": "qcow2", "virtual_size": virtual_size, "disks": disks}
    )


def vagrantfile(directory: Path) -> str:
    """Return the box's Vagrantfile; `directory` has the kernel and the initrd."""
    return VAGRANTFILE.format(
        kernel=json.dumps(str(directory / "vmlinuz")), initrd=json.dumps(str(directory / "initrd"))
    )


def debugfs_script(files: Mapping[str, Path]) -> str:
    """Return debugfs's commands that write files, by their paths in the image."""
    lines = []
    for name, source in files.items():
        path = Path("/") / name
        # It is there already, or not: an error of mkdir ends nothing.
        lines += [
            f"mkdir {path.parent}",
            f"rm {path}",
            f"write {source} {path}",
            f"set_inode_field {path} mode 0100644",
        ]
        lines += [f"set_inode_field {path} {field} 0" for field in ("uid", "gid")]
    return "\n".join([*lines, ""])


def _make(kernel: Kernel, disk: Path, final: Path, part: Path, tell: Tell) -> None:
    """Make the box's directory: `final` is the name that it gets."""
    work = part / "work"
    work.mkdir(parents=True)
    shutil.copy(kernel.image, part / "vmlinuz")
    shutil.copy(kernel.initrd, part / "initrd")
    with cache.step(tell, "box: disks"):
        raw = work / "box.raw"
        cache.run(["cp", "--sparse=always", "--reflink=auto", disk, raw])
        sources = {}
        for number, (name, text) in enumerate(OWN.items()):
            sources[name] = work / f"file{number}"
            sources[name].write_text(text)
        (work / "script").write_text(debugfs_script(sources))
        cache.run(["debugfs", "-w", "-f", work / "script", raw])
        for source, target in ((raw, "box.qcow2"), (kernel.modules, "modules.qcow2")):
            cache.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, work / target])
    with cache.step(tell, "box: archive"):
        (work / "metadata.json").write_text(metadata(image.SIZE_MB // 1024))
        (work / "Vagrantfile").write_text(vagrantfile(final))
        names = ["metadata.json", "Vagrantfile", "box.qcow2", "modules.qcow2"]
        cache.run(["tar", "--create", "--sparse", "--file", part / NAME, "--directory", work, *names])
    cache.remove([work])


def main() -> int:
    """Make the box and print its path; return the exit status."""
    try:
        print(prepare(CHECKOUT, lambda what: print(f"lab: {what}", file=sys.stderr, flush=True)))
    except LabError as error:
        print(f"python -m lab.qemu.box: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
