"""The check `foreign`: what other programs have on this node that stands in the way of pods' packets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from cni.install import CONFLIST
from cni.wiring import BRIDGE, HOST_PREFIX
from netlink.decode import Link
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.nftables.objects import PRIORITY_DSTNAT, Hook
from netlink.rtnl import Rtnl
from netlink.xtables import Variant, XtablesError, run
from node.backends.hops import Network
from node.doctor.findings import Check, Finding, Severity
from node.doctor.hooks import ChainState, Ours, Passes, Reader, legacy, passes
from node.doctor.view import VXLAN, WIREGUARD, Context, View

NAME = "foreign"
TUNNELS = ("pwvxlan", "pwwg")
CONF_DIRS = ("etc/cni/net.d", "var/lib/rancher/k3s/agent/etc/cni/net.d")
CONFIGURATIONS = (".conf", ".conflist", ".json")
"""What runtimes look for (libcni, ConfFiles); the first by name counts."""
OTHERS = {
    "flannel": re.compile(r"flannel\.\d+|flannel-v6\.\d+|cni0"),
    "Calico": re.compile(r"vxlan(-v6)?\.calico|wireguard\.cali|cali[0-9a-f]{11}"),
    "Cilium": re.compile(r"cilium_(host|net|vxlan|geneve)|lxc[0-9a-f]{12,}"),
    "Weave Net": re.compile(r"weave|vxlan-6784"),
    "kube-router": re.compile(r"kube-bridge|kube-tunnel-v[46]"),
    "Antrea": re.compile(r"antrea-(gw0|tun0|egress0)"),
}
"""Interfaces of other networks for pods."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What others have: base chains, links, and the configurations that runtimes find, by folder."""

    chains: tuple[ChainState, ...] = ()
    links: tuple[Link, ...] = ()
    configurations: tuple[tuple[str, tuple[str, ...]], ...] = ()
    port: int = 8472
    vni: int = 112
    tunnelled: bool = False
    notes: tuple[str, ...] = field(default=())
    secured: bool = False

    @property
    def ports(self) -> str:
        """The tunnels' UDP ports as programs take them that have one word for several."""
        return f"{self.port}-{self.port + 1}" if self.secured else str(self.port)


def judge(seen: Observed) -> Check:
    """Return what stands in the way."""
    findings: list[Finding] = []
    notes = list(seen.notes)
    for chain in seen.chains:
        _chain(chain, seen, findings, notes)
    findings += _configurations(seen)
    findings += _interfaces(seen)
    return Check(NAME, tuple(findings), tuple(notes))


def _chain(chain: ChainState, seen: Observed, findings: list[Finding], notes: list[str]) -> None:
    """Add what a base chain does to pods' packets."""
    where = f"chain {chain.name} of {chain.place}"
    if chain.kind == "filter" and chain.hook in (Hook.FORWARD, Hook.INPUT):
        if chain.hook == Hook.INPUT and not seen.tunnelled:
            return
        whose = "packets of pods" if chain.hook == Hook.FORWARD else _tunnels(seen)
        found = passes(chain)
        if found is Passes.NO:
            findings.append(
                Finding(f"{where} drops what no rule accepts, and none accepts {whose}", _way(chain, seen))
            )
        elif found is Passes.PERHAPS:
            notes.append(f"{where} may drop {whose}: what its sets hold was not looked at")
    elif chain.kind == "nat" and chain.hook in (Hook.PREROUTING, Hook.OUTPUT):
        if chain.priority < PRIORITY_DSTNAT and chain.steps.get(chain.name):
            notes.append(f"{where} translates before podwire does (priority {chain.priority})")
    elif chain.kind == "nat" and chain.hook == Hook.POSTROUTING:
        _sources(chain, findings)


def _tunnels(seen: Observed) -> str:
    return f"{'WireGuard' if seen.secured else 'VXLAN'} (UDP port {seen.ports})"


def _sources(chain: ChainState, findings: list[Finding]) -> None:
    """Add rules that give pods' packets another source.

    Not those behind a rule that lets some packets out before: these are mostly pods', or all without a mark.
    """
    for name, steps in chain.steps.items():
        wide = name == chain.name
        for step in steps:
            if step.verdict in ("return", "accept"):
                break
            if step.verdict != "translate" or not (
                step.ours or (wide and (step.always or step.interface_only))
            ):
                continue
            whose = "packets of pods" if step.ours else "all packets that leave, those between pods as well"
            words = f"chain {name} of {chain.place} gives the node's address to {whose}"
            remedy = (
                "take that rule away (pods.masquerade does it where needed), or except pods' ranges from it"
            )
            findings.append(Finding(words, remedy, Severity.WARNING))
            return


