"""What `podwire trace` can know: names by daemon and ledger, states by the kernel, here or in a lab."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import msgspec

from cli.output import CommandError
from netlink import netns
from netlink.family import Family
from netlink.requests import RT_SCOPE_UNIVERSE
from netlink.rtnl import Rtnl
from node.trace.ask import NUMBERS, Host, Known, Pod, Service, ServicePort
from node.trace.path import World
from node.trace.read import read
from node.trace.state import PodPlace, State
from node.trace.why import Front, Names

ASK = ("podwire", "trace", "--save-state", "-")
OVER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Told:
    """What a daemon says: its node, services, what packets can be addressed to, and the other nodes."""

    node: str
    services: tuple[Service, ...] = ()
    fronts: tuple[Front, ...] = ()
    peers: tuple[Host, ...] = ()
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a trace can use. `namespaces` are those of places that are not the caller's."""

    known: Known
    read: Callable[[str, Family], State | None]
    namespaces: Mapping[str, str] = field(default_factory=dict)

    def world(self) -> World:
        """Return the places; a state is read when it is first asked for."""
        addresses = {a: h.name for h in self.known.hosts for a in h.addresses}

        def owner(address: str) -> str:
            return addresses.get(address, "")

        return World(self.read, owner, self.known.names)


def here(path: Path, state_dir: Path, others: Mapping[str, Path], over: str = "") -> Scene:
    """Return what is known on this node; `others` are files with the states of other nodes.

    `over` is a command that runs another one on a node, as `ssh {node}`; the states of those that `others`
    does not have are asked for by it.
    """
    told = ask(path)
    pods = tuple(ledger_pods(state_dir, told.node))
    own = Host(told.node, tuple(_own_addresses()))
    known = Known(
        told.node,
        told.services,
        pods,
        (own, *(h for h in told.peers if h.name != told.node)),
        _names(told, pods),
        told.answers,
    )
    saved: dict[str, tuple[State, ...]] = {name: load(file) for name, file in others.items()}

    def state(name: str, family: Family) -> State | None:
        if name == told.node:
            return read(name, family, places(pods))
        if name not in saved:
            saved[name] = fetch(over, name) if over else ()
        return next((s for s in saved[name] if s.family is family), None)

    return Scene(known, state)


def in_lab(name: str) -> Scene:
    """Return what is known in a lab: every host of it can be asked."""
    from lab import runtime
    from lab import state as labs
    from lab.topology import LabError

    try:
        lab = labs.load(name)
        running = runtime.pods(lab)
    except (LabError, OSError) as error:
        raise CommandError(str(error)) from None
    plan = lab.plan
    told = next((t for n in plan.nodes if (t := ask(lab.socket(n.name))).answers), Told(plan.nodes[0].name))
    hosts = [
        Host(h.name, tuple(dict.fromkeys((*h.addresses, *map(_bare, h.interfaces))))) for h in plan.hosts
    ]
    hosts.append(Host("router", tuple(_bare(a) for port in plan.router_ports for a in port.addresses)))
    links = {
        address: pod.host_ifname
        for node in plan.nodes
        for pod in ledger_pods(lab.node_dir(node.name) / "state", node.name)
        for address in pod.addresses
    }
    pods = tuple(
        Pod(
            f"{p.spec.namespace}/{p.spec.name}",
            p.spec.node,
            p.addresses,
            next((links[a] for a in p.addresses if a in links), ""),
            str(netns.path(p.netns)),
        )
        for p in running
    )
    known = Known(plan.nodes[0].name, told.services, pods, tuple(hosts), _names(told, pods), told.answers)
    namespaces = {host.name: host.namespace for host in plan.hosts} | {"router": plan.router}

    def state(place: str, family: Family) -> State | None:
        if place not in namespaces:
            return None
        there = places(p for p in pods if p.node == place)
        return netns.run(namespaces[place], read, place, family, there)

    return Scene(known, state, namespaces)


def save(scene: Scene, path: Path) -> None:
    """Write this node's state in both families, for `load` on another; "-" is standard output."""
    encoded = msgspec.msgpack.encode([scene.read(scene.known.here, family) for family in Family])
    if str(path) == "-":
        sys.stdout.buffer.write(encoded)
    else:
        path.write_bytes(encoded)


