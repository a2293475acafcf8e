"""`podwire cleanup`: take away what others left, or podwire itself."""

from __future__ import annotations

import argparse
import functools
import json
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.host import add_paths, need_root
from cli.output import CommandError, complain

if TYPE_CHECKING:
    from node.leftovers import Leftover, Removal

DESCRIPTION = """
Take away what a program left on this node, and nothing else. Say what to take away; there is no default. It
can be repeated; the exit status is 1 when something that was found could not be removed, else 0.

--kube-proxy removes what `podwire doctor` reports of it: its chains in the tables nat, filter, mangle and raw
of both variants of iptables, IPv4 and IPv6, with the jumps to them; its nftables tables; the virtual
servers, the interface kube-ipvs0 and the ipsets of its IPVS mode. Every table is changed at once or not at
all. Chains that kubelet or others made, and chains of kube-proxy's that rules of others use, stay.
Connections that exist go on, for connection tracking knows them.

--podwire removes podwire itself, when its daemon is stopped: its nftables tables or chains of iptables, with
what connection tracking knows of UDP and SCTP by them; its routes (protocol 112), policy rules, addresses on
loopback and interfaces, tunnels among them; what flat mode answers for; and it sets sysctls back that podwire
has set and nobody else since. While pods are attached, which would lose their network, it refuses without
--with-pods. Packet forwarding stays on, as another network may have come to need it, unless
--stop-forwarding is given. --all takes the plugin, its conflist, the ledger and the rest of the files, too,
those for systemd, NetworkManager and firewalld among them. It says what it will remove and asks, unless
--yes is given.

--kubernetes removes what this node has in the API: annotations podwire.io/… of its Node, and the Leases by
which it claimed podCIDRs. Needs no root.
"""

EXAMPLES = """
examples:
  podwire cleanup --kube-proxy --dry-run       what would be removed
  podwire cleanup --kube-proxy                 after kube-proxy was stopped, best with podwire running
  podwire cleanup --kube-proxy -o json         also the names of chains, sets and virtual servers
  podwire cleanup --podwire --all              the daemon is stopped and pods are gone: the node as it was
  podwire cleanup --podwire --yes              what is in the kernel only; a daemon that starts makes it anew
  podwire cleanup --podwire --all --yes --host-root /host
      from a container with the node's network, and its file system at /host
  podwire cleanup --kubernetes --kubeconfig /etc/podwire/kubeconfig --node-name node1
"""

ONLY_PODWIRE = {
    "all": "--all",
    "state": "--state",
    "with_pods": "--with-pods",
    "stop_forwarding": "--stop-forwarding",
    "host_root": "--host-root",
    "yes": "--yes",
}
"""Options that make no sense without --podwire (--yes: nobody asks)."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cleanup",
        help="take away what kube-proxy left, or podwire itself",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kube-proxy", action="store_true", help="what kube-proxy left")
    what.add_argument("--podwire", action="store_true", help="podwire itself, from this node")
    what.add_argument("--kubernetes", action="store_true", help="what this node has in the API by podwire")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be removed, and remove nothing"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="even while kube-proxy, or podwire's daemon, runs, which will write it all again",
    )
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    _add_podwire(parser.add_argument_group("with --podwire"))
    _add_kubernetes(parser.add_argument_group("with --kubernetes"))
    parser.set_defaults(run=functools.partial(run_cleanup, parser))


def _add_podwire(group: Any) -> None:
    group.add_argument("--yes", action="store_true", help="do not ask")
    group.add_argument(
        "--with-pods", action="store_true", help="even while pods are attached, which lose their network"
    )
    group.add_argument(
        "--state", action="store_true", help="also the ledger, the last known state and the socket"
    )
    group.add_argument(
        "--all",
        action="store_true",
        help="also all files: as --state, and plugin, conflist, files for systemd and NetworkManager",
    )
    group.add_argument(
        "--stop-forwarding",
        action="store_true",
        help="also set packet forwarding back to what it was; other networks of containers need it on",
    )
    group.add_argument(
        "--host-root", type=Path, metavar="DIR", help="files are below DIR, a node's file system"
    )
    for flag, path in (("--bin-dir", "/opt/cni/bin"), ("--conf-dir", "/etc/cni/net.d")):
        group.add_argument(flag, type=Path, default=Path(path), help="(default: %(default)s)")
    add_paths(group)


def _add_kubernetes(group: Any) -> None:
    group.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="without one, the pod's service account"
    )
    group.add_argument(
        "--kubernetes-api-override", default="", metavar="URL", help="API server to ask instead"
    )
    group.add_argument(
        "--kubernetes-namespace",
        default="kube-system",
        metavar="NAME",
        help="where the Leases are (default: %(default)s)",
    )
    group.add_argument("--node-name", default="", metavar="NAME", help="(default: the host name)")


def run_cleanup(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Remove, and print what is removed; exit status 1 when something could not be."""
    given = [flag for name, flag in ONLY_PODWIRE.items() if getattr(args, name)]
    if given and not args.podwire:
        parser.error(f"{given[0]} needs --podwire")
    if args.kube_proxy:
        return _kube_proxy(args)
    return _podwire(args) if args.podwire else _kubernetes(args)


