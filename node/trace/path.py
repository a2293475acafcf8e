"""Follow a packet over a node, and from node to node, to every end it can have. Pure, given the states.

The order of things is that of the kernel: prerouting, routing, input or forward, postrouting; for what a node
sends itself: routing, output, routing again if it was translated, postrouting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from netlink.decode import Link
from netlink.family import Family, with_port
from node.trace import back, tunnels
from node.trace.hooks import FORWARD, INPUT, OUTPUT, POSTROUTING, PREROUTING, Place
from node.trace.packet import Branch, End, Kind, Packet, Step, Trail, Verdict
from node.trace.rules import HOOKS, BaseChain, Rules
from node.trace.state import (
    BROADCAST,
    LOCAL,
    MULTICAST,
    UNICAST,
    Found,
    State,
    Way,
)
from node.trace.why import Names, nothing, proxy_at, reason_of

HOPS = 32
SAVE = "podwire trace --save-state FILE"
Standing = tuple[Rules, BaseChain]
Ways = Iterator[tuple[Trail, End]]


@dataclass(frozen=True, slots=True)
class World:
    """What is known beyond a node: who has an address, what state that place is in, what things are called.

    `owner` returns a place's name, "" if nobody known has the address; `state_of` its state, None if it
    cannot be asked.
    """

    state_of: Callable[[str, Family], State | None]
    owner: Callable[[str], str] = field(default=lambda address: "")
    names: Names = field(default_factory=Names)


class Tracer:
    """Follows packets through a world; states and their lookups are kept between packets."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._places: dict[tuple[str, Family], Place | None] = {}

    def place(self, name: str, family: Family) -> Place | None:
        """Return a place as packets of a family meet it, None if it cannot be asked."""
        if (name, family) not in self._places:
            state = self._world.state_of(name, family)
            self._places[name, family] = Place(state) if state else None
        return self._places[name, family]

    def sent(self, name: str, packet: Packet) -> tuple[Branch, ...]:
        """Return every way of a packet that a place itself sends."""
        place = self._known(name, packet.family)
        return self._branches(packet, self._send(place, packet, Trail()), name)

    def received(self, name: str, packet: Packet) -> tuple[Branch, ...]:
        """Return every way of a packet that arrives at a place by the interface it names."""
        place = self._known(name, packet.family)
        return self._branches(packet, self._arrive(place, packet, Trail()), name)

    def _known(self, name: str, family: Family) -> Place:
        place = self.place(name, family)
        if place is None:
            raise LookupError(f"{name} could not be asked for its network state")
        return place

    def _branches(self, packet: Packet, ways: Ways, start: str) -> tuple[Branch, ...]:
        found = []
        for trail, end in ways:
            likely = Fraction(1)
            for choice in trail.choices:
                likely *= choice.weight
            steps, notes = back.replies(self.place, packet, trail, end, start)
            last = Step(Kind.END, end.place, "end", f"{end.verdict.value}: {end.who or end.reason}")
            found.append(Branch(likely, (*trail.steps, last), trail.choices, end, steps, notes))
        return tuple(found)

    def _arrive(self, place: Place, packet: Packet, trail: Trail) -> Ways:
        """Follow a packet that an interface has received."""
        if len(trail.steps) > 40 * HOPS or sum(s.kind is Kind.INTERFACE for s in trail.steps) > HOPS:
            yield (
                trail,
                End(Verdict.DROPPED, place.name, "", packet, "it goes round in circles: its hop limit ends"),
            )
            return
        words = f"{packet.iif}{place.about(packet.iif)}: {packet.addresses}"
        packet, notes = place.bridged(packet)
        trail = trail.then(Step(Kind.INTERFACE, place.name, "in", words), *notes)
        if notes and (pod := place.switched(packet)):
            name = f"pod {pod.name or packet.destination}"
            who = f"{name} on {place.name}, {with_port(packet.destination, packet.dport)}"
            step = Step(Kind.INTERFACE, place.name, "bridge", f"{packet.iif} → eth0 of {name}, not routed")
            yield trail.then(step), End(Verdict.DELIVERED, place.name, who, packet)
            return
        if packet.family is Family.V6 and packet.iif != "lo" and place.loopback(packet):
            reason = f"a loopback address cannot come by {packet.iif}"  # RFC 4291, 2.5.3
            yield trail, End(Verdict.DROPPED, place.name, "", packet, reason)
            return
        packet, trail = self._track(
            place, replace(packet, translated=False, renamed=False, settled=False, mark=0), trail
        )
        for passed, now, on in self._hook(place, PREROUTING, packet, trail):
            if passed is not None:
                yield now, passed
                continue
            yield from self._route_in(place, on, now)

    def _route_in(self, place: Place, packet: Packet, trail: Trail) -> Ways:
        refused = place.refuses_source(packet)
        if refused:
            yield trail, End(Verdict.DROPPED, place.name, "", packet, *refused)
            return
        found = place.routing.find(packet)
        trail = trail.then(_route_step(place, found, packet))
        way = found.way
        if way is not None and way.kind == LOCAL:
            yield from self._to_node(place, packet, trail)
        elif way is None or way.kind != UNICAST:
            yield trail, _nowhere(place, packet, way)
        elif why := place.keeps_to_itself(packet):
            yield trail, End(Verdict.DROPPED, place.name, "", packet, *why)
        else:
            out = replace(packet, oif=place.routing.interfaces.get(way.oif, ""), priority=0)
            for ended, now, on in self._hook(place, FORWARD, out, trail):
                if ended is not None:
                    yield now, ended
                else:
                    yield from self._post(place, on, way, now)

    def _to_node(self, place: Place, packet: Packet, trail: Trail) -> Ways:
        for ended, now, on in self._hook(place, INPUT, packet, trail):
            if ended is not None:
                yield now, ended
                continue
            if proxy_at(on.destination):
                yield now, self._to_proxy(place, on, now)
                continue
            who = f"{place.name} itself, {with_port(on.destination, on.dport)}"
            reason = "whether a program listens there is not looked at"
            yield now, End(Verdict.DELIVERED, place.name, who, on, reason)

    def _to_proxy(self, place: Place, packet: Packet, trail: Trail) -> End:
        """Return the end of what the node's L7 proxy gets: for which service says the packet before."""
        to = with_port(packet.destination, packet.dport)
        who = f"the L7 proxy of {place.name} ({proxy_at(packet.destination)}), {to}"
        before = next((t.before for t in trail.translations if t.place == place.name), None)
        if before is None:
            reason = "it is addressed to the proxy itself, which serves nobody by that address"
            return End(Verdict.DELIVERED, place.name, who, packet, reason)
        service = self._world.names.service(before) or with_port(before.destination, before.dport)
        reason = f"which chooses an endpoint of service {service} by itself, in a connection of its own"
        return End(Verdict.DELIVERED, place.name, who, packet, reason, "podwire l7 show")

    def _send(self, place: Place, packet: Packet, trail: Trail) -> Ways:
        """Follow a packet that the place itself sends; without a source it is given one."""
        found = place.routing.find(packet, output=True)
        if not packet.source and found.way:
            packet = replace(packet, source=place.source_for(found.way, packet.destination))
        step = _route_step(place, found, packet)
        trail = trail.then(
            Step(Kind.START, place.name, "out", f"{place.name} sends {packet.addresses}"), step
        )
        if found.way is None or found.way.kind not in (UNICAST, LOCAL) or not packet.source:
            yield trail, _nowhere(place, packet, found.way)
            return
        packet = replace(packet, oif=_out(place, found.way), iif="")
        tracked, trail = self._track(place, packet, trail)
        for ended, now, on in self._hook(place, OUTPUT, tracked, trail):
            if ended is not None:
                yield now, ended
                continue
            way = found.way
            if (on.destination, on.mark) != (packet.destination, packet.mark):
                again = place.routing.find(on, output=True)
                now = now.then(_route_step(place, again, on))
                if again.way is None or again.way.kind not in (UNICAST, LOCAL):
                    yield now, _nowhere(place, on, again.way)
                    continue
                way = again.way
                on = replace(on, oif=_out(place, way))
            yield from self._post(place, on, way, now)

    def _track(self, place: Place, packet: Packet, trail: Trail) -> tuple[Packet, Trail]:
        """Look for the connection in connection tracking; one that is there goes on as it is."""
        flow, notes = place.flow(packet)
        trail = trail.then(*notes)
        if flow is None:
            return packet, trail
        source = flow.reply.destination if flow.reply.destination != packet.source else ""
        onward = replace(
            packet, destination=flow.reply.source, dport=flow.reply.sport, known=True, becomes=source
        )
        onward = replace(
            onward, translated=(onward.destination, onward.dport) != (packet.destination, packet.dport)
        )
        if onward.translated:
            trail = trail.then(_nat(place.name, "prerouting", "destination", packet, onward))
        return onward, trail.translated(place.name, packet, onward)

    def _hook(
        self, place: Place, hook: int, packet: Packet, trail: Trail
    ) -> Iterator[tuple[End | None, Trail, Packet]]:
        """Run a hook's chains; yield (None, way, packet) for what passes, with an end for what does not."""
        yield from self._chains(place, place.bases(hook), hook, packet, trail)

    def _chains(
        self, place: Place, bases: Sequence[Standing], hook: int, packet: Packet, trail: Trail
    ) -> Iterator[tuple[End | None, Trail, Packet]]:
        if not bases:
            yield None, trail, packet
            return
        rules, base = bases[0]
        done = packet.translated if hook in (PREROUTING, OUTPUT) else packet.renamed
        if base.translates and (done or packet.known or packet.settled or not packet.tracked):
            yield from self._chains(place, bases[1:], hook, packet, trail)
            return
        for passed in rules.walk(base, packet, place.name, place):
            now = Trail((*trail.steps, *passed.steps), (*trail.choices, *passed.choices), trail.translations)
            after = passed.packet
            if passed.ruling.value != "accept":
                verdict = Verdict.REJECTED if passed.ruling.value == "reject" else Verdict.DROPPED
                reason, look = reason_of(self._world.names, place.name, passed, packet)
                if verdict is Verdict.REJECTED and packet.translated:
                    reason += "; the sender is told of an address that it does not know, and will time out"
                yield End(verdict, place.name, "", after, reason, look), now, after
                continue
            if (after.destination, after.dport) != (packet.destination, packet.dport):
                now = now.then(_nat(place.name, HOOKS[hook], "destination", packet, after))
                now = now.translated(place.name, packet, after)
            if passed.masquerade or passed.source:
                after = self._renamed(place, hook, passed.source, after)
                now = now.then(_nat(place.name, HOOKS[hook], "source", packet, after))
                now = now.translated(place.name, packet, after)
            yield from self._chains(place, bases[1:], hook, after, now)

    def _renamed(self, place: Place, hook: int, source: str, packet: Packet) -> Packet:
        if not source:
            way = place.routing.find(packet, output=True).way
            link = place.routing.by_name.get(packet.oif)
            gateway = way.gateway if way else ""
            source = place.routing.source_for(link.index if link else 0, gateway, packet.destination)
        return replace(packet, source=source or packet.source, sport=0, renamed=True)

    def _post(self, place: Place, packet: Packet, way: Way, trail: Trail) -> Ways:
        for ended, now, on in self._hook(place, POSTROUTING, packet, trail):
            if ended is not None:
                yield now, ended
                continue
            if on.becomes:
                renamed = replace(on, source=on.becomes, sport=0, becomes="", renamed=True)
                now = now.then(_nat(place.name, "postrouting", "source", on, renamed))
                now, on = now.translated(place.name, on, renamed), renamed
            if way.kind == LOCAL:
                yield from self._loopback(place, on, now)
            else:
                yield from self._leave(place, on, way, now)

    def _loopback(self, place: Place, packet: Packet, trail: Trail) -> Ways:
        """The node's own packet to itself comes in by lo; what translates has been asked."""
        again = replace(packet, iif="lo", oif="", settled=True)
        trail = trail.then(Step(Kind.INTERFACE, place.name, "in", f"lo: {packet.addresses}"))
        for ended, now, on in self._hook(place, PREROUTING, again, trail):
            if ended is not None:
                yield now, ended
            else:
                yield from self._to_node(place, on, now)

    def _leave(self, place: Place, packet: Packet, way: Way, trail: Trail) -> Ways:
        """Send a packet out by the interface of its route, to a pod, into a tunnel, to the next hop."""
        link = place.routing.by_index.get(way.oif)
        if link is None or not link.up:
            name = link.name if link else way.oif
            yield (
                trail,
                End(
                    Verdict.DROPPED,
                    place.name,
                    "",
                    packet,
                    f"interface {name} is down",
                    f"ip link show {name}",
                ),
            )
            return
        toward = way.gateway or packet.destination
        if packet.source == packet.destination:
            reason = f"it comes back to its sender with {packet.source}, its own address, as the source"
            yield trail, End(Verdict.DROPPED, place.name, "", packet, reason, "podwire frontends (hairpin)")
            return
        pod = place.pod_at(link, packet.destination)
        trail = trail.then(*place.next_hop(link, toward))
        if pod:
            name = f"pod {pod.name}" if pod.name else f"the pod at {packet.destination}"
            step = Step(Kind.INTERFACE, place.name, "out", f"{link.name} → eth0 of {name}")
            who = f"{name} on {place.name}, {with_port(packet.destination, packet.dport)}"
            yield trail.then(step), End(Verdict.DELIVERED, place.name, who, packet)
        elif tunnels.is_tunnel(link):
            yield from self._encapsulate(place, packet, link, toward, trail)
        else:
            out = f"{link.name}: {packet.addresses}{f', mtu {way.mtu or link.mtu}'}"
            yield from self._next(
                place, packet, toward, trail.then(Step(Kind.INTERFACE, place.name, "out", out))
            )

    def _next(self, place: Place, packet: Packet, toward: str, trail: Trail) -> Ways:
        """Go on at who has the next hop's address."""
        name = self._world.owner(toward)
        there = self.place(name, packet.family) if name else None
        if there is None or there is place:
            who = f"{name or 'what is beyond ' + place.name}, by {packet.oif} to {toward}"
            verdict = Verdict.UNKNOWN if name else Verdict.LEFT
            reason = f"it continues on {name}, which could not be asked" if name else nothing(toward)
            look = f"{SAVE} on {name}, then --state {name}=FILE here" if name else ""
            yield trail, End(verdict, name or "outside", who, packet, reason, look)
            return
        link = there.routing.holder(toward)
        onward = replace(packet, iif=link.name if link else "?", oif="", priority=0, ct_mark=0, known=False)
        yield from self._arrive(there, onward, trail)

    def _encapsulate(self, place: Place, packet: Packet, link: Link, toward: str, trail: Trail) -> Ways:
        """Put a packet into one between nodes, follow that, and take it out there."""
        entered = tunnels.enter(place, lambda family: self.place(place.name, family), packet, link, toward)
        if isinstance(entered, tunnels.Refused):
            yield trail, End(Verdict.UNROUTABLE, place.name, "", packet, *entered)
            return
        outer, remote = entered.outer, entered.outer.destination
        trail = trail.then(
            Step(
                Kind.TUNNEL,
                place.name,
                "tunnel",
                entered.text,
                before=packet.addresses,
                after=outer.addresses,
            )
        )
        name = self._world.owner(remote)
        there = self.place(name, packet.family) if name else None
        under = self.place(place.name, outer.family)
        if under is not None:
            for outside, end in self._send(under, outer, Trail()):
                steps = tuple(replace(s, hook=f"({s.hook})") for s in outside.steps)
                trail = trail.then(*steps)
                if end.verdict.fails:
                    yield trail, replace(end, reason=f"the outer packet: {end.reason}", packet=packet)
                    return
        if there is None:
            reason = f"it continues on {name or remote}, which could not be asked"
            look = f"{SAVE} on {name}, then --state {name}=FILE here" if name else ""
            yield (
                trail,
                End(
                    Verdict.UNKNOWN,
                    name or "outside",
                    f"{name or remote} by {entered.title}",
                    packet,
                    reason,
                    look,
                ),
            )
            return
        into = tunnels.leave(there.state, name, entered, packet)
        if isinstance(into, tunnels.Refused):
            yield trail, End(Verdict.DROPPED, name, "", packet, *into)
            return
        onward = replace(packet, iif=into.name, oif="", priority=0, ct_mark=0, known=False)
        yield from self._arrive(there, onward, trail)


