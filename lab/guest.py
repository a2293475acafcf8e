"""Make this machine a part of a lab that others started, Vagrant say: write its own files, as root.

    python -m lab.guest node2 --nodes 3

The files are those of `lab.qemu.files`, except that the machine came with a management interface, which keeps
its name and leads to the world. So the cable of a host is `lab0`, by its MAC, and only the lab's own ranges
are by the router.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

from lab.qemu import files
from lab.qemu.files import NETWORKD
from lab.topology import ANYWHERE, BALANCER_CIDRS, Driver, IpFamily, LabError, Topology, apart, plan
from netlink.family import Family

CABLE = "lab0"
GIVEN = (
    "etc/hostname",
    "etc/machine-id",
    "root/.ssh/authorized_keys",
    f"{NETWORKD}/05-mgmt0.link",
    f"{NETWORKD}/05-mgmt0.network",
)
"""What the machine has from whoever started it."""


def vagrant_plan(nodes: int) -> Topology:
    """Return the plan of the lab of vm-lab/Vagrantfile. Raises LabError for a number that cannot be."""
    return apart(plan("vagrant", nodes, ip_family=IpFamily.DUAL), Driver.QEMU)


def own_files(plan: Topology, machine: str) -> dict[str, str]:
    """Return what the machine needs, by path without the first slash. Raises LabError for an unknown one."""
    if machine not in plan.machines:
        raise LabError(f"host {machine!r} is none of the lab's machines: {', '.join(plan.machines)}")
    found = {path: text for path, text in files.files(plan, machine, "").items() if path not in GIVEN}
    if machine == "router":
        return found
    return {
        path.replace("-eth0.", f"-{CABLE}."): _on_cable(text, plan, machine) if NETWORKD in path else text
        for path, text in found.items()
    }


def _on_cable(text: str, plan: Topology, machine: str) -> str:
    """Return a file of eth0 as one of the cable: instead of all, the lab's other ranges are by the router."""
    sections = []
    for section in text.replace("Name=eth0", f"Name={CABLE}").split("\n["):
        family = next((f for f, cidr in ANYWHERE.items() if f"Destination={cidr}\n" in section), None)
        if family is None:
            sections.append(section)
        else:
            sections += [
                section.replace(f"={ANYWHERE[family]}\n", f"={cidr}\n")
                for cidr in _ranges(plan, machine, family)
            ]
    # The last section of a file ends with the file's last line, others with an empty one.
    return "\n[".join(section.rstrip("\n") + "\n" for section in sections)


def _ranges(plan: Topology, machine: str, family: Family) -> Iterator[str]:
    """Return the ranges of a family that the lab has, without that of the machine itself."""
    own = plan.host(machine).subnets
    for subnet in sorted({subnet for host in plan.hosts for subnet in host.subnets}, key=str):
        if subnet.family is family and subnet not in own:
            yield str(ip_network(subnet.interface(0), strict=False))
    yield BALANCER_CIDRS[family]


def main(arguments: list[str] | None = None) -> int:
    """Write the files; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.guest", description="make this machine a part of a lab"
    )
    parser.add_argument("host", help="which one it is: router, client, node1 …")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes the lab has (default 3)")
    parser.add_argument("--root", type=Path, default=Path("/"), help="write below this folder (default /)")
    options = parser.parse_args(arguments)
    try:
        for name, text in own_files(vagrant_plan(options.nodes), options.host).items():
            path = options.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except (LabError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
