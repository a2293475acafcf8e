"""One pod interface: a pure plan of what is to exist, its apply, and the check that it does.

Routed mode: a veth pair, a host address on the pod's end, a gateway address that no interface carries,
and one host route per pod. Both ends know each other's MAC for good, so there is no ARP, no bridge and no
br_netfilter, and nothing to go stale when an address is used again.
Bridge mode: the host's end is a port of `podwire0`, which carries the pod range's gateway.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from netaddr import IPAddress, IPNetwork

from ipam.ranges import gateway
from netlink import netns
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import (
    Request,
    Route,
    Veth,
    address_add,
    bridge_add,
    bridge_hairpin,
    link_delete,
    link_set,
    link_up,
    neighbour_replace,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl

BRIDGE = "podwire0"
BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


class WiringError(Exception):
    """A pod interface is not as planned, or cannot be made so; the text is one sentence for the user."""


class NoNamespace(WiringError):
    """The pod's network namespace is not there."""


class InterfaceExists(WiringError):
    """The pod has an interface of that name already."""


class NotReady(WiringError):
    """The node lacks something that the daemon makes."""


class Mode(StrEnum):
    """How pods are connected to their node."""

    ROUTED = "routed"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What a node's pods have in common; kept in the ledger so that it is known while the daemon is down."""

    mode: Mode
    mtu: int
    pod_cidrs: tuple[IPNetwork, ...]

    def to_mapping(self) -> dict[str, str]:
        """Return the settings as the ledger keeps them."""
        return {
            "mode": self.mode.value,
            "mtu": str(self.mtu),
            "pod_cidrs": " ".join(map(str, self.pod_cidrs)),
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> NodeSettings | None:
        """Return the settings that the ledger holds; None when the daemon has never saved any."""
        if not values.get("pod_cidrs"):
            return None
        cidrs = tuple(IPNetwork(c) for c in values["pod_cidrs"].split())
        return cls(Mode(values["mode"]), int(values["mtu"]), cidrs)


@dataclass(frozen=True, slots=True)
class PodAddress:
    """An address of a pod: as on its interface (CIDR), its family, and the gateway it uses."""

    cidr: str
    ip: str
    family: Family
    gateway: str


@dataclass(frozen=True, slots=True)
class PodLink:
    """Everything that one pod interface consists of."""

    mode: Mode
    ifname: str
    host_ifname: str
    host_mac: str
    pod_mac: str
    mtu: int
    addresses: tuple[PodAddress, ...]


def host_ifname(container_id: str, ifname: str) -> str:
    """Return the name of the host's end: the same for the same pod interface, always (14 characters)."""
    return "pw" + hashlib.sha1(f"{container_id}/{ifname}".encode()).hexdigest()[:12]


def mac_of(text: str) -> str:
    """Return a locally administered unicast MAC that depends on nothing but the text."""
    digest = hashlib.sha1(text.encode()).digest()
    return ":".join(f"{b:02x}" for b in (0x02, *digest[:5]))


def plan(container_id: str, ifname: str, addresses: tuple[IPAddress, ...], settings: NodeSettings) -> PodLink:
    """Return what a pod interface is to look like.

    The pod's MAC comes from its address, so a neighbour entry that outlives a pod is right for the next
    pod with that address too.
    """
    name = host_ifname(container_id, ifname)
    return PodLink(
        mode=settings.mode,
        ifname=ifname,
        host_ifname=name,
        host_mac=mac_of(name),
        pod_mac=mac_of(str(addresses[0])),
        mtu=settings.mtu,
        addresses=tuple(_pod_address(a, settings) for a in addresses),
    )


def _pod_address(address: IPAddress, settings: NodeSettings) -> PodAddress:
    family = Family(address.version)
    if settings.mode is Mode.ROUTED:
        return PodAddress(f"{address}/{family.bits}", str(address), family, family.gateway)
    network = next(c for c in settings.pod_cidrs if address in c)
    return PodAddress(f"{address}/{network.prefixlen}", str(address), family, str(gateway(network)))


def attach(link: PodLink, netns_path: str, step: Callable[[str], None] = lambda _: None) -> None:
    """Make a pod interface. On failure nothing of it is left. `step` is called after each step.

    Raises NoNamespace, InterfaceExists, or NetlinkError for anything else that the kernel refuses.
    """
    with _namespace(netns_path) as pod, contextlib.ExitStack() as undo:
        _make_veth(link, pod)
        undo.callback(remove, link.host_ifname)
        step("link made")
        _configure_host(link)
        step("host configured")
        netns.run(pod, _configure_pod, link)
        step("pod configured")
        undo.pop_all()


def remove(name: str) -> None:
    """Remove a pod interface by its host end; the pod's end, the addresses and the routes go with it."""
    with Rtnl() as rtnl:
        try:
            rtnl.commit(link_delete(name))
        except NetlinkError as error:
            if not error.gone:
                raise


@contextlib.contextmanager
def _namespace(path: str) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(netns.opened(path))
        except OSError as error:
            raise NoNamespace(f"CNI_NETNS {path} cannot be opened: {error.strerror}") from error
        if not netns.is_namespace(fd):
            raise NoNamespace(f"CNI_NETNS {path} is not a network namespace")
        if netns.is_here(fd):
            raise NoNamespace(f"CNI_NETNS {path} is the node's own network namespace")
        yield fd


def _make_veth(link: PodLink, pod: int) -> None:
    veth = Veth(link.host_ifname, link.ifname, link.host_mac, link.pod_mac, pod, link.mtu)
    with Rtnl() as rtnl:
        try:
            rtnl.commit(veth_add(veth))
        except NetlinkError as error:
            if not error.exists:
                raise
            where = f"the host has {link.host_ifname}" if rtnl.link(link.host_ifname) else "the pod has one"
            raise InterfaceExists(f"CNI_IFNAME {link.ifname} exists already: {where}") from error


def _configure_host(link: PodLink) -> None:
    """Set up the host's side."""
    index = socket.if_nametoindex(link.host_ifname)
    with Rtnl() as rtnl:
        if link.mode is Mode.BRIDGE:
            bridge = rtnl.link(BRIDGE)
            if bridge is None:
                raise NotReady(f"the bridge {BRIDGE} is missing: the daemon makes it")
            rtnl.commit(link_set(index, master=bridge.index), bridge_hairpin(index))
        else:
            rtnl.commit(*_host_requests(link, index))
    _refuse_router_advertisements(link.host_ifname)


def _host_requests(link: PodLink, index: int) -> list[Request]:
    requests = []
    for address in link.addresses:
        requests.append(route_replace(Route(f"{address.ip}/{address.family.bits}", oif=index)))
        requests.append(neighbour_replace(index, address.ip, link.pod_mac))
    return requests


def _configure_pod(link: PodLink) -> None:
    """Set up the pod's side; runs in its namespace."""
    _refuse_router_advertisements(link.ifname)
    index = socket.if_nametoindex(link.ifname)
    requests = [link_up(index)]
    for address in link.addresses:
        requests.append(address_add(index, address.cidr))
        if link.mode is Mode.ROUTED:
            requests.append(route_replace(Route(f"{address.gateway}/{address.family.bits}", oif=index)))
            requests.append(neighbour_replace(index, address.gateway, link.host_mac))
        default = "0.0.0.0/0" if address.family is Family.V4 else "::/0"
        requests.append(route_replace(Route(default, gateway=address.gateway, oif=index)))
    with Rtnl() as rtnl:
        rtnl.commit(*requests)


def _refuse_router_advertisements(ifname: str) -> None:
    """Keep a pod from steering anybody's IPv6 traffic (CVE-2020-13401)."""
    with contextlib.suppress(OSError):  # a kernel without IPv6 has no such file
        fd = os.open(f"/proc/sys/net/ipv6/conf/{ifname}/accept_ra", os.O_WRONLY)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def ensure_bridge(cidrs: tuple[IPNetwork, ...]) -> list[str]:
    """Make `podwire0` with the pod ranges' gateways, as far as it is not there; return what is wrong with it.

    A bridge needs br_netfilter: without it, the reply of a service's pod on the same bridge reaches the
    client without address translation (kubernetes#24019).
    """
    with Rtnl() as rtnl:
        if rtnl.link(BRIDGE) is None:
            rtnl.commit(bridge_add(BRIDGE, mac_of(str(cidrs[0]))))
        index = socket.if_nametoindex(BRIDGE)
        present = {a.cidr for a in rtnl.addresses(index)}
        wanted = [f"{gateway(c)}/{c.prefixlen}" for c in cidrs]
        rtnl.commit(*(address_add(index, a) for a in wanted if a not in present))
    try:
        BRIDGE_FILTER.write_text("1")
    except OSError:
        return [
            "mode bridge needs the kernel's br_netfilter, which is not there: "
            "services will fail between pods of this node; load it, or use mode routed"
        ]
    return []


def check(link: PodLink, netns_path: str) -> None:
    """Raise WiringError naming the first thing that is not as planned."""
    with Rtnl() as rtnl:
        host = rtnl.link(link.host_ifname)
        if host is None:
            raise WiringError(f"the host interface {link.host_ifname} is missing")
        if not host.up:
            raise WiringError(f"the host interface {link.host_ifname} is down")
        if link.mode is Mode.BRIDGE:
            bridge = rtnl.link(BRIDGE)
            if bridge is None or host.master != bridge.index:
                raise WiringError(f"the host interface {link.host_ifname} is not a port of {BRIDGE}")
        else:
            for address in link.addresses:
                route = rtnl.route_to(address.ip)
                if route is None or route.oif != host.index:
                    raise WiringError(f"the host route to {address.ip} is missing")
    with _namespace(netns_path) as pod:
        netns.run(pod, _check_pod, link)


def _check_pod(link: PodLink) -> None:
    with Rtnl() as rtnl:
        inside = rtnl.link(link.ifname)
        if inside is None:
            raise WiringError(f"the pod's interface {link.ifname} is missing")
        if not inside.up:
            raise WiringError(f"the pod's interface {link.ifname} is down")
        present = {a.cidr for a in rtnl.addresses(inside.index)}
        defaults = {r.gateway for r in rtnl.routes() if r.destination.endswith("/0")}
        known = {(n.address, n.mac) for n in rtnl.neighbours() if n.index == inside.index}
        for address in link.addresses:
            if address.cidr not in present:
                raise WiringError(
                    f"the address {address.cidr} is missing on the pod's interface {link.ifname}"
                )
            if address.gateway not in defaults:
                raise WiringError(f"the default route by {address.gateway} is missing in the pod")
            if link.mode is Mode.ROUTED and (address.gateway, link.host_mac) not in known:
                raise WiringError(f"the neighbour entry of {address.gateway} is missing in the pod")
