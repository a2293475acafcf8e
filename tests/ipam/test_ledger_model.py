"""The ledger against a dictionary: whatever happens, both give the same answer and hold the same."""

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from netaddr import IPAddress, IPNetwork

from ipam.ledger import (
    AddressTaken,
    AlreadyAttached,
    Claim,
    Exhausted,
    HostPort,
    HostPortTaken,
    Key,
    Ledger,
    LedgerError,
    State,
    StillReleasing,
)
from ipam.pools import Demand, IpamConfig, Wish, demands, groups
from ipam.ranges import AddressRange, RangeError, parse_pod_cidrs, parse_range, total

POOLED = {
    "pools": [{"name": "p", "ranges": ["10.1.0.4-10.1.0.5", "10.9.0.1"], "namespaces": ["front"]}],
    "exclude": ["10.1.0.3"],
    "reserve": ["10.1.0.6"],
    "quarantine": 10,
}
# The ranges overlap, so that a podCIDR that grows, shrinks or moves is among what happens.
NODES = [
    (IpamConfig.parse(raw), parse_pod_cidrs(cidrs))
    for raw, cidrs in (
        ({"quarantine": 0}, ["10.1.0.0/29"]),
        ({"quarantine": 10}, ["10.1.0.0/29", "fd00::/125"]),
        ({"quarantine": 0}, ["10.1.0.0/28", "fd00::/126"]),
        ({"quarantine": 10}, ["fd00::4/126", "10.1.0.4/30"]),
        (POOLED, ["10.1.0.0/29"]),
        (POOLED, ["10.1.0.0/28", "fd00::/125"]),
    )
]
PLAIN = Wish()
wishes = st.just(PLAIN) | st.sampled_from(
    [
        Wish(namespace="front"),
        Wish(addresses=(IPAddress("10.1.0.4"),)),
        Wish(addresses=(IPAddress("10.1.0.6"), IPAddress("fd00::5"))),
        Wish(range_sets=((parse_range("10.9.0.1-10.9.0.2"), parse_range("10.1.0.4")),)),
    ]
)
PORTS = [(), (), *((HostPort(6, 80, 80, ip),) for ip in ("", "10.0.0.1", "10.0.0.2"))]
claims = st.builds(
    Claim,
    st.sampled_from(["net", "net2"]),
    st.just(""),
    st.just(""),
    st.just(""),
    pod=st.sampled_from(["", "ns/a", "ns/b"]),
    host_ports=st.sampled_from(
        [
            (),
            (),
            (HostPort(6, 80, 80),),
            (HostPort(6, 80, 80, "10.0.0.1"),),
            (HostPort(6, 80, 80, "10.0.0.2"),),
        ]
    ),
    sticky=st.sampled_from([0.0, 0.0, 15.0]),
)
keys = st.builds(Key, st.sampled_from("abcdefghijkl"), st.just("eth0"))


def numbers(ranges: Iterable[AddressRange]) -> Iterable[IPAddress]:
    return (IPAddress(n, r.version) for r in ranges for n in range(r.first, r.last + 1))  # type: ignore[arg-type]


class Refused(Exception):
    """The model says no; its argument is the kind of error that the ledger is to raise."""


@dataclass
class Record:
    state: State
    addresses: tuple[IPAddress, ...]
    claim: Claim


