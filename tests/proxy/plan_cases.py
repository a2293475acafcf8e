"""The packet-trace table: every group names the Kubernetes documentation that its expectations come from.

plan.py has the addresses and services, plan_lines.py says how to read a line. KEP numbers are those of
kubernetes/enhancements.
"""

from __future__ import annotations

from tests.proxy.plan import ONLY_V4, ONLY_V6
from tests.proxy.plan_lines import group, sctp, sticky, tcp, udp

CLUSTER_IPS = group(
    "Cluster addresses",
    '"Service" (type: ClusterIP), "Virtual IPs and Service Proxies", "Using Source IP" (type=ClusterIP)',
    tcp("a pod reaches a pod of another node", "pod1 > one:80", "pod2"),
    tcp("the client's address is kept between pods", "pod1b > two:80", "pod1 pod2"),
    tcp("a pod of another node by this one", "pod2b > one:80", "pod2"),
    tcp("four endpoints, each possible", "pod1c > four:80", "pod1 pod1b pod2 pod2b"),
    tcp("the node itself, masqueraded as no pod", "node1 > two:80", "pod1 pod2", "masq"),
    tcp("the node's second address", "second1 > two:80", "pod1 pod2", "masq"),
    tcp("another node, masqueraded", "node2 > one:80", "pod2", "masq"),
    tcp("an outside client, masqueraded", "client > two:80", "pod1 pod2", "masq"),
    tcp("an endpoint in another node's network", "pod1 > host:80", "node2"),
    tcp("an endpoint in this node's network", "pod1 > host-here:80", "node1"),
    tcp("the node to an endpoint in its own network", "node1 > host-here:80", "node1", "masq"),
    udp("UDP: a pod keeps its address", "pod1b > udp:53", "pod1:5353 pod2:5353"),
    udp("UDP: the node itself", "node1 > udp:53", "pod1:5353 pod2:5353", "masq"),
    udp("UDP: another node", "node2 > udp:53", "pod1:5353 pod2:5353", "masq"),
    udp("UDP: an outside client", "client > udp:53", "pod1:5353 pod2:5353", "masq"),
)

PORTS = group(
    "Several ports, named ports, protocols",
    '"Service" (multi-port Services, protocols), "EndpointSlices" (ports are those of their slice)',
    tcp("a named port", "pod1b > ports:80", "pod1"),
    udp("the same number for UDP", "pod1b > ports:53", "pod2:5353"),
    tcp("the same number for TCP", "pod1b > ports:53", "pod2b:5354"),
    tcp("a named node port", "client > node1:30006", "pod1", "masq"),
    udp("the same node port for UDP", "client > node1:30056", "pod2:5353", "masq"),
    tcp("the same node port for TCP", "client > node1:30056", "pod2b:5354", "masq"),
    tcp("slices of one service with different ports", "pod1b > slices:80", "pod1 pod2 pod2:9090 pod2b:9090"),
)

FAMILIES = group(
    "Services of one family, and of both",
    '"IPv4/IPv6 dual-stack", KEP-563; that every line here has an IPv6 twin tests the rest',
    tcp("an IPv4 service", "pod1b > only-v4:80", "pod1", families=ONLY_V4),
    tcp("its node port in IPv4", "client > node1:30040", "pod1", "masq", ONLY_V4),
    tcp("in IPv6 that port is the node's own", "client > node1:30040", "node1:30040", families=ONLY_V6),
    tcp("an IPv6 service", "pod1b > only-v6:80", "pod2", families=ONLY_V6),
    tcp("its node port in IPv6", "client > node1:30041", "pod2", "masq", ONLY_V6),
    tcp("in IPv4 that port is the node's own", "client > node1:30041", "node1:30041", families=ONLY_V4),
    tcp("endpoints in IPv4 only: served there", "pod1b > half:80", "pod2", families=ONLY_V4),
    tcp("endpoints in IPv4 only: refused in IPv6", "pod1b > half:80", "reject", families=ONLY_V6),
    tcp("and at the node port in IPv6", "client > node1:30042", "reject", families=ONLY_V6),
)

