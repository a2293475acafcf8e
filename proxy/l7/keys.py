"""Every key of the annotation: its kind of value, default and meaning, and what does not go together.

Parsing, the JSON Schema (docs/l7.schema.json) and the tables of docs/l7.md come from `FIELDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Any

from proxy.l7 import patterns
from proxy.l7.fields import (
    AnnotationError,
    Field,
    boolean,
    choice,
    either,
    listing,
    mapping,
    number,
    one_of,
    section,
    shown,
    text,
    time,
    under,
)
from proxy.l7.policy import (
    ActiveCheck,
    Balance,
    Breaker,
    HeaderChanges,
    Limits,
    Match,
    PathRule,
    Protocol,
    ProxyProtocol,
    Retries,
    Retry,
    Timeouts,
    Tls,
)
from proxy.struct import Struct

HEADER_BYTES = 2048
"""Of names and values that are set and added in one direction; HAProxy keeps room (tune.maxrewrite)."""
MOST_HEADERS, MOST_PATHS = 50, 100
HASHED = (Balance.HEADER, Balance.COOKIE)

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""RFC 9110, 5.6.2."""
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME = rf"({LABEL}\.)*[A-Za-z]([A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?"
"""RFC 1123; the last label begins with a letter, as no address's does."""
CODE = r"[1-5][0-9][0-9]"
FRAMING = {
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"),
    *("content-length", "transfer-encoding"),
}
"""What says where a message ends, or is of one connection only (RFC 9110, 7.6.1): HAProxy's own business."""


def _named(enum: type[Enum]) -> dict[str, Enum]:
    return {str(member.value): member for member in enum}


def _wrong_status(value: str) -> str:
    spans = (part.split("-") for part in value.split(","))
    backward = any(len(span) == 2 and span[0] > span[1] for span in spans)
    return "status codes: a range goes from the lower to the higher" if backward else ""


def _wrong_header(value: str) -> str:
    return "a header that can be changed: it is of the connection" if value.lower() in FRAMING else ""


def _wrong_removed(value: str) -> str:
    return "a header that can be removed or added" if value.lower() == "host" else _wrong_header(value)


def _wrong_regex(value: str) -> str:
    return patterns.wrong(value)


def _wrong_value(value: str) -> str:
    return "without spaces around it" if value != value.strip(" ") else ""


HOST = text("a host name", HOST_NAME, 253)
PATH_TEXT = text("a path that begins with / and has no spaces, ? or #", r'/[!"$->@-~]*', 1024)
HEADER = text("a header's name", TOKEN, 100, _wrong_header)
REMOVED = text("a header's name", TOKEN, 100, _wrong_removed)
VALUE = text("a header's value", r"[ -~]+", 1024, _wrong_value)


def _make_headers(place: str, given: dict[str, Any]) -> HeaderChanges:
    found = HeaderChanges(**given)
    size = sum(len(name) + len(value) for name, value in found.set + found.add)
    if size > HEADER_BYTES:
        raise AnnotationError(f"{place}: set and add have {size} bytes together, more than {HEADER_BYTES}")
    return found


def _headers(attribute: str, key: str, whose: str) -> Field:
    names = listing(REMOVED, f"list of headers' names, at most {MOST_HEADERS}", MOST_HEADERS)
    values = "an object of headers' names and values"
    fields = (
        Field("remove", "remove", names, f"headers that are taken out of {whose}, first of all"),
        Field("set", "set", mapping(HEADER, VALUE, values, MOST_HEADERS), "headers with their new value"),
        Field(
            "add", "add", mapping(REMOVED, VALUE, values, MOST_HEADERS), "headers beside those of that name"
        ),
    )
    return Field(key, attribute, section(_make_headers, fields), f"changes of {whose}")


