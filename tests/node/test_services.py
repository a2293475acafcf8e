"""The service proxy against a kernel that refuses, and against people who change its elements."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cni.wiring import Mode
from ipam.ledger import Ledger
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import BatchError, Nft, NftSocket
from netlink.nftables.objects import Table
from netlink.nftables.operations import AddElements, Operation
from node.services import ServiceProxy
from node.sources.objects import Object
from node.store import Store
from node.syncer import SUSPECT_SECONDS, SyncConfig, Syncer
from proxy.dataplane import NodeRanges
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    Snapshot,
)
from proxy.nftables.elements import key_bytes
from proxy.nftables.ruleset import SERVICES, TABLE
from proxy.topology import Place

ME = Node("node1", ("10.244.1.0/24",), ("192.168.50.11",))
HERE = Place("node1", "a")


def service(number: int) -> Service:
    name = ObjectName("shop", f"s{number}")
    return Service(name, (f"10.96.0.{number}",), (ServicePort("", Protocol.TCP, 80),))


def piece(number: int, *addresses: str, zones: Sequence[str] = ()) -> EndpointSlice:
    owner = ObjectName("shop", f"s{number}")
    found = tuple(
        Endpoint(a, "node2", zone_hints=(z,)) if z else Endpoint(a, "node2")
        for a, z in zip(addresses, zones or [""] * len(addresses), strict=True)
    )
    ports = (EndpointPort("", Protocol.TCP, 8080),)
    return EndpointSlice(ObjectName("shop", f"s{number}-1"), owner, Family.V4, ports, found)


def snapshot(*numbers: int) -> Snapshot:
    services = {service(n).name: service(n) for n in numbers}
    slices = {service(n).name: (piece(n, f"10.244.2.{n}"),) for n in numbers}
    return Snapshot(services, slices, {ME.name: ME})


def take(proxy: ServiceProxy, state: Snapshot, place: Place = HERE) -> None:
    everybody = {service(n).name for n in range(1, 10)}
    changes = proxy.take(state, everybody, place)
    proxy.apply(changes, {Family.V4}, NodeRanges())


def kernel() -> set[bytes]:
    """Return the cluster addresses that are served."""
    with Nft(Family.V4, TABLE) as nft:
        return {key[:4] for key in nft.elements(SERVICES.shapes)}


def address(number: int) -> bytes:
    return bytes((10, 96, 0, number))


def replace(store: Store, *values: Object) -> None:
    store.replace({(type(v).__name__, str(v.name)): v for v in values})


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Cluster addresses whose elements the kernel is made to refuse: what it refuses by itself, we fixed."""
    refused: set[str] = set()
    commit = NftSocket.commit

    def picky(self: NftSocket, *parts: tuple[Table, Sequence[Operation]], generation: int = 0) -> None:
        for _, operations in parts:
            for operation in operations:
                for key, _ in operation.elements if isinstance(operation, AddElements) else ():
                    if operation.map in (SERVICES.shapes, SERVICES.endpoints) and any(
                        key.startswith(bytes(map(int, a.split(".")))) for a in refused
                    ):
                        raise BatchError(errno.EINVAL, operation, key, "")
        commit(self, *parts, generation=generation)

    monkeypatch.setattr(NftSocket, "commit", picky)
    return refused


def test_a_service_that_the_kernel_refuses_is_named_and_the_rest_is_served(
    namespaces: Callable[[], str], refusing: set[str]
) -> None:
    def inside() -> None:
        refusing.update(("10.96.0.2", "10.96.0.5"))
        with ServiceProxy(lambda: ()) as proxy:
            take(proxy, snapshot(1, 2, 3, 4, 5))
            assert kernel() == {address(n) for n in (1, 3, 4)}
            first, second = sorted(proxy.problems)
            assert first.startswith("service shop/s2 is not served: cannot add elements to map services")
            assert second.startswith("service shop/s5 is not served: ")
            take(proxy, snapshot(1, 3, 4, 5, 6))
            assert kernel() == {address(n) for n in (1, 3, 4, 6)}
            refusing.clear()
            take(proxy, snapshot(1, 3, 4, 5, 6))
            assert kernel() == {address(n) for n in (1, 3, 4, 5, 6)}
            assert proxy.problems == ()

    netns.run(namespaces(), inside)