OTHER_PORTS = group(
    "Ports that no service has",
    '"Virtual IPs and Service Proxies" (nftables proxy mode), KEP-3866 (unused ports of cluster addresses)',
    tcp("a cluster address's other port is refused", "pod1 > one:81", "reject"),
    tcp("for the node itself", "node1 > one:81", "reject"),
    tcp("for another node", "node2 > one:81", "reject"),
    tcp("for an outside client", "client > one:81", "reject"),
    udp("UDP on another port", "pod1 > one:53", "reject"),
    udp("UDP on another port from the node", "node1 > one:53", "reject"),
    udp("another protocol on the port", "pod1 > two:80", "reject"),
    tcp("another protocol on a UDP port", "pod1 > udp:53", "reject"),
    tcp("a node port's number at the cluster address", "pod1 > two:30002", "reject"),
    tcp("the endpoints' number at the cluster address", "pod1 > two:8080", "reject"),
    tcp("an address that no service has goes its way", "client > nobody:80", "nobody:80"),
    tcp("from a pod it goes out as any other", "pod1 > nobody:80", "nobody:80", "masq"),
    udp("and UDP", "pod1 > nobody:53", "nobody:53", "masq"),
)

NO_ENDPOINTS = group(
    "No endpoints",
    '"Service" (Services without endpoints), "Virtual IPs and Service Proxies", KEP-3866 (rejected at once)',
    tcp("TCP is refused", "pod1 > none:80", "reject"),
    udp("UDP is refused", "pod1 > none:53", "reject"),
    tcp("for the node", "node1 > none:80", "reject"),
    udp("UDP for the node", "node1 > none:53", "reject"),
    tcp("for an outside client", "client > none:80", "reject"),
    tcp("at the node port", "client > node1:30005", "reject"),
    udp("UDP at the node port", "client > node1:30055", "reject"),
    tcp("at the node port, from a pod", "pod1 > node1:30005", "reject"),
    tcp("at the node port, from the node", "node1 > node1:30005", "reject"),
    tcp("at the external address", "client > none/external:80", "reject"),
    udp("UDP at the external address", "client > none/external:53", "reject"),
    tcp("at the load balancer's address", "client > none/balancer:80", "reject"),
    udp("UDP at the load balancer's address", "client > none/balancer:53", "reject"),
    tcp("at the external address, from a pod", "pod1 > none/external:80", "reject"),
    tcp("at the external address, from the node", "node1 > none/external:80", "reject"),
    tcp("external Local, none anywhere: node port", "client > node1:30014", "reject"),
    tcp("external Local, none anywhere: external address", "client > outside-none/external:80", "reject"),
    tcp("external Local, none anywhere: balancer, from a pod", "pod1 > outside-none/balancer:80", "reject"),
    tcp("internal Local, none anywhere", "pod1 > inside-none:80", "reject"),
    tcp("only unready ones", "pod1b > unready:80", "reject"),
    tcp("only unready ones: node port", "client > node1:30018", "reject"),
    tcp("only unready ones: external address", "client > unready/external:80", "reject"),
)

READINESS = group(
    "Which endpoints count",
    '"EndpointSlices" (conditions), "Virtual IPs and Service Proxies" (terminating endpoints), KEP-1669',
    tcp("nobody ready: those that terminate and serve", "pod1b > draining:80", "pod2"),
    tcp("and at the node port", "client > node1:30011", "pod2", "masq"),
    tcp("somebody ready: only ready ones", "pod1b > half-ready:80", "pod1"),
    tcp("terminating and not serving: never", "pod1b > gone:80", "reject"),
    tcp("ready as published, whatever else", "pod1b > published:80", "pod1"),
)

