"""The container's side of the CNI protocol: requests, versions and errors, as values.

Source: CNI specification 1.1.0 (sections 1, 2 and 5) and its earlier versions down to 0.3.0. Everything
here is pure; whatever bytes come in, the only exception that comes out is `CniError`. Errors and results are
defined in `cni.errors` and `cni.results` and are names of this module too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import msgspec

from cni.errors import (
    ALREADY_EXISTS,
    BAD_CONFIG,
    BAD_ENVIRONMENT,
    CHECK_FAILED,
    DECODE_FAILURE,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    IO_FAILURE,
    LIMITED,
    NOT_AVAILABLE,
    TRY_AGAIN,
    UNKNOWN_CONTAINER,
    UNSUPPORTED_FIELD,
    CniError,
)
from cni.fields import IDENTIFIER, IDENTIFIER_FORM, Json, objects, show, text, typed
from cni.results import (
    LATEST_VERSION,
    SUPPORTED_VERSIONS,
    Interface,
    IpConfig,
    Result,
    Route,
    merged,
    parse_dns,
    parse_result,
    result_json,
)

__all__ = [
    "ALREADY_EXISTS",
    "BAD_CONFIG",
    "BAD_ENVIRONMENT",
    "CHECK_FAILED",
    "DECODE_FAILURE",
    "INCOMPATIBLE_VERSION",
    "INTERNAL",
    "IO_FAILURE",
    "KNOWN_ARGS",
    "LATEST_VERSION",
    "LIMITED",
    "NOT_AVAILABLE",
    "SUPPORTED_VERSIONS",
    "TRY_AGAIN",
    "UNKNOWN_CONTAINER",
    "UNSUPPORTED_FIELD",
    "CniError",
    "Command",
    "Interface",
    "IpConfig",
    "Json",
    "NetConf",
    "Request",
    "Result",
    "Route",
    "error_json",
    "merged",
    "parse_request",
    "parse_result",
    "result_json",
    "version_json",
    "version_of",
]

T = TypeVar("T")

OLDEST_VERSION = "0.1.0"  # what a configuration without cniVersion means; it had none

KNOWN_ARGS = (
    "IgnoreUnknown",
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_INFRA_CONTAINER_ID",
    "K8S_POD_UID",
    "IP",
    "MAC",
)
CONTAINER_ID_BYTES = 128
"""Twice what runtimes use, which is 64 hexadecimal digits; the specification itself has no limit."""
IFNAME_BYTES = 15


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
        raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND is {show(value)}, not one of {known}") from None


def _check_variables(command: Command, env: Mapping[str, str]) -> None:
    """Refuse what a command cannot work with; a relative CNI_NETNS means another file to the daemon."""
    required = REQUIRED.get(command, ())
    if missing := [name for name in required if not env.get(name)]:
        raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND {command} needs {', '.join(missing)}: not set")
    for name in required:
        _check_utf8(name, env[name])
    container_id, ifname, netns = (env.get(f"CNI_{name}", "") for name in ("CONTAINERID", "IFNAME", "NETNS"))
    if "CNI_CONTAINERID" in required and not IDENTIFIER.fullmatch(container_id):
        raise CniError(BAD_ENVIRONMENT, f"CNI_CONTAINERID is {show(container_id)}, not {IDENTIFIER_FORM}")
    if len(container_id) > CONTAINER_ID_BYTES and "CNI_CONTAINERID" in required:
        fault = f"which is longer than {CONTAINER_ID_BYTES} bytes"
        raise CniError(BAD_ENVIRONMENT, f"CNI_CONTAINERID is {show(container_id)}, {fault}")
    if "CNI_IFNAME" in required and (fault := _ifname_fault(ifname)):
        raise CniError(BAD_ENVIRONMENT, f"CNI_IFNAME is {show(ifname)}, which {fault}")
    if "CNI_NETNS" in required and not netns.startswith("/"):
        raise CniError(BAD_ENVIRONMENT, f"CNI_NETNS is {show(netns)}, which is not an absolute path")


def _check_utf8(name: str, text: str) -> None:
    """Refuse lone surrogates, as which bytes that are not UTF-8 come out of the environment."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CniError(BAD_ENVIRONMENT, f"{name} is {show(text)}, which is not UTF-8")


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
            raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS has {show(item)} in it, which is not KEY=VALUE")
        pairs.append((key, value))
    ignore = dict(pairs).get("IgnoreUnknown", "").lower() in ("1", "true")
    unknown = [key for key, _ in pairs if key not in KNOWN_ARGS]
    if unknown and not ignore:
        raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS has the unknown key {show(unknown[0])}")
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
        raise CniError(DECODE_FAILURE, f"the network configuration is {show(raw)}, not an object")
    return raw


def _supported_version(raw: Json) -> str:
    version = raw.get("cniVersion")
    if version is not None and not isinstance(version, str):
        raise CniError(DECODE_FAILURE, f"cniVersion is {show(version)}, which is not a string")
    if version in SUPPORTED_VERSIONS:
        return version
    what = f"cniVersion {show(version)}" if version else f"no cniVersion, which means {OLDEST_VERSION},"
    supported = ", ".join(SUPPORTED_VERSIONS)
    raise CniError(INCOMPATIBLE_VERSION, f"{what} is not supported", f"supported are {supported}")


def _requested_version(stdin: bytes) -> str:
    """Return the version that VERSION is to repeat; runtimes ask with any, and some with none."""
    if not stdin.strip():
        return LATEST_VERSION
    return typed(_decode(stdin), "cniVersion", str) or LATEST_VERSION


def _config(raw: Json, version: str) -> NetConf:
    name = typed(raw, "name", str)
    if not name:
        raise CniError(BAD_CONFIG, "name is missing from the network configuration")
    if not IDENTIFIER.fullmatch(name):
        raise CniError(BAD_CONFIG, f"name is {show(name)}, not {IDENTIFIER_FORM}")
    return NetConf(
        cni_version=version,
        name=name,
        type=typed(raw, "type", str) or "",
        prev_result=typed(raw, "prevResult", dict),
        runtime_config=typed(raw, "runtimeConfig", dict) or {},
        args=typed(raw, "args", dict) or {},
        valid_attachments=_valid_attachments(raw),
        dns=parse_dns(raw),
        raw=raw,
    )


def _valid_attachments(raw: Json) -> tuple[tuple[str, str], ...] | None:
    """Return the attachments GC is to keep. An entry in error is never skipped: its pod would be removed.

    libcni writes the list under an older name too (`cni.dev/attachments`), which the specification never had.
    """
    key = "cni.dev/valid-attachments"
    if raw.get(key) is None:
        return None
    return tuple((text(at, item, "containerID"), text(at, item, "ifname")) for at, item in objects(raw, key))
