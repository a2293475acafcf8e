"""The check `settings`: sysctls, limits, and other programs that manage interfaces of this node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from netlink.requests import ROUTE_PROTOCOL
from netlink.rtnl import Rtnl
from node.doctor.findings import Check, Finding, Severity
from node.doctor.view import VXLAN, WIREGUARD, Context
from node.settings import Setting, wanted

NAME = "settings"
ANYWHERE = ("0.0.0.0/0", "::/0")
PERMANENT = 0x80
TUNNELS = ("pwvxlan", "pwwg")
OWN = ("pwpod", *TUNNELS, "podwire0")
STRICT = "1"
FULL = 0.9
"""How full connection tracking may be: 90 %."""
NODE_PORTS = range(30000, 32768)
"""kube-apiserver's default --service-node-port-range."""
BRIDGE_CALLS = ("sys/net/bridge/bridge-nf-call-iptables", "sys/net/bridge/bridge-nf-call-ip6tables")
NEIGHBOURS = {4: "sys/net/ipv4/neigh/default/gc_thresh3", 6: "sys/net/ipv6/neigh/default/gc_thresh3"}


@dataclass(frozen=True, slots=True)
class Manager:
    """A program that manages interfaces, and the file that has it leave podwire's alone."""

    name: str
    process: str
    files: tuple[str, ...]
    remedy: str
    harm: str


MANAGERS = (
    Manager(
        "systemd-networkd",
        "systemd-network",  # the kernel keeps 15 characters
        ("systemd/networkd.conf.d/50-podwire.conf",),
        "install deploy/systemd/networkd.conf there (docs/install/systemd.md), then restart systemd-networkd",
        "takes away routes to pods when it starts",
    ),
    Manager(
        "NetworkManager",
        "NetworkManager",
        ("NetworkManager/conf.d/50-podwire.conf",),
        "install deploy/systemd/networkmanager.conf there (docs/install/systemd.md), then restart it",
        "may take pods' interfaces for its own",
    ),
    Manager(
        "firewalld",
        "firewalld",
        ("firewalld/zones/podwire.xml",),
        "install deploy/firewalld in /etc/firewalld (docs/install/systemd.md), then firewall-cmd --reload",
        "drops or refuses packets of interfaces that are in no zone which accepts",
    ),
)


@dataclass(frozen=True, slots=True)
class Observed:
    """What was read. `sysctls` are by their path below /proc; what is not there is not in it.

    `ways` are the interfaces of the network between nodes; `neighbours` how many neighbour entries there are,
    by IP version, and `peers` the nodes that need one; `running` are names of processes, `files` are below
    /etc.
    """

    sysctls: Mapping[str, str] = field(default_factory=dict)
    ways: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    neighbours: Mapping[int, int] = field(default_factory=dict)
    tracked: tuple[int, int] = (0, 0)
    running: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    mode: str = "routed"
    ipv6: bool = True
    peers: int = 0

    def number(self, path: str) -> int | None:
        """Return the number that a sysctl has, None if it is not there."""
        value = self.sysctls.get(path, "")
        return int(value) if value.lstrip("-").isdigit() else None


def judge(seen: Observed) -> Check:
    """Return which settings stand in the way."""
    findings = [*_unmet(seen), *_filters(seen), *_advertisements(seen), *_limits(seen), *_ports(seen)]
    findings += [
        Finding(f"{m.name} runs and {m.harm}: /etc/{m.files[0]} is missing", m.remedy, Severity.WARNING)
        for m in MANAGERS
        if m.process in seen.running and not any(f in seen.files for f in m.files)
    ]
    notes = []
    dropped, failed = seen.tracked
    if dropped or failed:
        notes.append(
            f"since boot, connection tracking has dropped {dropped} packets, and {failed} connections failed"
        )
    return Check(NAME, tuple(findings), tuple(notes))


