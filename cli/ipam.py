"""`podwire ipam`: the node's addresses, from the ledger itself, so that it works without the daemon."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.host import add_state_dir, need_root
from cli.output import CommandError, show

CRI_SOCKETS = (
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
)

RANGE_COLUMNS = (
    "range",
    "family",
    "capacity",
    "used",
    "free",
    "releasing",
    "resting",
    "kept",
    "reserved",
    "excluded",
)

DESCRIPTION = "Show and mend the addresses of this node's pods. Works with and without the daemon."

CHECK = """
Compare what the ledger says with what the kernel has and, where a container runtime answers, with its
sandboxes; print each difference in a sentence with what mends it. Changes nothing. The exit status is 0 when
there is no difference and 1 when there is one. An ADD or DEL under way shows as a difference for a moment.
"""

RELEASE = """
Take an address back from a pod that is gone, as its DEL would have: interface and rules are removed, the
address is free again. A pod that still runs loses its network. For an address that is only kept for a pod
that may come back (podwire.io/sticky), the claim to it ends.
"""

EXAMPLES = """
examples:
  podwire ipam show                      how full each range is, and who has what
  podwire ipam show -o json
  podwire ipam check --cri /run/crio/crio.sock
  podwire ipam release 10.244.1.77
"""


def add_parser(commands: Any) -> None:
    """Add the commands to the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    top = commands.add_parser(
        "ipam", help="the node's addresses", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw
    )
    kinds = top.add_subparsers(metavar="COMMAND", required=True)
    listing = kinds.add_parser("show", help="ranges, and who has which address")
    listing.set_defaults(run=run_show)
    check = kinds.add_parser(
        "check", help="compare ledger, kernel and runtime", description=CHECK, formatter_class=raw
    )
    check.add_argument(
        "--cri",
        metavar="SOCKET",
        help=f'the runtime\'s socket; "" to ask none (default: the first of {", ".join(CRI_SOCKETS)})',
    )
    check.set_defaults(run=run_check)
    release = kinds.add_parser(
        "release", help="take an address back", description=RELEASE, formatter_class=raw
    )
    release.add_argument("what", metavar="ADDRESS|CONTAINER", help="an address or a container id")
    release.set_defaults(run=run_release)
    for command in (listing, check, release):
        add_state_dir(command)
    for command in (listing, check):
        command.add_argument(
            "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
        )


def run_show(args: argparse.Namespace) -> int:
    """Print ranges and addresses."""
    from cni.settings import NodeSettings
    from ipam.pools import groups

    with _ledger(args.state_dir) as ledger:
        settings = NodeSettings.from_mapping(ledger.settings())
        ranges = []
        if settings:
            found = ledger.usage(groups(settings.ipam, settings.pod_cidrs), settings.ipam.quarantine)
            ranges = [_usage(usage) for usage in found]
        addresses = [*_held(ledger), *_kept(ledger)]
    if args.output == "json":
        import json

        print(json.dumps({"ranges": ranges, "addresses": addresses}, indent=2))
        return 0
    if not settings:
        print("no range is known: the daemon has not synced yet")
        return 0
    show(
        "table",
        (
            "range",
            "family",
            "capacity",
            "used",
            "free",
            "releasing",
            "resting",
            "kept",
            "reserved",
            "excluded",
        ),
        ranges,
    )
    if addresses:
        print()
        show("table", ("address", "state", "pod", "interface", "container", "since"), addresses)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what differs; exit status 1 when anything does."""
    from cni.audit import findings, observe
    from cni.plugin import rules_for

    need_root("ipam check")
    sandboxes = _sandboxes(args.cri)
    with _ledger(args.state_dir) as ledger, rules_for(ledger) as rules:
        attachments = ledger.attachments()
        found = findings(attachments, observe(attachments, rules, sandboxes))
    rows = [{"pod": f.pod, "address": f.address, "what": f.what, "remedy": f.remedy} for f in found]
    if args.output == "json":
        show("json", (), rows)
    elif rows:
        for row in rows:
            print(f"{row['pod']} ({row['address']}): {row['what']}\n    {row['remedy']}")
    else:
        asked = "ledger, kernel and runtime" if sandboxes is not None else "ledger and kernel"
        print(f"{len(attachments)} attachments: {asked} agree")
    return 1 if rows else 0


def run_release(args: argparse.Namespace) -> int:
    """Take an address back."""
    from cni.plugin import Plugin

    need_root("ipam release")
    with _ledger(args.state_dir) as ledger:
        matching = [
            a for a in ledger.attachments() if args.what in (a.key.container_id, *map(str, a.addresses))
        ]
        for attachment in matching:
            Plugin(ledger, args.state_dir).give_up(attachment.key)
            print(f"released {', '.join(map(str, attachment.addresses))} of {attachment.key}")
        if not matching and not _end_claim(ledger, args.what):
            raise CommandError(f"nothing in the ledger has the address or container id {args.what!r}")
    return 0


def _end_claim(ledger: Any, text: str) -> bool:
    from netaddr import AddrFormatError, IPAddress

    try:
        address = IPAddress(text)
    except (AddrFormatError, ValueError):
        return False
    if not ledger.release_kept(address):
        return False
    print(f"{address} is kept for nobody any more")
    return True


@contextmanager
def _ledger(state_dir: Path) -> Iterator[Any]:
    from cni.plugin import LEDGER_FILE, ledger_of
    from ipam.ledger import LedgerError

    if not (state_dir / LEDGER_FILE).exists():
        raise CommandError(f"{state_dir / LEDGER_FILE} is not there: no daemon has run with this --state-dir")
    try:
        with ledger_of(state_dir) as ledger:
            yield ledger
    except LedgerError as error:
        raise CommandError(str(error)) from None


def _sandboxes(socket: str | None) -> Mapping[str, bool] | None:
    """Ask the runtime; None when there is none to ask. One that was named must answer."""
    from cli import cri

    if socket is None:
        socket = next((s for s in CRI_SOCKETS if Path(s).is_socket()), "")
    return {s.id: s.ready for s in cri.sandboxes(socket)} if socket else None


def _usage(usage: Any) -> dict[str, Any]:
    return {
        "range": usage.name,
        "family": f"IPv{usage.version}",
        "capacity": usage.capacity,
        "used": usage.used,
        "free": usage.capacity - usage.used - usage.quarantined - usage.kept,
        "releasing": usage.releasing,
        "resting": usage.quarantined,
        "kept": usage.kept,
        "reserved": usage.reserved,
        "excluded": usage.excluded,
    }


def _held(ledger: Any) -> Iterator[dict[str, Any]]:
    for attachment in ledger.attachments():
        for address in attachment.addresses:
            yield {
                "address": str(address),
                "state": attachment.state.value,
                "pod": attachment.pod,
                "interface": attachment.key.ifname,
                "container": attachment.key.container_id[:13],
                "since": _time(attachment.created),
            }


def _kept(ledger: Any) -> Iterator[dict[str, Any]]:
    for kept in ledger.kept():
        yield {
            "address": str(kept.address),
            "state": f"kept until {_time(kept.until)}",
            "pod": kept.pod,
            "interface": "",
            "container": "",
            "since": "",
        }


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
