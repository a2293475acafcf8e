"""A service's backend section, but for its endpoints: its policy in HAProxy's words. Pure.

What a service does not ask for costs its requests nothing: there are no lines for it.
Source: HAProxy 2.6 configuration manual, 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from netlink.family import Family
from proxy.frontends import owner_of
from proxy.l7.model import Backend
from proxy.l7.policy import (
    ActiveCheck,
    Balance,
    HeaderChanges,
    Limits,
    Match,
    PathRule,
    Policy,
    Protocol,
    Retry,
)
from proxy.l7.words import argument, literal, replacement, word

IDEMPOTENT = "GET HEAD OPTIONS PUT DELETE TRACE"
"""RFC 9110, 9.2.2."""
RETRIES = {Retry.CONNECT_FAILURE: "conn-failure"}
"""HAProxy's names of reasons, where they are others than ours."""
CLIENT_ADDRESS = {Family.V4: "source 0.0.0.0 usesrc clientip", Family.V6: "source [::] usesrc clientip"}
ACCESS_LEVEL = "alert"
"""Of lines for the access log, which takes no others: HAProxy's own messages are of less severe levels."""
TABLE_TYPES = {Family.V4: "ip", Family.V6: "ipv6"}
TABLE = "size 1m expire 10s store"
"""Room for so many clients; memory is only taken for those that there are."""


def backend_lines(backend: Backend) -> Iterator[str]:
    """Yield the section's head, then its rules in the order in which a request meets them."""
    policy = backend.policy
    http = policy.protocol is Protocol.HTTP
    yield f"backend {backend.name}"
    body = [f"mode {policy.protocol.value}", *_balance(policy), *_timeouts(policy)]
    if policy.transparent:
        body.append(CLIENT_ADDRESS[backend.family])
    body += _log(policy)
    body += _http_limits(backend) if http else _tcp_limits(backend)
    body += _retries(policy)
    if http:
        body += _paths(policy.paths)
        if policy.x_forwarded_for:
            body.append("option forwardfor")
        body += _headers("http-request", policy.request_headers)
        body += _headers("http-response", policy.response_headers)
        if policy.served_by:
            body.append("http-response set-header X-Served-By %s")
    if policy.check:
        body += _check(policy.check, backend)
    yield from (f"    {line}" for line in body)


def _balance(policy: Policy) -> Iterator[str]:
    """Yield how an endpoint is chosen. Hashes are consistent ones: others need all endpoints at the start."""
    match policy.balance:
        case Balance.ROUND_ROBIN:
            yield "balance roundrobin"
            return
        case Balance.LEAST_CONNECTIONS:
            yield "balance leastconn"
            return
        case Balance.RANDOM:
            yield "balance random"
            return
        case Balance.SOURCE:
            yield "balance source"
        case Balance.HEADER:
            yield f"balance {word(f'hdr({policy.hash_on})')}"
        case Balance.COOKIE:
            yield f"balance hash {word(f'req.cook({argument(policy.hash_on)})')}"
    yield "hash-type consistent"


def _timeouts(policy: Policy) -> Iterator[str]:
    times = policy.timeouts
    yield f"timeout connect {times.connect}ms"
    yield f"timeout server {times.server}ms"
    yield f"timeout queue {times.queue}ms"
    # Of TCP, this is how long an open connection may be idle, on either side.
    yield f"timeout tunnel {times.tunnel}ms"


def _log(policy: Policy) -> Iterator[str]:
    if not policy.access_log:
        return
    if policy.protocol is Protocol.HTTP:
        yield "http-request set-var(txn.begun) date(0,us) unless { var(txn.begun) -m found }"
        yield f"http-request set-log-level {ACCESS_LEVEL}"
    else:
        yield f"tcp-request content set-log-level {ACCESS_LEVEL}"


def _http_limits(backend: Backend) -> Iterator[str]:
    """Yield what refuses a client's requests. One connection too many is closed, the others go on."""
    limits = backend.policy.limits
    if limits.client_connections:
        yield f"acl crowded sc1_conn_cur gt {limits.client_connections}"
        yield "acl admitted var(sess.admitted) -m bool"
        refused = _said("Too many connections.")
        yield f"http-request deny status 429{refused} hdr Connection close if !admitted crowded"
        yield "http-request set-var(sess.admitted) bool(true)"
    yield from _rate(backend.family, limits, "http_req_rate")
    if limits.client_rate:
        yield "http-request track-sc0 src"
        body = _said("Too many requests.")
        yield f"http-request deny status 429{body} if {{ sc0_http_req_rate gt {limits.client_rate} }}"


