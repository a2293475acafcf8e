"""One service port as rules: its own chains, and its rules in the chains that all share. Pure.

    KUBE-SERVICES ─┬────────────────────────────▶ KUBE-SVC or KUBE-SVL ──▶ KUBE-SEP ──▶ DNAT  cluster address
                   ├─▶ (KUBE-FW: source ranges) ▶ KUBE-EXT ──▶ KUBE-SVC or KUBE-SVL           others
                   └─▶ KUBE-NODEPORTS ──────────▶ KUBE-EXT                                    node port

What the node's L7 proxy serves goes there by KUBE-SVC, with one KUBE-SEP that is the proxy's; the endpoints
of what it does not serve of such a service port are in PODWIRE-SVC.

The mark 0x4000 says whose source address is replaced. kube-proxy knows pods by one range, we by those of the
Node objects: the first rule leaves out this node's own, a chain of ours knows the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from netlink.family import Family, with_port
from proxy.frontends import Action, Backend, Frontend, Masquerade, Origin
from proxy.iptables.names import (
    EXTERNAL_SERVICES,
    MARK_MASQ,
    MARK_OFF_CLUSTER,
    MARK_OTHER_PODS,
    NAT_NODEPORTS,
    NAT_SERVICES,
    PROXY_FIREWALL,
    SERVICES,
    ChainId,
    PortName,
    direct_chain,
    endpoint_chain,
    service_chain,
)
from proxy.iptables.text import (
    MASQUERADE_MARK,
    Chains,
    Rules,
    comment,
    host,
    joined,
    probability,
    recent,
    reject,
    rule,
    within,
)
from proxy.l7 import places

ALL, LOCAL, PROXIED = "SVC", "SVL", "L7"
"""Where a frontend leads: to all endpoints, to those of this node, to the L7 proxy."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the rules of every service port depend on.

    `own_pods` are the ranges of this node's pods, `node_ports` matches for the addresses with node ports.
    `terse`: without what only people read in the chains of endpoints. kube-proxy leaves it out of large
    clusters too; half of what a legacy table of 10,000 endpoints takes are comments. `port` is where the
    node's L7 proxy listens.
    """

    family: Family
    own_pods: tuple[str, ...]
    node_ports: tuple[str, ...]
    terse: bool = False
    port: int = places.PORT

    def said(self, text: str) -> str:
        """Return a comment, or none."""
        return "" if self.terse else comment(text)


@dataclass(frozen=True, slots=True)
class PortRules:
    """The chains of a service port, and its rules in shared chains."""

    chains: Chains
    entries: Chains


def port_rules(port: PortName, frontends: Sequence[Frontend], setting: Setting) -> PortRules:
    """Return the rules of a service port from its frontends, which are in order."""
    view = _View(port, tuple(frontends), setting)
    chains: dict[ChainId, Rules] = {}
    for kind, endpoints in view.lists.items():
        if endpoints:
            chains[view.chain(kind)] = tuple(_balance(view, kind, endpoints))
    for endpoint in view.chain_of:
        chains[view.chain_of[endpoint]] = tuple(_endpoint(view, endpoint))
    if view.proxy:
        at = endpoint_chain(port, view.proxy)
        chains[view.chain(PROXIED)] = (rule(view.via, f"-j {at.name}"),)
        chains[at] = (rule(f"-p {port.word}", view.via, f"-m {port.word}", _dnat(view.proxy)),)
    outside = [f for f in view.outside if view.is_balanced(f)]
    if outside:
        chains[service_chain("EXT", port)] = tuple(_external(view, outside[0]))
    if restricted := [f for f in outside if f.sources is not None]:
        chains[service_chain("FW", port)] = tuple(_firewall(view, restricted[0]))
    entries: dict[ChainId, list[str]] = {}
    for frontend in view.inside + view.outside:
        for chain, line in _entries(view, frontend):
            entries.setdefault(chain, []).append(line)
    return PortRules(chains, {chain: tuple(lines) for chain, lines in entries.items()})


class _View:
    """A service port's frontends, told apart."""

    def __init__(self, port: PortName, frontends: tuple[Frontend, ...], setting: Setting) -> None:
        self.port = port
        self.setting = setting
        self.inside = [f for f in frontends if f.exclusive]
        self.outside = [f for f in frontends if not f.exclusive and f.key.origin is Origin.ANY]
        self._twins = {f.key[:4]: f for f in frontends if f.key.origin is Origin.INTERNAL}
        self.affinity = next((f.affinity for f in frontends), 0)
        self.lists: dict[str, tuple[Backend, ...]] = {}
        """Endpoints of the two chains that balance."""
        self.proxy: Backend | None = None
        """Where the L7 proxy listens, if it serves any of them."""
        for frontend in (*self.outside, *self._twins.values(), *self.inside):
            if frontend.action is Action.BALANCE and frontend.proxied:
                address = places.address(frontend.proxied, setting.family, frontend.service)
                self.proxy = Backend(address, setting.port, True)
            elif frontend.action is Action.BALANCE:
                self.lists.setdefault(self.kind(frontend), frontend.endpoints)
        both = sorted({e for endpoints in self.lists.values() for e in endpoints})
        self.chain_of = {endpoint: endpoint_chain(port, endpoint) for endpoint in both}

    def kind(self, frontend: Frontend) -> str:
        """Return where a frontend leads.

        A cluster address does not say its policy: what is not the list of all endpoints is the local one.
        """
        if frontend.proxied:
            return PROXIED
        if frontend.exclusive:
            others = self.lists.get(ALL, frontend.endpoints)
            return ALL if others == frontend.endpoints else LOCAL
        return LOCAL if frontend.masquerade is Masquerade.NEVER else ALL

    def is_balanced(self, frontend: Frontend) -> bool:
        """Whether packets of anybody to a frontend go to an endpoint."""
        return frontend.action is Action.BALANCE or self.twin(frontend) is not None

    def twin(self, frontend: Frontend) -> Frontend | None:
        """Return the frontend for clients inside the cluster, where these are served differently."""
        twin = self._twins.get(frontend.key[:4])
        return twin if twin and twin.action is Action.BALANCE else None

    def chain(self, kind: str) -> ChainId:
        """Return a chain of the service port."""
        if kind == ALL and self.proxy:
            return direct_chain(self.port)
        return service_chain(ALL if kind == PROXIED else kind, self.port)

    def to(self, kind: str) -> str:
        """Jump to a chain of the service port."""
        return f"-j {self.chain(kind).name}"

    @property
    def via(self) -> str:
        """A comment that says what leads to the L7 proxy; people look for it, so it is always there."""
        return comment(f"{self.port.title} via plugin")

    def said(self, text: str) -> str:
        """Return a comment that begins with the service port."""
        return self.setting.said(f"{self.port.title}{text}")

    def addressed(self, frontend: Frontend, about: str, condition: str = "", source: str = "") -> str:
        """Match packets to a frontend; `condition` is more than address and port."""
        key = frontend.key
        place = f"-d {host(key.family, key.address)}" if key.address else condition
        local = "-m addrtype --dst-type LOCAL" if condition else ""
        name, word = comment(f"{self.port.title}{about}"), self.port.word
        return rule(source, place, f"-p {word}", name, local, f"-m {word} --dport {key.port}")


