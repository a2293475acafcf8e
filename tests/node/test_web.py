"""Pages over HTTP: on IPv4, on IPv6, on nothing; and never by way of DNS."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from contextlib import closing

import pytest

from netlink import netns
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from node import web

PAGES = {"/page": lambda: web.text("hello\n")}


@pytest.fixture(scope="module")
def place(namespaces: Callable[[], str]) -> str:
    def up() -> None:
        with Rtnl() as rtnl:
            rtnl.commit(link_up(1))

    name = namespaces()
    netns.run(name, up)
    return name


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.1:80", "127.0.0.1"), ("0.0.0.0:80", "127.0.0.1"), ("[::1]:80", "::1")]
)
def test_pages_are_served_without_asking_dns(
    place: str, address: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node's DNS may be a service that waits for this very daemon."""

    def refuse(*_: object) -> str:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getfqdn", refuse)

    def ask() -> tuple[int, bytes]:
        with web.serving(address, PAGES), closing(http.client.HTTPConnection(host, 80, timeout=5)) as client:
            client.request("GET", "/page?x=1")
            answer = client.getresponse()
            return answer.status, answer.read()

    assert netns.run(place, ask) == (200, b"hello\n")


def test_no_address_is_no_server() -> None:
    with web.serving("", PAGES):
        pass


def test_an_address_that_is_taken_is_named(place: str) -> None:
    def twice() -> None:
        with (
            web.serving("127.0.0.1:80", PAGES),
            pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:80: Address already in use"),
            web.serving("127.0.0.1:80", PAGES),
        ):
            pass

    netns.run(place, twice)
