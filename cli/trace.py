"""`podwire trace`: what would happen to a packet, hop by hop, by the live state of the kernel."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.host import add_paths, need_root
from cli.output import CommandError

if TYPE_CHECKING:
    from cli.trace_world import Scene
    from netlink.family import Family
    from node.trace.ask import Source, Target
    from node.trace.packet import Branch, Packet, Trace
    from node.trace.path import Tracer

DESCRIPTION = """
Show what would happen to the first packet of a new connection: every hook, chain and rule that matches, with
its text and counter; addresses before and after each translation; the route, the next hop, the tunnel, the
pod's interface; and the way back of the replies. Nothing is sent and nothing is changed. The rules are the
kernel's own, everybody's, of nftables and of both variants of iptables; where a choice is made by chance,
every way is shown with its probability.

FROM is a pod (namespace/name, pod:NAME or its address), a node ("node" is this one), or any other address: a
client outside, whose packet arrives at this node. TO is a service (namespace/name[:PORT]), the port of a node
(node:PORT, NAME:PORT), a pod, or an address with a port.

A rule that depends on what cannot be known beforehand is shown as "not followed", and passed over. The
exit status is 0 if nothing stands in its way, 3 if something does on some way (or --live found it otherwise),
1 if it could not be traced.
"""

EXAMPLES = """
examples:
  podwire trace shop/web-1 shop/db:5432        from a pod to a service
  podwire trace node svc:shop/db --endpoint 10.244.2.7
  podwire trace --from 198.51.100.10 node:30180
  podwire trace shop/web-1 10.96.0.10:53 --protocol udp -o json
  podwire trace shop/web-1 shop/db --svg way.svg
  podwire trace --lab default yaobank/customer yaobank/summary
  podwire trace --live shop/web-1 shop/db:5432 send a real packet too, and compare

across nodes:
  podwire trace FROM TO --over 'ssh root@{node}'
  podwire trace --save-state FILE              there, where there is no such way
  podwire trace FROM TO --state node2=FILE     and here
"""
NOT_ALL = 3


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="what happens to a packet, hop by hop, and why",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="FROM TO", help="as above; only TO with --from")
    parser.add_argument(
        "--from", dest="source", metavar="ADDRESS", help="FROM, where it is an address outside"
    )
    parser.add_argument("--protocol", choices=("tcp", "udp", "sctp"), help="(default: the service's, or tcp)")
    parser.add_argument("--family", choices=("ipv4", "ipv6"), help="(default: what both have, ipv4 first)")
    parser.add_argument("--sport", type=int, default=0, metavar="PORT", help="of a connection that is there")
    parser.add_argument(
        "--interface", metavar="NAME", help="where it arrives from outside (default: the way back)"
    )
    parser.add_argument("--endpoint", metavar="ADDRESS", help="only the ways to this endpoint")
    parser.add_argument("--lab", metavar="NAME", help="in a lab, all of whose hosts can be asked")
    parser.add_argument(
        "--state",
        metavar="NODE=FILE",
        action="append",
        default=[],
        help="another node's state, as --save-state wrote it there; can be given again",
    )
    parser.add_argument(
        "--over",
        metavar="COMMAND",
        default="",
        help="what runs a command on another node, {node}, so that it can be asked for its state",
    )
    parser.add_argument(
        "--save-state", type=Path, metavar="FILE", help="only write this node's state (-: to standard output)"
    )
    parser.add_argument("--live", action="store_true", help="send a real packet too, and compare")
    parser.add_argument("-a", "--all", action="store_true", help="also show chains in which nothing matches")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw a picture")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="how to print (default: text)"
    )
    add_paths(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace, print, draw; return 0 if nothing stands in its way, else 3."""
    from cli import trace_world
    from node.trace import show, svg
    from node.trace.ask import AskError

    need_root("podwire trace, which reads rules and connections,")
    others = dict(map(_state_file, args.state))
    if args.lab:
        scene = trace_world.in_lab(args.lab)
    else:
        scene = trace_world.here(args.socket, args.state_dir, others, args.over)
    if args.save_state:
        trace_world.save(scene, args.save_state)
        return 0
    try:
        trace = traced(scene, args)
    except AskError as error:
        raise CommandError(str(error)) from None
    verdict = _live(scene, trace) if args.live else None
    if args.svg:
        args.svg.write_text(svg.picture(trace))
    if args.output == "json":
        print(json.dumps(show.data(trace) | ({"live": verdict.data()} if verdict else {}), indent=2))
    else:
        print(show.text(trace, everything=args.all))
        if verdict:
            print(f"\n{verdict.text()}")
    agrees = verdict is None or verdict.agrees
    return NOT_ALL if not agrees or any(b.end.verdict.fails for b in trace.branches) else 0


