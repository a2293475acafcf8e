"""What a pod may ask for beyond any address: pools, one by name, its own again, host ports; quarantine."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPAddress

from ipam.ledger import (
    AddressTaken,
    Attachment,
    Claim,
    Exhausted,
    HostPort,
    HostPortTaken,
    Kept,
    Key,
    Ledger,
    State,
    StillReleasing,
)
from ipam.pools import IpamConfig, Wish, demands, groups
from ipam.ranges import parse_pod_cidrs

CIDRS = parse_pod_cidrs(["10.1.0.0/29"])  # five pods: .2 to .6
DUAL = (*CIDRS, *parse_pod_cidrs(["fd00:1::/64"]))
POOLS = IpamConfig.parse(
    {
        "pools": [{"name": "dmz", "ranges": ["10.1.0.5-10.1.0.6", "10.7.0.1"], "namespaces": ["front"]}],
        "exclude": ["10.1.0.4"],
        "reserve": ["10.7.0.1"],
    }
)
TCP, UDP = 6, 17


@dataclass
class Node:
    """A node that boots and ages as the test says."""

    path: Path
    boot: int = 1
    now: float = 1000.0
    config: IpamConfig = field(default_factory=lambda: IpamConfig(quarantine=0.0))
    cidrs: Any = CIDRS

    def __post_init__(self) -> None:
        self.ledger = self.opened()

    def opened(self) -> Ledger:
        ledger = Ledger(self.path, boot_id=f"boot-{self.boot}", clock=lambda: self.now)
        ledger.open()
        return ledger

    def restart(self, reboot: bool = False) -> None:
        self.ledger.close()
        self.boot += reboot
        self.ledger = self.opened()

    def reserve(self, container: str, wish: Wish | None = None, **claim: Any) -> Attachment:
        wanted = demands(self.config, self.cidrs, wish or Wish())
        return self.ledger.reserve(
            Key(container, "eth0"), Claim("net", "", "pw0", "r", **claim), wanted, self.config.quarantine
        )

    def add(self, container: str, wish: Wish | None = None, **claim: Any) -> str:
        """Attach a pod and return its addresses."""
        made = self.reserve(container, wish, **claim)
        self.ledger.commit(made.key, "{}")
        return " ".join(map(str, made.addresses))

    def fill(self, count: int = 5) -> list[str]:
        return [self.add(f"fill-{number}") for number in range(count)]

    def delete(self, container: str) -> None:
        self.release(container)
        self.forget(container)

    def release(self, container: str) -> None:
        self.ledger.release(Key(container, "eth0"))

    def forget(self, container: str) -> None:
        self.ledger.forget(Key(container, "eth0"))

    def usage(self) -> list[tuple[Any, ...]]:
        """Return name, capacity, used, releasing, quarantined, kept of each group."""
        return [
            (u.name, u.capacity, u.used, u.releasing, u.quarantined, u.kept)
            for u in self.ledger.usage(groups(self.config, self.cidrs), self.config.quarantine)
        ]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "ledger.db")
    yield made
    made.ledger.close()


def wish(*addresses: str) -> Wish:
    return Wish(addresses=tuple(map(IPAddress, addresses)))


# What users have suffered, at the level of the ledger.


def test_range_exhausted_after_reboots_because_del_never_ran(node: Node) -> None:
    """plugins#697: five boots fill the range five times over; quarantine does not hold a boot up."""
    node.config = IpamConfig(quarantine=60.0)
    for _ in range(5):
        assert len(set(node.fill())) == 5
        node.restart(reboot=True)
    assert node.ledger.attachments() == ()


def test_one_address_given_twice_because_del_overtook_an_add(node: Node) -> None:
    """azure-container-networking#4829: the address is free only after the kernel has let go of it."""
    node.fill(4)
    last = node.reserve("c1")
    node.release("c1")  # DEL, while the ADD is at work
    with pytest.raises(Exhausted) as caught:
        node.reserve("c2")
    assert [a.key for a in caught.value.releasing] == [last.key]
    node.forget("c1")
    assert node.add("c2") == str(last.addresses[0])


def test_duplicate_address_after_a_daemon_restart_with_memory_as_the_truth(node: Node) -> None:
    """amazon-vpc-cni#711: a restart remembers who has what, and what rests."""
    node.config = IpamConfig(quarantine=30.0)
    before = node.fill()
    node.delete("fill-2")
    node.restart()
    with pytest.raises(Exhausted):
        node.add("c1")
    node.now += 30
    assert node.add("c1") == before[2]


