"""Run the scenarios on a lab that carries the sample application, and say what came of them."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lab import capture, controller, network, probe, process, runtime, state
from lab.cases import CASES, Case, Check, Row, judge
from lab.controller import WORKERS
from lab.probe import Answer
from lab.runtime import Pod, PodSpec
from lab.state import Lab
from lab.topology import LOCALHOST, LabError, Mode, Topology, title, titles
from netlink import netns
from netlink.family import Family, with_port

SAMPLE = Path(__file__).with_name("samples") / "yaobank.yaml"
NODE_PORT, INTERNET_PORT = 8080, 80
NODES = 3
SETTLE_SECONDS = 5.0

Outcome = tuple[str, str, bool]  # what was seen, what was expected, whether they agree

TWIN = PodSpec("twin", "node2", "yaobank", {"app": "twin"}, (80,))
TWIN_SECOND_PORT = 8080
THIRD = PodSpec("summary-3", "node1", "yaobank", {"app": "summary"}, (80,))


@dataclass(frozen=True, slots=True)
class World:
    """A lab with the sample deployed, seen in one IP family.

    It resolves the places of a case to namespaces and addresses.
    """

    lab: Lab
    family: Family
    pods: dict[str, Pod]
    services: dict[Family, dict[str, tuple[str, int]]]  # ClusterIP and port
    balancers: dict[Family, dict[str, tuple[str, int]]]  # the load balancer's address and port
    unrouted: dict[Family, int]  # the router's count of packets without a route, before the first case

    def of(self, family: Family) -> World:
        """Return the same lab seen in another family."""
        return replace(self, family=family)

    def namespace(self, place: str) -> str:
        """The network namespace of a host, the router or a pod."""
        if place == "router":
            return self.lab.plan.router
        return self.pods[place].netns if place in self.pods else self.lab.plan.host(place).namespace

    def address(self, place: str) -> str:
        """The address of a place: of a pod, or on eth0 of a host (`NODE.second` is its other one)."""
        host, _, second = place.partition(".")
        if second:
            return self.lab.plan.node(host).second(self.family)
        if place == "localhost":
            return LOCALHOST[self.family]
        there = self.pods[place] if place in self.pods else self.lab.plan.host(place)
        return there.address(self.family)

    def target(self, case: Case) -> tuple[str, int]:
        """Where the case's requests go."""
        kind, _, rest = case.way.partition("/")
        service, _, other_port = rest.partition(":")
        if kind == "service":
            return self.services[self.family][service]
        if kind == "lb":
            address, balanced = self.balancers[self.family][service]
            return address, int(other_port or balanced)
        if kind == "localhost":
            return self.address("localhost"), TWIN_SECOND_PORT
        if ":" in kind:
            place, _, port = kind.partition(":")
            return self.address(place), int(port)
        return self.address(case.servers[0]), self.port(case.servers[0])

    def port(self, place: str) -> int:
        """The port that a place serves on."""
        if place in self.pods:
            return self.pods[place].spec.ports[0]
        return INTERNET_PORT if place == "internet" else NODE_PORT

    def health_port(self, case: Case) -> int:
        """The healthCheckNodePort of the service that the case is about."""
        name = case.way.partition("/")[2]
        return next(
            int(service["spec"]["healthCheckNodePort"])
            for service in state.manifests(self.lab, "Service")
            if service["metadata"]["name"] == name
        )

    def seen(self, case: Case) -> list[str]:
        """The addresses a server may see. A pod sees its own node by whichever address faces it."""
        addresses = []
        for place in case.seen:
            addresses.append(self.address(place))
            if self.lab.plan.mode is Mode.BRIDGE and any(place == self._node(s) for s in case.servers):
                addresses.append(self.lab.plan.node(place).pod_gateway(self.family))
        return addresses

    def _node(self, server: str) -> str:
        """The node of a server that is a pod, else ""."""
        return self.pods[server].spec.node if server in self.pods else ""