def _way(chain: ChainState, seen: Observed) -> str:
    """Return how packets are let pass, by whose chain it is."""
    program = "ip6tables" if "ip6 " in chain.place or "IPv6" in chain.place else "iptables"
    if "legacy" in chain.place:
        program += "-legacy"
    names = {*chain.steps, *(step.chain for steps in chain.steps.values() for step in steps)}
    if chain.hook == Hook.INPUT:
        if any(n.startswith("ufw") for n in names):
            return f"ufw allow {seen.ports.replace('-', ':')}/udp"
        if chain.table == "firewalld":
            return f"firewall-cmd --permanent --add-port={seen.ports}/udp && firewall-cmd --reload"
        if chain.table == "filter":
            return f"{program} -I INPUT -p udp --dport {seen.ports.replace('-', ':')} -j ACCEPT"
        return f"accept udp dport {seen.ports} there"
    if any(n.startswith("ufw") for n in names):
        return "ufw default allow routed"
    if chain.table == "firewalld":
        return (
            "install deploy/firewalld in /etc/firewalld, then firewall-cmd --reload (docs/install/systemd.md)"
        )
    if chain.table == "filter":
        target = "DOCKER-USER" if "DOCKER-USER" in names else "FORWARD"
        both = (f"{program} -I {target} {way} pw+ -j ACCEPT" for way in ("-i", "-o"))
        return " && ".join(both)
    return 'accept iifname "pw*" and oifname "pw*" there'


def _configurations(seen: Observed) -> list[Finding]:
    """Return which configuration the runtime takes instead of ours."""
    found = []
    for folder, names in seen.configurations:
        if CONFLIST in names and names[0] != CONFLIST:
            words = f"the runtime connects pods by /{folder}/{names[0]}, which comes before {CONFLIST}"
            found.append(Finding(words, f"move /{folder}/{names[0]} out of that folder"))
    return found


def _interfaces(seen: Observed) -> list[Finding]:
    """Return what is left of other networks for pods."""
    found = []
    for program, pattern in OTHERS.items():
        names = sorted(link.name for link in seen.links if pattern.fullmatch(link.name))
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            words = f"interfaces of {program} are there: {some}"
            remedy = f"when none of its pods runs here any more: ip link del {names[0]} (docs/migration.md)"
            found.append(Finding(words, remedy, Severity.WARNING))
    for link in seen.links:
        same = not seen.secured and link.vxlan and (link.vxlan.port, link.vxlan.vni) == (seen.port, seen.vni)
        if same and not link.name.startswith(TUNNELS):
            words = f"the VXLAN device {link.name} has podwire's UDP port {seen.port} and VNI {seen.vni}"
            found.append(Finding(words, f"ip link del {link.name}, or another network.vxlanID on all nodes"))
    return found


def configurations(context: Context) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Yield folders, and the names of the configurations there, in the order of runtimes."""
    for folder in CONF_DIRS:
        path = context.root / folder
        names = sorted(p.name for p in path.glob("*") if p.suffix in CONFIGURATIONS)
        if names:
            yield folder, tuple(names)


def look(context: Context) -> Observed:
    """Read rules, links and configurations."""
    view = context.view
    networks = _networks(view) if view else ()
    secured = bool(view and view.secured)
    port = (view.wireguard_port if secured else view.vxlan_port) if view else 8472
    notes: list[str] = []
    with Rtnl() as rtnl:
        links = rtnl.links()
    tunnelled = any(k.name.startswith(TUNNELS) for k in links)
    tunnelled = tunnelled or bool(view and any(r.backend in (VXLAN, WIREGUARD) for r in view.peers))
    ours = Ours((HOST_PREFIX, BRIDGE, *TUNNELS), networks, port)
    chains: list[ChainState] = []
    try:
        with Reader() as reader:
            chains += reader.base_chains(ours)
    except NetlinkError as error:
        notes.append(f"rules of nftables were not looked at: {error}")
    for family in Family:
        chains += _legacy(context, family, ours, notes)
    vni = view.vxlan_id if view else 112
    found = tuple(configurations(context))
    return Observed(tuple(chains), links, found, port, vni, tunnelled, tuple(notes), secured)


def _networks(view: View) -> tuple[Network, ...]:
    """Return the ranges of this node's pods, and those of all nodes in as few as there can be."""
    own = [ip_network(cidr) for cidr in view.pod_cidrs]
    every = [r.network for r in view.routes]
    four = collapse_addresses(n for n in every if isinstance(n, IPv4Network))
    six = collapse_addresses(n for n in every if isinstance(n, IPv6Network))
    return (*own, *four, *six)


def _legacy(context: Context, family: Family, ours: Ours, notes: list[str]) -> tuple[ChainState, ...]:
    """Read the filter table of legacy iptables, if the kernel has it: to ask for it would make it."""
    path = context.proc(f"thread-self/net/{family.keyword}_tables_names")
    if not path.exists() or "filter" not in path.read_text().split():
        return ()
    try:
        return legacy(run(Variant.LEGACY.program(family, "save"), "-t", "filter"), family.value, ours)
    except XtablesError as error:
        notes.append(f"the filter table of iptables-legacy (IPv{family.value}) was not looked at: {error}")
        return ()


def check(context: Context) -> Check:
    """Look at what others have, and judge it."""
    return judge(look(context))
