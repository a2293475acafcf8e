"""Two nodes as flannel (VXLAN) and kube-proxy (iptables) have them, a client beside them, and traffic.

    client ── lan ─┬─ node1 ── cni0 ── pods       flannel.1 to flannel.1: the pods of the other node
                   └─ node2 ── cni0 ── pods       KUBE-…: the service `web`, FLANNEL-…: masquerade

The bridge is made by the Go plugins `bridge` and `host-local`. What flannel has in the kernel is written down
from its sources (backend/vxlan, trafficmngr/iptables): routes of protocol boot, permanent neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.plugins import GO_PLUGINS, execute
from lab import probe
from lab.probe import Answer, Result, wait_status
from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from tests.node import kube_proxy
from tests.node.world import wait_until

ECHO = Path(__file__).resolve().parents[2] / "lab/echo.py"
CLUSTER, CLIENT, VTEP_MTU = "10.244.0.0/16", "192.168.50.100", 1450
CLUSTER_IP, PORT, NODE_PORT = "10.96.0.20", 80, 30080
IN_TIME = 0.9
"""Seconds that a connection may take: a lost SYN is sent again after one."""
EVERY = 0.01
FLANNEL, PODWIRE = "10-flannel.conflist", "10-podwire.conflist"

NAT = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:{svc} - [0:0]
:{ext} - [0:0]
{chains}
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {ip}/32 -p tcp -m comment --comment "shop/web" -m tcp --dport 80 -j {svc}
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/web" -m tcp --dport 30080 -j {ext}
-A {ext} -m comment --comment "masquerade traffic for shop/web external destinations" -j KUBE-MARK-MASQ
-A {ext} -j {svc}
-A {svc} ! -s {cluster} -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
{endpoints}
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""
MASQ = '-m comment --comment "flanneld masq"'
FLANNELS = """\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING {masq} -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN
-A FLANNEL-POSTRTG -s {own} -d {cluster} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} -d {own} {masq} -j RETURN
-A FLANNEL-POSTRTG ! -s {cluster} -d {own} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} ! -d 224.0.0.0/4 {masq} -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} {masq} -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {cluster} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {cluster} -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""


@dataclass(slots=True)
class Pod:
    """A pod: its namespace, its address, and the server in it."""

    name: str
    namespace: str
    address: str = ""
    server: subprocess.Popen[bytes] | None = None