def _out(place: Place, way: Way) -> str:
    """Return the interface that a node's own packet leaves by: to itself by lo."""
    return "lo" if way.kind == LOCAL else place.routing.interfaces.get(way.oif, "")


def _route_step(place: Place, found: Found, packet: Packet) -> Step:
    if found.way is None:
        return Step(Kind.ROUTE, place.name, "routing", f"no route to {packet.destination}")
    text = found.way.words(place.routing.interfaces)
    if found.policy and found.policy.priority not in (0, 32766, 32767):
        text += f" (rule {found.policy.priority})"
    return Step(Kind.ROUTE, place.name, "routing", text)


def _nowhere(place: Place, packet: Packet, way: Way | None) -> End:
    if way is not None and way.kind in (BROADCAST, MULTICAST):
        return End(Verdict.DROPPED, place.name, "", packet, f"{packet.destination} is no address of one host")
    look = f"ip route get {packet.destination} on {place.name}"
    if way is None:
        return End(
            Verdict.UNROUTABLE,
            place.name,
            "",
            packet,
            f"{place.name} has no route to {packet.destination}",
            look,
        )
    words = way.words(place.routing.interfaces)
    reason = f"the route of {place.name} to {packet.destination} leads nowhere: {words}"
    if not packet.source and way.kind == UNICAST:
        reason = f"{place.name} has no address to send to {packet.destination} from"
    return End(Verdict.UNROUTABLE, place.name, "", packet, reason, look)


def _nat(place: str, hook: str, what: str, before: Packet, after: Packet) -> Step:
    pair = (before.addresses, after.addresses)
    new = (
        with_port(after.destination, after.dport)
        if what == "destination"
        else f"{after.source}, a port by chance"
    )
    old = with_port(before.destination, before.dport) if what == "destination" else before.source
    return Step(Kind.NAT, place, hook, f"{what} {old} → {new}", before=pair[0], after=pair[1])
