"""What HAProxy tells is read whole, and no client can make it tell something else."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from netlink import netns
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from proxy.l7.policy import Protocol
from proxy.l7.stats import (
    LINE_BYTES,
    LOG_FORMAT,
    RULES,
    Kind,
    Request,
    Row,
    Totals,
    process_of,
    quantile,
    request,
    rows,
)

HTTP, TCP, SERVER, NOBODY = 18080, 18090, 18081, 18082
DEADLINE = 5.0


def configuration(folder: Path) -> str:
    rules = "\n    ".join(RULES[Protocol.HTTP])
    return f"""
global
    log {folder}/log.sock len {LINE_BYTES} format raw local0 info
    stats socket {folder}/cli.sock mode 600 level admin
defaults
    log global
    timeout client 5s
    timeout server 5s
    timeout connect 1s
    retries 2
    option redispatch 1
frontend http
    mode http
    bind 127.0.0.1:{HTTP}
    {rules}
    log-format '{LOG_FORMAT[Protocol.HTTP]}'
    use_backend none if {{ path /none }}
    default_backend web
backend web
    mode http
    server 127.0.0.1:{SERVER} 127.0.0.1:{SERVER}
    server 127.0.0.1:{NOBODY} 127.0.0.1:{NOBODY} backup
backend none
    mode http
    server 127.0.0.1:{NOBODY} 127.0.0.1:{NOBODY}
frontend tcp
    mode tcp
    bind 127.0.0.1:{TCP}
    log-format '{LOG_FORMAT[Protocol.TCP]}'
    default_backend echo
backend echo
    mode tcp
    server 127.0.0.1:{SERVER} 127.0.0.1:{SERVER}
"""


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


@dataclass(frozen=True)
class World:
    """A HAProxy, and where its lines come."""

    node: str
    folder: Path
    lines: socket.socket

    def send(self, raw: bytes, port: int = HTTP) -> bytes:
        """Send a request; return the line of the sample."""
        netns.run(self.node, _exchange, raw, port)
        return self.lines.recv(65536)

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as cli:
            cli.connect(str(self.folder / "cli.sock"))
            cli.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: cli.recv(65536), b"")).decode()


def _exchange(raw: bytes, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
        client.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass


def _up() -> socketserver.ThreadingTCPServer:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1))
    return socketserver.ThreadingTCPServer(("127.0.0.1", SERVER), _Answer)


@pytest.fixture(scope="module")
def world(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    node, folder = namespaces(), tmp_path_factory.mktemp("l7")
    (folder / "haproxy.cfg").write_text(configuration(folder))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(netns.run(node, _up))
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        stack.callback(server.shutdown)
        lines = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        lines.settimeout(DEADLINE)
        lines.bind(str(folder / "log.sock"))
        words = ("ip", "netns", "exec", node, "haproxy", "-db", "-f", str(folder / "haproxy.cfg"))
        process = stack.enter_context(subprocess.Popen(words))
        stack.callback(process.kill)
        deadline = time.monotonic() + DEADLINE
        while not (folder / "cli.sock").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        yield World(node, folder, lines)


PATHS = (
    (b"/", "/"),
    (b"/a?token=secret", "/a"),
    (b'/"\\x]{}|<>%00%ff\\', '/"\\x]{}|<>%00%ff\\'),
    (b'/","status":999,"x":"', '/","status":999,"x":"'),
    (b"/\\u0000\\", "/\\u0000\\"),
)


@pytest.mark.parametrize(("path", "told"), PATHS)
def test_a_path_is_told_as_it_was_without_its_query(world: World, path: bytes, told: str) -> None:
    found = request(world.send(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
    assert (found.method, found.path, found.status, found.backend) == ("GET", told, 200, "web")
    assert found.client == "127.0.0.1"
    assert found.server == f"127.0.0.1:{SERVER}"
    assert found.retries == "0"
    assert 0 < int(found.us) < DEADLINE * 1e6
    assert found.seconds == int(found.us) / 1e6
    assert abs(found.at / 1e3 - time.time()) < DEADLINE


def test_a_path_is_never_too_long_for_a_line(world: World) -> None:
    line = world.send(b"GET /" + b'"' * 6000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert len(line) < LINE_BYTES
    assert set(request(line).path) == {"/", '"'}


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
        b'G"\\T / HTTP/1.1\r\nHost: a\r\n\r\n',
        b"\r\n\r\n\0\0\r\n",
        b'GET / HTTP/1.1\r\nHo"st: a\r\n\r\n',
        b"GET http://h/p HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_request_is_a_line_without_a_backend(world: World, raw: bytes) -> None:
    found = request(world.send(raw))
    assert (found.backend, found.server, found.status) == ("http", "<NOSRV>", 400)
    assert found.seconds < DEADLINE


def test_headers_cannot_get_into_a_line(world: World) -> None:
    raw = b'GET / HTTP/1.1\r\nHost: "}\\\r\nX: "},{"status":1\r\nCookie: \\"\xff\r\nConnection: close\r\n\r\n'
    found = json.loads(world.send(raw))
    assert (found["status"], found["path"]) == (200, "/")


def test_a_connection_of_tcp(world: World) -> None:
    found = request(world.send(b"GET /\xff\r\n\r\n", TCP))
    assert (found.backend, found.server, found.method, found.path) == (
        "echo",
        f"127.0.0.1:{SERVER}",
        "",
        "",
    )
    assert found.request_bytes == len(b"GET /\xff\r\n\r\n")
    assert found.response_bytes > 0
    assert found.seconds == found.total / 1e3


def test_counters_tell_of_endpoints_that_answer_and_of_those_that_do_not(world: World) -> None:
    before = {(r.proxy, r.server): r for r in rows(world.ask("show stat"))}
    world.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    failed = request(world.send(b"GET /none HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
    world.send(b"x\r\n\r\n", TCP)
    after = {(r.proxy, r.server): r for r in rows(world.ask("show stat"))}
    added = {key: row.totals.since(before[key].totals) for key, row in after.items()}
    assert failed.status == 503
    assert failed.end.startswith("SC")
    web, server = added["web", ""], added["web", f"127.0.0.1:{SERVER}"]
    assert (web.requests, web.code_2xx, server.requests, server.code_2xx) == (1, 1, 1, 1)
    none, dead = added["none", ""], added["none", f"127.0.0.1:{NOBODY}"]
    assert (none.code_5xx, none.connect_errors, dead.connect_errors) == (1, 1, 1)
    assert none.retries + none.redispatches == int(failed.retries.lstrip("+")) == 2
    assert (added["echo", ""].requests, added["echo", f"127.0.0.1:{SERVER}"].requests) == (1, 1)
    assert {after[k].kind for k in (("http", ""), ("web", ""))} == {Kind.FRONTEND, Kind.BACKEND}
    assert after["web", f"127.0.0.1:{SERVER}"].status == "no check"


def test_the_process_is_told(world: World) -> None:
    info = world.ask("show info")
    assert Path(f"/proc/{process_of(info)}/comm").read_text() == "haproxy\n"
    with pytest.raises(ValueError, match="no Pid"):
        process_of("Unknown command")


STAT = """\
# pxname,svname,qcur,scur,stot,req_tot,status,type,check_status,last_chk,mode,hrsp_2xx,new_column,
web,10.0.0.1:80,1,2,30,29,UP 2/3,2,* L7STS,"404, not here",http,28,7,
db,[::1],,,3,,no check,2,,,tcp,,,