def deploy(lab: Lab) -> World:
    """Run the sample's pods, the twin pod and the servers outside the cluster; wait for its services."""
    if len(lab.plan.nodes) < NODES or lab.plan.nodes[2].segment == lab.plan.nodes[0].segment:
        raise LabError(f"the demo needs {NODES} nodes of which node3 is across the router")
    pods = [applied.pod for applied in controller.apply(lab, SAMPLE)] + controller.run(lab, [TWIN])
    runtime.serve(lab, pods[-1], [TWIN_SECOND_PORT])
    for node in lab.plan.nodes:
        _serve_host(lab, node.name, NODE_PORT)
    _serve_host(lab, "internet", INTERNET_PORT)
    families = lab.plan.families
    services: dict[Family, dict[str, tuple[str, int]]] = {family: {} for family in families}
    balancers: dict[Family, dict[str, tuple[str, int]]] = {family: {} for family in families}
    for service in state.manifests(lab, "Service"):
        name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        for family, address in controller.cluster_addresses(service).items():
            services[family][name] = address, port
        for family, address in controller.balancer_addresses(service).items():
            balancers[family][name] = address, port
    # Wait only until the first that is late: the cases will say what is wrong, and sooner.
    all(
        _settle(partial(_answers, node.namespace, target))
        for node in lab.plan.nodes
        for family in families
        for target in services[family].values()
    )
    unrouted = {family: probe.unrouted(lab.plan.router, family) for family in families}
    return World(lab, families[0], {pod.spec.name: pod for pod in pods}, services, balancers, unrouted)


def run(world: World, cases: Sequence[Case] = CASES) -> list[Row]:
    """Run the cases for each family of the lab, several at once where they do not disturb each other.

    The rows are in the cases' order, family by family.
    """
    runs = [(family, case) for family in world.lab.plan.families for case in cases]
    together = [of for of in runs if not of[1].alone]
    leaks = [of for of in runs if of[1].check is Check.LEAK]  # they look at all of the run
    alone = [of for of in runs if of[1].alone and of not in leaks]

    def row(of: tuple[Family, Case]) -> Row:
        return run_case(world.of(of[0]), of[1])

    with capture.stamping(), ThreadPoolExecutor(WORKERS) as pool:
        rows = dict(zip(together, pool.map(row, together), strict=True))
        rows |= {of: row(of) for of in (*alone, *leaks)}
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
    namespace = world.namespace(case.source)
    timeout = probe.TIMEOUT_SECONDS if case.servers else probe.SILENCE_SECONDS
    if case.udp:
        return judge(case, [probe.datagram(namespace, address, port, timeout)], world.seen(case))
    return judge(case, probe.fetch(namespace, address, port, case.count, timeout), world.seen(case))


def _taken(world: World, case: Case) -> Outcome:
    """A second server on a port of the same pod, in a process of its own."""
    pod, port = world.pods[case.source], world.target(case)[1]
    expected = "Address already in use"
    try:
        pid_file = runtime.server_file(world.lab, pod, port).with_name(f"{pod.spec.name}@second.pid")
        runtime.serve_in(pod.netns, (pod.spec.name, pod.spec.node), [port], pid_file)
    except LabError as error:
        saw = expected if expected in str(error) else str(error)
        return saw, expected, saw == expected
    process.stop([pid_file])
    return "it was given the port", expected, False


def _outlive(world: World, case: Case) -> Outcome:
    """End the pod's processes one by one, then start them again: address and namespace stay."""
    pod = world.pods[case.servers[0]]
    ports = (pod.spec.ports[0], TWIN_SECOND_PORT)
    said = []
    for ended in ports:
        process.stop([runtime.server_file(world.lab, pod, ended)])
        result = probe.fetch(world.namespace(case.source), world.address(case.servers[0]), TWIN_SECOND_PORT)[
            0
        ]
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
        _settle(lambda: THIRD.name in _servers(world, case))
        outcome = _ask(world, case)
        controller.publish(world.lab, without=pod)
        gone = _settle(lambda: THIRD.name not in _servers(world, case))
    finally:
        controller.remove(world.lab, pod)
    saw, expected, passed = outcome
    return (saw if gone else f"{saw}, and traffic after its removal"), expected, passed and gone


