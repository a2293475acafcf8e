"""The server in every pod: it answers over HTTP and UDP with its name and the address it saw.

Run as a file with `python -I -S`, so it imports only what starts quickly (about 30 ms; `http.server`
alone would double that) and nothing of podwire. HTTP/1.1 with keep-alive; any GET is answered with JSON
{name, node, client_address, client_port, server_address, server_port}, and forwarded_for where a proxy
has said in X-Forwarded-For whose request it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading

REQUEST_BYTES = 16384
IDLE_SECONDS = 60.0
REFUSAL = b"HTTP/1.1 %s\r\nAllow: GET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
READY = "echo: ready"
USAGE = "usage: echo.py NAME NODE [--udp] PORT..."
ANY_ADDRESS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def answer(identity: tuple[str, str], client: tuple[str, int], server: tuple[str, int]) -> dict[str, object]:
    """Return the fields that answer a request: who serves, and the addresses the server sees."""
    return {
        "name": identity[0],
        "node": identity[1],
        "client_address": client[0],
        "client_port": client[1],
        "server_address": server[0],
        "server_port": server[1],
    }


def respond(head: bytes, fields: dict[str, object]) -> tuple[bytes, bool]:
    """Return the response to a request head and whether the connection stays open after it."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return REFUSAL % b"400 Bad Request", False
    if words[0] != "GET":
        return REFUSAL % b"405 Method Not Allowed", False
    headers = {
        k.strip().lower(): v.strip().lower() for k, _, v in (line.partition(":") for line in lines[1:])
    }
    keep = headers.get("connection", "keep-alive" if words[2] == "HTTP/1.1" else "close") == "keep-alive"
    connection = b"keep-alive" if keep else b"close"
    if "x-forwarded-for" in headers:
        fields = {**fields, "forwarded_for": headers["x-forwarded-for"]}
    body = json.dumps(fields).encode() + b"\n"
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
    )
    return head % (len(body), connection) + body, keep


def serve_connection(connection: socket.socket, identity: tuple[str, str]) -> None:
    """Answer the requests of one connection until either side ends it."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(IDLE_SECONDS)
        fields = answer(identity, connection.getpeername()[:2], connection.getsockname()[:2])
        pending, keep = b"", True
        while keep:
            while b"\r\n\r\n" not in pending:
                received = connection.recv(4096)
                pending += received
                if not received or len(pending) > REQUEST_BYTES:
                    return
            head, _, pending = pending.partition(b"\r\n\r\n")
            response, keep = respond(head, fields)
            connection.sendall(response)


def serve_tcp(listener: socket.socket, identity: tuple[str, str]) -> None:
    """Accept connections for ever, each answered in a thread of its own."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve_connection, args=(connection, identity), daemon=True).start()


def serve_udp(server: socket.socket, identity: tuple[str, str]) -> None:
    """Answer every datagram with the same JSON; the server address is the wildcard one."""
    while True:
        _, client = server.recvfrom(4096)
        with contextlib.suppress(OSError):
            fields = answer(identity, client[:2], server.getsockname()[:2])
            server.sendto(json.dumps(fields).encode(), client)


def listen(port: int, kind: socket.SocketKind) -> list[socket.socket]:
    """Return a socket on the port for each IP family that the kernel has; OSError when the port is taken.

    One each, not one for both: an IPv6 socket would show IPv4 clients as ::ffff:192.0.2.1.
    """
    found = []
    for family, address in ANY_ADDRESS.items():
        try:
            server = socket.socket(family, kind)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue
            raise
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen(128)
        found.append(server)
    return found


def main(arguments: list[str]) -> int:
    """Serve the ports until killed; 1 when a port is taken, 2 for wrong arguments."""
    udp = "--udp" in arguments
    words = [word for word in arguments if word != "--udp"]
    if len(words) < 3 or not all(word.isdecimal() and int(word) < 65536 for word in words[2:]):
        print(USAGE, file=sys.stderr)
        return 2
    identity = (words[0], words[1])
    kinds = {socket.SOCK_STREAM: serve_tcp} | ({socket.SOCK_DGRAM: serve_udp} if udp else {})
    threads = []
    for port in map(int, words[2:]):
        try:
            for kind, serve in kinds.items():
                for server in listen(port, kind):
                    threads.append(threading.Thread(target=serve, args=(server, identity)))
        except OSError as error:
            print(f"echo: port {port}: {os.strerror(error.errno or 0)}", file=sys.stderr)
            return 1
    for thread in threads:
        thread.start()
    print(READY, flush=True)
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
