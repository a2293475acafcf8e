"""Services that ask for the L7 proxy: a real daemon, a real HAProxy, clients in a pod."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from lab import echo
from netlink import netns
from netlink.requests import address_add
from netlink.rtnl import Rtnl
from tests.node.world import NODE, NODES, PEER, POD, SERVERS, World, build, ended, podwire, wait_until

SOMETIMES = tuple(f"10.244.2.{n}" for n in range(30, 40))
PLAIN, WEB, SHUT, RAW = "10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"
A_SECOND = 500
HAPROXY = "/usr/sbin/haproxy"

SERVICE = """
kind: Service
metadata:
  name: {name}
  namespace: shop
  annotations: {annotations}
spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}
---
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{endpoints}]
"""


def service(name: str, ip: str, policy: object = None, servers: Sequence[str] = SERVERS) -> str:
    asked = (
        {}
        if policy is None
        else {"podwire.io/proxy": policy if isinstance(policy, str) else json.dumps(policy)}
    )
    endpoints = ", ".join(f"{{addresses: [{a}], nodeName: node2}}" for a in servers)
    return SERVICE.format(name=name, ip=ip, annotations=json.dumps(asked), endpoints=endpoints)


@contextlib.contextmanager
def answering(addresses: Sequence[str]) -> Iterator[None]:
    """Serve HTTP on port 8080 of these addresses: each says its own, and what it saw of the client."""
    listeners = [socket.create_server((address, 8080), backlog=512) for address in addresses]

    def serve(listener: socket.socket, address: str) -> None:
        with contextlib.suppress(OSError):
            echo.serve_tcp(listener, (address, ""))

    for listener, address in zip(listeners, addresses, strict=True):
        threading.Thread(target=serve, args=(listener, address), daemon=True).start()
    try:
        yield
    finally:
        for listener in listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def _more_addresses() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(*(address_add(1, f"{address}/32") for address in SOMETIMES))


@pytest.fixture(scope="module")
def world(namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("l7")
    found = build(namespaces, root)
    found.options = ("--l7-access-log", str(root / "access.log"))
    (root / "bin").mkdir()
    (root / "bin/haproxy").symlink_to(HAPROXY)
    found.environment = {"PATH": f"{root}/bin:/usr/bin:/bin"}
    netns.run(found.peer, _more_addresses)
    found.write("nodes.yaml", NODES)
    with contextlib.ExitStack() as stack:
        stack.enter_context(netns.run(found.peer, _entered, [*SERVERS, *SOMETIMES]))
        stack.callback(_end_haproxy, found)
        stack.enter_context(ended(found))
        found.start()
        yield found


def _entered(addresses: Sequence[str]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(answering(addresses))
    return stack


def haproxy(world: World) -> list[int]:
    """The processes of HAProxy in the node's namespace, the master first."""
    found = world.run("ip", "netns", "pids", world.node).split()
    return sorted(int(pid) for pid in found if _name(pid) == "haproxy")


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def _end_haproxy(world: World) -> None:
    for pid in haproxy(world):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not haproxy(world), "HAProxy ends")


def ask(world: World, ip: str, path: str = "/", timeout: float = 2.0) -> dict[str, object]:
    """Ask from the pod, on a connection of its own; what the server said, or {"error": …}."""
    return netns.run(world.pod, _ask, ip, path, timeout)


def _ask(ip: str, path: str, timeout: float) -> dict[str, object]:
    try:
        with socket.create_connection((ip, 80), timeout) as client:
            return _asked(client, path)
    except OSError as error:
        return {"error": type(error).__name__}


def _asked(client: socket.socket, path: str = "/") -> dict[str, object]:
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: web\r\n\r\n".encode())
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"\n"):
        chunk = client.recv(65536)
        if not chunk:
            return {"error": f"closed after {received!r}"}
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    found: dict[str, object] = json.loads(body) if status == 200 else {"error": status}
    return found


def known(world: World, name: str) -> None:
    """Wait until a service is there: who connects before is remembered as not translated, with its port."""

    def there() -> bool:
        status, out, _ = podwire("frontends", f"shop/{name}", "--socket", str(world.socket), "-o", "json")
        return status == 0 and json.loads(out) != []

    wait_until(there, f"the service {name}")


