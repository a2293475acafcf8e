"""What HAProxy tells of its work: `show stat` as rows, and a line for each request of the sample. Pure.

HAProxy keeps counters and averages, but no distribution of times; that comes from a sample of requests, one
JSON line each. What a client sends cannot break a line: HAProxy escapes it, or has refused the request.
Source: HAProxy 2.6 management guide, 9.1 (columns) and 9.3 (`show stat`, `show info`); configuration
manual, 8.2.6 (log format) and 8.5 (termination state).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

import msgspec

from proxy.l7.policy import Protocol
from proxy.struct import Struct

LINE_BYTES = 8192
"""The `len` of the log directive: an escaped path has up to 6 kB, as HAProxy keeps 1 kB of it."""

RULES: dict[Protocol, tuple[str, ...]] = {
    Protocol.HTTP: ("http-request set-var(txn.begun) date(0,us)",),
    Protocol.TCP: (),
}
"""What a frontend has so that its lines are complete, before all other http-request rules; only requests
whose line is sent need it."""

_COMMON = (
    '"at":%[date(0,ms)],"backend":"%b","server":"%s","client":"%ci","port":%cp,'
    '"request_bytes":%U,"response_bytes":%B,"queue":%Tw,"connect":%Tc,"total":%Tt,'
    '"retries":"%rc","end":"%ts"'
)
LOG_FORMAT: dict[Protocol, str] = {
    Protocol.HTTP: (
        f'{{{_COMMON},"method":%{{+Q}}[capture.req.method,json(utf8s)],'
        '"path":%{+Q}[capture.req.uri,field(1,?),json(utf8s)],"status":%ST,'
        '"response":%Tr,"active":%Ta,"us":"%[date(0,us),sub(txn.begun)]"}'
    ),
    Protocol.TCP: f"{{{_COMMON}}}",
}
"""The value of `log-format` in a frontend, to be written between single quotes. Queries are left out: they
may hold secrets."""


class Kind(Enum):
    """What a row of `show stat` is about; the numbers are HAProxy's (column `type`)."""

    FRONTEND = 0
    BACKEND = 1
    SERVER = 2
    LISTENER = 3


class Totals(NamedTuple):
    """What only grows while one HAProxy process runs.

    `requests` of TCP are connections. Of a server, redispatches are those away from it. `connect_errors` of
    a backend are also requests for which it had no server.
    """

    connections: int = 0
    requests: int = 0
    code_1xx: int = 0
    code_2xx: int = 0
    code_3xx: int = 0
    code_4xx: int = 0
    code_5xx: int = 0
    code_other: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    denied: int = 0
    connect_errors: int = 0
    response_errors: int = 0
    retries: int = 0
    redispatches: int = 0
    client_aborts: int = 0
    server_aborts: int = 0

    def plus(self, other: Totals) -> Totals:
        """Return the sums."""
        return Totals(*map(int.__add__, self, other))

    def since(self, before: Totals) -> Totals:
        """Return what has been added; whose counters are less than before has begun at zero again."""
        if any(n < b for n, b in zip(self, before, strict=True)):
            return self
        return Totals(*(n - b for n, b in zip(self, before, strict=True)))

    @property
    def codes(self) -> Mapping[str, int]:
        """Return how many answers there were, by the class of their status: "1xx" to "5xx", and "other"."""
        return {name: getattr(self, f"code_{name}") for name in CODES}


CODES = ("1xx", "2xx", "3xx", "4xx", "5xx", "other")
_COLUMNS: Mapping[str, str] = {
    "connections": "stot",
    "requests": "req_tot",
    **{f"code_{name}": f"hrsp_{name}" for name in CODES},
    "request_bytes": "bin",
    "response_bytes": "bout",
    "denied": "dreq",
    "connect_errors": "econ",
    "response_errors": "eresp",
    "retries": "wretr",
    "redispatches": "wredis",
    "client_aborts": "cli_abrt",
    "server_aborts": "srv_abrt",
}
"""HAProxy's name of each field of `Totals`."""


