"""What a node tells over HTTP, with kube-proxy's paths, ports and meaning.

`:10249/proxyMode`, `:10249/metrics`, `:10249/healthz` for the node itself; `:10256/healthz` and `/livez` for
load balancers. Source: Kubernetes documentation, kube-proxy reference, and KEP-3836.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from netlink.family import IPV6

Page = Callable[[], tuple[int, str, bytes]]
"""Returns status, content type and body."""


class _Handler(BaseHTTPRequestHandler):
    pages: Mapping[str, Page]
    protocol_version = "HTTP/1.1"
    timeout = 5.0  # seconds that a client may keep a thread without a word

    def do_GET(self) -> None:
        page = self.pages.get(self.path.split("?")[0])
        status, kind, body = page() if page else (404, "text/plain", b"404 page not found\n")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: health checks come every second."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def server_bind(self) -> None:
        """Listen without asking DNS for a name: it may be this node's services that DNS waits for.

        `[::]` is every address of both families, whatever net.ipv6.bindv6only says.
        """
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent when a client goes away in the middle of an answer."""


def text(body: str, status: int = 200) -> tuple[int, str, bytes]:
    """Return a plain page."""
    return status, "text/plain; charset=utf-8", body.encode()


def document(value: object, status: int = 200) -> tuple[int, str, bytes]:
    """Return a JSON page."""
    return status, "application/json", json.dumps(value).encode()


@contextlib.contextmanager
def serving(address: str, pages: Mapping[str, Page]) -> Iterator[None]:
    """Serve pages on `host:port` in threads; an empty address serves nothing.

    Raises OSError when the address cannot be had.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    if host == "[::]" and not IPV6.exists():
        host = "0.0.0.0"
    handler = type("Handler", (_Handler,), {"pages": pages})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (_Server,), {"address_family": family})
    try:
        server = kind((host.strip("[]"), int(port)), handler)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="web", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