def _health(world: World, case: Case) -> Outcome:
    """Ask every node as a load balancer does: 200 where endpoints are, else 503, and how many there are."""
    name, port = case.way.partition("/")[2], world.health_port(case)
    places = [world.pods[server].spec.node for server in case.servers]
    told, expected = [], []
    for node in world.lab.plan.nodes:
        address = node.address(world.family)
        code, body = netns.run(world.namespace(case.source), probe.status, address, port, "/healthz")
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
    leaked = probe.unrouted(world.namespace(case.source), world.family) - world.unrouted[world.family]
    return f"{leaked} packets leaked", "0 packets leaked", leaked == 0


def _path(world: World, case: Case) -> tuple[str, str, bool, tuple[str, ...]]:
    """Watch one connection at every place of the case; the way back must mirror the way there."""
    places = list(dict.fromkeys(hop.split()[0] for hop in case.hops))
    bridge_ports = {"lo", *(host.name for host in world.lab.plan.hosts if host.segment)}
    with capture.watch({place: world.namespace(place) for place in places}, bridge_ports) as hops:
        saw, expected, passed = _ask(world, case)
    there = [(p, world.address(s), world.address(d)) for p, s, d in (hop.split() for hop in case.hops)]
    mirrored = [(place, destination, source) for place, source, destination in reversed(there)]
    as_planned = [(hop.place, hop.source, hop.destination) for hop in hops] == there + mirrored
    saw = f"{saw}, {len(hops)} hops{'' if as_planned else ', others than planned'}"
    return saw, f"{expected}, {2 * len(there)} hops", passed and as_planned, tuple(map(str, hops))


CHECKS: dict[Check, Callable[[World, Case], Outcome]] = {
    Check.ASK: _ask,
    Check.TAKEN: _taken,
    Check.OUTLIVE: _outlive,
    Check.GROW: _grow,
    Check.LEAK: _leak,
    Check.HEALTH: _health,
}


def demo(plan: Topology, keep: bool, as_json: bool, root: Path = state.ROOT) -> int:
    """Make a lab, run every case on it, print the verdicts, take it down; 1 when any case failed.

    Progress goes to stderr, the table (or JSON) to stdout. With `keep` the lab stays.
    """
    clock = _Progress()
    with ExitStack() as undo:
        lab = network.up(plan, root)
        undo.callback(network.remove, plan.name, root)
        clock.say(f"{len(plan.nodes)} nodes up, {plan.mode.value} pods, {titles(plan.families)}")
        world = deploy(lab)
        clock.say(f"{len(world.pods)} pods and {len(world.services[world.family])} services up")
        rows = run(world)
        clock.say(f"{len(rows)} cases run")
        print(render_json(rows) if as_json else render(rows))
        failed = not all(row.passed for row in rows)
        if failed:
            _explain(lab, rows, keep)
        if keep:
            undo.pop_all()
            print(hints(world), file=sys.stderr)
    if not keep:
        clock.say("lab taken down")
    return 1 if failed else 0


