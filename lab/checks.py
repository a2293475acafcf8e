"""Run the scenarios' cases on a lab that carries the sample application."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

from lab import capture, controller, probe, process, runtime
from lab.capture import Hop
from lab.cases import CASES, Case, Check, Row, judge, possible
from lab.controller import WORKERS
from lab.probe import Answer
from lab.runtime import PodSpec
from lab.topology import LabError, title
from lab.world import TWIN_SECOND_PORT, World
from netlink import netns
from netlink.family import Family, with_port

Outcome = tuple[str, str, bool]  # what was seen, what was expected, whether they agree

THIRD = PodSpec("summary-3", "node1", "yaobank", {"app": "summary"}, (80,))


def run(world: World, cases: Sequence[Case] = CASES) -> list[Row]:
    """Run the cases that the lab can have for each of its families, several at once where they do not disturb
    each other.

    The rows are in the cases' order, family by family.
    """
    families = world.lab.plan.families
    runs = [(family, case) for family in families for case in cases if possible(case, world.lab.plan, family)]
    together = [of for of in runs if not of[1].alone]
    last = [of for of in runs if of[1].last]
    alone = [of for of in runs if of[1].alone and of not in last]

    def row(of: tuple[Family, Case]) -> Row:
        return run_case(world.of(of[0]), of[1])

    with capture.stamping(), ThreadPoolExecutor(WORKERS) as pool:
        rows = dict(zip(together, pool.map(row, together), strict=True))
        rows |= {of: row(of) for of in (*alone, *last)}
    return [rows[of] for of in runs]


def run_case(world: World, case: Case) -> Row:
    """Run one case. What goes wrong inside it is its outcome."""
    path: tuple[str, ...] = ()
    try:
        if case.check is Check.PATH:
            saw, expected, passed, path = _path(world, case)
        else:
            saw, expected, passed = CHECKS[case.check](world, case)
    except (LabError, OSError) as error:
        saw, expected, passed = str(error), " ".join(case.seen), False
    to = " ".join(case.servers) or "nobody"
    family = title(world.family)
    return Row(case.scenario, family, case.source, to, _via(world, case), saw, expected, passed, path)


def _ask(world: World, case: Case) -> Outcome:
    address, port = world.target(case)
    timeout = probe.TIMEOUT_SECONDS if case.servers else probe.SILENCE_SECONDS
    timeout *= world.patience
    if case.udp:
        return judge(case, [world.at(case.source, probe.datagram, address, port, timeout)], world.seen(case))
    results = world.at(case.source, probe.fetch, address, port, case.count, timeout)
    return judge(case, results, world.seen(case))


def _taken(world: World, case: Case) -> Outcome:
    """A second server on a port of the same pod, in a process of its own."""
    pod, port = world.pods[case.source], world.target(case)[1]
    expected = "Address already in use"
    try:
        name = f"{pod.spec.name}@second{world.family.value}.pid"  # both families' cases may run at once
        pid_file = runtime.server_file(world.lab, pod, port).with_name(name)
        world.at(case.source, runtime.serve_in, (pod.spec.name, pod.spec.node), [port], pid_file)
    except LabError as error:
        saw = expected if expected in str(error) else str(error)
        return saw, expected, saw == expected
    world.lab.call(pod.spec.node, process.stop, [pid_file])
    return "it was given the port", expected, False


def _outlive(world: World, case: Case) -> Outcome:
    """End the pod's processes one by one, then start them again: address and namespace stay."""
    pod = world.pods[case.servers[0]]
    ports = (pod.spec.ports[0], TWIN_SECOND_PORT)
    said = []
    for ended in ports:
        world.lab.call(pod.spec.node, process.stop, [runtime.server_file(world.lab, pod, ended)])
        (result,) = world.at(case.source, probe.fetch, world.address(case.servers[0]), TWIN_SECOND_PORT)
        said.append(result.reason if isinstance(result, probe.Failure) else "served")
    for port in ports:
        runtime.serve(world.lab, pod, [port])
    saw, _, passed = _ask(world, case)
    saw = f"one ended: {said[0]}, both: {said[1]}, again: {saw}"
    expected = f"one ended: served, both: refused, again: {world.seen(case)[0]}"
    return saw, expected, passed and said == ["served", "refused"]


def _grow(world: World, case: Case) -> Outcome:
    """Add the third endpoint, ask, and take it out of the service again before it goes."""
    (pod,) = controller.run(world.lab, [THIRD])
    try:
        world.settle(lambda: THIRD.name in _servers(world, case))
        outcome = _ask(world, case)
        controller.publish(world.lab, without=pod)
        gone = world.settle(lambda: THIRD.name not in _servers(world, case))
    finally:
        controller.remove(world.lab, pod)
    saw, expected, passed = outcome
    return (saw if gone else f"{saw}, and traffic after its removal"), expected, passed and gone


def _turns(world: World, case: Case) -> Outcome:
    """Ask as often as the case says: no server answers twice in a row, and each heard of the client."""
    world.settle(lambda: _forwarded(world, case) is not None)
    results = world.at(case.source, probe.fetch, *world.target(case), case.count)
    saw, _, passed = judge(replace(case, count=1), results, world.seen(case))
    answers = [result for result in results if isinstance(result, Answer)]
    turns = all(one.server != next_.server for one, next_ in pairwise(answers))
    clients = sorted({answer.forwarded_for for answer in answers})
    said = f"{saw} for {' '.join(clients) or 'nobody'}, {'in turns' if turns else 'not in turns'}"
    own = world.faces(case.source, case.servers[0], translated=False)
    expected = f"{' or '.join(world.seen(case))} for {own[0]}, in turns"
    return said, expected, passed and turns and set(clients) <= set(own)