def test_a_batch_that_is_refused_changes_nothing(namespaces: Callable[[], str], refusing: set[str]) -> None:
    def inside() -> None:
        with ServiceProxy(lambda: ()) as proxy:
            take(proxy, snapshot(1, 2))
            before = subprocess.run(["nft", "-s", "list", "ruleset"], capture_output=True, check=True).stdout
            refusing.add("10.96.0.3")
            take(proxy, snapshot(1, 2, 3))
            after = subprocess.run(["nft", "-s", "list", "ruleset"], capture_output=True, check=True).stdout
            assert sorted(after.splitlines()) == sorted(before.splitlines())

    netns.run(namespaces(), inside)


def test_an_element_of_somebody_elses_in_our_way_is_set_right_and_no_service_left_out(
    namespaces: Callable[[], str],
) -> None:
    def inside() -> None:
        with ServiceProxy(lambda: ()) as proxy, Nft(Family.V4, TABLE) as nft:
            take(proxy, snapshot(1))
            (frontend,) = proxy.table
            theirs = key_bytes(frontend.key._replace(address="10.96.0.2"))
            (data,) = nft.elements(SERVICES.shapes).values()
            nft.commit([AddElements(SERVICES.shapes, [(theirs, data)])])
            take(proxy, snapshot(1, 2))
            assert kernel() == {address(1), address(2)}
            assert proxy.problems == ()
            assert len(nft.elements(SERVICES.endpoints)) == 2

    netns.run(namespaces(), inside)


def test_what_somebody_deleted_before_we_did_is_no_failure_for_long(namespaces: Callable[[], str]) -> None:
    def inside() -> None:
        many = [f"10.244.2.{n}" for n in range(1, 31)]
        with ServiceProxy(lambda: ()) as proxy:
            for addresses in (many, many[:29]):
                slices = {service(1).name: (piece(1, *addresses),)}
                state = Snapshot({service(1).name: service(1)}, slices, {})
                take(proxy, state)
            chain = "services_30_masquerade_off_cluster"
            nft = f"flush map ip podwire shapes; delete chain ip podwire {chain}"
            subprocess.run(["nft", nft], check=True)
            proxy.tidy()
            take(proxy, state)
            assert kernel() == {address(1)}
            chains = subprocess.run(["nft", "list", "chains"], capture_output=True, check=True).stdout
            assert b"services_29_" in chains
            assert b"services_30_" not in chains

    netns.run(namespaces(), inside)


def test_a_node_that_gets_another_zone_follows_its_hints(namespaces: Callable[[], str]) -> None:
    def inside() -> None:
        slices = {service(1).name: (piece(1, "10.244.2.1", "10.244.2.2", zones=("a", "b")),)}
        state = Snapshot({service(1).name: service(1)}, slices, {})
        with ServiceProxy(lambda: ()) as proxy:
            for zone, expected in (
                ("a", {"10.244.2.1"}),
                ("b", {"10.244.2.2"}),
                ("c", {"10.244.2.1", "10.244.2.2"}),
            ):
                changes = proxy.take(state, (), Place("node1", zone))
                proxy.apply(changes, {Family.V4}, NodeRanges())
                (frontend,) = proxy.table
                assert {e.address for e in frontend.endpoints} == expected

    netns.run(namespaces(), inside)


def test_an_element_that_somebody_took_comes_back_though_no_rule_is_missing(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    def inside() -> None:
        now = 1000.0
        store = Store()
        config = SyncConfig("node1", Mode.ROUTED)
        with (
            Ledger(tmp_path / "ledger.db", boot_id="b") as ledger,
            Syncer(config, ledger, clock=lambda: now) as syncer,
        ):
            replace(store, ME, service(1), piece(1, "10.244.2.1"))
            pending = store.take(0)
            assert pending
            syncer.sync(pending)
            subprocess.run(["nft", "flush", "map", "ip", TABLE, SERVICES.shapes.name], check=True)
            assert syncer.intact(), "rules are all there"
            syncer.suspect()
            assert syncer.again() is None, "too soon after all was compared"
            now += SUSPECT_SECONDS
            again = syncer.again()
            assert again
            assert syncer.sync(again), "everything is compared"
            assert kernel() == {address(1)}
            now += SUSPECT_SECONDS
            again = syncer.again()
            assert again
            assert not syncer.sync(again), "nothing is suspected any more"

    netns.run(namespaces(), inside)