INTERNAL_POLICY = group(
    "internalTrafficPolicy Local",
    '"Service Internal Traffic Policy", "Virtual IPs and Service Proxies" (Traffic policies), '
    "KEP-2086, KEP-1669",
    tcp("only endpoints of this node", "pod1b > inside:80", "pod1"),
    tcp("for the node itself", "node1 > inside:80", "pod1", "masq"),
    tcp("for whoever comes to this node", "client > inside:80", "pod1", "masq"),
    tcp("none here: dropped", "pod1b > inside-away:80", "drop"),
    tcp("none here: dropped for the node too", "node1 > inside-away:80", "drop"),
    tcp("none here: dropped for an outside client", "client > inside-away:80", "drop"),
    udp("none here: UDP is dropped", "pod1b > udp-local:53", "drop"),
    tcp("the one here is terminating but serves", "pod1b > inside-draining:80", "pod1"),
    tcp("the one here is not ready: dropped", "pod1b > inside-unready:80", "drop"),
    tcp("its other ports are refused", "pod1b > inside-away:81", "reject"),
    tcp("it does not count at the external address", "client > both-local/external:80", "pod1"),
    tcp("nor for pods there", "pod1b > both-local/external:80", "pod1 pod2"),
    tcp("external Local does not count at the cluster address", "pod1b > outside:80", "pod1 pod2"),
    tcp("nor where that has none here", "pod1b > outside-away:80", "pod2 pod2b"),
)

NODE_PORTS = group(
    "Node ports",
    '"Service" (type: NodePort), "Using Source IP" (type=NodePort), KEP-3866 (addresses, no loopback)',
    tcp("masqueraded", "client > node1:30002", "pod1 pod2", "masq"),
    udp("UDP", "client > node1:30003", "pod1:5353 pod2:5353", "masq"),
    tcp("from a pod of this node", "pod1b > node1:30002", "pod1 pod2", "masq"),
    tcp("from a pod of another node", "pod2b > node1:30002", "pod1 pod2", "masq"),
    tcp("from another node", "node2 > node1:30002", "pod1 pod2", "masq"),
    tcp("from the node itself", "node1 > node1:30002", "pod1 pod2", "masq"),
    udp("UDP from the node itself", "node1 > node1:30003", "pod1:5353 pod2:5353", "masq"),
    tcp("to an endpoint in another node's network", "client > node1:30013", "node2", "masq"),
    tcp("to one in this node's network: nothing to replace", "client > node1:30017", "node1"),
    tcp("on another address that is selected", "client > second1:30002", "pod1 pod2", "masq"),
    tcp("not on an address that is not selected", "client > alias1:30002", "alias1:30002"),
    udp("UDP not there either", "client > alias1:30003", "alias1:30003"),
    tcp("not there from a pod", "pod1 > alias1:30002", "alias1:30002"),
    tcp("not there from the node", "node1 > alias1:30002", "alias1:30002"),
    tcp("never on loopback, though selected", "loopback > loopback:30002", "loopback:30002"),
    udp("UDP never on loopback", "loopback > loopback:30003", "loopback:30003"),
    tcp("not on a selected address of another node", "client > second2:30002", "second2:30002"),
    tcp("not on another node's own", "client > node2:30002", "node2:30002"),
    tcp("not on a pod's address", "client > pod1:30002", "pod1:30002"),
    tcp("not on a pod's address, from a pod", "pod1b > pod1:30002", "pod1:30002"),
    udp("another protocol is the node's own", "client > node1:30002", "node1:30002"),
    tcp("a number that no service has is the node's own", "client > node1:80", "node1:80"),
    tcp("allocateLoadBalancerNodePorts false (KEP-1864)", "client > node1:30034", "node1:30034"),
)