@dataclass
class Model:
    """What the ledger is to hold, and do, said with dictionaries."""

    records: dict[Key, Record] = field(default_factory=dict)
    known: set[IPAddress] = field(default_factory=set)
    freed: dict[IPAddress, tuple[int, float]] = field(default_factory=dict)  # place in the queue, and when
    kept: dict[IPAddress, tuple[tuple[str, str, str], float, float]] = field(default_factory=dict)
    steps: int = 0

    def copy(self) -> "Model":
        return Model(dict(self.records), set(self.known), dict(self.freed), dict(self.kept), self.steps)

    def reserve(self, key: Key, claim: Claim, wanted: tuple[Demand, ...], now: float, rest: float) -> None:
        """Do what the ledger should do, or raise the kind of error that it should."""
        earlier = self.records.get(key)
        others = [record for other, record in self.records.items() if other != key]
        owner = (claim.network, key.ifname, claim.pod)
        if earlier and earlier.state is State.ATTACHED:
            raise Refused(AlreadyAttached)
        if earlier and earlier.state is State.RELEASED:
            raise Refused(StillReleasing)
        for record in others:
            if record.state is not State.RELEASED and any(
                mine.conflicts(theirs) for mine in claim.host_ports for theirs in record.claim.host_ports
            ):
                raise Refused(HostPortTaken)
        if claim.pod and any(
            r.state is State.RELEASED and r.claim.sticky and (r.claim.network, r.claim.pod) == owner[::2]
            for r in others
        ):
            raise Refused(StillReleasing)
        self.lapse(now)
        spare = list(earlier.addresses) if earlier else []
        found: dict[Demand, IPAddress] = {}
        for demand in wanted:
            found[demand] = self.take(demand, spare, owner, now, rest)
        for address in spare:
            self.give_back(address, now)
        self.records[key] = Record(State.PENDING, tuple(found[demand] for demand in wanted), claim)

    def take(
        self, demand: Demand, spare: list[IPAddress], owner: tuple[str, str, str], now: float, rest: float
    ) -> IPAddress:
        for address in spare:
            if demand.allows(address):
                spare.remove(address)
                return address
        choice = [demand.requested] if demand.requested is not None else list(numbers(demand.ranges))
        own = sorted(a for a in choice if a in self.kept and owner[2] and self.kept[a][0] == owner)
        fresh = [a for a in choice if a not in self.known]
        freed = [a for a in choice if a in self.freed]
        if demand.requested is None:
            freed = [a for a in freed if not now - rest < self.freed[a][1] <= now]
        for address in (*own, *fresh, *sorted(freed, key=self.freed.__getitem__)):
            self.kept.pop(address, None)
            self.freed.pop(address, None)
            self.known.add(address)
            return address
        raise Refused(Exhausted if demand.requested is None else AddressTaken)

    def lapse(self, now: float) -> None:
        for address, (_, until, at) in sorted(self.kept.items(), key=lambda item: (item[1][1], item[0])):
            if until <= now:
                del self.kept[address]
                self.give_back(address, at)

    def forget(self, key: Key, now: float, freed_at: float) -> None:
        record = self.records.pop(key, None)
        for address in record.addresses if record else ():
            assert record
            if record.claim.sticky and record.claim.pod:
                owner = (record.claim.network, key.ifname, record.claim.pod)
                self.kept[address] = owner, now + record.claim.sticky, freed_at
            else:
                self.give_back(address, freed_at)

    def give_back(self, address: IPAddress, freed_at: float) -> None:
        self.steps += 1
        self.freed[address] = self.steps, freed_at


