"""What ADD answers: results as values, read from and written for every version of the CNI protocol.

A result before ours in a chain (prevResult) keeps every field that the specification has, up to 1.1.0, also
those that podwire never sets. Source: CNI specification 1.1.0, section 5 ("ADD Success"), and before it
0.3.0 to 1.0.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from cni.errors import BAD_CONFIG, INCOMPATIBLE_VERSION, CniError
from cni.fields import Json, check_address, check_cidr, objects, show, text, typed, wrong

SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST_VERSION = SUPPORTED_VERSIONS[-1]
IPS_WITH_VERSION = ("0.3.0", "0.3.1", "0.4.0")  # ips[].version went away with 1.0.0
WITH_METRICS = ("1.1.0",)  # what an interface and a route have beyond name, address and gateway came with it
LARGEST_NUMBER = (1 << 32) - 1  # of routes and interfaces, as the kernel counts; 1.1.0 says "uint"
PREVIOUS = "prevResult."

ROUTE_NUMBERS = ("mtu", "advmss", "priority", "table", "scope")
DNS_LISTS = ("nameservers", "search", "options")
INTERFACE_TEXTS = {"socket_path": "socketPath", "pci_id": "pciID"}


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of an attachment; an empty `sandbox` means that it is the host's."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int | None = None
    socket_path: str = ""
    pci_id: str = ""


@dataclass(frozen=True, slots=True)
class IpConfig:
    """An address (CIDR) on the interface at that index of `Result.interfaces`."""

    address: str
    gateway: str = ""
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside the container; an empty `gw` leaves the choice to `IpConfig.gateway`."""

    dst: str
    gw: str = ""
    mtu: int | None = None
    advmss: int | None = None
    priority: int | None = None
    table: int | None = None
    scope: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What ADD made. `dns` is passed on as it came."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[IpConfig, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Json = field(default_factory=dict)


def parse_result(raw: Mapping[str, Any]) -> Result:
    """Return a result of any supported version, such as prevResult. Raises CniError naming a wrong field."""
    version = raw.get("cniVersion") or LATEST_VERSION
    if version not in SUPPORTED_VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"{PREVIOUS}cniVersion {show(version)} is not supported")
    interfaces = tuple(_interface(at, item) for at, item in objects(raw, "interfaces", PREVIOUS))
    ips = tuple(_ip(at, item, len(interfaces)) for at, item in objects(raw, "ips", PREVIOUS))
    routes = tuple(_route(at, item) for at, item in objects(raw, "routes", PREVIOUS))
    return Result(interfaces, ips, routes, parse_dns(raw, PREVIOUS))


def merged(previous: Result, ours: Result) -> Result:
    """Return a chain's result: everything of the plugins before, then ours; what both have appears once.

    An interface is the same when name and sandbox are: then what we know of it counts, and what only the
    previous plugin knew of it stays. Of `dns`, lists are joined; a domain is the previous plugin's.
    """
    interfaces = list(previous.interfaces)
    places = {(one.name, one.sandbox): at for at, one in enumerate(interfaces)}
    moved = []  # where our interfaces are in the whole list
    for one in ours.interfaces:
        at = places.setdefault((one.name, one.sandbox), len(interfaces))
        if at == len(interfaces):
            interfaces.append(one)
        else:
            interfaces[at] = _combined(interfaces[at], one)
        moved.append(at)
    ips = (ip if ip.interface is None else replace(ip, interface=moved[ip.interface]) for ip in ours.ips)
    return Result(
        tuple(interfaces),
        tuple(dict.fromkeys((*previous.ips, *ips))),
        tuple(dict.fromkeys((*previous.routes, *ours.routes))),
        _merged_dns(previous.dns, ours.dns),
    )


