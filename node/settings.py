"""Kernel settings (sysctls) that podwire needs: of the node, and of its own tunnel devices.

    wanted(devices, peers, …) ─▶ Setting: where, what, why ─▶ Settings.assert_all ─▶ /proc/sys

`assert_all` is called at start, at each comparison, and after a device was made. What is the node's own is
noted before it is changed (cni/sysctls.py), and set back by `podwire cleanup`; what is a device's goes with
it. What each means: Documentation/networking/ip-sysctl of the kernel.

Left alone, after trying:

- rp_filter of the node's and of pods' interfaces: packets of pods come by the interface that leads back to
  them, so that strict (1), loose (2) and off do alike.
- send_redirects: the kernel's NAT drops redirects about connections that it translates, and those that tell a
  neighbour which node a pod is on are right. Pods have an interface each, so there are none for them.
- nf_conntrack_max: that is memory, and for the administrator to give.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cni import sysctls
from netlink.rtnl import Rtnl
from node.underlay import OWN_INTERFACE

log = logging.getLogger("podwire.settings")

NET = Path("/proc/sys/net")
FORWARDING_V6 = NET / "ipv6/conf/all/forwarding"
FORWARDING_V4 = NET / "ipv4/ip_forward"
FORWARDING = (FORWARDING_V4, FORWARDING_V6)
FORWARDING_NEW = NET / "ipv4/conf/default/forwarding"
CONF_V6 = NET / "ipv6/conf"
USE_PMTU = NET / "ipv4/ip_forward_use_pmtu"
TCP_BE_LIBERAL = NET / "netfilter/nf_conntrack_tcp_be_liberal"
ACCEPT, ACCEPT_WHILE_FORWARDING = "1", "2"  # accept_ra
ROUTER_ADVERTISEMENT = 9
"""RTPROT_RA: a route that the kernel made from a router advertisement. Whoever handles these itself, as
systemd-networkd does, uses the same number but has turned accept_ra off."""
LOOSE = "2"  # rp_filter
NO_LINK_LOCAL = "1"  # addr_gen_mode: IN6_ADDR_GEN_MODE_NONE of linux/if_link.h

NEIGHBOURS = (128, 512, 1024)
"""The kernel's gc_thresh1 to 3: up to the first no neighbour is forgotten, above the second those are that
were not used for five seconds, and above the third none is added: "neighbour table overflow"."""
OTHER_NEIGHBOURS = 256
"""How many a node may have beside its peers: hosts of its subnets, and what namespaces of pods look up, which
the kernel counts in the same table."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A sysctl, the value that it is to have, and what goes wrong without.

    `least`: a number that may also be larger. `own`: of a device of ours, so there is nothing to be set back.
    `needed`: that the kernel has no such sysctl is a problem, too.
    """

    path: Path
    value: str
    otherwise: str
    least: bool = False
    own: bool = False
    needed: bool = False

    def met(self, value: str) -> bool:
        """Whether a value will do."""
        return value == self.value or (self.least and value.isdecimal() and int(value) >= int(self.value))


@functools.lru_cache(maxsize=8)  # asked for at each comparison, and nearly always the same
def wanted(devices: tuple[str, ...], peers: int, liberal: bool, ipv6: bool) -> tuple[Setting, ...]:
    """Return what is to be set, in this order; the arguments are those of Settings.assert_all."""
    found = [Setting(path, "1", "pods will not reach other nodes") for path in FORWARDING]
    # Set along with the first. Where somebody has turned it off since, pods that come cannot send to anybody.
    found.append(Setting(FORWARDING_NEW, "1", "new pods will reach nobody"))
    if liberal:
        # Connection tracking calls what it cannot place invalid, and no translation is done on that: the
        # client sees an answer from the endpoint's own address, and resets the connection (kubernetes#74839).
        found.append(Setting(TCP_BE_LIBERAL, "1", "long connections to services may be reset", needed=True))
    if devices:
        # What a router tells of the path between nodes (DF is set on outer packets) the kernel notes at the
        # route inside the tunnel, and forgets when it forwards, unless this is set: large datagrams of pods
        # would vanish. Forged, such news can make packets of forwarded connections small (min_pmtu), no more.
        found.append(Setting(USE_PMTU, "1", "large packets of pods to far nodes may vanish"))
    for device in devices:
        found += _of_tunnel(device, ipv6)
    found += _neighbours(peers)
    return tuple(found)


def _of_tunnel(device: str, ipv6: bool) -> Iterator[Setting]:
    v4, v6 = NET / "ipv4/conf" / device, CONF_V6 / device
    # Loose, not off: the larger of the device's value and that of `all` counts, and 1 in `all` is frequent.
    # Strict would do while both nodes send by the tunnel, but not while one of them sends directly.
    lost = f"packets from other nodes may be dropped on {device}"
    yield Setting(v4 / "rp_filter", LOOSE, lost, own=True)
    yield Setting(v4 / "forwarding", "1", lost, own=True)
    if ipv6:  # a node may have it off for interfaces that come, and still have pods with IPv6
        yield Setting(v6 / "disable_ipv6", "0", f"{device} will carry no IPv6", own=True)
    # Nobody behind the tunnel steers this node (CVE-2020-13401), and nobody is asked there for a neighbour,
    # which is all that a link-local address would be for.
    yield Setting(v6 / "accept_ra", "0", "other nodes can set routes on this one", own=True)
    yield Setting(v6 / "addr_gen_mode", NO_LINK_LOCAL, f"{device} gets an address it does not need", own=True)


def _neighbours(peers: int) -> Iterator[Setting]:
    limits = neighbour_limits(peers)
    for family in ("ipv4", "ipv6") if limits > NEIGHBOURS else ():
        for number, limit in enumerate(limits, 1):
            path = NET / family / f"neigh/default/gc_thresh{number}"  # only in the initial namespace, for all
            yield Setting(path, str(limit), "this many nodes may not reach each other", least=True)


def neighbour_limits(peers: int) -> tuple[int, int, int]:
    """Return what gc_thresh1 to 3 have to be at least, for so many peers on the node's own subnets.

    The kernel's own proportions, doubled until what is in use does not reach the second.
    """
    first, second, third = NEIGHBOURS
    factor = 1
    while second * factor < peers + OTHER_NEIGHBOURS:
        factor *= 2
    return first * factor, second * factor, third * factor


class Settings:
    """Brings the settings to the kernel, and tells when somebody has changed one; used by one thread."""

    def __init__(self) -> None:
        self._met: set[Path] = set()
        self._advertised: set[Path] | None = None  # accept_ra of interfaces with advertised routes

    def assert_all(
        self, devices: Collection[str] = (), peers: int = 0, *, liberal: bool = False, ipv6: bool = True
    ) -> list[str]:
        """Set what is not as it should be; return a sentence for each that cannot be set.

        `devices` are the tunnels that there are, `peers` the nodes that are reached directly, `ipv6` is
        whether pods have addresses of it.
        """
        problems = self._keep_advertised_routes()
        for setting in wanted(tuple(devices), peers, liberal, ipv6):
            problems += self._assert(setting)
        return problems

    def _assert(self, setting: Setting) -> list[str]:
        path = setting.path
        try:
            value = _read(path)
            if not setting.met(value):
                if setting.own:
                    path.write_text(setting.value)
                else:
                    sysctls.put(path, setting.value, _beside(path))
                self._tell(setting, value)
        except FileNotFoundError as error:  # a kernel without IPv6, a device that is gone
            self._met.discard(path)
            return [_sentence(setting, error)] if setting.needed else []
        except OSError as error:
            return [_sentence(setting, error)]
        self._met.add(path)
        return []

    def _tell(self, setting: Setting, found: str) -> None:
        name = sysctls.name_of(setting.path)
        if setting.path in self._met and not setting.own:  # a device may have been made anew
            log.warning("%s was %s, and is %s again: somebody has changed it", name, found, setting.value)
        else:
            log.info("%s set to %s, it was %s", name, setting.value, found)

    def _keep_advertised_routes(self) -> list[str]:
        """Set accept_ra to 2 on interfaces that have routes from router advertisements, and on those only.

        A host that forwards IPv6 ignores router advertisements and drops the default route that it has from
        one, unless the interface is told otherwise before. On any other interface it would let whoever is
        behind it, a container say, steer this node (CVE-2020-13401).
        """
        try:
            if self._advertised is None or _read(FORWARDING_V6) != "1":
                self._advertised = {CONF_V6 / name / "accept_ra" for name in _advertised()}
        except OSError:  # a kernel without IPv6
            self._advertised = set()
        problems = []
        for path in sorted(self._advertised):
            setting = Setting(path, ACCEPT_WHILE_FORWARDING, "the default route will end")
            try:
                if _read(path) == ACCEPT:
                    problems += self._assert(setting)
            except OSError:  # the interface is gone
                self._advertised.discard(path)
        return problems


def _advertised() -> list[str]:
    """Return the names of interfaces that have routes from router advertisements, but for our own."""
    with Rtnl() as rtnl:
        indices = {route.oif for route in rtnl.routes(ROUTER_ADVERTISEMENT)}
        names = [link.name for link in rtnl.links() if link.index in indices] if indices else []
    return [name for name in names if not OWN_INTERFACE.fullmatch(name)]


def _beside(path: Path) -> tuple[Path, ...]:
    """Return what the kernel sets along with a switch for forwarding (devinet.c, addrconf.c)."""
    if path not in FORWARDING:
        return ()
    conf = CONF_V6 if path == FORWARDING_V6 else FORWARDING_V4.parent / "conf"
    interfaces = (file for file in sorted(conf.glob("*/forwarding")) if file.parent.name != "all")
    return (*interfaces, *(conf.glob("all/accept_redirects") if path != FORWARDING_V6 else ()))


def _sentence(setting: Setting, error: OSError) -> str:
    return f"{setting.path} cannot be set to {setting.value}: {error.strerror}; {setting.otherwise}"


def _read(path: Path) -> str:
    """Return a sysctl's value; by system calls, as this is done for each of them every time."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode().strip()
    finally:
        os.close(fd)
