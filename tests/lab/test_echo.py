import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import echo


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", echo.__file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    number = free_port()
    with start("shop", "node7", "--udp", str(number)) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().strip() == echo.READY
            yield number
        finally:
            server.kill()


def test_one_connection_carries_several_requests(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        for path in ("/", "/any/thing?x=1"):
            connection.request("GET", path)
            fields = json.loads(connection.getresponse().read())
            assert (fields["name"], fields["node"]) == ("shop", "node7")
            assert (fields["client_address"], fields["server_port"]) == ("127.0.0.1", port)
            assert connection.sock is not None
            assert fields["client_port"] == connection.sock.getsockname()[1]
    finally:
        connection.close()


def test_requests_sent_together_are_all_answered(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 2) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = b""
        while chunk := client.recv(4096):
            received += chunk
    assert received.count(b"200 OK") == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_datagram_is_answered_with_the_address_it_came_from(port: int, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect((address, port))
        client.send(b"?")
        fields = json.loads(client.recv(4096))
        assert (fields["client_address"], fields["client_port"]) == client.getsockname()[:2]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_each_family_is_served_and_shown_as_it_is(port: int, address: str) -> None:
    with socket.create_connection((address, port), 2) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert f'"client_address": "{address}"'.encode() in client.recv(4096)


def test_an_address_that_a_proxy_tells_of_is_repeated() -> None:
    head = b"GET / HTTP/1.1\r\nX-Forwarded-For: 2001:DB8::7"
    response, _ = echo.respond(head, {"name": "shop"})
    fields = json.loads(response.partition(b"\r\n\r\n")[2])
    assert fields == {"name": "shop", "forwarded_for": "2001:db8::7"}
    assert b"forwarded_for" not in echo.respond(b"GET / HTTP/1.1", {"name": "shop"})[0]


def test_a_taken_port_is_said_and_ends_the_server(port: int) -> None:
    with start("other", "node7", str(port)) as second:
        _, stderr = second.communicate(timeout=5)
    assert second.returncode == 1
    assert stderr.strip() == f"echo: port {port}: Address already in use"


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "b", "http"), ("a", "b", "65536")])
def test_wrong_arguments_are_answered_with_the_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert echo.main(list(arguments)) == 2
    assert capsys.readouterr().err.strip() == echo.USAGE


@given(st.binary(max_size=200))
def test_any_request_head_is_answered(head: bytes) -> None:
    response, keep = echo.respond(head, {})
    assert response.startswith(b"HTTP/1.1 ")
    assert isinstance(keep, bool)


@pytest.mark.parametrize(
    ("head", "status", "keep"),
    [
        (b"GET / HTTP/1.1", b"200", True),
        (b"GET / HTTP/1.1\r\nconnection: Close", b"200", False),
        (b"GET / HTTP/1.0", b"200", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive", b"200", True),
        (b"POST / HTTP/1.1", b"405", False),
        (b"nonsense", b"400", False),
    ],
)
def test_a_connection_stays_open_as_http_says(head: bytes, status: bytes, keep: bool) -> None:
    response, kept = echo.respond(head, {})
    assert response.split(b" ")[1] == status
    assert kept is keep
