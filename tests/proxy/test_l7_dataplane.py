"""What is written for a service that the node's L7 proxy serves, in what order, and what goes again."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from socket import inet_pton

import pytest
from msgspec.structs import replace

from cli.main import main
from netlink import netns
from netlink.family import Family, with_port
from netlink.nftables.fake import FakeNft
from netlink.nftables.objects import Table
from netlink.nftables.operations import AddElements, DeleteElements
from netlink.nftables.text import listing
from netlink.xtables import Variant
from node.dataplanes import Programs
from proxy.dataplane import NOTHING
from proxy.frontends import Action, Backend, Frontend, Masquerade
from proxy.iptables.dataplane import Dataplane as Iptables
from proxy.iptables.fake import FakeRule, FakeTables
from proxy.iptables.names import PortName, direct_chain, endpoint_chain, service_chain
from proxy.iptables.shared import OWN_TRAFFIC
from proxy.l7 import places
from proxy.l7.policy import Protocol
from proxy.model import Protocol as Transport
from proxy.nftables.dataplane import Dataplane as Nftables
from proxy.nftables.ruleset import (
    HAIRPIN,
    SERVICES,
    TABLE,
    shape_id,
)
from proxy.table import Change
from tests.proxy.dataplanes import Recorded
from tests.proxy.plan import EVERYWHERE, PLAIN_OUTSIDE, node_ranges, programmed
from tests.proxy.test_l7_switch import CLUSTER, served

V4 = Family.V4
TITLE = "shop/web"
PORT = PortName(TITLE, Transport.TCP)
PLACES = {f: {p: places.address(p, f, TITLE) for p in Protocol} for f in Family}


@pytest.mark.parametrize("family", Family)
def test_what_the_proxy_sends_is_let_go_first(family: Family) -> None:
    fake = FakeNft(family)
    Nftables(fake).load((), NOTHING)
    assert fake.state
    text = listing(Table(family, TABLE), fake.state)
    output = text.partition("\tchain output {\n")[2].splitlines()
    assert output[1].startswith("\t\tmeta skgid 61000 return comment")
    assert text.count("skgid") == 1


@pytest.mark.parametrize("family", Family)
def test_a_frontend_of_the_proxy_has_that_for_its_endpoint_and_masquerades_nobody(
    family: Family,
) -> None:
    fake = FakeNft(family)
    dataplane = Nftables(fake, 10080)
    dataplane.load([served(family, PLAIN_OUTSIDE, affinity=60)], NOTHING)
    one = shape_id(SERVICES, 1, Masquerade.NEVER)
    assert list(fake.elements(SERVICES.shapes).values()) == [one]
    proxy = inet_pton(family.af, PLACES[family][Protocol.HTTP]) + struct.pack(">HH", 10080, 0)
    assert list(fake.elements(SERVICES.endpoints).values()) == [proxy]
    for which in (SERVICES.affinity, HAIRPIN):
        assert not fake.elements(which)
    assert dataplane.intact()


@pytest.mark.parametrize("action", [Action.REJECT, Action.DROP])
def test_what_is_refused_or_dropped_is_never_the_proxys(action: Action) -> None:
    frontend = replace(served(V4, None), action=action)
    states = []
    for one in (frontend, replace(frontend, proxied=Protocol.TCP)):
        fake, tables = FakeNft(V4), FakeTables(V4)
        Nftables(fake).load([one], NOTHING)
        Iptables(tables).load([one], NOTHING)
        states.append((fake.elements(SERVICES.shapes), tables.texts))
    assert states[0] == states[1]


def test_another_port_is_another_endpoint() -> None:
    fake = Recorded(V4)
    Nftables(fake).load([served(V4, EVERYWHERE)], NOTHING)
    fake.batches.clear()
    assert Nftables(fake, 10001).load([served(V4, EVERYWHERE)], NOTHING)
    (batch,) = fake.batches
    assert {op.map for op in batch if isinstance(op, AddElements)} == {SERVICES.endpoints}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("there", [0, 60])
def test_elements_go_after_what_led_to_them(restarted: bool, there: int) -> None:
    """A packet that was told a number of a shape looks for what that leads to afterwards."""
    fake = Recorded(V4)
    dataplane = Nftables(fake)
    old, new = served(V4, None, 60 - there), served(V4, None if there else PLAIN_OUTSIDE, there)
    dataplane.load([old], NOTHING)
    fake.batches.clear()
    if restarted:
        assert Nftables(fake).load([new], NOTHING)
    else:
        dataplane.apply([Change(old, new)])
    at = {
        which.name: number
        for number, batch in enumerate(fake.batches)
        for op in batch
        if isinstance(op, DeleteElements)
        for which in (op.map,)
    }
    gone = SERVICES.endpoints if there else SERVICES.affinity
    assert at[SERVICES.shapes.name] < at[gone.name]


def test_there_and_back_leaves_what_was_and_counts_right() -> None:
    fake = FakeNft(V4)
    dataplane = Nftables(fake)
    plain, proxied = served(V4, None), served(V4, EVERYWHERE)
    dataplane.load([plain], NOTHING)
    before, elements = repr(fake.state), dataplane.elements
    for change in (Change(plain, proxied), Change(proxied, plain)):
        assert dataplane.apply([change]) > 0
    assert (repr(fake.state), dataplane.elements) == (before, elements)


def rules_of(tables: FakeTables, chain: str) -> list[str]:
    return [rule.line for rule in tables.tables["nat"].chains[chain]]


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("protocol", Protocol)
def test_kube_proxys_chains_lead_to_the_proxy_via_plugin(family: Family, protocol: Protocol) -> None:
    """KUBE-SVC-X, one KUBE-SEP-X with that comment, DNAT to the proxy's port."""
    tables = FakeTables(family)
    Iptables(tables, port=10080).load([replace(served(family, None), proxied=protocol)], NOTHING)
    address = PLACES[family][protocol]
    svc = service_chain("SVC", PORT).name
    sep = endpoint_chain(PORT, Backend(address, 10080, True)).name
    said = f'-m comment --comment "{TITLE} via plugin"'
    assert rules_of(tables, svc) == [f"-A {svc} {said} -j {sep}"]
    to = f"-j DNAT --to-destination {with_port(address, 10080)}"
    assert rules_of(tables, sep) == [f"-A {sep} -p tcp {said} -m tcp {to}"]
    (entry,) = [line for line in rules_of(tables, "KUBE-SERVICES") if svc in line]
    assert f"-d {CLUSTER[family]}/{family.bits} -p tcp" in entry
    chains = tables.tables["nat"].chains
    assert {c for c in chains if c.startswith(("KUBE-SEP", "KUBE-SVC", "PODWIRE-SVC"))} == {svc, sep}


