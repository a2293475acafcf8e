"""What `l7` measures with: the endpoints, the proxies to compare with, and wrk, which asks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from netlink import netns

PORT = 8080
SEEN = "/seen"
"""What endpoints answer there: their own address, and the header X-Forwarded-For."""
SIZES = {"small": 100, "large": 64 * 1024}
"""The other paths, and the bytes of what is there."""
END_SECONDS = 5.0
PROGRAMS = f"{os.environ.get('PATH', '')}:/usr/sbin"
Command = tuple[object, ...]

WRK = """
done = function(summary, latency, requests)
  local failed = 0
  for _, count in pairs(summary.errors) do failed = failed + count end
  io.write(string.format('{"rate": %f, "p50": %f, "p99": %f, "failed": %d}\\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99), failed))
end
"""
NGINX_CONF = """
daemon off;
user root;
pid pid;
{main}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {http}
}}
"""
NGINX_FILES = """
    sendfile on;
    open_file_cache max=10;
    server {{
        listen {port};
        root {root};
        location = {seen} {{ return 200 "$server_addr $http_x_forwarded_for"; }}
    }}
"""
NGINX_PROXY = """
    proxy_buffers 32 4k;
    upstream endpoints {{ {servers} keepalive 64; keepalive_requests 1000000000; }}
    server {{
        listen {address};
        location / {{
            proxy_pass http://endpoints;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
    }}
"""
HAPROXY_CONF = """
{main}
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend clients
    bind {address}
{frontend}
"""
HAPROXY_FILES = """
    acl is_seen path {seen}
    http-request return content-type text/plain lf-string "%[dst] %[req.hdr(x-forwarded-for)]" if is_seen
    http-request return content-type text/plain file {root}/small if {{ path /small }}
    http-request return content-type text/plain file {root}/large if {{ path /large }}
"""
HAPROXY_PROXY = """
    default_backend endpoints
backend endpoints
    balance roundrobin
    option forwardfor
{servers}
"""


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs measured with; no nginx: None. `scratch` is a folder that goes with the run."""

    scratch: Path
    haproxy: Path
    nginx: Path | None


def tools(scratch: Path) -> Tools:
    """Find the programs and write what they read; what is missing ends the benchmark."""
    haproxy = shutil.which("haproxy", path=PROGRAMS)
    if haproxy is None or shutil.which("wrk") is None:
        raise SystemExit("bench: haproxy and wrk are needed; `make setup-tests` installs them")
    for name, size in SIZES.items():
        (scratch / name).write_bytes(b"x" * size)
    (scratch / "wrk.lua").write_text(WRK)
    return Tools(scratch, Path(haproxy), _nginx(scratch))


def _nginx(scratch: Path) -> Path | None:
    """Return Debian's nginx: the one that is installed, or one unpacked from its package, never set up."""
    if installed := shutil.which("nginx", path=PROGRAMS):
        return Path(installed)
    folder = scratch / "package"
    folder.mkdir()
    # As root: apt's own user cannot write to the folder.
    fetch = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "nginx"]
    program = folder / "usr/sbin/nginx"
    done = subprocess.run(fetch, cwd=folder, capture_output=True, text=True, check=False)
    for package in folder.glob("nginx_*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        done = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    if program.exists() and not done.returncode:
        return program
    print(f"bench: without nginx, whose package cannot be had: {done.stderr.strip()}", file=sys.stderr)
    return None


def endpoint(found: Tools) -> Command:
    """Return the command of an endpoint, of one process: nginx or, where there is none, HAProxy."""
    fields = {"port": PORT, "root": found.scratch, "seen": SEEN}
    if found.nginx:
        return _nginx_command(found, "master_process off;", NGINX_FILES.format(**fields))
    main = f"global\n    nbthread 1\n    tune.bufsize {2 * SIZES['large']}"
    return _haproxy_command(found, main, f":{PORT}", HAPROXY_FILES.format(**fields))


def haproxy(found: Tools, address: str, targets: Sequence[str]) -> Command:
    """Return the command of a bare HAProxy, with a thread for each processor, as is its default."""
    servers = "\n".join(f"    server s{number} {target}" for number, target in enumerate(targets))
    return _haproxy_command(found, "", address, HAPROXY_PROXY.format(servers=servers))


def nginx(found: Tools, address: str, targets: Sequence[str]) -> Command:
    """Return the command of a bare nginx, with a process for each processor."""
    servers = " ".join(f"server {target};" for target in targets)
    http = NGINX_PROXY.format(address=address, servers=servers)
    return _nginx_command(found, "worker_processes auto;", http)


def _nginx_command(found: Tools, main: str, http: str) -> Command:
    folder = tempfile.mkdtemp(prefix="nginx", dir=found.scratch)
    Path(folder, "conf").write_text(NGINX_CONF.format(main=main, http=http))
    return found.nginx, "-p", folder, "-c", "conf", "-e", "stderr"


def _haproxy_command(found: Tools, main: str, address: str, frontend: str) -> Command:
    folder = tempfile.mkdtemp(prefix="haproxy", dir=found.scratch)
    path = Path(folder, "conf")
    path.write_text(HAPROXY_CONF.format(main=main, address=address, frontend=frontend))
    return found.haproxy, "-db", "-f", path


@contextmanager
def running(namespace: str, command: Command) -> Iterator[None]:
    """Run a server in a namespace for the length of a block; it ends with all that it has started."""
    words = [str(word) for word in command]
    start = partial(subprocess.Popen, words, stdin=subprocess.DEVNULL, start_new_session=True)
    server: subprocess.Popen[bytes] = netns.run(namespace, start)
    try:
        yield
    finally:
        server.terminate()  # nginx's first process then waits for the others
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(found: Tools, namespace: str, url: str, connections: int, *options: str) -> dict[str, float]:
    """Ask from a namespace by wrk, on one thread of it.

    Returns `rate`, requests a second; `p50` and `p99`, microseconds; `failed`, how many requests.
    """
    words = ["wrk", "-t", "1", "-c", str(connections), "-s", str(found.scratch / "wrk.lua"), *options, url]
    done = netns.run(namespace, partial(subprocess.run, words, capture_output=True, text=True, check=False))
    if done.returncode:
        raise SystemExit(f"bench: wrk: {done.stderr.strip() or done.stdout.strip()}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not figures["rate"]:
        raise SystemExit(f"bench: no request to {url} was answered:\n{done.stdout}")
    return figures
