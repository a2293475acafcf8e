"""Build a lab's namespaces, cables and routes, start its daemons; and take all of it down again.

Everything, the router's bridges included, lives inside namespaces whose names begin with `pw-<lab>-`:
the machine's own namespace is never changed, and labs of different names cannot meet.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from cni import install
from lab import process, state
from lab.probe import wait_status
from lab.state import Lab
from lab.topology import (
    ANYWHERE,
    BALANCER_CIDRS,
    LOCAL_BALANCER_CIDRS,
    SERVICE_CIDRS,
    Backend,
    Host,
    LabError,
    Node,
    Topology,
    namespace_prefix,
)
from netlink import netns
from netlink.family import Family
from netlink.requests import Route, Veth, address_add, bridge_add, link_set, link_up, route_replace, veth_add
from netlink.rtnl import Rtnl
from proxy.l7.engine import Engine
from proxy.l7.render import Settings

MTU = 1500
READY_SECONDS = 20.0
HEALTH_PORT = 10256
EGRESS = "podwire.io/egress-address"
FORWARDING = {Family.V4: "ipv4/ip_forward", Family.V6: "ipv6/conf/all/forwarding"}
SYSCTL = Path("/proc/sys/net")

# linux/rtnetlink.h RTPROT_STATIC: what an administrator sets. Routes under podwire's own number
# would be removed by the daemon as its own leftovers.
STATIC = 4


def build(plan: Topology) -> None:
    """Make the namespaces and their network. Raises LabError when a name is taken; leaves what it made."""
    for namespace in (plan.router, *(host.namespace for host in plan.hosts)):
        try:
            netns.create(namespace)
        except FileExistsError:
            raise LabError(
                f"namespace {namespace} exists already; `podwire lab down --name {plan.name}` removes it"
            ) from None
    with ExitStack() as files:
        handles = {host.name: files.enter_context(netns.opened(host.namespace)) for host in plan.hosts}
        netns.run(plan.router, _build_router, plan, handles)
    for host in plan.hosts:
        netns.run(host.namespace, _build_host, host)
    netns.run(plan.router, _set_routes, to_pods(plan) + to_balancers(plan))
    netns.run(plan.host("neighbour").namespace, _set_routes, to_services(plan))


def build_inside(plan: Topology) -> None:
    """Make the hosts that are namespaces of the router's machine, and their cables. Runs on that machine."""
    hosts = [host for host in plan.hosts if host.name not in plan.machines]
    for host in hosts:
        netns.create(host.namespace)
    with ExitStack() as files, Rtnl() as rtnl:
        _cable(rtnl, hosts, {host.name: files.enter_context(netns.opened(host.namespace)) for host in hosts})
        index = {link.name: link.index for link in rtnl.links()}
        own = [port for port in plan.router_ports if port.name in {host.name for host in hosts}]
        rtnl.commit(*(address_add(index[p.name], address) for p in own for address in p.addresses))
    for host in hosts:
        netns.run(host.namespace, _build_host, host)
    netns.run(plan.host("neighbour").namespace, _set_routes, to_services(plan))


def to_pods(plan: Topology) -> list[tuple[str, str]]:
    """Return the router's routes to pods, which it has with backend direct only."""
    return [
        (cidr, node.address(family))
        for node in plan.nodes
        for family, cidr in zip(plan.families, node.pod_cidrs, strict=True)
        if plan.backend is Backend.DIRECT and family in plan.underlay.families
    ]


def to_services(plan: Topology) -> list[tuple[str, str]]:
    """Return the neighbour's routes to the service ranges, by node1."""
    return [(SERVICE_CIDRS[family], plan.nodes[0].address(family)) for family in plan.shared]


def remove(name: str, root: Path = state.ROOT) -> bool:
    """Take down what is left of a lab, whole or half-made; return whether there was anything.

    Ends the processes that the lab started, then removes the namespaces and with them every interface,
    route and rule, then the directory.
    """
    directory = state.directory(name, root)
    namespaces = [path.name for path in netns.DIRECTORY.glob(f"{namespace_prefix(name)}*")]
    found = bool(namespaces) or directory.exists()
    process.stop(directory.rglob("*.pid"))
    _end_proxies(directory)
    for namespace in namespaces:
        netns.delete(namespace)
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):  # not empty: another lab is up, or a daemon of this machine's own runs
        root.rmdir()
        if root == state.ROOT:
            root.parent.rmdir()
    return found


