"""Apply: bring virtual servers, addresses and the table from what the kernel has to what frontends say."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping

from netlink.conntrack import IPS_DST_NAT, Flow
from netlink.delivery import Ground
from netlink.errors import NetlinkError
from netlink.ipvs import Command, IpvsError, Load, Real, Request, Schedule, Servers, Virtual
from netlink.nftables.batch import BatchError, Nftables
from netlink.nftables.objects import Elements, Map
from netlink.nftables.operations import AddElements, DeleteElements, DeleteTable
from proxy.dataplane import NOTHING, NodeRanges
from proxy.frontends import Frontend, FrontendKey
from proxy.ipvs import elements, ruleset
from proxy.ipvs.drain import Draining
from proxy.ipvs.places import MADE_ADDRESSES, is_ours
from proxy.ipvs.rules import Contents, Edit, Rules, uses_of
from proxy.ipvs.ruleset import DELIVERED_ADDRESSES, LEADS, MAPS, MARKS
from proxy.ipvs.ways import Moves, Want, Ways
from proxy.l7 import places
from proxy.nftables.elements import key_bytes, kind_of
from proxy.nftables.ruleset import ALLOWED_SOURCES, CLUSTER_ADDRESSES, KINDS, RESTRICTED
from proxy.table import Change, merged

Reals = Mapping[Virtual, dict[Real, Load]]

_UNGRACEFUL = (socket.IPPROTO_UDP, socket.IPPROTO_SCTP)
"""Their connections are forgotten when an endpoint goes (node.services), so there is nothing to wait for."""


class Dataplane:
    """The IPVS service proxy of one IP family.

    What is more comes first: addresses, virtual servers, then the elements that lead there; what is less goes
    in the other order. After a failed `apply` what it knows may be wrong: call `load` before anything else.
    `port` is where the node's L7 proxy listens.
    """

    name = "ipvs"

    def __init__(
        self,
        nft: Nftables,
        ipvs: Servers,
        ground: Ground,
        scheduler: str = "rr",
        port: int = places.PORT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nft = nft
        self._ipvs = ipvs
        self._ground = ground
        self._family = nft.family
        self._scheduler = scheduler
        self._port = port
        self._clock = clock
        self._start()
        self.elements = 0
        self.gone: tuple[FrontendKey, ...] = ()
        """What the last load took out of the kernel: frontends that went while nobody looked."""

    def _start(self) -> None:
        """Know of nothing."""
        self._rules = Rules(self._family, self._port)
        self._ways = Ways(self._family, self._scheduler)
        self._draining = Draining(self._clock)
        self._ranges = NOTHING
        self._live: set[Virtual] = set()
        self._lingering: dict[Virtual, FrontendKey | None] = {}
        """Virtual servers of no frontend, which stay until their last connection has ended."""

    def load(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> bool:
        """Make the kernel hold exactly this; return whether a table of our layout was there to start from.

        What is right stays untouched. A virtual server at an address and port of ours becomes ours, whoever
        made it. Real servers that are there and not wanted are drained, from now on.
        """
        self._start()
        comment = self._nft.table_comment()
        known = comment == ruleset.layout_comment(self._family) and self._has_rules()
        there = {which: self._nft.elements(which) for which in MAPS} if known else {}
        servers, held = self._servers(), self._ground.addresses()
        ours = {v for v in servers if is_ours(v.mark) or v.address in held}
        made = MADE_ADDRESSES[self._family]
        earlier = elements.found_marks(self._family, there), elements.found_ports(self._family, made, there)
        self._ways.remember(*earlier, ours)
        edit = Edit()
        changes = [Change(None, f) for f in frontends]
        for change in changes:
            self._rules.note(edit, change)
        moves = self._ways.move(changes)
        self._ways.forget()
        self._rules.note_moves(edit, moves)
        reals = {v: self._ipvs.reals(v) for v in servers.keys() & (ours | moves.after.keys())}
        more = self._more(moves.after, servers, reals)
        less = self._less(moves.after, ours, reals)
        for virtual, want in moves.after.items():
            edit.uses.update(uses_of(virtual, want.key))
        for virtual in self._lingering:
            edit.uses.update(uses_of(virtual, None))
        self._rules.note_ranges(edit, NOTHING, ranges)
        self._rules.settle(edit)
        addresses, routes = self._delivered(CLUSTER_ADDRESSES), self._delivered(DELIVERED_ADDRESSES)
        routed = self._ground.routes()
        self._ground.add(addresses - held, routes - routed)
        self._ipvs.commit(more)
        self._commit_table(known, comment, there, edit)
        self._ipvs.commit(less)
        self._ground.drop(held - addresses, routed - routes)
        self._release(less)
        self.gone = tuple(self._rules.unwanted(there, edit))
        self._live, self._ranges = set(moves.after), ranges
        self.elements = edit.size[0] + _size(moves.after)
        return known

    @property
    def commits(self) -> int:
        """Batches that were committed."""
        return self._nft.commits

    def apply(self, changes: Iterable[Change], ranges: NodeRanges | None = None) -> int:
        """Bring changes of frontends, and ranges if given, to the kernel; return how much moved.

        Raises NetlinkError.
        """
        edit = Edit()
        net = merged(changes)
        for change in net:
            self._rules.note(edit, change)
        moves = self._ways.move(net)
        self._rules.note_moves(edit, moves)
        if ranges:
            self._rules.note_ranges(edit, self._ranges, ranges)
        more, less = self._requests(edit, moves)
        self._bring(edit, more, less)
        self.elements += _size(moves.after) - _size(moves.before)
        self._ranges = ranges or self._ranges
        self._look()
        return sum(edit.size) + len(more) + len(less)

    def _bring(self, edit: Edit, more: list[Request], less: list[Request]) -> None:
        """Bring a change to the kernel: what there is more, what leads there, what there is less."""
        before = self._delivered(CLUSTER_ADDRESSES, edit), self._delivered(DELIVERED_ADDRESSES, edit)
        self._rules.settle(edit)
        after = self._delivered(CLUSTER_ADDRESSES, edit), self._delivered(DELIVERED_ADDRESSES, edit)
        come, go = ([a - b for a, b in zip(x, y, strict=True)] for x, y in ((after, before), (before, after)))
        if any(come):
            self._ground.add(*come)
        self._ipvs.commit(more)
        if operations := edit.operations():
            self._nft.commit(operations)
        self._ipvs.commit(less)
        if any(go):
            self._ground.drop(*go)
        self._release(less)
        added, removed = edit.size
        self.elements += added - removed

    def _release(self, less: Iterable[Request]) -> None:
        for request in less:
            if request.command is Command.DEL_SERVICE:
                self._ways.release(request.virtual)

    def intact(self) -> bool:
        """Whether the table has all of its rules, and addresses, routes and virtual servers are there."""
        return (
            self._nft.table_comment() == ruleset.layout_comment(self._family)
            and self._has_rules()
            and self._ground.whole()
            and self._delivered(CLUSTER_ADDRESSES) <= self._ground.addresses()
            and self._delivered(DELIVERED_ADDRESSES) <= self._ground.routes()
            and self._live <= self._servers().keys()
        )

    def tidy(self) -> None:
        """Let go who has no connections left."""
        self._look()

    def remove(self) -> None:
        """Take away table, virtual servers, addresses, routes and rule, and what flows remember of them.

        Virtual servers are ours by their address, if it is on our interface, or by their mark.
        """
        known = self._nft.table_comment() == ruleset.layout_comment(self._family)
        shapes: Elements = {}
        for kind in KINDS if known else ():
            shapes |= self._nft.elements(kind.shapes)
        held = self._ground.addresses()
        if self._nft.table_comment() is not None:
            self._nft.commit([DeleteTable()])
        ours = [v for v in self._servers() if is_ours(v.mark) or v.address in held]
        self._ipvs.commit([Request(Command.DEL_SERVICE, v) for v in ours])
        self._ground.remove()
        if shapes:
            self._ground.forget(lambda flow: _was_balanced(flow, shapes))

    def culprit(self, error: NetlinkError, frontends: Iterable[Frontend]) -> Frontend | None:
        """Return the frontend that an element or a virtual server is for which the kernel refused."""
        if isinstance(error, IpvsError):
            key = self._ways.key_of(error.request.virtual)
            return next((f for f in frontends if f.key == key), None)
        if not isinstance(error, BatchError) or error.element is None:
            return None
        operation = error.operation
        if not isinstance(operation, AddElements | DeleteElements):
            return None
        for frontend in frontends:
            kind = kind_of(frontend.key)
            maps = (kind.shapes, MARKS[kind], LEADS[kind], RESTRICTED, ALLOWED_SOURCES)
            if operation.map in maps and error.element.startswith(key_bytes(frontend.key)):
                return frontend
        return None

    def _servers(self) -> dict[Virtual, Schedule]:
        """Return the virtual servers of the family, anybody's."""
        return {v: s for v, s in self._ipvs.servers().items() if v.family is self._family}

    def _has_rules(self) -> bool:
        found = self._nft.rules()
        return all(found.get(chain) == comments for chain, comments in ruleset.rules(self._family).items())

    def _delivered(self, which: Map, edit: Edit | None = None) -> frozenset[str]:
        """Return the addresses that are in a set, of those that an edit touches; of all without one."""
        ntop, af = socket.inet_ntop, self._family.af
        among = self._rules.uses if edit is None else [u for u in edit.uses if u in self._rules.uses]
        return frozenset(ntop(af, element) for found, element in among if found is which)

    def _commit_table(self, known: bool, comment: str | None, there: Contents, edit: Edit) -> None:
        """Have the table hold what an edit adds; one of another layout is replaced in one transaction."""
        if known:
            operations = self._rules.difference(there, edit)
        else:
            operations = [*ruleset.base(self._family)]
            if comment is not None:
                operations.insert(0, DeleteTable())
            operations += edit.operations()
        if operations:
            self._nft.commit(operations)

    def _more(
        self, after: Mapping[Virtual, Want], servers: Mapping[Virtual, Schedule], reals: Reals
    ) -> list[Request]:
        """Return what is missing, or not as it is to be."""
        found: list[Request] = []
        for virtual, want in after.items():
            if virtual not in servers:
                found.append(Request(Command.NEW_SERVICE, virtual, want.schedule))
            elif servers[virtual] != want.schedule:
                found.append(Request(Command.SET_SERVICE, virtual, want.schedule))
            there = reals.get(virtual, {})
            for real in want.reals:
                if real not in there:
                    found.append(Request(Command.NEW_DEST, virtual, real=real))
                elif there[real].weight != 1:
                    found.append(Request(Command.SET_DEST, virtual, real=real))
        return found

    def _less(self, after: Mapping[Virtual, Want], ours: Iterable[Virtual], reals: Reals) -> list[Request]:
        """Return what lets go who is there and not wanted, and note who is on the way out."""
        found: list[Request] = []
        for virtual in dict.fromkeys([*after, *ours]):
            want = after.get(virtual)
            graceful = want.graceful if want else virtual.protocol not in _UNGRACEFUL
            going = [r for r in reals.get(virtual, {}) if not want or r not in want.reals]
            if graceful:
                found += self._drain(virtual, [(r, reals[virtual][r].weight) for r in going])
            elif want:
                found += [Request(Command.DEL_DEST, virtual, real=r) for r in going]
            if want:
                continue
            if virtual in self._draining:
                self._lingering[virtual] = None
            else:
                found.append(Request(Command.DEL_SERVICE, virtual))
        return found

    def _drain(self, virtual: Virtual, going: Iterable[tuple[Real, int]]) -> list[Request]:
        """Have real servers, each with its weight, get no new connections."""
        found: list[Request] = []
        for real, weight in going:
            self._draining.begin(virtual, real)
            if weight:
                found.append(Request(Command.SET_DEST, virtual, real=real, weight=0))
        return found

    def _requests(self, edit: Edit, moves: Moves) -> tuple[list[Request], list[Request]]:
        """Return what changes mean for virtual servers, what is more and what is less; note their uses."""
        more: list[Request] = []
        less: list[Request] = []
        for virtual in dict.fromkeys([*moves.after, *moves.before]):
            old, new = moves.before.get(virtual), moves.after.get(virtual)
            if old == new:
                continue
            was, now = (w.reals if w else () for w in (old, new))
            if new:
                more += self._begin(edit, virtual, old, new)
                more += [self._come(virtual, real) for real in now if real not in set(was)]
            going = [real for real in was if real not in set(now)]
            if old and old.graceful:
                less += self._drain(virtual, [(real, 1) for real in going])
            elif new:
                less += [Request(Command.DEL_DEST, virtual, real=real) for real in going]
            if old and not new:
                self._live.discard(virtual)
                if virtual in self._draining:
                    self._lingering[virtual] = old.key
                else:
                    less.append(self._end(edit, virtual, old.key))
        return more, less

    def _begin(self, edit: Edit, virtual: Virtual, old: Want | None, new: Want) -> list[Request]:
        """Return what has a virtual server there as it is to be, but for real servers that come or go."""
        self._live.add(virtual)
        if old:
            changed = old.schedule != new.schedule
            return [Request(Command.SET_SERVICE, virtual, new.schedule)] if changed else []
        if virtual in self._lingering:
            del self._lingering[virtual]
            return [Request(Command.SET_SERVICE, virtual, new.schedule)]
        edit.uses.update(uses_of(virtual, new.key))
        return [Request(Command.NEW_SERVICE, virtual, new.schedule)]

    def _come(self, virtual: Virtual, real: Real) -> Request:
        back = self._draining.back(virtual, real)
        return Request(Command.SET_DEST if back else Command.NEW_DEST, virtual, real=real)

    def _end(self, edit: Edit, virtual: Virtual, key: FrontendKey | None) -> Request:
        edit.uses.subtract(uses_of(virtual, key))
        return Request(Command.DEL_SERVICE, virtual)

    def _look(self) -> None:
        """Let go who has no connections left, and virtual servers that were only theirs."""
        if not self._draining.due():
            return
        edit = Edit()
        less: list[Request] = []
        for virtual in self._draining.virtuals:
            there = self._ipvs.reals(virtual)
            for real in self._draining.over(virtual, there):
                self._draining.ended(virtual, real)
                if real in there:
                    less.append(Request(Command.DEL_DEST, virtual, real=real))
            if virtual in self._lingering and virtual not in self._draining:
                less.append(self._end(edit, virtual, self._lingering.pop(virtual)))
        self._bring(edit, [], less)


def _size(wants: Mapping[Virtual, Want]) -> int:
    """Return how many virtual and real servers there are; those on their way out do not count."""
    return sum(1 + len(want.reals) for want in wants.values())


def _was_balanced(flow: Flow, shapes: Elements) -> bool:
    """Whether IPVS has balanced a connection to one of our frontends, given their shapes.

    Its replies come from elsewhere than it was addressed to, and connection tracking did not translate it;
    unless it was led to a virtual server.
    """
    if flow.original.destination == flow.reply.source and flow.original.dport == flow.reply.sport:
        return False
    by_port = bytes((flow.protocol, 0, 0, 0)) + struct.pack(">HH", flow.original.dport, 0)
    by_address = socket.inet_pton(flow.family.af, flow.original.destination) + by_port
    shape = shapes.get(by_address, shapes.get(by_port))
    return shape in ruleset.led_shapes() or (shape is not None and not flow.status & IPS_DST_NAT)
