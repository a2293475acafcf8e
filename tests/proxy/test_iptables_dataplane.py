"""What is sent to iptables-restore, what is done when it refuses, and whose chains are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.xtables import Variant
from node.dataplanes import Programs
from proxy.dataplane import NodeRanges
from proxy.frontends import Backend, FrontendKey, Origin, frontends
from proxy.iptables.dataplane import Dataplane
from proxy.iptables.fake import FakeRule, FakeTable, FakeTables
from proxy.iptables.live import TablesError, choose
from proxy.iptables.names import PortName, endpoint_chain, service_chain
from proxy.model import Endpoint, EndpointPort, EndpointSlice, ObjectName, Protocol, Service, ServicePort
from proxy.table import Change, FrontendTable
from proxy.topology import Place
from tests.node import kube_proxy
from tests.proxy.plan import node_ranges, programmed

RANGES = NodeRanges(pod_cidrs=("10.244.0.0/16",), node_pods=("10.244.1.0/24",))
EVERYWHERE = [(variant, family) for variant in Variant for family in Family]


class Services:
    """Services with some endpoints, and what changes when they get others."""

    def __init__(self, affinity: int = 0) -> None:
        self.table = FrontendTable()
        self._affinity = affinity

    def set(self, name: str, number: int, *pods: int) -> list[Change]:
        which = ObjectName("ns", name)
        ports = (ServicePort("", Protocol.TCP, 80, 30000 + number),)
        service = Service(which, (f"10.96.0.{number}",), ports, affinity_seconds=self._affinity)
        endpoints = tuple(Endpoint(f"10.244.1.{pod}", "node1") for pod in pods)
        targets = (EndpointPort("", Protocol.TCP, 8080),)
        piece = EndpointSlice(which, which, Family.V4, targets, endpoints)
        return self.table.replace(which, frontends(service, (piece,), Place("node1")))


@pytest.fixture
def services() -> Services:
    found = Services()
    for number in (1, 2, 3):
        found.set(f"s{number}", number, 10, 11)
    return found


@pytest.fixture
def tables() -> FakeTables:
    return FakeTables(Family.V4)


@pytest.fixture
def dataplane(services: Services, tables: FakeTables) -> Dataplane:
    found = Dataplane(tables)
    assert not found.load(services.table, RANGES)
    return found


def chains_in(text: str) -> list[str]:
    """The kinds of chains that a text writes."""
    names = [line[1:].split()[0] for line in text.splitlines() if line.startswith(":")]
    return sorted(name[:8] if name[8:9] == "-" else name for name in names)


def test_a_change_of_one_endpoint_sends_its_own_chains_only(
    services: Services, tables: FakeTables, dataplane: Dataplane
) -> None:
    dataplane.apply(services.set("s2", 2, 10, 12))
    assert chains_in(tables.texts[-1]) == ["KUBE-SEP", "KUBE-SEP", "KUBE-SVC"], "old, new, and the service's"
    assert "*filter" not in tables.texts[-1]
    assert dataplane.intact()


def test_the_first_endpoint_comes_and_the_last_one_goes(
    services: Services, tables: FakeTables, dataplane: Dataplane
) -> None:
    before = dict(tables.tables["nat"].chains)
    dataplane.apply(services.set("s2", 2))
    lines = [rule.line for rule in tables.tables["filter"].chains["KUBE-SERVICES"]]
    assert ['"ns/s2 has no endpoints"' in line for line in lines] == [True]
    assert service_chain("SVC", PortName("ns/s2", Protocol.TCP)).name not in tables.tables["nat"].chains
    dataplane.apply(services.set("s2", 2, 10, 11))
    assert tables.tables["nat"].chains == before
    assert not tables.tables["filter"].chains["KUBE-SERVICES"]


def test_nothing_changed_sends_nothing(services: Services, tables: FakeTables, dataplane: Dataplane) -> None:
    sent = dataplane.sent
    assert dataplane.apply((), RANGES) == 0
    assert dataplane.apply(services.set("s2", 2, 10, 11)) == 0
    assert dataplane.sent == sent == len(tables.texts)


def test_node_ports_are_looked_up_last(tables: FakeTables, dataplane: Dataplane) -> None:
    last = tables.tables["nat"].chains["KUBE-SERVICES"][-1].line
    words = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
    assert f'"{words}" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS' in last


def test_what_is_refused_is_tried_again_from_what_is_there(
    services: Services, tables: FakeTables, dataplane: Dataplane
) -> None:
    del tables.tables["nat"].chains["KUBE-MARK-MASQ"]  # so that nothing can lead there
    assert not dataplane.intact()
    assert dataplane.apply(services.set("s2", 2, 12))
    assert dataplane.intact()
    assert "KUBE-MARK-MASQ" in chains_in(tables.texts[-1])


def test_what_is_refused_again_is_an_error_and_a_load_sets_it_right(
    services: Services, tables: FakeTables, dataplane: Dataplane
) -> None:
    tables.failures = 2
    with pytest.raises(TablesError, match="made to fail"):
        dataplane.apply(services.set("s2", 2, 12))
    assert dataplane.load(services.table, RANGES)
    assert dataplane.intact()


def test_more_endpoints_than_people_read_have_no_comments(
    services: Services, tables: FakeTables, dataplane: Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kube-proxy leaves them out too (largeClusterEndpointsThreshold); what leads there keeps its own."""
    monkeypatch.setattr("proxy.iptables.plan.MOST_COMMENTED", 6)
    assert '"ns/s1"' in tables.texts[-1]
    dataplane.apply(services.set("s2", 2, 10, 11, 12))
    assert '"ns/s1"' not in tables.texts[-1].replace('--comment "ns/s1" -m tcp --dport', "")
    assert '"ns/s1 cluster IP"' in tables.texts[-1]


