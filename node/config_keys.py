"""Every key of the daemon's configuration, with its type, meaning, flag and default."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

KUBERNETES, PRIMARY = "kubernetes", "primary"
HOST_PORT = r"^(.+:[0-9]{1,5})?$"
URL = r"^(https?://[^/?#\s]+(/[^?#\s]*)?)?$"
LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
NODE_NAME = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$"


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


def _wrong_egress(value: str) -> str:
    try:
        address = ip_address(value)
    except ValueError as error:
        return str(error)
    wrong = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    return f"{value!r} is not an address that answers find back to" if wrong else ""


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


def _meta(description: str, facts: Facts = Facts()) -> Meta:
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
    egress_addresses: Annotated[
        tuple[str, ...],
        _meta(
            "address that this node's pods get towards the outside, at most one of each family, instead of "
            "that of the interface that leads out; it has to be on this node, or be routed to it. The "
            "annotation podwire.io/egress-address of the Node object counts over it",
            Facts("--egress-address", "ADDRESS", reload=True, wrong=_wrong_egress),
        ),
    ] = ()
    cni_conf_dir: Annotated[
        str,
        _meta(
            "folder that the conflist is written to when pods can be connected; without one, `podwire "
            "install` writes it",
            Facts("--cni-conf-dir", "DIR"),
        ),
    ] = ""


class Network(_Section, frozen=True):
    """How packets get to the pods of other nodes."""

    backend: Annotated[
        Literal["auto", "direct", "vxlan", "wireguard"],
        _meta(
            "how other nodes' pods are reached: direct is by plain routes, to nodes on a subnet of this one "
            "or else by the default gateway, which must know the podCIDRs then; vxlan is in UDP packets; "
            "wireguard likewise, encrypted; auto is direct on the same subnet and vxlan elsewhere",
            Facts("--backend", "NAME", reload=True),
        ),
    ] = "auto"
    mtu: Annotated[
        Annotated[int, Meta(ge=576, le=65535)] | None,
        _meta(
            "largest packet in bytes that the network between nodes carries, where that is less than what "
            "the interfaces and routes to them say",
            Facts("--network-mtu", "BYTES", reload=True),
        ),
    ] = None
    vxlan_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)],
        _meta("UDP port of VXLAN, the same on all nodes", Facts("--vxlan-port", "PORT", reload=True)),
    ] = 8472
    vxlan_id: Annotated[
        Annotated[int, Meta(ge=1, le=16777215)],
        _meta(
            "number of the network inside VXLAN (VNI), the same on all nodes",
            Facts("--vxlan-id", "NUMBER", reload=True),
        ),
    ] = msgspec.field(default=112, name="vxlanID")
    wireguard_port: Annotated[
        Annotated[int, Meta(ge=1, le=65534)],
        _meta(
            "first of the two UDP ports of WireGuard, the same on all nodes; the other is the one after it",
            Facts("--wireguard-port", "PORT", reload=True),
        ),
    ] = 51820
    wireguard_rotate_days: Annotated[
        Annotated[int, Meta(ge=0, le=3650)],
        _meta(
            "after so many days WireGuard's keys of this node are changed, without loss; 0: only by "
            "`podwire wireguard rotate`",
            Facts("--wireguard-rotate-days", "DAYS", reload=True),
        ),
    ] = 0


class Services(_Section, frozen=True):
    """What the service proxy does beyond the Services themselves."""

    mode: Annotated[
        Literal["nftables", "iptables", "ipvs"],
        _meta(
            "what services are made of in the kernel: maps of nftables; kube-proxy's chains of iptables, in "
            "the variant that the node's other programs use; or virtual servers of IPVS",
            Facts("--proxy-mode", "MODE"),
        ),
    ] = "nftables"
    ipvs_scheduler: Annotated[
        Literal["rr", "lc", "sh", "wrr"],
        _meta(
            "how IPVS chooses among endpoints: in turn, the one with the fewest connections, by the client's "
            "address, or in turn by weight (all have the same)",
            Facts("--ipvs-scheduler", "SCHEDULER"),
        ),
    ] = "rr"
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


class L7(_Section, frozen=True):
    """The L7 proxy, for Services that ask for it by the annotation podwire.io/proxy."""

    enabled: Annotated[
        bool,
        _meta(
            "serve them by a HAProxy on this node, which runs once there is one; off: they are balanced like "
            "all others",
            Facts("--l7"),
        ),
    ] = True
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)],
        _meta(
            "TCP port that it listens on, on addresses of its own (169.254.112.1 and such) only",
            Facts("--l7-port", "PORT"),
        ),
    ] = 10000
    max_connections: Annotated[
        Annotated[int, Meta(ge=10, le=1000000)],
        _meta("connections of clients that it holds at a time", Facts("--l7-max-connections", "NUMBER")),
    ] = 20000
    threads: Annotated[
        Annotated[int, Meta(ge=0, le=64)],
        _meta("threads that it works with; 0 is one for each processor", Facts("--l7-threads", "NUMBER")),
    ] = 0
    drain_seconds: Annotated[
        Annotated[int, Meta(ge=0, le=2592000)],
        _meta(
            "how long connections may stay in a process that a reload has replaced, before they are cut; 0 "
            "is for ever",
        ),
    ] = 0
    access_log: Annotated[
        str,
        _meta(
            "file that requests of services go to which ask for that, a JSON object a line",
            Facts("--l7-access-log", "FILE"),
        ),
    ] = "/var/log/podwire/l7.log"
    sample: Annotated[
        Annotated[int, Meta(ge=1, le=1000000)],
        _meta("one request in so many is measured, for the times in metrics and `podwire l7 show`"),
    ] = 100


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
    network: Network = Network()
    pods: Pods = Pods()
    services: Services = Services()
    l7: L7 = L7()
    ipam: Ipam = Ipam()
    metrics: Metrics = Metrics()
    healthz: Healthz = Healthz()
    logs: Logs = Logs()
    paths: Paths = Paths()
