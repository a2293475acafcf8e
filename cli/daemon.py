"""`podwire daemon`."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.host import add_paths, need_root
from cli.output import CommandError
from cli.ranges import add_masquerade, add_node_ports, chosen

if TYPE_CHECKING:
    from ipam.pools import IpamConfig
    from node.syncer import SyncConfig

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

DESCRIPTION = """
Run the node daemon: it serves the CNI plugin on a unix socket, follows Kubernetes objects, and keeps
routes and the service proxy in the kernel as they say. It runs in the foreground and logs to standard
error. Stopping it (SIGTERM) leaves rules, routes and pods as they are; starting it adopts them.
"""

EXAMPLES = """
examples:
  podwire daemon --source /etc/podwire/manifests
      a folder of ordinary Node, Service and EndpointSlice YAML; a change counts at once
  podwire daemon --source DIR --node-name node1 --mode bridge --no-masquerade-cidr 10.0.0.0/8
  podwire daemon --source DIR --ipam-config /etc/podwire/ipam.yaml --masquerade ipv4
      pools, exclusions and reservations (docs/cni.md); IPv6 pods keep their address towards the outside
  podwire daemon --source DIR --mode flat --flat-addresses 192.168.50.100-192.168.50.140
      pods on the node's own subnet; the node answers for them on the interface that leads out
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "daemon",
        help="run the node daemon",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="folder of Kubernetes manifests"
    )
    parser.add_argument(
        "--node-name",
        default=socket.gethostname().lower(),
        help="this node's Node object (default: host name)",
    )
    _add_pods(parser)
    _add_services(parser)
    add_paths(parser)
    parser.add_argument(
        "--metrics-bind-address",
        default="127.0.0.1:10249",
        help='/metrics, /proxyMode (default: %(default)s; "" for none)',
    )
    parser.add_argument(
        "--healthz-bind-address",
        default="[::]:10256",
        help='/healthz, /livez (default: %(default)s; "" for none)',
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log every change")
    parser.set_defaults(run=run_daemon)


def _add_pods(parser: argparse.ArgumentParser) -> None:
    pods = parser.add_argument_group("pods")
    pods.add_argument(
        "--mode",
        choices=("routed", "bridge", "flat"),
        default="routed",
        help="how pods are connected: a route each, a bridge, or on the node's subnet (default: %(default)s)",
    )
    pods.add_argument("--mtu", type=int, help="MTU of pods in bytes (default: that of the way out)")
    pods.add_argument(
        "--ipam-config", type=Path, metavar="FILE", help="pools, exclusions, reservations (YAML)"
    )
    pods.add_argument(
        "--flat-addresses",
        action="append",
        default=[],
        metavar="RANGE",
        help="with --mode flat: the pods' addresses, an address, a-b, or a CIDR; can be repeated",
    )
    pods.add_argument(
        "--flat-interface",
        default="",
        metavar="NAME",
        help="with --mode flat: where the node answers for them (default: the interface that leads out)",
    )
    add_masquerade(pods)
    pods.add_argument(
        "--cni-conf-dir",
        type=Path,
        metavar="DIR",
        help="write the conflist there when pods can be connected (default: `podwire install` does)",
    )


def _add_services(parser: argparse.ArgumentParser) -> None:
    services = parser.add_argument_group("services")
    add_node_ports(services)
    services.add_argument(
        "--conntrack-tcp-be-liberal",
        action="store_true",
        help="let connection tracking pass TCP packets outside the window, which otherwise may reset a "
        "connection to a service (sets net.netfilter.nf_conntrack_tcp_be_liberal)",
    )


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon until it is stopped."""
    from ipam.ledger import LedgerError
    from node.daemon import Daemon, DaemonConfig

    need_root("the daemon")
    if not args.source.is_dir():
        raise CommandError(f"--source {args.source} is not a folder")
    if args.cni_conf_dir and args.cni_conf_dir.exists() and not args.cni_conf_dir.is_dir():
        raise CommandError(f"--cni-conf-dir {args.cni_conf_dir} is not a folder")
    for flag in ("metrics_bind_address", "healthz_bind_address"):
        _check_address(f"--{flag.replace('_', '-')}", getattr(args, flag))
    config = DaemonConfig(
        sync=_sync_config(args),
        source=args.source,
        state_dir=args.state_dir,
        socket=args.socket,
        metrics_address=args.metrics_bind_address,
        healthz_address=args.healthz_bind_address,
        cni_conf_dir=args.cni_conf_dir,
        tcp_be_liberal=args.conntrack_tcp_be_liberal,
    )
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format=LOG_FORMAT)
    try:
        return Daemon(config).run()
    except LedgerError as error:
        raise CommandError(str(error)) from None


def _sync_config(args: argparse.Namespace) -> SyncConfig:
    from cni.settings import Mode
    from node.syncer import SyncConfig

    ranges = chosen(args)
    if args.mtu is not None and not 576 <= args.mtu <= 65535:
        raise CommandError(f"--mtu {args.mtu} is not between 576 and 65535")
    return SyncConfig(
        node=args.node_name,
        mode=Mode(args.mode),
        mtu=args.mtu,
        no_masquerade=ranges.no_masquerade,
        masquerade=ranges.masquerade,
        ipam=_ipam_config(args),
        uplink=args.flat_interface,
        node_port_addresses=ranges.node_ports,
    )


def _ipam_config(args: argparse.Namespace) -> IpamConfig:
    """Return what the file says; in flat mode with a pool for everybody."""
    import yaml

    from ipam.pools import IpamConfig, Pool
    from ipam.ranges import RangeError, parse_range

    config = IpamConfig()
    if args.ipam_config:
        try:
            raw = yaml.safe_load(args.ipam_config.read_text())
            config = IpamConfig.parse({} if raw is None else raw)
        except (yaml.YAMLError, RangeError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise CommandError(f"--ipam-config {args.ipam_config}: {problem}") from None
    if args.mode != "flat":
        if args.flat_addresses or args.flat_interface:
            raise CommandError("--flat-addresses and --flat-interface need --mode flat")
        return config
    try:
        ranges = tuple(parse_range(text, "--flat-addresses") for text in args.flat_addresses)
        if not ranges and not config.pools:
            raise CommandError("--mode flat needs --flat-addresses, or pools in --ipam-config")
        everybody = (Pool("flat", ranges, ("*",)),) if ranges else ()
        return IpamConfig.from_json(replace(config, pools=(*config.pools, *everybody)).to_json())
    except RangeError as error:
        raise CommandError(str(error)) from None


def _check_address(flag: str, value: str) -> None:
    if not value:
        return
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CommandError(f"{flag} {value!r} is not host:port")