def test_new_pod_unreachable_because_its_address_was_in_use_a_moment_ago(node: Node) -> None:
    """plugins#858: the address freed longest ago comes first, and none before its quarantine is over."""
    node.config = IpamConfig(quarantine=10.0)
    addresses = node.fill()
    for container in ("fill-3", "fill-1"):
        node.now += 4
        node.delete(container)
    with pytest.raises(Exhausted) as caught:
        node.add("c1")
    assert "the next one leaves quarantine in 6 s" in str(caught.value)
    assert caught.value.retry_after == 6.0
    node.now += 6
    assert node.add("c1") == addresses[3]
    node.now += 4
    assert node.add("c2") == addresses[1]


# Pools.


def test_pods_of_a_namespace_get_addresses_of_their_pool(node: Node) -> None:
    node.config = POOLS
    assert [node.add(f"f{n}", Wish(namespace="front")) for n in range(2)] == ["10.1.0.5", "10.1.0.6"]
    assert [node.add(f"o{n}", Wish(namespace="other")) for n in range(2)] == ["10.1.0.2", "10.1.0.3"]
    for namespace, message in (
        ("front", "no free pod address in pool 'dmz' (2 addresses)"),
        ("other", "no free pod address in podCIDR 10.1.0.0/29 (2 addresses)"),
    ):
        with pytest.raises(Exhausted) as caught:
            node.add("x", Wish(namespace=namespace))
        assert str(caught.value) == message
    assert node.add("x", wish("10.7.0.1")) == "10.7.0.1", "a reserved one, asked for by name"


def test_figures_say_of_each_group_what_its_addresses_do(node: Node) -> None:
    node.config, node.cidrs = POOLS, DUAL
    node.add("o1")
    node.add("o2")
    node.delete("o1")
    node.add("f1", Wish(namespace="front"), pod="front/a", sticky=60.0)
    node.add("f2", Wish(namespace="front"))
    node.delete("f1")
    node.release("f2")
    assert node.usage() == [
        ("10.1.0.0/29", 2, 1, 0, 1, 0),
        ("fd00:1::/64", 65536, 2, 1, 1, 1),
        ("dmz", 2, 1, 1, 0, 1),
    ]
    four, six, pool = node.ledger.usage(groups(POOLS, DUAL))
    assert (four.reserved, four.excluded, pool.reserved, pool.excluded) == (0, 1, 1, 0)
    assert (four.version, six.version, pool.version) == (4, 6, 4)
    node.now += 60
    assert node.usage()[2] == ("dmz", 2, 1, 1, 0, 0), "what was kept is free when its time is over"


# Addresses by name.


def test_a_requested_address_is_given_or_its_holder_named(node: Node) -> None:
    assert node.add("c1", wish("10.1.0.5"), pod="shop/web-0") == "10.1.0.5"
    with pytest.raises(AddressTaken) as caught:
        node.add("c2", wish("10.1.0.5"))
    assert str(caught.value) == (
        "the address 10.1.0.5 is taken: it belongs to pod shop/web-0 (interface 'eth0' of container 'c1')"
    )
    assert caught.value.address == IPAddress("10.1.0.5") and caught.value.releasing == ()
    assert node.ledger.get(Key("c2", "eth0")) is None


def test_a_requested_address_on_its_way_out_can_be_waited_for(node: Node) -> None:
    """The pod of a fixed address is made anew at once; it must not get "taken" from its own past."""
    node.config = IpamConfig(quarantine=60.0)
    node.add("c1", wish("10.1.0.5"))
    node.release("c1")
    with pytest.raises(AddressTaken, match="which is being released") as caught:
        node.add("c2", wish("10.1.0.5"))
    assert [a.key for a in caught.value.releasing] == [Key("c1", "eth0")]
    node.forget("c1")
    assert node.add("c2", wish("10.1.0.5")) == "10.1.0.5", "by name, also in quarantine"


def test_a_requested_address_is_beside_automatic_ones_of_other_families_and_sets(node: Node) -> None:
    node.cidrs = DUAL
    assert node.add("c1", wish("fd00:1::2")) == "10.1.0.2 fd00:1::2"
    sets = tuple(group.ranges for group in groups(node.config, CIDRS)) * 2
    asked = Wish(range_sets=sets, addresses=(IPAddress("10.1.0.3"),))
    assert node.add("c2", asked) == "10.1.0.3 10.1.0.4"