def proxied(world: World, ip: str) -> bool:
    """Whether the server sees the node's address, as it does behind HAProxy."""
    return sees(world, ip, NODE)


def sees(world: World, ip: str, address: str) -> bool:
    """Whether a server sees this address of a client in the pod."""
    return ask(world, ip, timeout=0.5).get("client_address") == address


def shown(world: World) -> list[dict[str, Any]]:
    """What `podwire l7 show` says."""
    status, out, err = podwire("l7", "show", "-o", "json", "--socket", str(world.socket))
    assert (status, err) == (0, "")
    found: list[dict[str, Any]] = json.loads(out)["services"]
    return found


def used(world: World) -> set[str]:
    """The endpoints of the service `web` that HAProxy sends to."""
    rows = (row for row in shown(world) if row["service"] == "shop/web")
    return {e["address"] for row in rows for e in row["endpoints"] if e["state"] != "MAINT"}


@dataclass(slots=True)
class Client:
    """Makes requests at an even rate from the pod, each on a connection of its own; notes who answered."""

    world: World
    ip: str
    answers: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Client:
        self._thread = threading.Thread(target=netns.run, args=(self.world.pod, self._work))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread
        self._thread.join()

    @property
    def failed(self) -> dict[str, int]:
        return {name: n for name, n in self.answers.items() if name not in (*SERVERS, *SOMETIMES)}

    def _work(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += 1 / A_SECOND
            found = _ask(self.ip, "/", 3.0)
            self.answers[str(found.get("name") or found.get("error"))] += 1


def test_who_asks_for_nothing_costs_no_process(world: World) -> None:
    world.write("plain.yaml", service("plain", PLAIN))
    known(world, "plain")
    wait_until(lambda: sees(world, PLAIN, POD), "plain balancing")
    assert haproxy(world) == []


def test_two_endpoints_answer_in_turns_and_hear_of_the_client(world: World) -> None:
    world.write("web.yaml", service("web", WEB, {"flags": {"x-forwarded-for": True}}))
    known(world, "web")
    wait_until(lambda: proxied(world, WEB), "the proxy")
    found = [ask(world, WEB) for _ in range(20)]
    assert {f["forwarded_for"] for f in found} == {POD}
    assert all(one["name"] != next_["name"] for one, next_ in pairwise(found))
    assert ask(world, PLAIN)["client_address"] == POD, "others are balanced as before"


def test_the_node_itself_is_a_client_too(world: World) -> None:
    found = netns.run(world.node, _ask, WEB, "/", 2.0)
    assert (found["client_address"], found["forwarded_for"]) == (NODE, NODE)


def test_endpoints_change_without_a_request_that_fails_or_a_reload(world: World) -> None:
    before = haproxy(world)
    with Client(world, WEB) as client:
        for number in range(200):
            ready = SOMETIMES[: number % len(SOMETIMES)] if number % 2 else SOMETIMES[number % 5 :]
            world.write("web.yaml", service("web", WEB, {}, (*SERVERS, *ready)))
            time.sleep(0.02)  # the pace of changes, not a wait for anything
        world.write("web.yaml", service("web", WEB, {}))
        wait_until(lambda: client.answers.total() > 500, "requests")
    assert not client.failed
    assert len(client.answers) > len(SERVERS) + 5, "the others were used as well"
    assert haproxy(world) == before


def test_an_endpoint_that_is_gone_costs_nobody_a_request(world: World) -> None:
    """Its address leads nowhere, or nobody listens there."""
    world.write(
        "web.yaml", service("web", WEB, {"timeouts": {"connect": "300ms"}}, (*SERVERS, PEER, "10.244.2.99"))
    )
    wanted = {f"{address}:8080" for address in (*SERVERS, PEER, "10.244.2.99")}
    wait_until(lambda: used(world) == wanted, "the endpoints")
    assert {ask(world, WEB).get("name") for _ in range(12)} == set(SERVERS)
    world.write("web.yaml", service("web", WEB, {}))


def test_a_live_service_is_annotated_and_no_longer_and_no_connection_is_lost(world: World) -> None:
    """Neither one that is being made nor one that is open, be it through the proxy or not."""
    with contextlib.ExitStack() as stack, Client(world, PLAIN) as client:
        held = []
        for policy in ({}, None, {"ip-protocol": "tcp"}, None, {}, {"load-balancing-mode": "random"}, None):
            held.append(stack.enter_context(netns.run(world.pod, socket.create_connection, (PLAIN, 80), 5.0)))
            assert "name" in _asked(held[-1])
            world.write("plain.yaml", service("plain", PLAIN, policy))
            seen = POD if policy is None else NODE
            wait_until(partial(sees, world, PLAIN, seen), f"{policy}")
        # What a process of before holds is asked once more; it says then that it ends the connection.
        assert all("name" in _asked(connection) for connection in held)
    assert not client.failed


@pytest.mark.parametrize(
    ("annotation", "named"),
    [
        ('{"timeouts": {"connect": "soon"}}', "timeouts.connect"),
        ('{"load-balancing-mode": "best"}', "load-balancing-mode"),
        ("{", "JSON"),
    ],
)
def test_a_bad_annotation_is_told_and_the_service_stays_on_plain_balancing(
    world: World, annotation: str, named: str
) -> None:
    world.write("plain.yaml", service("plain", PLAIN, annotation))
    wait_until(lambda: any(named in p for p in world.json("status")["problems"]), "the sentence")
    (sentence,) = [p for p in world.json("status")["problems"] if named in p]
    assert "shop/plain" in sentence
    assert ask(world, PLAIN)["client_address"] == POD
    world.write("plain.yaml", service("plain", PLAIN))
    wait_until(lambda: not any(named in p for p in world.json("status")["problems"]), "the end of it")


def test_when_haproxy_dies_services_fail_open_or_closed_as_they_ask_and_it_is_back(world: World) -> None:
    world.write("shut.yaml", service("shut", SHUT, {"fail": "closed"}))
    known(world, "shut")
    wait_until(lambda: proxied(world, SHUT) and proxied(world, WEB), "the proxy")
    before = haproxy(world)
    program = world.root / "bin/haproxy"
    program.unlink()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: sees(world, WEB, POD), "plain balancing")
    assert ask(world, SHUT) == {"error": "ConnectionRefusedError"}
    assert any("L7 proxy" in problem for problem in world.json("status")["problems"])
    program.symlink_to(HAPROXY)
    wait_until(lambda: proxied(world, WEB) and proxied(world, SHUT), "HAProxy again")
    assert not set(haproxy(world)) & set(before)


