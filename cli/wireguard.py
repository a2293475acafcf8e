"""`podwire wireguard`: how packets between nodes are encrypted, and by which keys."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from api import podwire_pb2 as pb
from cli.daemon_client import TIMEOUT_SECONDS, connected, fields
from cli.host import SOCKET
from cli.output import CommandError, show

DESCRIPTION = """
Show the other nodes as the two WireGuard devices of this one know them: where encrypted packets go, when the
last handshake was, and how many bytes have passed. Without traffic there are no handshakes. Only public keys
are told.
"""

EXAMPLES = """
examples:
  podwire wireguard
  podwire wireguard -o json
  podwire wireguard rotate
      change this node's keys: in half a minute, and no packet is lost
"""

ROTATE = """
Have the daemon change both keys of this node. Traffic goes on: packets take the device whose key is not
changing, and each key is used only when every other node has it. `podwire wireguard` shows how far that is;
with one node away it takes half a minute more. The command does not wait for the end.

The exit status is 0 when the change begins, and 1 with a sentence when it cannot.
"""

COLUMNS = ("node", "device", "endpoint", "last handshake", "received", "sent", "route")


def add_parser(commands: Any) -> None:
    """Add the command and its verb to the parser."""
    parser = commands.add_parser(
        "wireguard",
        help="encrypted tunnels to other nodes, and their keys",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _socket(parser)
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    parser.set_defaults(run=run_show)
    verbs = parser.add_subparsers(metavar="VERB")
    rotate = verbs.add_parser(
        "rotate",
        help="change this node's keys",
        description=ROTATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _socket(rotate, argparse.SUPPRESS)
    rotate.set_defaults(run=run_rotate)


def _socket(parser: argparse.ArgumentParser, default: str = SOCKET) -> None:
    parser.add_argument("--socket", default=default, help=f"the daemon's socket (default: {SOCKET})")


def run_show(args: argparse.Namespace) -> int:
    """Print the peers, where a change of keys is, and what is wrong."""
    with connected(args.socket) as stub:
        found = stub.Wireguard(pb.WireguardRequest(), timeout=TIMEOUT_SECONDS)
    if args.output == "json":
        print(json.dumps(fields(found), indent=2))
        return 0
    if not found.used:
        raise CommandError("this node's backend is not wireguard (network.backend)")
    now = time.time()
    show(args.output, COLUMNS, [_row(peer, now) for peer in found.peers])
    if found.step != "idle":
        print(f"the keys of this node are being changed: {found.step}")
    for problem in found.problems:
        print(f"problem: {problem}")
    return 0


def run_rotate(args: argparse.Namespace) -> int:
    """Have the keys changed."""
    with connected(args.socket) as stub:
        found = stub.RotateWireguard(pb.RotateWireguardRequest(), timeout=TIMEOUT_SECONDS)
    if found.refused:
        raise CommandError(found.refused)
    print("the keys of this node are being changed; `podwire wireguard` shows how far that is")
    return 0


def _row(peer: pb.WireguardPeer, now: float) -> dict[str, Any]:
    age = f"{max(now - peer.handshake, 0):.0f} s ago" if peer.handshake else "never"
    return {
        "node": peer.node,
        "device": peer.device,
        "endpoint": peer.endpoint,
        "last handshake": age,
        "received": _bytes(peer.received),
        "sent": _bytes(peer.sent),
        "route": "yes" if peer.route else "",
    }


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{number} B"
