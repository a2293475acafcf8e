"""Figures of a real HAProxy: nothing is lost and nothing counted twice when it is reloaded."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable
from pathlib import Path

from netlink import netns
from netlink.family import Family
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from node import l7_network
from node.l7_stats import Counts, Sampler
from proxy.l7.engine import Engine
from proxy.l7.model import Backend, Route, Server
from proxy.l7.places import PORT, address
from proxy.l7.policy import Policy, Protocol
from proxy.l7.process import prepare
from proxy.l7.render import Settings
from tests.node.world import wait_until

HERE = address(Protocol.HTTP, Family.V4, "")


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500 if self.path == "/bad" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def _serve() -> http.server.ThreadingHTTPServer:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1))
    l7_network.ensure((Family.V4,), transparent=False)
    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)


def _ask(*paths: str) -> list[int]:
    """Ask HAProxy on one connection; return the codes."""
    client = http.client.HTTPConnection(HERE, PORT, timeout=5)
    with contextlib.closing(client):
        codes = []
        for path in paths:
            client.request("GET", path)
            answer = client.getresponse()
            answer.read()
            codes.append(answer.status)
        return codes


def test_a_reload_keeps_the_sums_and_the_sample_goes_on(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    node, settings = namespaces(), Settings(tmp_path / "l7", threads=1, sample=1)
    engine, now = Engine(settings), iter(range(1000))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(netns.run(node, _serve))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        endpoint = Server("127.0.0.1", server.server_port)
        web = Backend("web", "shop/web", Family.V4, Policy(), (Route(Family.V4, HERE, PORT),), (endpoint,))
        other = Backend("other", "shop/other", Family.V4, Policy(), (), ())
        prepare(settings)
        sampler = stack.enter_context(Sampler(settings.sample_socket, lambda: ("web", "other")))
        stack.callback(engine.stop)
        counts = Counts(engine.ask, lambda: float(next(now)))

        netns.run(node, engine.bring, {"web": web})
        assert netns.run(node, _ask, "/", "/bad", "/") == [200, 500, 200]
        for key in (("web", ""), ("web", endpoint.name)):
            totals = counts.read()[key].totals
            assert (totals.requests, totals.code_2xx, totals.code_5xx) == (3, 2, 1)

        netns.run(node, engine.bring, {"web": web, "other": other})
        assert engine.reloads == 1
        assert counts.read()["web", ""].totals.requests == 3
        assert netns.run(node, _ask, "/", "/", "/", "/") == [200] * 4
        assert counts.read()["web", ""].totals.requests == 7
        found = counts.read()["web", endpoint.name]
        assert (found.totals.requests, found.now is not None) == (7, True)
        wait_until(lambda: sum(sampler.times()["web"].counts) == 7, "all requests are in the sample")
        assert 0 < sampler.times()["web"].quantile(0.5) < 1
