"""The daemon's configuration: what can be set, what it means, and what it is when nobody sets it.

    Configuration  the file's content and every option of the command line, one frozen value
    Option         one of its keys, with what help, schema and documentation say of it: the only table of them
    changes        what differs between two configurations, and whether it counts without a restart

Reading a file is `node.config_file`. Keys are written as Kubernetes writes those of its own components.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

if TYPE_CHECKING:
    from ipam.pools import IpamConfig

DEFAULT_PATH = "/etc/podwire/config.yaml"
KUBERNETES, PRIMARY = "kubernetes", "primary"
HOST_PORT = r"^(.+:[0-9]{1,5})?$"
URL = r"^(https?://[^/?#\s]+(/[^?#\s]*)?)?$"
LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
NODE_NAME = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$"


class ConfigError(Exception):
    """A configuration that cannot be used; each problem is a sentence."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a key beside its type: its flag, and whether a change counts without a restart.

    `wanted` completes "… is not". `wrong` says what is wrong with a value (with an item, of a list) that has
    the right type; "" is nothing.
    """

    flag: str = ""
    metavar: str = ""
    reload: bool = False
    wanted: str = ""
    wrong: Callable[[Any], str] | None = None


def _wrong_address(value: str) -> str:
    port = value.rpartition(":")[2]
    return f"{value!r} is not host:port" if value and int(port) > 65535 else ""


def _wrong_cidr(value: str) -> str:
    try:
        ip_network(value)
    except ValueError as error:
        return str(error)
    return ""


def _wrong_node_ports(value: str) -> str:
    return "" if value == PRIMARY else _wrong_cidr(value)


def _wrong_range(value: str) -> str:
    from ipam.ranges import parse_range  # netaddr: not for every command line

    try:
        parse_range(value)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return ""


def _wrong_source(value: str) -> str:
    slip = value != KUBERNETES and difflib.get_close_matches(value.lower(), [KUBERNETES], cutoff=0.8)
    return f"{value!r} is not {KUBERNETES} (a folder of that name is './{value}')" if slip else ""


def _meta(description: str, facts: Facts) -> Meta:
    more = {"x-podwire-flag": facts.flag, "x-podwire-reload": facts.reload}
    return Meta(
        description=description,
        extra={"facts": facts},
        extra_json_schema={key: value for key, value in more.items() if value != ""},
    )


class _Section(Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """A part of the file."""


class Kubernetes(_Section, frozen=True):
    """How the Kubernetes API is reached, where `source` is kubernetes."""

    kubeconfig: Annotated[
        str,
        _meta(
            "kubeconfig with the API server and credentials; without one, the service account of the pod "
            "that the daemon runs in",
            Facts("--kubeconfig", "FILE"),
        ),
    ] = ""
    api_override: Annotated[
        Annotated[str, Meta(pattern=URL)],
        _meta(
            "API server to ask instead of the one that kubeconfig or environment name, for nodes whose "
            "service proxy is not up yet",
            Facts("--kubernetes-api-override", "URL", wanted="a URL such as https://192.168.0.10:6443"),
        ),
    ] = ""
    namespace: Annotated[
        Annotated[str, Meta(pattern=LABEL)],
        _meta(
            "namespace of the daemon's own objects, the Leases by which nodes claim podCIDRs",
            Facts("--kubernetes-namespace", "NAME", wanted="a namespace's name"),
        ),
    ] = "kube-system"
    cluster_cidrs: Annotated[
        tuple[str, ...],
        _meta(
            "ranges that this node claims its podCIDRs from, one of each family, where no controller "
            "allocates them; none: podCIDRs are read only",
            Facts("--cluster-cidr", "CIDR", wrong=_wrong_cidr),
        ),
    ] = msgspec.field(default=(), name="clusterCIDRs")
    node_cidr_mask_size: Annotated[
        Annotated[int, Meta(ge=8, le=30)],
        _meta("prefix length of a claimed IPv4 podCIDR", Facts("--node-cidr-mask-size", "BITS")),
    ] = msgspec.field(default=24, name="nodeCIDRMaskSize")
    node_cidr_mask_size_ipv6: Annotated[
        Annotated[int, Meta(ge=16, le=126)],
        _meta("prefix length of a claimed IPv6 podCIDR", Facts("--node-cidr-mask-size-ipv6", "BITS")),
    ] = msgspec.field(default=64, name="nodeCIDRMaskSizeIPv6")


class Pods(_Section, frozen=True):
    """How pods are connected, and how they are seen."""

    mode: Annotated[
        Literal["routed", "bridge", "flat"],
        _meta(
            "how pods are connected: a route each, a bridge, or on the node's subnet", Facts("--mode", "MODE")
        ),
    ] = "routed"
    mtu: Annotated[
        Annotated[int, Meta(ge=576, le=65535)] | None,
        _meta("MTU of pods in bytes; without one, that of the way out", Facts("--mtu", "BYTES")),
    ] = None
    flat_addresses: Annotated[
        tuple[str, ...],
        _meta(
            "in mode flat: the pods' addresses, each an address, a-b, or a CIDR",
            Facts("--flat-addresses", "RANGE", reload=True, wrong=_wrong_range),
        ),
    ] = ()
    flat_interface: Annotated[
        str,
        _meta(
            "in mode flat: where the node answers for them; without one, the interface that leads out",
            Facts("--flat-interface", "NAME"),
        ),
    ] = ""
    masquerade: Annotated[
        Literal["both", "ipv4", "ipv6", "none"],
        _meta(
            "in which families pods get the node's address towards the outside",
            Facts("--masquerade", "FAMILIES", reload=True),
        ),
    ] = "both"
    no_masquerade_cidrs: Annotated[
        tuple[str, ...],
        _meta(
            "pods keep their address towards these ranges, as towards pods and nodes",
            Facts("--no-masquerade-cidr", "CIDR", reload=True, wrong=_wrong_cidr),
        ),
    ] = msgspec.field(default=(), name="noMasqueradeCIDRs")
    cni_conf_dir: Annotated[
        str,
        _meta(
            "folder that the conflist is written to when pods can be connected; without one, `podwire "
            "install` writes it",
            Facts("--cni-conf-dir", "DIR"),
        ),
    ] = ""


class Services(_Section, frozen=True):
    """What the service proxy does beyond the Services themselves."""

    node_port_addresses: Annotated[
        tuple[str, ...],
        _meta(
            "node ports are on the node's addresses in these ranges; `primary` stands for the addresses in "
            "its Node object",
            Facts("--nodeport-addresses", "CIDR", reload=True, wrong=_wrong_node_ports),
        ),
    ] = (PRIMARY,)
    conntrack_tcp_be_liberal: Annotated[
        bool,
        _meta(
            "let connection tracking pass TCP packets outside the window, which otherwise may reset a "
            "connection to a service (sets net.netfilter.nf_conntrack_tcp_be_liberal)",
            Facts("--conntrack-tcp-be-liberal"),
        ),
    ] = msgspec.field(default=False, name="conntrackTCPBeLiberal")


class AddressPool(_Section, frozen=True):
    """A named set of ranges, for the pods of some namespaces and for those that ask for it by name."""

    name: Annotated[str, Meta(description="name of the pool", pattern=LABEL)]
    ranges: Annotated[
        tuple[str, ...], Meta(description="its addresses, each an address, a-b, or a CIDR", min_length=1)
    ]
    namespaces: Annotated[
        tuple[str, ...],
        Meta(description="namespaces whose pods get an address of it: names or patterns; `*` is every pod"),
    ] = ()


class Ipam(_Section, frozen=True):
    """Which addresses pods are given beside those of the podCIDRs, and which not."""

    file: Annotated[
        str,
        _meta(
            "YAML file with pools, exclusions and reservations, instead of all other keys here",
            Facts("--ipam-config", "FILE", reload=True),
        ),
    ] = ""
    pools: Annotated[
        tuple[AddressPool, ...], _meta("pools of addresses; no two share an address", Facts(reload=True))
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        _meta(
            "addresses that are never given: each an address, a-b, or a CIDR",
            Facts(reload=True, wrong=_wrong_range),
        ),
    ] = ()
    reserve: Annotated[
        tuple[str, ...],
        _meta(
            "addresses that only those pods get that ask for them",
            Facts(reload=True, wrong=_wrong_range),
        ),
    ] = ()
    quarantine: Annotated[
        int | float | str,
        _meta(
            "how long a freed address rests: other nodes may still send a service's traffic to it",
            Facts(reload=True, wanted="a time such as 10, 10s, 5m or 1h"),
        ),
    ] = "10s"
    exhausted_status: Annotated[
        bool,
        _meta(
            "whether STATUS fails while a range is full, so that the runtime reports the node as not ready",
            Facts(reload=True),
        ),
    ] = True


class Metrics(_Section, frozen=True):
    """Where figures are served."""

    bind_address: Annotated[
        Annotated[str, Meta(pattern=HOST_PORT)],
        _meta(
            '/metrics, /proxyMode; "" for none',
            Facts("--metrics-bind-address", "HOST:PORT", wanted="host:port", wrong=_wrong_address),
        ),
    ] = "127.0.0.1:10249"


class Healthz(_Section, frozen=True):
    """Where load balancers ask whether the node is healthy."""

    bind_address: Annotated[
        Annotated[str, Meta(pattern=HOST_PORT)],
        _meta(
            '/healthz, /livez; "" for none',
            Facts("--healthz-bind-address", "HOST:PORT", wanted="host:port", wrong=_wrong_address),
        ),
    ] = "[::]:10256"


class Logs(_Section, frozen=True):
    """What is logged, to standard error, and how."""

    format: Annotated[
        Literal["console", "json"],
        _meta("lines for people, or a JSON object a line", Facts("--log-format", "FORMAT")),
    ] = "console"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _meta("what is logged: this level and those above", Facts("--log-level", "LEVEL", reload=True)),
    ] = "info"


class Paths(_Section, frozen=True):
    """Where the daemon keeps and serves what it has."""

    state_dir: Annotated[str, _meta("the ledger", Facts("--state-dir", "DIR"))] = "/var/lib/podwire"
    socket: Annotated[
        str, _meta("unix socket that the CNI plugin and the command line ask", Facts("--socket", "PATH"))
    ] = "/run/podwire/podwire.sock"


class Configuration(_Section, frozen=True):
    """The configuration of the daemon of one node."""

    api_version: Annotated[
        Literal["podwire.io/v1alpha1"], Meta(description="version of this file's form")
    ] = "podwire.io/v1alpha1"
    kind: Annotated[Literal["Configuration"], Meta(description="what this file is")] = "Configuration"
    source: Annotated[
        str,
        _meta(
            "where Services and Nodes come from: `kubernetes`, its API, or a folder of manifests",
            Facts("--source", "kubernetes|DIR", wrong=_wrong_source),
        ),
    ] = ""
    node_name: Annotated[
        Annotated[str, Meta(pattern=NODE_NAME)],
        _meta(
            "this node's Node object; without one, the host name in small letters",
            Facts("--node-name", "NAME", wanted="a Node's name"),
        ),
    ] = ""
    kubernetes: Kubernetes = Kubernetes()
    pods: Pods = Pods()
    services: Services = Services()
    ipam: Ipam = Ipam()
    metrics: Metrics = Metrics()
    healthz: Healthz = Healthz()
    logs: Logs = Logs()
    paths: Paths = Paths()


@dataclass(frozen=True, slots=True)
class Option:
    """One key: `place` are its attributes in a Configuration, `key` its name in the file.

    `kind` is the inspected type, without its description; of a list, `items` that of its items.
    """

    place: tuple[str, ...]
    key: str
    type: Any
    kind: msgspec.inspect.Type
    default: Any
    description: str
    facts: Facts = Facts()

    @property
    def items(self) -> msgspec.inspect.Type | None:
        """The type of a list's items; None when the value is no list."""
        kind = self.kind
        return kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed, where they can be listed."""
        # Not kind.values: those are sorted, and the type has them as people should read them.
        listed = isinstance(self.kind, msgspec.inspect.LiteralType)
        return tuple(get_args(get_args(self.type)[0])) if listed else ()

    @property
    def wanted(self) -> str:
        """What a value has to be, to complete "… is not"."""
        kind = self.kind
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = kind.types[0]
        if self.facts.wanted:
            return self.facts.wanted
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(kind, msgspec.inspect.IntType):
            return f"between {kind.ge} and {kind.le}"
        return "true or false" if isinstance(kind, msgspec.inspect.BoolType) else "text"

    def of(self, configuration: Configuration) -> Any:
        """Return the value that a configuration has for it."""
        return functools.reduce(getattr, self.place, configuration)


@functools.cache
def options() -> Mapping[str, Option]:
    """Return every option by its key, in the order of the file."""
    return {option.key: option for option in _options(Configuration, (), "")}


def _options(struct: type[Struct], place: tuple[str, ...], prefix: str) -> Iterator[Option]:
    inspected = msgspec.inspect.type_info(struct)
    assert isinstance(inspected, msgspec.inspect.StructType)
    declared = {field.name: field for field in msgspec.structs.fields(struct)}
    for field in inspected.fields:
        here, key = (*place, field.name), f"{prefix}{field.encode_name}"
        kind, facts, description = field.type, Facts(), ""
        while isinstance(kind, msgspec.inspect.Metadata):
            facts = (kind.extra or {}).get("facts", facts)
            description = (kind.extra_json_schema or {}).get("description", description)
            kind = kind.type
        if isinstance(kind, msgspec.inspect.StructType):
            yield from _options(kind.cls, here, f"{key}.")
        else:
            default = declared[field.name].default
            yield Option(here, key, declared[field.name].type, kind, default, description, facts)


def bare(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Return an inspected type without what is only said about it."""
    return bare(kind.type) if isinstance(kind, msgspec.inspect.Metadata) else kind