def result_json(result: Result, version: str) -> bytes:
    """Return a result as a runtime of that version reads it; it has less in it before 1.1.0."""
    if version not in SUPPORTED_VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"a result of version {show(version)} cannot be written")
    whole = version in WITH_METRICS
    document = {
        "cniVersion": version,
        "interfaces": [_interface_json(interface, whole) for interface in result.interfaces],
        "ips": [
            _given(version=_ip_version(ip.address) if version in IPS_WITH_VERSION else "")
            | {"address": ip.address}
            | _given(gateway=ip.gateway, interface=ip.interface)
            for ip in result.ips
        ],
        "routes": [_route_json(route, whole) for route in result.routes],
    }
    return msgspec.json.encode(document | ({"dns": result.dns} if result.dns else {}))


def parse_dns(raw: Mapping[str, Any], where: str = "") -> Json:
    """Return the `dns` of a result or a configuration, which is passed on as it is."""
    dns = typed(raw, "dns", dict, where) or {}
    typed(dns, "domain", str, f"{where}dns.")
    for key in DNS_LISTS:
        for item in typed(dns, key, list, f"{where}dns.") or ():
            if not isinstance(item, str):
                raise CniError(BAD_CONFIG, f"{where}dns.{key} has {show(item)} in it, which is not a string")
    return dns


def _interface(where: str, raw: Json) -> Interface:
    return Interface(
        name=text(where, raw, "name"),
        mac=typed(raw, "mac", str, where) or "",
        sandbox=typed(raw, "sandbox", str, where) or "",
        mtu=_number(where, raw, "mtu"),
        **{name: typed(raw, key, str, where) or "" for name, key in INTERFACE_TEXTS.items()},
    )


def _interface_json(interface: Interface, whole: bool) -> Json:
    document: Json = {"name": interface.name} | _given(mac=interface.mac, sandbox=interface.sandbox)
    if whole:
        document |= _given(mtu=interface.mtu)
        document |= _given(**{key: getattr(interface, name) for name, key in INTERFACE_TEXTS.items()})
    return document


def _ip(where: str, raw: Json, interfaces: int) -> IpConfig:
    index = typed(raw, "interface", int, where)
    if index is not None and not 0 <= index < interfaces:
        raise CniError(BAD_CONFIG, f"{where}interface is {index}, but there are {interfaces} interfaces")
    address = text(where, raw, "address")
    check_cidr(where, "address", address)
    gateway = typed(raw, "gateway", str, where) or ""
    check_address(where, "gateway", gateway)
    return IpConfig(address, gateway, index)


def _route(where: str, raw: Json) -> Route:
    dst, gw = text(where, raw, "dst"), typed(raw, "gw", str, where) or ""
    check_cidr(where, "dst", dst)
    check_address(where, "gw", gw)
    return Route(dst, gw, **{key: _number(where, raw, key) for key in ROUTE_NUMBERS})


def _route_json(route: Route, whole: bool) -> Json:
    numbers = {key: getattr(route, key) for key in ROUTE_NUMBERS if whole}
    return {"dst": route.dst} | _given(gw=route.gw, **numbers)


def _number(where: str, raw: Json, key: str) -> int | None:
    value = typed(raw, key, int, where)
    if value is not None and not 0 <= value <= LARGEST_NUMBER:
        raise wrong(f"{where}{key}", value, f"which is not between 0 and {LARGEST_NUMBER}")
    return value


def _combined(previous: Interface, ours: Interface) -> Interface:
    """Return what is known of one interface: what we say, and what we do not say as it was."""
    return Interface(
        ours.name,
        ours.mac or previous.mac,
        ours.sandbox,
        previous.mtu if ours.mtu is None else ours.mtu,
        ours.socket_path or previous.socket_path,
        ours.pci_id or previous.pci_id,
    )


def _merged_dns(previous: Json, ours: Json) -> Json:
    joined = {
        key: list(dict.fromkeys((*previous[key], *ours[key])))
        for key in DNS_LISTS
        if previous.get(key) and ours.get(key)
    }
    return _filled(ours) | _filled(previous) | joined


def _filled(dns: Json) -> Json:
    """Return what is said of DNS; runtimes write empty lists too."""
    return {key: value for key, value in dns.items() if value}


def _ip_version(address: str) -> str:
    return "6" if ":" in address else "4"


def _given(**values: str | int | None) -> Json:
    """Return the values that are there."""
    return {key: value for key, value in values.items() if value not in ("", None)}
