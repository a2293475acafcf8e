"""The tables of pods in the kernel, whatever others do to them and whoever works on them at once."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from cni import tables
from cni.rules import Rules, RulesError
from cni.tables import PODS, TABLES, Contents, PodRules
from ipam.records import HostPort
from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import BatchError, NftSocket
from netlink.nftables.expressions import LimitOver
from netlink.nftables.objects import Table
from netlink.nftables.operations import AddTable, DeleteElements, DeleteTable, Operation

HTTP = HostPort(6, 80, 8080)
FOREIGN = (
    "table inet other {\n\tchain c {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n}\n"
)


def pod(number: int, *ports: HostPort, bridge: bool = False) -> PodRules:
    return PodRules(
        f"pwpod{number:010x}",
        f"02:00:00:00:00:{number:02x}",
        (f"10.1.0.{number}", f"fd00:1::{number:x}"),
        ports,
        bridge,
    )


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], capture_output=True, text=True, check=True).stdout


@dataclass
class Node:
    """A namespace with tables of pods, and the pods that are to be in them, oldest first."""

    namespace: str
    socket: NftSocket
    live: dict[str, PodRules] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = self.another()

    def another(self) -> Rules:
        """Return rules that another process might have."""
        return Rules(lambda: list(self.live.values()))

    def attach(self, *pods: PodRules) -> None:
        for one in pods:
            self.live[one.host_ifname] = one
            self.rules.add(one)

    def detach(self, one: PodRules) -> None:
        del self.live[one.host_ifname]
        self.rules.remove(one)

    def contents(self) -> Contents:
        """Return what the kernel's maps hold, without empty ones."""
        found: Contents = {}
        for family in tables.FAMILIES:
            if self.socket.table_comment(TABLES[family]) is not None:
                maps = {m: self.socket.elements(TABLES[family], m) for m in tables.maps(family)}
                found[family] = {which: elements for which, elements in maps.items() if elements}
        return {family: maps for family, maps in found.items() if maps}

    def nft(self, *arguments: str) -> str:
        return netns.run(self.namespace, nft, *arguments)


@pytest.fixture
def node(namespaces: Callable[[], str]) -> Iterator[Node]:
    name = namespaces()
    with contextlib.ExitStack() as stack:
        made = Node(name, netns.run(name, stack.enter_context, NftSocket()))
        netns.run(name, stack.enter_context, made.rules)
        yield made


def test_the_first_pod_makes_the_tables(node: Node) -> None:
    node.attach(pod(2, HTTP))
    assert node.contents() == tables.elements(pod(2, HTTP))
    assert node.nft("list", "tables").split("\n")[:-1] == ["table ip podwire_pods", "table ip6 podwire_pods"]


def test_the_first_pod_on_a_bridge_makes_the_bridges_table_too(node: Node) -> None:
    node.attach(pod(2, bridge=True))
    assert node.contents() == tables.elements(pod(2, bridge=True))
    assert "bridge" in node.nft("list", "tables")


@pytest.mark.parametrize("bridge", [False, True])
def test_a_pod_takes_one_transaction(node: Node, bridge: bool) -> None:
    node.attach(pod(2, bridge=bridge))
    for change in (
        lambda: node.attach(pod(3, HTTP, bridge=bridge)),
        lambda: node.detach(pod(3, HTTP, bridge=bridge)),
        lambda: node.detach(pod(2, bridge=bridge)),
    ):
        before = node.rules.generation()[0]
        change()
        assert node.rules.generation()[0] == before + 1


def test_adding_and_removing_twice_is_harmless(node: Node) -> None:
    one = pod(2, HTTP)
    node.attach(one, one)
    assert node.contents() == tables.elements(one)
    node.detach(one)
    node.rules.remove(one)
    node.rules.remove(replace(one, host_ports=()))
    assert node.contents() == {}


def test_a_pod_without_host_ports_is_removed_when_half_of_it_is_gone(node: Node) -> None:
    one = pod(2)
    node.attach(one)
    half = tables.elements(one)[Family.V4][PODS]
    node.socket.commit((TABLES[Family.V4], [DeleteElements(PODS, list(half.items()))]))
    node.detach(one)
    assert node.contents() == {}


def test_a_stale_element_gives_way_to_a_live_pod(node: Node) -> None:
    node.attach(pod(2, HTTP))
    del node.live[pod(2).host_ifname]  # gone without a DEL
    node.attach(pod(3, HTTP))
    assert node.contents() == tables.elements(pod(3, HTTP))


def test_removing_a_pod_leaves_the_host_port_to_who_has_it_now(node: Node) -> None:
    node.attach(pod(2, HTTP), pod(4))
    node.live = {pod(4).host_ifname: pod(4)}
    node.attach(pod(3, HTTP))
    node.rules.remove(pod(2, HTTP))
    assert node.contents() == tables.wanted([pod(4), pod(3, HTTP)])