def _make_rule(place: str, given: dict[str, Any]) -> PathRule:
    matches = [match for match in Match if match.value in given]
    if len(matches) != 1:
        named = " and ".join(match.value for match in matches) or "nothing"
        raise AnnotationError(f"{place}: it has {named}; a rule has one of prefix, exact and regex")
    (match,) = matches
    path = given.pop(match.value)
    actions = [key for key in ("deny", "redirect", "rewrite") if key in given]
    if len(actions) > 1:
        raise AnnotationError(f"{place}: {' and '.join(actions)}: a rule has one of them")
    if "code" in given and "redirect" not in given:
        raise AnnotationError(f"{under(place, 'code')}: {given['code']} needs {under(place, 'redirect')}")
    if "rewrite" in given and (told := _wrong_rewrite(match, path, given["rewrite"])):
        raise AnnotationError(f"{under(place, 'rewrite')}: {shown(given['rewrite'])} {told}")
    return PathRule(match, path, **given)


def _wrong_rewrite(match: Match, path: str, rewrite: str) -> str:
    if match is Match.REGEX:
        known = patterns.groups(path)
        for escaped in re.findall(r"\\(.?)", rewrite):
            if not escaped.isdigit() or int(escaped) > known:
                return f"has \\{escaped}; the groups of regex {shown(path)} go to \\{known}"
        return ""
    if "\\" in rewrite:
        return f"has a \\, which is for groups of a regex; {match.value} is {shown(path)}"
    if not rewrite and (match is Match.EXACT or path.endswith("/")):
        return f"leaves no / at the beginning of the path; {match.value} is {shown(path)}"
    return (
        f"does not begin with /; {match.value} is {shown(path)}"
        if rewrite.strip("/") == rewrite != ""
        else ""
    )


RULE = section(
    _make_rule,
    (
        Field("prefix", "prefix", PATH_TEXT, "paths that begin so; `/a` is the beginning of `/ab`, too"),
        Field("exact", "exact", PATH_TEXT, "this path"),
        Field(
            "regex",
            "regex",
            text("a regular expression", r"[ -~]+", patterns.LONGEST, _wrong_regex),
            "paths in which this regular expression matches somewhere, if `^` and `$` do not say where",
        ),
        Field("deny", "deny", number(400, 599), "the status that requests are answered with"),
        Field(
            "redirect",
            "redirect",
            text("a URL, or a path that begins with /", r"(/|https?://)[!-~]*", 1024),
            "where requests are sent",
        ),
        Field("code", "code", one_of(301, 302, 303, 307, 308), "the status of a redirect", 302),
        Field(
            "rewrite",
            "rewrite",
            text("a path without spaces, ? or #", r'[!"$->@-~]*', 1024),
            "what takes the place of what has matched; of a regular expression's groups as `\\1` to `\\9`",
        ),
    ),
    {
        "oneOf": [{"required": [match.value]} for match in Match],
        "not": {
            "anyOf": [
                {"required": pair}
                for pair in (["deny", "redirect"], ["deny", "rewrite"], ["redirect", "rewrite"])
            ]
        },
        "dependentRequired": {"code": ["redirect"]},
    },
)

FLAGS = (
    Field(
        "x-forwarded-for",
        "x_forwarded_for",
        boolean(),
        "requests get an X-Forwarded-For with the client's address, after what they have there already",
        True,
        tcp=(False,),
    ),
    Field(
        "x-served-by",
        "served_by",
        boolean(),
        "answers say in X-Served-By which endpoint they are from",
        False,
        tcp=(False,),
    ),
    Field(
        "external",
        "external",
        boolean(),
        "external addresses and node ports go by the proxy, too, not only cluster addresses; not where "
        "externalTrafficPolicy and internalTrafficPolicy differ",
        False,
    ),
    Field("transparent", "transparent", boolean(), "endpoints see the client's own address", False),
    Field(
        "access-log",
        "access_log",
        boolean(),
        "every request (of tcp: every connection) is logged, as a line of JSON",
        False,
    ),
)

DAY = 24 * 3_600_000
TUNNEL = "for more on an upgraded connection (WebSocket), or on any of tcp, in either direction"
TIMEOUTS = (
    Field("connect", "connect", time(1, 60_000), "for a connection to an endpoint, each try", "2s"),
    Field("client", "client", time(1, DAY), "for the client to send or take more", "60s", tcp=()),
    Field(
        "server", "server", time(1, DAY), "for the endpoint to answer, to send or take more", "60s", tcp=()
    ),
    Field("request", "request", time(1, DAY), "for a request's headers to arrive", "10s", tcp=()),
    Field("keep-alive", "keep_alive", time(1, DAY), "for a connection's next request", "60s", tcp=()),
    Field("queue", "queue", time(1, 3_600_000), "for an endpoint below its limit; then 503", "5s"),
    Field("tunnel", "tunnel", time(1, DAY), TUNNEL, "1h"),
)

