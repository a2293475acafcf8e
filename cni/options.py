"""What a pod asks for beyond a plain ADD: host ports, bandwidth, a MAC address, addresses. Pure.

Sources: CNI conventions ("Well-known Capabilities", "args in network config", "CNI_ARGS") and, where those
leave room, what runtimes send:

- containerd's values have no JSON names of their own, so their keys are capitalised (`HostPort`) and numbers
  that were not set are 0. Keys count in any case, as they do for plugins in Go.
- containerd and CRI-O turn the annotations kubernetes.io/ingress-bandwidth and egress-bandwidth into the
  capability `bandwidth`, with bursts of 2^32-1 and 2^35-9 bits that nobody asked for.
- Both give all of the pod's annotations to a plugin with the capability io.kubernetes.cri.pod-annotations.
- CRI-O and podman ask for an address with CNI_ARGS or `ips`, with or without a prefix length.

    runtimeConfig > args.cni > CNI_ARGS > the pod's annotations: a lower one is not even read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from netaddr import AddrFormatError, IPAddress, IPNetwork

from cni.errors import BAD_CONFIG, BAD_ENVIRONMENT, CniError
from cni.fields import IDENTIFIER, IDENTIFIER_FORM, Json, check_cidr, objects, show, text, typed, wrong
from cni.spec import Request
from ipam.pools import Wish, parse_duration
from ipam.ranges import AddressRange, RangeError, single, special, subtract
from ipam.records import HostPort

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
LARGEST_PORT = 65535
LARGEST_COUNT = (1 << 64) - 1  # of bits; runtimes count in 64 of them
LONGEST_STICKY = 30 * 24 * 3600.0
"""Seconds: whoever may make pods may not keep a range's addresses for ever."""

RUNTIME = "runtimeConfig."
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
POOL, ADDRESS, STICKY = "podwire.io/pool", "podwire.io/ip", "podwire.io/sticky"