EXTERNAL = group(
    "External and load balancers' addresses",
    '"Service" (external IPs, type: LoadBalancer), "Using Source IP" (type=LoadBalancer), KEP-1860 (ipMode)',
    tcp("an external address", "client > two/external:80", "pod1 pod2", "masq"),
    tcp("from a pod", "pod1b > two/external:80", "pod1 pod2", "masq"),
    tcp("from a pod of another node", "pod2b > two/external:80", "pod1 pod2", "masq"),
    tcp("from the node", "node1 > two/external:80", "pod1 pod2", "masq"),
    tcp("from another node", "node2 > two/external:80", "pod1 pod2", "masq"),
    udp("UDP", "client > udp/external:53", "pod1:5353 pod2:5353", "masq"),
    tcp("a balancer's address", "client > two/balancer:80", "pod1 pod2", "masq"),
    tcp("a balancer's, from a pod", "pod1b > two/balancer:80", "pod1 pod2", "masq"),
    tcp("a balancer's, from the node", "node1 > two/balancer:80", "pod1 pod2", "masq"),
    tcp("a balancer's, from another node", "node2 > two/balancer:80", "pod1 pod2", "masq"),
    udp("UDP at a balancer's", "client > udp/balancer:53", "pod1:5353 pod2:5353", "masq"),
    tcp(
        "a balancer's without node ports (KEP-1864)", "client > no-node-port/balancer:80", "pod1 pod2", "masq"
    ),
    tcp("an external address that the node has", "client > alias1:81", "pod2", "masq"),
    tcp("the same from the node", "node1 > alias1:81", "pod2", "masq"),
    tcp("other ports of an external address go their way", "client > two/external:81", "two/external:81"),
    udp("other protocols of it too", "client > two/external:80", "two/external:80"),
    tcp("other ports from a pod go out", "pod1 > two/external:81", "two/external:81", "masq"),
    tcp("other ports of a balancer's address", "client > two/balancer:81", "two/balancer:81"),
    tcp("a node port's number there", "client > two/balancer:30002", "two/balancer:30002"),
    tcp("claimed twice: the first by name has it", "client > claim-a/external:80", "pod1", "masq"),
    tcp("claimed twice: from a pod", "pod1b > claim-a/external:80", "pod1", "masq"),
    tcp("the other one keeps its other port", "client > claim-b/external:81", "pod2:9090", "masq"),
    tcp("and its cluster address", "pod1b > claim-b:80", "pod2"),
)

SOURCE_RANGES = group(
    "loadBalancerSourceRanges",
    '"Service" API reference (loadBalancerSourceRanges: traffic "restricted to the specified client IPs")',
    tcp("a client in a range", "client > ranged/balancer:80", "pod1 pod2", "masq"),
    tcp("a client in none: dropped", "stranger > ranged/balancer:80", "drop"),
    tcp("a pod in none", "pod1b > ranged/balancer:80", "drop"),
    tcp("the node in none", "node1 > ranged/balancer:80", "drop"),
    tcp("another node in none", "node2 > ranged/balancer:80", "drop"),
    tcp("they do not count at the cluster address", "stranger > ranged:80", "pod1 pod2", "masq"),
    tcp("nor there for a pod", "pod1b > ranged:80", "pod1 pod2"),
    tcp("nor at the node port", "stranger > node1:30035", "pod1 pod2", "masq"),
    tcp("nor at the external address", "stranger > ranged/external:80", "pod1 pod2", "masq"),
    tcp("nor for other ports", "stranger > ranged/balancer:81", "ranged/balancer:81"),
    tcp("ranges of IPv4 let IPv4 in", "client > ranged-v4/balancer:80", "pod2", "masq", ONLY_V4),
    tcp("ranges of IPv4 let no IPv6 in", "client > ranged-v4/balancer:80", "drop", "", ONLY_V6),
    tcp("and do not count for its IPv6 cluster address", "pod1b > ranged-v4:80", "pod2", "", ONLY_V6),
    tcp("a range of everybody", "stranger > ranged-everyone/balancer:80", "pod2", "masq"),
    tcp("external Local: in a range, local, kept", "client > ranged-local/balancer:80", "pod1"),
    tcp("external Local: a pod in a range, all", "pod1b > ranged-local/balancer:80", "pod1 pod2"),
    tcp("external Local: a client in none", "stranger > ranged-local/balancer:80", "drop"),
    tcp("external Local: the node in none", "node1 > ranged-local/balancer:80", "drop"),
)