WAITS = (
    "how long the proxy waits. `client`, `request` and `keep-alive` are of a listener, which all services "
    "share: the longest that any of them asks for counts"
)

RETRIES = (
    Field("attempts", "attempts", number(0, 10), "how often, after the first try", 3),
    Field(
        "on",
        "on",
        listing(choice(_named(Retry)), f"list of {', '.join(f'`{r.value}`' for r in Retry)}", len(Retry), 1),
        "why: no connection, one that ends without an answer, none in time, or an answer of that status. For "
        "all but the first the proxy keeps a copy of each request, which takes a fifth of its time",
        ["connect-failure"],
        tcp=("connect-failure",),
    ),
    Field(
        "unsafe",
        "unsafe",
        boolean(),
        "also requests whose method is not idempotent (POST, PATCH), once they may have reached an endpoint",
        False,
        tcp=(False,),
    ),
)

CHECK = (
    Field(
        "path",
        "path",
        text("a path that begins with / and has no spaces", r"/[!-~]*", 1024),
        "GET this path; without one, a connection that is accepted is a good answer",
    ),
    Field(
        "host", "host", HOST, "the Host header of these requests; without one, the service's `name.namespace`"
    ),
    Field(
        "status",
        "status",
        text(
            'status codes such as "200-399,404"',
            rf"{CODE}(-{CODE})?(,{CODE}(-{CODE})?)*",
            200,
            _wrong_status,
        ),
        "the answers to `path` that are good",
        "200-399",
    ),
    Field("interval", "interval", time(100, 3_600_000), "from one check of an endpoint to the next", "2s"),
    Field("timeout", "timeout", time(10, 60_000), "for an answer", "1s"),
    Field("healthy", "healthy", number(1, 100), "so many good answers in a row bring an endpoint back", 2),
    Field("unhealthy", "unhealthy", number(1, 100), "so many others in a row take it out", 3),
    Field("port", "port", number(1, 65535), "where to ask; without one, the endpoint's own port"),
)

BREAKER = (
    Field(
        "errors",
        "errors",
        number(1, 1000),
        "so many errors in a row, in what was sent to an endpoint, take it out",
        required=True,
    ),
    Field("open-for", "open_for", time(100, 3_600_000), "for so long", "10s"),
    Field("answers", "answers", boolean(), "answers of 5xx are errors, too", False, tcp=(False,)),
)

MOST = 1_000_000
LIMITS = (
    Field(
        "client-connections",
        "client_connections",
        number(0, MOST),
        "of one client address at a time; one more is closed, with http after a 429",
        0,
    ),
    Field(
        "client-rate",
        "client_rate",
        number(0, MOST),
        "requests of one client address in a second, others get 429 (of tcp: new connections)",
        0,
    ),
    Field(
        "endpoint-requests",
        "endpoint_requests",
        number(0, MOST),
        "requests (of tcp: connections) that an endpoint has at a time; more wait",
        0,
    ),
    Field("endpoint-queue", "endpoint_queue", number(0, MOST), "how many may wait for one endpoint", 0),
)

UNVERIFIED_CA = {"required": ["ca", "verify"], "properties": {"verify": {"const": False}}}
TLS = (
    Field("verify", "verify", boolean(), "endpoints' certificates have to be good", True),
    Field(
        "ca",
        "ca",
        text("the plain name of a file", r"[A-Za-z0-9_][A-Za-z0-9._-]*", 200),
        "by which authorities: a file in /etc/podwire/ca on each node; without it, those the node trusts",
    ),
    Field(
        "server-name",
        "server_name",
        HOST,
        "asked for (SNI) and expected in the certificate; without it, the Host header (of tcp: none)",
    ),
)


