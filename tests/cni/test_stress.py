"""Endurance: a node under load with everything dying at random leaks nothing and gives no address twice."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from netlink import netns
from tests.cni.endurance import PATIENCE, TRY_AGAIN, Answer, Held, Pod, Runtime, Site
from tests.cni.world import stdin
from tests.node.world import NODES, build, ended

WORKERS = 8
ROUND = 100
ROUNDS_WITH_KILLS = 5
ROUNDS_IN_PEACE = 5
DAEMON_DEATHS = 2
"""Times that the daemon is killed in a round with kills; the time without it is the slow part."""
MEMORY_GROWTH = 8.0
"""MB that the daemon may have grown by after 300 cycles, when it is idle again: until then, what was
used waits for Python's collector."""
MANY = 250
TURNS = 3
MOST_FAILURES = 500
ALREADY_EXISTS = 101


def site_of(make: Callable[[], str], root: Path, cidr: str) -> Site:
    """Return a node with that podCIDR; its daemon does not run yet."""
    world = build(make, root)
    world.write("nodes.yaml", NODES.replace("10.244.1.0/24", cidr))
    site = Site(world, make)
    site.install()
    return site


@pytest.fixture
def site(namespaces: Callable[[], str], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A node with a running daemon; the parameter is its podCIDR."""
    found = site_of(namespaces, tmp_path, getattr(request, "param", "10.244.6.0/24"))
    with ended(found.world):
        found.world.start()
        yield found


@pytest.fixture
def empty(site: Site) -> Held:
    """What the node holds without pods, one having come and gone."""
    pod = Pod("first", site.make_namespace())
    for command in ("ADD", "DEL"):
        assert in_node(site, site.execute, command, pod).code == 0
    site.settle(0)
    return site.held()


def in_node(site: Site, work: Callable[..., Any], *args: Any, **config: Any) -> Any:
    return netns.run(site.world.node, work, *args, **config)


def at_once(site: Site, work: Callable[[Any], Any], items: list[Any], workers: int = WORKERS) -> list[Any]:
    """Work on items in threads that are in the node."""

    def here() -> list[Any]:
        with ThreadPoolExecutor(workers) as pool:  # its threads start in this thread's namespace
            return list(pool.map(work, items))

    found: list[Any] = in_node(site, here)
    return found


def play(runtime: Runtime, number: int, seed: str, deaths: int) -> None:
    """Let the workers do a round, kill and restart the daemon meanwhile, and collect what they forgot."""
    rng, site = random.Random(f"{seed}-daemon-{number}"), runtime.site
    first = number * ROUND
    edges = [first + ROUND * worker // WORKERS for worker in range(WORKERS + 1)]
    kills = sorted(rng.randrange(first + 5, first + ROUND - 20) for _ in range(deaths))
    with ThreadPoolExecutor(WORKERS) as pool:

        def submit() -> list[Future[None]]:
            parts = [range(*pair) for pair in itertools.pairwise(edges)]
            return [pool.submit(runtime.work, worker, part, seed) for worker, part in enumerate(parts)]

        futures = in_node(site, submit)
        for kill in kills:
            with runtime.progress:
                assert runtime.progress.wait_for(lambda k=kill: runtime.cycles >= k, PATIENCE)  # type: ignore[misc]
            assert site.world.stop(signal.SIGKILL) == -signal.SIGKILL
            site.world.start()
        wait(futures)
    for future in futures:
        future.result()
    in_node(site, runtime.collect_garbage)


def end_all(runtime: Runtime, rng: random.Random) -> None:
    """Delete every pod that is left."""
    at_once(runtime.site, lambda pod: runtime.delete(pod, rng), list(runtime.pods.values()))


@pytest.mark.parametrize("site", ["10.244.4.0/22"], indirect=True)
def test_a_thousand_pods_come_and_go_while_everything_dies(site: Site, empty: Held) -> None:
    """Binary, daemon and runtime are killed at random, and half way the node reboots: nothing is left."""
    seed = os.environ.get("PODWIRE_SEED") or str(time.time_ns())
    print(f"PODWIRE_SEED={seed}")
    runtime = Runtime(site)
    for number in range(ROUNDS_WITH_KILLS):
        play(runtime, number, seed, DAEMON_DEATHS)
        assert not runtime.problems
        site.assert_consistent(empty, set(runtime.pods))

    before = list(runtime.pods.values())
    assert site.world.stop() == 0
    site.reboot()
    runtime.lose_all()
    site.world.start()
    site.assert_consistent(empty, set())
    for pod in before:  # the runtime's clean-up after a reboot: of pods that are long gone
        assert in_node(site, site.execute, "DEL", pod).code == 0

    for number in range(ROUNDS_WITH_KILLS, ROUNDS_WITH_KILLS + ROUNDS_IN_PEACE):
        play(runtime, number, seed, 0)
        assert not runtime.problems
        site.assert_consistent(empty, set(runtime.pods))
        if number == ROUNDS_WITH_KILLS + 1:
            memory, files = site.memory(), site.open_files()
    end_all(runtime, random.Random(seed))
    assert not runtime.problems
    assert runtime.cycles == (ROUNDS_WITH_KILLS + ROUNDS_IN_PEACE) * ROUND
    assert runtime.added > runtime.cycles * 0.8
    assert runtime.killed > runtime.cycles * 0.05
    site.settle(0)
    assert site.held() == empty
    site.wait_until(lambda: site.memory() < memory + MEMORY_GROWTH, "the daemon's memory is what it was")
    assert len(site.open_files()) <= len(files) + WORKERS
    assert not [file for file in site.open_files() if file.startswith("net:")]
    logs = [(site.world.root / f"log{n}").read_text() for n in range(1, site.world.starts + 1)]
    assert not [log for log in logs if "Traceback" in log or "internal error" in log]


def test_250_pods_on_a_node_are_attached_reachable_and_deleted(site: Site, empty: Held) -> None:
    pods = [Pod(f"c{number}", site.make_namespace()) for number in range(MANY)]
    answers = at_once(site, lambda pod: site.execute("ADD", pod), pods)
    assert {answer.code for answer in answers} == {0}, [a for a in answers if a.code][:3]
    addresses = [answer.addresses[0] for answer in answers]
    assert len(set(addresses)) == MANY
    site.assert_consistent(empty, {pod.container for pod in pods})
    for at in range(0, MANY, 25):
        there = addresses[at]
        assert in_node(site, reach, there) == "refused"  # by the pod's kernel, where nobody listens
        assert netns.run(pods[at - 1].namespace, reach, there) == "refused"
    assert {answer.code for answer in at_once(site, lambda pod: site.execute("DEL", pod), pods)} == {0}
    site.settle(0)
    assert site.held() == empty


def reach(address: str) -> str:
    """Connect to a port; return what came of it."""
    try:
        socket.create_connection((address, 9), 2).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return str(error)
    return "connected"


def test_32_adds_at_once_get_32_addresses_through_the_binary(site: Site, empty: Held) -> None:
    pods = [Pod(f"c{number}", site.make_namespace()) for number in range(32)]
    for command in ("ADD", "DEL"):
        answers = together(site, [(command, pod, {}) for pod in pods])
        assert {answer.code for answer in answers} == {0}, answers
        if command == "ADD":
            assert len({answer.addresses for answer in answers}) == 32
            site.assert_consistent(empty, {pod.container for pod in pods})
    site.settle(0)
    assert site.held() == empty


def together(site: Site, commands: list[tuple[str, Pod, dict[str, Any]]]) -> list[Answer]:
    """Start the binaries, give each its configuration when all are there, and return their answers."""

    def here() -> list[Any]:
        return [site.start(command, pod.container, pod.namespace) for command, pod, _ in commands]

    processes = in_node(site, here)
    with ThreadPoolExecutor(len(commands)) as pool:
        outputs = list(
            pool.map(
                lambda process, command: process.communicate(stdin(**command[2]), PATIENCE),
                processes,
                commands,
            )
        )
    return [Answer.of(process, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


CONFIGS: dict[str, dict[str, Any]] = {"GC": {"cni.dev/valid-attachments": []}}
LEFT: dict[tuple[str, str], tuple[int, ...]] = {
    ("ADD", "ADD"): (1,),
    ("DEL", "DEL"): (0,),
    ("ADD", "DEL"): (0, 1),
    ("GC", "ADD"): (0, 1),
}
"""How many attachments may be left when both commands have ended."""


@pytest.mark.parametrize("daemon", ["with", "without"])
def test_two_commands_for_a_container_at_once_have_one_outcome(site: Site, empty: Held, daemon: str) -> None:
    """Each ends, each has an answer that some order of the two explains, and ledger and kernel agree."""
    if daemon == "without":
        assert site.world.stop() == 0
    pod = Pod("c1", site.make_namespace())
    for pair in LEFT:
        for attached in (False, True, False, True):
            if attached:
                assert in_node(site, site.execute, "ADD", pod).code == 0
            answers = together(site, [(command, pod, CONFIGS.get(command, {})) for command in pair])
            fight = f"{pair}, attached before: {attached}: {answers}"
            site.wait_until(
                lambda: not site.rows("SELECT 1 FROM attachment WHERE state != 'attached'"), fight
            )
            left = site.rows("SELECT count(*) FROM attachment")[0][0]
            adds = [a for a, command in zip(answers, pair, strict=True) if command == "ADD"]
            assert {a.code for a, command in zip(answers, pair, strict=True) if command != "ADD"} <= {0}, (
                fight
            )
            assert {a.error for a in adds} <= {0, ALREADY_EXISTS}, fight
            assert left in LEFT[pair], fight
            if len(adds) == 2:
                assert sum(a.code == 0 for a in adds) == 1 - attached, fight
            elif adds and adds[0].code:
                assert attached, fight
                assert left == 0, fight
            site.assert_consistent(empty, {"c1"} if left else set())
            assert in_node(site, site.execute, "DEL", pod).code == 0
            site.settle(0)
    assert site.held() == empty


@pytest.mark.parametrize("site", ["10.244.5.0/30"], indirect=True)
def test_eight_pods_take_turns_with_a_single_address(site: Site) -> None:
    """Each of them gets it three times, and never two at once; here a freed address need not rest."""
    config = site.world.root / "ipam.yaml"
    config.write_text("quarantine: 0s\n")
    site.world.stop()
    site.world.options = ("--ipam-config", str(config))
    site.world.start()
    turn = threading.Condition()
    holder: list[str] = []

    def work(pod: Pod) -> int:
        failures = 0
        for _ in range(TURNS):
            while (answer := site.execute("ADD", pod)).code:
                assert answer.error == TRY_AGAIN, answer
                failures += 1
                assert failures < MOST_FAILURES
                with turn:
                    turn.wait(0.1)  # for somebody's DEL
            with turn:
                assert not holder
                holder.append(pod.container)
                holder.clear()  # the address may be another's from the moment that DEL begins
            assert site.execute("DEL", pod).code == 0
            with turn:
                turn.notify_all()
        return failures

    pods = [Pod(f"c{number}", site.make_namespace()) for number in range(WORKERS)]
    at_once(site, work, pods)
    site.settle(0)