def _end_proxies(directory: Path) -> None:
    """End the L7 proxies of a lab's nodes: they go on without their daemons."""
    for folder in directory.glob("*/l7"):
        proxy = Engine(Settings(folder))
        if proxy.adopt():
            proxy.stop()


def up(plan: Topology, root: Path = state.ROOT) -> Lab:
    """Make a lab: network, Node objects and a ready daemon per node. What fails is taken down again.

    Raises LabError when a lab of this name exists, and when a daemon does not get ready (with the last
    lines of its log).
    """
    lab = Lab(plan, state.directory(plan.name, root))
    try:
        lab.root.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise LabError(
            f"lab {plan.name!r} exists already; `podwire lab down --name {plan.name}` removes it"
        ) from None
    with ExitStack() as undo:
        undo.callback(remove, plan.name, root)
        build(plan)
        lab.manifests.mkdir()
        for node in plan.nodes:
            state.write_manifest(lab, node_object(node))
        start_daemons(lab)
        state.save(lab)
        undo.pop_all()
    return lab


def start_daemons(lab: Lab) -> None:
    """Install the plugin on every node and start its daemon; return when all are ready."""
    for node in lab.plan.nodes:
        _install(lab, node)
        process.start(
            node.namespace, daemon_command(lab, node), _pid_file(lab, node.name), lab.log(node.name)
        )
    deadline = time.monotonic() + READY_SECONDS
    with ThreadPoolExecutor(max_workers=len(lab.plan.nodes)) as pool:
        ready = list(pool.map(lambda node: _wait_ready(lab, node, deadline), lab.plan.nodes))
    for node, is_ready in zip(lab.plan.nodes, ready, strict=True):
        if not is_ready:
            raise LabError(f"the daemon of {node.name} did not get ready; its log ends:\n{_tail(lab, node)}")


def daemon_command(lab: Lab, node: Node) -> list[str]:
    """Return the command line of a node's daemon."""
    options = {
        "--source": lab.manifests,
        "--node-name": node.name,
        "--state-dir": lab.node_dir(node.name) / "state",
        "--socket": lab.socket(node.name),
        "--mode": lab.plan.mode.value,
        "--backend": lab.plan.backend.value,
        "--proxy-mode": lab.plan.proxy_mode.value,
        "--l7-access-log": lab.node_dir(node.name) / "l7.log",
    }
    words = [str(word) for option in options.items() for word in option]
    # On every address of a node, not only on those in its Node object: a lab shows both kinds.
    words += [word for cidr in ANYWHERE.values() for word in ("--nodeport-addresses", cidr)]
    return [sys.executable, "-m", "cli.main", "daemon", *words]


def daemon(lab: Lab, node: str) -> process.Process | None:
    """Return the node's daemon if it runs."""
    found = process.read(_pid_file(lab, node))
    return found if found is not None and found.alive else None


def pid(lab: Lab, node: str) -> int | None:
    """Return the pid of a node's daemon; None when it does not run."""
    found = daemon(lab, node)
    return found.pid if found else None


def log(lab: Lab, node: str) -> str:
    """Return what a node's daemon wrote."""
    return lab.log(node).read_text(errors="replace")


def execute(lab: Lab, place: str, namespace: str, command: list[str]) -> int:
    """Run a command in a namespace, with our standard streams; return its exit status, as a shell would.

    Raises FileNotFoundError when there is no such command.
    """
    code = netns.run(namespace, lambda: subprocess.run(command, check=False).returncode)
    return code if code >= 0 else 128 - code


def node_object(node: Node) -> state.Json:
    """Return the Kubernetes Node object of a lab's node; the cluster's first family comes first in it."""
    metadata: state.Json = {"name": node.name, "labels": {"kubernetes.io/hostname": node.name}}
    if node.egress:
        metadata["annotations"] = {EGRESS: ",".join(node.egress)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": metadata,
        "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": address} for address in node.addresses),
                {"type": "Hostname", "address": node.name},
            ],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def _pid_file(lab: Lab, node: str) -> Path:
    return lab.node_dir(node) / "daemon.pid"


