"""Apply: bring the chains from what they are to what the frontends say, sending only those that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from netlink.errors import NetlinkError
from proxy.dataplane import NodeRanges
from proxy.frontends import Frontend, FrontendKey
from proxy.iptables import shared
from proxy.iptables.live import NFT, LiveTable, Tables, TablesError, addressed, rules_of
from proxy.iptables.names import (
    MARK_MASQ,
    NAT_POSTROUTING,
    POD_POSTROUTING,
    TABLES,
    ChainId,
    is_ours,
)
from proxy.iptables.plan import Plan
from proxy.iptables.shared import ENTRY_CHAINS
from proxy.iptables.text import Edit, Jump, Rules, restore_text
from proxy.l7 import places
from proxy.table import Change, merged

JUMPS = shared.jumps()
_ENTERED = frozenset((jump.table, jump.to) for jump in JUMPS if jump.to != shared.RETURN)

_Live = Mapping[str, LiveTable]


class Dataplane:
    """The iptables service proxy of one IP family, in the tables of one variant.

    `drop_invalid`: packets that connection tracking finds invalid go no further (kube-proxy's, unless
    nf_conntrack_tcp_be_liberal is set). `port` is where the node's L7 proxy listens. After an error of `load`
    or `apply` call `load` before anything else.
    """

    name = "iptables"

    def __init__(self, tables: Tables, *, drop_invalid: bool = False, port: int = places.PORT) -> None:
        self._tables = tables
        self._plan = Plan(tables.family, drop_invalid=drop_invalid, port=port)
        self._sizes: dict[ChainId, int] = {}
        self.elements = 0
        """Rules in our chains."""
        self.sent = 0
        """Texts that iptables-restore has taken."""
        self.commits = 0
        """How often that raised the generation of nftables: for each table in the nft variant, else never."""
        self.gone: tuple[FrontendKey, ...] = ()
        """What the last load took away: frontends that went while nobody looked."""

    @property
    def variant(self) -> str:
        """Whose tables are written: `legacy` or `nft`."""
        return self._tables.variant

    def load(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> bool:
        """Make the tables hold exactly this; return whether our chains were there to start from.

        Chains that are right already are not sent. What kube-proxy has left under the same names is taken
        over, so that connections do not notice. Raises TablesError.
        """
        return self._compare(self._plan.reset(frontends, ranges))

    def intact(self) -> bool:
        """Whether nobody removed chains of ours, some of their rules, or jumps to them."""
        live = self._read()
        return not any(_jumps(live)) and all(
            _size(live, chain) == size for chain, size in self._sizes.items()
        )

    def apply(self, changes: Iterable[Change], ranges: NodeRanges | None = None) -> int:
        """Bring changes of frontends, and ranges if given, to the tables; return how many rules were sent.

        If the programs refuse, all that is there is compared, and what differs is sent. Raises TablesError.
        """
        written, removed = self._plan.change(merged(changes), ranges)
        try:
            self._commit(Edit(written, removed))
        except TablesError:
            self._compare(self._plan.chains())
            return sum(map(len, written.values()))
        self._count(written, removed)
        return sum(map(len, written.values()))

    def tidy(self) -> None:
        """Do nothing: a chain that nothing leads to any more goes with what led to it."""

    def remove(self) -> None:
        """Take exactly our own away: chains, and the rules of built-in chains that lead to them.

        Chains to which rules of others lead stay, with those that they lead to. Raises TablesError.
        """
        live = self._read()
        kept = {chain for table in live.values() for chain in _used_by_others(table)}
        out = [j for j in _leading(live) if ChainId(j.table, j.to) not in kept]
        self._commit(Edit({}, [c for c in _ours(live) if c not in kept], out))
        self._sizes, self.elements = {}, 0

    def culprit(self, error: NetlinkError, frontends: Iterable[Frontend]) -> Frontend | None:
        """Return a frontend of the service port whose line was refused; None for anything else."""
        if not isinstance(error, TablesError):
            return None
        command, _, rest = error.refused.partition(" ")
        name, _, line = rest.partition(" ")
        if command != "-A":
            return None
        for frontend in frontends:
            if frontend.key.family is self._tables.family:
                found = self._plan.rules_of(frontend)
                if ChainId("nat", name) in found.chains or any(line in r for r in found.entries.values()):
                    return frontend
        return None

    def _compare(self, wanted: Mapping[ChainId, Rules]) -> bool:
        """Read everything, and send what differs; return whether our chains were there."""
        live = self._read()
        there = {c: rules_of(c.name, live[c.table].chains[c.name]) for c in _ours(live)}
        used = {chain for table in live.values() for chain in _used_by_others(table)}
        written = {c: rules for c, rules in wanted.items() if there.get(c) != rules}
        removed = [c for c in there if c not in wanted and c not in used]
        self.gone = tuple(self._unwanted(there, wanted))
        self._commit(Edit(written, removed, *_jumps(live)))
        self._sizes, self.elements = {}, 0
        self._count(wanted, ())
        return POD_POSTROUTING in there

    def _commit(self, edit: Edit) -> None:
        if any(edit):
            text = restore_text(edit)
            self._tables.edit(text)
            self.sent += 1
            self.commits += sum(line == "COMMIT" for line in text.splitlines()) if self.variant == NFT else 0

    def _count(self, written: Mapping[ChainId, Rules], removed: Iterable[ChainId]) -> None:
        for chain in removed:
            self.elements -= self._sizes.pop(chain, 0)
        for chain, rules in written.items():
            self.elements += len(rules) - self._sizes.get(chain, 0)
            self._sizes[chain] = len(rules)

    def _read(self) -> dict[str, LiveTable]:
        return {table.name: table for table in self._tables.read() if table.name in TABLES}

    def _unwanted(
        self, there: Mapping[ChainId, Rules], wanted: Mapping[ChainId, Rules]
    ) -> Iterator[FrontendKey]:
        """Yield what can be addressed by the rules that are there, and not by those that are wanted."""
        was, now = (
            {key for c in ENTRY_CHAINS for key in addressed(self._tables.family, c, chains.get(c, ()))}
            for chains in (there, wanted)
        )
        yield from was - now


def _size(live: _Live, chain: ChainId) -> int:
    """Return how many rules a chain has; -1 if it is not there."""
    table = live.get(chain.table)
    rules = table.chains.get(chain.name) if table else None
    return -1 if rules is None else len(rules)


def _ours(live: _Live) -> list[ChainId]:
    found = (ChainId(table.name, name) for table in live.values() for name in table.chains)
    return [chain for chain in found if is_ours(chain)]


def _leading(live: _Live) -> Iterator[Jump]:
    """Yield the rules of built-in chains that lead to where we enter ours, or past them."""
    for table in live.values():
        for name in table.chains:
            if name in table.builtin:
                rules = table.chains[name]
                for one, text in zip(rules, rules_of(name, rules), strict=True):
                    own = Jump(table.name, name, text, one.target) == shared.OWN_TRAFFIC
                    if own or (table.name, one.target) in _ENTERED:
                        yield Jump(table.name, name, text, one.target)


def _jumps(live: _Live) -> tuple[list[Jump], list[Jump]]:
    """Return the jumps to take out, and those to put on top: all of a built-in chain, if one is not right."""
    out: list[Jump] = []
    put: list[Jump] = []
    there = list(_leading(live))
    for place in dict.fromkeys((j.table, j.chain) for j in (*JUMPS, *there)):
        found = [j for j in there if (j.table, j.chain) == place]
        wanted = [j for j in JUMPS if (j.table, j.chain) == place]
        if found != wanted:
            out += found
            put += wanted
    return out, put


def _used_by_others(table: LiveTable) -> set[ChainId]:
    """Return our chains of a table to which others' rules lead, and all that those lead to in turn.

    The mark that others have set by KUBE-MARK-MASQ means nothing without KUBE-POSTROUTING.
    """
    waiting = [
        ChainId(table.name, one.target)
        for name, rules in table.chains.items()
        if not is_ours(ChainId(table.name, name))
        for one in rules
        if not (name in table.builtin and (table.name, one.target) in _ENTERED)
    ]
    used = set[ChainId]()
    while waiting:
        chain = waiting.pop()
        if chain in used or not is_ours(chain) or chain.name not in table.chains:
            continue
        used.add(chain)
        waiting += [ChainId(table.name, one.target) for one in table.chains[chain.name]]
        if chain == MARK_MASQ:
            waiting.append(NAT_POSTROUTING)
    return used
