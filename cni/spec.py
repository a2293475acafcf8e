"""The container's side of the CNI protocol: requests, results, versions and errors, as values.

Source: CNI specification 1.1.0 (sections 1, 2 and 5) and its earlier versions down to 0.3.0. Everything
here is pure; whatever bytes come in, the only exception that comes out is `CniError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address, ip_interface
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
Json = dict[str, Any]

# Error codes; below 100 they are the specification's.
INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
DECODE_FAILURE = 6
BAD_CONFIG = 7
TRY_AGAIN = 11
NOT_AVAILABLE = 50
LIMITED = 51
INTERNAL = 100
ALREADY_EXISTS = 101
CHECK_FAILED = 102

SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST_VERSION = SUPPORTED_VERSIONS[-1]
OLDEST_VERSION = "0.1.0"  # what a configuration without cniVersion means; it had none
IPS_WITH_VERSION = ("0.3.0", "0.3.1", "0.4.0")  # ips[].version went away with 1.0.0

KNOWN_ARGS = (
    "IgnoreUnknown",
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_INFRA_CONTAINER_ID",
    "K8S_POD_UID",
    "IP",
    "MAC",
)
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
IDENTIFIER_FORM = "a letter or digit, then letters, digits, '_', '.' and '-'"
IFNAME_BYTES = 15
SHOWN = 80  # characters of a wrong value in a message


class CniError(Exception):
    """A request failed: `code` for the runtime, `msg` a sentence for a person, `details` what helps."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details


class Command(StrEnum):
    """What the runtime wants (CNI_COMMAND)."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


REQUIRED = {
    Command.ADD: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.DEL: ("CNI_CONTAINERID", "CNI_IFNAME"),
    Command.CHECK: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
}


@dataclass(frozen=True, slots=True)
class NetConf:
    """The network configuration a plugin reads on standard input. `valid_attachments` None = not given."""

    cni_version: str
    name: str = ""
    type: str = ""
    prev_result: Json | None = None
    runtime_config: Json = field(default_factory=dict)
    args: Json = field(default_factory=dict)
    valid_attachments: tuple[tuple[str, str], ...] | None = None
    dns: Json = field(default_factory=dict)
    raw: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One execution of the plugin; text that was not given is empty. `request_id` is the shim's."""

    command: Command
    config: NetConf
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: tuple[tuple[str, str], ...] = ()
    path: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of an attachment; an empty `sandbox` means that it is the host's."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int | None = None


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


