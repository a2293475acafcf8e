"""An L7 proxy that says what a test has it say."""

from __future__ import annotations

import json
from collections.abc import Collection, Set
from dataclasses import dataclass, field
from pathlib import Path

from netlink.family import Family
from node.l7_stats import L7Stats, Sampler
from proxy.l7.model import Backend, Backends, Route, Server
from proxy.l7.policy import Policy, Protocol

COLUMNS = (
    *("pxname", "svname", "type", "mode", "status", "scur", "qcur", "stot", "req_tot"),
    *("hrsp_2xx", "hrsp_5xx", "econ", "eresp", "wretr", "wredis", "check_status", "last_chk"),
)
WEB = Backend(
    "shop_web_-_http4",
    "shop/web",
    Family.V4,
    Policy(),
    (Route(Family.V4, "10.96.0.1", 80), Route(Family.V4, "", 30080)),
    (Server("10.0.0.1", 8080), Server("10.0.0.2", 8080)),
)
DB = Backend(
    "shop_db_sql_tcp6",
    "shop/db:sql",
    Family.V6,
    Policy(protocol=Protocol.TCP, fail_open=False),
    (Route(Family.V6, "fd00:96::1", 5432),),
    (Server("fd00::1", 5432),),
)
CONFIGURATION = """\
global
    nbthread 1
frontend http
    bind 169.254.112.1:10000

backend shop_web_-_http4
    balance roundrobin

# the others
backend shop_db_sql_tcp6
    mode tcp
"""


@dataclass
class FakeL7:
    """`stat` are rows of `show stat` by backend and server; `asked` are the commands so far."""

    backends: Backends = field(default_factory=lambda: {b.name: b for b in (WEB, DB)})
    served: Set[str] = frozenset({WEB.name, DB.name})
    up: bool = True
    problems: tuple[str, ...] = ()
    reloads: int = 0
    restarts: int = 0
    process: int = 100
    stat: dict[tuple[str, str], dict[str, str | int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(Path("/nonexistent"), self._known, self.clock)

    def _known(self) -> Collection[str]:
        return self.backends

    def clock(self) -> float:
        return self.now

    def ask(self, command: str) -> str:
        """Answer as HAProxy."""
        self.asked.append(command)
        if not self.up:
            raise ConnectionRefusedError("nobody listens")
        if command == "show info":
            return f"Name: HAProxy\nPid: {self.process}\n\n"
        lines = [f"# {','.join(COLUMNS)},"]
        for (proxy, server), cells in self.stat.items():
            named = {"pxname": proxy, "svname": server or "BACKEND", "type": 2 if server else 1, **cells}
            named.setdefault("mode", "tcp" if "tcp" in proxy else "http")
            lines.append(",".join(str(named.get(column, "")) for column in COLUMNS) + ",")
        return "\n".join([*lines, "", ""])

    def configuration(self) -> str:
        return CONFIGURATION if self.up else ""


def line(backend: str, milliseconds: float) -> bytes:
    """Return a line of the sample."""
    values = dict.fromkeys(("port", "request_bytes", "response_bytes", "queue", "connect", "total"), 0)
    words = {"backend": backend, "server": "s", "client": "c", "retries": "0", "end": "--"}
    return json.dumps({"at": 0, **values, **words, "us": f"{milliseconds * 1e3:.0f}"}).encode()


def busy() -> FakeL7:
    """Return a proxy of two services that has worked."""
    proxy = FakeL7(reloads=3, restarts=1)
    http: dict[str, str | int] = {
        "status": "UP",
        "scur": 2,
        "stot": 12,
        "req_tot": 12,
        "hrsp_2xx": 10,
        "hrsp_5xx": 2,
    }
    proxy.stat = {
        (WEB.name, "10.0.0.1:8080"): {**http, "check_status": "L7OK"},
        (WEB.name, "10.0.0.2:8080"): {"status": "DOWN", "econ": 4, "wredis": 1, "check_status": "L4CON"},
        (WEB.name, ""): {**http, "qcur": 5, "econ": 4, "eresp": 1, "wretr": 3, "wredis": 1},
        (DB.name, "fd00::1:5432"): {"status": "no check", "scur": 1, "stot": 7},
        (DB.name, ""): {"status": "UP", "scur": 1, "stot": 7},
    }
    for name, times in ((WEB.name, (1, 2, 2, 2, 2, 2, 3, 4, 5, 90)), (DB.name, (1000,))):
        for milliseconds in times:
            proxy.sampler.take(line(name, milliseconds))
    return proxy


def stats(proxy: FakeL7) -> L7Stats:
    """Return what is to be said of it."""
    return L7Stats(proxy, proxy.clock)
