"""The plan of a lab: which namespaces there are, how they are cabled, and every address. Pure.

    node1 node2 … ── lan0 ─┐                 ┌─ internet  203.0.113.10   2001:db8:113::10
    neighbour ───── lan0 ──┤ router (bridges │
    far node(s) ─── lan1 ──┘ live inside it) └─ client    198.51.100.10  2001:db8:51::10

A far node is a node across the router. With backend direct the router carries one route per pod range, as
a cloud's route table does; otherwise it knows the nodes' subnets only, and pods' packets have to cross it
inside others. It has no route to the service ranges: a service address that leaves a node unhandled dies
there and is counted. It leads the range of the load balancers' addresses to node2, as
if that node had announced them, and to node1 the addresses that services with the policy Local have:
a balancer sends only where the endpoints are. The neighbour is a machine on lan0 that is no node and reaches
the service ranges through node1.

A lab has IPv4, IPv6 or both, on every host and for every pod; the hosts may have another family than the
pods. What differs is a row in a table here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from lab.machines import OWN
from netlink.family import Family

SERVICE_CIDRS = {Family.V4: "10.96.0.0/16", Family.V6: "fd00:10:96::/112"}
POD_CIDRS = {Family.V4: "10.244.0.0/16", Family.V6: "fd00:10:244::/56"}
BALANCER_CIDRS = {Family.V4: "192.0.2.0/24", Family.V6: "2001:db8:2::/64"}
"""The addresses that load balancers have; node2 has them, as far as the router knows."""
LOCAL_BALANCER_CIDRS = {Family.V4: "192.0.2.32/28", Family.V6: "2001:db8:2::30/124"}
"""Those among them that node1 has: of services with the policy Local, whose endpoints are there."""
STAND_IN = {Family.V4: "192.0.2.100", Family.V6: "2001:db8:2::100"}
"""The address of the balancer that the router itself can be: no service has it."""
ANYWHERE = {Family.V4: "0.0.0.0/0", Family.V6: "::/0"}
LOCALHOST = {Family.V4: "127.0.0.1", Family.V6: "::1"}
NODE_POD_CIDR = {Family.V4: "10.244.{}.0/24", Family.V6: "fd00:10:244:{}::/64"}
"""The pod range of a node, by the node's number."""

SUBNETS = {
    "lan0": {Family.V4: "192.168.50.", Family.V6: "fd00:192:168:50::"},
    "lan1": {Family.V4: "192.168.60.", Family.V6: "fd00:192:168:60::"},
    "internet": {Family.V4: "203.0.113.", Family.V6: "2001:db8:113::"},
    "client": {Family.V4: "198.51.100.", Family.V6: "2001:db8:51::"},
}
"""By segment or cable. An address is the prefix and a number; the digits are the same in both families."""

ROUTER_NUMBER = 1
MAX_NODES = 80

# No dash: the namespaces of lab "a" can then never be taken for those of another lab.
LAB_NAME = re.compile(r"[a-z0-9]{1,20}")


class LabError(Exception):
    """Something about a lab that its user can act on, as one sentence."""


class Mode(Enum):
    """How the daemons wire pods: see `podwire daemon --mode`."""

    ROUTED = "routed"
    BRIDGE = "bridge"


class Backend(Enum):
    """How the daemons lead to other nodes' pods: see `podwire daemon --backend`."""

    AUTO = "auto"
    DIRECT = "direct"
    VXLAN = "vxlan"


class ProxyMode(Enum):
    """What services are made of in the nodes' kernels: see `podwire daemon --proxy-mode`."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"


class Driver(Enum):
    """What the hosts of a lab are."""

    NETNS = "netns"  # network namespaces of this machine
    QEMU = "qemu"  # virtual machines

    @property
    def patience(self) -> int:
        """How much longer than in namespaces things may take: emulated processors are slow."""
        return 1 if self is Driver.NETNS else 8


class IpFamily(Enum):
    """Which addresses pods and services, or hosts, have."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"
    DUAL = "dual"

    @property
    def families(self) -> tuple[Family, ...]:
        """The families, the cluster's first one first."""
        return {
            IpFamily.IPV4: (Family.V4,),
            IpFamily.IPV6: (Family.V6,),
            IpFamily.DUAL: (Family.V4, Family.V6),
        }[self]


@dataclass(frozen=True, slots=True)
class Between:
    """The network between the nodes: how pods' packets cross it, and which addresses hosts have."""

    backend: Backend = Backend.AUTO
    underlay: IpFamily | None = None  # None: as the pods


def title(family: Family) -> str:
    """Return a family's name as Kubernetes objects have it."""
    return f"IPv{family.value}"


def titles(families: Iterable[Family]) -> str:
    """Return families as they stand in a sentence."""
    return " and ".join(map(title, families))


