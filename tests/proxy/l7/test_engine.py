"""HAProxy, started, changed and reloaded by the engine, with real traffic."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netlink import netns
from proxy.l7.engine import Engine
from proxy.l7.model import Server
from proxy.l7.policy import Match, PathRule, Policy, Protocol, Retries, Tls
from proxy.l7.render import Settings
from tests.proxy.l7.traffic import World, backend, bring, endpoint, route, world

A, B, C = endpoint(1), endpoint(2), endpoint(3)
TCP = Policy(protocol=Protocol.TCP)


@pytest.fixture(scope="module")
def node(namespaces: Callable[[], str]) -> Iterator[World]:
    with world(namespaces) as found:
        for number in range(1, 8):
            found.endpoints.serve(endpoint(number))
        yield found


@pytest.fixture(scope="module")
def engine(node: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One HAProxy for the tests of this module, as long as none of them ends it."""
    found = Engine(Settings(tmp_path_factory.mktemp("l7"), threads=2, max_connections=2000))
    yield found
    found.stop()


def test_two_endpoints_alternate_exactly_also_when_one_is_replaced_and_after_a_reload(
    node: World, engine: Engine
) -> None:
    bring(engine, node, backend("one", 1, (A, B)))
    reloads = engine.reloads
    with node.client(route(1)) as client:
        for servers in ((A, B), (A, C), (B, C), (A, B)):
            bring(engine, node, backend("one", 1, servers))
            got = [client.get().endpoint for _ in range(20)]
            assert sorted(set(got)) == [s.name for s in servers]
            assert all(before != after for before, after in itertools.pairwise(got)), got
    assert engine.reloads == reloads
    bring(engine, node, backend("one", 1, (A, B)), backend("two", 2, (C,)))
    got = [node.get(route(1)).endpoint for _ in range(20)]
    assert all(before != after for before, after in itertools.pairwise(got)), got
    assert engine.reloads == reloads + 1


class Load:
    """Requests without a pause, on one connection or on one for each; what failed is in `wrong`."""

    def __init__(self, node: World, number: int, keep: bool) -> None:
        self._node, self._number, self._keep = node, number, keep
        self._stopped = False
        self.done = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped and not self.wrong:
            try:
                with self._node.client(route(self._number)) as client:
                    while not self._stopped:
                        answer = client.get()
                        if answer.status != 200:
                            self.wrong.append(f"{answer.status}: {answer.body!r}")
                        self.done += 1
                        if not self._keep or answer.headers.get("connection") == "close":
                            break
            except Exception as error:
                self.wrong.append(repr(error))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that other threads or processes do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to be"
        threading.Event().wait(0.002)


def test_endpoints_change_200_times_under_load_without_a_failed_request_or_a_reload(
    node: World, engine: Engine
) -> None:
    others = tuple(endpoint(n) for n in range(2, 8))
    bring(engine, node, backend("one", 1, (A, *others)))
    reloads = engine.reloads
    with Load(node, 1, keep=True) as kept, Load(node, 1, keep=False) as single:
        for change in range(200):
            some = others[change % 6 :] if change % 2 else others[: change % 5]
            bring(engine, node, backend("one", 1, (A, *some)))
            before = kept.done + single.done
            until(lambda b=before: kept.done + single.done >= b + 3 or bool(kept.wrong or single.wrong))
    assert not kept.wrong + single.wrong
    assert kept.done > 50 and single.done > 50
    assert engine.reloads == reloads
    bring(engine, node, backend("one", 1, (A,)))
    assert {line.split()[3] for line in engine.ask("show servers state one").splitlines()[2:] if line} == {
        A.name
    }


REFUSING, UNREACHABLE = endpoint(99), Server("10.8.66.1", 8080)
# Of several dead ones HAProxy now and then takes two by turns, and three attempts more are not enough.
PATIENT = Policy(retries=Retries(attempts=8))


