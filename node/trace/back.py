"""The way back: what connection tracking undoes for the replies, and whether they come by it at all. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from netlink.family import Family, with_port
from node.trace.hooks import Place
from node.trace.packet import End, Kind, Packet, Step, Trail, Verdict

Back = tuple[tuple[Step, ...], tuple[str, ...]]


def replies(
    place_of: Callable[[str, Family], Place | None], packet: Packet, trail: Trail, end: End, start: str
) -> Back:
    """Return the steps of a reply from an end to the sender, and what is wrong with them, in sentences."""
    if not end.verdict.arrives:
        return (), ()
    seen = end.packet
    here = with_port(seen.destination, seen.dport)
    steps = [Step(Kind.START, end.place, "reply", f"{here} → {seen.source}")]
    place = place_of(end.place, packet.family)
    if place is not None:
        reply = replace(seen, source=seen.destination, destination=seen.source, iif="", oif="", mark=0)
        way = place.routing.find(reply, output=True).way
        text = way.words(place.routing.interfaces) if way else f"no route to {seen.source}"
        steps.append(Step(Kind.ROUTE, end.place, "routing", text))
    notes = []
    for found in reversed(trail.translations):
        before, after = found.before, found.after
        if (before.addresses, before.source) == (after.addresses, after.source):
            continue
        words = f"{with_port(after.destination, after.dport)} → {after.source}"
        undone = f"{with_port(before.destination, before.dport)} → {before.source}"
        text = f"undoes it: {words} becomes {undone}"
        steps.append(Step(Kind.NAT, found.place, "conntrack", text, before=words, after=undone))
        at_home = found.place == start and _is_home(place_of(start, packet.family), packet, trail)
        straight = after.source == before.source and end.place != found.place and not at_home
        if straight and end.verdict is not Verdict.LEFT:
            notes.append(
                f"replies go from {end.place} to {before.source} past {found.place}, which alone could turn "
                "them back: the client would not know them"
            )
    steps.append(Step(Kind.END, start, "end", f"{packet.source or 'the sender'} has its answer"))
    return tuple(steps), tuple(notes)


def _is_home(place: Place | None, packet: Packet, trail: Trail) -> bool:
    """Whether the sender is the place where a way starts, or a pod of it."""
    if place is None or trail.steps[0].kind is Kind.START:
        return True
    link = place.routing.by_name.get(packet.iif)
    return link is not None and place.pod_at(link, packet.source) is not None