EXTERNAL_POLICY = group(
    "externalTrafficPolicy Local",
    '"Virtual IPs and Service Proxies" (Traffic policies), "Using Source IP" (NodePort, LoadBalancer), '
    '"Create an External Load Balancer" (Preserving the client source IP), KEP-1669',
    tcp("node port: endpoints of this node, address kept", "client > node1:30009", "pod1"),
    tcp("node port at the second address", "client > second1:30009", "pod1"),
    tcp("node port: from another node as from outside", "node2 > node1:30009", "pod1"),
    tcp("node port: a pod reaches all, address kept", "pod1b > node1:30009", "pod1 pod2"),
    tcp("node port: a pod of another node, masqueraded", "pod2b > node1:30009", "pod1 pod2", "masq"),
    tcp("node port: the node reaches all", "node1 > node1:30009", "pod1 pod2", "masq"),
    tcp("external address: local, kept", "client > outside/external:80", "pod1"),
    tcp("external address: a pod reaches all, kept", "pod1b > outside/external:80", "pod1 pod2"),
    tcp("external address: the node reaches all", "node1 > outside/external:80", "pod1 pod2", "masq"),
    tcp("balancer's address: local, kept", "client > outside/balancer:80", "pod1"),
    tcp("balancer's address: a pod reaches all, kept", "pod1b > outside/balancer:80", "pod1 pod2"),
    tcp("balancer's address: the node reaches all", "node1 > outside/balancer:80", "pod1 pod2", "masq"),
    tcp("balancer's address: another node as from outside", "node2 > outside/balancer:80", "pod1"),
    tcp("none here: dropped at the node port", "client > node1:30010", "drop"),
    tcp("none here: for another node too", "node2 > node1:30010", "drop"),
    tcp("none here: dropped at the external address", "client > outside-away/external:80", "drop"),
    tcp("none here: dropped at the balancer's", "client > outside-away/balancer:80", "drop"),
    udp("none here: UDP is dropped", "client > node1:30049", "drop"),
    tcp("none here: a pod reaches all at the node port", "pod1b > node1:30010", "pod2 pod2b"),
    udp("none here: a pod by UDP", "pod1b > node1:30049", "pod2:5353"),
    tcp("none here: a pod at the external address", "pod1b > outside-away/external:80", "pod2 pod2b"),
    tcp("none here: a pod at the balancer's", "pod1b > outside-away/balancer:80", "pod2 pod2b"),
    tcp("none here: the node at the node port", "node1 > node1:30010", "pod2 pod2b", "masq"),
    tcp("none here: the node at the balancer's", "node1 > outside-away/balancer:80", "pod2 pod2b", "masq"),
    tcp("the one here is terminating but serves", "client > node1:30021", "pod1"),
    tcp("the same at the balancer's address", "client > outside-draining/balancer:80", "pod1"),
    tcp("a pod then reaches ready ones only", "pod1b > node1:30021", "pod2"),
    tcp("the one here is not ready: dropped", "client > node1:30047", "drop"),
    tcp("only a terminating one elsewhere: dropped", "client > node1:30048", "drop"),
    tcp("only a terminating one elsewhere: a pod reaches it", "pod1b > node1:30048", "pod2"),
)

HINTS = group(
    "Hints: zones and nodes",
    '"Topology Aware Routing" (safeguards), "Service" (traffic distribution), "EndpointSlices" (hints), '
    "KEP-2433, KEP-3015",
    tcp("endpoints hinted for this zone", "pod1b > zone:80", "pod1"),
    tcp("for the node", "node1 > zone:80", "pod1", "masq"),
    tcp("at the node port", "client > node1:30024", "pod1", "masq"),
    tcp("one endpoint without a hint: all", "pod1b > zone-missing:80", "pod1 pod2"),
    tcp("no hint for this zone: all", "pod1b > zone-away:80", "pod1 pod2"),
    tcp("an endpoint hinted for several zones", "pod1b > zones:80", "pod1 pod2b"),
    tcp("hints of those not ready do not count", "pod1b > zone-draining:80", "pod2"),
    tcp("hints for this node go first", "pod1b > node-hint:80", "pod1"),
    tcp("none for this node: those for its zone", "pod1b > node-hint-away:80", "pod2b"),
    tcp("internal Local: whatever the hints", "pod1b > zone-local:80", "pod1"),
    tcp("external Local: whatever the hints", "client > node1:30029", "pod1"),
    tcp("external Local, a pod: by the hints", "pod1b > node1:30029", "pod2"),
)

