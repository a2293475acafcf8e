"""Endpoints come and go and the daemon is restarted, and no client of a service notices."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from netlink import netns
from netlink.requests import address_add
from netlink.rtnl import Rtnl
from tests.node.world import CLUSTER_IP, NODES, World, build, ended, wait_until
from tests.proxy.world import answering

ALWAYS = ("10.244.2.20", "10.244.2.21")
SOMETIMES = tuple(f"10.244.2.{n}" for n in range(30, 50))
CHANGES, RESTARTS = 200, 3
A_SECOND = 500

SERVICE = """
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
"""
SLICE = """
kind: EndpointSlice
metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{endpoints}]
"""


def endpoints(*ready: str) -> str:
    return SLICE.format(endpoints=", ".join(f"{{addresses: [{a}], nodeName: node2}}" for a in ready))


@pytest.fixture
def world(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = build(namespaces, tmp_path_factory.mktemp("churn"))
    found.write("nodes.yaml", NODES)
    found.write("web.yaml", SERVICE)
    found.write("slice.yaml", endpoints(*ALWAYS, *SOMETIMES))
    listeners = netns.run(found.peer, _listen)
    with ended(found), answering(listeners):
        found.start()
        yield found


def _listen() -> list[socket.socket]:
    with Rtnl() as rtnl:
        rtnl.commit(*(address_add(1, f"{address}/32") for address in (*ALWAYS, *SOMETIMES)))
    return [socket.create_server((address, 8080), backlog=512) for address in (*ALWAYS, *SOMETIMES)]


class Client:
    """Makes new connections at an even rate, one thread, from the pod; notes who answered each."""

    def __init__(self, world: World) -> None:
        self.answers: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=netns.run, args=(world.pod, self._work))

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += 1 / A_SECOND
            try:
                with socket.create_connection((CLUSTER_IP, 80), 2) as client:
                    client.settimeout(2)
                    self.answers[client.recv(100).decode().split(":")[0]] += 1
            except OSError as error:
                self.answers[repr(error)] += 1


def test_no_connection_fails_across_200_changes_and_three_restarts(world: World) -> None:
    """All servers go on listening: a failure is one of the dataplane, whoever was chosen."""
    chance = random.Random(4)
    restarts = {CHANGES * n // (RESTARTS + 1): n for n in range(1, RESTARTS + 1)}
    with Client(world) as client:
        wait_until(lambda: client.answers.total() > A_SECOND // 4, "connections before")
        for number in range(CHANGES):
            ready = chance.sample(SOMETIMES, chance.randint(0, len(SOMETIMES)))
            world.write("slice.yaml", endpoints(*ALWAYS, *sorted(ready, key=ip_address)))
            if number in restarts:
                if restarts[number] == RESTARTS:
                    assert world.daemon
                    world.daemon.kill()
                    world.daemon.wait()
                else:
                    world.stop()
                world.start()
            time.sleep(0.02)  # the pace of changes, not a wait for anything
        world.write("slice.yaml", endpoints(*ALWAYS))
        wait_until(lambda: world.json("services")[0]["endpoints_used"] == len(ALWAYS), "the last change")
        before = client.answers.total()
        wait_until(lambda: client.answers.total() > before + 100, "connections after")
    assert set(client.answers) <= {*ALWAYS, *SOMETIMES}, client.answers
    assert len(client.answers) > len(ALWAYS) + 10, "the others were used as well"