class Means(NamedTuple):
    """Averages of the last 1,024 requests, in milliseconds."""

    queue: int = 0
    connect: int = 0
    response: int = 0
    total: int = 0


class Row(Struct, frozen=True):
    """A row of `show stat`. `proxy` is the section's name, `server` that of a server or listener, else "".

    `connections` and `queued` are those of now. `status` is HAProxy's word (UP, DOWN, MAINT, DRAIN, "no
    check", …), `check` its word for the last health check ("" without one), `checked` what this said.
    """

    kind: Kind
    proxy: str
    server: str
    totals: Totals
    connections: int = 0
    queued: int = 0
    status: str = ""
    check: str = ""
    checked: str = ""
    means: Means = Means()


def rows(text: str) -> tuple[Row, ...]:
    """Return what `show stat` has answered. Raises ValueError for anything else."""
    lines = text.lstrip().splitlines()
    if not lines or not lines[0].startswith("# pxname,"):
        first = lines[0][:80] if lines else ""
        raise ValueError(f"HAProxy's answer to `show stat` begins with {first!r}, not with names of columns")
    lines[0] = lines[0].removeprefix("# ")
    return tuple(map(_row, csv.DictReader(line for line in lines if line)))


def _row(cells: Mapping[str, str]) -> Row:
    def number(column: str) -> int:
        return int(cells.get(column) or 0)

    kind = Kind(number("type"))
    totals = Totals(**{field: number(column) for field, column in _COLUMNS.items()})
    if cells.get("mode") == Protocol.TCP.value:
        totals = totals._replace(requests=totals.connections)
    return Row(
        kind,
        cells["pxname"],
        cells["svname"] if kind in (Kind.SERVER, Kind.LISTENER) else "",
        totals,
        number("scur"),
        number("qcur"),
        cells.get("status") or "",
        (cells.get("check_status") or "").removeprefix("* "),  # one is under way; this is the last one's
        cells.get("last_chk") or "",
        Means(*(number(f"{word}time") for word in "qcrt")),
    )


def process_of(info: str) -> int:
    """Return which process has answered `show info`, by its number. Raises ValueError if it does not say."""
    for line in info.splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and value.strip().isdigit():
            return int(value)
    raise ValueError("HAProxy's answer to `show info` has no Pid")


class Request(Struct, frozen=True):
    """A request of the sample; of TCP, a connection.

    `at` is when it ended (ms since the epoch). Times are in ms, -1 where it did not get so far; `active` is
    without the time that an open connection was idle, `us` the same in microseconds from when the request
    was there, "-" if it never was. `retries` has a `+` if another server was tried; `end` is HAProxy's
    termination state, "--" a normal one.
    """

    at: int
    backend: str
    server: str
    client: str
    port: int
    request_bytes: int
    response_bytes: int
    queue: int
    connect: int
    total: int
    retries: str
    end: str
    method: str = ""
    path: str = ""
    status: int = 0
    response: int = -1
    active: int = -1
    us: str = ""

    @property
    def seconds(self) -> float:
        """How long it took, as precisely as is known."""
        if self.us.isdigit():
            return int(self.us) / 1e6
        return max(0, self.active if self.active >= 0 else self.total) / 1e3


_REQUEST = msgspec.json.Decoder(Request)


def request(line: bytes) -> Request:
    """Return what a line of the sample says. Raises ValueError for what is none."""
    try:
        return _REQUEST.decode(line)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a line of the sample: {line[:80]!r}: {error}") from None


def quantile(share: float, counts: Iterable[int], bounds: tuple[float, ...]) -> float:
    """Return what `share` of the observations are at most, interpolated within its bucket; 0 of none.

    `counts` has how many fell into each bucket, the last being those above all `bounds` (ascending).
    """
    found = tuple(counts)
    rank = share * sum(found)
    below, lower = 0, 0.0
    for count, upper in zip(found, (*bounds, bounds[-1]), strict=True):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below, lower = below + count, upper
    return 0.0
