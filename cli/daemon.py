"""`podwire daemon`."""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.host import need_root
from cli.options import add_all, config_path, configuration, given, refuse
from cli.output import CommandError
from cli.ranges import ranges
from node.config import DEFAULT_PATH, ConfigError, ipam_of
from node.config_keys import KUBERNETES, Configuration

if TYPE_CHECKING:
    from node.daemon import DaemonConfig
    from node.syncer import SyncConfig

DESCRIPTION = """
Run the node daemon: it serves the CNI plugin on a unix socket, follows Kubernetes objects, and keeps
routes and the service proxy in the kernel as they say. It runs in the foreground and logs to standard
error. Stopping it (SIGTERM) leaves rules, routes and pods as they are; starting it adopts them.

What it does is in a configuration file; each flag counts over what the file says, and a list given by flags
replaces the file's. SIGHUP has the file read again: what needs no restart counts at once, of the rest the log
says that it needs one, and a file with a mistake changes nothing. docs/configuration.md lists all keys.
"""

EXAMPLES = """
examples:
  podwire daemon
      everything is in /etc/podwire/config.yaml; `podwire config check` looks for mistakes in it
  podwire daemon --source kubernetes --kubeconfig /etc/podwire/kubeconfig
  podwire daemon --source kubernetes --kubernetes-api-override https://192.168.0.10:6443
      in a pod, with its service account; the API server's own address, as services are not there yet
  podwire daemon --source kubernetes --cluster-cidr 10.244.0.0/16,fd00:10:244::/48
      no controller allocates podCIDRs: the nodes agree on them among themselves
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
    add_all(parser)
    parser.set_defaults(run=functools.partial(run_daemon, parser))


def run_daemon(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the daemon until it is stopped."""
    from node.notify import Notifier

    if config_path(args) is None and "source" not in given(args):
        parser.error(f"--source is required, or {DEFAULT_PATH}")
    need_root("the daemon")
    try:
        return _run(args)
    except CommandError as error:
        # While a unit waits for its next start, `systemctl status` shows this and nothing of the journal.
        Notifier().status(str(error))
        raise


def _run(args: argparse.Namespace) -> int:
    from ipam.ledger import LedgerError
    from node import logs
    from node.daemon import Daemon

    try:
        found = configuration(args)
        _check_places(found)
        config = _daemon_config(found, args)
    except ConfigError as error:
        raise refuse(error) from None
    logs.setup(found.logs.format, found.logs.level)
    faulthandler.enable()  # a watchdog's SIGABRT, too, says where every thread stood
    try:
        return Daemon(config).run()
    except LedgerError as error:
        raise CommandError(str(error)) from None


def load(args: argparse.Namespace) -> DaemonConfig:
    """Return what file and flags say now; to be called again for a reload. Raises ConfigError."""
    return _daemon_config(configuration(args), args)


def _daemon_config(found: Configuration, args: argparse.Namespace) -> DaemonConfig:
    from node.daemon import DaemonConfig

    if not found.source:
        path = config_path(args) or DEFAULT_PATH
        raise ConfigError(
            f"{path}: source is missing: {KUBERNETES}, or a folder of manifests; or give --source"
        )
    conf_dir = found.pods.cni_conf_dir
    values: dict[str, Any] = {
        "sync": _sync_config(found),
        "source": None if found.source == KUBERNETES else Path(found.source),
        "state_dir": Path(found.paths.state_dir),
        "socket": Path(found.paths.socket),
        "metrics_address": found.metrics.bind_address,
        "healthz_address": found.healthz.bind_address,
        "cni_conf_dir": Path(conf_dir) if conf_dir else None,
        "l7": _l7_settings(found),
        "kubernetes": _kubernetes_config(found),
        "configuration": found,
        "log_format": found.logs.format,
        "reload": functools.partial(load, args),
    }
    known = {field.name for field in dataclasses.fields(DaemonConfig)}
    return DaemonConfig(**{name: value for name, value in values.items() if name in known})


def _l7_settings(found: Configuration) -> Any:
    if not found.l7.enabled:
        return None
    from proxy.l7.render import Settings

    l7 = found.l7
    return Settings(
        directory=Path(found.paths.socket).parent / "l7",
        port=l7.port,
        threads=l7.threads,
        max_connections=l7.max_connections,
        drain_seconds=l7.drain_seconds,
        sample=l7.sample,
        access_log=Path(l7.access_log) if l7.access_log else None,
    )


def _kubernetes_config(found: Configuration) -> Any:
    if found.source != KUBERNETES:
        return None
    from node.sources.kubernetes import KubernetesConfig

    api = found.kubernetes
    return KubernetesConfig(
        kubeconfig=Path(api.kubeconfig) if api.kubeconfig else None,
        api_override=api.api_override,
        namespace=api.namespace,
        cluster_cidrs=api.cluster_cidrs,
        mask_sizes=(api.node_cidr_mask_size, api.node_cidr_mask_size_ipv6),
    )


def _sync_config(found: Configuration) -> SyncConfig:
    from cni.settings import Mode
    from node.backends.hops import TunnelConfig
    from node.syncer import SyncConfig
    from node.wireguard_keys import FOLDER

    wanted, network = ranges(found), found.network
    return SyncConfig(
        node=found.node_name or socket.gethostname().lower(),
        mode=Mode(found.pods.mode),
        mtu=found.pods.mtu,
        no_masquerade=wanted.no_masquerade,
        masquerade=wanted.masquerade,
        ipam=ipam_of(found),
        uplink=found.pods.flat_interface,
        node_port_addresses=wanted.node_ports,
        backend=network.backend,
        network_mtu=network.mtu,
        tunnel=TunnelConfig(network.vxlan_port, network.vxlan_id, network.wireguard_port),
        egress=found.pods.egress_addresses,
        dataplane=found.services.mode,
        ipvs_scheduler=found.services.ipvs_scheduler,
        tcp_be_liberal=found.services.conntrack_tcp_be_liberal,
        l7_port=found.l7.port,
        key_dir=Path(found.paths.state_dir) / FOLDER,
        rotate_days=network.wireguard_rotate_days,
    )


def _check_places(found: Configuration) -> None:
    """Raise CommandError for a place that has to be there and is not: now, not after minutes of retries."""
    if found.source not in ("", KUBERNETES) and not Path(found.source).is_dir():
        raise CommandError(f"--source {found.source} is not a folder")
    kubeconfig, conf_dir = found.kubernetes.kubeconfig, Path(found.pods.cni_conf_dir)
    if found.source == KUBERNETES and kubeconfig and not Path(kubeconfig).is_file():
        raise CommandError(f"--kubeconfig {kubeconfig} is not a file")
    if found.pods.cni_conf_dir and conf_dir.exists() and not conf_dir.is_dir():
        raise CommandError(f"--cni-conf-dir {conf_dir} is not a folder")