def _balance(view: _View, kind: str, endpoints: tuple[Backend, ...]) -> Iterator[str]:
    """Yield the rules of KUBE-SVC or KUBE-SVL: a mark, the endpoint of last time, one by chance."""
    for frontend in view.inside:
        if frontend.action is Action.BALANCE and view.kind(frontend) == kind:
            yield from _mark_others(view, frontend)
    chains = [(e, view.chain_of[e].name) for e in endpoints]
    if view.affinity:
        asked = f"--rcheck --seconds {view.affinity} --reap"
        for endpoint, name in chains:
            remembered = recent(view.setting.family, asked, name)
            yield rule(view.said(f" -> {with_port(*endpoint[:2])}"), remembered, f"-j {name}")
    for number, (endpoint, name) in enumerate(chains):
        chance = probability(len(endpoints) - number)
        yield rule(view.said(f" -> {with_port(*endpoint[:2])}"), chance, f"-j {name}")


def _mark_others(view: _View, frontend: Frontend) -> Iterator[str]:
    """Yield what marks clients of a cluster address that are no pods."""
    own = view.setting.own_pods
    if own and own[0].endswith("/0"):
        return
    # Of several ranges that are not to match one rule can say one; the chain knows them all.
    source = f"! -s {own[0]}" if len(own) == 1 else ""
    yield rule(view.addressed(frontend, " cluster IP", source=source), f"-j {MARK_OFF_CLUSTER.name}")


def _endpoint(view: _View, endpoint: Backend) -> Iterator[str]:
    """Yield the rules of KUBE-SEP: a mark for the endpoint itself, and its address and port."""
    family, word = view.setting.family, view.port.word
    name = view.chain_of[endpoint].name
    yield rule(f"-s {host(family, endpoint.address)}", view.said(""), f"-j {MARK_MASQ.name}")
    remember = recent(family, "--set", name) if view.affinity else ""
    match = "" if view.setting.terse else f"-m {word}"
    yield rule(f"-p {word}", view.said(""), remember, match, _dnat(endpoint))


