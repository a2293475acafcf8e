"""HAProxy's configuration for all services that ask for the proxy. Pure.

One frontend for HTTP and one for TCP, whatever services there are: a connection's backend is looked up once,
by the address and port that the client asked for. One backend for each service port and family.
Source: HAProxy 2.6 configuration manual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from netlink.family import Family, with_port
from proxy.l7 import stats
from proxy.l7.endpoints import shared_words
from proxy.l7.model import Backend, Backends, Route
from proxy.l7.places import OWNER, PORT, address
from proxy.l7.policy import Protocol
from proxy.l7.section import ACCESS_LEVEL, backend_lines
from proxy.l7.words import argument, word
from proxy.struct import Struct

NO_ADDRESS = "0.0.0.0"
"""What a node port's address is masked to before it is looked up."""

UNKNOWN = "podwire.unknown."
"""Where connections go that lead to no backend, with the protocol behind; no service's has such a name."""
CLIENTS = "podwire.clients"
"""The table of connections by client and backend."""
BUFFER_BYTES, REWRITE_BYTES = 20_480, 4_096
"""Room for a request's headers as by default, 15 kB, and for changes of them (2 kB at most) beside it."""
DIGEST_LETTERS = 16


class Settings(Struct, frozen=True):
    """How HAProxy runs on this node, whatever services ask for.

    All its files are in `directory`, which only root can read. `threads` 0: one for each processor. Old
    workers are ended `drain_seconds` after a reload, 0: when their connections are. One request in `sample`
    is told to the socket `sample_socket`; requests of services that ask for it are logged in `access_log`.
    """

    directory: Path
    port: int = PORT
    threads: int = 0
    max_connections: int = 20_000
    drain_seconds: int = 0
    sample: int = 100
    access_log: Path | None = None
    authorities: Path = Path("/etc/podwire/ca")
    program: str = "haproxy"

    @property
    def jail(self) -> Path:
        """The only folder that a worker sees."""
        return self.directory / "jail"

    @property
    def sample_socket(self) -> Path:
        """The unix datagram socket that lines of the sample are sent to, if there is one."""
        return self.jail / "sample.sock"

    @property
    def worker_socket(self) -> Path:
        """Where the newest worker takes commands."""
        return self.directory / "worker.sock"

    @property
    def master_socket(self) -> Path:
        """Where the master process does."""
        return self.directory / "master.sock"

    @property
    def configuration(self) -> Path:
        """The file that HAProxy has started from last."""
        return self.directory / "haproxy.cfg"

    @property
    def messages(self) -> Path:
        """What HAProxy writes to standard error."""
        return self.directory / "haproxy.log"

    def map_of(self, protocol: Protocol) -> Path:
        """Return the file from which routes of a protocol are read at a start."""
        return self.directory / f"{protocol.value}.map"


def render(backends: Backends, settings: Settings) -> str:
    """Return the configuration, with the endpoints of now."""
    return _text(backends, settings, structure_digest(backends, settings), servers=True)


def structure(backends: Backends, settings: Settings) -> str:
    """Return the configuration without endpoints and routes: what only another configuration changes."""
    return _text(backends, settings, "", servers=False)


def structure_digest(backends: Backends, settings: Settings) -> str:
    """Return what tells one structure from another; a running HAProxy has it as its description."""
    return _digest(structure(backends, settings))


def routes_of(backends: Backends, protocol: Protocol, settings: Settings) -> Mapping[str, str]:
    """Return what leads to which backend: the content of a protocol's map."""
    return {
        key: name
        for name, backend in sorted(backends.items())
        if backend.protocol is protocol
        for key in _keys(backend, settings)
    }


def _keys(backend: Backend, settings: Settings) -> Iterator[str]:
    """Yield what connections of a backend are looked up by."""
    if backend.family is Family.V4:
        yield from map(route_key, backend.routes)
    else:
        yield f"{_listening(backend)}:{settings.port}"


def _listening(backend: Backend) -> str:
    """Return the address of the node that connections of a backend come to."""
    return address(backend.protocol, backend.family, backend.service)


def route_key(route: Route) -> str:
    """Return what an IPv4 connection is looked up by; that of a node port has no address in it."""
    return f"{route.address or NO_ADDRESS}:{route.port}"


def backend_at(text: str, line: int) -> str:
    """Return the name of the backend that a line of a configuration belongs to; "" of none. Lines from 1."""
    found = ""
    for each in text.splitlines()[:line]:
        if each and not each.startswith(" "):
            kind, _, name = each.partition(" ")
            found = name if kind == "backend" else ""
    return found


def _digest(text: str) -> str:
    return "podwire-" + hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LETTERS]


def _text(backends: Backends, settings: Settings, mark: str, servers: bool) -> str:
    lines = [*_global(backends, settings, mark)]
    for protocol in Protocol:
        own = {n: b for n, b in sorted(backends.items()) if b.protocol is protocol}
        if own:
            lines += _frontend(protocol, own, settings)
            lines += _unknown(protocol)
    if any(b.policy.limits.client_connections for b in backends.values()):
        lines += [
            f"backend {CLIENTS}",
            "    stick-table type string len 256 size 1m expire 1m store conn_cur",
        ]
    for _, backend in sorted(backends.items()):
        lines += backend_lines(backend)
        lines += _servers(backend, settings, servers)
    return "\n".join(lines) + "\n"


