"""One pod interface: a pure plan of what is to exist, and its apply.

Routed mode: a veth pair, a host address on the pod's end, a gateway address that no interface carries,
and one host route per pod. Both ends know each other's MAC for good, so there is no ARP, no bridge and no
br_netfilter, and nothing to go stale when an address is used again. Flat mode is the same.
Bridge mode: the host's end is a port of `podwire0`, which carries the pod range's gateway.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from netaddr import IPAddress, IPNetwork

from cni import bandwidth, sysctls
from cni.options import Bandwidth
from cni.settings import Mode, NodeSettings
from ipam.ranges import gateway
from netlink import netns
from netlink.announce import announce
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
    route_add,
    route_replace,
    veth_add,
)
from netlink.rtnl import Rtnl

BRIDGE = "podwire0"
HOST_PREFIX = "pwpod"
"""What the name of every pod's host end begins with, and no other interface's: rules match it."""
BRIDGE_FILTERS = tuple(
    Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}") for name in ("iptables", "ip6tables")
)

READY_SECONDS, READY_POLL = 5.0, 0.001


class WiringError(Exception):
    """A pod interface is not as planned, or cannot be made so; the text is one sentence for the user."""


class NoNamespace(WiringError):
    """The pod's network namespace is not there."""


class InterfaceExists(WiringError):
    """The pod has an interface of that name already."""


class NotReady(WiringError):
    """The node lacks something that the daemon makes."""


@dataclass(frozen=True, slots=True)
class PodAddress:
    """An address of a pod: as on its interface (CIDR), its family, and the gateway it uses."""

    cidr: str
    ip: str
    family: Family
    gateway: str

    @property
    def default(self) -> str:
        """Everywhere, as a destination of this family."""
        return "0.0.0.0/0" if self.family is Family.V4 else "::/0"


@dataclass(frozen=True, slots=True)
class PodLink:
    """Everything that one pod interface consists of.

    `from_loopback` says that the node's own 127.0.0.1 leads to it, by a host port.
    """

    mode: Mode
    ifname: str
    host_ifname: str
    host_mac: str
    pod_mac: str
    mtu: int
    addresses: tuple[PodAddress, ...]
    bandwidth: Bandwidth | None = None
    from_loopback: bool = False


def host_ifname(container_id: str, ifname: str) -> str:
    """Return the name of the host's end: the same for the same pod interface, always (15 characters)."""
    return HOST_PREFIX + hashlib.sha1(f"{container_id}/{ifname}".encode()).hexdigest()[:10]


def mac_of(text: str) -> str:
    """Return a locally administered unicast MAC that depends on nothing but the text."""
    digest = hashlib.sha1(text.encode()).digest()
    return ":".join(f"{b:02x}" for b in (0x02, *digest[:5]))


def plan(
    container_id: str,
    ifname: str,
    addresses: tuple[IPAddress, ...],
    settings: NodeSettings,
    mac: str = "",
) -> PodLink:
    """Return what a pod interface is to look like; without a MAC asked for, it comes from the address.

    So a neighbour entry that outlives a pod is right for the next pod with that address too.
    Raises WiringError for an address that the node's bridge has no range for.
    """
    name = host_ifname(container_id, ifname)
    return PodLink(
        mode=settings.mode,
        ifname=ifname,
        host_ifname=name,
        host_mac=mac_of(name),
        pod_mac=mac or mac_of(str(addresses[0])),
        mtu=settings.mtu,
        addresses=tuple(_pod_address(a, settings) for a in addresses),
    )


def _pod_address(address: IPAddress, settings: NodeSettings) -> PodAddress:
    family = Family(address.version)
    if settings.mode is not Mode.BRIDGE:
        return PodAddress(f"{address}/{family.bits}", str(address), family, family.gateway)
    network = next((c for c in settings.pod_cidrs if address in c), None)
    if network is None:
        raise WiringError(f"the address {address} is in none of the node's podCIDRs, which mode bridge needs")
    return PodAddress(f"{address}/{network.prefixlen}", str(address), family, str(gateway(network)))


def attach(
    link: PodLink, netns_path: str, step: Callable[[str], None] = lambda _: None
) -> tuple[PodAddress, ...]:
    """Make a pod interface. On failure nothing of it is left. `step` is called after each step.

    Return the addresses by whose gateway the pod's default routes now go: a pod's second interface
    leaves the default route to the first. Raises NoNamespace, InterfaceExists, or NetlinkError for anything
    else that the kernel refuses.
    """
    with namespace(netns_path) as pod, Rtnl() as rtnl, contextlib.ExitStack() as undo:
        _make_veth(rtnl, link, pod)
        undo.callback(remove, link.host_ifname)
        step("link made")
        _configure_host(rtnl, link)
        step("host configured")
        routed = netns.run(pod, _configure_pod, link)
        step("pod configured")
        host = socket.if_nametoindex(link.host_ifname)
        _wait(partial(rtnl.passes, host), f"{link.host_ifname} passes no packets")
        undo.pop_all()
    return routed


def remove(name: str) -> None:
    """Remove a pod interface by its host end; the pod's end, the addresses and the routes go with it."""
    with Rtnl() as rtnl:
        try:
            rtnl.commit(link_delete(name))
        except NetlinkError as error:
            if not error.gone:
                raise


@contextlib.contextmanager
def namespace(path: str) -> Iterator[int]:
    """Open a pod's network namespace for the length of a block. Raises NoNamespace."""
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


