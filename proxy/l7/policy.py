"""What a service asks of the L7 proxy: the annotation, as a frozen value.

docs/l7.md says what each field does. Times are milliseconds, 0 where a limit or a time is not set.
"""

from __future__ import annotations

from enum import Enum

from proxy.struct import Struct

ANNOTATIONS = ("podwire.io/proxy", "asp.f5.com/config")
"""The first that a service has counts."""


class Protocol(Enum):
    """What the proxy takes a service's connections for (`ip-protocol`)."""

    HTTP = "http"
    TCP = "tcp"

    __hash__ = object.__hash__


class Balance(Enum):
    """How an endpoint is chosen (`load-balancing-mode`); the last three send what is alike to one."""

    ROUND_ROBIN = "round-robin"
    LEAST_CONNECTIONS = "least-connections"
    RANDOM = "random"
    SOURCE = "source"
    HEADER = "header"
    COOKIE = "cookie"


class ProxyProtocol(Enum):
    """Whether connections to endpoints begin with a PROXY protocol header, and of which version."""

    NONE = "none"
    V1 = "v1"
    V2 = "v2"


class Retry(Enum):
    """What a request is tried again for, on another endpoint."""

    CONNECT_FAILURE = "connect-failure"
    EMPTY_RESPONSE = "empty-response"
    RESPONSE_TIMEOUT = "response-timeout"
    STATUS_500 = "500"
    STATUS_502 = "502"
    STATUS_503 = "503"
    STATUS_504 = "504"


class Match(Enum):
    """How a path rule's `path` is compared."""

    PREFIX = "prefix"
    EXACT = "exact"
    REGEX = "regex"


class Timeouts(Struct, frozen=True):
    """How long the proxy waits: for a connection to an endpoint (each try), for the next word of the client
    or of the endpoint, for a whole request to arrive, for the next request of an open connection, in the
    queue, and for either side of an upgraded connection (WebSocket).
    """

    connect: int = 2_000
    client: int = 60_000
    server: int = 60_000
    request: int = 10_000
    keep_alive: int = 60_000
    queue: int = 5_000
    tunnel: int = 3_600_000


class Retries(Struct, frozen=True):
    """How often a request is tried again, and why. `unsafe`: also those of methods that are not idempotent,
    once they may have reached an endpoint.
    """

    attempts: int = 3
    on: tuple[Retry, ...] = (Retry.CONNECT_FAILURE,)
    unsafe: bool = False


class ActiveCheck(Struct, frozen=True):
    """Endpoints are asked every `interval`, by a connection or a GET of `path`; `status` are good answers.

    So many answers in a row make an endpoint `healthy` or `unhealthy`. `port` 0: the endpoint's own.
    """

    path: str = ""
    host: str = ""
    status: str = "200-399"
    interval: int = 2_000
    timeout: int = 1_000
    healthy: int = 2
    unhealthy: int = 3
    port: int = 0


class Breaker(Struct, frozen=True):
    """An endpoint gets nothing for `open_for` after so many `errors` in a row of what was sent to it.

    `answers`: answers of 5xx are errors, too, beside connections that fail.
    """

    errors: int
    open_for: int = 10_000
    answers: bool = False


class Limits(Struct, frozen=True):
    """What is allowed; 0 is without a limit.

    By client address: connections at a time, requests in a second (of TCP: new connections). By endpoint:
    requests (of TCP: connections) at a time, and how many more may wait for one.
    """

    client_connections: int = 0
    client_rate: int = 0
    endpoint_requests: int = 0
    endpoint_queue: int = 0


class Tls(Struct, frozen=True):
    """TLS to endpoints. `verify`: certificates are, by the node's authorities, or by `ca`, the name of a file
    in /etc/podwire/ca. `server_name` is asked for and expected; "": that of the Host header, or none.
    """

    verify: bool = True
    ca: str = ""
    server_name: str = ""


class HeaderChanges(Struct, frozen=True):
    """Changes of headers, in this order: names to remove, names and values to set, and to add."""

    remove: tuple[str, ...] = ()
    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()


class PathRule(Struct, frozen=True):
    """What becomes of requests for a path; the first rule that matches counts.

    One of: `deny` a status (0: it is not), `redirect` to a location by `code`, or `rewrite` what has matched
    (of a regex with its groups, \\1 to \\9). None of them: the request goes on, past all later rules.
    """

    match: Match
    path: str
    deny: int = 0
    redirect: str = ""
    code: int = 302
    rewrite: str | None = None


class Policy(Struct, frozen=True):
    """What one service asks for.

    `hash_on` is the header's or cookie's name. `external`: external addresses and node ports go by the proxy,
    too, not only cluster addresses. `transparent`: endpoints see the client's own address. `fail_open`: while
    the proxy does not run, the service is balanced without it, else it is not served. `served_by`: answers
    say in X-Served-By which endpoint they are from.
    """

    protocol: Protocol = Protocol.HTTP
    balance: Balance = Balance.ROUND_ROBIN
    hash_on: str = ""
    x_forwarded_for: bool = True
    served_by: bool = False
    external: bool = False
    transparent: bool = False
    proxy_protocol: ProxyProtocol = ProxyProtocol.NONE
    access_log: bool = False
    fail_open: bool = True
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    check: ActiveCheck | None = None
    breaker: Breaker | None = None
    limits: Limits = Limits()
    tls: Tls | None = None
    request_headers: HeaderChanges = HeaderChanges()
    response_headers: HeaderChanges = HeaderChanges()
    paths: tuple[PathRule, ...] = ()