AFFINITY = group(
    "sessionAffinity ClientIP",
    '"Virtual IPs and Service Proxies" (Session affinity), "Service" API reference (sessionAffinity)',
    sticky(tcp("a pod", "pod1c > sticky:80", "pod1 pod1b pod2")),
    sticky(tcp("a pod of another node", "pod2b > sticky:80", "pod1 pod1b pod2")),
    sticky(tcp("the node", "node1 > sticky:80", "pod1 pod1b pod2", "masq")),
    sticky(tcp("an outside client", "client > sticky:80", "pod1 pod1b pod2", "masq")),
    sticky(tcp("at the node port", "stranger > node1:30031", "pod1 pod1b pod2", "masq")),
    sticky(tcp("at the external address", "node2 > sticky/external:80", "pod1 pod1b pod2", "masq")),
    sticky(tcp("at the balancer's address", "stranger > sticky/balancer:80", "pod1 pod1b pod2", "masq")),
    sticky(udp("UDP", "pod1c > sticky-udp:53", "pod1:5353 pod1b:5353 pod2:5353")),
    sticky(udp("UDP at the node port", "client > node1:30032", "pod1:5353 pod1b:5353 pod2:5353", "masq")),
    sticky(tcp("external Local", "client > node1:30033", "pod1 pod1b")),
    sticky(tcp("external Local, a pod", "pod1c > node1:30033", "pod1 pod1b pod2")),
    sticky(tcp("internal Local", "pod1c > sticky-inside:80", "pod1 pod1b")),
)

MASQUERADE = group(
    "Hairpin and egress",
    '"Debug Services" (a Pod fails to reach itself via the Service IP), "IP Masquerade Agent User Guide"',
    tcp("a pod that reaches itself is masqueraded", "pod1 > ports:80", "pod1", "masq"),
    tcp("one of two: only on the way to itself", "pod1 > two:80", "pod1 pod2", "pod1"),
    udp("UDP", "pod1 > udp:53", "pod1:5353 pod2:5353", "pod1:5353"),
    tcp("itself at the node port under policy Local", "pod1 > node1:30016", "pod1", "masq"),
    tcp("itself by the external address", "pod1 > outside/external:80", "pod1 pod2", "pod1"),
    tcp("a pod without service is not touched", "pod1 > pod2:8080", "pod2"),
    tcp("nor one of the same node", "pod1 > pod1b:8080", "pod1b"),
    tcp("nor from outside", "client > pod2:8080", "pod2"),
    tcp("the node to a pod", "node1 > pod2:8080", "pod2"),
    tcp("a pod to the outside is masqueraded", "pod1 > client:80", "client:80", "masq"),
    udp("a pod to the outside by UDP", "pod1 > client:53", "client:53", "masq"),
    tcp("a pod to a range that is not masqueraded", "pod1 > stranger:80", "stranger:80"),
    tcp("a pod to another node keeps its address", "pod1 > node2:80", "node2:80"),
    tcp("a pod to this node", "pod1 > node1:80", "node1:80"),
    tcp("a pod to what is in no Node object", "pod1 > second2:80", "second2:80", "masq"),
    tcp("another node's pod is that node's to masquerade", "pod2 > client:80", "client:80"),
    tcp("the node to the outside keeps its address", "node1 > client:80", "client:80"),
    tcp("somebody else's traffic through the node", "client > node2:80", "node2:80"),
)

GROUPS = (
    CLUSTER_IPS, PORTS, FAMILIES, OTHER_PORTS, NO_ENDPOINTS, READINESS, INTERNAL_POLICY, NODE_PORTS,
    EXTERNAL, SOURCE_RANGES, EXTERNAL_POLICY, HINTS, AFFINITY, MASQUERADE,
)  # fmt: skip
CASES = tuple(one for found in GROUPS for one in found.cases)
"""Run against the model and on the kernel."""

MODEL_ONLY = group(
    "SCTP, for the model only: few kernels have its sockets",
    '"Service" (protocols), "Supported protocols" (SCTP)',
    sctp("a cluster address", "pod1b > sctp:80", "pod1 pod2"),
    sctp("a pod that reaches itself", "pod1 > sctp:80", "pod1 pod2", "pod1"),
    sctp("the node", "node1 > sctp:80", "pod1 pod2", "masq"),
    sctp("a node port", "client > node1:30044", "pod1 pod2", "masq"),
    sctp("an external address", "client > sctp/external:80", "pod1 pod2", "masq"),
    sctp("a balancer's address", "client > sctp/balancer:80", "pod1 pod2", "masq"),
    sctp("no endpoints", "pod1b > sctp:81", "reject"),
    sctp("no endpoints at the node port", "client > node1:30054", "reject"),
    sctp("another protocol's port", "pod1b > one:80", "reject"),
).cases
