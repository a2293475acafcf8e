"""What podwire itself has on a node: found without changing anything, removed without touching anything else.

As with what kube-proxy left (node.leftovers): `survey` finds `Leftover`s, in the order in which they can be
removed, and `remove` takes them away; it can be repeated.

    conflist, plugin ─▶ pods ─▶ tables ─▶ HAProxy ─▶ connections ─▶ rules, routes, addresses
                                                         ─▶ podwire0, tunnels ─▶ sysctls ─▶ ledger, socket

The conflist goes first, so that no pod comes meanwhile; connections after the tables, which would make them
anew; the ledger last, as it says what else there is. All of it but the files is about the network namespace
of the calling thread.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from netaddr import IPAddress

from cni import install, sysctls
from cni.attachments import wired
from cni.plugin import LEDGER_FILE, ledger_of
from cni.settings import Mode, NodeSettings
from cni.tables import TABLES
from cni.wiring import BRIDGE, BRIDGE_FILTERS, HOST_PREFIX
from ipam.ledger import Attachment, LedgerError, State
from ipam.lock import LockTimeout
from netlink.family import Family
from netlink.nftables.batch import NftSocket
from netlink.nftables.objects import BRIDGE as FRAMES
from netlink.nftables.objects import Table
from netlink.requests import ROUTE_PROTOCOL, RT_TABLE_MAIN
from netlink.rtnl import Rtnl
from netlink.xtables import Variant, read
from node import uninstall_ipvs, uninstall_l7, wireguard_keys
from node.annotations import FILE as ANNOTATIONS_FILE
from node.backends import DEVICES as TUNNELS
from node.backends.hops import NODE_TABLE
from node.dataplanes import PROC, is_ours
from node.leftovers import Leftover, NftTable, Removal
from node.settings import FORWARDING
from node.sources.saved import FILE as STATE_FILE
from node.tunnel_rules import TABLES as TUNNEL_TABLES
from node.uninstall_flows import find_flows
from node.uninstall_parts import (
    LOOPBACK_INDEX,
    Chains,
    Files,
    Interface,
    KernelRoute,
    Plugin,
    Pod,
    PolicyRule,
    Proxies,
    RangeAddress,
    Sysctl,
)
from proxy.nftables.ruleset import TABLE

CONNECT_SECONDS = 1.0
DROP_INS = tuple(
    Path(path)
    for path in (
        "/etc/systemd/network/10-podwire.network",
        "/etc/systemd/networkd.conf.d/50-podwire.conf",
        "/etc/NetworkManager/conf.d/50-podwire.conf",
        "/etc/firewalld/policies/podwire-pods.xml",
        "/etc/firewalld/policies/podwire-vxlan.xml",
        "/etc/firewalld/zones/podwire.xml",
        "/etc/firewalld/zones/podwire.xml.old",
        "/etc/firewalld/services/podwire-vxlan.xml",
        "/etc/systemd/system/podwire.service.d/bridge.conf",
    )
)
"""Where docs/install/systemd.md puts files of deploy/ into folders of others. firewalld keeps the one before
(.old) when sources are added to the zone."""
STATE_FILES = (
    *(f"{LEDGER_FILE}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")),
    *("attachments.lock", STATE_FILE, ANNOTATIONS_FILE, sysctls.FILE),
)
DEVICES = (BRIDGE, *TUNNELS)
"""The node's own interfaces of podwire's."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where podwire is on a node; all paths but `root` as the node sees them.

    `root` is where the node's file system is. None: here, and of copies those go that the binary names.
    """

    state_dir: Path
    socket: Path
    bin_dir: Path
    conf_dir: Path
    root: Path | None = None

    def here(self, path: Path) -> Path:
        """Return where a path of the node is for us. Raises InstallError."""
        return install.below(self.root, path) if self.root else path


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to go beside what is in the kernel.

    `installed`: the plugin, its conflist, the files for systemd and NetworkManager. `state`: the ledger, the
    last known state of the cluster, the socket. `forwarding`: that the node forwards packets.
    """

    installed: bool = False
    state: bool = False
    forwarding: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, in the order in which it can be removed; what stays, in sentences; attached pods."""

    leftovers: tuple[Leftover, ...]
    remarks: tuple[str, ...]
    pods: tuple[str, ...]


def answers(path: Path) -> bool:
    """Whether a daemon answers on a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CONNECT_SECONDS)
        try:
            client.connect(str(path))
        except (TimeoutError, BlockingIOError):
            return True  # somebody has it, and is busy
        except OSError:
            return False
    return True