def _make_check(place: str, given: dict[str, Any]) -> ActiveCheck:
    for key in ("host", "status"):
        if key in given and "path" not in given:
            raise AnnotationError(f"{under(place, key)}: {shown(given[key])} needs {under(place, 'path')}")
    return ActiveCheck(**given)


def _make_limits(place: str, given: dict[str, Any]) -> Limits:
    found = Limits(**given)
    if found.endpoint_queue and not found.endpoint_requests:
        here, other = under(place, "endpoint-queue"), under(place, "endpoint-requests")
        raise AnnotationError(f"{here}: {found.endpoint_queue} needs {other}, above which requests wait")
    return found


def _make_tls(place: str, given: dict[str, Any]) -> Tls:
    found = Tls(**given)
    if found.ca and not found.verify:
        here, other = under(place, "ca"), under(place, "verify")
        raise AnnotationError(f"{here}: {shown(found.ca)} does not go with {other} false")
    return found


def _values(place: str, given: dict[str, Any]) -> dict[str, Any]:
    return given


def _made(struct: type[Struct]) -> Callable[[str, dict[str, Any]], Struct]:
    return lambda place, given: struct(**given)


def _tls(given: bool) -> Tls | None:
    return Tls() if given else None


BALANCE = _named(Balance) | {"least-connections-member": Balance.LEAST_CONNECTIONS}
"""The other name is that of BIG-IP's own load-balancing-mode."""
NOT_HASHED = tuple(name for name, mode in BALANCE.items() if mode not in HASHED)

FIELDS: tuple[Field, ...] = (
    Field("ip-protocol", "protocol", choice(_named(Protocol)), "what connections are taken for", "http"),
    Field(
        "load-balancing-mode",
        "balance",
        choice(BALANCE),
        "how an endpoint is chosen, for each request (of tcp: each connection)",
        "round-robin",
        tcp=NOT_HASHED,
    ),
    Field(
        "hash-on",
        "hash_on",
        text("the name of a header or of a cookie", TOKEN, 100),
        "the header or the cookie that the modes `header` and `cookie` go by",
        tcp=(),
    ),
    Field("flags", "", section(_values, FLAGS), "what is on or off"),
    Field(
        "proxy-protocol",
        "proxy_protocol",
        choice(_named(ProxyProtocol)),
        "connections to endpoints begin with a PROXY protocol header of that version",
        "none",
    ),
    Field(
        "fail",
        "fail_open",
        choice({"open": True, "closed": False}),
        "while the proxy does not run, the service is balanced without it (open) or not served (closed)",
        "open",
    ),
    Field("timeouts", "timeouts", section(_made(Timeouts), TIMEOUTS), WAITS),
    Field("retries", "retries", section(_made(Retries), RETRIES), "trying again, on another endpoint"),
    Field(
        "health-check",
        "check",
        section(_make_check, CHECK, {"dependentRequired": {"host": ["path"], "status": ["path"]}}),
        "endpoints are asked whether they are well; `{}` is enough. Without the key they are not",
    ),
    Field(
        "circuit-breaker",
        "breaker",
        section(_made(Breaker), BREAKER),
        "endpoints that fail get nothing for a while. Without the key they do",
    ),
    Field(
        "limits",
        "limits",
        section(_make_limits, LIMITS),
        "what is allowed, by each node's proxy for itself; 0 is without a limit",
    ),
    Field(
        "tls",
        "tls",
        either(_tls, section(_make_tls, TLS, {"not": UNVERIFIED_CA})),
        "connections to endpoints are TLS; `true` is with all defaults",
        False,
    ),
    Field(
        "headers",
        "",
        section(
            _values,
            (
                _headers("request_headers", "request", "requests"),
                _headers("response_headers", "response", "answers"),
            ),
        ),
        "headers that are changed",
        tcp=(),
    ),
    Field(
        "paths",
        "paths",
        listing(RULE, f"list of rules, at most {MOST_PATHS}", MOST_PATHS),
        "what becomes of requests for a path; the first rule that matches counts. One that only says which "
        "paths lets them pass, whatever comes after it",
        tcp=(),
    ),
)