def _dnat(endpoint: Backend) -> str:
    return f"-j DNAT --to-destination {with_port(endpoint.address, endpoint.port)}"


def _external(view: _View, frontend: Frontend) -> Iterator[str]:
    """Yield the rules of KUBE-EXT: everybody is marked under policy Cluster, nobody from outside under Local.

    Under policy Local, clients inside the cluster get all endpoints; those that are not pods of this node are
    marked, and nobody else is, so that the mark tells the pods of other nodes from clients outside.
    """
    about = f"traffic for {view.port.title} external destinations"
    balanced = frontend.action is Action.BALANCE
    if balanced and frontend.masquerade is Masquerade.ALWAYS:
        if not frontend.proxied:
            yield rule(comment(f"masquerade {about}"), f"-j {MARK_MASQ.name}")
        yield view.to(view.kind(frontend))
        return
    twin = view.twin(frontend)
    if twin and not (balanced and frontend.proxied and twin.proxied):
        to, node = view.to(view.kind(twin)), "-m addrtype --src-type LOCAL"
        for own in view.setting.own_pods:
            yield rule(within("-s", own), comment(f"pod {about}"), to)
        if not twin.proxied:
            yield rule(comment(f"masquerade LOCAL {about}"), node, f"-j {MARK_MASQ.name}")
        yield rule(comment(f"route LOCAL {about}"), node, to)
        # What the mark tells from others ends at the proxy, if that serves it: nobody is masqueraded.
        yield rule(comment(f"masquerade {about} from other nodes"), f"-j {MARK_OTHER_PODS.name}")
        marked = f"-m mark --mark {MASQUERADE_MARK:#x}/{MASQUERADE_MARK:#x}"
        yield rule(comment(f"route {about} from other nodes"), marked, to)
    if balanced:
        yield view.to(view.kind(frontend))


def _firewall(view: _View, frontend: Frontend) -> Iterator[str]:
    """Yield the rules of KUBE-FW: whoever may come goes on, the others stay untranslated."""
    for source in _sources(frontend):
        yield rule(within("-s", source), comment(f"{view.port.title} loadbalancer IP"), view.to("EXT"))
    yield comment(f"other traffic to {view.port.title} will be dropped by {PROXY_FIREWALL.name}")


def _sources(frontend: Frontend) -> tuple[str, ...]:
    return joined(frontend.key.family, frontend.sources or ())


def _entries(view: _View, frontend: Frontend) -> Iterator[tuple[ChainId, str]]:
    """Yield a frontend's rules in shared chains: where balancing begins, or what refuses."""
    if frontend.exclusive:
        if frontend.action is Action.BALANCE:
            yield NAT_SERVICES, rule(view.addressed(frontend, " cluster IP"), view.to(view.kind(frontend)))
        else:
            yield SERVICES, _refused(view, frontend)
        return
    if view.is_balanced(frontend):
        if not frontend.key.address:
            yield NAT_NODEPORTS, rule(view.addressed(frontend, ""), view.to("EXT"))
        elif frontend.sources is None:
            yield NAT_SERVICES, rule(view.addressed(frontend, " external IP"), view.to("EXT"))
        else:
            yield NAT_SERVICES, rule(view.addressed(frontend, " loadbalancer IP"), view.to("FW"))
    if frontend.sources is not None:
        yield from ((PROXY_FIREWALL, line) for line in _not_accepted(view, frontend))
    if frontend.action is not Action.BALANCE:
        for condition in ("",) if frontend.key.address else view.setting.node_ports:
            yield EXTERNAL_SERVICES, _refused(view, frontend, condition)


def _refused(view: _View, frontend: Frontend, condition: str = "") -> str:
    if frontend.action is Action.DROP:
        return rule(view.addressed(frontend, " has no local endpoints", condition), "-j DROP")
    return rule(
        view.addressed(frontend, " has no endpoints", condition), reject(frontend.key.family, view.port.word)
    )


def _not_accepted(view: _View, frontend: Frontend) -> Iterator[str]:
    """Yield what drops those that KUBE-FW let fall; who may come is told that there is no endpoint."""
    chain = service_chain("FW", view.port).name
    about = f" traffic not accepted by {chain}"
    if not view.is_balanced(frontend):
        for source in _sources(frontend):
            yield rule(view.addressed(frontend, about, source=within("-s", source)), "-j RETURN")
    yield rule(view.addressed(frontend, about), "-j DROP")