class LedgerMachine(RuleBasedStateMachine):
    """`self.model` is what the ledger should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.files = 0
        self.boot = 0
        self.now = 1000.0
        self.model = Model()
        self.ledger = self.opened()

    def opened(self) -> Ledger:
        path = self.folder / f"{self.files}.db"
        ledger = Ledger(path, boot_id=f"boot-{self.boot}", clock=lambda: self.now)
        ledger.open()
        return ledger

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @initialize(node=st.sampled_from(NODES))
    def choose_ranges(self, node: tuple[IpamConfig, tuple[IPNetwork, ...]]) -> None:
        self.config, self.cidrs = node

    @rule(node=st.sampled_from(NODES))
    def change_ranges(self, node: tuple[IpamConfig, tuple[IPNetwork, ...]]) -> None:
        self.config, self.cidrs = node

    @rule(seconds=st.sampled_from([1, 4, 9, 20, -3, -30]))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule(key=keys, claim=claims, wish=wishes)
    def reserve(self, key: Key, claim: Claim, wish: Wish) -> None:
        try:
            wanted = demands(self.config, self.cidrs, wish)
        except RangeError:
            return
        after = self.model.copy()
        expected: object = None
        try:
            after.reserve(key, claim, wanted, self.now, self.config.quarantine)
        except Refused as refusal:
            (expected,) = refusal.args
        try:
            made = self.ledger.reserve(key, claim, wanted, self.config.quarantine)
        except LedgerError as error:
            assert type(error) is expected
        else:
            assert expected is None and made.addresses == after.records[key].addresses
            self.model = after

    @rule(key=keys, claim=claims)
    def attach(self, key: Key, claim: Claim) -> None:
        """Do what most ADDs do, so that there is more to collide with."""
        self.reserve(key, claim, PLAIN)
        self.commit(key)

    @rule(key=keys)
    def commit(self, key: Key) -> None:
        record = self.model.records.get(key)
        try:
            self.ledger.commit(key, "{}")
        except LedgerError:
            assert record is None or record.state is not State.PENDING
        else:
            assert record and record.state is State.PENDING
            record.state = State.ATTACHED

    @rule(key=keys)
    def release(self, key: Key) -> None:
        released = self.ledger.release(key)
        assert (released is None) == (key not in self.model.records)
        if released:
            self.model.records[key].state = State.RELEASED

    @rule(key=keys)
    def forget(self, key: Key) -> None:
        self.ledger.forget(key)
        self.model.forget(key, self.now, self.now)

    @rule(address=st.sampled_from([*map(IPAddress, ("10.1.0.2", "10.1.0.4", "fd00::2"))]))
    def drop_hold(self, address: IPAddress) -> None:
        hold = self.model.kept.pop(address, None)
        assert self.ledger.release_kept(address) == (hold is not None)
        if hold:
            self.model.give_back(address, hold[2])

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = self.opened()

    @rule()
    def crash(self) -> None:
        """Continue from a copy of the files as they are, before any checkpoint of a clean close."""
        old, self.files = self.files, self.files + 1
        for suffix in ("", "-wal"):
            shutil.copy(self.folder / f"{old}.db{suffix}", self.folder / f"{self.files}.db{suffix}")
        self.ledger.close()
        self.ledger = self.opened()

    @rule()
    def reboot(self) -> None:
        self.ledger.close()
        self.boot += 1
        self.ledger = self.opened()
        assert self.ledger.reclaimed == len(self.model.records)
        for key in sorted(self.model.records, key=lambda key: key.container_id):
            self.model.forget(key, self.now, 0.0)

    @invariant()
    def holds_the_same(self) -> None:
        records = self.model.records
        assert {a.key: (a.state, a.addresses) for a in self.ledger.attachments()} == {
            key: (record.state, record.addresses) for key, record in records.items()
        }
        held = [a for record in records.values() for a in record.addresses]
        assert len(held) == len(set(held)), "an address is given once"
        kept = {a: (owner, until) for a, (owner, until, _) in self.model.kept.items() if until > self.now}
        assert {k.address: ((k.network, k.ifname, k.pod), k.until) for k in self.ledger.kept()} == kept
        found = groups(self.config, self.cidrs)
        for group, usage in zip(found, self.ledger.usage(found, self.config.quarantine), strict=True):
            inside = set(numbers(group.ranges))
            assert usage.used == sum(a in inside for a in held) <= usage.capacity == total(group.ranges)
            assert usage.kept == len(inside & kept.keys())
            assert usage.quarantined == sum(
                self.now - self.config.quarantine < at <= self.now
                for address, (_, at) in self.model.freed.items()
                if address in inside
            )

    @invariant()
    def says_whether_an_add_could_be_served(self) -> None:
        wanted = demands(self.config, self.cidrs, PLAIN)
        kept = {a for a, (_, until, _) in self.model.kept.items() if until > self.now}
        stays = {a for r in self.model.records.values() if r.state is not State.RELEASED for a in r.addresses}
        room = all(set(numbers(demand.ranges)) - kept - stays for demand in wanted)
        assert (self.ledger.shortage(wanted, self.config.quarantine) is None) == room


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