def survey(places: Places, scope: Scope) -> Survey:
    """Find what podwire has here, and which pods use it. Raises InstallError, OSError."""
    remarks: list[str] = []
    state_dir = places.here(places.state_dir)
    attachments, settings = _ledger(state_dir, remarks)
    there = {name for _, name in socket.if_nameindex()}
    known = {attachment.host_ifname for attachment in attachments}
    strays = sorted(name for name in there - known if name.startswith(HOST_PREFIX))
    found: list[Leftover] = []
    if scope.installed:
        found += _installed(places)
    elif (places.here(places.conf_dir) / install.CONFLIST).exists():
        remarks.append(
            "the plugin and its conflist stay, and the runtime goes on making pods with them: --all"
        )
    found += [Pod(attachment, state_dir) for attachment in attachments]
    found += _proxies(attachments, settings)
    found += [Interface(name) for name in strays]
    found += _tables()
    found += _chains(remarks)
    found += uninstall_ipvs.find()
    found += uninstall_l7.find(places.here(places.socket).parent / "l7")
    found += find_flows(remarks)
    found += _ways(settings)
    found += [Interface(name) for name in DEVICES if name in there]
    found += _sysctls(state_dir, scope, remarks)
    if scope.state:
        keys = state_dir / wireguard_keys.FOLDER
        found += _files("key", wireguard_keys.files(keys), keys)
        found += _files("state", [state_dir / name for name in STATE_FILES], state_dir)
        path = places.here(places.socket)
        found += _files("socket", [path], path.parent if path.parent.name == "podwire" else None)
    elif attachments or (state_dir / LEDGER_FILE).exists():
        remarks.append(f"the ledger in {places.state_dir} stays: --state, --all")
    pods = [_told(a) for a in attachments if a.state is not State.RELEASED]
    return Survey(tuple(found), tuple(remarks), (*pods, *strays))


def remove(leftovers: Iterable[Leftover], refusals: tuple[type[Exception], ...] = ()) -> Removal:
    """Remove what a survey found. One that cannot be removed does not keep the others.

    `refusals` are more errors that only mean that.
    """
    expected: tuple[type[Exception], ...] = (OSError, LedgerError, LockTimeout, *refusals)
    removed: list[Leftover] = []
    failures: list[str] = []
    for leftover in leftovers:
        try:
            leftover.remove()
            removed.append(leftover)
        except expected as error:
            failures.append(f"{leftover}: {error}")
    return Removal(tuple(removed), tuple(failures))


def _told(attachment: Attachment) -> str:
    addresses = ", ".join(map(str, attachment.addresses))
    return f"{attachment.pod or attachment.key.container_id} ({addresses})"


def _ledger(state_dir: Path, remarks: list[str]) -> tuple[tuple[Attachment, ...], NodeSettings | None]:
    """Return the pods that the ledger knows, and how the node's pods were connected last."""
    if not (state_dir / LEDGER_FILE).exists():
        return (), None
    try:
        with ledger_of(state_dir) as ledger:
            return ledger.attachments(), NodeSettings.from_mapping(ledger.settings())
    except LedgerError as error:
        remarks.append(f"which pods there are is told by interfaces only: {error}")
        return (), None


def _installed(places: Places) -> Iterator[Leftover]:
    bin_dir, conf_dir = places.here(places.bin_dir), places.here(places.conf_dir)
    copies = install.copies_below(places.root) if places.root else install.copies_of(bin_dir / install.BINARY)
    files = (conf_dir / install.CONFLIST, bin_dir / install.BINARY)
    there = [path for path in files if path.exists() or path.is_symlink()]
    if there or copies:
        yield Plugin(bin_dir, conf_dir, copies, tuple(map(str, (*there, *copies))))
    for path in DROP_INS:
        own = path.parent.name.startswith("podwire")
        yield from _files("drop-in", [places.here(path)], places.here(path.parent) if own else None)


