"""Compare a pod interface with its plan and with what ADD answered (CHECK of the CNI specification).

Later plugins of a chain may have changed or added things; what counts is what podwire made and the final
result, prevResult, still has.
"""

from __future__ import annotations

from cni import bandwidth
from cni.settings import Mode
from cni.spec import Result
from cni.wiring import BRIDGE, PodLink, WiringError, namespace
from netlink import netns
from netlink.qdisc import tbfs
from netlink.rtnl import Rtnl


def check(link: PodLink, netns_path: str, expected: Result) -> None:
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
        _complain(bandwidth.host_problem(tbfs(rtnl), host.index, link.bandwidth, link.mtu))
    with namespace(netns_path) as pod:
        netns.run(pod, _check_pod, link, expected)


def _check_pod(link: PodLink, expected: Result) -> None:
    with Rtnl() as rtnl:
        inside = rtnl.link(link.ifname)
        if inside is None:
            raise WiringError(f"the pod's interface {link.ifname} is missing")
        if not inside.up:
            raise WiringError(f"the pod's interface {link.ifname} is down")
        present = {a.cidr for a in rtnl.addresses(inside.index)}
        routes = {(r.destination, r.gateway) for r in rtnl.routes()}
        limits = tbfs(rtnl)
        known = {(n.address, n.mac) for n in rtnl.neighbours() if n.index == inside.index}
    for address in link.addresses:
        if address.cidr not in present:
            raise WiringError(f"the address {address.cidr} is missing on the pod's interface {link.ifname}")
        if link.mode is not Mode.BRIDGE and (address.gateway, link.host_mac) not in known:
            raise WiringError(f"the neighbour entry of {address.gateway} is missing in the pod")
    gateways = {address.gateway for address in link.addresses}
    for wanted in expected.routes:
        if wanted.gw in gateways and (wanted.dst, wanted.gw) not in routes:
            raise WiringError(f"the route to {wanted.dst} by {wanted.gw} is missing in the pod")
    _complain(bandwidth.pod_problem(limits, inside.index, link.bandwidth, link.mtu))


def _complain(problem: str) -> None:
    if problem:
        raise WiringError(problem)
