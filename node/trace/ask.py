"""What FROM and TO name: words of a person → addresses and ports. Pure.

FROM is a pod, a node, or an address; TO a service, a node's port, a pod, or an address. A word without a kind
in front ("pod:", "svc:", "node:") is tried as each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from netlink.family import Family, with_port
from node.trace.packet import PROTOCOLS
from node.trace.why import Names

NUMBERS = {name: number for number, name in PROTOCOLS.items()}


class AskError(Exception):
    """What was asked for cannot be found or read; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a service; `node_port` 0: none."""

    name: str
    protocol: int
    port: int
    node_port: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """A service ("namespace/name"), and the addresses that packets can have for it, cluster ones first."""

    name: str
    addresses: tuple[str, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod ("namespace/name", "" if that is not known), its node, addresses and interface there."""

    name: str
    node: str
    addresses: tuple[str, ...]
    host_ifname: str = ""
    netns: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """A node, or another machine that can be asked: its addresses, and the ranges of its pods."""

    name: str
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """All that has a name. `here` is where outside packets arrive; `services_known`: the daemon was asked."""

    here: str
    services: tuple[Service, ...] = ()
    pods: tuple[Pod, ...] = ()
    hosts: tuple[Host, ...] = ()
    names: Names = field(default_factory=Names)
    services_known: bool = True

    def pod(self, address: str) -> Pod | None:
        """Return the pod that has an address."""
        return next((p for p in self.pods if address in p.addresses), None)

    def host(self, address: str) -> Host | None:
        """Return the machine that has an address."""
        return next((h for h in self.hosts if address in h.addresses), None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a packet comes from: `pod` or a `host` that sends it, else from outside, to the node `here`."""

    words: str
    address: str
    place: str
    pod: Pod | None = None
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Where a packet goes."""

    words: str
    address: str
    port: int
    protocol: int


def source(text: str, known: Known, family: Family | None) -> Source:
    """Return what FROM names. Raises AskError."""
    kind, _, rest = text.partition(":")
    if (kind == "node" and rest) or text == "node":
        return _host(rest or known.here, known, family)
    if kind == "pod" and rest:
        return _pod(rest, known, family)
    if _is_address(text):
        return _from_address(text, known)
    if any(h.name == text for h in known.hosts) or text == known.here:
        return _host(text, known, family)
    return _pod(text, known, family)


def _from_address(text: str, known: Known) -> Source:
    address = str(ip_address(text))
    pod, host = known.pod(address), known.host(address)
    if pod and (pod.host_ifname or not pod.node):
        return Source(f"pod {pod.name or address}", address, pod.node, pod)
    if host:
        return Source(f"{host.name} ({address})", address, host.name)
    home = next((h.name for h in known.hosts if h.name != known.here and _within(address, h.pod_cidrs)), "")
    if home:
        return Source(f"a pod of {home} ({address})", address, home, outside=True)
    return Source(f"{address}, arriving at {known.here}", address, known.here, outside=True)


def _host(name: str, known: Known, family: Family | None) -> Source:
    host = next((h for h in known.hosts if h.name == name), None)
    if host is None and name != known.here:
        there = ", ".join(h.name for h in known.hosts) or known.here
        raise AskError(f"FROM: there is no node {name!r}; there is {there}")
    return Source(name, "", name)


def _pod(name: str, known: Known, family: Family | None) -> Source:
    pod = _find_pod(name, known, "FROM")
    address = _of(pod.addresses, family)
    if not address:
        raise AskError(f"FROM: pod {pod.name} has no address of IPv{family.value if family else '4 or 6'}")
    return Source(f"pod {pod.name} ({address})", address, pod.node, pod)


def _find_pod(name: str, known: Known, what: str) -> Pod:
    wanted = name if "/" in name else f"default/{name}"
    found = [p for p in known.pods if p.name == wanted or name in p.addresses]
    found = found or [p for p in known.pods if p.name.partition("/")[2] == name]
    if len(found) > 1:
        raise AskError(f"{what}: {name!r} is a pod of several names: {', '.join(p.name for p in found)}")
    if not found:
        raise AskError(f"{what}: no pod {name!r} is known on this node; its address works too")
    return found[0]


def target(text: str, known: Known, family: Family | None, protocol: int | None) -> Target:
    """Return what TO names; the protocol is what a service's port has, else as asked, else TCP."""
    kind, _, rest = text.partition(":")
    if kind in ("svc", "service") and rest:
        return _service(rest, known, family, protocol)
    if kind == "pod" and rest:
        return _to_pod(rest, known, family, protocol)
    address, port = _split(text)
    if address is not None:
        if not port:
            raise AskError(f"TO: {text!r} needs a port: {with_port(address, 'PORT')}")
        return _addressed(address, port, known, protocol)
    name, _, number = text.rpartition(":")
    if name == "node" or name.startswith("node:") or any(h.name == name for h in known.hosts):
        return _node_port(name.removeprefix("node:"), number, known, family, protocol)
    wanted = text.partition(":")[0]
    if any(s.name == (wanted if "/" in wanted else f"default/{wanted}") for s in known.services):
        return _service(text, known, family, protocol)
    try:
        return _to_pod(text, known, family, protocol)
    except AskError:
        hint = "" if known.services_known else "; the daemon, which knows services, does not answer"
        raise AskError(
            f"TO: {wanted!r} is no service, pod, node or address that is known here{hint}"
        ) from None


def _addressed(address: str, port: int, known: Known, protocol: int | None) -> Target:
    fronts = [f for f in known.names.fronts if (f.address, f.port) == (address, port)]
    number = protocol or next((f.protocol for f in fronts), 6)
    title = next((f.service for f in fronts if f.protocol == number), "")
    pod = known.pod(address)
    words = f"service {title}" if title else f"pod {pod.name}" if pod and pod.name else ""
    shown = f"{with_port(address, port)}/{PROTOCOLS.get(number, number)}"
    return Target(f"{words} ({shown})" if words else shown, address, port, number)


def _node_port(name: str, text: str, known: Known, family: Family | None, protocol: int | None) -> Target:
    port = _number(text)
    name = known.here if name in ("", "node") else name
    host = next((h for h in known.hosts if h.name == name), None)
    if host is None:
        there = ", ".join(h.name for h in known.hosts) or "none that has an address"
        raise AskError(f"TO: there is no node {name!r}; there is {there}")
    address = _of(host.addresses, family)
    if not address:
        raise AskError(f"TO: {name} has no address of IPv{family.value if family else '4 or 6'}")
    fronts = [f for f in known.names.fronts if not f.address and f.port == port]
    number = protocol or next((f.protocol for f in fronts), 6)
    title = next((f.service for f in fronts if f.protocol == number), "")
    words = f"port {port}/{PROTOCOLS.get(number, number)} of {name}"
    return Target(f"{words}, node port of {title}" if title else words, address, port, number)


def _service(text: str, known: Known, family: Family | None, protocol: int | None) -> Target:
    name, _, wanted = text.partition(":")
    name = name if "/" in name else f"default/{name}"
    found = next((s for s in known.services if s.name == name), None)
    if found is None:
        hint = "" if known.services_known else "; the daemon, which knows services, does not answer"
        raise AskError(f"TO: there is no service {name!r} on this node{hint}")
    ports = [p for p in found.ports if protocol in (None, p.protocol)]
    chosen = [p for p in ports if wanted in (p.name, str(p.port))] if wanted else ports
    if wanted and not chosen and wanted.isdecimal():
        chosen = [
            ServicePort("", protocol or 6, _number(wanted))
        ]  # what happens to other ports is of interest
    if len({p.port for p in chosen}) != 1 and not (wanted and chosen):
        listed = ", ".join(f"{p.name or p.port}" for p in ports)
        raise AskError(f"TO: say which port of service {name}: {listed or 'it has none of that protocol'}")
    address = _of(found.addresses, family)
    if not address:
        raise AskError(f"TO: service {name} has no address of IPv{family.value if family else '4 or 6'}")
    port = chosen[0]
    shown = f"{with_port(address, port.port)}/{PROTOCOLS.get(port.protocol, port.protocol)}"
    return Target(
        f"service {name}{f':{port.name}' if port.name else ''} ({shown})", address, port.port, port.protocol
    )


def _to_pod(text: str, known: Known, family: Family | None, protocol: int | None) -> Target:
    name, _, number = text.rpartition(":")
    if not name:
        raise AskError(f"TO: pod {text!r} needs a port: {text}:PORT")
    pod = _find_pod(name, known, "TO")
    address, port = _of(pod.addresses, family), _number(number)
    if not address:
        raise AskError(f"TO: pod {pod.name} has no address of IPv{family.value if family else '4 or 6'}")
    shown = f"{with_port(address, port)}/{PROTOCOLS[protocol or 6]}"
    return Target(f"pod {pod.name} ({shown})", address, port, protocol or 6)


def family_of(*texts: str) -> Family | None:
    """Return the family that the addresses among some words have; None if there is none."""
    for text in texts:
        address = _split(text)[0]
        if address is not None:
            return Family(ip_address(address).version)
    return None


def _split(text: str) -> tuple[str | None, int]:
    """Return the address and port in a text (0: no port), or (None, 0) if it is none."""
    if _is_address(text.strip("[]")):
        return str(ip_address(text.strip("[]"))), 0
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    return (str(ip_address(host)), _number(port)) if _is_address(host) else (None, 0)


def _within(address: str, cidrs: Sequence[str]) -> bool:
    return any(ip_address(address) in ip_network(cidr) for cidr in cidrs)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 65536:
        raise AskError(f"port {text!r} must be a number from 1 to 65535")
    return int(text)


def _of(addresses: Sequence[str], family: Family | None) -> str:
    """Return the first address of a family, or of any."""
    return next((a for a in addresses if family is None or Family(ip_address(a).version) is family), "")