def _live(scene: Scene, trace: Trace) -> Any:
    from node.trace import live

    try:
        return live.confirm(trace, scene.known, scene.namespaces)
    except live.LiveError as error:
        raise CommandError(str(error)) from None


def _state_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise CommandError(f"--state {text!r} must be NODE=FILE")
    return name, Path(path)


def traced(scene: Scene, args: argparse.Namespace) -> Trace:
    """Return the trace of what the command line names. Raises AskError, CommandError."""
    from netlink.family import Family
    from node.trace import ask
    from node.trace.packet import Packet, Trace
    from node.trace.path import Tracer

    words = [args.source, *args.words] if args.source else args.words
    if len(words) != 2:
        raise CommandError(
            "trace needs FROM and TO (only TO with --from); `podwire trace --help` has examples"
        )
    asked = {"ipv4": Family.V4, "ipv6": Family.V6}.get(args.family)
    source, target = _ends(scene, words, asked, ask.NUMBERS.get(args.protocol or ""))
    family = ask.family_of(target.address)
    assert family is not None
    packet = Packet(family, target.protocol, source.address, target.address, target.port, args.sport)
    tracer = Tracer(scene.world())
    packet, branches = _follow(tracer, source, packet, args.interface)
    if args.endpoint:
        branches = _only(branches, args.endpoint)
    places = dict.fromkeys(s.place for b in branches for s in b.steps)
    others = tuple(w for name in places if (place := tracer.place(name, family)) for w in place.others())
    return Trace(packet, source.words, target.words, branches, others)


def _ends(
    scene: Scene, words: list[str], asked: Family | None, protocol: int | None
) -> tuple[Source, Target]:
    """Return what FROM and TO name, in a family that both have."""
    from netlink.family import Family
    from node.trace import ask

    fixed = asked or ask.family_of(*words)
    first: ask.AskError | None = None
    for family in [fixed] if fixed else list(Family):
        try:
            return (
                ask.source(words[0], scene.known, family),
                ask.target(words[1], scene.known, family, protocol),
            )
        except ask.AskError as error:
            first = first or error
    assert first is not None
    raise first


def _follow(
    tracer: Tracer, source: Source, packet: Packet, interface: str | None
) -> tuple[Packet, tuple[Branch, ...]]:
    """Follow a packet from where it starts: a pod's interface, a host, or what comes from outside."""
    place = tracer.place(source.place, packet.family)
    if place is None:
        raise CommandError(f"{source.place}, where it starts, could not be asked for its network state")
    if source.pod is None and not source.outside:
        way = place.routing.find(packet, output=True).way
        if way and not packet.source:
            packet = replace(packet, source=place.source_for(way, packet.destination))
        return packet, tracer.sent(source.place, packet)
    own = source.pod.host_ifname if source.pod else ""
    arrives = interface or own or place.way_out(packet, packet.source)
    if not arrives or not place.index_of(arrives):
        raise CommandError(
            f"{source.place} has no interface {arrives}" if arrives
            else f"{source.place} has no route to {packet.source}: say with --interface where it arrives"
        )  # fmt: skip
    packet = replace(packet, iif=arrives)
    return packet, tracer.received(source.place, packet)


def _only(branches: tuple[Branch, ...], endpoint: str) -> tuple[Branch, ...]:
    from netlink.family import with_port

    def ends(branch: Branch) -> tuple[str, str]:
        to = branch.end.packet
        return to.destination, with_port(to.destination, to.dport)

    found = tuple(b for b in branches if endpoint in ends(b))
    if not found:
        there = ", ".join(dict.fromkeys(ends(b)[1] for b in branches))
        raise CommandError(f"--endpoint {endpoint}: no way leads there; they lead to {there}")
    return found