def build(values: Mapping[str, Any]) -> Configuration:
    """Return a configuration of values by their keys; what is not named has its default."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        *section, name = options()[key].place
        (sections.setdefault(section[0], {}) if section else top)[name] = value
    default = Configuration()
    for name, found in sections.items():
        top[name] = msgspec.structs.replace(getattr(default, name), **found)
    return Configuration(**top)


def changes(old: Configuration, new: Configuration) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys whose value differs: those that count at once, and those that need a restart."""
    differing = [option for option in options().values() if option.of(old) != option.of(new)]
    return (
        tuple(option.key for option in differing if option.facts.reload),
        tuple(option.key for option in differing if not option.facts.reload),
    )


def taken_over(old: Configuration, new: Configuration) -> Configuration:
    """Return what a daemon runs by after a reload: the new value where that counts at once, else the old."""
    return build({o.key: o.of(new if o.facts.reload else old) for o in options().values()})


def ipam_of(configuration: Configuration) -> IpamConfig:
    """Return how the node gives addresses; in mode flat with a pool for everybody.

    Raises RangeError, whose field is a key under `ipam`.
    """
    from ipam.pools import IpamConfig, Pool
    from ipam.ranges import parse_range

    raw = msgspec.structs.asdict(configuration.ipam)
    raw["pools"] = [msgspec.structs.asdict(pool) for pool in configuration.ipam.pools]
    del raw["file"]
    config = IpamConfig.parse(raw)
    ranges = tuple(parse_range(text) for text in configuration.pods.flat_addresses)
    if configuration.pods.mode != "flat" or not ranges:
        return config
    everybody = Pool("flat", ranges, ("*",))
    return IpamConfig.from_json(replace(config, pools=(*config.pools, everybody)).to_json())


def schema() -> dict[str, Any]:
    """Return the JSON schema of the file."""
    found = msgspec.json.schema(Configuration)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://podwire.io/v1alpha1/configuration.json",
        **found,
    }


def plain(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration as the file would have it: every key, with its value."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(configuration))
    return found