"""


def test_columns_are_found_by_name_and_cells_may_be_empty_or_quoted() -> None:
    web, db = rows(STAT)
    assert web == Row(
        Kind.SERVER,
        "web",
        "10.0.0.1:80",
        Totals(connections=30, requests=29, code_2xx=28),
        connections=2,
        queued=1,
        status="UP 2/3",
        check="L7STS",
        checked="404, not here",
    )
    assert (db.totals, db.check) == (Totals(connections=3, requests=3), "")


@pytest.mark.parametrize("text", ["", "\n", "Unknown command: 'show stat'\n"])
def test_what_are_no_rows_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names of columns"):
        rows(text)


@pytest.mark.parametrize("line", [b"", b"{}", b"\xff", b'{"at":"x"}', b"[" * 2000])
def test_what_is_no_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of the sample"):
        request(line)


def test_times_are_as_precise_as_is_known() -> None:
    line = Request(0, "web", "s", "c", 1, 0, 0, 0, 0, 70, "0", "--")
    assert line.seconds == 0.07
    assert Request(0, "web", "s", "c", 1, 0, 0, 0, 0, 70, "0", "--", active=5).seconds == 0.005
    assert Request(0, "web", "s", "c", 1, 0, 0, 0, 0, 70, "0", "--", active=5, us="4321").seconds == 0.004321
    assert Request(0, "web", "s", "c", 1, 0, 0, 0, 0, 70, "0", "--", active=5, us="-9").seconds == 0.005


def test_quantiles_are_within_their_bucket() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile(0.5, (0, 0, 0, 0), bounds) == 0.0
    assert quantile(0.5, (0, 10, 0, 0), bounds) == 1.5
    assert quantile(0.9, (50, 40, 10, 0), bounds) == 2.0
    assert quantile(0.95, (50, 40, 10, 0), bounds) == 3.0
    assert quantile(0.99, (0, 0, 0, 5), bounds) == 4.0  # more than all bounds is not known better


def test_what_began_at_zero_again_counts_whole() -> None:
    before = Totals(connections=10, requests=10)
    assert Totals(connections=12, requests=11).since(before) == Totals(connections=2, requests=1)
    assert Totals(connections=12, requests=3).since(before) == Totals(connections=12, requests=3)