def test_an_older_holder_does_not_get_a_host_port_back(node: Node) -> None:
    node.attach(pod(2, HTTP))
    with pytest.raises(BatchError, match="host_ports"):
        node.live = {pod(3).host_ifname: pod(3, HTTP), pod(2).host_ifname: pod(2, HTTP)}
        node.rules.add(pod(3, HTTP))
    assert node.contents() == tables.wanted([pod(3, HTTP), pod(2, HTTP)])


@pytest.mark.parametrize(
    "damage",
    ["flush ruleset", "flush chain ip podwire_pods pod", "flush chain ip6 podwire_pods nat_postrouting"],
)
def test_rules_that_somebody_flushed_come_back_with_all_elements_in_one_transaction(
    node: Node, damage: str
) -> None:
    pods = [pod(n, replace(HTTP, host_port=n)) for n in range(2, 6)]
    node.attach(*pods)
    printed = node.nft("list", "ruleset")
    before = node.rules.generation()[0]
    node.nft(*damage.split())
    assert node.rules.generation()[0] != before
    before = node.rules.generation()[0]
    assert node.rules.reconcile() > 0
    assert node.rules.generation()[0] == before + 1
    assert sorted(node.nft("list", "ruleset").split("\n")) == sorted(printed.split("\n"))
    assert node.contents() == tables.wanted(pods)


def test_a_table_of_another_layout_is_replaced(node: Node) -> None:
    table = TABLES[Family.V6]
    node.attach(pod(2))
    node.socket.commit((table, [DeleteTable(), AddTable("of an older version")]))
    assert node.rules.reconcile() == 2
    assert node.socket.rules(table) == tables.rule_comments(Family.V6)
    assert node.contents() == tables.elements(pod(2))


def test_rules_of_others_in_the_table_go_and_tables_of_others_stay(node: Node) -> None:
    node.nft("add table inet other")
    node.nft("add chain inet other c { type filter hook input priority 0; }")
    node.attach(pod(2))
    node.nft("insert rule ip podwire_pods pod accept")
    assert node.rules.reconcile() == 2
    assert "accept\n\t\tip daddr" not in node.nft("list table ip podwire_pods")
    assert node.nft("list table inet other") == FOREIGN


def test_elements_that_differ_are_set_right_and_nothing_else_is_touched(node: Node) -> None:
    node.attach(pod(2, HTTP), pod(3), pod(4))
    assert node.rules.reconcile() == 0
    table = TABLES[Family.V4]
    some = tables.elements(pod(3))[Family.V4][PODS]
    node.socket.commit((table, [DeleteElements(PODS, list(some.items()))]))
    node.nft('add element ip podwire_pods pods { "pwpodbadbad" . 10.9.9.9 }')
    node.nft("delete element ip podwire_pods host_ports { tcp . 80 }")
    node.nft("add element ip podwire_pods host_ports { tcp . 80 : 10.9.9.9 . 80 }")
    before = node.rules.generation()[0]
    assert node.rules.reconcile() == 3
    assert node.rules.generation()[0] == before + 1
    assert node.contents() == tables.wanted(node.live.values())
    assert node.rules.reconcile() == 0
    assert node.rules.generation()[0] == before + 1


ELEMENT = "pwpod0000000002 . 10.1.0.2"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("delete table ip podwire_pods", "the nftables table ip podwire_pods is missing"),
        ("flush chain ip6 podwire_pods pod", "the nftables table ip6 podwire_pods lacks rules"),
        (
            "flush set ip podwire_pods pods",
            f"{ELEMENT} of pods in the nftables table ip podwire_pods is missing",
        ),
        (
            "flush map ip podwire_pods host_ports",
            "tcp . 80 of host_ports in the nftables table ip podwire_pods is missing",
        ),
    ],
)
def test_check_names_what_is_missing(node: Node, damage: str, sentence: str) -> None:
    node.attach(pod(2, HTTP))
    node.rules.check(pod(2, HTTP))
    node.nft(*damage.split())
    with pytest.raises(RulesError, match=sentence.replace(".", "\\.")):
        node.rules.check(pod(2, HTTP))
    node.rules.reconcile()
    node.rules.check(pod(2, HTTP))


def test_check_says_where_a_host_port_leads_instead(node: Node) -> None:
    node.attach(pod(2, HTTP), pod(3))
    node.nft("delete element ip podwire_pods host_ports { tcp . 80 }")
    node.nft("add element ip podwire_pods host_ports { tcp . 80 : 10.1.0.3 . 8080 }")
    with pytest.raises(RulesError, match=r"leads to 10\.1\.0\.3 \. 8080, which is not the pod"):
        node.rules.check(pod(2, HTTP))