@pytest.mark.parametrize(
    ("table", "chain"),
    [("nat", "PREROUTING"), ("nat", "KUBE-POSTROUTING"), ("filter", "FORWARD"), ("filter", "OUTPUT")],
)
def test_rules_that_somebody_took_are_missed(
    services: Services, tables: FakeTables, dataplane: Dataplane, table: str, chain: str
) -> None:
    assert dataplane.intact()
    tables.tables[table].chains[chain].pop()
    assert not dataplane.intact()
    assert dataplane.load(services.table, RANGES)
    assert dataplane.intact()


def test_a_table_that_is_gone_is_missed(tables: FakeTables, dataplane: Dataplane) -> None:
    del tables.tables["filter"]
    assert not dataplane.intact()


def test_what_went_while_nobody_looked_is_told(services: Services, tables: FakeTables) -> None:
    Dataplane(tables).load(services.table, RANGES)
    services.table.replace(ObjectName("ns", "s3"), ())
    again = Dataplane(tables)
    assert again.load(services.table, RANGES)
    assert set(again.gone) == {
        FrontendKey(Family.V4, "10.96.0.3", Protocol.TCP, 80, Origin.ANY),
        FrontendKey(Family.V4, "", Protocol.TCP, 30003, Origin.ANY),
    }


def test_a_refused_line_names_the_service_that_it_is_of(services: Services, dataplane: Dataplane) -> None:
    chain = service_chain("EXT", PortName("ns/s2", Protocol.TCP)).name
    text = f"*nat\n:{chain} - [0:0]\n-A {chain} -j NONSENSE\nCOMMIT\n"
    for complaint in ("iptables-restore: line 3 failed", "line 3: RULE_APPEND failed (No such file)"):
        culprit = dataplane.culprit(TablesError(complaint, text), services.table)
        assert culprit
        assert culprit.service == "ns/s2"
    for complaint in ("iptables-restore: line 4 failed", "xtables lock is held", "line 99 failed"):
        assert dataplane.culprit(TablesError(complaint, text), services.table) is None


