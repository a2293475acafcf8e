"""Pairs of pods to measure between: ours, the Go plugins', and the same shape made by hand.

Each is a lab of its own, whose namespaces go, with all that is in them, when the stack that was given ends.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import layout
from bench.plugins import Chain, Plugin, Pod, bridge
from cni.settings import Mode as PodMode
from cni.wiring import HOST_PREFIX, PodAddress, PodLink, attach, mac_of
from lab import network, state
from lab.state import Json, Lab
from lab.topology import Backend, Between, Mode, Node, Topology, plan
from netlink import netns
from netlink.family import Family

SERVICES, ENDPOINTS = 100, 10
STREAM, REQUEST, SERVICE_REQUEST = 5201, 5301, 5302
"""Where a server listens. Through a service requests come to a port of their own: connection tracking
remembers a client's port for seconds, and would translate one that a direct connection has just used."""
CLUSTER_IP = "10.96.200.1"
MTU, OVERHEAD = 1500, 50
BY_HAND = "vxlan4"
SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Way:
    """From a client's namespace to a server's, by the address that is given."""

    client: str
    server: str
    address: str

    def by_service(self) -> Way:
        """Return the way to the same server by its cluster address."""
        return Way(self.client, self.server, CLUSTER_IP)


def ours(
    stack: ExitStack,
    name: str,
    nodes: int,
    mode: Mode = Mode.ROUTED,
    backend: Backend = Backend.AUTO,
) -> tuple[Way, ...]:
    """Make nodes with daemons and services; return the way from a pod of the first one to one of each node.

    The server on the last node is the service's endpoint.
    """
    topology = _planned(stack, name, nodes, mode, backend)
    lab = network.up(topology)
    chains = [_podwire(lab, node) for node in topology.nodes]
    client, _ = _added(topology, topology.nodes[0], "client", chains[0])
    ways = []
    for node, chain in zip(topology.nodes, chains, strict=True):
        server, address = _added(topology, node, "server", chain)
        ways.append(Way(client, server, address))
    _write_services(lab, ways[-1].address, topology.nodes[-1])
    return tuple(ways)


def go_bridge(stack: ExitStack, name: str, *, services: bool = False) -> Way:
    """Make a node whose pods the Go plugin connects; with services as kube-proxy has them."""
    topology = _planned(stack, name, 1)
    network.build(topology)
    node, data_dir = topology.nodes[0], state.directory(topology.name) / "host-local"
    data_dir.mkdir(parents=True)
    chain = Chain("bridge", (bridge(str(data_dir)),))
    if services:
        rules = layout.chains(layout.pairs(SERVICES, ENDPOINTS))
        netns.run(
            node.namespace, partial(subprocess.run, ["nft", "-f", "-"], input=rules.encode(), check=True)
        )
    client, _ = _added(topology, node, "client", chain)
    server, address = _added(topology, node, "server", chain)
    return Way(client, server, address)


def by_hand(stack: ExitStack, name: str, *, vxlan: bool = False, services: bool = False) -> Way:
    """Make two nodes by `ip`: pods as ours are wired, static routes, no rules but kube-proxy's, if any."""
    topology = _planned(stack, name, 2)
    network.build(topology)
    first, second = topology.nodes
    namespaces = [topology.pod_namespace(node.name, "pod") for node in topology.nodes]
    addresses = [node.pod_cidrs[0].partition("/")[0].removesuffix("0") + "2" for node in topology.nodes]
    for node, namespace, address in zip(topology.nodes, namespaces, addresses, strict=True):
        netns.create(namespace)
        mtu = MTU - OVERHEAD if vxlan else MTU
        netns.run(node.namespace, _wire, namespace, address, mtu)
    for node, peer in ((first, second), (second, first)):
        for words in _tunnel(node, peer) if vxlan else _static(node, peer):
            netns.run(node.namespace, partial(subprocess.run, words.split(), check=True))
        if services:
            netns.run(node.namespace, _as_kube_proxy)
    return Way(*namespaces, addresses[1])