def _kube_proxy(args: argparse.Namespace) -> int:
    from node.leftovers import remove, survey

    need_root("cleanup")
    found = survey(exact=True)
    if found.running and not (args.force or args.dry_run):
        which = ", ".join(map(str, found.running))
        raise CommandError(
            f"kube-proxy runs (process {which}) and would write it all again: stop it, or use --force"
        )
    return _report(args, found.leftovers, found.remarks, remove, "nothing of kube-proxy's was found")


def _podwire(args: argparse.Namespace) -> int:
    from cni.install import InstallError
    from node.uninstall import Places, Scope, answers, remove, survey

    need_root("cleanup")
    if args.host_root and not args.host_root.is_dir():
        raise CommandError(f"--host-root {args.host_root} is not a folder")
    places = Places(args.state_dir, args.socket, args.bin_dir, args.conf_dir, args.host_root)
    scope = Scope(args.all, args.all or args.state, args.stop_forwarding)
    try:
        runs = answers(places.here(args.socket))
        if not args.dry_run:
            _refuse_while_running(args, runs)
        found = survey(places, scope)
    except InstallError as error:
        raise CommandError(str(error)) from None
    remarks = found.remarks
    if found.pods and not args.with_pods:
        which = f"pods are attached and would lose their network: {', '.join(found.pods)}"
        if not args.dry_run:
            raise CommandError(f"{which}; take them off first (kubectl drain), or use --with-pods")
        remarks = (f"{which}; without --with-pods nothing is removed", *remarks)
    if runs and args.dry_run and not args.force:
        remarks = ("the daemon runs; without --force nothing is removed", *remarks)
    if found.leftovers and not (args.dry_run or args.yes):
        _ask(args, found.leftovers, remarks)
    return _report(args, found.leftovers, remarks, remove, "nothing of podwire's was found")


def _kubernetes(args: argparse.Namespace) -> int:
    import msgspec

    from node.kube.api import Api, ApiError, Credentials
    from node.kube.leave import survey
    from node.uninstall import answers, remove

    if not args.dry_run:
        _refuse_while_running(args, answers(args.socket))
    node = args.node_name or socket.gethostname().lower()
    api = Api(Credentials(args.kubeconfig, args.kubernetes_api_override), f"node {node}")
    try:
        leftovers, remarks = survey(api, node, args.kubernetes_namespace)
    except (ApiError, msgspec.MsgspecError) as error:
        raise CommandError(str(error)) from None

    def take_off(found: Iterable[Leftover]) -> Removal:
        return remove(found, (ApiError,))

    return _report(args, leftovers, remarks, take_off, f"nothing of podwire's was found for node {node}")


def _refuse_while_running(args: argparse.Namespace, runs: bool) -> None:
    if runs and not args.force:
        raise CommandError(
            f"the daemon runs (it answers on {args.socket}) and would make it all again: "
            "stop it, or use --force"
        )


def _ask(args: argparse.Namespace, leftovers: Sequence[Leftover], remarks: Sequence[str]) -> None:
    """Show what is to go, and go on only if that is wanted."""
    if args.output == "json" or not sys.stdin.isatty():
        raise CommandError("nobody can be asked here whether to remove it: use --yes, or --dry-run to see it")
    print("\n".join([*(f"would remove {some}" for some in leftovers), *(f"note: {r}" for r in remarks)]))
    if input("Remove all of this? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was removed")


def _report(
    args: argparse.Namespace,
    leftovers: tuple[Leftover, ...],
    remarks: Sequence[str],
    remove: Callable[[Iterable[Leftover]], Removal],
    nothing: str,
) -> int:
    """Remove, unless it is a dry run, and print what went; return the exit status."""
    from node.leftovers import Removal

    done = Removal(leftovers, ()) if args.dry_run else remove(leftovers)
    if args.output == "json":
        report = {
            "dry_run": args.dry_run,
            "removed": [_fields(some) for some in done.removed],
            "failures": list(done.failures),
            "notes": list(remarks),
        }
        print(json.dumps(report, indent=2))
    else:
        verb = "would remove" if args.dry_run else "removed"
        lines = [f"{verb} {some}" for some in done.removed]
        if not leftovers:
            lines = [nothing]
        print("\n".join([*lines, *(f"note: {remark}" for remark in remarks)]))
    for failure in done.failures:
        complain(f"cannot remove {failure}")
    return 1 if done.failures else 0


def _fields(leftover: Leftover) -> dict[str, Any]:
    return {"kind": leftover.kind, "what": str(leftover), "names": list(leftover.names)}
