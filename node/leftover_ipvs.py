"""What kube-proxy's IPVS mode left beside its chains: virtual servers, their interface, and sets.

- `parse_ip_vs` reads /proc/net/ip_vs; `kube_proxys` decides whose a virtual server is. Pure.
- `Ipvs` is the interface kube-ipvs0 with the virtual servers; `Sets` are the ipsets that its chains name.

Sets are listed and removed over netlink (linux/netfilter/ipset/ip_set.h), as virtual servers are removed
(netlink.ipvs); these are read from /proc, which loads no module.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import NamedTuple

from netlink.attributes import attribute, number, parsed, text
from netlink.errors import NetlinkError
from netlink.family import Family, with_port
from netlink.ipvs import Command, Request, Virtual
from netlink.ipvs import Ipvs as Kernel
from netlink.messages import NLM_F_ACK, NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR, error_code, pack, split
from netlink.requests import link_delete
from netlink.rtnl import Rtnl
from node.leftover_chains import counted
from proxy.ipvs.places import DEVICE

INTERFACE = "kube-ipvs0"
PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
SET_SECONDS = 3.0
"""How long a removed rule of the nft variant may hold its set: the kernel frees rules after the commit."""

_SETS = frozenset(
    f"{prefix}{name}"[:31]  # the kernel's limit; kube-proxy cuts its names as well
    for prefix in ("KUBE-", "KUBE-6-")
    for name in (
        *("LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "IPVS-IPS"),
        *("LOAD-BALANCER", "LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW"),
        *("LOAD-BALANCER-SOURCE-IP", "LOAD-BALANCER-SOURCE-CIDR", "HEALTH-CHECK-NODE-PORT"),
        *("NODE-PORT-TCP", "NODE-PORT-UDP", "NODE-PORT-SCTP", "NODE-PORT-SCTP-HASH"),
        *("NODE-PORT-LOCAL-TCP", "NODE-PORT-LOCAL-UDP"),
        *("NODE-PORT-LOCAL-SCTP", "NODE-PORT-LOCAL-SCTP-HASH"),
    )
)


class Server(NamedTuple):
    """A virtual server of IPVS: protocol as /proc/net/ip_vs has it, address, port, and its real servers."""

    protocol: str
    address: str
    port: int
    real: frozenset[tuple[str, int]] = frozenset()

    @property
    def place(self) -> str:
        """Address and port as ipvsadm takes them."""
        return with_port(self.address, self.port)

    def __str__(self) -> str:
        return f"{self.protocol} {self.place}"


@dataclass(frozen=True, slots=True)
class Ipvs:
    """The interface that carries the service addresses in IPVS mode, and the virtual servers there."""

    servers: tuple[Server, ...]
    kind = "ipvs"

    @property
    def names(self) -> tuple[str, ...]:
        """The interface; protocol, address and port of each virtual server."""
        return (INTERFACE, *map(str, self.servers))

    def __str__(self) -> str:
        servers = f" with {counted(len(self.servers), 'virtual server')} of IPVS" if self.servers else ""
        return f"interface {INTERFACE}{servers}"

    def remove(self) -> None:
        """Take away the virtual servers, then the interface, by which they are known. Raises NetlinkError."""
        if self.servers:
            _delete_servers(self.servers)
        with Rtnl() as rtnl:
            if rtnl.link(INTERFACE):
                rtnl.commit(link_delete(INTERFACE))


@dataclass(frozen=True, slots=True)
class Sets:
    """Sets of kube-proxy's IPVS mode."""

    names: tuple[str, ...]
    kind = "ipset"

    def __str__(self) -> str:
        return counted(len(self.names), "ipset")

    def remove(self) -> None:
        """Remove the sets; NetlinkError for one that a rule still names."""
        deadline = time.monotonic() + SET_SECONDS
        for name in self.names:
            _delete_set(name, deadline)


def find_ipvs(proc: Path, remarks: list[str]) -> Iterator[Ipvs]:
    """Yield the interface and its virtual servers, if it is there; count in `remarks` the other servers."""
    try:
        servers = parse_ip_vs((proc / "thread-self/net/ip_vs").read_text())
    except FileNotFoundError:
        servers = ()
    with Rtnl() as rtnl:
        link = rtnl.link(INTERFACE)
        bound, ours = (_bound(rtnl, name) for name in (INTERFACE, DEVICE))
    # Our own dataplane takes over virtual servers that kube-proxy has made.
    proxys = tuple(s for s in kube_proxys(servers, bound) if s.address not in ours)
    if rest := sum(s.address not in ours for s in servers) - len(proxys):
        remarks.append(f"left alone, not known to be kube-proxy's: {counted(rest, 'virtual server')} of IPVS")
    if link:
        yield Ipvs(proxys)


