"""`podwire doctor`: what on this node will make trouble, in sentences, with what mends it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cli.host import need_root
from cli.output import table

DESCRIPTION = """
Look for what makes trouble on this node, and say for each what mends it. Changes nothing, and works with and
without the daemon. The exit status is 0 when nothing was found and 1 when something was.

checks:
  kube-proxy   what it left behind, in both variants of iptables (legacy and nft), IPv4 and IPv6: chains and
               the jumps to them; ipsets, virtual servers and the interface of its IPVS mode; its nftables
               tables; and whether it runs. Its rules take the packets of services before podwire sees them,
               or a second time. What kubelet and others have in chains named KUBE-... is not meant.

A note is no finding: it says what was not looked at, or stays although it looks like a trace, and why.
"""

EXAMPLES = """
examples:
  podwire doctor
  podwire doctor -o json
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and what mends it; a sentence each."""

    sentence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Check:
    """What one look at the node has found; notes are sentences on what was left out, and why."""

    name: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="what on this node makes trouble",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    parser.set_defaults(run=run_doctor)


def kube_proxy() -> Check:
    """Look for what kube-proxy left, and for kube-proxy."""
    from node.leftovers import survey

    found = survey()
    findings = [
        Finding(
            f"kube-proxy runs (process {pid})",
            "remove it from this node (its DaemonSet, its static pod or its service), then clean up after it",
        )
        for pid in found.running
    ]
    remedy = "podwire cleanup --kube-proxy"
    findings += [Finding(f"kube-proxy left {leftover}", remedy) for leftover in found.leftovers]
    return Check("kube-proxy", tuple(findings), found.remarks)


CHECKS: tuple[Callable[[], Check], ...] = (kube_proxy,)


def run_doctor(args: argparse.Namespace) -> int:
    """Print what each check has found; exit status 1 when any has found something."""
    need_root("doctor")
    checks = [check() for check in CHECKS]
    if args.output == "json":
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(_text(checks))
    return 1 if any(check.findings for check in checks) else 0


def _text(checks: list[Check]) -> str:
    rows = [
        row
        for check in checks
        for row in ([[check.name, f.sentence, f.remedy] for f in check.findings] or [[check.name, "ok", "-"]])
    ]
    notes = [f"note: {note}" for check in checks for note in check.notes]
    return "\n".join([table(("check", "finding", "remedy"), rows), *notes])
