"""What the kernel refused once is tried again, and nothing is lost on the way."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from cni.wiring import Mode
from ipam.ledger import Ledger, LedgerBusy
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from netlink.nftables.operations import DeleteTable
from netlink.requests import (
    ROUTE_PROTOCOL,
    Route,
    Veth,
    address_add,
    link_up,
    route_delete,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl
from node.sources.objects import Object
from node.store import Store
from node.syncer import COMPARE_SECONDS, RETRY_SECONDS, SyncConfig, Syncer
from proxy.model import Node, ObjectName, Protocol, Service, ServicePort
from proxy.nftables.ruleset import LOCAL_POD_CIDRS, SERVICES, TABLE

ME = Node("node1", ("10.244.1.0/24",), ("192.168.50.11",))
PEER = Node("node2", ("10.244.2.0/24",), ("192.168.50.12",))
WEB = Service(ObjectName("shop", "web"), ("10.96.0.1",), (ServicePort("", Protocol.TCP, 80),))
MORE = Service(ObjectName("shop", "more"), ("10.96.0.2",), (ServicePort("", Protocol.TCP, 80),))
ROUTED = SyncConfig("node1", Mode.ROUTED)
DIRECT = SyncConfig("node1", Mode.ROUTED, backend="direct")


class FailingLedger(Ledger):
    """A ledger that another process keeps locked while `locked`."""

    locked = False

    def settings(self) -> dict[str, str]:
        if self.locked:
            raise LedgerBusy("the ledger is locked")
        return super().settings()


@pytest.fixture
def node(namespaces: Callable[[], str]) -> str:
    name = namespaces()
    netns.run(name, _configure)
    return name


def _configure() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1), veth_add(Veth("eth0", "wire")))
        index = {link.name: link.index for link in rtnl.links()}
        rtnl.commit(link_up(index["wire"]), address_add(index["eth0"], "192.168.50.11/24"))


def replace(store: Store, *values: Object) -> None:
    store.replace({(type(v).__name__, str(v.name)): v for v in values})


def sync(syncer: Syncer, store: Store) -> None:
    pending = store.take(0)
    assert pending
    syncer.sync(pending)


def verdicts(family: Family = Family.V4) -> int:
    with Nft(family, TABLE) as nft:
        return len(nft.elements(SERVICES.shapes))


def gateways() -> dict[str, str | None]:
    with Rtnl() as rtnl:
        return {r.destination: r.gateway for r in rtnl.routes(ROUTE_PROTOCOL)}


def test_a_change_whose_node_part_fails_is_in_the_kernel_after_the_next(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        store = Store()
        with FailingLedger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(ROUTED, ledger) as syncer:
            replace(store, ME, WEB)
            sync(syncer, store)
            ledger.locked = True
            replace(store, structs.replace(ME, addresses=("192.168.50.12",)), PEER, WEB, MORE)
            with pytest.raises(LedgerBusy):
                sync(syncer, store)
            ledger.locked = False
            replace(store, ME, WEB, MORE)
            sync(syncer, store)
            assert verdicts() == 2
            assert {f.service for f in syncer.frontends} == {"shop/web", "shop/more"}

    netns.run(node, inside)


def test_a_batch_that_the_kernel_refuses_leads_to_a_comparison_of_all(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        store = Store()
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(ROUTED, ledger) as syncer:
            replace(store, ME, WEB)
            sync(syncer, store)
            with Nft(Family.V4, TABLE) as nft:
                nft.commit([DeleteTable()])
            replace(store, ME, WEB, MORE)
            sync(syncer, store)
            assert verdicts() == 2
            assert syncer.status.problems == ()

    netns.run(node, inside)


def test_everything_is_compared_in_time_though_changes_keep_coming(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        now = 1000.0
        store = Store()
        with (
            Ledger(tmp_path / "ledger.db", boot_id="b") as ledger,
            Syncer(ROUTED, ledger, clock=lambda: now) as syncer,
        ):
            replace(store, ME, PEER, WEB)
            sync(syncer, store)
            for number in range(3):
                assert syncer.again() is None
                now += COMPARE_SECONDS / 3
                replace(store, ME, PEER, *([MORE, WEB] if number % 2 else [WEB]))
                if pending := store.take(0):
                    syncer.sync(pending)
            assert syncer.again()

    netns.run(node, inside)


def test_a_refused_route_is_tried_again_after_a_while(node: str, tmp_path: Path) -> None:
    foreign = Route("10.244.2.0/24", gateway="192.168.50.77", protocol=4)

    def inside() -> None:
        now = 1000.0
        with Rtnl() as rtnl, Ledger(tmp_path / "ledger.db", boot_id="b") as ledger:
            rtnl.commit(route_replace(foreign))
            store = Store()
            with Syncer(ROUTED, ledger, clock=lambda: now) as syncer:
                replace(store, ME, PEER, WEB)
                sync(syncer, store)
                assert len(list(syncer.status.problems)) == 1
                assert syncer.again() is None, "too early"
                rtnl.commit(route_delete(foreign))
                now += RETRY_SECONDS
                again = syncer.again()
                assert again
                syncer.sync(again)
                assert gateways()["10.244.2.0/24"] == "192.168.50.12"
                assert not list(syncer.status.problems)
                now += RETRY_SECONDS
                assert syncer.again() is None, "nothing left to try"
                now += COMPARE_SECONDS
                assert syncer.again(), "but a look at the whole from time to time"

    netns.run(node, inside)


def test_in_bridge_mode_our_own_range_leads_to_the_bridge(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        store = Store()
        config = SyncConfig("node1", Mode.BRIDGE)
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(config, ledger) as syncer:
            for values in ((ME, PEER), (ME, PEER, WEB), (ME,)):
                replace(store, *values)
                sync(syncer, store)
                found = subprocess.run(
                    ["ip", "route", "get", "10.244.1.7"], capture_output=True, text=True, check=True
                ).stdout
                assert found.startswith("10.244.1.7 dev podwire0 ")

    netns.run(node, inside)


def test_a_second_family_gets_its_table_when_the_node_gets_its_range(node: str, tmp_path: Path) -> None:
    six = Service(ObjectName("shop", "six"), ("fd00:96::1",), (ServicePort("", Protocol.TCP, 80),))

    def inside() -> None:
        store = Store()
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(ROUTED, ledger) as syncer:
            replace(store, ME, WEB, six)
            sync(syncer, store)
            replace(store, Node("node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11",)), WEB, six)
            sync(syncer, store)
            assert verdicts(Family.V6) == 1

    netns.run(node, inside)


def test_a_node_without_range_serves_services_and_says_what_is_missing(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        store = Store()
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(ROUTED, ledger) as syncer:
            replace(store, WEB)
            sync(syncer, store)
            assert verdicts() == 1
            assert syncer.status.problems == ("node node1 has no podCIDR yet: pods cannot be added",)

    netns.run(node, inside)


@pytest.mark.parametrize(
    "damage", ["flush ruleset", "flush chain ip podwire prerouting", "flush table ip podwire"]
)
def test_rules_that_somebody_removed_are_set_again(node: str, tmp_path: Path, damage: str) -> None:
    def inside() -> None:
        now = 1000.0
        store = Store()
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger:
            with Syncer(ROUTED, ledger, clock=lambda: now) as syncer:
                replace(store, ME, WEB)
                sync(syncer, store)
                with Nft(Family.V4, TABLE) as nft:
                    before = nft.rules()
                    subprocess.run(["nft", *damage.split()], check=True)
                    now += COMPARE_SECONDS
                    again = syncer.again()
                    assert again
                    syncer.sync(again)
                    assert nft.rules() == before
                    assert verdicts() == 1
                    subprocess.run(["nft", *damage.split()], check=True)
            with Syncer(ROUTED, ledger) as restarted, Nft(Family.V4, TABLE) as nft:
                fresh = Store()
                replace(fresh, ME, WEB)
                sync(restarted, fresh)
                assert nft.rules() == before
                assert verdicts() == 1

    netns.run(node, inside)


def test_a_route_that_needs_a_default_route_comes_with_it(node: str, tmp_path: Path) -> None:
    far = Node("node3", ("10.244.3.0/24",), ("192.168.60.13",))
    now = 1000.0

    def appear(syncer: Syncer, rtnl: Rtnl) -> None:
        nonlocal now
        store = Store()
        replace(store, ME, far)
        sync(syncer, store)
        assert "there is no default route" in syncer.status.problems[0]
        rtnl.commit(route_replace(Route("0.0.0.0/0", gateway="192.168.50.1", protocol=4)))
        now += RETRY_SECONDS
        again = syncer.again()
        assert again
        syncer.sync(again)
        assert gateways()["10.244.3.0/24"] == "192.168.50.1"
        assert not syncer.status.problems

    def inside() -> None:
        with (
            Rtnl() as rtnl,
            Ledger(tmp_path / "ledger.db", boot_id="b") as ledger,
            Syncer(DIRECT, ledger, clock=lambda: now) as syncer,
        ):
            appear(syncer, rtnl)

    netns.run(node, inside)


def test_a_node_that_loses_its_range_keeps_its_pods_connected(node: str, tmp_path: Path) -> None:
    def inside() -> None:
        store = Store()
        with Ledger(tmp_path / "ledger.db", boot_id="b") as ledger, Syncer(ROUTED, ledger) as syncer:
            replace(store, ME)
            sync(syncer, store)
            with Nft(Family.V4, TABLE) as nft:
                before = nft.elements(LOCAL_POD_CIDRS)
                replace(store, Node("node1", (), ("192.168.50.11",)))
                sync(syncer, store)
                assert nft.elements(LOCAL_POD_CIDRS) == before != {}
            assert syncer.status.problems == (
                "node node1 has no podCIDR any more: its last, 10.244.1.0/24, counts",
            )

    netns.run(node, inside)
