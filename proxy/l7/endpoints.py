"""An endpoint as a `server` of HAProxy: the same words in its configuration and in `add server`. Pure.

Servers that are added while HAProxy runs do not follow `default-server`, so all words are spelled out.
Source: HAProxy 2.6 configuration manual, 5.2; management guide, 9.3 (`add server`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from proxy.l7.model import Backend, Server
from proxy.l7.policy import ActiveCheck, Breaker, Policy, Protocol, ProxyProtocol, Tls
from proxy.l7.words import argument

SYSTEM_AUTHORITIES = "@system-ca"
PROBES = 4
"""So many checks fit into the time for which a breaker is open, if no active check is asked for."""


def server_words(backend: Backend, server: Server, authorities: Path) -> tuple[str, ...]:
    """Return what follows `server` (with the name before): the address, and all that the policy asks for.

    `authorities` is the folder that the files of `tls.ca` are in.
    """
    return (server.target, *shared_words(backend.policy, authorities))


def shared_words(policy: Policy, authorities: Path) -> tuple[str, ...]:
    """Return the words that all servers of a backend have alike."""
    return (
        *_proxy_protocol(policy),
        *(_tls(policy, policy.tls, authorities) if policy.tls else ()),
        *_limits(policy),
        *_checks(policy),
    )


def is_checked(policy: Policy) -> bool:
    """Whether HAProxy asks endpoints by itself; a breaker needs that to close again."""
    return policy.check is not None or policy.breaker is not None


def _proxy_protocol(policy: Policy) -> tuple[str, ...]:
    if policy.proxy_protocol is ProxyProtocol.NONE:
        return ()
    send = "send-proxy" if policy.proxy_protocol is ProxyProtocol.V1 else "send-proxy-v2"
    return (send, "check-send-proxy") if is_checked(policy) else (send,)


def _tls(policy: Policy, tls: Tls, authorities: Path) -> Iterator[str]:
    yield "ssl"
    if tls.verify:
        yield from ("verify", "required", "ca-file")
        yield str(authorities / tls.ca) if tls.ca else SYSTEM_AUTHORITIES
    else:
        yield from ("verify", "none")
    # Without `verifyhost` the name that is asked for is also the one that is expected.
    if tls.server_name:
        yield from ("sni", f"str({argument(tls.server_name)})")
    elif policy.protocol is Protocol.HTTP:
        yield from ("sni", "req.hdr(host),host_only")
    if is_checked(policy):
        yield "check-ssl"
        name = tls.server_name or (policy.check.host if policy.check else "")
        if name:
            yield from ("check-sni", name)


def _limits(policy: Policy) -> Iterator[str]:
    if policy.limits.endpoint_requests:
        yield from ("maxconn", str(policy.limits.endpoint_requests))
    if policy.limits.endpoint_queue:
        yield from ("maxqueue", str(policy.limits.endpoint_queue))


def _checks(policy: Policy) -> Iterator[str]:
    check, breaker = policy.check, policy.breaker
    if check:
        yield from ("check", "inter", f"{check.interval}ms")
        yield from ("rise", str(check.healthy), "fall", str(check.unhealthy))
        if check.port:
            yield from ("port", str(check.port))
    elif breaker:
        interval = max(1, breaker.open_for // PROBES)
        yield from ("check", "inter", f"{interval}ms", "rise", str(PROBES + 1), "fall", "3")
    if breaker:
        if check:
            yield from ("downinter", f"{_while_down(check, breaker)}ms")
        yield from ("observe", "layer7" if breaker.answers else "layer4")
        yield from ("error-limit", str(breaker.errors), "on-error", "mark-down")


def _while_down(check: ActiveCheck, breaker: Breaker) -> int:
    """Return the time between checks of an endpoint that is out: it has to be so for `open_for` at least."""
    return max(check.interval, breaker.open_for // max(1, check.healthy - 1))