def _tcp_limits(backend: Backend) -> Iterator[str]:
    limits = backend.policy.limits
    if limits.client_connections:
        yield f"tcp-request content reject if {{ sc1_conn_cur gt {limits.client_connections} }}"
    yield from _rate(backend.family, limits, "conn_rate")
    if limits.client_rate:
        yield "tcp-request content track-sc0 src"
        yield f"tcp-request content reject if {{ sc0_conn_rate gt {limits.client_rate} }}"


def _rate(family: Family, limits: Limits, counted: str) -> Iterator[str]:
    if limits.client_rate:
        yield f"stick-table type {TABLE_TYPES[family]} {TABLE} {counted}(1s)"


def _said(text: str) -> str:
    return f" content-type text/plain string {word(text)}"


def _retries(policy: Policy) -> Iterator[str]:
    """Yield how often and why a request is tried again; each time on another endpoint, if there is one."""
    asked = policy.retries
    http = policy.protocol is Protocol.HTTP
    again = asked.attempts if asked.on else 0
    yield f"retries {again}"
    if not again:
        return
    yield "option redispatch 1"
    if not http:
        return
    yield f"retry-on {' '.join(RETRIES.get(reason, reason.value) for reason in asked.on)}"
    if set(asked.on) == {Retry.CONNECT_FAILURE}:
        return
    if asked.unsafe:
        # A request can only be sent again as long as all of it is in the buffer when it is sent first.
        yield "option http-buffer-request"
        yield f"timeout http-request {policy.timeouts.request}ms"
    else:
        yield f"http-request disable-l7-retry unless {{ method {IDEMPOTENT} }}"


def _paths(rules: tuple[PathRule, ...]) -> Iterator[str]:
    """Yield the path rules: first it is found out which one matches first, then that one's action is done.

    What follows `acl … --` are values to the end of the line, so that nothing in a path ends them.
    """
    for number, rule in enumerate(rules, 1):
        how = {Match.PREFIX: "beg", Match.EXACT: "str", Match.REGEX: "reg"}[rule.match]
        yield f"acl path{number} path -m {how} -- {word(rule.path)}"
        unmatched = " !{ var(txn.rule) -m found }" if number > 1 else ""
        yield f"http-request set-var(txn.rule) int({number}) if{unmatched} path{number}"
    for number, rule in enumerate(rules, 1):
        condition = f"if {{ var(txn.rule) -m int {number} }}"
        if rule.deny:
            yield f"http-request deny status {rule.deny}{_said('Denied.')} {condition}"
        elif rule.redirect:
            location = word(literal(rule.redirect))
            yield f"http-request redirect location {location} code {rule.code} {condition}"
        elif rule.rewrite is not None:
            yield from _rewrite(rule, rule.rewrite, condition)


def _rewrite(rule: PathRule, rewrite: str, condition: str) -> Iterator[str]:
    """Yield how what has matched is replaced. A path begins with a slash, whatever comes of that."""
    if rule.match is Match.REGEX:
        converter = f"regsub({argument(rule.path)},{argument(replacement(rewrite))})"
        yield f"http-request set-var(txn.path) {word(f'path,{converter}')} {condition}"
    else:
        rest = f"%[path,bytes({len(rule.path.encode())})]" if rule.match is Match.PREFIX else ""
        text = (literal(rewrite) if rewrite else "") + rest
        if rewrite.startswith("/"):
            yield f"http-request set-path {word(text)} {condition}"
            return
        yield f"http-request set-var-fmt(txn.path) {word(text)} {condition}"
    slash = "{ var(txn.path) -m beg / }"
    yield f"http-request set-path %[var(txn.path)] {condition} {slash}"
    yield f"http-request set-path /%[var(txn.path)] {condition} !{slash}"


def _headers(rule: str, changes: HeaderChanges) -> Iterator[str]:
    for name in changes.remove:
        yield f"{rule} del-header {word(name)}"
    for name, value in changes.set:
        yield f"{rule} set-header {word(name)} {word(literal(value))}"
    for name, value in changes.add:
        yield f"{rule} add-header {word(name)} {word(literal(value))}"


def _check(check: ActiveCheck, backend: Backend) -> Iterator[str]:
    yield f"timeout check {check.timeout}ms"
    if not check.path:
        return
    owner = owner_of(backend.service)
    host = check.host or f"{owner.name}.{owner.namespace}"
    yield "option httpchk"
    yield (
        f"http-check send meth GET uri {word(check.path)} ver HTTP/1.1 hdr Host {word(literal(host))} "
        "hdr User-Agent podwire"
    )
    yield f"http-check expect status {check.status}"