def test_what_is_not_the_proxys_of_a_service_port_has_its_endpoints_beside_it() -> None:
    """The plan's `l7-local-plain`: its node port is balanced by the kernel."""
    tables = FakeTables(V4)
    Iptables(tables).load(programmed(V4), node_ranges())
    port = PortName("test/l7-local-plain", Transport.TCP)
    inside = rules_of(tables, direct_chain(port).name)
    assert len([line for line in inside if "KUBE-SEP-" in line]) == 2
    assert "via plugin" in "".join(rules_of(tables, service_chain("SVC", port).name))
    outside = "".join(rules_of(tables, service_chain("EXT", port).name))
    assert direct_chain(port).name in outside
    assert service_chain("SVL", port).name in outside
    assert service_chain("SVC", port).name not in outside


def test_only_the_chains_of_that_service_port_are_sent() -> None:
    tables = FakeTables(V4)
    dataplane = Iptables(tables)
    plain, proxied = served(V4, None), served(V4, PLAIN_OUTSIDE)
    dataplane.load([*programmed(V4), plain], node_ranges())
    dataplane.apply([Change(plain, proxied)])
    chains = {line.split(" ")[0][1:] for line in tables.texts[-1].splitlines() if line.startswith(":")}
    proxy = endpoint_chain(PORT, Backend(PLACES[V4][Protocol.HTTP], places.PORT, True))
    (endpoint,) = (endpoint_chain(PORT, e) for e in plain.endpoints)
    assert chains == {service_chain("SVC", PORT).name, proxy.name, endpoint.name}
    dataplane.apply([Change(proxied, plain)])
    assert dataplane.intact()
    assert proxy.name not in tables.tables["nat"].chains


