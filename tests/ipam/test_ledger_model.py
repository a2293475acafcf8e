"""The ledger against a dictionary: whatever happens, no address is doubled or lost."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from netaddr import IPAddress, IPNetwork

from ipam.ledger import AlreadyAttached, Claim, Exhausted, Key, Ledger, LedgerError, State, StillReleasing
from ipam.ranges import capacity, parse_pod_cidrs, pod_addresses

# The ranges overlap, so that a podCIDR that grows, shrinks or moves is among what happens.
RANGES = [
    parse_pod_cidrs(["10.1.0.0/29"]),
    parse_pod_cidrs(["10.1.0.0/29", "fd00::/125"]),
    parse_pod_cidrs(["10.1.0.0/28", "fd00::/126"]),
    parse_pod_cidrs(["fd00::4/126", "10.1.0.4/30"]),
]
keys = st.builds(Key, st.sampled_from("abcdefghijkl"), st.just("eth0"))


class LedgerMachine(RuleBasedStateMachine):
    """`self.model` is what the ledger should hold; `self.freed` says when an address was last given back."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.files = 0
        self.boot = 0
        self.model: dict[Key, tuple[State, tuple[IPAddress, ...]]] = {}
        self.freed: dict[IPAddress, int] = {}
        self.steps = 0
        self.ledger = self.opened()

    def opened(self) -> Ledger:
        ledger = Ledger(self.folder / f"{self.files}.db", boot_id=f"boot-{self.boot}")
        ledger.open()
        return ledger

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @initialize(cidrs=st.sampled_from(RANGES))
    def choose_ranges(self, cidrs: tuple[IPNetwork, ...]) -> None:
        self.cidrs = cidrs

    @rule(cidrs=st.sampled_from(RANGES))
    def change_ranges(self, cidrs: tuple[IPNetwork, ...]) -> None:
        self.cidrs = cidrs
        self.freed.clear()  # the order of the queue is only promised within a range

    @rule(key=keys)
    def reserve(self, key: Key) -> None:
        state, before = self.model.get(key, (None, ()))
        kept = len(before) == len(self.cidrs) and all(
            a in pod_addresses(c) for a, c in zip(before, self.cidrs, strict=True)
        )
        others = {a for other, (_, held) in self.model.items() for a in held if other != key}
        try:
            made = self.ledger.reserve(key, Claim("", "", "", ""), self.cidrs)
        except AlreadyAttached:
            assert state is State.ATTACHED
        except StillReleasing:
            assert state is State.RELEASED
        except Exhausted:
            assert not kept and any(self.free(cidr, others) == set() for cidr in self.cidrs)
        else:
            assert state in (None, State.PENDING)
            assert not set(made.addresses) & others
            if kept:
                assert made.addresses == before
            else:
                self.give_back(before)
                for address, cidr in zip(made.addresses, self.cidrs, strict=True):
                    assert address in pod_addresses(cidr)
                    assert self.freed.get(address, 0) == min(
                        self.freed.get(a, 0) for a in self.free(cidr, others)
                    )
            self.model[key] = State.PENDING, made.addresses

    @rule(key=keys)
    def commit(self, key: Key) -> None:
        state, addresses = self.model.get(key, (None, ()))
        try:
            self.ledger.commit(key, "{}")
        except LedgerError:
            assert state is not State.PENDING
        else:
            assert state is State.PENDING
            self.model[key] = State.ATTACHED, addresses

    @rule(key=keys)
    def release(self, key: Key) -> None:
        released = self.ledger.release(key)
        assert (released is None) == (key not in self.model)
        if released:
            self.model[key] = State.RELEASED, released.addresses

    @rule(key=keys)
    def forget(self, key: Key) -> None:
        self.ledger.forget(key)
        self.give_back(self.model.pop(key, (None, ()))[1])

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
        assert self.ledger.reclaimed == len(self.model)
        self.give_back(a for _, held in self.model.values() for a in held)
        self.model.clear()

    @invariant()
    def nothing_doubled_nothing_lost(self) -> None:
        assert {a.key: (a.state, a.addresses) for a in self.ledger.attachments()} == self.model
        held = [a for _, addresses in self.model.values() for a in addresses]
        assert len(held) == len(set(held))
        for cidrs in RANGES:
            for usage in self.ledger.usage(cidrs):
                assert usage.used == sum(a in pod_addresses(usage.cidr) for a in held)
                assert usage.used <= usage.capacity == capacity(usage.cidr)

    def free(self, cidr: IPNetwork, held: set[IPAddress]) -> set[IPAddress]:
        return set(pod_addresses(cidr)) - held

    def give_back(self, addresses: object) -> None:
        self.steps += 1
        for address in addresses:  # type: ignore[attr-defined]
            self.freed[address] = self.steps


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
