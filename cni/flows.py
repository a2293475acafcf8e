"""Connections that a change of a host port makes stale.

A UDP client keeps its port, so its connection tracking entry lives as long as it sends: to a pod that is
gone, or to nobody, from before the port was mapped. TCP ends such connections by itself.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import partial

from netaddr import IPAddress

from ipam.ledger import HostPort
from netlink.conntrack import IPS_DST_NAT, Backend, Conntrack, Flow
from netlink.family import Family

TCP = 6


def forget_stale(host_ports: Iterable[HostPort], addresses: Iterable[IPAddress], *, served: bool) -> None:
    """Remove entries of a pod's host ports that lead elsewhere than to it or, when not `served`, to any pod.

    The kernel walks its whole table for each port and family, 10 ms or more: not for an ADD to wait for.
    """
    wanted = [port for port in host_ports if port.protocol != TCP]
    if not wanted:
        return
    with Conntrack() as entries:
        for port in wanted:
            for address in addresses:
                backends = frozenset({Backend(str(address), port.container_port)} if served else ())
                leads_elsewhere = partial(_stale, port, backends)
                family = Family(address.version)
                entries.delete_where(leads_elsewhere, family, port.protocol, port.host_port)


def _stale(port: HostPort, backends: frozenset[Backend], flow: Flow) -> bool:
    if Backend(flow.reply.source, flow.reply.sport) in backends:
        return False
    if not backends and not flow.status & IPS_DST_NAT:
        return False
    if port.host_ip in ("", "0.0.0.0", "::"):
        return _is_local(flow.family, flow.original.destination)
    return flow.original.destination == port.host_ip


def _is_local(family: Family, address: str) -> bool:
    """Whether an address is this node's: only then can a socket have it. Others may use the same port."""
    with socket.socket(family.af, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
