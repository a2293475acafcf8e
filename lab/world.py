"""A lab with the sample application, and where its places are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lab import capture, controller, probe, runtime, state
from lab.cases import BY_PROXY, Case
from lab.probe import Answer
from lab.runtime import Pod, PodSpec
from lab.state import Lab
from lab.topology import LOCALHOST, Backend, LabError, Mode
from netlink.family import Family

SAMPLE = Path(__file__).with_name("samples") / "yaobank.yaml"

NODE_PORT, INTERNET_PORT = 8080, 80
NODES = 3
SETTLE_SECONDS = 5.0

T = TypeVar("T")

TWIN = PodSpec("twin", "node2", "yaobank", {"app": "twin"}, (80,))
TWIN_SECOND_PORT = 8080


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

    def at(self, place: str, function: Callable[..., T], *args: Any) -> T:
        """Call a function on a place's machine, with the place's namespace and these arguments."""
        host = self.pods[place].spec.node if place in self.pods else place
        return self.lab.call(host, function, self.namespace(place), *args)

    @property
    def patience(self) -> int:
        """How much longer than in namespaces things may take."""
        return self.lab.plan.driver.patience

    def settle(self, condition: Callable[[], bool]) -> bool:
        """Wait until the daemons have caught up with the manifests; False when they take too long."""
        return settle(condition, self.patience)

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
        """The addresses a server may see."""
        found: list[str] = []
        for place in case.seen:
            for server in case.servers or ("",):
                translated = place != case.source or bool(case.way)
                # The L7 proxy connects as any program of the node does.
                found += self.faces(place, server, translated=translated and case.check not in BY_PROXY)
        return list(dict.fromkeys(found))

    def faces(self, place: str, other: str, *, translated: bool = True) -> tuple[str, ...]:
        """The addresses by which one place may be seen at another; of most there is one.

        What a node translates for a pod across a tunnel is from the address of the node's pod range. A pod
        sees its own node by whichever address faces it.
        """
        plan = self.lab.plan
        if other not in self.pods or place not in (node.name for node in plan.nodes):
            return (self.address(place),)
        here, there = plan.node(place), plan.node(self.pods[other].spec.node)
        ranged = here.range_address(self.family)
        own = (self.address(place),) if self.family in plan.shared else ()
        if here == there:
            bridge = (here.pod_gateway(self.family),) if plan.mode is Mode.BRIDGE else ()
            return (*own, *bridge, ranged)
        if translated and plan.tunnelled(here, there, self.family):
            return (ranged,)
        return own or (ranged,)


def deploy(lab: Lab) -> World:
    """Run the sample's pods, the twin pod and the servers outside the cluster; wait for its services."""
    if len(lab.plan.nodes) < NODES or lab.plan.nodes[2].segment == lab.plan.nodes[0].segment:
        raise LabError(f"the demo needs {NODES} nodes of which node3 is across the router")
    pods = [applied.pod for applied in controller.apply(lab, SAMPLE)] + controller.run(lab, [TWIN])
    runtime.serve(lab, pods[-1], [TWIN_SECOND_PORT])
    for node in lab.plan.nodes:
        serve_host(lab, node.name, NODE_PORT)
    serve_host(lab, "internet", INTERNET_PORT)
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
    # Pods ask, the first of each node: a node without an address of the family has no way to a service, and a
    # transparent service is nothing for its own endpoint.
    all(
        settle(partial(_answers, lab, pod, target), lab.plan.driver.patience)
        for pod in {pod.spec.node: pod for pod in reversed(pods)}.values()
        for family in families
        for target in services[family].values()
    )
    if lab.plan.backend is not Backend.DIRECT:
        lab.call("router", capture.count_bare, lab.plan)
    unrouted = {family: lab.call("router", probe.unrouted, lab.plan.router, family) for family in families}
    return World(lab, families[0], {pod.spec.name: pod for pod in pods}, services, balancers, unrouted)


def serve_host(lab: Lab, name: str, port: int) -> None:
    """Start the echo server of a host on a port."""
    pid_file = lab.root / "hosts" / f"{name}.pid"
    lab.call(name, runtime.serve_in, lab.plan.host(name).namespace, (name, name), [port], pid_file)


def settle(condition: Callable[[], bool], patience: int = 1) -> bool:
    """Wait until the daemons have caught up with the manifests; False when they take too long."""
    deadline = time.monotonic() + SETTLE_SECONDS * patience
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def _answers(lab: Lab, pod: Pod, target: tuple[str, int]) -> bool:
    return isinstance(lab.call(pod.spec.node, probe.fetch, pod.netns, *target)[0], Answer)