def test_chains_that_others_use_stay_with_all_that_they_need(
    services: Services, tables: FakeTables, dataplane: Dataplane
) -> None:
    nat = tables.tables["nat"]
    nat.chains["MINE"] = [FakeRule("KUBE-MARK-MASQ", "-A MINE -j KUBE-MARK-MASQ")]
    dataplane.remove()
    left = {n for n in tables.tables["nat"].chains if n not in tables.tables["nat"].builtin}
    assert left == {"MINE", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"}
    assert [r.target for r in tables.tables["nat"].chains["POSTROUTING"]] == ["KUBE-POSTROUTING"]
    assert not [r for rules in tables.tables["filter"].chains.values() for r in rules]
    assert dataplane.load(services.table, RANGES) is False
    assert dataplane.intact()


@pytest.fixture(scope="module")
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


@pytest.mark.parametrize(("variant", "family"), EVERYWHERE)
def test_on_the_kernel_what_is_there_is_read_as_it_was_written(
    namespace: str, variant: Variant, family: Family
) -> None:
    """All forms of rules in the plan: a second load sends nothing, and none of it is left in the end."""

    def inside() -> None:
        programs = Programs(variant, family)
        Dataplane(programs).load(programmed(family), node_ranges())
        again = Dataplane(programs)
        assert again.load(programmed(family), node_ranges())
        assert again.intact()
        assert (again.sent, again.gone) == (0, ())
        again.remove()
        left = {n: r for t in programs.read() for n, r in t.chains.items() if r or n not in t.builtin}
        assert not left

    netns.run(namespace, inside)


@pytest.mark.parametrize("variant", Variant)
def test_on_the_kernel_our_commits_are_those_that_nftables_counts(
    namespace: str, services: Services, variant: Variant
) -> None:
    """Whoever watches nftables' generation knows by this whether anybody else has changed something."""

    def inside() -> None:
        dataplane = Dataplane(Programs(variant, Family.V4))
        with NftSocket() as nft:
            before = nft.generation()
            dataplane.load(services.table, RANGES)
            dataplane.apply(services.set("s2", 2, 12))
            dataplane.apply(services.set("s2", 2))
            dataplane.remove()
            assert nft.generation() - before == dataplane.commits
        assert dataplane.sent == 4

    netns.run(namespace, inside)


@pytest.mark.parametrize("variant", Variant)
def test_on_the_kernel_clients_with_affinity_stay_while_other_endpoints_come_and_go(
    namespace: str, variant: Variant
) -> None:
    """A list of xt_recent lives as long as a rule names it, be it another one than before."""
    chain = endpoint_chain(PortName("ns/s1", Protocol.TCP), Backend("10.244.1.10", 8080, False))
    clients = Path("/proc/thread-self/net/xt_recent", chain.name)
    services = Services(affinity=60)
    services.set("s1", 1, 10, 11)

    def inside() -> None:
        dataplane = Dataplane(Programs(variant, Family.V4))
        dataplane.load(services.table, RANGES)
        clients.write_text("+10.244.1.99\n")
        for pods in ((10,), (10, 12, 13), (9, 10)):
            dataplane.apply(services.set("s1", 1, *pods))
            assert "src=10.244.1.99 " in clients.read_text()
        dataplane.remove()
        assert not clients.exists()

    netns.run(namespace, inside)


@pytest.mark.parametrize(("variant", "family"), EVERYWHERE)
def test_on_the_kernel_kube_proxys_chains_are_taken_over_and_those_of_others_stay(
    namespaces: Callable[[], str], variant: Variant, family: Family
) -> None:
    def others() -> str:
        kube_proxy.load(variant, family, kube_proxy.rules(family, kube_proxys=False))
        return kube_proxy.saved(variant, family)

    def inside() -> str:
        kube_proxy.load(variant, family, kube_proxy.rules(family))
        dataplane = Dataplane(Programs(variant, family))
        dataplane.load(programmed(family), node_ranges())
        assert dataplane.intact()
        dataplane.remove()
        return kube_proxy.saved(variant, family)

    canary = ":KUBE-PROXY-CANARY - [0:0]\n"  # nothing leads there, and `podwire cleanup` takes it away
    assert netns.run(namespaces(), inside).replace(canary, "") == netns.run(namespaces(), others)


def _table(name: str, **chains: int) -> FakeTable:
    return FakeTable(name, (), {n.replace("_", "-"): [FakeRule("", "")] * c for n, c in chains.items()})


@pytest.mark.parametrize(
    ("legacy", "nft", "on_path", "chosen"),
    [
        ([_table("mangle", KUBE_IPTABLES_HINT=0)], [_table("nat", A=9)], "nf_tables", "legacy"),
        ([_table("nat", A=9)], [_table("mangle", KUBE_KUBELET_CANARY=0)], "legacy", "nft"),
        ([_table("nat", A=2)], [_table("nat", A=1)], "nf_tables", "legacy"),
        ([_table("nat", A=1)], [_table("nat", A=2)], "legacy", "nft"),
        ([], [], "iptables v1.8.9 (legacy)", "legacy"),
        ([], [], "iptables v1.8.9 (nf_tables)", "nft"),
    ],
)
def test_the_variant_is_the_one_that_the_hosts_tools_use(
    legacy: list[FakeTable], nft: list[FakeTable], on_path: str, chosen: str
) -> None:
    """As kubernetes-sigs/iptables-wrappers decides."""
    assert choose({"legacy": legacy, "nft": nft}, on_path) == chosen