def _wait_ready(lab: Lab, node: Node, deadline: float) -> bool:
    """Wait for /healthz; give up at once when the daemon has ended."""
    while time.monotonic() < deadline and daemon(lab, node.name) is not None:
        step = min(deadline, time.monotonic() + 0.5)
        if wait_status(node.namespace, HEALTH_PORT, "/healthz", step):
            return True
    return False


def _tail(lab: Lab, node: Node, lines: int = 8) -> str:
    text = lab.log(node.name).read_text(errors="replace") if lab.log(node.name).exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (empty)"


def _install(lab: Lab, node: Node) -> None:
    """Put the plugin and its conflist where this node's runtime looks."""
    directory = lab.node_dir(node.name)
    install.install_binary(
        directory / "cni/bin", socket=str(lab.socket(node.name)), state_dir=str(directory / "state")
    )
    install.install_conflist(directory / "cni/net.d")


def _build_router(plan: Topology, handles: dict[str, int]) -> None:
    """Inside the router: its bridges, a cable to every host, its addresses, and forwarding."""
    for family in plan.underlay.families:
        (SYSCTL / FORWARDING[family]).write_text("1")
    _trust_addresses("default")
    with Rtnl() as rtnl:
        rtnl.commit(link_up(_index(rtnl, "lo")))
        rtnl.commit(*(bridge_add(port.name) for port in plan.router_ports if port.bridge))
        _cable(rtnl, plan.hosts, handles)
        index = {link.name: link.index for link in rtnl.links()}
        rtnl.commit(
            *(address_add(index[p.name], address) for p in plan.router_ports for address in p.addresses)
        )


def _cable(rtnl: Rtnl, hosts: Sequence[Host], handles: dict[str, int]) -> None:
    """Give each host a cable, into the bridge of its segment if it has one."""
    rtnl.commit(*(veth_add(Veth(h.name, "eth0", peer_netns=handles[h.name], mtu=MTU)) for h in hosts))
    index = {link.name: link.index for link in rtnl.links()}
    rtnl.commit(*(link_set(index[h.name], master=index[h.segment]) for h in hosts if h.segment))


def to_balancers(plan: Topology) -> list[tuple[str, str]]:
    """Return the router's routes to the load balancers' addresses: to node2, with policy Local to node1."""
    first, second = plan.nodes[0], plan.nodes[min(1, len(plan.nodes) - 1)]
    return [
        (cidrs[family], node.address(family))
        for cidrs, node in ((BALANCER_CIDRS, second), (LOCAL_BALANCER_CIDRS, first))
        for family in plan.shared
    ]


def _build_host(host: Host) -> None:
    """Inside a host: loopback, eth0 with its addresses, and the router as the way to everywhere.

    Nodes are as strict about where packets come from as some distributions are.
    """
    _trust_addresses("eth0")
    for scope in ("all", "default") if isinstance(host, Node) else ():
        (SYSCTL / "ipv4/conf" / scope / "rp_filter").write_text("1")
    with Rtnl() as rtnl:
        eth0 = _index(rtnl, "eth0")
        rtnl.commit(link_up(_index(rtnl, "lo")), link_up(eth0))
        rtnl.commit(*(address_add(eth0, interface) for interface in host.interfaces))
    _set_routes([(ANYWHERE[subnet.family], host.gateway(subnet.family)) for subnet in host.subnets])


def _trust_addresses(interface: str) -> None:
    """Use link-local addresses at once: looking for duplicates first takes a second, and there are none.

    Only on the lab's cables: the interfaces that podwire makes behave as on any node.
    """
    path = SYSCTL / "ipv6/conf" / interface / "accept_dad"
    if path.exists():
        path.write_text("0")


def _set_routes(routes: list[tuple[str, str]]) -> None:
    """Set static routes, each a destination and its gateway, in the namespace of this thread."""
    with Rtnl() as rtnl:
        rtnl.commit(*(route_replace(Route(to, gateway=via, protocol=STATIC)) for to, via in routes))


def _index(rtnl: Rtnl, name: str) -> int:
    link = rtnl.link(name)
    if link is None:
        raise LabError(f"interface {name} is missing")
    return link.index
