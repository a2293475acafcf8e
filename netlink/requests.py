"""Requests to change links, addresses, routes, rules, neighbours and forwarding entries, as values.

Each function is a verb; it encodes one message and does nothing. `Rtnl.commit` sends any number of them in
one write. Every ADD needs about ten, so they are packed here: pyroute2's classes take 0.1 to 0.2 ms each.
Source of all numbers: linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h, fib_rules.h, veth.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from socket import AF_INET, AF_INET6, inet_pton

from netlink.attributes import attribute, nested, text
from netlink.family import Family
from netlink.messages import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

IFF_UP = 1
IFA_F_NODAD = 0x02
FOREVER = 0xFFFFFFFF
AF_BRIDGE = 7
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_PROXY = 0x02, 0x08
RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_HOST = 0, 253, 254
RTNH_F_ONLINK = 4
RTAX_MTU = 2
FR_ACT_TO_TBL = 1
VXLAN_DF_SET = 1

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER, IFLA_BRPORT_MODE = 1, 4
IFLA_VXLAN_ID, IFLA_VXLAN_LOCAL, IFLA_VXLAN_TTL, IFLA_VXLAN_LEARNING = 1, 4, 5, 7
IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_DF = 15, 17, 29
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 4, 6, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 6, 7, 8
RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 9, 15, 18
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL = 2, 6, 15, 21

LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBi")  # struct ifaddrmsg: family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family to type as below, flags
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
RULE = struct.Struct("=BBBBBxxBI")  # struct fib_rule_hdr: family, prefix lengths, TOS, table, action, flags

ROUTE_PROTOCOL = 112
"""The number our routes carry (`ip route show proto 112`), so that a diff never sees anybody else's."""

LAST = 4096
"""The metric of unreachable routes: whatever else leads to that range comes first, be it the route of another
program's bridge that was made later. The kernel puts a route behind others of the same metric."""


def _number(kind: int, value: int) -> bytes:
    """Encode a 32-bit number in host order, as route netlink has them all."""
    return attribute(kind, struct.pack("=I", value))


ONE_QUEUE = _number(IFLA_NUM_TX_QUEUES, 1) + _number(IFLA_NUM_RX_QUEUES, 1)
"""A veth uses one queue unless told otherwise, but the kernel makes one for each CPU: 0.1 ms on two CPUs."""