def _bound(rtnl: Rtnl, name: str) -> frozenset[str]:
    """Return the addresses of an interface; none, if it is not there."""
    link = rtnl.link(name)
    addresses = rtnl.addresses(link.index) if link else ()
    return frozenset(str(ip_interface(a.cidr).ip) for a in addresses)


def _delete_servers(servers: Iterable[Server]) -> None:
    """Remove virtual servers; one that is gone is fine."""
    with Kernel() as kernel:
        for server in servers:
            family = Family(ip_address(server.address).version)
            virtual = Virtual(family, PROTOCOLS[server.protocol], server.address, server.port)
            try:
                kernel.commit([Request(Command.DEL_SERVICE, virtual)])
            except NetlinkError as error:
                if not error.gone:
                    raise


def find_sets() -> Iterator[Sets]:
    """Yield the sets that are there; without the kernel's module nobody has made one."""
    if not Path("/sys/module/ip_set").exists():
        return
    messages = ask_ipset(_LIST, NLM_F_DUMP, number(_FLAGS, _NAMES_ONLY), "list the ipsets")
    names = {parsed(message, 20)[_SETNAME].rstrip(b"\0").decode() for message in messages}
    if found := tuple(sorted(names & _SETS)):
        yield Sets(found)


def parse_ip_vs(lines: str) -> tuple[Server, ...]:
    """Return the virtual servers in /proc/net/ip_vs; not those of firewall marks."""
    found: list[Server] = []
    for words in map(str.split, lines.splitlines()):
        if words[:1] == ["->"] and found:
            found[-1] = found[-1]._replace(real=found[-1].real | {_hexadecimal(words[1])})
        elif words and words[0] in ("TCP", "UDP", "SCTP"):
            found.append(Server(words[0], *_hexadecimal(words[1])))
        elif words[:1] == ["FWM"]:
            found.append(Server("FWM", "", 0))  # takes the real servers in the lines after it
    return tuple(server for server in found if server.protocol != "FWM")


def kube_proxys(servers: Iterable[Server], bound: frozenset[str]) -> tuple[Server, ...]:
    """Return kube-proxy's virtual servers, given the addresses bound to its interface.

    Those on these addresses; and node ports, on addresses of the node: they have no other real servers.
    """
    servers = tuple(servers)
    real = frozenset((s.protocol, *place) for s in servers if s.address in bound for place in s.real)
    return tuple(
        s
        for s in servers
        if s.address in bound or (s.real and real.issuperset((s.protocol, *place) for place in s.real))
    )


def _hexadecimal(place: str) -> tuple[str, int]:
    """Return address and port of 0A600001:01BB or [fd00:…:0001]:01BB."""
    address, _, port = place.rpartition(":")
    value: str | int = address[1:-1] if address.startswith("[") else int(address, 16)
    return str(ip_address(value)), int(port, 16)


# linux/netfilter/nfnetlink.h, linux/netfilter/ipset/ip_set.h
_IPSET = 6 << 8
_DESTROY, _LIST = 3, 7
_PROTOCOL, _SETNAME, _FLAGS = 1, 2, 6
_VERSION, _NAMES_ONLY = 6, 2
_BUSY = 4100  # IPSET_ERR_BUSY: its errors are beyond those of errno.h
_REASONS = {_BUSY: "a rule still names it"}


def _delete_set(name: str, deadline: float) -> None:
    while True:
        try:
            ask_ipset(_DESTROY, NLM_F_ACK, text(_SETNAME, name), f"remove ipset {name}")
            return
        except NetlinkError as error:
            if error.gone:
                return
            if error.errno != _BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def ask_ipset(command: int, flags: int, body: bytes, what: str) -> list[bytes]:
    """Send one request, with its attributes; return the messages that answer it."""
    header = struct.pack("=BBH", socket.AF_INET, 0, 0) + attribute(_PROTOCOL, bytes([_VERSION]))
    found: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12) as netfilter:
        netfilter.bind((0, 0))
        netfilter.send(pack(_IPSET | command, flags, 1, header + body))
        while True:
            for kind, _, _, message in split(netfilter.recv(1 << 18)):
                if kind == NLMSG_ERROR and (code := error_code(message)):
                    raise NetlinkError(code, f"cannot {what}", _REASONS.get(code, ""))
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return found
                found.append(message)