MAC = re.compile(r"[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit in bits a second and how many bits may go at once; `burst` 0 leaves that to whoever limits."""

    rate: int
    burst: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What a pod may receive (`ingress`) and send (`egress`); None is no limit."""

    ingress: Rate | None = None
    egress: Rate | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What one pod asks for. `pod` is "namespace/name" ("" unknown), `mac` "" any, `sticky` seconds."""

    host_ports: tuple[HostPort, ...] = ()
    bandwidth: Bandwidth | None = None
    mac: str = ""
    wish: Wish = field(default_factory=Wish)
    pod: str = ""
    sticky: float = 0.0


def parse_options(request: Request) -> Options:
    """Return what an ADD or CHECK asks for. Raises CniError (7, or 4 for CNI_ARGS) naming field and value.

    DEL must not call this: it has to succeed after an ADD that was refused here.
    """
    runtime = request.config.runtime_config
    arguments = typed(request.config.args, "cni", dict, "args.") or {}
    variables = dict(request.args)
    annotations = typed(runtime, ANNOTATIONS, dict, RUNTIME) or {}
    namespace, name = (_pod_part(variables, f"K8S_POD_{part}") for part in ("NAMESPACE", "NAME"))
    return Options(
        host_ports=_host_ports(runtime),
        bandwidth=_bandwidth(runtime),
        mac=_mac(runtime, arguments, variables),
        wish=Wish(
            namespace=namespace,
            pool=_pool(annotations),
            addresses=_addresses(runtime, arguments, variables, annotations),
            range_sets=_range_sets(runtime),
        ),
        pod=f"{namespace}/{name}" if namespace and name else "",
        sticky=_sticky(annotations),
    )


def _host_ports(runtime: Json) -> tuple[HostPort, ...]:
    """Return the ports; entries with hostPort 0 are what runtimes pass for a port that is not the host's."""
    found: dict[str, HostPort] = {}
    for where, raw in objects(runtime, "portMappings", RUNTIME):
        entry = _folded(raw, ("hostPort", "containerPort", "protocol", "hostIP"))
        if not typed(entry, "hostPort", int, where):
            continue
        protocol = typed(entry, "protocol", str, where) or "tcp"
        if protocol.lower() not in PROTOCOLS:
            raise wrong(f"{where}protocol", protocol, f"which is not one of {', '.join(PROTOCOLS)}")
        port = HostPort(
            protocol=PROTOCOLS[protocol.lower()],
            host_port=_port(where, entry, "hostPort"),
            container_port=_port(where, entry, "containerPort"),
            host_ip=_host_ip(where, entry),
        )
        for other, before in found.items():
            if port.conflicts(before):
                what = f"{where.rstrip('.')} asks for host port {port}"
                raise CniError(BAD_CONFIG, f"{what}, as {other.rstrip('.')} does with {before}")
        found[where] = port
    return tuple(found.values())


def _port(where: str, entry: Json, key: str) -> int:
    value = typed(entry, key, int, where)
    if value is None:
        raise CniError(BAD_CONFIG, f"{where}{key} is missing")
    if not 1 <= value <= LARGEST_PORT:
        raise wrong(f"{where}{key}", value, f"which is not a port (1 to {LARGEST_PORT})")
    return value


def _host_ip(where: str, entry: Json) -> str:
    value = typed(entry, "hostIP", str, where)
    if not value:
        return ""
    try:
        address = ip_address(value)
    except ValueError:
        address = None
    if address is None or "%" in value:  # a scope is one interface's; rules match addresses
        raise wrong(f"{where}hostIP", value, "which is not an address")
    return str(address)


def _bandwidth(runtime: Json) -> Bandwidth | None:
    raw = typed(runtime, "bandwidth", dict, RUNTIME) or {}
    entry = _folded(raw, ("ingressRate", "ingressBurst", "egressRate", "egressBurst"))
    ingress, egress = (_rate(entry, direction) for direction in ("ingress", "egress"))
    return Bandwidth(ingress, egress) if ingress or egress else None


def _rate(entry: Json, direction: str) -> Rate | None:
    """Return one direction's limit. A burst that is not given stays 0: `cni.bandwidth` has the default."""
    where = f"{RUNTIME}bandwidth."
    rate, burst = (_count(where, entry, f"{direction}{what}") for what in ("Rate", "Burst"))
    if burst and not rate:
        raise CniError(
            BAD_CONFIG, f"{where}{direction}Burst is {burst}, but there is no {direction}Rate for it"
        )
    return Rate(rate, burst) if rate else None


def _count(where: str, entry: Json, key: str) -> int:
    value = typed(entry, key, int, where) or 0
    if not 0 <= value <= LARGEST_COUNT:
        raise wrong(f"{where}{key}", value, "which is not a number of bits")
    return value


def _mac(runtime: Json, arguments: Json, variables: Mapping[str, str]) -> str:
    if value := typed(runtime, "mac", str, RUNTIME):
        return _checked_mac(f"{RUNTIME}mac", value)
    if value := typed(arguments, "mac", str, "args.cni."):
        return _checked_mac("args.cni.mac", value)
    if value := variables.get("MAC"):
        return _checked_mac("CNI_ARGS MAC", value, BAD_ENVIRONMENT)
    return ""


def _checked_mac(what: str, value: str, code: int = BAD_CONFIG) -> str:
    """Return the address in its usual form."""
    if not MAC.fullmatch(value):
        raise wrong(what, value, "which is not a MAC address such as 02:00:0a:01:00:05", code)
    octets = bytes.fromhex(value.replace(value[2], ""))
    if octets[0] & 1 or not any(octets):
        raise wrong(what, value, "which is not a unicast address", code)
    return octets.hex(":")


def _addresses(
    runtime: Json, arguments: Json, variables: Mapping[str, str], annotations: Json
) -> tuple[IPAddress, ...]:
    """Return the addresses of the first source that names some."""
    if found := _texts(runtime, "ips", RUNTIME):
        return _parsed(f"{RUNTIME}ips", found)
    if found := _texts(arguments, "ips", "args.cni."):
        return _parsed("args.cni.ips", found)
    if listed := variables.get("IP"):
        return _parsed("CNI_ARGS IP", listed.split(","), BAD_ENVIRONMENT)
    if listed := _annotation(annotations, ADDRESS):
        return _parsed(f"the annotation {ADDRESS}", listed.split(","))
    return ()


def _texts(raw: Json, key: str, where: str) -> list[str]:
    found: list[str] = []
    for at, value in enumerate(typed(raw, key, list, where) or ()):
        if not isinstance(value, str):
            raise wrong(f"{where}{key}[{at}]", value, "which is not a string")
        found.append(value)
    return found


def _parsed(what: str, values: Iterable[str], code: int = BAD_CONFIG) -> tuple[IPAddress, ...]:
    """Return addresses; a prefix length is checked and dropped, for a pod's is decided by its wiring."""
    found: list[IPAddress] = []
    for value in values:
        bare, slash, length = value.strip().partition("/")
        address = _address(bare)
        bits = 32 if address is not None and address.version == 4 else 128
        if address is None or (slash and not _is_length(length, bits)):
            form = "which is not an address, with or without a prefix length"
            whole = ",".join(values)
            if whole == value:
                raise wrong(what, value, form, code)
            raise CniError(code, f"{what} has {show(value)} in it, {form}")
        if address in found:
            raise CniError(code, f"{what} names {address} twice")
        found.append(address)
    return tuple(found)


def _is_length(value: str, bits: int) -> bool:
    return value.isascii() and value.isdigit() and len(value) <= 3 and int(value) <= bits


def _address(value: str) -> IPAddress | None:
    try:
        # Strict in what it takes: netaddr alone has its own ideas of "10" and of "1.2".
        return None if "%" in value else IPAddress(str(ip_address(value)))
    except ValueError:
        return None


def _range_sets(runtime: Json) -> tuple[tuple[AddressRange, ...], ...]:
    """Return the sets of `ipRanges`: a pod gets one address out of each."""
    sets = []
    for at, raw in enumerate(typed(runtime, "ipRanges", list, RUNTIME) or ()):
        where = f"{RUNTIME}ipRanges[{at}]"
        if not isinstance(raw, list):
            raise wrong(where, raw, "which is not a list")
        entries = objects({where: raw}, where)
        ranges = [range_ for prefix, entry in entries for range_ in _ranges(prefix, entry)]
        if not ranges:
            raise CniError(BAD_CONFIG, f"{where} has no ranges in it")
        if len({range_.version for range_ in ranges}) > 1:
            raise CniError(BAD_CONFIG, f"{where} has ranges of both families in it; make it two sets")
        sets.append(tuple(ranges))
    return tuple(sets)


def _ranges(where: str, raw: Json) -> tuple[AddressRange, ...]:
    """Return an entry's addresses: of its subnet, from rangeStart to rangeEnd, those that pods may have."""
    entry = _folded(raw, ("subnet", "rangeStart", "rangeEnd", "gateway"))
    value = text(where, entry, "subnet")
    check_cidr(where, "subnet", value)
    try:
        subnet = IPNetwork(value).cidr
    except (AddrFormatError, ValueError):  # a netmask that is none, or a scope
        raise wrong(f"{where}subnet", value, "which is not an address with a prefix length") from None
    start, end, gateway = (_in(subnet, where, entry, key) for key in ("rangeStart", "rangeEnd", "gateway"))
    first = subnet.first if start is None else int(start)
    last = subnet.last if end is None else int(end)
    if first > last:
        raise wrong(f"{where}rangeStart", str(start), f"which comes after the range's end, {end}")
    not_given = [*special(subnet)]
    if gateway is not None:  # then the first host address is an address like others
        not_given[0] = AddressRange(subnet.version, subnet.first, subnet.first)
        not_given.append(single(gateway))
    found = subtract([AddressRange(subnet.version, first, last)], not_given)
    if not found:
        raise CniError(BAD_CONFIG, f"{where.rstrip('.')} ({subnet}) has no address for a pod in it")
    return found


def _in(subnet: IPNetwork, where: str, entry: Json, key: str) -> IPAddress | None:
    value = typed(entry, key, str, where)
    if not value:
        return None
    address = _address(value)
    if address is None:
        raise wrong(f"{where}{key}", value, "which is not an address")
    if address not in subnet:
        raise wrong(f"{where}{key}", value, f"which is not in the subnet {subnet}")
    return address


def _pod_part(variables: Mapping[str, str], key: str) -> str:
    """Return a pod's namespace or name. With a slash in one of them, two pods could be the same text."""
    value = variables.get(key, "")
    if value and not IDENTIFIER.fullmatch(value):
        raise wrong(f"CNI_ARGS {key}", value, f"not {IDENTIFIER_FORM}", BAD_ENVIRONMENT)
    return value


def _pool(annotations: Json) -> str:
    value = _annotation(annotations, POOL)
    if value and not IDENTIFIER.fullmatch(value):
        raise wrong(f"the annotation {POOL}", value, f"not {IDENTIFIER_FORM}")
    return value


def _sticky(annotations: Json) -> float:
    what, value = f"the annotation {STICKY}", _annotation(annotations, STICKY)
    if not value:
        return 0.0
    try:
        seconds = parse_duration(value, what)
    except RangeError:
        raise wrong(what, value, "which is not a time such as 90s, 30m or 1h30m") from None
    if seconds > LONGEST_STICKY:
        raise wrong(what, value, f"which is more than {LONGEST_STICKY / 3600:g}h")
    return seconds


def _annotation(annotations: Json, key: str) -> str:
    value = annotations.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong(f"the annotation {key}", value, "which is not a string")
    return value.strip()


def _folded(raw: Json, names: Iterable[str]) -> Json:
    """Return the named fields under these names, however their letters' case is; the exact name counts."""
    by_case: dict[str, Any] = {key.lower(): value for key, value in raw.items()}
    return {name: raw[name] if name in raw else by_case.get(name.lower()) for name in names}