@dataclass(frozen=True, slots=True)
class Request:
    """One change: message type, flags and body, and the sentence fragment that an error names it by."""

    what: str
    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Veth:
    """A veth pair: one end here, the other end in the namespace open as `peer_netns` (None: here too)."""

    name: str
    peer: str
    mac: str | None = None
    peer_mac: str | None = None
    peer_netns: int | None = None
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route, or an unreachable one when it has neither gateway nor interface.

    `destination` is a CIDR; `oif` an interface index; `onlink` trusts that the gateway is on `oif`. An IPv4
    route may have an IPv6 gateway (Linux 5.2). `mtu` is in bytes, 0: the interface's. `source` is the address
    that the node's own packets come from, "": the kernel chooses. `metric` 0 is the usual one (`priority`).

    Read back, a route that names its interface is equal to what was written. (An unreachable IPv4 route of
    somebody else's without a metric reads like one of the usual metric.)
    """

    destination: str
    gateway: str | None = None
    oif: int | None = None
    onlink: bool = False
    protocol: int = ROUTE_PROTOCOL
    mtu: int = 0
    source: str = ""
    table: int = RT_TABLE_MAIN
    metric: int = 0

    @property
    def unreachable(self) -> bool:
        """Whether packets to the destination are refused here."""
        return self.gateway is None and self.oif is None

    @property
    def priority(self) -> int:
        """The metric as the kernel has it: the route with the lowest counts."""
        return self.metric or usual_metric(":" in self.destination, self.unreachable)


def usual_metric(ipv6: bool, unreachable: bool) -> int:
    """Return the metric of a route that says none: IPv6 has no 0 (IP6_RT_PRIO_USER)."""
    return LAST if unreachable else 1024 if ipv6 else 0


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN device without a remote: all that it knows is its forwarding entries.

    `local` is the source address of its packets, IPv4 or IPv6; the device has remotes of that family only.
    `mtu` is the inner one, in bytes. `plain` is False for a device (not ours) that has options beyond
    these: a default remote, a control plane elsewhere, extensions of the header.
    """

    name: str
    vni: int
    port: int
    local: str
    mac: str
    mtu: int
    ttl: int = 64
    learning: bool = False
    df: bool = True
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule (`ip rule`): packets from `source` (CIDR) look into `table` first."""

    source: str
    table: int
    priority: int


def veth_add(veth: Veth) -> Request:
    """Make a veth pair, this end up, with MAC addresses set at creation (systemd rewrites later ones)."""
    peer = _link(name=veth.peer, mac=veth.peer_mac, mtu=veth.mtu) + ONE_QUEUE
    if veth.peer_netns is not None:
        peer += _number(IFLA_NET_NS_FD, veth.peer_netns)
    info = text(IFLA_INFO_KIND, "veth") + nested(IFLA_INFO_DATA, nested(VETH_INFO_PEER, peer))
    body = _link(up=True, name=veth.name, mac=veth.mac, mtu=veth.mtu) + ONE_QUEUE
    body += nested(IFLA_LINKINFO, info)
    return Request(
        f"add the veth pair {veth.name}, {veth.peer}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body
    )


def vxlan_add(vxlan: Vxlan) -> Request:
    """Make a VXLAN device and bring it up.

    Outer UDP checksums stay as the kernel has them, which is present for IPv4 and IPv6 alike: network cards
    compute them, and a receiver merges packets by them (GRO). DF (Linux 5.0) says something over IPv4 only;
    IPv6 routers never fragment.
    """
    local = ip_address(vxlan.local)
    data = nested(
        IFLA_INFO_DATA,
        _number(IFLA_VXLAN_ID, vxlan.vni),
        attribute(IFLA_VXLAN_LOCAL if local.version == 4 else IFLA_VXLAN_LOCAL6, local.packed),
        attribute(IFLA_VXLAN_PORT, struct.pack(">H", vxlan.port)),
        attribute(IFLA_VXLAN_TTL, bytes([vxlan.ttl])),
        attribute(IFLA_VXLAN_LEARNING, bytes([vxlan.learning])),
        attribute(IFLA_VXLAN_DF, bytes([VXLAN_DF_SET if vxlan.df else 0])),
    )
    body = _link(up=True, name=vxlan.name, mac=vxlan.mac, mtu=vxlan.mtu)
    body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "vxlan"), data)
    return Request(f"add the VXLAN device {vxlan.name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def wireguard_add(name: str, mtu: int) -> Request:
    """Make a WireGuard device, down: it takes its UDP port when it comes up (netlink.wireguard)."""
    body = _link(name=name, mtu=mtu) + nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "wireguard"))
    return Request(f"add the WireGuard device {name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def bridge_add(name: str, mac: str | None = None) -> Request:
    """Make a bridge and bring it up."""
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"))
    body = _link(up=True, name=name, mac=mac) + info
    return Request(f"add the bridge {name}", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def link_up(index: int) -> Request:
    """Bring an interface up."""
    return Request(f"bring up interface {index}", RTM_NEWLINK, 0, _link(index, up=True))


def link_set(
    index: int,
    *,
    master: int | None = None,
    mtu: int | None = None,
    name: str | None = None,
    mac: str | None = None,
) -> Request:
    """Set what is given: the bridge it belongs to (index, 0 for none), the MTU in bytes, name, MAC."""
    body = _link(index, name=name, mtu=mtu, mac=mac)
    if master is not None:
        body += _number(IFLA_MASTER, master)
    return Request(f"change interface {index}", RTM_NEWLINK, 0, body)


def bridge_hairpin(index: int) -> Request:
    """Let a bridge port send a frame back to where it came from (hairpin mode, IFLA_BRPORT_MODE).

    That is what a pod needs which reaches itself through a service. The interface must be a port already.
    """
    mode = nested(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, b"\1"))
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_SLAVE_KIND, "bridge"), mode)
    return Request(f"set hairpin mode on bridge port {index}", RTM_NEWLINK, 0, _link(index) + info)


def link_delete(name: str) -> Request:
    """Remove an interface by name."""
    return Request(f"remove interface {name}", RTM_DELLINK, 0, _link(name=name))


def address_add(index: int, address: str, *, passive: bool = False) -> Request:
    """Give an interface an address (CIDR). IPv6 without duplicate address detection, which costs 1-2 s.

    A passive one is answered for and never chosen as a source by itself: IPv4 has scope host for that, IPv6
    deprecated addresses.
    """
    value = ip_interface(address)
    family = Family(value.version)
    body = _address(index, value, RT_SCOPE_HOST if passive and family is Family.V4 else RT_SCOPE_UNIVERSE)
    if family is Family.V6:
        body += _number(IFA_FLAGS, IFA_F_NODAD)
        if passive:
            body += attribute(IFA_CACHEINFO, struct.pack("=4I", 0, FOREVER, 0, 0))  # preferred, valid
    elif value.network.prefixlen < family.bits - 1:
        body += attribute(IFA_BROADCAST, value.network.broadcast_address.packed)
    what = f"add address {address} to interface {index}"
    return Request(what, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body)


def address_delete(index: int, address: str) -> Request:
    """Take an address (CIDR) from an interface."""
    body = _address(index, ip_interface(address))
    return Request(f"remove address {address} from interface {index}", RTM_DELADDR, 0, body)


def _address(index: int, value: IPv4Interface | IPv6Interface, scope: int = RT_SCOPE_UNIVERSE) -> bytes:
    family = Family(value.version)
    body = ADDRESS.pack(family.af, value.network.prefixlen, 0, scope, index)
    body += attribute(IFA_ADDRESS, value.ip.packed)
    return body + attribute(IFA_LOCAL, value.ip.packed) if family is Family.V4 else body


def route_replace(route: Route) -> Request:
    """Add a route, or replace the one to the same destination (in its table, of the same metric)."""
    what = f"set the route to {route.destination}"
    return Request(what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route) + _details(route))


def route_add(route: Route) -> Request:
    """Add a route; one to the same destination (and of the same metric) is an error that `exists`."""
    what = f"add the route to {route.destination}"
    return Request(what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _route(route) + _details(route))


def route_delete(route: Route) -> Request:
    """Remove a route; whatever its metric is, unless it says one. Its MTU and source do not matter."""
    body = _route(route) + (_number(RTA_PRIORITY, route.metric) if route.metric else b"")
    return Request(f"remove the route to {route.destination}", RTM_DELROUTE, 0, body)


def rule_add(rule: Rule) -> Request:
    """Add a policy rule; one that is there already is an error that `exists`."""
    what = f"add the rule from {rule.source} to table {rule.table}"
    return Request(what, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _rule(rule))


def rule_delete(rule: Rule) -> Request:
    """Remove a policy rule of ours."""
    return Request(f"remove the rule from {rule.source} to table {rule.table}", RTM_DELRULE, 0, _rule(rule))


def _rule(rule: Rule) -> bytes:
    network = ip_network(rule.source)
    table = rule.table if rule.table < 256 else 0
    body = RULE.pack(Family(network.version).af, 0, network.prefixlen, 0, table, FR_ACT_TO_TBL, 0)
    body += attribute(FRA_SRC, network.network_address.packed) + _number(FRA_PRIORITY, rule.priority)
    return body + _number(FRA_TABLE, rule.table) + attribute(FRA_PROTOCOL, bytes([ROUTE_PROTOCOL]))


def neighbour_replace(index: int, address: str, mac: str) -> Request:
    """Fix which MAC an address on an interface has, for good: no ARP or ND, nothing to go stale."""
    af, packed = _packed(address)
    body = NEIGHBOUR.pack(af, index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, packed) + attribute(NDA_LLADDR, _mac(mac))
    return Request(f"set neighbour {address}", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def neighbour_delete(index: int, address: str) -> Request:
    """Forget which MAC an address on an interface has."""
    af, packed = _packed(address)
    body = NEIGHBOUR.pack(af, index, 0, 0, 0) + attribute(NDA_DST, packed)
    return Request(f"remove neighbour {address}", RTM_DELNEIGH, 0, body)


def fdb_replace(index: int, mac: str, address: str) -> Request:
    """Have a VXLAN device send frames for a (unicast) MAC to an address, instead of where it did before."""
    what = f"send frames for {mac} to {address}"
    return Request(what, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _forwarding(index, mac, address))


def fdb_delete(index: int, mac: str, address: str) -> Request:
    """Have a VXLAN device send no more frames for a MAC to an address."""
    what = f"stop sending frames for {mac} to {address}"
    return Request(what, RTM_DELNEIGH, 0, _forwarding(index, mac, address))


def _forwarding(index: int, mac: str, address: str) -> bytes:
    body = NEIGHBOUR.pack(AF_BRIDGE, index, NUD_PERMANENT | NUD_NOARP, NTF_SELF, 0)
    return body + attribute(NDA_LLADDR, _mac(mac)) + attribute(NDA_DST, _packed(address)[1])


def proxy_add(index: int, address: str) -> Request:
    """Answer ARP or neighbour solicitations for an address on an interface (`ip neigh add proxy`)."""
    return Request(
        f"answer for {address}", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _proxy(index, address)
    )


def proxy_delete(index: int, address: str) -> Request:
    """Answer no more for an address on an interface."""
    return Request(f"stop answering for {address}", RTM_DELNEIGH, 0, _proxy(index, address))


def proxy_query() -> bytes:
    """Return the body that asks for all proxy entries."""
    return NEIGHBOUR.pack(0, 0, 0, NTF_PROXY, 0)


def neighbour_query(index: int | None = None) -> bytes:
    """Return the body that asks for all neighbour entries, or those of an interface."""
    body = NEIGHBOUR.pack(0, 0, 0, 0, 0)
    return body if index is None else body + _number(NDA_IFINDEX, index)


def forwarding_query(index: int) -> bytes:
    """Return the body that asks for the forwarding entries of an interface.

    It is named twice: kernels without strict checks (before 4.20) look into the header.
    """
    return NEIGHBOUR.pack(AF_BRIDGE, index, 0, 0, 0) + _number(NDA_IFINDEX, index)


def address_query(index: int | None = None) -> bytes:
    """Return the body that asks for all addresses, or those of an interface."""
    return ADDRESS.pack(0, 0, 0, 0, index or 0)


def routes_query(table: int, protocol: int | None = None) -> bytes:
    """Return the body that asks for the routes of a table, or those of a protocol in it."""
    head = ROUTE.pack(0, 0, 0, 0, table if table < 256 else 0, protocol or 0, 0, 0, 0)
    return head if table < 256 else head + _number(RTA_TABLE, table)


def _proxy(index: int, address: str) -> bytes:
    af, packed = _packed(address)
    return NEIGHBOUR.pack(af, index, NUD_PERMANENT, NTF_PROXY, 0) + attribute(NDA_DST, packed)


def link_query(index: int) -> bytes:
    """Return the body that asks for one interface."""
    return _link(index)


def route_query(address: str) -> bytes:
    """Return the body that asks which route the kernel takes to an address."""
    ip = ip_address(address)
    family = Family(ip.version)
    return ROUTE.pack(family.af, family.bits, 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, ip.packed)


def _link(
    index: int = 0,
    *,
    up: bool = False,
    name: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
) -> bytes:
    change = IFF_UP if up else 0
    body = LINK.pack(0, 0, index, change, change)
    if name is not None:
        body += text(IFLA_IFNAME, name)
    if mac is not None:
        body += attribute(IFLA_ADDRESS, _mac(mac))
    if mtu is not None:
        body += _number(IFLA_MTU, mtu)
    return body


def _route(route: Route) -> bytes:
    """Encode what identifies a route."""
    network, _, length = route.destination.partition("/")
    af, destination = _packed(network)
    bits = int(length) if length else len(destination) * 8
    body = ROUTE.pack(
        af,
        bits,
        0,
        0,
        route.table if route.table < 256 else 0,
        route.protocol,
        RT_SCOPE_LINK if route.gateway is None and route.oif is not None else RT_SCOPE_UNIVERSE,
        RTN_UNREACHABLE if route.unreachable else RTN_UNICAST,
        RTNH_F_ONLINK if route.onlink else 0,
    )
    if route.table > 255:
        body += _number(RTA_TABLE, route.table)
    if bits:
        body += attribute(RTA_DST, destination)
    if route.gateway is not None:
        via, gateway = _packed(route.gateway)
        if via == af:
            body += attribute(RTA_GATEWAY, gateway)
        else:
            body += attribute(RTA_VIA, struct.pack("=H", via) + gateway)
    if route.oif is not None:
        body += _number(RTA_OIF, route.oif)
    return body


def _details(route: Route) -> bytes:
    """Encode what a route says beyond its way."""
    body = _number(RTA_PRIORITY, route.priority) if route.priority else b""
    if route.mtu:
        body += nested(RTA_METRICS, _number(RTAX_MTU, route.mtu))
    if route.source:
        body += attribute(RTA_PREFSRC, _packed(route.source)[1])
    return body


def _packed(address: str) -> tuple[int, bytes]:
    """Return an address and its family as the kernel has them, in a tenth of the time of `ip_address`."""
    af = AF_INET6 if ":" in address else AF_INET
    return af, inet_pton(af, address)


def _mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
