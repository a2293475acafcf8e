"""Tunnel rules keep what they were told to keep, whatever others do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from netlink import netns
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.fake import FakeNft
from netlink.nftables.objects import Table
from netlink.nftables.operations import AddTable, DeleteElements, DeleteTable, Operation
from netlink.nftables.text import listing
from node.tunnel_rules import NAME, PEERS, TABLES, Outer, TunnelRules, Wanted, layout, structure
from tests.netlink.nft import loaded_again, nft
from tests.node.tunnels import PORT

V4, V6 = Family.V4, Family.V6
BOTH = {
    V4: Wanted(PORT, frozenset({"10.0.0.1", "10.0.0.2"}), clamp=True),
    V6: Wanted(PORT, frozenset({"fd00::1", "fd00::2"}), clamp=True),
}
CLAMP = {V4: Wanted(clamp=True), V6: Wanted(clamp=True)}
SECURED = {
    V4: Wanted(51820, frozenset({"10.0.0.1"}), True, wireguard=True),
    V6: Wanted(51820, frozenset({"fd00::1"}), wireguard=True),
}
SHAPES = [(Outer(PORT), True), (Outer(4789), False), (None, True), (Outer(51820, True), True)]


class Node:
    """A namespace with tunnel rules."""

    def __init__(self, namespace: str, stack: ExitStack) -> None:
        self.namespace = namespace
        self._stack = stack
        self.socket = netns.run(namespace, stack.enter_context, NftSocket())
        self.rules = self.another()

    def another(self) -> TunnelRules:
        """Return rules that know nothing yet, as after a restart."""
        return netns.run(self.namespace, self._stack.enter_context, TunnelRules())

    def nft(self, *arguments: str, stdin: str = "") -> str:
        return netns.run(self.namespace, nft, *arguments, stdin=stdin)

    def commit(self, table: Table, *operations: Operation) -> None:
        self.socket.commit((table, operations))

    def holds(self, wanted: dict[Family, Wanted]) -> bool:
        """Whether the kernel holds the wanted layouts and peers, and nothing else of ours."""
        for family, table in TABLES.items():
            here = wanted.get(family, Wanted())
            if (self.socket.table_comment(table) or "") != layout(family, here.outer, here.clamp):
                return False
            if here.outer and self.socket.elements(table, PEERS) != {
                ip_address(peer).packed: None for peer in here.peers
            }:
                return False
        return True


@pytest.fixture(scope="module")
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


@pytest.fixture
def node(namespace: str) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(namespace, stack)
        netns.run(namespace, nft, "flush", "ruleset")


def test_nothing_wanted_is_no_table_and_no_commit(node: Node) -> None:
    for wanted in ({}, {V4: Wanted(), V6: Wanted(peers=frozenset({"fd00::1"}))}):
        node.rules.apply(wanted)
        assert node.holds({})
        assert node.rules.intact(peers=True)
    assert node.rules.commits == 0


def test_before_the_first_there_is_nothing_to_miss(node: Node) -> None:
    assert node.rules.intact()


@pytest.mark.parametrize(
    "after",
    [
        {},
        {V4: BOTH[V4]},
        {V4: BOTH[V4], V6: Wanted(clamp=True)},
        CLAMP,
        {f: Wanted(4789, w.peers, w.clamp) for f, w in BOTH.items()},
        {f: Wanted(w.port, w.peers) for f, w in BOTH.items()},
        {**BOTH, V4: Wanted(PORT, frozenset({"10.0.0.2", "10.0.0.3"}), clamp=True)},
        {**BOTH, V6: Wanted(PORT, frozenset(), clamp=True)},
    ],
    ids=["nothing", "one family", "no port in one", "clamp only", "port", "no clamp", "a peer", "no peers"],
)
def test_a_change_is_one_transaction_and_so_is_the_way_back(node: Node, after: dict[Family, Wanted]) -> None:
    node.rules.apply(BOTH)
    for wanted in (after, BOTH):
        before = node.socket.generation()
        node.rules.apply(wanted)
        assert node.socket.generation() == before + 1
        assert node.holds(wanted)
        assert node.rules.intact(peers=True)
    assert node.rules.commits == 3


def test_a_change_of_one_peer_touches_no_other(node: Node) -> None:
    """The counter, which a new table would begin anew, goes on."""
    node.rules.apply(BOTH)
    handles = node.nft("-a", "list", "table", "ip", NAME)
    node.rules.apply({**BOTH, V4: Wanted(PORT, BOTH[V4].peers | {"10.0.0.9"}, clamp=True)})
    node.rules.apply(BOTH)
    assert node.nft("-a", "list", "table", "ip", NAME) == handles


@pytest.mark.parametrize(
    "wanted",
    [BOTH, CLAMP, {V6: BOTH[V6]}, SECURED, {}],
    ids=["all", "clamp", "one family", "WireGuard", "none"],
)
def test_what_is_right_is_adopted(node: Node, wanted: dict[Family, Wanted]) -> None:
    node.rules.apply(wanted)
    again = node.another()
    again.apply(wanted)
    assert again.commits == 0
    assert again.intact(peers=True)


def test_what_has_changed_meanwhile_is_set_by_elements(node: Node) -> None:
    node.rules.apply(BOTH)
    handle = node.nft("-a", "list", "tables")
    wanted = {**BOTH, V6: Wanted(PORT, frozenset({"fd00::2", "fd00::3"}), clamp=True)}
    again = node.another()
    again.apply(wanted)
    assert node.holds(wanted)
    assert (again.commits, node.nft("-a", "list", "tables")) == (1, handle)


def test_how_an_address_is_written_does_not_matter(node: Node) -> None:
    node.rules.apply({V6: Wanted(PORT, frozenset({"fd00::1"}))})
    again = node.another()
    again.apply({V6: Wanted(PORT, frozenset({"fd00:0::0001"}))})
    assert again.commits == 0
    assert again.intact(peers=True)


@pytest.mark.parametrize("before", [{}, BOTH, SECURED], ids=["nothing", "all", "WireGuard"])
def test_a_table_of_another_layout_is_replaced(node: Node, before: dict[Family, Wanted]) -> None:
    node.commit(TABLES[V4], AddTable("of another release"))
    node.rules.apply(before)
    assert node.holds(before)


HANDS: dict[str, tuple[str, ...]] = {
    "a table": ("delete", "table", "ip6", NAME),
    "rules": ("flush", "chain", "ip", NAME, "input"),
    "a rule more": ("add", "rule", "ip", NAME, "input", "accept"),
    "everything": ("flush", "ruleset"),
}


@pytest.mark.parametrize("command", HANDS.values(), ids=HANDS)
def test_what_somebody_did_to_the_rules_is_seen_and_undone(node: Node, command: tuple[str, ...]) -> None:
    node.rules.apply(BOTH)
    node.nft(*command)
    assert not node.rules.intact()
    assert not node.rules.intact()
    node.rules.apply(BOTH)
    assert node.rules.intact(peers=True)
    assert node.holds(BOTH)


@pytest.mark.parametrize("verb", ["add", "delete"])
def test_what_somebody_did_to_peers_is_seen_by_a_closer_look(node: Node, verb: str) -> None:
    node.rules.apply(BOTH)
    node.nft(verb, "element", "ip", NAME, PEERS.name, f"{{ 10.0.0.{1 if verb == 'delete' else 7} }}")
    assert node.rules.intact()
    assert not node.rules.intact(peers=True)
    node.rules.apply(BOTH)
    assert node.rules.intact(peers=True)
    assert node.holds(BOTH)


@pytest.mark.parametrize("family", Family)
def test_a_change_finds_out_by_itself_that_its_table_is_gone(node: Node, family: Family) -> None:
    node.rules.apply(BOTH)
    node.commit(TABLES[family], DeleteTable())
    fewer = {f: Wanted(w.port, frozenset(sorted(w.peers)[:1]), w.clamp) for f, w in BOTH.items()}
    node.rules.apply(fewer)
    assert node.holds(fewer)


def test_a_peer_that_somebody_has_removed_can_leave(node: Node) -> None:
    node.rules.apply(BOTH)
    node.commit(TABLES[V4], DeleteElements(PEERS, [(ip_address("10.0.0.1").packed, None)]))
    wanted = {**BOTH, V4: Wanted(PORT, frozenset({"10.0.0.2"}), clamp=True)}
    node.rules.apply(wanted)
    assert node.holds(wanted)


def test_a_peer_of_the_other_family_is_refused_in_words(node: Node) -> None:
    node.rules.apply(BOTH)
    with pytest.raises(ValueError, match=r"^peers: 'fd00::9' is no IPv4 address$"):
        node.rules.apply({V4: Wanted(PORT, frozenset({"fd00::9"}))})
    assert node.holds(BOTH)
    assert not node.rules.intact()
    node.rules.apply(BOTH)
    assert node.rules.intact()


def test_a_ruleset_that_never_holds_still_is_an_error(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.rules._nft, "generation", lambda: node.socket.generation() + 1)
    with pytest.raises(NetlinkError, match=r"tables of tunnels right: the .* changed"):
        node.rules.apply(BOTH)
    assert not node.rules.intact()
    monkeypatch.undo()
    node.rules.apply(BOTH)
    assert node.holds(BOTH)


def test_5000_peers_are_elements(node: Node) -> None:
    """Adopted, changed and removed one by one, each by one transaction."""
    addresses = [str(ip_address("fd00::1:0") + n) for n in range(5001)]
    node.rules.apply({V6: Wanted(PORT, frozenset(addresses[:5000]))})
    moved = {V6: Wanted(PORT, frozenset(addresses[1:]))}
    node.rules.apply(moved)
    assert node.holds(moved)
    assert node.rules.commits == 2
    again = node.another()
    again.apply(moved)
    assert again.commits == 0


@pytest.mark.parametrize("shape", SHAPES, ids=["all", "outer", "clamp", "WireGuard"])
@pytest.mark.parametrize("family", Family)
def test_nft_prints_what_we_print_and_loads_what_it_printed(
    node: Node, family: Family, shape: tuple[Outer | None, bool]
) -> None:
    fake = FakeNft(family)
    fake.commit(structure(family, *shape))
    assert fake.state
    node.commit(TABLES[family], *structure(family, *shape))
    before, after = netns.run(node.namespace, loaded_again)
    assert before == after == listing(TABLES[family], fake.state)


def test_a_layout_is_told_by_port_and_clamp() -> None:
    shapes = [*SHAPES, (Outer(4789), True), (Outer(51820), True)]
    assert len({layout(f, *s) for s in shapes for f in Family if s[0]}) == 10
    assert {layout(f, None, False) for f in Family} == {""}