@dataclass(frozen=True, slots=True)
class Result:
    """What ADD made. `dns` is passed on as it came."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[IpConfig, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Json = field(default_factory=dict)


def parse_request(env: Mapping[str, str], stdin: bytes) -> Request:
    """Return the request that CNI_* variables and standard input make. Raises CniError, nothing else.

    DEL is lenient: what its ADD was refused for must not keep it from succeeding, so faults in CNI_ARGS and
    in the configuration beyond cniVersion count as absence.
    """
    command = _command(env)
    if command is Command.VERSION:
        return Request(command, NetConf(_requested_version(stdin)))
    _check_variables(command, env)
    raw = _decode(stdin)
    version = _supported_version(raw)
    return Request(
        command,
        _unless_del(command, lambda: _config(raw, version), NetConf(version, raw=raw)),
        container_id=env.get("CNI_CONTAINERID", ""),
        netns=env.get("CNI_NETNS", ""),
        ifname=env.get("CNI_IFNAME", ""),
        args=_unless_del(command, lambda: _args(env.get("CNI_ARGS", "")), ()),
        path=env.get("CNI_PATH", ""),
        request_id=env.get("PODWIRE_REQUEST_ID", ""),
    )


def parse_result(raw: Mapping[str, Any]) -> Result:
    """Return a result of any supported version, such as prevResult. Raises CniError naming the wrong field.

    Fields that podwire never sets (routes' metrics, socket paths and the like) are not kept.
    """
    version = raw.get("cniVersion") or LATEST_VERSION
    if version not in SUPPORTED_VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"prevResult.cniVersion {_show(version)} is not supported")
    interfaces = tuple(_interface(at, item) for at, item in _objects(raw, "interfaces", "prevResult."))
    ips = tuple(_ip(at, item, len(interfaces)) for at, item in _objects(raw, "ips", "prevResult."))
    routes = tuple(_route(at, item) for at, item in _objects(raw, "routes", "prevResult."))
    return Result(interfaces, ips, routes, _dns(raw, "prevResult."))


def result_json(result: Result, version: str) -> bytes:
    """Return a result as a runtime of that version reads it; it has less in it before 1.1.0."""
    if version not in SUPPORTED_VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"a result of version {_show(version)} cannot be written")
    document = {
        "cniVersion": version,
        "interfaces": [
            {"name": i.name}
            | _given(mac=i.mac, sandbox=i.sandbox)
            | _given(mtu=i.mtu if version == "1.1.0" else None)
            for i in result.interfaces
        ],
        "ips": [
            _given(version=_ip_version(ip.address) if version in IPS_WITH_VERSION else "")
            | {"address": ip.address}
            | _given(gateway=ip.gateway, interface=ip.interface)
            for ip in result.ips
        ],
        "routes": [{"dst": route.dst} | _given(gw=route.gw) for route in result.routes],
    }
    return msgspec.json.encode(document | ({"dns": result.dns} if result.dns else {}))


def error_json(error: CniError, version: str) -> bytes:
    """Return the specification's error object; characters that UTF-8 cannot carry are escaped."""
    msg, details = (t.encode("utf-8", "backslashreplace").decode() for t in (error.msg, error.details))
    return msgspec.json.encode({"cniVersion": version, "code": error.code, "msg": msg, "details": details})


def version_json(requested: str) -> bytes:
    """Return the answer to VERSION, which repeats the version that was asked with."""
    return msgspec.json.encode({"cniVersion": requested, "supportedVersions": SUPPORTED_VERSIONS})


def version_of(stdin: bytes) -> str:
    """Return the version to answer an unusable request in: the one it names if supported, else the latest."""
    try:
        return _supported_version(_decode(stdin))
    except CniError:
        return LATEST_VERSION


def _unless_del(command: Command, parse: Callable[[], T], otherwise: T) -> T:
    try:
        return parse()
    except CniError:
        if command is not Command.DEL:
            raise
        return otherwise


def _command(env: Mapping[str, str]) -> Command:
    value = env.get("CNI_COMMAND", "")
    try:
        return Command(value)
    except ValueError:
        known = ", ".join(Command)
        raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND is {_show(value)}, not one of {known}") from None


def _check_variables(command: Command, env: Mapping[str, str]) -> None:
    """Refuse what a command cannot work with; a relative CNI_NETNS means another file to the daemon."""
    required = REQUIRED.get(command, ())
    if missing := [name for name in required if not env.get(name)]:
        raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND {command} needs {', '.join(missing)}: not set")
    for name in required:
        _check_utf8(name, env[name])
    container_id, ifname, netns = (env.get(f"CNI_{name}", "") for name in ("CONTAINERID", "IFNAME", "NETNS"))
    if "CNI_CONTAINERID" in required and not IDENTIFIER.fullmatch(container_id):
        raise CniError(BAD_ENVIRONMENT, f"CNI_CONTAINERID is {_show(container_id)}, not {IDENTIFIER_FORM}")
    if "CNI_IFNAME" in required and (fault := _ifname_fault(ifname)):
        raise CniError(BAD_ENVIRONMENT, f"CNI_IFNAME is {_show(ifname)}, which {fault}")
    if "CNI_NETNS" in required and not netns.startswith("/"):
        raise CniError(BAD_ENVIRONMENT, f"CNI_NETNS is {_show(netns)}, which is not an absolute path")


def _check_utf8(name: str, text: str) -> None:
    """Refuse lone surrogates, as which bytes that are not UTF-8 come out of the environment."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CniError(BAD_ENVIRONMENT, f"{name} is {_show(text)}, which is not UTF-8")


def _ifname_fault(name: str) -> str:
    """Return what is wrong with an interface name, or nothing."""
    if len(name.encode()) > IFNAME_BYTES:
        return f"is longer than {IFNAME_BYTES} bytes"
    if name in (".", "..", "all", "default") or "%" in name:  # the kernel has other uses for these
        return "is not a name"
    if any(character in "/:\0" or character.isspace() for character in name):
        return "has a '/', a ':' or white space in it"
    return ""


def _args(text: str) -> tuple[tuple[str, str], ...]:
    """Parse CNI_ARGS: KEY=VALUE;KEY=VALUE. Unknown keys are refused unless IgnoreUnknown is set."""
    _check_utf8("CNI_ARGS", text)
    pairs = []
    for item in text.split(";") if text else ():
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS has {_show(item)} in it, which is not KEY=VALUE")
        pairs.append((key, value))
    ignore = dict(pairs).get("IgnoreUnknown", "").lower() in ("1", "true")
    unknown = [key for key, _ in pairs if key not in KNOWN_ARGS]
    if unknown and not ignore:
        raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS has the unknown key {_show(unknown[0])}")
    return tuple(pairs)


def _decode(stdin: bytes) -> Json:
    if not stdin.strip():
        raise CniError(DECODE_FAILURE, "the network configuration on standard input is empty")
    try:
        raw = msgspec.json.decode(stdin)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CniError(DECODE_FAILURE, f"the network configuration is not JSON: {error}") from None
    except RecursionError:
        raise CniError(DECODE_FAILURE, "the network configuration is nested too deeply") from None
    if not isinstance(raw, dict):
        raise CniError(DECODE_FAILURE, f"the network configuration is {_show(raw)}, not an object")
    return raw


def _supported_version(raw: Json) -> str:
    version = raw.get("cniVersion")
    if version is not None and not isinstance(version, str):
        raise CniError(DECODE_FAILURE, f"cniVersion is {_show(version)}, which is not a string")
    if version in SUPPORTED_VERSIONS:
        return version
    what = f"cniVersion {_show(version)}" if version else f"no cniVersion, which means {OLDEST_VERSION},"
    supported = ", ".join(SUPPORTED_VERSIONS)
    raise CniError(INCOMPATIBLE_VERSION, f"{what} is not supported", f"supported are {supported}")


def _requested_version(stdin: bytes) -> str:
    """Return the version that VERSION is to repeat; runtimes ask with any, and some with none."""
    if not stdin.strip():
        return LATEST_VERSION
    return _field(_decode(stdin), "cniVersion", str) or LATEST_VERSION


def _config(raw: Json, version: str) -> NetConf:
    name = _field(raw, "name", str)
    if not name:
        raise CniError(BAD_CONFIG, "name is missing from the network configuration")
    if not IDENTIFIER.fullmatch(name):
        raise CniError(BAD_CONFIG, f"name is {_show(name)}, not {IDENTIFIER_FORM}")
    return NetConf(
        cni_version=version,
        name=name,
        type=_field(raw, "type", str) or "",
        prev_result=_field(raw, "prevResult", dict),
        runtime_config=_field(raw, "runtimeConfig", dict) or {},
        args=_field(raw, "args", dict) or {},
        valid_attachments=_valid_attachments(raw),
        dns=_dns(raw),
        raw=raw,
    )


def _valid_attachments(raw: Json) -> tuple[tuple[str, str], ...] | None:
    """Return the attachments GC is to keep. An entry in error is never skipped: its pod would be removed."""
    key = "cni.dev/valid-attachments"
    if raw.get(key) is None:
        return None
    return tuple(
        (_text(at, item, "containerID"), _text(at, item, "ifname")) for at, item in _objects(raw, key)
    )


def _dns(raw: Mapping[str, Any], where: str = "") -> Json:
    dns = _field(raw, "dns", dict, where) or {}
    _field(dns, "domain", str, f"{where}dns.")
    for key in ("nameservers", "search", "options"):
        for item in _field(dns, key, list, f"{where}dns.") or ():
            if not isinstance(item, str):
                raise CniError(BAD_CONFIG, f"{where}dns.{key} has {_show(item)} in it, which is not a string")
    return dns


def _interface(where: str, raw: Json) -> Interface:
    return Interface(
        name=_text(where, raw, "name"),
        mac=_field(raw, "mac", str, where) or "",
        sandbox=_field(raw, "sandbox", str, where) or "",
        mtu=_field(raw, "mtu", int, where),
    )


def _ip(where: str, raw: Json, interfaces: int) -> IpConfig:
    index = _field(raw, "interface", int, where)
    if index is not None and not 0 <= index < interfaces:
        raise CniError(BAD_CONFIG, f"{where}interface is {index}, but there are {interfaces} interfaces")
    address = _text(where, raw, "address")
    _check_cidr(where, "address", address)
    gateway = _field(raw, "gateway", str, where) or ""
    _check_address(where, "gateway", gateway)
    return IpConfig(address, gateway, index)


def _route(where: str, raw: Json) -> Route:
    dst, gw = _text(where, raw, "dst"), _field(raw, "gw", str, where) or ""
    _check_cidr(where, "dst", dst)
    _check_address(where, "gw", gw)
    return Route(dst, gw)


def _check_address(where: str, key: str, text: str) -> None:
    try:
        if text:
            ip_address(text)
    except ValueError:
        raise CniError(BAD_CONFIG, f"{where}{key} is {_show(text)}, which is not an address") from None


def _check_cidr(where: str, key: str, text: str) -> None:
    fault = CniError(
        BAD_CONFIG, f"{where}{key} is {_show(text)}, which is not an address with a prefix length"
    )
    if "/" not in text:
        raise fault
    try:
        ip_interface(text)
    except ValueError:
        raise fault from None


JSON_NAMES = {str: "a string", int: "a number", dict: "an object", list: "a list"}


def _field(raw: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T | None:
    """Return a field of that type; None when absent or null."""
    value = raw.get(key)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise CniError(BAD_CONFIG, f"{where}{key} is {_show(value)}, which is not {JSON_NAMES[kind]}")


def _text(where: str, raw: Json, key: str) -> str:
    """Return a string that must be there."""
    value = _field(raw, key, str, where)
    if not value:
        raise CniError(BAD_CONFIG, f"{where}{key} is missing")
    return value


def _objects(raw: Mapping[str, Any], key: str, where: str = "") -> list[tuple[str, Json]]:
    """Return the objects in a list, each with the name its fields go by in messages."""
    items = _field(raw, key, list, where) or []
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise CniError(BAD_CONFIG, f"{where}{key}[{at}] is {_show(item)}, which is not an object")
    return [(f"{where}{key}[{at}].", item) for at, item in enumerate(items)]


def _ip_version(address: str) -> str:
    return "6" if ":" in address else "4"


def _given(**values: str | int | None) -> Json:
    """Return the values that are there."""
    return {key: value for key, value in values.items() if value not in ("", None)}


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
