"""IPVS and delivery in memory: they refuse what the kernel does, so that tests need no kernel with IPVS."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence

from netlink.conntrack import Flow
from netlink.ipvs import Command, IpvsError, Load, Real, Request, Schedule, Virtual


class FakeIpvs:
    """Virtual servers in memory. `connections` are those that a real server still has, by both."""

    def __init__(self) -> None:
        self.there: dict[Virtual, tuple[Schedule, dict[Real, int]]] = {}
        self.connections: dict[tuple[Virtual, Real], int] = {}
        self.requests: list[Request] = []

    def servers(self) -> dict[Virtual, Schedule]:
        """Return all virtual servers."""
        return {virtual: schedule for virtual, (schedule, _) in self.there.items()}

    def reals(self, virtual: Virtual) -> dict[Real, Load]:
        """Return the real servers of a virtual server; none, if it is not there."""
        weights = self.there[virtual][1] if virtual in self.there else {}
        return {r: Load(w, self.connections.get((virtual, r), 0)) for r, w in weights.items()}

    def commit(self, requests: Sequence[Request]) -> None:
        """Make changes in order; IpvsError names the first that is refused, and the others are made."""
        refused = [IpvsError(code, request) for request in requests if (code := self._apply(request))]
        self.requests += requests
        if refused:
            raise refused[0]

    def _apply(self, request: Request) -> int:
        """Make a change; return an errno, or 0."""
        command, virtual, schedule, real, weight = request
        if command is Command.NEW_SERVICE and schedule:
            if virtual in self.there:
                return errno.EEXIST
            self.there[virtual] = schedule, {}
            return 0
        if virtual not in self.there:
            return errno.ESRCH
        reals = self.there[virtual][1]
        if command is Command.SET_SERVICE and schedule:
            self.there[virtual] = schedule, reals
        elif command is Command.DEL_SERVICE:
            del self.there[virtual]
        elif real:
            if (real in reals) is (command is Command.NEW_DEST):
                return errno.EEXIST if real in reals else errno.ENOENT
            if command is Command.DEL_DEST:
                del reals[real]
            else:
                reals[real] = weight
        return 0


class FakeGround:
    """Addresses in memory."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.routed: set[str] = set()
        self.made = False

    def addresses(self) -> frozenset[str]:
        """Return what is on the interface."""
        return frozenset(self.held)

    def routes(self) -> frozenset[str]:
        """Return what is local for marked packets."""
        return frozenset(self.routed)

    def whole(self) -> bool:
        """Whether the interface is there, and the rule."""
        return self.made

    def add(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have more addresses, and what they need."""
        self.made = True
        self.held |= set(addresses)
        self.routed |= set(routes)

    def drop(self, addresses: Collection[str], routes: Collection[str]) -> None:
        """Have addresses no longer."""
        self.held -= set(addresses)
        self.routed -= set(routes)

    def remove(self) -> None:
        """Take away all of it."""
        self.made = False
        self.held.clear()
        self.routed.clear()

    def forget(self, which: Callable[[Flow], bool]) -> None:
        """There are no connections."""