def test_haproxy_goes_on_without_the_daemon_and_the_next_one_takes_it_over(world: World) -> None:
    before = haproxy(world)
    assert world.daemon
    with Client(world, WEB) as client:
        world.daemon.kill()
        world.daemon.wait()
        assert proxied(world, WEB)
        world.start()
        wait_until(lambda: shown(world) != [], "the daemon")
        world.stop()
        assert proxied(world, WEB)
        world.start()
        wait_until(lambda: client.answers.total() > A_SECOND // 2, "requests")
        world.write("web.yaml", service("web", WEB, {}, (SERVERS[1],)))
        wait_until(lambda: {ask(world, WEB).get("name") for _ in range(4)} == {SERVERS[1]}, "a change")
    assert not client.failed
    assert haproxy(world) == before
    world.write("web.yaml", service("web", WEB, {}))


def test_connections_of_any_protocol_with_the_clients_own_address(world: World) -> None:
    world.write("raw.yaml", service("raw", RAW, {"ip-protocol": "tcp", "flags": {"transparent": True}}))
    wait_until(lambda: any(row["service"] == "shop/raw" for row in shown(world)), "the proxy")
    wait_until(lambda: sees(world, RAW, POD), "transparent")
    assert {ask(world, RAW)["client_address"] for _ in range(4)} == {POD}
    (world.manifests / "raw.yaml").unlink()


def test_requests_are_logged_where_a_service_asks_for_it(world: World) -> None:
    world.write("web.yaml", service("web", WEB, {"flags": {"access-log": True}}))
    log = world.root / "access.log"

    def logged() -> bool:
        ask(world, WEB, "/a%22b")
        return log.exists() and "/a%22b" in log.read_text()

    wait_until(logged, "the log")
    line = json.loads(next(line for line in log.read_text().splitlines() if "/a%22b" in line))
    assert line["status"] == 200
    assert POD in json.dumps(line)
    world.write("web.yaml", service("web", WEB, {}))
