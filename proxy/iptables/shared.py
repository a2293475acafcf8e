"""The chains that all services share, and the way out of this node's pods: ranges, entries → rules. Pure.

Ranges are joined where they touch, so that most clusters' podCIDRs are a few rules. A packet meets them only
where they decide: the first of a connection to a service whose client is no pod of this node, or on its way
out of a pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from netlink.family import Family
from proxy.dataplane import NodeRanges
from proxy.iptables.names import (
    CLUSTER_ADDRESSES,
    EXTERNAL_SERVICES,
    FORWARD,
    MARK_MASQ,
    MARK_OFF_CLUSTER,
    MARK_OTHER_PODS,
    NAT_NODEPORTS,
    NAT_POSTROUTING,
    NAT_SERVICES,
    NODEPORTS,
    POD_OUTSIDE,
    POD_POSTROUTING,
    PROXY_FIREWALL,
    REJECT,
    SERVICES,
    ChainId,
)
from proxy.iptables.rules import Setting
from proxy.iptables.text import (
    MASQUERADE_MARK,
    Chains,
    Jump,
    Rules,
    comment,
    host,
    joined,
    reject,
    rule,
    within,
    without,
)
from proxy.l7 import places

ENTRY_CHAINS = (NAT_SERVICES, NAT_NODEPORTS, PROXY_FIREWALL, SERVICES, EXTERNAL_SERVICES)
"""The chains that hold rules of service ports."""
NODEPORTS_LAST = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
RETURN = "RETURN"
OWN_TRAFFIC = Jump(
    "nat",
    "OUTPUT",
    rule(
        comment("podwire: what the L7 proxy sends is never translated"),
        f"-m owner --gid-owner {places.OWNER} -j {RETURN}",
    ),
    RETURN,
)
"""What keeps the L7 proxy's connections from coming back to it; always there, whether it runs or not."""
_MARK = f"{MASQUERADE_MARK:#x}"


def setting(family: Family, ranges: NodeRanges, *, terse: bool, port: int = places.PORT) -> Setting:
    """Return what of the node's ranges the rules of every service port depend on."""
    own = joined(family, ranges.node_pods)
    return Setting(family, own, tuple(_node_port_matches(family, ranges.node_ports)), terse, port)


def _node_port_matches(family: Family, selected: Iterable[str]) -> Iterator[str]:
    """Yield matches for the addresses that have node ports, loopback ones never (CVE-2020-8558)."""
    loopback = "127.0.0.0/8" if family is Family.V4 else "::1/128"
    for cidr in joined(family, selected):
        if cidr.endswith("/0"):
            yield f"! -d {loopback}"
        else:
            yield from (f"-d {rest}" for rest in without(family, cidr, loopback))


def entry_chain(chain: ChainId, entries: Iterable[Rules], setting: Setting) -> Rules:
    """Return a chain with rules of service ports; KUBE-SERVICES ends with the node ports."""
    rules = tuple(line for lines in entries for line in lines)
    if chain != NAT_SERVICES:
        return rules
    local = rule(comment(NODEPORTS_LAST), "-m addrtype --dst-type LOCAL", f"-j {NAT_NODEPORTS.name}")
    return (*rules, *(rule(match, local) for match in setting.node_ports))


def cluster_addresses(family: Family, addresses: Iterable[str]) -> Rules:
    """Return what refuses the ports of cluster addresses that no service has (KEP-3866)."""
    said = comment("a port that no service has")
    return tuple(rule(f"-d {host(family, a)}", said, f"-g {REJECT.name}") for a in sorted(addresses))


