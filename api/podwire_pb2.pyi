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
    __slots__ = ("destination", "via", "node")
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    VIA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    destination: str
    via: str
    node: str
    def __init__(self, destination: _Optional[str] = ..., via: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("version", "node", "mode", "dataplane", "pod_cidrs", "ready", "last_sync", "services", "frontends", "elements", "problems", "source")
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
    def __init__(self, version: _Optional[str] = ..., node: _Optional[str] = ..., mode: _Optional[str] = ..., dataplane: _Optional[str] = ..., pod_cidrs: _Optional[_Iterable[str]] = ..., ready: _Optional[bool] = ..., last_sync: _Optional[float] = ..., services: _Optional[int] = ..., frontends: _Optional[int] = ..., elements: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., source: _Optional[str] = ...) -> None: ...