def sysctl(path: str) -> str:
    """Return the name that a path below /proc has for the program of that name."""
    return ".".join(part.replace(".", "/") for part in path.split("/")[1:])


def _set(path: str, value: int | str) -> str:
    return f"sysctl -w {sysctl(path)}={value}"


def _table(seen: Observed) -> list[Setting]:
    """Return what the daemon sets (node.settings); of IPv6 only where pods have it."""
    tunnels = tuple(name for name in seen.own if name.startswith(TUNNELS))
    found = wanted(tunnels, seen.peers, False, seen.ipv6)
    return [s for s in found if seen.ipv6 or "ipv6" not in s.path.parts]


def _unmet(seen: Observed) -> list[Finding]:
    """Return which of the daemon's own settings somebody has changed, or it could not set."""
    found = []
    for setting in _table(seen):
        path = _below_proc(setting.path)
        value = seen.sysctls.get(path)
        if value is None or setting.met(value):
            continue
        words = f"{sysctl(path)} is {value}, not {setting.value}: {setting.otherwise}"
        found.append(Finding(words, _set(path, setting.value)))
    return found


def _below_proc(path: Path) -> str:
    return str(path.relative_to("/proc"))


def _filters(seen: Observed) -> list[Finding]:
    """Return where the reverse path filter drops what comes by another way than its answer goes."""
    everywhere = seen.sysctls.get("sys/net/ipv4/conf/all/rp_filter", "0")
    found = []
    for name in seen.ways if len(seen.ways) > 1 else ():
        path = f"sys/net/ipv4/conf/{name}/rp_filter"
        if max(everywhere, seen.sysctls.get(path, "0")) == STRICT:
            words = f"rp_filter is strict (1) on {name}: it drops what comes another way than its answer goes"
            found.append(Finding(words, _set(path, 2), Severity.WARNING))
    return found


def _advertisements(seen: Observed) -> list[Finding]:
    """Return which of podwire's interfaces take routes from whoever sends router advertisements."""
    found = []
    for name in (n for n in seen.own if not n.startswith(TUNNELS)):
        path = f"sys/net/ipv6/conf/{name}/accept_ra"
        if (seen.number(path) or 0) > 1:
            words = f"{sysctl(path)} is {seen.sysctls[path]}: a pod could lead this node's traffic to itself"
            found.append(Finding(words, _set(path, 0)))
    return found


def _limits(seen: Observed) -> list[Finding]:
    found = []
    most = seen.number("sys/net/netfilter/nf_conntrack_max")
    count = seen.number("sys/net/netfilter/nf_conntrack_count")
    if most and count is not None and count >= FULL * most:
        words = f"connection tracking holds {count} of at most {most} connections: soon, new ones fail"
        found.append(Finding(words, _set("sys/net/netfilter/nf_conntrack_max", 2 * most)))
    for version, path in NEIGHBOURS.items():
        limit, there = seen.number(path), seen.neighbours.get(version, 0)
        if limit is not None and there >= FULL * limit:
            words = f"there are {there} neighbours, and {sysctl(path)} is {limit}: soon, new ones fail"
            found.append(Finding(words, _set(path, 4 * limit), Severity.WARNING))
    if seen.mode == "bridge":
        for path in BRIDGE_CALLS:
            if seen.sysctls.get(path) == "0" and ("6" not in path or seen.ipv6):
                words = f"{sysctl(path)} is 0: pods on the bridge cannot use services with pods of this node"
                found.append(Finding(words, _set(path, 1)))
    return found


def _ports(seen: Observed) -> list[Finding]:
    """Return whether the node's own connections may take ports that are node ports."""
    path = "sys/net/ipv4/ip_local_port_range"
    words = seen.sysctls.get(path, "").split()
    if len(words) != 2:
        return []
    first, last = map(int, words)
    if last < NODE_PORTS.start or first >= NODE_PORTS.stop or _reserved(seen):
        return []
    sentence = f"{sysctl(path)} is {first} to {last}, which holds the node ports 30000 to 32767"
    remedy = "sysctl -w net.ipv4.ip_local_reserved_ports=30000-32767, or a range beyond these"
    return [Finding(sentence, remedy, Severity.WARNING)]