@dataclass(slots=True)
class Node:
    """A node: its namespace, its folders, and podwire's daemon while it runs."""

    number: int
    namespace: str
    root: Path
    daemon: subprocess.Popen[bytes] | None = None
    pods: dict[str, Pod] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"192.168.50.{10 + self.number}"

    @property
    def range(self) -> str:
        return f"10.244.{self.number}.0/24"

    @property
    def vtep(self) -> str:
        """What flannel.1 has: the range's first address, and a MAC."""
        return f"10.244.{self.number}.0"

    @property
    def mac(self) -> str:
        return f"5e:00:00:00:00:{self.number:02x}"

    @property
    def held(self) -> Path:
        """Where host-local keeps a file for each address in use."""
        return self.root / "networks/cbr0"

    @property
    def conflists(self) -> Path:
        return self.root / "net.d"

    @property
    def socket(self) -> str:
        return str(self.root / "podwire.sock")

    def sh(self, script: str) -> str:
        """Run a script of the documentation inside the node; return what it prints."""
        words = ["bash", "-euo", "pipefail", "-c", script]
        path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = netns.run(
            self.namespace,
            lambda: subprocess.run(words, capture_output=True, text=True, check=False, env=path),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def conflist(self) -> str:
        """The network of new pods: a runtime takes the first file by name."""
        return min(path.name for path in self.conflists.iterdir() if path.suffix == ".conflist")

    def add(self, name: str, namespace: str) -> Pod:
        """Add a pod as the runtime does, by the network that counts now, and start its server."""
        pod = self.pods[name] = Pod(name, namespace)
        result = json.loads(netns.run(self.namespace, self._execute, "ADD", namespace))
        pod.address = result["ips"][0]["address"].split("/")[0]
        netns.run(namespace, subprocess.run, ["ip", "link", "set", "lo", "up"], check=True)
        words = [sys.executable, "-I", "-S", str(ECHO), name, self.name, str(PORT)]
        pod.server = netns.run(namespace, lambda: subprocess.Popen(words, stdout=subprocess.DEVNULL))
        wait_until(lambda: isinstance(probe.fetch(namespace, "127.0.0.1", PORT)[0], Answer), "a server")
        return pod

    def delete(self, name: str) -> None:
        """Delete a pod as containerd does: by the network that counts now, whoever has added it."""
        pod = self.pods.pop(name)
        end(pod.server)
        netns.run(self.namespace, self._execute, "DEL", pod.namespace)
        netns.delete(pod.namespace)

    def _execute(self, command: str, namespace: str) -> bytes:
        if self.conflist == PODWIRE:
            binary, config = self.root / "bin/podwire", {"type": "podwire", "name": "podwire"}
            return execute(binary, command, {"cniVersion": "1.0.0", **config}, namespace)
        ipam: dict[str, Any] = {
            "type": "host-local",
            "ranges": [[{"subnet": self.range}]],
            "routes": [{"dst": CLUSTER}],
            "dataDir": str(self.held.parent),
        }
        config: dict[str, Any] = {"type": "bridge", "name": "cbr0", "cniVersion": "1.0.0", "bridge": "cni0"}
        config["mtu"] = VTEP_MTU
        config |= {"isGateway": True, "isDefaultGateway": True, "hairpinMode": True, "ipam": ipam}
        return execute(GO_PLUGINS / "bridge", command, config, namespace)

    def start(self, *, beside: bool) -> None:
        """Start podwire's daemon with the configuration as it is now; `beside` kube-proxy, on other ports."""
        words = [sys.executable, "-m", "cli.main", "daemon", "--config", str(self.root / "config.yaml")]
        with (self.root / "log").open("ab") as log:
            self.daemon = netns.run(self.namespace, lambda: subprocess.Popen(words, stdout=log, stderr=log))
        port = 11256 if beside else 10256
        assert wait_status(self.namespace, port, "/livez", time.monotonic() + 10), self.log

    def stop(self) -> None:
        end(self.daemon)
        self.daemon = None

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()


@dataclass(slots=True)
class Cluster:
    """Both nodes and the client; `make` makes a namespace."""

    nodes: tuple[Node, Node]
    client: str
    make: Callable[[], str]

    def lay_flannel(self) -> None:
        """Connect the nodes' pods as flanneld does."""
        for node, peer in (self.nodes, self.nodes[::-1]):
            node.sh(
                f"""
                ip link add flannel.1 address {node.mac} mtu {VTEP_MTU} type vxlan id 1 local {node.address} \
                    dev eth0 dstport 8472 nolearning
                ip address add {node.vtep}/32 dev flannel.1
                ip link set flannel.1 up
                ip neighbour replace {peer.vtep} lladdr {peer.mac} dev flannel.1 nud permanent
                bridge fdb append {peer.mac} dev flannel.1 dst {peer.address} self permanent
                ip route add {peer.range} via {peer.vtep} dev flannel.1 onlink
                sysctl -qw net.ipv4.ip_forward=1
                """
            )
            text = FLANNELS.format(own=node.range, cluster=CLUSTER, masq=MASQ)
            netns.run(node.namespace, kube_proxy.load, Variant.NFT, Family.V4, text)
            (node.conflists / FLANNEL).write_text("{}")

    def lay_kube_proxy(self, variant: Variant, *endpoints: str) -> None:
        """Serve `web` on both nodes as kube-proxy does."""
        names = [f"KUBE-SEP-{chr(65 + at) * 16}" for at in range(len(endpoints))]
        lines = []
        for at, (name, endpoint) in enumerate(zip(names, endpoints, strict=True)):
            left = len(endpoints) - at
            chance = f"-m statistic --mode random --probability {1 / left:.8f} " if left > 1 else ""
            lines += [
                f"-A {kube_proxy.SVC} {chance}-j {name}",
                f"-A {name} -s {endpoint}/32 -j KUBE-MARK-MASQ",
                f"-A {name} -p tcp -m tcp -j DNAT --to-destination {endpoint}:80",
            ]
        text = NAT.format(
            svc=kube_proxy.SVC,
            ext=kube_proxy.EXT,
            chains="\n".join(f":{name} - [0:0]" for name in names),
            endpoints="\n".join(lines),
            ip=CLUSTER_IP,
            cluster=CLUSTER,
        )
        for node in self.nodes:
            netns.run(node.namespace, kube_proxy.load, variant, Family.V4, text)

    def publish(self, *pods: Pod) -> None:
        """Tell both daemons of the nodes, and of `web` with these pods as its endpoints."""
        documents: list[dict[str, Any]] = [
            {
                "kind": "Node",
                "metadata": {"name": node.name},
                "spec": {"podCIDRs": [node.range]},
                "status": {"addresses": [{"type": "InternalIP", "address": node.address}]},
            }
            for node in self.nodes
        ]
        meta: dict[str, Any] = {"name": "web", "namespace": "shop"}
        ports = [{"port": PORT, "nodePort": NODE_PORT}]
        documents.append(
            {
                "kind": "Service",
                "metadata": meta,
                "spec": {"type": "NodePort", "clusterIP": CLUSTER_IP, "ports": ports},
            }
        )
        homes = {pod.name: node.name for node in self.nodes for pod in node.pods.values()}
        documents.append(
            {
                "kind": "EndpointSlice",
                "metadata": meta | {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": "IPv4",
                "ports": [{"port": PORT}],
                "endpoints": [{"addresses": [p.address], "nodeName": homes[p.name]} for p in pods],
            }
        )
        for node in self.nodes:
            temporary = node.root / "manifests/.all"
            temporary.write_text("\n---\n".join(map(json.dumps, documents)))
            temporary.rename(node.root / "manifests/all.yaml")


@contextlib.contextmanager
def cluster(make: Callable[[], str], root: Path) -> Iterator[Cluster]:
    """Yield the nodes with flannel's part, without pods; afterwards nothing of it runs."""
    nodes = (Node(1, make(), root / "node1"), Node(2, make(), root / "node2"))
    found, lan = Cluster(nodes, make(), make), make()
    members = [(n.namespace, n.address) for n in nodes] + [(found.client, CLIENT)]
    script = ["ip link add lan type bridge", "ip link set lan up"]
    for at, (namespace, address) in enumerate(members):
        script += [
            f"ip link add port{at} type veth peer name eth0 netns {namespace}",
            f"ip link set port{at} master lan up",
            f"ip -n {namespace} address add {address}/24 dev eth0",
            f"ip -n {namespace} link set lo up",
            f"ip -n {namespace} link set eth0 up",
            f"ip -n {namespace} route add default via 192.168.50.1",
        ]
    try:
        netns.run(lan, subprocess.run, ["sh", "-ec", "\n".join(script)], check=True)
        for node in nodes:
            for folder in ("manifests", "net.d", "bin", "state"):
                (node.root / folder).mkdir(parents=True)
        found.lay_flannel()
        yield found
    finally:
        for node in nodes:
            end(node.daemon)
            for pod in node.pods.values():
                end(pod.server)


def end(process: subprocess.Popen[bytes] | None) -> None:
    if process:
        process.terminate()
        process.wait(10)


@dataclass(slots=True)
class Traffic:
    """Connections that somebody makes, or one that somebody holds, until they are to stop.

    `spare` is how many may fail: what was under way at a moment that it cannot survive.
    """

    what: str
    spare: int = 0
    results: list[Result] = field(default_factory=list)
    error: str = ""

    @property
    def failed(self) -> str:
        """What went wrong, "" if nothing."""
        wrong = [(at, r) for at, r in enumerate(self.results) if not isinstance(r, Answer)]
        told = self.error
        if len(wrong) > self.spare:
            told = f"{wrong[self.spare][1]} at {wrong[self.spare][0]} of {len(self.results)}"
        return f"{self.what}: {told}" if told else ""


class Road:
    """All traffic of a test: more can be put on at any time, and what failed is named."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.traffic: list[Traffic] = []

    def __enter__(self) -> Road:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def knock(self, what: str, namespace: str, address: str, port: int = PORT) -> Traffic:
        """Make new connections, one after the other."""
        traffic = Traffic(what)

        def work() -> None:
            while not self._stop.wait(EVERY):
                traffic.results += probe.fetch(namespace, address, port, timeout=IN_TIME)

        return self._begin(traffic, work)

    def hold(self, what: str, namespace: str, address: str, port: int = PORT, server: str = "") -> Traffic:
        """Hold one connection, to this server if one is named, and ask over it again and again."""
        traffic = Traffic(f"{what}, held")
        connection = connected(namespace, address, port, server)

        def work() -> None:
            with connection:
                while not self._stop.wait(EVERY):
                    try:
                        traffic.results.append(ask(connection))
                    except OSError as error:
                        traffic.error = f"{error!r} after {len(traffic.results)}"
                        return

        return self._begin(traffic, work)

    def _begin(self, traffic: Traffic, work: Callable[[], None]) -> Traffic:
        self.traffic.append(traffic)
        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        return traffic

    def goes_on(self, rounds: int = 20) -> None:
        """Wait until everybody got so many more answers, or fail with what went wrong."""
        marks = [(traffic, len(traffic.results) + rounds) for traffic in self.traffic]
        wait_until(
            lambda: any(t.failed for t in self.traffic) or all(len(t.results) >= at for t, at in marks),
            "answers for everybody",
        )
        failed = [traffic.failed for traffic in self.traffic if traffic.failed]
        assert not failed, "\n".join(failed)

    def leave(self, *traffic: Traffic) -> None:
        """Expect no more of these: what they held ends with its pod."""
        self.traffic = [t for t in self.traffic if t not in traffic]


def connected(namespace: str, address: str, port: int, server: str) -> socket.socket:
    """Return a connection that leads to this server."""
    for _ in range(60):
        found = netns.run(namespace, socket.create_connection, (address, port), IN_TIME)
        answer = ask(found)
        if isinstance(answer, Answer) and server in ("", answer.server):
            return found
        found.close()
    raise AssertionError(f"no connection reached {server}")


def ask(connection: socket.socket) -> Result:
    """Make a request on a connection that stays open."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
    received = b""
    while not received.endswith(b"}\n"):
        chunk = connection.recv(4096)
        if not chunk:
            raise ConnectionResetError("closed")
        received += chunk
    return probe.answer(received.partition(b"\r\n\r\n")[2])