def test_the_rule_for_the_proxys_own_comes_first_is_missed_and_goes() -> None:
    tables = FakeTables(V4)
    dataplane = Iptables(tables)
    dataplane.load((), NOTHING)
    output = tables.tables["nat"].chains["OUTPUT"]
    assert [rule.target for rule in output] == ["RETURN", "KUBE-SERVICES"]
    assert "--gid-owner 61000" in output[0].line
    others = FakeRule("RETURN", "-A OUTPUT -m owner --gid-owner 61000 -j RETURN")
    output.append(others)
    assert dataplane.intact()
    for chain in (output[1:], [output[1], output[0], others]):  # taken, and no longer first
        tables.tables["nat"].chains["OUTPUT"] = list(chain)
        assert not dataplane.intact()
        assert Iptables(tables).load((), NOTHING)
        assert dataplane.intact()
    dataplane.remove()
    assert tables.tables["nat"].chains["OUTPUT"] == [others]


def test_another_port_of_iptables_is_another_chain() -> None:
    tables = FakeTables(V4)
    Iptables(tables).load([served(V4, EVERYWHERE)], NOTHING)
    moved = Iptables(tables, port=10001)
    assert moved.load([served(V4, EVERYWHERE)], NOTHING)
    text = "".join(itertools.chain(*(rules_of(tables, c) for c in tables.tables["nat"].chains)))
    assert ":10001" in text
    assert ":10000" not in text


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("variant", Variant)
def test_on_the_kernel_the_rule_for_the_proxys_own_is_read_as_it_was_written(
    namespaces: Callable[[], str], variant: Variant, family: Family
) -> None:
    frontend: Frontend = served(family, EVERYWHERE)

    def inside() -> None:
        programs = Programs(variant, family)
        dataplane = Iptables(programs)
        dataplane.load([frontend], NOTHING)
        again = Iptables(programs)
        assert again.load([frontend], NOTHING)
        assert again.intact()
        assert again.sent == 0
        (nat,) = (table for table in programs.read() if table.name == "nat")
        assert nat.chains["OUTPUT"][0].line == f"-A OUTPUT {OWN_TRAFFIC.rule}"
        again.remove()
        assert not [rule for table in programs.read() for rules in table.chains.values() for rule in rules]

    netns.run(namespaces(), inside)


def test_a_service_that_goes_to_the_proxy_touches_its_own_elements_only() -> None:
    fake = Recorded(V4)
    dataplane = Nftables(fake)
    old, new = served(V4, None), served(V4, EVERYWHERE)
    dataplane.load([old], NOTHING)
    fake.batches.clear()
    dataplane.apply([Change(old, new)])
    (batch,) = fake.batches
    moved = {op.map for op in batch if isinstance(op, AddElements | DeleteElements)}
    assert moved == {SERVICES.shapes, SERVICES.endpoints, HAIRPIN}


MANIFESTS = """
apiVersion: v1
kind: Service
metadata:
  {name: web, namespace: shop, annotations: {podwire.io/proxy: '{"ip-protocol": "tcp"}'}}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.1.11], nodeName: me, conditions: {ready: true}}]
---
apiVersion: v1
kind: Node
metadata: {name: me}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
"""


def test_what_is_rendered_is_as_it_is_while_the_proxy_serves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "web.yaml").write_text(MANIFESTS)
    assert main(["render", str(tmp_path), "--node-name", "me", "-o", "nft"]) == 0
    text = capsys.readouterr().out
    proxy = places.address(Protocol.TCP, V4, "shop/web")
    assert f"10.96.0.1 . tcp . 80 . 0 : {proxy} . 10000" in text
