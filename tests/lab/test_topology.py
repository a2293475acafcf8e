from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.topology import MAX_NODES, POD_CIDR, SERVICE_CIDR, LabError, Mode, Topology, plan

sizes = st.integers(1, MAX_NODES).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@given(sizes)
def test_no_two_things_share_a_name_or_an_address(size: tuple[int, int]) -> None:
    lab = plan("x", *size)
    addresses = [host.address for host in lab.hosts] + [node.second for node in lab.nodes]
    addresses += [port.address.removesuffix("/24") for port in lab.router_ports]
    assert len(set(addresses)) == len(addresses)
    assert len({host.namespace for host in lab.hosts} | {lab.router}) == len(lab.hosts) + 1


@given(sizes)
def test_every_gateway_is_a_router_port_on_the_same_subnet(size: tuple[int, int]) -> None:
    lab = plan("x", *size)
    ports = {port.address for port in lab.router_ports}
    for host in lab.hosts:
        assert f"{host.gateway}/24" in ports
        assert ip_address(host.gateway) in ip_interface(host.interface).network


@given(sizes)
def test_pod_ranges_are_apart_from_each_other_and_from_the_services(size: tuple[int, int]) -> None:
    ranges = [ip_network(node.pod_cidr) for node in plan("x", *size).nodes]
    assert len(set(ranges)) == len(ranges)
    assert all(r.subnet_of(ip_network(POD_CIDR)) for r in ranges)  # type: ignore[arg-type]
    assert not ip_network(POD_CIDR).overlaps(ip_network(SERVICE_CIDR))


def test_the_last_of_three_nodes_is_across_the_router() -> None:
    lab = plan("x")
    assert [node.segment for node in lab.nodes] == ["lan0", "lan0", "lan1"]
    assert [node.address for node in lab.nodes] == ["192.168.50.11", "192.168.50.12", "192.168.60.13"]
    assert lab.far_nodes == 1


def test_two_nodes_are_on_one_segment_unless_asked_otherwise() -> None:
    assert [port.name for port in plan("x", 2).router_ports] == ["lan0", "client", "internet"]
    assert plan("x", 2, 1).far_nodes == 1


def test_router_ports_are_named_as_in_the_plan() -> None:
    assert [(p.name, p.bridge) for p in plan("x").router_ports] == [
        ("lan0", True),
        ("lan1", True),
        ("client", False),
        ("internet", False),
    ]


@pytest.mark.parametrize("name", ["", "a-b", "../etc", "A", "x" * 21, "a b"])
def test_a_name_that_could_clash_or_escape_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="lab name"):
        plan(name)


@pytest.mark.parametrize(("nodes", "far"), [(0, None), (MAX_NODES + 1, None), (3, 3), (2, -1)])
def test_a_number_that_cannot_be_built_is_refused(nodes: int, far: int | None) -> None:
    with pytest.raises(LabError, match="must be from"):
        plan("x", nodes, far)


def test_an_unknown_place_is_answered_with_those_there_are() -> None:
    with pytest.raises(LabError, match="node1, node2, node3"):
        plan("x").node("node9")
    with pytest.raises(LabError, match="internet, client"):
        plan("x").host("moon")


def test_a_saved_lab_is_loaded_as_it_was(tmp_path: Path) -> None:
    from lab import state

    topology: Topology = plan("x", 5, 2, Mode.BRIDGE)
    lab = state.Lab(topology, tmp_path / "x")
    state.save(lab)
    assert state.load("x", tmp_path) == lab
    with pytest.raises(LabError, match="no lab named 'y'"):
        state.load("y", tmp_path)
