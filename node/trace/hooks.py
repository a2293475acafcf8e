"""A node's state, ready to be asked: hooks in order, pods behind interfaces, connections, next hops. Pure."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from netlink.conntrack import Flow
from netlink.decode import Link
from netlink.family import Family
from node.trace.iptables import IptablesRules
from node.trace.nft_walk import NftRules
from node.trace.packet import Kind, Packet, Step
from node.trace.rules import HOOKS, BaseChain, Rules
from node.trace.state import BRIDGED, LOCAL, NUD, NUD_FAILED, PodPlace, Routing, State, Way

PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
POD_INTERFACES = "pwpod"


class Place:
    """One network namespace's state."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.name = state.node
        self.routing = Routing(state)
        kinds: list[Rules] = [NftRules(state.tables, state.family)]
        if state.iptables:
            kinds.append(IptablesRules(state.iptables, state.family, state.recent))
        self.rules = tuple(kinds)
        self._bases = {hook: self._ordered(hook) for hook in range(len(HOOKS))}

    def _ordered(self, hook: int) -> tuple[tuple[Rules, BaseChain], ...]:
        """Return the chains of a hook; of two with one priority, the one made later comes first."""
        found = [(rules, base) for rules in self.rules for base in reversed(rules.bases(hook))]
        return tuple(sorted(found, key=lambda pair: pair[1].order))

    def bases(self, hook: int) -> tuple[tuple[Rules, BaseChain], ...]:
        """Return the chains of a hook in the kernel's order, with the packet filter of each."""
        return self._bases[hook]

    def others(self) -> tuple[str, ...]:
        """Return tables at the hooks that are not ours, and what could not be read, in words."""
        found = (words for rules in self.rules for words in rules.others())
        return tuple(f"{self.name}: {words}" for words in (*found, *self.state.missing))

    def kind_of(self, address: str) -> int:
        """Return the type of an address (RTN_*)."""
        return self.routing.kind_of(address)

    def index_of(self, interface: str) -> int:
        """Return an interface's number, 0 for none."""
        link = self.routing.by_name.get(interface)
        return link.index if link else 0

    def address_of(self, interface: str) -> str:
        """Return the first address of an interface; "" if it has none."""
        return self.routing.first_of(self.index_of(interface))

    def way_out(self, packet: Packet, address: str) -> str:
        """Return the interface by which packets to an address leave; "" if nothing leads there."""
        way = self.routing.find(replace(packet, destination=address, source="", iif=""), output=True).way
        return self.routing.interfaces.get(way.oif, "") if way else ""

    def about(self, interface: str) -> str:
        """Return whose an interface is, in words."""
        pod = next((p for p in self.state.pods if p.host_ifname == interface), None)
        link = self.routing.by_name.get(interface)
        if pod and pod.name:
            return f" (of pod {pod.name})"
        return f" ({link.kind})" if link and link.kind in ("vxlan", "wireguard", "bridge") else ""

    def bridged(self, packet: Packet) -> tuple[Packet, tuple[Step, ...]]:
        """Return a packet as IP sees it: what comes from a port of a bridge comes from the bridge."""
        link = self.routing.by_name.get(packet.iif)
        master = self.routing.by_index.get(link.master) if link and link.master else None
        if not link or not master or master.kind != "bridge":
            return packet, ()
        text = f"{link.name} is a port of bridge {master.name}; rules for frames are not followed"
        return replace(packet, iif=master.name), (Step(Kind.NOTE, self.name, "bridge", text),)

    def switched(self, packet: Packet) -> PodPlace | None:
        """Return the pod that a bridge gives a packet to by itself: one with an address on that bridge."""
        link = self.routing.by_name.get(packet.iif)
        way = self.routing.find(replace(packet, iif=""), output=True).way
        if link is None or way is None or way.gateway or way.oif != link.index or way.kind == LOCAL:
            return None
        filtered = self.sysctl(BRIDGED[packet.family])
        length = int(way.destination.partition("/")[2])
        return None if filtered or length == packet.family.bits else self.pod_at(link, packet.destination)

    def loopback(self, packet: Packet) -> bool:
        """Whether a packet is from or to a loopback address."""
        return any(ip_address(a).is_loopback for a in (packet.source, packet.destination))

    def refuses_source(self, packet: Packet) -> tuple[str, str] | None:
        """Return why the kernel takes no packet of that source here, and what to look at; None if it does."""
        if packet.family is not Family.V4 or packet.iif == "lo":
            return None
        loop = self.sysctl(f"ipv4/conf/{packet.iif}/route_localnet") or self.sysctl(
            "ipv4/conf/all/route_localnet"
        )
        if self.loopback(packet) and not loop:
            return (
                f"a loopback address cannot come by {packet.iif} (a martian)",
                "net.ipv4.conf.*.route_localnet",
            )
        back = replace(packet, source=packet.destination, destination=packet.source, iif="", oif="")
        way = self.routing.find(back, output=True).way
        if way is not None and way.kind == LOCAL:
            return (
                f"{packet.source} is an address of {self.name} itself (a martian)",
                f"ip address on {self.name}",
            )
        strict = max(self.sysctl("ipv4/conf/all/rp_filter"), self.sysctl(f"ipv4/conf/{packet.iif}/rp_filter"))
        out = self.routing.interfaces.get(way.oif, "") if way else ""
        if (strict == 1 and out != packet.iif) or (strict == 2 and not out):
            instead = out or "nowhere"
            reason = f"the way back to {packet.source} is not by {packet.iif} but by {instead} (rp_filter)"
            return reason, f"sysctl net.ipv4.conf.{packet.iif}.rp_filter"
        return None

    def keeps_to_itself(self, packet: Packet) -> tuple[str, str] | None:
        """Return why the node forwards nothing, and what to look at; None if it does."""
        v4 = packet.family is Family.V4
        name = f"ipv4/conf/{packet.iif}/forwarding" if v4 else f"ipv6/conf/{packet.iif}/forwarding"
        known = (
            name if name in self.state.sysctls else ("ipv4/ip_forward" if v4 else "ipv6/conf/all/forwarding")
        )
        if known in self.state.sysctls and not self.sysctl(known):
            return f"{self.name} does not forward packets", f"sysctl net.{known.replace('/', '.')}"
        return None

    def sysctl(self, name: str) -> int:
        """Return a setting, 0 if it is not known."""
        text = self.state.sysctls.get(name, "0")
        return int(text) if text.isdecimal() else 0

    def flow(self, packet: Packet) -> tuple[Flow | None, tuple[Step, ...]]:
        """Return the connection that a packet belongs to, and what is to be said of others like it."""
        alike = [
            f
            for f in self.state.flows
            if f.protocol == packet.protocol
            and (f.original.source, f.original.destination, f.original.dport)
            == (packet.source, packet.destination, packet.dport)
        ]
        own = next((f for f in alike if packet.sport and f.original.sport == packet.sport), None)
        if own:
            text = (
                f"this connection is known: it goes on to {own.reply.source}, past the rules that translate"
            )
            return own, (Step(Kind.CONNTRACK, self.name, "conntrack", text),)
        if not alike:
            return None, ()
        places = sorted({f.reply.source for f in alike})
        shown = ", ".join(places[:4]) + (", …" if len(places) > 4 else "")
        text = (
            f"{len(alike)} connections like this one are known; they go on to {shown}, "
            "whatever the rules say now; this is a new one"
        )
        return None, (Step(Kind.CONNTRACK, self.name, "conntrack", text),)

    def source_for(self, way: Way, destination: str) -> str:
        """Return the address that the node sends from by a route."""
        if way.kind == LOCAL:
            return destination
        return way.source or self.routing.source_for(way.oif, way.gateway, destination)

    def pod_at(self, link: Link, address: str) -> PodPlace | None:
        """Return the pod that an interface leads to; one without a name if only the interface says so."""
        for pod in self.state.pods:
            if pod.host_ifname == link.name or (link.kind == "bridge" and address in pod.addresses):
                return pod
        return PodPlace("", link.name, (address,)) if link.name.startswith(POD_INTERFACES) else None

    def next_hop(self, link: Link, toward: str) -> tuple[Step, ...]:
        """Return what is known of who has the next hop's address on a link."""
        if link.name == "lo":
            return ()
        found = next((n for n in self.state.neighbours if (n.index, n.address) == (link.index, toward)), None)
        if found is None:
            what = f"{toward} is not known on {link.name} yet: it will be asked for"
        elif found.state & NUD_FAILED:
            what = f"nobody answered for {toward} on {link.name} lately: it will be asked for again"
        else:
            what = f"{toward} has {found.mac or 'no MAC'} on {link.name}, {NUD.get(found.state, found.state)}"
        return (Step(Kind.NEIGHBOUR, self.name, "neighbour", what),)

    def remote(self, link: Link, toward: str) -> str:
        """Return the address that a VXLAN device sends packets for a next hop to; "" if it knows none."""
        mac = next((n.mac for n in self.state.neighbours if (n.index, n.address) == (link.index, toward)), "")
        entries = [r for r in self.state.remotes if r.index == link.index and r.address]
        exact = next((r.address for r in entries if r.mac == mac), "")
        return exact or next((r.address for r in entries if r.mac == "00:00:00:00:00:00"), "")
