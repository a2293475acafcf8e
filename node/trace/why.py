"""Say in a sentence why rules end a packet's way, and which object to look at. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from netlink.family import with_port
from node.trace.packet import PROTOCOLS, Packet
from node.trace.rules import Passed
from proxy.l7 import places

REFUSING = frozenset({"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "PODWIRE-REJECT"})
"""The chains of the iptables dataplane, which are kube-proxy's, where services without endpoints end."""
SLICES = "kubectl get endpointslices -n {} -l kubernetes.io/service-name={}"


@dataclass(frozen=True, slots=True)
class Front:
    """What packets can be addressed to: a service port's title ("namespace/name:port"), and its address.

    An address of "" is a node port.
    """

    service: str
    address: str
    protocol: int
    port: int
    origin: str = "any"
    action: str = "balance"
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Names:
    """What things are called: services by what packets are addressed to, pods by address."""

    fronts: tuple[Front, ...] = ()
    pods: tuple[tuple[str, str], ...] = ()

    def service(self, packet: Packet) -> str:
        """Return whose address and port a packet is addressed to; "" if no service's."""
        exact = [f for f in self.fronts if (f.protocol, f.port) == (packet.protocol, packet.dport)]
        found = next((f for f in exact if f.address == packet.destination), None)
        return (found or next((f for f in exact if not f.address), Front("", "", 0, 0))).service

    def owner(self, address: str) -> str:
        """Return the service that has an address, whatever the port; "" if none."""
        return next((f.service.partition(":")[0] for f in self.fronts if f.address == address), "")

    def pod(self, address: str) -> str:
        """Return the pod that has an address; "" if none that is known."""
        return dict(self.pods).get(address, "")


def proxy_at(address: str) -> str:
    """Return the protocol for which the node's L7 proxy listens at an address; "" where it does not."""
    found = places.protocol_at(address)
    return found.value if found else ""


def nothing(toward: str) -> str:
    """Say that a way goes on where nothing is known."""
    return f"what {toward} does with it is not known here"


def reason_of(names: Names, place: str, passed: Passed, packet: Packet) -> tuple[str, str]:
    """Return why a chain ended a packet's way, and what to look at."""
    chain, comment = passed.last
    *table, name = chain.split(" ")
    title = names.service(packet)
    target = (
        f"{with_port(packet.destination, packet.dport)}/{PROTOCOLS.get(packet.protocol, packet.protocol)}"
    )
    match table[-1:], name:
        case ["podwire"], "reject_no_endpoints":
            return _rejected(names, title, packet, target)
        case _, "KUBE-PROXY-FIREWALL":
            return _not_for(packet, title, target)
        case _, name if name in REFUSING:
            title = title or comment.partition(" has no ")[0]
            rejected = passed.ruling.value == "reject"
            return _rejected(names, title, packet, target) if rejected else _no_local(title, target, place)
        case ["podwire"], _ if passed.ruling.value == "drop" and "load balancer" in comment:
            return _not_for(packet, title, target)
        case ["podwire"], _ if passed.ruling.value == "drop":
            return _no_local(title, target, place)
        case ["podwire_pods"], "pod" | "pod_upper" | "prerouting":
            pod = names.pod(packet.source)
            reason = f"the guard of pods drops it: {comment} ({packet.source} by {packet.iif})"
            namespace, _, name = pod.partition("/")
            return reason, f"kubectl get pod {name} -n {namespace} -o wide" if name else "podwire pods"
        case ["podwire_tunnels"], _:
            return f"the guard of tunnels drops it: {comment}", "podwire routes"
    words = f"chain {chain} of {place} {'rejects' if passed.ruling.value == 'reject' else 'drops'} it"
    words += f": {comment}" if comment else ""
    if passed.xtables:
        return words, f"{passed.xtables} -t {table[-1]} -S {name}"
    return words, f"nft list chain {chain}"


def _not_for(packet: Packet, title: str, target: str) -> tuple[str, str]:
    reason = f"{packet.source} is not in the loadBalancerSourceRanges of service {title or target}"
    return reason, _service(title)


def _no_local(title: str, target: str, place: str) -> tuple[str, str]:
    reason = f"service {title or target} has the traffic policy Local and no endpoint on {place}"
    return reason, _slices(title)


def _rejected(names: Names, title: str, packet: Packet, target: str) -> tuple[str, str]:
    if title:
        return f"service {title} has no ready endpoints for {target}", _slices(title)
    owner = names.owner(packet.destination)
    if owner:
        protocol = PROTOCOLS.get(packet.protocol, packet.protocol)
        return f"service {owner} has no port {packet.dport}/{protocol}", _service(owner)
    return f"the service with {target} has no ready endpoints, or no such port", "podwire frontends"


def _slices(title: str) -> str:
    namespace, _, name = title.partition(":")[0].partition("/")
    return SLICES.format(namespace, name) if name else "podwire frontends"


def _service(title: str) -> str:
    namespace, _, name = title.partition(":")[0].partition("/")
    return f"kubectl get service {name} -n {namespace} -o yaml" if name else "podwire frontends"