def test_a_second_try_that_asks_for_another_address_gets_it(node: Node) -> None:
    node.reserve("c1")
    assert node.add("c1", wish("10.1.0.6")) == "10.1.0.6"
    assert [u.used for u in node.ledger.usage(groups(node.config, CIDRS))] == [1]


# The same pod again.


def test_a_sticky_pod_gets_its_addresses_again(node: Node) -> None:
    node.cidrs = DUAL
    node.config = IpamConfig(quarantine=30.0)
    node.add("c0")
    before = node.add("c1", pod="shop/web-0", sticky=60.0)
    node.delete("c1")
    assert node.add("c2", pod="shop/web-1", sticky=60.0) != before
    node.now += 59
    assert node.add("c3", pod="shop/web-0", sticky=60.0) == before
    assert node.ledger.kept() == ()


def test_a_kept_address_is_nobody_elses_until_its_time_is_over(node: Node) -> None:
    node.add("c1", pod="shop/web-0", sticky=60.0)
    node.delete("c1")
    assert node.ledger.kept() == (Kept(IPAddress("10.1.0.2"), "net", "eth0", "shop/web-0", 1060.0),)
    node.fill(4)
    with pytest.raises(Exhausted, match="1 kept for pods that may come back"):
        node.add("c2")
    with pytest.raises(AddressTaken, match=r"it is kept for pod shop/web-0 for another 60 s"):
        node.add("c2", wish("10.1.0.2"), pod="shop/web-1")
    node.now += 60
    assert node.ledger.kept() == ()
    assert node.add("c2") == "10.1.0.2"


def test_a_hold_can_be_dropped_by_hand(node: Node) -> None:
    node.add("c1", pod="shop/web-0", sticky=1e9)
    node.delete("c1")
    node.fill(4)
    assert node.ledger.release_kept(IPAddress("10.1.0.2")) and not node.ledger.release_kept(
        IPAddress("10.1.0.2")
    )
    assert node.add("c2") == "10.1.0.2"


def test_a_pod_without_a_name_is_not_sticky(node: Node) -> None:
    node.add("c1", sticky=60.0)
    node.delete("c1")
    assert node.ledger.kept() == ()


def test_stickiness_survives_restart_and_reboot(node: Node) -> None:
    before = node.add("c1", pod="shop/web-0", sticky=60.0)
    node.restart()
    node.now += 100
    node.restart(reboot=True)
    assert node.ledger.reclaimed == 1
    assert [(str(k.address), k.until) for k in node.ledger.kept()] == [(before, 1160.0)]
    node.restart(reboot=True)
    node.fill(3)
    assert node.add("c2", pod="shop/web-0") == before


def test_a_sticky_pod_that_comes_back_at_once_waits_for_its_own_past(node: Node) -> None:
    """Its old interface is going in the background; until then its addresses are not kept yet."""
    before = node.add("c1", pod="shop/web-0", sticky=60.0)
    node.release("c1")
    with pytest.raises(StillReleasing) as caught:
        node.add("c2", pod="shop/web-0", sticky=60.0)
    assert caught.value.attachment.key == Key("c1", "eth0")
    assert caught.value.releasing == (caught.value.attachment,)
    assert node.add("c3", pod="shop/web-1") != before, "nobody else waits"
    node.forget("c1")
    assert node.add("c2", pod="shop/web-0") == before


# Host ports.


def test_a_host_port_has_one_pod(node: Node) -> None:
    node.add("c1", pod="shop/web-0", host_ports=(HostPort(TCP, 8080, 80), HostPort(UDP, 53, 53, "10.0.0.1")))
    with pytest.raises(HostPortTaken) as caught:
        node.add("c2", host_ports=(HostPort(UDP, 8080, 80), HostPort(TCP, 8080, 81, "10.0.0.1")))
    assert str(caught.value) == (
        "the host port 8080/tcp on 10.0.0.1 is taken by pod shop/web-0 (interface 'eth0' of container 'c1')"
    )
    assert caught.value.host_port == HostPort(TCP, 8080, 81, "10.0.0.1")
    assert node.ledger.get(Key("c2", "eth0")) is None and node.usage()[0][2] == 1
    node.add("c2", host_ports=(HostPort(UDP, 8080, 80), HostPort(UDP, 53, 53, "10.0.0.2")))


def test_host_ports_are_free_as_soon_as_their_pod_is_released(node: Node) -> None:
    """The interface of the old pod may take its time; its port answers to the new one."""
    ports = (HostPort(TCP, 8080, 80),)
    node.add("c1", host_ports=ports)
    node.release("c1")
    node.add("c2", host_ports=ports)
    assert node.ledger.attachments(State.ATTACHED)[0].host_ports == ports