@pytest.mark.parametrize(
    ("dead", "policy"),
    [((REFUSING,), Policy()), ((UNREACHABLE,), Policy()), ((REFUSING, UNREACHABLE), PATIENT)],
    ids=["refusing", "unreachable", "both"],
)
def test_an_endpoint_that_is_dead_costs_no_request(
    node: World, engine: Engine, dead: tuple[Server, ...], policy: Policy
) -> None:
    bring(engine, node, backend("one", 1, (A, *dead), policy))
    with node.client(route(1)) as client:
        begun = time.monotonic()
        for _ in range(30):
            answer = client.get()
            assert (answer.status, answer.endpoint) == (200, A.name)
        assert time.monotonic() - begun < 5
        assert client.get(method="POST", body=b"once").status == 200


def test_a_reload_drops_neither_open_connections_nor_new_ones(node: World, engine: Engine) -> None:
    name = node.endpoints.echo(Server("10.8.0.50", 9000))
    tcp = backend("tcp", 1, (Server("10.8.0.50", 9000),), TCP)
    bring(engine, node, backend("one", 1, (A, B)), tcp)
    with contextlib.closing(node.connect(route(1, TCP))) as endless, node.client(route(1)) as idle:
        assert endless.recv(100) == name.encode() + b"\n"
        assert idle.get().status == 200
        with Load(node, 1, keep=True) as kept, Load(node, 1, keep=False) as single:
            for number in range(2, 6):  # the service of the endless connection goes with the first
                bring(engine, node, backend("one", 1, (A, B)), backend("more", number, (B,)))
                assert node.get(route(number)).status == 200
                before = kept.done + single.done
                until(lambda b=before: kept.done + single.done > b + 10 or bool(kept.wrong or single.wrong))
            reloads = engine.reloads
            for more in ("a", "b", "c"):
                bring(engine, node, backend("one", 1, (A, B)), backend(more, 9, (B,)))
            assert engine.reloads == reloads + 3
        assert not kept.wrong + single.wrong
        assert idle.get().status == 200, "a connection without a request was closed"
        endless.sendall(b"still there?")
        assert endless.recv(100) == b"still there?"
        with pytest.raises(OSError), contextlib.closing(node.connect(route(1, TCP))) as refused:
            assert refused.recv(100) == b""
            raise ConnectionResetError


def test_routes_change_without_a_reload_and_those_of_nobody_are_answered_503(
    node: World, engine: Engine
) -> None:
    one = backend("one", 1, (A,))
    bring(engine, node, one)
    reloads = engine.reloads
    assert node.get(route(7)).status == 503
    node_port = route(1)._replace(address="", port=31000)
    for routes in ((route(7),), (route(1), node_port), tuple(route(n) for n in range(1, 500)), (route(1),)):
        with_routes = backend("one", 1, (A,))
        with_routes = type(one)(one.name, one.service, one.family, one.policy, routes, one.servers)
        bring(engine, node, with_routes)
        for number in (1, 7, 499):
            assert node.get(route(number)).status == (200 if route(number) in routes else 503)
        asked = route(9)._replace(port=31000)
        assert node.get(asked).status == (200 if node_port in routes else 503)
    assert engine.reloads == reloads


def test_an_endpoint_that_is_gone_keeps_its_open_connections_and_may_come_back(
    node: World, engine: Engine
) -> None:
    here, there = Server("10.8.0.51", 9000), Server("10.8.0.52", 9000)
    names = [node.endpoints.echo(server) for server in (here, there)]

    def known() -> set[str]:
        lines = engine.ask("show servers state tcp").splitlines()[2:]
        return {line.split()[3] for line in lines if line}

    bring(engine, node, backend("tcp", 1, (here,), TCP))
    reloads = engine.reloads
    with contextlib.closing(node.connect(route(1, TCP))) as old:
        assert old.recv(100).decode().strip() == names[0]
        bring(engine, node, backend("tcp", 1, (there,), TCP))
        assert known() == {*names}
        with contextlib.closing(node.connect(route(1, TCP))) as new:
            assert new.recv(100).decode().strip() == names[1]
        bring(engine, node, backend("tcp", 1, (here,), TCP))
        with contextlib.closing(node.connect(route(1, TCP))) as new:
            assert new.recv(100).decode().strip() == names[0]
        bring(engine, node, backend("tcp", 1, (there,), TCP))
        old.sendall(b"open?")
        assert old.recv(100) == b"open?"
    until(lambda: engine.settle() or known() == {names[1]})  # type: ignore[func-returns-value]
    assert engine.reloads == reloads