def _make_veth(rtnl: Rtnl, link: PodLink, pod: int) -> None:
    veth = Veth(link.host_ifname, link.ifname, link.host_mac, link.pod_mac, pod, link.mtu)
    try:
        rtnl.commit(veth_add(veth))
    except NetlinkError as error:
        if not error.exists:
            raise
        where = f"the host has {link.host_ifname}" if rtnl.link(link.host_ifname) else "the pod has one"
        raise InterfaceExists(f"CNI_IFNAME {link.ifname} exists already: {where}") from error


def _configure_host(rtnl: Rtnl, link: PodLink) -> None:
    """Set up the host's side."""
    index = socket.if_nametoindex(link.host_ifname)
    limits = bandwidth.host_requests(index, link.bandwidth, link.mtu)
    if link.mode is Mode.BRIDGE:
        bridge = rtnl.link(BRIDGE)
        if bridge is None:
            raise NotReady(f"the bridge {BRIDGE} is missing: the daemon makes it")
        rtnl.commit(link_set(index, master=bridge.index), bridge_hairpin(index), *limits)
    else:
        rtnl.commit(*_host_requests(link, index), *limits)
    _sysctl("ipv6", link.host_ifname, "accept_ra", "0")
    if link.from_loopback:
        # Martian replies to 127.0.0.1 are let in from this one interface; that the pod itself sends there is
        # what the guard drops before anything else (CVE-2020-8558).
        _sysctl("ipv4", BRIDGE if link.mode is Mode.BRIDGE else link.host_ifname, "route_localnet", "1")


def _host_requests(link: PodLink, index: int) -> list[Request]:
    """Return the host's routes and neighbours. A route that is there means an address in use: refused."""
    requests = []
    for address in link.addresses:
        requests.append(route_add(Route(f"{address.ip}/{address.family.bits}", oif=index)))
        requests.append(neighbour_replace(index, address.ip, link.pod_mac))
    return requests


def _configure_pod(link: PodLink) -> tuple[PodAddress, ...]:
    """Set up the pod's side; runs in its namespace. Return the addresses that have the default route."""
    _sysctl("ipv6", link.ifname, "accept_ra", "0")
    if any(address.family is Family.V6 for address in link.addresses):
        for ifname in ("lo", link.ifname):  # runtimes that know IPv4 only set it
            _sysctl("ipv6", ifname, "disable_ipv6", "0")
    index = socket.if_nametoindex(link.ifname)
    requests = [link_up(index), *bandwidth.pod_requests(index, link.bandwidth, link.mtu)]
    for address in link.addresses:
        requests.append(address_add(index, address.cidr))
        if link.mode is not Mode.BRIDGE:
            requests.append(route_replace(Route(f"{address.gateway}/{address.family.bits}", oif=index)))
            requests.append(neighbour_replace(index, address.gateway, link.host_mac))
    defaults = [route_add(Route(a.default, gateway=a.gateway, oif=index)) for a in link.addresses]
    with Rtnl() as rtnl:
        refused = rtnl.attempt(*requests, *defaults)
        for request, failure in refused.items():
            if request not in defaults or not failure.exists:  # a default route that is there is another's
                raise failure
        _wait(partial(rtnl.passes, index), f"{link.ifname} of the pod passes no packets")
        for ip in (a.ip for a in link.addresses if a.family is Family.V6):
            _wait(partial(rtnl.owns, ip), f"the pod takes no packets to {ip}")
    routed = tuple(a for a, default in zip(link.addresses, defaults, strict=True) if default not in refused)
    if link.mode is Mode.BRIDGE:
        for address in link.addresses:
            # The bridge learns the port; nobody depends on it. Elsewhere there is nobody to tell.
            with contextlib.suppress(OSError):
                announce(link.ifname, address.ip, link.pod_mac)
    return routed


def _wait(is_so: Callable[[], bool], otherwise: str) -> None:
    """Wait for what the kernel does by itself after it has answered, in under a millisecond when idle.

    The runtime may use the pod as soon as ADD is answered. Raises WiringError.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise WiringError(f"{otherwise} after {READY_SECONDS:.0f} s")
        time.sleep(READY_POLL)


def _sysctl(family: str, ifname: str, name: str, value: str) -> None:
    """Set an interface's sysctl, `/proc/sys/net/FAMILY/conf/IFNAME/NAME`."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6 has no such file
        fd = os.open(f"/proc/sys/net/{family}/conf/{ifname}/{name}", os.O_WRONLY)
        try:
            os.write(fd, value.encode())
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
        # The bridge itself would follow a pod's router advertisement (CVE-2020-13401), and would look for
        # duplicates of its addresses when the first pod comes: two seconds without IPv6.
        for name in ("accept_ra", "accept_dad"):
            _sysctl("ipv6", BRIDGE, name, "0")
        index = socket.if_nametoindex(BRIDGE)
        present = {a.cidr for a in rtnl.addresses(index)}
        wanted = [f"{gateway(c)}/{c.prefixlen}" for c in cidrs]
        rtnl.commit(*(address_add(index, a) for a in wanted if a not in present))
    try:
        for file in BRIDGE_FILTERS:
            sysctls.put(file, "1")
    except OSError:
        return [
            "mode bridge needs the kernel's br_netfilter, which is not there: "
            "services will fail between pods of this node; load it, or use mode routed"
        ]
    return []