def test_a_second_try_does_not_collide_with_the_first(node: Node) -> None:
    node.reserve("c1", host_ports=(HostPort(TCP, 8080, 80),))
    made = node.reserve("c1", host_ports=(HostPort(TCP, 8080, 80), HostPort(TCP, 8081, 80)))
    assert node.ledger.get(made.key) == made


def test_all_that_a_claim_says_is_there_for_the_next_process(node: Node) -> None:
    ports = (HostPort(TCP, 8080, 80), HostPort(132, 99, 9, "fd00::1"))
    node.add(
        "c1", pod="shop/web-0", mac="02:00:00:00:00:01", host_ports=ports, wiring='{"rate": 1}', sticky=1.5
    )
    (before,) = node.ledger.attachments()
    node.restart()
    assert node.ledger.attachments() == (before,)
    assert (before.pod, before.mac, before.host_ports, before.wiring, before.sticky) == (
        "shop/web-0",
        "02:00:00:00:00:01",
        ports,
        '{"rate": 1}',
        1.5,
    )


# What an exhausted range says, and STATUS.


def test_an_exhausted_range_says_what_becomes_of_its_addresses(node: Node) -> None:
    node.config = IpamConfig(quarantine=10.0)
    node.fill(3)
    node.add("c1", pod="shop/web-0", sticky=60.0)
    node.add("c2")
    node.release("fill-0")
    node.delete("c1")
    node.delete("fill-1")
    node.now += 2.5
    with pytest.raises(Exhausted) as caught:
        node.add("c3")
    assert str(caught.value) == (
        "no free pod address in podCIDR 10.1.0.0/29 (5 addresses): 1 being released,"
        " 1 kept for pods that may come back, the next one leaves quarantine in 8 s"
    )
    (shortage,) = caught.value.shortages
    assert (shortage.size, shortage.releasing, shortage.kept, shortage.wait) == (5, 1, 1, 7.5)


def test_every_source_that_is_exhausted_is_named(node: Node) -> None:
    node.cidrs = parse_pod_cidrs(["10.1.0.0/30", "fd00:1::/126"])
    node.add("c1")
    node.add("c2", Wish(range_sets=(groups(node.config, node.cidrs)[1].ranges,)))
    with pytest.raises(Exhausted) as caught:
        node.add("c3")
    assert str(caught.value) == (
        "no free pod address in podCIDR 10.1.0.0/30 (1 addresses) and in podCIDR fd00:1::/126 (2 addresses)"
    )


def test_status_fails_only_when_no_add_could_be_served_within_seconds(node: Node) -> None:
    node.config = IpamConfig(quarantine=10.0)

    def shortage() -> str:
        wanted = demands(node.config, node.cidrs, Wish())
        return str(node.ledger.shortage(wanted, node.config.quarantine) or "")

    assert shortage() == "", "nothing given yet"
    node.fill(4)
    assert shortage() == "", "one was never used"
    node.add("c1", pod="shop/web-0", sticky=60.0)
    assert shortage() == "no free pod address in podCIDR 10.1.0.0/29 (5 addresses)"
    node.release("fill-1")
    assert shortage() == "", "one is being released"
    node.forget("fill-1")
    assert shortage() == "", "one is in quarantine"
    node.now += 10
    node.add("c2")
    node.delete("c1")
    assert "1 kept for pods" in shortage(), "what is kept is for its pod"
    with pytest.raises(Exhausted):
        node.add("c3")
    node.now += 60
    assert shortage() == "", "its pod did not come back"


def test_status_does_not_write_and_is_cheap_in_a_full_slash_16(node: Node) -> None:
    node.cidrs = parse_pod_cidrs(["10.8.0.0/16"])
    wanted = demands(node.config, node.cidrs, Wish())
    with node.ledger._transaction() as db:
        rows = [((0x0A080002 + number).to_bytes(4, "big"),) for number in range(65533)]
        db.executemany("INSERT INTO address (family, value) VALUES (4, ?)", rows)
    with pytest.raises(Exhausted):
        node.ledger.reserve(Key("c1", "eth0"), Claim("net", "", "pw0", "r"), wanted)
    assert node.ledger.shortage(wanted) is not None
    node.ledger._db().execute("PRAGMA query_only = 1")
    began = time.perf_counter()
    for _ in range(100):
        node.ledger.shortage(wanted)
    assert time.perf_counter() - began < 1.0, "although no ADD could note that every address is known"
