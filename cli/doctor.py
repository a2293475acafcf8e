"""`podwire doctor`: what on this node will make trouble, in sentences, with what mends it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from cli.host import SOCKET, need_root
from cli.output import CommandError, table

if TYPE_CHECKING:
    from typing import Any

    from node.doctor.findings import Check
    from node.doctor.view import Context, View

CHECKS = {
    "kernel": (
        "node.doctor.kernel",
        "has the kernel what podwire needs; tried in a namespace of its own",
    ),
    "settings": ("node.doctor.settings", "sysctls, limits, programs that manage this node's interfaces"),
    "foreign": ("node.doctor.foreign", "other programs' rules, interfaces and CNI configurations in the way"),
    "kube-proxy": (
        "node.doctor.kube_proxy",
        "what it left behind (iptables, nftables, IPVS), or does it run",
    ),
    "daemon": ("node.doctor.daemon", "does it run, is it ready, what does it say is wrong"),
    "podcidrs": (
        "node.doctor.podcidrs",
        "ranges of pods that overlap others, this node's networks, services",
    ),
    "routes": ("node.doctor.routes", "routes and tunnel entries that are missing, wrong or stale"),
    "l7": ("node.doctor.l7", "HAProxy and what it needs, where services ask for the L7 proxy"),
    "peers": ("node.doctor.peers", "do other nodes answer, and do their pods' ranges"),
    "mtu": ("node.doctor.mtu", "do packets of the promised size arrive, and where do they end"),
}
"""Where each check is, and what it is about, in the order in which they run."""

DESCRIPTION = """
Look for what makes trouble on this node, and say for each what mends it. Changes nothing, and works with and
without the daemon; what needs it is skipped without.

exit status:
  0   nothing was found
  1   at least one error was found (or the command failed, with a sentence on standard error)
  2   wrong usage
  3   only warnings were found

A note is no finding: it says what was not looked at, or stays although it looks like a trace, and why.
"""

EXAMPLES = """
examples:
  podwire doctor
  podwire doctor --check peers --check mtu
  podwire doctor --skip mtu -o json
"""
ERRORS, WARNINGS = 1, 3


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    names = "\n".join(f"  {name:<11} {words}" for name, (_, words) in CHECKS.items())
    parser = commands.add_parser(
        "doctor",
        help="what on this node makes trouble",
        description=f"{DESCRIPTION}\nchecks:\n{names}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--check", action="append", choices=CHECKS, metavar="NAME", help="only this check; can be repeated")
    add("--skip", action="append", choices=CHECKS, default=[], metavar="NAME", help="not this one; likewise")
    add("--list", action="store_true", help="list the checks")
    add("-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)")
    add("--socket", default=SOCKET, help="the daemon's socket (default: %(default)s)")
    add("--timeout", type=_seconds, default=2.0, metavar="SECONDS", help="how long probes wait (default: 2)")
    add("--peers", type=_peers, metavar="N|all", help="how many other nodes to probe (default: all)")
    parser.set_defaults(run=run_doctor)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds, up to an hour")
    return value


def _peers(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is neither a number from 1 on nor all")
    return int(text)


def run_doctor(args: argparse.Namespace) -> int:
    """Print what each check has found; see the description for the exit status."""
    if args.list:
        print(table(("check", "what"), [[name, words] for name, (_, words) in CHECKS.items()]))
        return 0
    need_root("doctor")
    wanted = [name for name in CHECKS if name in (args.check or CHECKS) and name not in args.skip]
    progress = _Progress(sys.stderr.isatty() and args.output == "table")
    checks = []
    context = _context(args, wanted, progress)
    for name in wanted:
        progress(name)
        checks.append(import_module(CHECKS[name][0]).check(context))
    progress.end()
    print(
        json.dumps([asdict(check) for check in checks], indent=2) if args.output == "json" else _text(checks)
    )
    found = {finding.severity.value for check in checks for finding in check.findings}
    return ERRORS if "error" in found else WARNINGS if found else 0


def _context(args: argparse.Namespace, wanted: Sequence[str], progress: Callable[[str], None]) -> Context:
    """Ask the daemon, if some check goes by it."""
    from node.doctor.view import Context

    view, absence = None, ""
    if any(name != "kube-proxy" for name in wanted):
        try:
            view = _ask(args.socket, "podcidrs" in wanted)
        except CommandError as error:
            absence = str(error)
    return Context(view, absence, args.timeout, args.peers, version("podwire"), progress)


def _ask(socket: str, services: bool) -> View:
    from api import podwire_pb2 as pb
    from cli.daemon_client import TIMEOUT_SECONDS, connected
    from node.doctor.view import view_of

    with connected(socket) as stub:
        health = stub.Health(pb.HealthRequest(), timeout=TIMEOUT_SECONDS)
        routes = stub.Routes(pb.RoutesRequest(), timeout=TIMEOUT_SECONDS).routes
        known = stub.Services(pb.ServicesRequest(), timeout=TIMEOUT_SECONDS).services if services else ()
    return view_of(health, routes, known)


class _Progress:
    """Says on a terminal what is being done, in one line that goes again."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def __call__(self, words: str) -> None:
        if self._terminal:
            print(f"\r\033[K{words} ...", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _text(checks: list[Check]) -> str:
    rows = [row for check in checks for row in _rows(check)]
    notes = [f"note: {check.name}: {note}" for check in checks for note in check.notes]
    return "\n".join([table(("check", "severity", "finding", "remedy"), rows), *notes])


def _rows(check: Check) -> list[list[str]]:
    if check.skipped and not check.findings:
        return [[check.name, "-", f"skipped: {check.skipped}", "-"]]
    rows = [[check.name, f.severity.value, f.sentence, f.remedy] for f in check.findings]
    return rows or [[check.name, "-", "ok", "-"]]
