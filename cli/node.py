"""`podwire daemon` and `podwire install`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from cli.inspect import SOCKET
from cli.output import CommandError

STATE_DIR = "/var/lib/podwire"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

DAEMON = """
Run the node daemon: it serves the CNI plugin on a unix socket, follows Kubernetes objects, and keeps
routes and the service proxy in the kernel as they say. It runs in the foreground and logs to standard
error. Stopping it (SIGTERM) leaves rules, routes and pods as they are; starting it adopts them.
"""

DAEMON_EXAMPLES = """
examples:
  podwire daemon --source /etc/podwire/manifests
      a folder of ordinary Node, Service and EndpointSlice YAML; a change counts at once
  podwire daemon --source DIR --node-name node1 --mode bridge --no-masquerade-cidr 10.0.0.0/8
"""

INSTALL = """
Write the CNI plugin `podwire` and its conflist, each at once or not at all. The conflist comes last,
because kubelet takes the node for ready as soon as it is there.
"""


def add_parsers(commands: Any) -> None:
    """Add the commands to the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    daemon = commands.add_parser(
        "daemon", help="run the node daemon", description=DAEMON, epilog=DAEMON_EXAMPLES, formatter_class=raw
    )
    daemon.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="folder of Kubernetes manifests"
    )
    daemon.add_argument(
        "--node-name",
        default=socket.gethostname().lower(),
        help="this node's Node object (default: host name)",
    )
    daemon.add_argument(
        "--mode",
        choices=("routed", "bridge"),
        default="routed",
        help="how pods are connected: a route each, or a bridge (default: %(default)s)",
    )
    daemon.add_argument("--mtu", type=int, help="MTU of pods in bytes (default: that of the way out)")
    daemon.add_argument(
        "--no-masquerade-cidr",
        action="append",
        default=[],
        metavar="CIDR",
        help="pods keep their address towards this range, as towards pods and nodes; can be repeated",
    )
    _add_paths(daemon)
    daemon.add_argument(
        "--metrics-bind-address",
        default="127.0.0.1:10249",
        help='/metrics, /proxyMode (default: %(default)s; "" for none)',
    )
    daemon.add_argument(
        "--healthz-bind-address",
        default="0.0.0.0:10256",
        help='/healthz, /livez (default: %(default)s; "" for none)',
    )
    daemon.add_argument("-v", "--verbose", action="store_true", help="log every change")
    daemon.set_defaults(run=run_daemon)

    install = commands.add_parser(
        "install", help="write the CNI plugin and its conflist", description=INSTALL, formatter_class=raw
    )
    install.add_argument("--bin-dir", type=Path, default=Path("/opt/cni/bin"), help="(default: %(default)s)")
    install.add_argument(
        "--conf-dir", type=Path, default=Path("/etc/cni/net.d"), help="(default: %(default)s)"
    )
    _add_paths(install)
    install.add_argument(
        "--remove", action="store_true", help="take both out again: the conflist first, then the plugin"
    )
    install.set_defaults(run=run_install)


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir", type=Path, default=Path(STATE_DIR), help="the ledger (default: %(default)s)"
    )
    parser.add_argument("--socket", type=Path, default=Path(SOCKET), help="(default: %(default)s)")


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon until it is stopped."""
    from cni.wiring import Mode
    from ipam.ledger import LedgerError
    from node.daemon import Daemon, DaemonConfig
    from node.syncer import SyncConfig

    _need_root("the daemon")
    if not args.source.is_dir():
        raise CommandError(f"--source {args.source} is not a folder")
    for cidr in args.no_masquerade_cidr:
        _check_cidr("--no-masquerade-cidr", cidr)
    if args.mtu is not None and not 576 <= args.mtu <= 65535:
        raise CommandError(f"--mtu {args.mtu} is not between 576 and 65535")
    for flag in ("metrics_bind_address", "healthz_bind_address"):
        _check_address(f"--{flag.replace('_', '-')}", getattr(args, flag))
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format=LOG_FORMAT)
    sync = SyncConfig(args.node_name, Mode(args.mode), args.mtu, tuple(args.no_masquerade_cidr))
    config = DaemonConfig(
        sync=sync,
        source=args.source,
        state_dir=args.state_dir,
        socket=args.socket,
        metrics_address=args.metrics_bind_address,
        healthz_address=args.healthz_bind_address,
    )
    try:
        return Daemon(config).run()
    except LedgerError as error:
        raise CommandError(str(error)) from None


def run_install(args: argparse.Namespace) -> int:
    """Write the plugin and the conflist, or remove them; print the files."""
    from cni import install

    _need_root("install")
    if args.remove:
        for file in install.remove(args.bin_dir, args.conf_dir):
            print(file)
        return 0
    try:
        binary = install.install_binary(args.bin_dir, socket=str(args.socket), state_dir=str(args.state_dir))
        conflist = install.install_conflist(args.conf_dir)
    except install.InstallError as error:
        raise CommandError(str(error)) from None
    print(f"{binary}\n{conflist}")
    return 0


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise CommandError(f"{what} needs root")


def _check_cidr(flag: str, value: str) -> None:
    try:
        ip_network(value)
    except ValueError as error:
        raise CommandError(f"{flag} {value}: {error}") from None


def _check_address(flag: str, value: str) -> None:
    if not value:
        return
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CommandError(f"{flag} {value!r} is not host:port")
