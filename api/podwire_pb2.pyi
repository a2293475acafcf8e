from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CniRequest(_message.Message):
    __slots__ = ("command", "container_id", "netns", "ifname", "args", "path", "config", "request_id")
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    NETNS_FIELD_NUMBER: _ClassVar[int]
    IFNAME_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    command: str
    container_id: str
    netns: str
    ifname: str
    args: str
    path: str
    config: bytes
    request_id: str
    def __init__(self, command: _Optional[str] = ..., container_id: _Optional[str] = ..., netns: _Optional[str] = ..., ifname: _Optional[str] = ..., args: _Optional[str] = ..., path: _Optional[str] = ..., config: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class CniReply(_message.Message):
    __slots__ = ("exit_code", "stdout")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    stdout: bytes
    def __init__(self, exit_code: _Optional[int] = ..., stdout: _Optional[bytes] = ...) -> None: ...

class PodsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PodsReply(_message.Message):
    __slots__ = ("pods",)
    PODS_FIELD_NUMBER: _ClassVar[int]
    pods: _containers.RepeatedCompositeFieldContainer[Pod]
    def __init__(self, pods: _Optional[_Iterable[_Union[Pod, _Mapping]]] = ...) -> None: ...

class Pod(_message.Message):
    __slots__ = ("container_id", "ifname", "netns", "host_ifname", "addresses", "state", "created")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    IFNAME_FIELD_NUMBER: _ClassVar[int]
    NETNS_FIELD_NUMBER: _ClassVar[int]
    HOST_IFNAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    ifname: str
    netns: str
    host_ifname: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    state: str
    created: float
    def __init__(self, container_id: _Optional[str] = ..., ifname: _Optional[str] = ..., netns: _Optional[str] = ..., host_ifname: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., created: _Optional[float] = ...) -> None: ...

class ServicesRequest(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class ServicesReply(_message.Message):
    __slots__ = ("services",)
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    services: _containers.RepeatedCompositeFieldContainer[Service]
    def __init__(self, services: _Optional[_Iterable[_Union[Service, _Mapping]]] = ...) -> None: ...

class Service(_message.Message):
    __slots__ = ("name", "cluster_ips", "external_ips", "balancer_ips", "source_ranges", "ports", "internal_policy", "external_policy", "affinity_seconds", "health_port", "endpoints_used", "endpoints_known", "problems", "frontends", "endpoints")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_IPS_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_IPS_FIELD_NUMBER: _ClassVar[int]
    BALANCER_IPS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RANGES_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_POLICY_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_POLICY_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_PORT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_USED_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    cluster_ips: _containers.RepeatedScalarFieldContainer[str]
    external_ips: _containers.RepeatedScalarFieldContainer[str]
    balancer_ips: _containers.RepeatedScalarFieldContainer[str]
    source_ranges: _containers.RepeatedScalarFieldContainer[str]
    ports: _containers.RepeatedCompositeFieldContainer[ServicePort]
    internal_policy: str
    external_policy: str
    affinity_seconds: int
    health_port: int
    endpoints_used: int
    endpoints_known: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    frontends: _containers.RepeatedCompositeFieldContainer[Frontend]
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    def __init__(self, name: _Optional[str] = ..., cluster_ips: _Optional[_Iterable[str]] = ..., external_ips: _Optional[_Iterable[str]] = ..., balancer_ips: _Optional[_Iterable[str]] = ..., source_ranges: _Optional[_Iterable[str]] = ..., ports: _Optional[_Iterable[_Union[ServicePort, _Mapping]]] = ..., internal_policy: _Optional[str] = ..., external_policy: _Optional[str] = ..., affinity_seconds: _Optional[int] = ..., health_port: _Optional[int] = ..., endpoints_used: _Optional[int] = ..., endpoints_known: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., frontends: _Optional[_Iterable[_Union[Frontend, _Mapping]]] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ...) -> None: ...

class ServicePort(_message.Message):
    __slots__ = ("name", "protocol", "port", "node_port")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    NODE_PORT_FIELD_NUMBER: _ClassVar[int]
    name: str
    protocol: str
    port: int
    node_port: int
    def __init__(self, name: _Optional[str] = ..., protocol: _Optional[str] = ..., port: _Optional[int] = ..., node_port: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("port", "address", "node", "local", "used", "why", "connections")
    PORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    port: str
    address: str
    node: str
    local: bool
    used: str
    why: str
    connections: int
    def __init__(self, port: _Optional[str] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., local: _Optional[bool] = ..., used: _Optional[str] = ..., why: _Optional[str] = ..., connections: _Optional[int] = ...) -> None: ...

class FrontendsRequest(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class FrontendsReply(_message.Message):
    __slots__ = ("frontends",)
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    frontends: _containers.RepeatedCompositeFieldContainer[Frontend]
    def __init__(self, frontends: _Optional[_Iterable[_Union[Frontend, _Mapping]]] = ...) -> None: ...

class Frontend(_message.Message):
    __slots__ = ("service", "match", "protocol", "port", "origin", "action", "masquerade", "endpoints", "affinity_seconds", "restricted", "sources", "connections")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    MASQUERADE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESTRICTED_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    service: str
    match: str
    protocol: str
    port: int
    origin: str
    action: str
    masquerade: str
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    affinity_seconds: int
    restricted: bool
    sources: _containers.RepeatedScalarFieldContainer[str]
    connections: int
    def __init__(self, service: _Optional[str] = ..., match: _Optional[str] = ..., protocol: _Optional[str] = ..., port: _Optional[int] = ..., origin: _Optional[str] = ..., action: _Optional[str] = ..., masquerade: _Optional[str] = ..., endpoints: _Optional[_Iterable[str]] = ..., affinity_seconds: _Optional[int] = ..., restricted: _Optional[bool] = ..., sources: _Optional[_Iterable[str]] = ..., connections: _Optional[int] = ...) -> None: ...

class RoutesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoutesReply(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("destination", "via", "node", "backend", "device", "mtu", "peer")
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    VIA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    destination: str
    via: str
    node: str
    backend: str
    device: str
    mtu: int
    peer: str
    def __init__(self, destination: _Optional[str] = ..., via: _Optional[str] = ..., node: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., mtu: _Optional[int] = ..., peer: _Optional[str] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("version", "node", "mode", "dataplane", "pod_cidrs", "ready", "last_sync", "services", "frontends", "elements", "problems", "source", "backend", "pod_mtu", "vxlan_port", "vxlan_id", "l7", "wireguard_port")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DATAPLANE_FIELD_NUMBER: _ClassVar[int]
    POD_CIDRS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LAST_SYNC_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    POD_MTU_FIELD_NUMBER: _ClassVar[int]
    VXLAN_PORT_FIELD_NUMBER: _ClassVar[int]
    VXLAN_ID_FIELD_NUMBER: _ClassVar[int]
    L7_FIELD_NUMBER: _ClassVar[int]
    WIREGUARD_PORT_FIELD_NUMBER: _ClassVar[int]
    version: str
    node: str
    mode: str
    dataplane: str
    pod_cidrs: _containers.RepeatedScalarFieldContainer[str]
    ready: bool
    last_sync: float
    services: int
    frontends: int
    elements: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    source: str
    backend: str
    pod_mtu: int
    vxlan_port: int
    vxlan_id: int
    l7: str
    wireguard_port: int
    def __init__(self, version: _Optional[str] = ..., node: _Optional[str] = ..., mode: _Optional[str] = ..., dataplane: _Optional[str] = ..., pod_cidrs: _Optional[_Iterable[str]] = ..., ready: _Optional[bool] = ..., last_sync: _Optional[float] = ..., services: _Optional[int] = ..., frontends: _Optional[int] = ..., elements: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., source: _Optional[str] = ..., backend: _Optional[str] = ..., pod_mtu: _Optional[int] = ..., vxlan_port: _Optional[int] = ..., vxlan_id: _Optional[int] = ..., l7: _Optional[str] = ..., wireguard_port: _Optional[int] = ...) -> None: ...

class L7Request(_message.Message):
    __slots__ = ("service", "configuration")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    service: str
    configuration: bool
    def __init__(self, service: _Optional[str] = ..., configuration: _Optional[bool] = ...) -> None: ...

class L7Reply(_message.Message):
    __slots__ = ("running", "reloads", "restarts", "problems", "services", "configuration")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    running: bool
    reloads: int
    restarts: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    services: _containers.RepeatedCompositeFieldContainer[L7Service]
    configuration: str
    def __init__(self, running: _Optional[bool] = ..., reloads: _Optional[int] = ..., restarts: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., services: _Optional[_Iterable[_Union[L7Service, _Mapping]]] = ..., configuration: _Optional[str] = ...) -> None: ...

class L7Service(_message.Message):
    __slots__ = ("service", "family", "backend", "protocol", "balance", "state", "why", "addresses", "figures", "p50", "p90", "p99", "endpoints")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P90_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    service: str
    family: str
    backend: str
    protocol: str
    balance: str
    state: str
    why: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    figures: L7Figures
    p50: float
    p90: float
    p99: float
    endpoints: _containers.RepeatedCompositeFieldContainer[L7Endpoint]
    def __init__(self, service: _Optional[str] = ..., family: _Optional[str] = ..., backend: _Optional[str] = ..., protocol: _Optional[str] = ..., balance: _Optional[str] = ..., state: _Optional[str] = ..., why: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., figures: _Optional[_Union[L7Figures, _Mapping]] = ..., p50: _Optional[float] = ..., p90: _Optional[float] = ..., p99: _Optional[float] = ..., endpoints: _Optional[_Iterable[_Union[L7Endpoint, _Mapping]]] = ...) -> None: ...

class L7Endpoint(_message.Message):
    __slots__ = ("address", "state", "check", "figures")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: str
    check: str
    figures: L7Figures
    def __init__(self, address: _Optional[str] = ..., state: _Optional[str] = ..., check: _Optional[str] = ..., figures: _Optional[_Union[L7Figures, _Mapping]] = ...) -> None: ...

class L7Figures(_message.Message):
    __slots__ = ("requests", "code_1xx", "code_2xx", "code_3xx", "code_4xx", "code_5xx", "code_other", "retries", "redispatches", "connect_errors", "response_errors", "denied", "request_bytes", "response_bytes", "connections_now", "queued_now")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CODE_1XX_FIELD_NUMBER: _ClassVar[int]
    CODE_2XX_FIELD_NUMBER: _ClassVar[int]
    CODE_3XX_FIELD_NUMBER: _ClassVar[int]
    CODE_4XX_FIELD_NUMBER: _ClassVar[int]
    CODE_5XX_FIELD_NUMBER: _ClassVar[int]
    CODE_OTHER_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    REDISPATCHES_FIELD_NUMBER: _ClassVar[int]
    CONNECT_ERRORS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_ERRORS_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_NOW_FIELD_NUMBER: _ClassVar[int]
    QUEUED_NOW_FIELD_NUMBER: _ClassVar[int]
    requests: int
    code_1xx: int
    code_2xx: int
    code_3xx: int
    code_4xx: int
    code_5xx: int
    code_other: int
    retries: int
    redispatches: int
    connect_errors: int
    response_errors: int
    denied: int
    request_bytes: int
    response_bytes: int
    connections_now: int
    queued_now: int
    def __init__(self, requests: _Optional[int] = ..., code_1xx: _Optional[int] = ..., code_2xx: _Optional[int] = ..., code_3xx: _Optional[int] = ..., code_4xx: _Optional[int] = ..., code_5xx: _Optional[int] = ..., code_other: _Optional[int] = ..., retries: _Optional[int] = ..., redispatches: _Optional[int] = ..., connect_errors: _Optional[int] = ..., response_errors: _Optional[int] = ..., denied: _Optional[int] = ..., request_bytes: _Optional[int] = ..., response_bytes: _Optional[int] = ..., connections_now: _Optional[int] = ..., queued_now: _Optional[int] = ...) -> None: ...

class WireguardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WireguardReply(_message.Message):
    __slots__ = ("used", "keys", "step", "rotated", "problems", "peers")
    USED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROTATED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    used: bool
    keys: _containers.RepeatedScalarFieldContainer[str]
    step: str
    rotated: float
    problems: _containers.RepeatedScalarFieldContainer[str]
    peers: _containers.RepeatedCompositeFieldContainer[WireguardPeer]
    def __init__(self, used: _Optional[bool] = ..., keys: _Optional[_Iterable[str]] = ..., step: _Optional[str] = ..., rotated: _Optional[float] = ..., problems: _Optional[_Iterable[str]] = ..., peers: _Optional[_Iterable[_Union[WireguardPeer, _Mapping]]] = ...) -> None: ...

class WireguardPeer(_message.Message):
    __slots__ = ("node", "device", "key", "endpoint", "handshake", "received", "sent", "allowed", "route")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    node: str
    device: str
    key: str
    endpoint: str
    handshake: float
    received: int
    sent: int
    allowed: _containers.RepeatedScalarFieldContainer[str]
    route: bool
    def __init__(self, node: _Optional[str] = ..., device: _Optional[str] = ..., key: _Optional[str] = ..., endpoint: _Optional[str] = ..., handshake: _Optional[float] = ..., received: _Optional[int] = ..., sent: _Optional[int] = ..., allowed: _Optional[_Iterable[str]] = ..., route: _Optional[bool] = ...) -> None: ...

class RotateWireguardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RotateWireguardReply(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: str
    def __init__(self, refused: _Optional[str] = ...) -> None: ...