def render(rows: Sequence[Row]) -> str:
    """Return the table of verdicts, then the paths, then the count."""
    lines = [("", "", "from", "to", "via", "address seen", "expected", "verdict")]
    lines += [
        (r.scenario, r.family, r.source, r.to, r.via, r.saw, r.expected, "ok" if r.passed else "FAILED")
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    for row in rows:
        if row.path:
            table += ["", f"The way from {row.source} to {row.to} by {row.via}, and back:"]
            table += [f"  {hop}" for hop in row.path]
    return "\n".join([*table, "", f"{sum(row.passed for row in rows)} of {len(rows)} as expected"])


def render_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps(
        [
            {
                "scenario": row.scenario,
                "family": row.family,
                "from": row.source,
                "to": row.to,
                "via": row.via,
                "saw": row.saw,
                "expected": row.expected,
                "verdict": "ok" if row.passed else "failed",
                "path": list(row.path),
            }
            for row in rows
        ],
        indent=2,
    )


def hints(world: World) -> str:
    """Return what to try in a lab that is kept, as commands that work as printed."""
    name = world.lab.plan.name
    exec_ = f"podwire lab exec --name {name}"
    seen = [world.of(family) for family in world.lab.plan.families]
    return "\n".join(
        [
            f"lab: {name} is kept. To try:",
            f"  podwire lab status --name {name}",
            *(f"  {exec_} customer -- curl -s {_url(*w.services[w.family]['summary'])}" for w in seen),
            *(f"  {exec_} client -- curl -s {_url(w.address('node2'), 30180)}" for w in seen),
            *(f"  {exec_} client -- curl -s {_url(*w.balancers[w.family]['front-local'])}" for w in seen),
            *(f"  {exec_} node1 -- nft list table {w.family.keyword} podwire" for w in seen),
            f"  {exec_} node1 -- podwire status --socket {world.lab.socket('node1')}",
            f"  podwire lab pod run --name {name} --node node3 --namespace yaobank"
            " --label app=summary --serve 80 summary-3",
            f"  podwire lab down --name {name}",
        ]
    )


def _url(address: str, port: int) -> str:
    """Return a URL that a shell takes as it is, brackets and all."""
    url = f"http://{with_port(address, port)}"
    return f"-g '{url}'" if ":" in address else url


class _Progress:
    """Lines on stderr with the seconds since the one before."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, what: str) -> None:
        now = time.monotonic()
        print(f"lab: {what} ({now - self._last:.1f} s)", file=sys.stderr, flush=True)
        self._last = now


def _explain(lab: Lab, rows: Iterable[Row], keep: bool) -> None:
    """Say on stderr what each failure was, and where the daemons' logs are: beyond the lab's life."""
    for row in rows:
        if not row.passed:
            what = f"{row.scenario} {row.family}: {row.source} to {row.to} by {row.via}"
            print(f"lab: {what}: expected {row.expected}, saw {row.saw or 'nothing'}", file=sys.stderr)
    logs = lab.root
    if not keep:
        logs = Path(tempfile.mkdtemp(prefix=f"podwire-lab-{lab.plan.name}-"))
        for node in lab.plan.nodes:
            shutil.copy(lab.log(node.name), logs / f"{node.name}.log")
    print(f"lab: the daemons' logs are in {logs}", file=sys.stderr)


def _serve_host(lab: Lab, name: str, port: int) -> None:
    pid_file = lab.root / "hosts" / f"{name}.pid"
    runtime.serve_in(lab.plan.host(name).namespace, (name, name), [port], pid_file)


def _settle(condition: Callable[[], bool]) -> bool:
    """Wait until the daemons have caught up with the manifests; False when they take too long."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def _answers(namespace: str, target: tuple[str, int]) -> bool:
    return isinstance(probe.fetch(namespace, *target)[0], Answer)


def _servers(world: World, case: Case) -> set[str]:
    """Who answers a few dozen requests: enough that one of three is missed once in ten million."""
    results = probe.fetch(world.namespace(case.source), *world.target(case), 40)
    return {result.server if isinstance(result, Answer) else "" for result in results}


def _via(world: World, case: Case) -> str:
    if case.check is Check.LEAK:
        return case.via
    if case.check is Check.HEALTH:
        return f"{case.way.partition('/')[2]} every node:{world.health_port(case)}/healthz"
    address, port = world.target(case)
    kind, _, rest = case.way.partition("/")
    service = rest.partition(":")[0]
    protocol = "/udp" if case.udp else ""
    place = f"{service} " if service else f"{kind.partition(':')[0]} " if ":" in kind else ""
    return f"{place}{with_port(address, port)}{protocol}"