def constant_chains(family: Family, *, drop_invalid: bool) -> Mapping[ChainId, Rules]:
    """Return the chains that depend on nothing but the configuration."""
    invalid = ("-m conntrack --ctstate INVALID -j DROP",) if drop_invalid else ()
    return {
        MARK_MASQ: (f"-j MARK --set-xmark {_MARK}/{_MARK}",),
        NAT_POSTROUTING: (
            f"-m mark ! --mark {_MARK}/{_MARK} -j RETURN",
            f"-j MARK --set-xmark {_MARK}/0x0",  # xor: the mark is off
            rule(comment("kubernetes service traffic requiring SNAT"), "-j MASQUERADE --random-fully"),
        ),
        FORWARD: (
            *invalid,
            rule(comment("kubernetes forwarding rules"), f"-m mark --mark {_MARK}/{_MARK} -j ACCEPT"),
            rule(
                comment("kubernetes forwarding conntrack rule"),
                "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ),
        ),
        NODEPORTS: (),
        REJECT: (rule("-p tcp", reject(family, "tcp")), reject(family)),
    }


def range_chains(family: Family, ranges: NodeRanges) -> Chains:
    """Return the chains that depend on the ranges of nodes."""
    pods = joined(family, ranges.pod_cidrs)
    hosts = (host(family, a) for a in ranges.node_addresses if (":" in a) is (family is Family.V6))
    kept = joined(family, (*ranges.pod_cidrs, *hosts, *ranges.no_masquerade))
    leaving = joined(family, ranges.local_pod_cidrs)
    chosen = next((a for a in ranges.egress if (":" in a) is (family is Family.V6)), "")
    source = f"SNAT --to-source {chosen}" if chosen else "MASQUERADE"
    out = comment("pods to the outside")
    return {
        MARK_OFF_CLUSTER: (
            *(rule(within("-s", c), comment("a pod"), "-j RETURN") for c in pods),
            f"-j {MARK_MASQ.name}",
        ),
        MARK_OTHER_PODS: tuple(rule(within("-s", c), f"-j {MARK_MASQ.name}") for c in pods),
        POD_POSTROUTING: tuple(rule(within("-s", c), out, f"-j {POD_OUTSIDE.name}") for c in leaving),
        POD_OUTSIDE: (
            *(rule(within("-d", c), comment("pods keep their address"), "-j RETURN") for c in kept),
            rule(out, f"-j {source} --random-fully"),
        ),
    }


def jumps() -> tuple[Jump, ...]:
    """Return the rules of built-in chains that lead to ours or past them, in order, to be on top."""
    return tuple(_nat_jumps()) + tuple(_filter_jumps())


def _nat_jumps() -> Iterator[Jump]:
    yield OWN_TRAFFIC
    for chain in ("PREROUTING", "OUTPUT"):
        yield Jump(
            "nat",
            chain,
            rule(comment("kubernetes service portals"), f"-j {NAT_SERVICES.name}"),
            NAT_SERVICES.name,
        )
    for to, words in ((NAT_POSTROUTING, "kubernetes postrouting rules"), (POD_POSTROUTING, "podwire: pods")):
        yield Jump("nat", "POSTROUTING", rule(comment(words), f"-j {to.name}"), to.name)


def _filter_jumps() -> Iterator[Jump]:
    """Yield the jumps of the filter table, where connections are refused that were not translated.

    Beyond kube-proxy's: what the node itself sends to an external address is refused at once too, and so are
    ports of cluster addresses that no service has.
    """
    new = "-m conntrack --ctstate NEW"
    portals, outside = "kubernetes service portals", "kubernetes externally-visible service portals"
    firewall = (new, "kubernetes load balancer firewall", PROXY_FIREWALL)
    # Translated connections, most of all, need not look for their address among all services'.
    unused = (f"{new} -m conntrack ! --ctstate DNAT", "podwire: unused ports", CLUSTER_ADDRESSES)
    plan = {
        "INPUT": (
            firewall,
            ("", "kubernetes health check service ports", NODEPORTS),
            (new, outside, EXTERNAL_SERVICES),
            unused,
        ),
        "FORWARD": (
            firewall,
            ("", "kubernetes forwarding rules", FORWARD),
            (new, portals, SERVICES),
            (new, outside, EXTERNAL_SERVICES),
            unused,
        ),
        "OUTPUT": (firewall, (new, portals, SERVICES), (new, outside, EXTERNAL_SERVICES), unused),
    }
    for chain, wanted in plan.items():
        for state, words, to in wanted:
            yield Jump("filter", chain, rule(state, comment(words), f"-j {to.name}"), to.name)