def _global(backends: Backends, settings: Settings, mark: str) -> Iterator[str]:
    yield "global"
    if mark:
        yield f"    description {mark}"
    # With a uid, 2.6 refuses connections from clients' addresses, whatever capabilities it has.
    if not any(b.policy.transparent for b in backends.values()):
        yield f"    uid {OWNER}"
    yield f"    gid {OWNER}"
    yield f"    chroot {word(str(settings.jail))}"
    yield f"    stats socket {word(str(settings.worker_socket))} mode 600 level admin"
    yield f"    log /{settings.sample_socket.name} len {stats.LINE_BYTES} format raw local0"
    if settings.access_log:
        yield f"    log stdout len {stats.LINE_BYTES} format raw local1 {ACCESS_LEVEL}"
    # Where it cannot have descriptors for all of these, it serves fewer.
    yield "    no strict-limits"
    yield f"    maxconn {settings.max_connections}"
    if settings.threads:
        yield f"    nbthread {settings.threads}"
    if settings.drain_seconds:
        yield f"    hard-stop-after {settings.drain_seconds}s"
    yield f"    tune.bufsize {BUFFER_BYTES}"
    yield f"    tune.maxrewrite {REWRITE_BYTES}"


def _frontend(protocol: Protocol, backends: Backends, settings: Settings) -> Iterator[str]:
    """Yield the listener of a protocol."""
    policies = [b.policy for b in backends.values()]
    yield f"frontend {protocol.value}"
    yield f"    mode {protocol.value}"
    listening = dict.fromkeys(_listening(b) for _, b in sorted(backends.items()))
    # The kernel lets nobody listen on an IPv6 address that no interface has, without that word.
    words = {where: " transparent" if ":" in where else "" for where in listening}
    yield from (f"    bind {with_port(where, settings.port)}{more}" for where, more in words.items())
    # These are the listener's, not a backend's, in HAProxy: the longest that any service asks for.
    yield f"    timeout client {max(p.timeouts.client for p in policies)}ms"
    if protocol is Protocol.HTTP:
        yield f"    timeout http-request {max(p.timeouts.request for p in policies)}ms"
        yield f"    timeout http-keep-alive {max(p.timeouts.keep_alive for p in policies)}ms"
        # Old workers answer on the connections that they have, and close each after an answer, not before.
        yield "    option idle-close-on-response"
        yield "    option dontlognull"
    yield "    log global"
    yield f"    log-format '{stats.LOG_FORMAT[protocol]}'"
    found = word(f"var(sess.to),map_str({argument(str(settings.map_of(protocol)))})")
    yield "    acl known var(sess.backend) -m found"
    yield "    tcp-request session set-var-fmt(sess.to) %[dst]:%[dst_port]"
    yield f"    tcp-request session set-var(sess.backend) {found}"
    yield "    tcp-request session set-var-fmt(sess.to) %[dst,ipmask(0,0)]:%[dst_port] if !known"
    yield f"    tcp-request session set-var(sess.backend) {found} if !known"
    yield f"    tcp-request session set-var(sess.backend) str({UNKNOWN}{protocol.value}) if !known"
    if any(p.limits.client_connections for p in policies):
        yield "    tcp-request session set-var-fmt(sess.client) '%[src] %[var(sess.backend)]'"
        yield f"    tcp-request session track-sc1 var(sess.client) table {CLIENTS}"
    yield from _sampling(protocol, settings)
    # Without a condition: it is looked at for each request.
    yield "    use_backend %[var(sess.backend)]"


def _sampling(protocol: Protocol, settings: Settings) -> Iterator[str]:
    """Yield what keeps all requests but those of the sample from being told."""
    chosen = f"{{ rand({settings.sample}) 0 }}"
    if protocol is Protocol.HTTP:
        for rule in stats.RULES[protocol]:
            yield f"    {rule} if {chosen}"
        yield "    http-request set-log-level silent unless { var(txn.begun) -m found }"
    else:
        yield f"    tcp-request content set-log-level silent unless {chosen}"


def _unknown(protocol: Protocol) -> Iterator[str]:
    yield f"backend {UNKNOWN}{protocol.value}"
    yield f"    mode {protocol.value}"
    if protocol is Protocol.HTTP:
        yield (
            "    http-request return status 503 content-type text/plain "
            "string 'The L7 proxy of this node has no such service (any more).'"
        )
    else:
        yield "    tcp-request content reject"


def _servers(backend: Backend, settings: Settings, servers: bool) -> Iterator[str]:
    """Yield the endpoints, and what they have in common.

    HAProxy reads this also where there are none yet: files of authorities that endpoints added later need
    are known to it then.
    """
    if words := shared_words(backend.policy, settings.authorities):
        yield f"    default-server {' '.join(map(word, words))}"
    if servers:
        yield from (f"    server {server.name} {server.target}" for server in backend.servers)