def test_a_service_that_haproxy_refuses_is_left_out_and_the_others_are_served(
    node: World, engine: Engine
) -> None:
    without_file = backend("tls", 3, (B,), Policy(tls=Tls(ca="none-of-this-name.pem")))
    regex = Policy(paths=(PathRule(Match.REGEX, "(unbalanced", deny=404),))
    served = bring(engine, node, backend("one", 1, (A,)), without_file, backend("regex", 4, (B,), regex))
    assert served == {"one"}
    assert node.get(route(1)).endpoint == A.name
    told = sorted(engine.problems)
    assert len(told) == 2
    assert told[0].startswith("test/regex: HAProxy refuses what it asks for:") and "(unbalanced" in told[0]
    assert (
        told[1].startswith("test/tls: HAProxy refuses what it asks for:") and "none-of-this-name" in told[1]
    )
    reloads = engine.reloads
    assert bring(engine, node, backend("one", 1, (B,)), without_file) == {"one"}
    assert node.get(route(1)).endpoint == B.name
    assert (len(engine.problems), engine.reloads) == (1, reloads)
    bring(engine, node, backend("one", 1, (B,)))
    assert engine.problems == ()


def test_who_is_refused_is_found_also_when_haproxy_does_not_say(
    node: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine._write

    def silent(backends: dict[str, object]) -> tuple[str, ...]:
        return ("something is wrong",) if real(backends) else ()  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_write", silent)
    bad = Policy(tls=Tls(ca="none-of-this-name.pem"))
    fine = [backend(f"fine{n}", n, (A,)) for n in range(1, 8)]
    served = bring(engine, node, *fine, backend("bad", 8, (A,), bad))
    assert served == {b.name for b in fine}
    assert engine.problems == ("test/bad: HAProxy refuses what it asks for: something is wrong",)


def test_a_worker_that_dies_is_noticed_at_once_and_another_is_started(node: World, engine: Engine) -> None:
    one = backend("one", 1, (A,))
    bring(engine, node, one)
    noticed = threading.Event()
    engine.on_end(noticed.set)
    starts, pid = engine.starts, _worker(engine)
    _kill(pid)
    begun = time.monotonic()
    assert noticed.wait(5)
    assert time.monotonic() - begun < 0.5
    until(lambda: not engine.alive)
    assert bring(engine, node, one) == {"one"}
    assert node.get(route(1)).status == 200
    assert engine.starts == starts + 1


def test_a_master_that_is_killed_leaves_nobody_at_the_port(node: World, engine: Engine) -> None:
    one = backend("one", 1, (A,))
    bring(engine, node, one)
    worker = _worker(engine)
    assert engine._process
    _kill(engine._process.pid)
    until(lambda: not engine.alive)
    assert bring(engine, node, one) == {"one"}
    assert not _runs(worker)
    assert node.get(route(1)).status == 200


def test_another_process_goes_on_with_the_haproxy_that_runs(
    node: World, engine: Engine, tmp_path: Path
) -> None:
    engine.stop()
    first = Engine(Settings(tmp_path, threads=1, max_connections=100))
    second = Engine(first.settings)
    assert not second.adopt()
    try:
        bring(first, node, backend("one", 1, (A, B)), backend("two", 2, (C,)))
        bring(first, node, backend("one", 1, (A, C)), backend("two", 2, (C,)))
        first.close()
        with node.client(route(1)) as client:
            assert client.get().status == 200
            assert second.adopt()
            ended = threading.Event()
            second.on_end(ended.set)
            bring(second, node, backend("one", 1, (B,)), backend("two", 2, (C,)))
            assert (second.starts, second.reloads) == (0, 0)
            assert client.get().endpoint == B.name
            assert sum("one" in line for line in second.ask("show servers state").splitlines()) == 1
            second.close()
            third = Engine(first.settings)
            assert third.adopt()
            bring(third, node, backend("one", 1, (B,)), backend("three", 3, (C,)))
            assert (third.starts, third.reloads) == (0, 1)
            assert node.get(route(3)).endpoint == C.name
            assert not ended.is_set()
    finally:
        Engine(first.settings).stop()
        first.close()
        second.close()
    assert not first.settings.master_socket.exists()


def test_haproxy_has_its_own_user_session_and_few_rights(node: World, engine: Engine) -> None:
    bring(engine, node, backend("one", 1, (A,)))
    worker = Path(f"/proc/{_worker(engine)}")
    status = dict(line.split(":\t", 1) for line in (worker / "status").read_text().splitlines())
    assert status["Uid"].split() == ["61000"] * 4
    assert status["Gid"].split() == ["61000"] * 4
    assert status["CapEff"].strip() == status["CapPrm"].strip() == "0" * 16
    assert int(status["CapBnd"], 16).bit_count() == 6
    assert (worker / "root").readlink() == engine.settings.jail
    limits = (worker / "limits").read_text()
    assert "Max core file size        0                    0" in limits
    assert engine._process
    master = Path(f"/proc/{engine._process.pid}/stat").read_text().split()
    assert master[0] == master[5], "the master is not the leader of a session"
    assert engine.settings.worker_socket.stat().st_mode & 0o777 == 0o600
    assert engine.settings.master_socket.stat().st_mode & 0o777 == 0o600


def test_without_haproxy_there_is_a_sentence(node: World, tmp_path: Path) -> None:
    found = Engine(Settings(tmp_path, program="no-such-program"))
    with pytest.raises(OSError, match="no-such-program"):
        bring(found, node, backend("one", 1, (A,)))
    assert not found.alive


def test_a_port_that_is_taken_is_a_sentence(node: World, tmp_path: Path) -> None:
    from proxy.l7.engine import EngineError

    taken = netns.run(node.node, socket.create_server, ("169.254.112.1", 10077))
    found = Engine(Settings(tmp_path, port=10077, max_connections=100))
    with contextlib.closing(taken), pytest.raises(EngineError, match=r"169\.254\.112\.1:10077"):
        bring(found, node, backend("one", 1, (A,)))
    assert not found.alive


def test_a_thousand_services_are_brought_in(node: World, engine: Engine) -> None:
    many = [backend(f"default_service-{n}_http_http4", n, (A, B, C)) for n in range(1, 1001)]
    begun = time.monotonic()
    assert len(bring(engine, node, *many)) == 1000
    took = time.monotonic() - begun
    assert node.get(route(1000)).status == 200
    pages = int(Path(f"/proc/{_worker(engine)}/statm").read_text().split()[1])
    print(f"1,000 services: {took:.2f} s, {pages * 4096 / 1e6:.0f} MB")
    begun = time.monotonic()
    bring(engine, node, *many[:-1], backend(many[-1].name, 1000, (A,)))
    print(f"a change among them: {time.monotonic() - begun:.4f} s")
    bring(engine, node)


def _worker(engine: Engine) -> int:
    answer = engine.ask("show info")
    return int(next(line for line in answer.splitlines() if line.startswith("Pid: ")).partition(" ")[2])


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def _kill(pid: int) -> None:
    import os
    import signal

    os.kill(pid, signal.SIGKILL)