def _files(kind: str, paths: Iterable[Path], folder: Path | None) -> Iterator[Files]:
    """Yield the files that are there; with them goes their folder, if nothing else is in it."""
    there = tuple(str(path) for path in paths if path.exists() or path.is_symlink())
    if there or (folder and folder.is_dir() and not any(folder.iterdir())):
        yield Files(kind, there, folder)


def _proxies(attachments: Iterable[Attachment], settings: NodeSettings | None) -> Iterator[Proxies]:
    """Yield what flat mode answers for, as far as it is no pod's of the ledger: after a crash, say."""
    if settings is None or settings.mode is not Mode.FLAT:
        return
    known = {
        (wired(a).uplink, str(address))
        for a in attachments
        if wired(a).mode is Mode.FLAT
        for address in a.addresses
    }
    parts = [part for pool in settings.ipam.pools for part in pool.ranges]
    with Rtnl() as rtnl:
        names = {link.index: link.name for link in rtnl.links()}
        present = [(names.get(index, ""), address) for index, address in rtnl.proxies()]
    left = tuple(
        address
        for uplink, address in present
        if uplink == settings.uplink
        and (uplink, address) not in known
        and any(IPAddress(address) in part for part in parts)
    )
    if left:
        yield Proxies(settings.uplink, left)


def _tables() -> Iterator[NftTable]:
    services = [Table(family, TABLE) for family in (*Family, FRAMES)]
    with NftSocket() as nft:
        for table in (*services, *TABLES.values(), *TUNNEL_TABLES.values()):
            if nft.table_comment(table) is not None:
                yield NftTable(table, tuple(sorted(nft.chains(table))))


def _chains(remarks: list[str]) -> Iterator[Chains]:
    for variant, family in itertools.product(Variant, Family):
        if is_ours(read(variant, family, PROC, remarks, exact=False)):
            yield Chains(variant, family)


def _ways(settings: NodeSettings | None) -> Iterator[PolicyRule | KernelRoute | RangeAddress]:
    """Yield rules, routes and addresses that do not go with an interface."""
    with Rtnl() as rtnl:
        links = {link.index: link.name for link in rtnl.links()}
        own = {i for i, name in links.items() if name.startswith(HOST_PREFIX) or name in DEVICES}
        routes = [r for table in (RT_TABLE_MAIN, NODE_TABLE) for r in rtnl.routes(ROUTE_PROTOCOL, table)]
        rules = rtnl.rules()
        local = rtnl.addresses(LOOPBACK_INDEX)
    yield from map(PolicyRule, rules)
    yield from (KernelRoute(route) for route in routes if route.oif not in own)
    # Without the ledger, the route that refuses packets to addresses of no pod tells what our ranges were.
    refused = (r.destination for r in routes if r.unreachable)
    ranges = {*map(str, settings.pod_cidrs if settings else ()), *refused}
    hosts = {f"{network[0]}/{network.max_prefixlen}" for network in map(ip_network, ranges)}
    yield from (RangeAddress(a.cidr) for a in local if a.cidr in hosts)


def _sysctls(state_dir: Path, scope: Scope, remarks: list[str]) -> Iterator[Sysctl]:
    """Yield what is set back; say of what stays why.

    Forwarding stays unless asked for: every network of containers needs it, and each sets it only where it is
    off, so nobody can see who came to rely on it. While it is on, a default route that was advertised needs
    accept_ra as podwire set it. And bridges of others may need br_netfilter's calls, for the same reason.
    """
    with Rtnl() as rtnl:
        bridges = [link.name for link in rtnl.links() if link.kind == "bridge" and link.name != BRIDGE]
    notes = sysctls.noted(state_dir)
    order = sorted(notes, key=lambda path: path not in FORWARDING)  # accept_ra only after it
    for path in order:
        name, note = sysctls.name_of(path), notes[path]
        with contextlib.suppress(OSError):  # its interface is gone
            value = path.read_text().strip()
            why = ""
            if value == note.before:
                continue
            if value != note.value:
                why = f"somebody else set it, podwire had set {note.value}"
            elif path.name in ("ip_forward", "forwarding", "accept_ra") and not scope.forwarding:
                why = "other networks may need that by now; --stop-forwarding sets it back"
            elif path in BRIDGE_FILTERS and bridges:
                why = f"the bridge {bridges[0]} may need that"
            if why:
                remarks.append(f"{name} stays {value}, it was {note.before}: {why}")
            else:
                yield Sysctl(path, note, state_dir)
