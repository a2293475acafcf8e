"""`podwire cleanup`: take away what others left."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from cli.host import need_root
from cli.output import CommandError, complain

if TYPE_CHECKING:
    from node.leftovers import Leftover

DESCRIPTION = """
Take away what another program left on this node, and nothing else. Say what to take away; there is no
default.

--kube-proxy removes what `podwire doctor` reports of it: its chains in the tables nat, filter, mangle and raw
of both variants of iptables, IPv4 and IPv6, with the jumps to them; its nftables tables; the virtual
servers, the interface kube-ipvs0 and the ipsets of its IPVS mode. Every table is changed at once or not at
all. Chains that kubelet or others made, and chains of kube-proxy's that rules of others use, stay.
Connections that exist go on, for connection tracking knows them. It can be repeated; the exit status is 1
when something that was found could not be removed, else 0.
"""

EXAMPLES = """
examples:
  podwire cleanup --kube-proxy --dry-run       what would be removed
  podwire cleanup --kube-proxy                 after kube-proxy was stopped, best with podwire running
  podwire cleanup --kube-proxy -o json         also the names of chains, sets and virtual servers
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cleanup",
        help="take away what kube-proxy left",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kube-proxy", action="store_true", help="what kube-proxy left")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be removed, and remove nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="even while kube-proxy runs, which will write it all again"
    )
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    parser.set_defaults(run=run_cleanup)


def run_cleanup(args: argparse.Namespace) -> int:
    """Remove, and print what is removed; exit status 1 when something could not be."""
    from node.leftovers import Removal, remove, survey

    need_root("cleanup")
    found = survey(exact=True)
    if found.running and not (args.force or args.dry_run):
        which = ", ".join(map(str, found.running))
        raise CommandError(
            f"kube-proxy runs (process {which}) and would write it all again: stop it, or use --force"
        )
    done = Removal(found.leftovers, ()) if args.dry_run else remove(found.leftovers)
    if args.output == "json":
        report = {
            "dry_run": args.dry_run,
            "removed": [_fields(some) for some in done.removed],
            "failures": list(done.failures),
            "notes": list(found.remarks),
        }
        print(json.dumps(report, indent=2))
    else:
        verb = "would remove" if args.dry_run else "removed"
        lines = [f"{verb} {some}" for some in done.removed]
        if not found.leftovers:
            lines = ["nothing of kube-proxy's was found"]
        print("\n".join([*lines, *(f"note: {remark}" for remark in found.remarks)]))
    for failure in done.failures:
        complain(f"cannot remove {failure}")
    return 1 if done.failures else 0


def _fields(leftover: Leftover) -> dict[str, Any]:
    return {"kind": leftover.kind, "what": str(leftover), "names": list(leftover.names)}