def _reserved(seen: Observed) -> bool:
    """Whether the node ports are kept free (ip_local_reserved_ports: ranges with commas)."""
    for part in seen.sysctls.get("sys/net/ipv4/ip_local_reserved_ports", "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and int(first) <= NODE_PORTS.start and int(last or first) >= NODE_PORTS.stop - 1:
            return True
    return False


def look(context: Context) -> Observed:
    """Read all of it."""
    with Rtnl() as rtnl:
        names = {link.index: link.name for link in rtnl.links()}
        routes = rtnl.routes()
        entries = [n for n in rtnl.neighbours() if not n.state & PERMANENT]
    own = tuple(name for name in names.values() if name.startswith(OWN))
    leading = {r.oif for r in routes if r.destination in ANYWHERE or r.protocol == ROUTE_PROTOCOL}
    ways = tuple(n for i, n in names.items() if i in leading and n not in own and n != "lo")
    paths = (
        *(*BRIDGE_CALLS, *NEIGHBOURS.values()),
        *("sys/net/netfilter/nf_conntrack_max", "sys/net/netfilter/nf_conntrack_count"),
        *("sys/net/ipv4/ip_local_port_range", "sys/net/ipv4/ip_local_reserved_ports"),
        *(f"sys/net/ipv4/conf/{name}/rp_filter" for name in ("all", *ways)),
        *(f"sys/net/ipv6/conf/{name}/accept_ra" for name in own),
    )
    view = context.view
    seen = Observed(
        {},
        ways,
        own,
        {4: sum(":" not in n.address for n in entries), 6: sum(":" in n.address for n in entries)},
        tracked(_read(context.proc("thread-self/net/stat/nf_conntrack")) or ""),
        _processes(context),
        frozenset(f for m in MANAGERS for f in m.files if context.etc(f).exists()),
        view.mode if view else "routed",
        bool(view and any(":" in cidr for cidr in view.pod_cidrs)),
        len({r.node for r in view.peers if r.backend not in (VXLAN, WIREGUARD)}) if view else 0,
    )
    paths = (*paths, *(_below_proc(s.path) for s in _table(seen)))
    read = {path: text for path in paths if (text := _read(context.proc(path))) is not None}
    return replace(seen, sysctls=read)


def tracked(table: str) -> tuple[int, int]:
    """Return how many packets connection tracking has dropped, and connections it could not add.

    /proc/net/stat/nf_conntrack has a line of names, then one of hexadecimal numbers for each CPU.
    """
    lines = [line.split() for line in table.splitlines()]
    if not lines:
        return 0, 0
    rows = [dict(zip(lines[0], (int(n, 16) for n in line), strict=False)) for line in lines[1:]]
    dropped = sum(row.get("drop", 0) + row.get("early_drop", 0) for row in rows)
    return dropped, sum(row.get("insert_failed", 0) for row in rows)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _processes(context: Context) -> frozenset[str]:
    """Return the names of processes in this network namespace; of others they do no harm here."""
    here = context.proc("thread-self/ns/net")
    found = set()
    for path in context.proc().glob("[0-9]*/comm"):
        name = _name(path)
        if name in _watched(MANAGERS):
            try:
                if (path.parent / "ns/net").samefile(here):
                    found.add(name)
            except OSError:
                continue  # it has ended
    return frozenset(found)


def _name(path: Path) -> str:
    return _read(path) or ""


def _watched(managers: Iterable[Manager]) -> frozenset[str]:
    return frozenset(m.process for m in managers)


def check(context: Context) -> Check:
    """Read settings, and judge them."""
    return judge(look(context))
