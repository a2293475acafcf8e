"""What kube-proxy left in the tables of iptables: which chains are its, and how they are taken away.

- `is_kube_proxys` knows its chains by name, and only names that it has used (kubernetes, pkg/proxy/iptables,
  ipvs, and userspace up to 1.25).
- `select` decides what of a table goes. Pure.
- `Chains` is what goes of one table, at once or not at all.

Chains of others are named KUBE-… too: kubelet's (KUBE-FIREWALL, KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT,
KUBE-MARK-DROP), and in KUBE-ROUTER-…, KUBE-POD-FW-… and KUBE-NWPLCY-… the network policies of kube-router,
which k3s contains. Those protect somebody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from netlink.family import Family
from netlink.xtables import Rule, TableState, Variant, edit, place

SHOWN = 5
"""Names in a sentence, before it says how many more there are."""

# One chain per service, endpoint, …: the name ends in 16 characters of base32 (RFC 4648).
_HASHED = re.compile(r"KUBE-(SVC|SVL|SEP|FW|EXT|XLB)-[A-Z2-7]{16}")


def _named(*names: str) -> frozenset[str]:
    return frozenset(f"KUBE-{name}" for name in names)


_ENTRIES = _named(
    *("SERVICES", "EXTERNAL-SERVICES", "NODEPORTS", "POSTROUTING", "FORWARD", "PROXY-FIREWALL"),
    *("NODE-PORT", "IPVS-FILTER", "IPVS-OUT-FILTER"),  # IPVS
    *("PORTALS-CONTAINER", "PORTALS-HOST"),  # userspace
    *("NODEPORT-CONTAINER", "NODEPORT-HOST", "NODEPORT-NON-LOCAL"),
)
"""The chains to which kube-proxy jumps from built-in chains."""
_INNER = _named(
    *("MARK-MASQ", "PROXY-CANARY"),
    *("LOAD-BALANCER", "SOURCE-RANGES-FIREWALL", "FIRE-WALL"),  # IPVS
)
_KUBELET = _named("FIREWALL", "KUBELET-CANARY", "IPTABLES-HINT", "MARK-DROP")


@dataclass(frozen=True, slots=True)
class Chains:
    """Chains of kube-proxy in one table of iptables, and the rules of built-in chains that lead there."""

    variant: Variant
    family: Family
    table: str
    names: tuple[str, ...]
    rules: int
    jumps: tuple[Rule, ...]
    entered_from: tuple[str, ...]
    kind = "iptables"

    def __str__(self) -> str:
        jumps = f" and {counted(len(self.jumps), 'jump')} from {', '.join(self.entered_from)}"
        what = f"{counted(len(self.names), 'chain')} with {counted(self.rules, 'rule')}"
        return f"{what}{jumps if self.jumps else ''} in {place(self.variant, self.family, self.table)}"

    def remove(self) -> None:
        """Take the chains away, all or (XtablesError) none; needs the text of the jumps."""
        edit(self.variant, self.family, self.restore_text())

    def restore_text(self) -> str:
        """Return the input of iptables-restore --noflush that takes the chains away.

        Rules of built-in chains are named by their text, not by number: others insert rules meanwhile. A
        jump that has gone meanwhile makes iptables-restore refuse it all; the next survey sees it as it is.
        """
        lines = [
            f"*{self.table}",
            *(f"-D{rule.line[2:]}" for rule in self.jumps),
            *(f":{name} - [0:0]" for name in self.names),  # empties it, and makes it if it is gone
            *(f"-X {name}" for name in self.names),
            "COMMIT",
            "",
        ]
        return "\n".join(lines)


def is_kube_proxys(table: str, chain: str) -> bool:
    """Whether a chain of this name in this table of iptables is kube-proxy's.

    KUBE-FIREWALL is kubelet's in the filter table, and of kube-proxy's IPVS mode in nat.
    """
    if chain == "KUBE-FIREWALL":
        return table == "nat"
    return chain in _ENTRIES or chain in _INNER or bool(_HASHED.fullmatch(chain))


def select(state: TableState, remarks: list[str]) -> Chains | None:
    """Return what to take away of a table; say in `remarks` what stays although its name is KUBE-…."""
    where = place(state.variant, state.family, state.name)
    proxys = {name for name in state.chains if is_kube_proxys(state.name, name)}
    used = _used_by_others(state, proxys)
    if used:
        remarks.append(f"left alone in {where}, for rules of others use them: {some_of(used)}")
    strange = {n for n in state.chains if n.startswith("KUBE-")} - proxys - _KUBELET
    if strange:
        remarks.append(f"left alone in {where}, not known to be kube-proxy's: {some_of(strange)}")
    gone = proxys - used
    if not gone:
        return None
    jumps = [(c, r) for c in state.chains if c in state.builtin for r in state.chains[c] if r.target in gone]
    return Chains(
        state.variant,
        state.family,
        state.name,
        tuple(sorted(gone)),
        sum(len(state.chains[name]) for name in gone),
        tuple(rule for _, rule in jumps),
        tuple(dict.fromkeys(chain for chain, _ in jumps)),
    )


def _used_by_others(state: TableState, proxys: set[str]) -> set[str]:
    """Return kube-proxy's chains that somebody else's rule leads to, and all that those lead to in turn.

    In a built-in chain a rule is kube-proxy's if it leads to a chain that kube-proxy enters from there. With
    KUBE-MARK-MASQ goes KUBE-POSTROUTING, without which the mark that others have set there means nothing.
    """
    waiting = [
        rule.target
        for chain, rules in state.chains.items()
        if chain not in proxys
        for rule in rules
        if rule.target in proxys and not (chain in state.builtin and rule.target in _ENTRIES)
    ]
    used = set[str]()
    while waiting:
        name = waiting.pop()
        if name in used:
            continue
        used.add(name)
        waiting += [rule.target for rule in state.chains[name] if rule.target in proxys]
        if name == "KUBE-MARK-MASQ" and "KUBE-POSTROUTING" in proxys:
            waiting.append("KUBE-POSTROUTING")
    return used


def counted(number: int, what: str) -> str:
    """Return "1 chain", "2 chains"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def some_of(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