def load(path: Path) -> tuple[State, ...]:
    """Read what `save` wrote. Raises CommandError."""
    return _decoded(path.read_bytes(), str(path))


def fetch(over: str, node: str) -> tuple[State, ...]:
    """Ask a node for its state by a command that runs another one there. Raises CommandError."""
    words = [word.replace("{node}", node) for word in shlex.split(over)]
    try:
        done = subprocess.run([*words, *ASK], capture_output=True, timeout=OVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"--over cannot ask {node}: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CommandError(f"--over: {node} answers with exit status {done.returncode}: {''.join(said)}")
    return _decoded(done.stdout, f"what {node} answers")


def _decoded(encoded: bytes, what: str) -> tuple[State, ...]:
    try:
        return msgspec.msgpack.decode(encoded, type=tuple[State, ...])
    except (msgspec.DecodeError, ValueError) as error:
        raise CommandError(f"{what} is no saved network state: {error}") from None


def ask(path: Path) -> Told:
    """Ask the daemon behind a socket; one that does not answer knows nothing."""
    from api import podwire_pb2 as pb
    from cli.daemon_client import TIMEOUT_SECONDS, connected

    if not path.exists():
        return Told(socket.gethostname())
    try:
        with connected(str(path)) as stub:
            node = stub.Health(pb.HealthRequest(), timeout=TIMEOUT_SECONDS).node
            services = stub.Services(pb.ServicesRequest(), timeout=TIMEOUT_SECONDS).services
            frontends = stub.Frontends(pb.FrontendsRequest(), timeout=TIMEOUT_SECONDS).frontends
            routes = stub.Routes(pb.RoutesRequest(), timeout=TIMEOUT_SECONDS).routes
    except CommandError:
        return Told(socket.gethostname())
    peers: dict[str, list[tuple[str, str]]] = {}
    for route in routes:
        if route.peer and route.node != node:
            peers.setdefault(route.node, []).append((route.peer, route.destination))
    return Told(
        node,
        tuple(map(_service, services)),
        tuple(map(_front, frontends)),
        tuple(
            Host(name, tuple(dict.fromkeys(peer for peer, _ in some)), tuple(cidr for _, cidr in some))
            for name, some in peers.items()
        ),
        answers=True,
    )


def _service(message: Any) -> Service:
    ports = (ServicePort(p.name, NUMBERS[p.protocol.lower()], p.port, p.node_port) for p in message.ports)
    addresses = (*message.cluster_ips, *message.external_ips, *message.balancer_ips)
    return Service(message.name, addresses, tuple(ports))


def _front(message: Any) -> Front:
    address = "" if message.match == "nodeport" else message.match
    protocol = NUMBERS[message.protocol.lower()]
    ends = tuple(message.endpoints)
    return Front(message.service, address, protocol, message.port, message.origin, message.action, ends)


def ledger_pods(state_dir: Path, node: str) -> Iterable[Pod]:
    """Yield the pods in a ledger; none if there is no ledger, or it cannot be read."""
    from cni.plugin import LEDGER_FILE, ledger_of
    from ipam.ledger import LedgerError

    if not (state_dir / LEDGER_FILE).exists():
        return
    try:
        with ledger_of(state_dir) as ledger:
            attachments = ledger.attachments()
    except LedgerError as error:
        raise CommandError(str(error)) from None
    for found in attachments:
        yield Pod(found.pod, node, tuple(map(str, found.addresses)), found.host_ifname, found.netns)


def places(pods: Iterable[Pod]) -> tuple[PodPlace, ...]:
    """Return pods as a node's state has them."""
    return tuple(PodPlace(p.name, p.host_ifname, p.addresses, p.netns) for p in pods)


def _names(told: Told, pods: Iterable[Pod]) -> Names:
    return Names(told.fronts, tuple((a, p.name) for p in pods for a in p.addresses if p.name))


def _own_addresses() -> Iterable[str]:
    with Rtnl() as rtnl:
        for address in rtnl.addresses():
            if address.scope == RT_SCOPE_UNIVERSE:
                yield _bare(address.cidr)


def _bare(cidr: str) -> str:
    return str(ip_interface(cidr).ip)