def _retried(world: World, case: Case) -> Outcome:
    """End one of the servers, without a word to anybody, and ask: no request fails."""
    *others, ended = case.servers
    pod = world.pods[ended]
    world.settle(lambda: _forwarded(world, case) is not None)
    world.lab.call(pod.spec.node, process.stop, [runtime.server_file(world.lab, pod, pod.spec.ports[0])])
    try:
        results = world.at(case.source, probe.fetch, *world.target(case), case.count)
    finally:
        runtime.serve(world.lab, pod, pod.spec.ports)
    one = replace(case, servers=tuple(others), count=1)
    saw, expected, passed = judge(one, results, world.seen(one))
    return (
        f"{saw}, {len(results)} times",
        f"{expected}, {case.count} times",
        passed and len(results) == case.count,
    )


def _forwarded(world: World, case: Case) -> str | None:
    """Return whose request a server was told that it was; None when nobody told it."""
    (result,) = world.at(case.source, probe.fetch, *world.target(case))
    return (isinstance(result, Answer) and result.forwarded_for) or None


def _health(world: World, case: Case) -> Outcome:
    """Ask every node as a load balancer does: 200 where endpoints are, else 503, and how many there are."""
    name, port = case.way.partition("/")[2], world.health_port(case)
    places = [world.pods[server].spec.node for server in case.servers]
    told, expected = [], []
    for node in world.lab.plan.nodes:
        address = node.address(world.family)
        code, body = world.at(case.source, netns.run, probe.status, address, port, "/healthz")
        told.append(f"{node.name} {code} ({health_count(body, name)})")
        here = places.count(node.name)
        expected.append(f"{node.name} {200 if here else 503} ({here})")
    return ", ".join(told), ", ".join(expected), told == expected


def health_count(body: bytes, service: str) -> int | None:
    """Return how many endpoints a node's answer gives to a service; None when it is not about that one."""
    try:
        fields = json.loads(body)
        return int(fields["localEndpoints"]) if fields["service"]["name"] == service else None
    except (ValueError, KeyError, TypeError):
        return None


def _leak(world: World, case: Case) -> Outcome:
    leaked = world.at(case.source, probe.unrouted, world.family) - world.unrouted[world.family]
    return f"{leaked} packets leaked", "0 packets leaked", leaked == 0


def _bare(world: World, case: Case) -> Outcome:
    seen = world.lab.call("router", capture.bare, world.lab.plan, world.family)
    return f"{seen} with a pod's address", "0 with a pod's address", seen == 0


def _path(world: World, case: Case) -> tuple[str, str, bool, tuple[str, ...]]:
    """Watch one connection at every place of the case; the way back must mirror the way there."""
    places = list(dict.fromkeys(hop.split()[0] for hop in case.hops))
    bridge_ports = ("lo", *(host.name for host in world.lab.plan.hosts if host.segment))
    with capture.watch(places, world.at, bridge_ports) as hops:
        saw, expected, passed = _ask(world, case)
    planned = (hop.split() for hop in case.hops)
    there = [(place, world.faces(s, d)[0], world.faces(d, s)[0]) for place, s, d in planned]
    mirrored = [(place, destination, source) for place, source, destination in reversed(there)]
    if (
        world.lab.apart
    ):  # each machine has a clock of its own: what counts is what each place saw, in its order
        hops = _in_order(hops, [place for place, _, _ in there + mirrored])
    as_planned = [(hop.place, hop.source, hop.destination) for hop in hops] == there + mirrored
    saw = f"{saw}, {len(hops)} hops{'' if as_planned else ', others than planned'}"
    return saw, f"{expected}, {2 * len(there)} hops", passed and as_planned, tuple(map(str, hops))


def _in_order(hops: list[Hop], places: Sequence[str]) -> list[Hop]:
    """Return what places saw in this order of places; what nobody planned comes last."""
    left = list(hops)
    found = []
    for place in places:
        hop = next((hop for hop in left if hop.place == place), None)
        if hop is not None:
            left.remove(hop)
            found.append(hop)
    return found + left


CHECKS: dict[Check, Callable[[World, Case], Outcome]] = {
    Check.ASK: _ask,
    Check.TAKEN: _taken,
    Check.OUTLIVE: _outlive,
    Check.GROW: _grow,
    Check.LEAK: _leak,
    Check.BARE: _bare,
    Check.HEALTH: _health,
    Check.TURNS: _turns,
    Check.RETRIED: _retried,
}


def _servers(world: World, case: Case) -> set[str]:
    """Who answers a few dozen requests: enough that one of three is missed once in ten million."""
    results = world.at(case.source, probe.fetch, *world.target(case), 40)
    return {result.server if isinstance(result, Answer) else "" for result in results}


def _via(world: World, case: Case) -> str:
    if case.last:
        return case.via
    if case.check is Check.HEALTH:
        return f"{case.way.partition('/')[2]} every node:{world.health_port(case)}/healthz"
    address, port = world.target(case)
    kind, _, rest = case.way.partition("/")
    service = rest.partition(":")[0]
    protocol = "/udp" if case.udp else ""
    place = f"{service} " if service else f"{kind.partition(':')[0]} " if ":" in kind else ""
    return f"{place}{with_port(address, port)}{protocol}"