def _planned(
    stack: ExitStack,
    name: str,
    nodes: int,
    mode: Mode = Mode.ROUTED,
    backend: Backend = Backend.DIRECT,
) -> Topology:
    topology = plan(f"net{os.getpid()}{name}", nodes, far=0, mode=mode, between=Between(backend))
    stack.callback(network.remove, topology.name)
    return topology


def _as_kube_proxy() -> None:
    """Load as many services as our nodes have, in the shape of kube-proxy's nftables mode."""
    rules = layout.chains(layout.pairs(SERVICES, ENDPOINTS)).encode()
    subprocess.run(["nft", "-f", "-"], input=rules, check=True)


def _podwire(lab: Lab, node: Node) -> Chain:
    return Chain("podwire", (Plugin(lab.node_dir(node.name) / "cni/bin/podwire", {"type": "podwire"}),))


def _added(topology: Topology, node: Node, name: str, chain: Chain) -> tuple[str, str]:
    """Add a pod by a chain of plugins; return its namespace and address."""
    pod = Pod(topology.pod_namespace(node.name, name), 0)
    netns.create(pod.namespace)
    netns.run(node.namespace, chain.execute, "ADD", pod)
    return pod.namespace, pod.result["ips"][0]["address"].partition("/")[0]


def until(is_so: Callable[[], bool], otherwise: str) -> None:
    """Wait for a condition; end the benchmark when it takes too long."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"bench: {otherwise} in {SECONDS:.0f} s")
        time.sleep(0.02)


def _write_services(lab: Lab, endpoint: str, node: Node) -> None:
    """Write the services that the rules are to be full of, and the one that leads to the endpoint."""
    documents = [*layout.documents(SERVICES, ENDPOINTS), *_service(endpoint, node)]
    state.write_json(
        lab.manifests / "services.yaml", {"kind": "List", "apiVersion": "v1", "items": documents}
    )


def _service(endpoint: str, node: Node) -> tuple[Json, ...]:
    ports = (("stream", STREAM, STREAM), ("request", REQUEST, SERVICE_REQUEST))
    service = {"name": "measured", "namespace": "bench"}
    piece = service | {"name": "measured-1", "labels": {"kubernetes.io/service-name": "measured"}}
    return (
        {
            "kind": "Service",
            "metadata": service,
            "spec": {
                "clusterIP": CLUSTER_IP,
                "ports": [{"name": name, "port": port} for name, port, _ in ports],
            },
        },
        {
            "kind": "EndpointSlice",
            "metadata": piece,
            "addressType": "IPv4",
            "ports": [{"name": name, "port": port} for name, _, port in ports],
            "endpoints": [{"addresses": [endpoint], "nodeName": node.name, "conditions": {"ready": True}}],
        },
    )


def _wire(namespace: str, address: str, mtu: int) -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    ends = (PodAddress(f"{address}/32", address, Family.V4, Family.V4.gateway),)
    host = f"{HOST_PREFIX}0"
    link = PodLink(PodMode.ROUTED, "eth0", host, mac_of(host), mac_of(address), mtu, ends)
    attach(link, str(netns.path(namespace)))


def _static(node: Node, peer: Node) -> tuple[str, ...]:
    return (f"ip route add {peer.pod_cidrs[0]} via {peer.address(Family.V4)}",)


def _tunnel(node: Node, peer: Node) -> tuple[str, ...]:
    """Return the commands that make the same tunnel as ours."""
    here, there = node.address(Family.V4), peer.address(Family.V4)
    source, far = (n.pod_cidrs[0].partition("/")[0] for n in (node, peer))
    options = "id 112 dstport 8472 ttl 64 df set nolearning"
    mtu = MTU - OVERHEAD
    return (
        f"ip link add {BY_HAND} address {mac_of(here)} mtu {mtu} type vxlan local {here} {options}",
        f"ip address add {source}/32 dev {BY_HAND}",
        f"ip link set {BY_HAND} up",
        f"bridge fdb append {mac_of(there)} dev {BY_HAND} dst {there}",
        f"ip neighbour replace {far} lladdr {mac_of(there)} dev {BY_HAND} nud permanent",
        f"ip route add {peer.pod_cidrs[0]} via {far} dev {BY_HAND} onlink src {source}",
    )