@dataclass(frozen=True, slots=True)
class Subnet:
    """One family's range of a segment or cable: `prefix` and a number are an address."""

    family: Family
    prefix: str

    @property
    def length(self) -> int:
        """The prefix length in bits."""
        return 24 if self.family is Family.V4 else 64

    def address(self, number: int) -> str:
        """Return the address of that number."""
        return f"{self.prefix}{number}"

    def interface(self, number: int) -> str:
        """Return the address of that number with its prefix length, as an interface carries it."""
        return f"{self.address(number)}/{self.length}"


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with one cable to the router; its addresses are on its eth0."""

    name: str
    namespace: str
    segment: str  # the bridge in the router it hangs on, or "" for a cable of its own
    number: int  # the last part of its addresses
    subnets: tuple[Subnet, ...]  # one per family of the hosts

    def address(self, family: Family) -> str:
        """Return its address; LabError when the lab has none of that family."""
        return self._subnet(family).address(self.number)

    def gateway(self, family: Family) -> str:
        """Return the router's address on its subnet."""
        return self._subnet(family).address(ROUTER_NUMBER)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its addresses, one per family."""
        return tuple(subnet.address(self.number) for subnet in self.subnets)

    @property
    def interfaces(self) -> tuple[str, ...]:
        """What eth0 carries, with prefix lengths, in the order to add."""
        return tuple(subnet.interface(self.number) for subnet in self.subnets)

    def _subnet(self, family: Family) -> Subnet:
        for subnet in self.subnets:
            if subnet.family is family:
                return subnet
        raise LabError(f"{self.name} has no {title(family)} address in this lab")


@dataclass(frozen=True, slots=True)
class Node(Host):
    """A host that runs a daemon."""

    index: int  # node1 is 1
    families: tuple[Family, ...]  # of its pods

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """The node's pod ranges, one per family."""
        return tuple(NODE_POD_CIDR[family].format(self.index) for family in self.families)

    def range_address(self, family: Family) -> str:
        """Return the address of the pod range itself: the node's own, by which far pods see it."""
        return NODE_POD_CIDR[family].format(self.index).partition("/")[0]

    def pod_gateway(self, family: Family) -> str:
        """Return the first address of the pod range: the bridge's own in bridge mode."""
        return self.range_address(family).removesuffix("0") + "1"

    def second(self, family: Family) -> str:
        """Return another local address of eth0, to show that any will do."""
        return self._subnet(family).address(self.number + 100)

    @property
    def egress(self) -> tuple[str, ...]:
        """What its pods' packets to the outside are from, if not its usual addresses: node2 shows that."""
        return tuple(self.second(subnet.family) for subnet in self.subnets) if self.index == 2 else ()

    @property
    def interfaces(self) -> tuple[str, ...]:
        """What eth0 carries, in the order to add: the last `address` of a family is what it sends from.

        Of several equally good addresses IPv4 prefers the oldest and IPv6 the newest.
        """
        found: list[str] = []
        for subnet in self.subnets:
            both = [subnet.interface(self.number), subnet.interface(self.number + 100)]
            found += both if subnet.family is Family.V4 else reversed(both)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class RouterPort:
    """An interface of the router that carries addresses: a segment's bridge, or a cable's end."""

    name: str
    addresses: tuple[str, ...]  # with prefix length
    bridge: bool


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole lab as a value; make it with `plan`.

    Addresses do not depend on `proxy_mode`: `replace` makes the same lab with another one. `apart` gives it
    machines.
    """

    name: str
    mode: Mode
    ip_family: IpFamily
    underlay: IpFamily
    backend: Backend
    nodes: tuple[Node, ...]
    others: tuple[Host, ...]  # neighbour, internet, client
    proxy_mode: ProxyMode = ProxyMode.NFTABLES
    driver: Driver = Driver.NETNS

    @property
    def families(self) -> tuple[Family, ...]:
        """The IP families that pods and services have."""
        return self.ip_family.families

    @property
    def shared(self) -> tuple[Family, ...]:
        """The families that pods and hosts have: without translation they can meet in these only."""
        return tuple(family for family in self.families if family in self.underlay.families)

    @property
    def about(self) -> str:
        """What kind of lab it is, in words."""
        over = f" over {titles(self.underlay.families)}" if self.underlay is not self.ip_family else ""
        pods = f"{self.mode.value} pods, {titles(self.families)}{over}"
        on = (
            ""
            if self.driver is Driver.NETNS
            else f", on {len(self.machines)} machines by {self.driver.value}"
        )
        return f"{pods}, backend {self.backend.value}, proxy mode {self.proxy_mode.value}{on}"

    def tunnelled(self, one: Node, other: Node, family: Family) -> bool:
        """Whether pods' packets of a family go from one node to another inside others.

        Backend auto does without a tunnel on one segment; by an IPv6 address also IPv4 is sent there, but not
        the other way round.
        """
        if self.backend is Backend.AUTO:
            lacking = family is Family.V6 and Family.V6 not in self.underlay.families
            return one.segment != other.segment or (lacking and one != other)
        return self.backend is Backend.VXLAN and one != other

    @property
    def prefix(self) -> str:
        """What the names of all namespaces of this lab begin with."""
        return namespace_prefix(self.name)

    @property
    def router(self) -> str:
        """The router's namespace."""
        return f"{self.prefix}router" if self.driver is Driver.NETNS else OWN

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines of a lab that has some, the router first."""
        return ("router", *(node.name for node in self.nodes), "client")

    def machine(self, place: str) -> str:
        """Return the machine of the router or a host; `internet` and `neighbour` are on the router's."""
        return place if place in self.machines else "router"

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Every namespace but the router's and the pods'."""
        return (*self.nodes, *self.others)

    @property
    def router_ports(self) -> tuple[RouterPort, ...]:
        """The router's addressed interfaces, segments first."""
        ports = {
            host.segment or host.name: RouterPort(
                host.segment or host.name,
                tuple(subnet.interface(ROUTER_NUMBER) for subnet in host.subnets),
                bool(host.segment),
            )
            for host in self.hosts
        }
        return tuple(sorted(ports.values(), key=lambda port: (not port.bridge, port.name)))

    @property
    def far_nodes(self) -> int:
        """How many nodes are across the router from node1."""
        return sum(node.segment != self.nodes[0].segment for node in self.nodes)

    def host(self, name: str) -> Host:
        """Return the node or other host of that name, or raise LabError naming those there are."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabError(
            f"lab {self.name} has no host {name!r}; it has {', '.join(h.name for h in self.hosts)}"
        )

    def node(self, name: str) -> Node:
        """Return the node of that name, or raise LabError naming those there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(
            f"lab {self.name} has no node {name!r}; it has {', '.join(n.name for n in self.nodes)}"
        )

    def pod_namespace(self, node: str, pod: str) -> str:
        """The network namespace of a pod."""
        return f"{self.prefix}{node}-{pod}"