@pytest.mark.parametrize("bridge", [False, True])
def test_a_limit_that_somebody_changed_is_said_and_set_right(node: Node, bridge: bool) -> None:
    limited = replace(pod(2, bridge=bridge), egress=LimitOver(1_000_000, 65_536))
    where = f"{'bridge' if bridge else 'ip'} podwire_pods egress_limits"
    node.attach(limited)
    node.rules.add(limited)
    node.rules.check(limited)
    node.nft("flush set " + where)
    with pytest.raises(RulesError, match=r"pwpod0000000002 of egress_limits .* is missing"):
        node.rules.check(limited)
    node.nft(f"add element {where} {{ pwpod0000000002 limit rate over 5000000 bytes/second burst 9 bytes }}")
    with pytest.raises(RulesError, match=r"pwpod0000000002 of egress_limits .* 5000000 bytes/second"):
        node.rules.check(limited)
    assert node.rules.reconcile() == 1
    node.rules.check(limited)
    del node.live[limited.host_ifname]
    node.rules.remove(limited)
    assert node.rules.reconcile() == 0


def test_check_of_a_bridged_pod_looks_at_the_bridges_table(node: Node) -> None:
    node.attach(pod(2, bridge=True))
    node.rules.check(pod(2, bridge=True))
    node.nft("flush set bridge podwire_pods macs")
    with pytest.raises(RulesError, match="02:00:00:00:00:02 of macs"):
        node.rules.check(pod(2, bridge=True))


def test_reconcile_starts_again_when_the_ruleset_changes_under_way(node: Node) -> None:
    changes = iter(range(3))

    def live() -> list[PodRules]:
        for number in changes:
            node.nft(f"add table inet other{number}")
            break
        return [pod(2)]

    rules = Rules(live)
    with contextlib.ExitStack() as stack:
        netns.run(node.namespace, stack.enter_context, rules)
        rules.reconcile()
    assert next(changes, None) is None
    assert node.contents() == tables.elements(pod(2))


def test_reconcile_gives_up_on_a_ruleset_that_never_holds_still(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cni.rules.RECONCILE_TRIES", 3)
    other = Table(Family.V4, "other")

    def live() -> list[PodRules]:
        operations: list[Operation] = [AddTable(""), DeleteTable()]
        node.socket.commit((other, operations))
        return [pod(2)]

    rules = Rules(live)
    with contextlib.ExitStack() as stack:
        netns.run(node.namespace, stack.enter_context, rules)
        with pytest.raises(RulesError, match="changed during each of 3 tries"):
            rules.reconcile()


THREADS, ROUNDS, PODS_PER_THREAD = 8, 40, 4


class Crowd:
    """Many threads that add and remove pods by one `Rules`, while another `Rules` reconciles in a loop."""

    def __init__(self) -> None:
        self.live: dict[str, PodRules] = {}
        self.problems: list[BaseException] = []
        self.reconciled = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def pods(self) -> list[PodRules]:
        with self._lock:
            return list(self.live.values())

    def run(self, rules: Rules, others: Rules) -> None:
        """Let all of them work until each thread has done its rounds."""
        workers = [
            threading.Thread(target=self._guarded, args=(lambda n=n: self._come_and_go(n, rules),))
            for n in range(THREADS)
        ]
        background = threading.Thread(target=self._guarded, args=(lambda: self._reconcile(others),))
        for one in (background, *workers):
            one.start()
        for one in workers:
            one.join()
        self._stop.set()
        background.join()

    def _come_and_go(self, thread: int, rules: Rules) -> None:
        """Add and remove pods of numbers that no other thread has; half of them have a host port."""
        chance = random.Random(thread)
        mine: dict[int, PodRules] = {}
        for _ in range(ROUNDS):
            number = 2 + thread * PODS_PER_THREAD + chance.randrange(PODS_PER_THREAD)
            if one := mine.pop(number, None):
                with self._lock:
                    del self.live[one.host_ifname]
                rules.remove(one)
            else:
                ports = (HostPort(6, 1000 + number, 80),) if number % 2 else ()
                one = mine[number] = pod(number, *ports, bridge=thread % 2 == 0)
                with self._lock:
                    self.live[one.host_ifname] = one
                rules.add(one)

    def _reconcile(self, rules: Rules) -> None:
        while not self._stop.is_set():
            self.reconciled += 1
            with contextlib.suppress(RulesError):  # the ruleset did not hold still
                rules.reconcile()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.problems.append(error)


def test_adds_and_removes_of_many_threads_while_others_reconcile_end_at_the_live_set(node: Node) -> None:
    crowd = Crowd()
    rules, others = Rules(crowd.pods), Rules(crowd.pods)
    with contextlib.ExitStack() as stack:
        for one in (rules, others):
            netns.run(node.namespace, stack.enter_context, one)
        crowd.run(rules, others)
        assert crowd.problems == []
        assert crowd.reconciled > 0
        assert node.contents() == tables.wanted(crowd.pods())
        assert rules.reconcile() == 0
