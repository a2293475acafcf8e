"""Whatever the services and the packet, both dataplanes lead it to the same ends, in memory."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from netlink.family import Family
from netlink.nftables.fake import FakeNft
from netlink.nftables.trace import Outcome, Packet, outcomes
from node.store import Store
from proxy.dataplane import NodeRanges
from proxy.frontends import Frontend
from proxy.iptables import walk
from proxy.iptables.dataplane import JUMPS
from proxy.iptables.plan import Plan
from proxy.l7.places import RANGES
from proxy.model import Endpoint, Protocol, ServicePort, TrafficPolicy
from proxy.nftables.dataplane import Dataplane
from proxy.table import FrontendTable
from tests.proxy.test_dataplane_property import NAMES, POLICIES_OF_L7, deliver, objects_after

NODE, ALIAS, OTHER_NODE, OUTSIDE = "192.0.2.1", "192.0.2.11", "192.0.2.2", "203.0.113.1"
HERE, THERE = [f"10.0.0.{n}" for n in range(1, 4)], [f"10.0.1.{n}" for n in range(1, 4)]
LOCAL = frozenset({NODE, ALIAS, *(r[Family.V4].partition("/")[0] for r in RANGES.values())})
RANGES = NodeRanges(
    pod_cidrs=("10.0.0.0/24", "10.0.1.0/24", "10.0.3.0/24"),
    local_pod_cidrs=("10.0.0.0/24",),
    no_masquerade=("198.51.100.2/32",),
    node_ports=(f"{NODE}/32",),
    node_pods=("10.0.0.0/24",),
    node_addresses=(NODE, OTHER_NODE),
)
# Not a pod of another node that reaches itself by way of this one: kube-proxy's rules masquerade it.
SOURCES = (HERE[0], "10.0.0.99", "10.0.1.99", NODE, OTHER_NODE, OUTSIDE)
endpoint = st.builds(
    lambda address, **fields: Endpoint(address, "me" if address in HERE else "other", **fields),
    address=st.sampled_from([*HERE, *THERE]),
    ready=st.sampled_from([True, True, True, False]),
    serving=st.booleans(),
    terminating=st.booleans(),
    zone_hints=st.sampled_from([(), (), ("zone",), ("elsewhere",)]),
)
pieces = st.lists(endpoint, max_size=4, unique_by=lambda e: e.address)
services = st.fixed_dictionaries(
    {
        "ports": st.sampled_from(
            [
                (ServicePort("x", Protocol.TCP, 80, 30000), ServicePort("y", Protocol.UDP, 80, 30001)),
                (ServicePort("x", Protocol.TCP, 80, 30001), ServicePort("y", Protocol.TCP, 81)),
                (ServicePort("", Protocol.TCP, 80, 30002),),
            ]
        ),
        "internal_policy": st.sampled_from(TrafficPolicy),
        "external_policy": st.sampled_from(TrafficPolicy),
        "external_ips": st.sampled_from([(), ("198.51.100.1",), (ALIAS,), ("10.96.0.1",)]),
        "balancer_ips": st.sampled_from([(), ("198.51.100.2",), ("198.51.100.1",)]),
        "source_ranges": st.sampled_from([(), ("203.0.113.0/24", "10.0.0.0/24"), ("10.0.1.0/24",)]),
        "affinity_seconds": st.sampled_from([0, 0, 60]),
        "policy": POLICIES_OF_L7,
    }
)
worlds = st.lists(st.tuples(services, pieces), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(worlds)
def test_both_lead_every_packet_to_the_same_ends(world: list[tuple[dict[str, Any], list[Endpoint]]]) -> None:
    """To each address and port of each service, to those next to it, and past them."""
    objects: dict[tuple[str, str], object] = {}
    for number, (fields, piece) in enumerate(world):
        address = {"cluster_ips": (f"10.96.0.{number + 1}",)}
        objects_after(objects, ("service", NAMES[number], fields | address))
        objects_after(objects, ("slice", NAMES[number], piece))
    table = FrontendTable()
    deliver(Store(), table, objects)
    found = list(table)
    fake, plan = FakeNft(Family.V4), Plan(Family.V4)
    Dataplane(fake).load(found, RANGES)
    tables = walk.tables(plan.reset(found, RANGES), JUMPS)
    assert fake.state
    for destination, protocol, port in targets(found):
        for source in SOURCES:
            packet = Packet(source, destination, protocol.value, port, from_node=source in LOCAL)
            by_nftables = outcomes(fake.state, packet, LOCAL)
            by_iptables = [path.outcome for path in walk.paths(tables, packet, LOCAL)]
            assert ends(by_nftables) == ends(by_iptables), (packet, by_nftables, by_iptables)


def targets(found: list[Frontend]) -> set[tuple[str, Protocol, int]]:
    """Return where packets go: to every frontend, its other protocol, and what no service has."""
    served = {(f.key.address or NODE, f.key.protocol, f.key.port) for f in found}
    served |= {(ALIAS, f.key.protocol, f.key.port) for f in found if not f.key.address}
    others = {(address, Protocol.UDP, 81) for address, _, _ in served}
    return served | others | {(OUTSIDE, Protocol.TCP, 80), (HERE[1], Protocol.TCP, 80)}


def ends(found: object) -> set[object]:
    """What can become of a packet; where it would have gone does not matter once it is refused."""
    assert isinstance(found, tuple | list)
    return {_end(one) for one in found}


def _end(one: Outcome) -> object:
    if one.verdict != "accept":
        return one.verdict
    return one.destination, one.port, one.masqueraded, one.source