def namespace_prefix(lab: str) -> str:
    """What the names of all namespaces of the lab begin with, whether it exists or not."""
    return f"pw-{lab}-"


def plan(
    name: str,
    nodes: int = 3,
    far: int | None = None,
    mode: Mode = Mode.ROUTED,
    ip_family: IpFamily = IpFamily.IPV4,
    between: Between = Between(),
) -> Topology:
    """Return the plan of a lab of `nodes` nodes of which the last `far` are across the router.

    `far` None means one when there are three nodes or more. Raises LabError for what cannot be built.
    """
    if not LAB_NAME.fullmatch(name):
        raise LabError(f"lab name {name!r} must be 1 to 20 lower-case letters and digits")
    if not 1 <= nodes <= MAX_NODES:
        raise LabError(f"--nodes {nodes} must be from 1 to {MAX_NODES}")
    if far is None:
        far = 1 if nodes >= 3 else 0
    if not 0 <= far < nodes:
        raise LabError(f"--far {far} must be from 0 to {nodes - 1}: node1 is on the near segment")
    underlay = between.underlay or ip_family
    lacking = [family for family in ip_family.families if family not in underlay.families]
    if between.backend is Backend.DIRECT and far and lacking:
        raise LabError(
            f"--backend direct to nodes across the router needs hosts with {titles(lacking)} addresses"
        )
    segments = ["lan1" if i > nodes - far else "lan0" for i in range(1, nodes + 1)]
    return Topology(
        name,
        mode,
        ip_family,
        underlay,
        between.backend,
        tuple(
            Node(
                f"node{i}",
                f"{namespace_prefix(name)}node{i}",
                segment,
                10 + i,
                _subnets(segment, underlay.families),
                i,
                ip_family.families,
            )
            for i, segment in enumerate(segments, 1)
        ),
        tuple(_others(name, underlay.families)),
    )


def apart(plan: Topology, driver: Driver) -> Topology:
    """Return the same lab on machines: nodes, router and client each have one."""

    def own(host: Host) -> str:
        return OWN if host.name in plan.machines else host.namespace

    return replace(
        plan,
        driver=driver,
        nodes=tuple(replace(node, namespace=own(node)) for node in plan.nodes),
        others=tuple(replace(host, namespace=own(host)) for host in plan.others),
    )


def _others(lab: str, families: tuple[Family, ...]) -> Iterator[Host]:
    prefix = namespace_prefix(lab)
    yield Host("neighbour", f"{prefix}neighbour", "lan0", 250, _subnets("lan0", families))
    for name in ("internet", "client"):
        yield Host(name, f"{prefix}{name}", "", 10, _subnets(name, families))


def _subnets(place: str, families: tuple[Family, ...]) -> tuple[Subnet, ...]:
    return tuple(Subnet(family, SUBNETS[place][family]) for family in families)
