from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.topology import (
    BALANCER_CIDRS,
    LOCAL_BALANCER_CIDRS,
    MAX_NODES,
    POD_CIDRS,
    SERVICE_CIDRS,
    STAND_IN,
    Backend,
    Between,
    IpFamily,
    LabError,
    Mode,
    ProxyMode,
    Topology,
    plan,
)
from netlink.family import Family

sizes = st.integers(1, MAX_NODES).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


def dual(nodes: int, far: int) -> Topology:
    return plan("x", nodes, far, ip_family=IpFamily.DUAL)


@given(sizes)
def test_no_two_things_share_a_name_or_an_address(size: tuple[int, int]) -> None:
    lab = dual(*size)
    addresses = [ip_interface(interface).ip for host in lab.hosts for interface in host.interfaces]
    addresses += [ip_interface(address).ip for port in lab.router_ports for address in port.addresses]
    assert len(set(addresses)) == len(addresses)
    assert len({host.namespace for host in lab.hosts} | {lab.router}) == len(lab.hosts) + 1


@given(sizes)
def test_every_gateway_is_a_router_port_on_the_same_subnet(size: tuple[int, int]) -> None:
    lab = dual(*size)
    ports = {ip_interface(address) for port in lab.router_ports for address in port.addresses}
    for host in lab.hosts:
        for family in lab.families:
            (port,) = (port for port in ports if port.ip == ip_address(host.gateway(family)))
            assert all(
                ip_interface(interface).network == port.network
                for interface in host.interfaces
                if ip_interface(interface).version == family.value
            )


@given(sizes)
def test_pod_ranges_are_apart_from_each_other_and_from_the_services(size: tuple[int, int]) -> None:
    ranges = [ip_network(cidr) for node in dual(*size).nodes for cidr in node.pod_cidrs]
    assert len(set(ranges)) == len(ranges)
    for family in Family:
        pods, services = ip_network(POD_CIDRS[family]), ip_network(SERVICE_CIDRS[family])
        assert not pods.overlaps(services)
        assert all(r.subnet_of(pods) for r in ranges if r.version == family.value)  # type: ignore[arg-type]


@given(sizes)
def test_a_bridge_has_the_first_address_of_its_pod_range(size: tuple[int, int]) -> None:
    for node in dual(*size).nodes:
        for family, cidr in zip(Family, node.pod_cidrs, strict=True):
            assert ip_address(node.pod_gateway(family)) == ip_network(cidr)[1]


def test_the_balancers_addresses_are_a_range_of_their_own_and_the_stand_ins_is_no_services() -> None:
    lab = plan("x", ip_family=IpFamily.DUAL)
    for family in Family:
        balancers, local = ip_network(BALANCER_CIDRS[family]), ip_network(LOCAL_BALANCER_CIDRS[family])
        taken = [ip_interface(i).network for h in lab.hosts for i in h.interfaces]
        assert not any(balancers.overlaps(t) for t in taken if t.version == family.value)
        assert local.subnet_of(balancers)  # type: ignore[arg-type]
        assert ip_address(STAND_IN[family]) in balancers
        assert ip_address(STAND_IN[family]) not in local


def test_a_lab_of_one_family_has_nothing_of_the_other() -> None:
    for ip_family, family, other in (
        (IpFamily.IPV4, Family.V4, Family.V6),
        (IpFamily.IPV6, Family.V6, Family.V4),
    ):
        node = plan("x", ip_family=ip_family).nodes[0]
        assert {ip_interface(i).version for i in (*node.interfaces, *node.pod_cidrs)} == {family.value}
        with pytest.raises(LabError, match=f"node1 has no IPv{other.value} address"):
            node.address(other)


def test_pods_and_hosts_can_be_of_different_families() -> None:
    lab = plan("x", ip_family=IpFamily.IPV6, between=Between(underlay=IpFamily.IPV4))
    assert lab.about == "routed pods, IPv6 over IPv4, backend auto, proxy mode nftables"
    assert (lab.families, lab.shared) == ((Family.V6,), ())
    assert (lab.nodes[0].addresses, lab.nodes[0].pod_cidrs) == (("192.168.50.11",), ("fd00:10:244:1::/64",))
    with pytest.raises(LabError, match="needs hosts with IPv6 addresses"):
        plan("x", ip_family=IpFamily.DUAL, between=Between(Backend.DIRECT, IpFamily.IPV4))


@pytest.mark.parametrize(
    ("backend", "underlay", "family", "tunnelled"),
    [
        (Backend.AUTO, IpFamily.DUAL, Family.V4, [False, True]),
        (Backend.AUTO, IpFamily.IPV4, Family.V6, [True, True]),
        (Backend.AUTO, IpFamily.IPV6, Family.V4, [False, True]),
        (Backend.VXLAN, IpFamily.DUAL, Family.V6, [True, True]),
        (Backend.DIRECT, IpFamily.DUAL, Family.V4, [False, False]),
    ],
)
def test_the_backend_says_which_nodes_meet_in_a_tunnel(
    backend: Backend, underlay: IpFamily, family: Family, tunnelled: list[bool]
) -> None:
    lab = plan("x", ip_family=IpFamily.DUAL, between=Between(backend, underlay))
    first, *others = lab.nodes
    assert [lab.tunnelled(first, other, family) for other in others] == tunnelled
    assert not lab.tunnelled(first, first, family)


def test_the_last_of_three_nodes_is_across_the_router() -> None:
    lab = plan("x")
    assert [node.segment for node in lab.nodes] == ["lan0", "lan0", "lan1"]
    assert [node.address(Family.V4) for node in lab.nodes] == [
        "192.168.50.11", "192.168.50.12", "192.168.60.13"
    ]  # fmt: skip
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

    between = Between(Backend.VXLAN, IpFamily.DUAL)
    topology: Topology = replace(
        plan("x", 5, 2, Mode.BRIDGE, IpFamily.IPV6, between), proxy_mode=ProxyMode.IPTABLES
    )
    lab = state.Lab(topology, tmp_path / "x")
    state.save(lab)
    assert state.load("x", tmp_path) == lab
    with pytest.raises(LabError, match="no lab named 'y'"):
        state.load("y", tmp_path)
