"""A node gets other addresses, and a cluster another backend, while its daemons and pods run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from lab import network, probe, process, state
from lab.probe import Answer
from lab.runtime import Pod
from lab.state import Lab
from lab.topology import Backend, IpFamily, plan
from netlink.family import Family
from tests.scenarios.plain import PORT, held, reaches, running, shell

Found = tuple[Lab, dict[str, Pod]]
MOVE = """
ip -4 address flush dev eth0
ip -6 address flush dev eth0 scope global
ip address add 192.168.60.33/24 dev eth0
ip address add fd00:192:168:60::33/64 dev eth0 nodad
ip route replace default via 192.168.60.1 proto static
ip route replace default via fd00:192:168:60::1 proto static
"""


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    with running(plan("moves", ip_family=IpFamily.DUAL)) as made:
        yield made


def test_a_node_that_gets_other_addresses_is_reached_by_them(found: Found) -> None:
    lab, pods = found
    node = lab.plan.node("node3")
    assert reaches(lambda: all_meet(pods))
    shell(node.namespace, MOVE)
    state.write_manifest(lab, network.node_object(replace(node, number=33)))
    assert reaches(lambda: all_meet(pods)), lab.log("node3").read_text()
    for other in lab.plan.nodes:
        addresses = "\n".join(held(other.namespace))
        assert ("192.168.60.33" in addresses, "192.168.60.13 " in addresses) == (True, False)


def test_another_backend_takes_over_what_the_one_before_has_made(found: Found) -> None:
    """The router learns of pods' ranges first, as a cloud's would."""
    lab, pods = found
    ways = [
        f"ip route add {cidr} via {address}"
        for node in (*lab.plan.nodes[:2], replace(lab.plan.node("node3"), number=33))
        for cidr, address in zip(node.pod_cidrs, node.addresses, strict=True)
    ]
    shell(lab.plan.router, "\n".join(ways))
    for backend in (Backend.DIRECT, Backend.VXLAN):
        process.stop(lab.root.glob("node*/daemon.pid"))
        network.start_daemons(Lab(replace(lab.plan, backend=backend), lab.root))
        assert reaches(lambda: all_meet(pods))
        for node in lab.plan.nodes:
            devices = [line for line in held(node.namespace) if line.startswith("pwvxlan")]
            assert bool(devices) == (backend is Backend.VXLAN), devices


def all_meet(pods: dict[str, Pod]) -> bool:
    """Whether every pod reaches every other, in both families, and is seen by its address."""
    return all(
        probe.fetch(one.netns, other.address(family), PORT, timeout=0.3)
        == [Answer(other.spec.name, one.address(family))]
        for family in Family
        for one in pods.values()
        for other in pods.values()
    )
