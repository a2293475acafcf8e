"""Which dataplane a node has: opened, and taken away when another one has its place.

A kind is `nftables`, `ipvs`, `iptables-legacy` or `iptables-nft`; which of the last two `iptables` means is
decided by what the node's other programs use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cni import sysctls
from netlink import xtables
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.ipvs import IpvsError
from netlink.nftables.batch import BatchError, Nft
from netlink.xtables import TableState, Variant, XtablesError
from proxy.dataplane import Dataplane
from proxy.iptables.dataplane import Dataplane as Iptables
from proxy.iptables.live import TablesError, choose
from proxy.iptables.names import POD_POSTROUTING
from proxy.l7 import places
from proxy.nftables.dataplane import Dataplane as Nftables
from proxy.nftables.ruleset import TABLE

NFTABLES, IPTABLES, IPVS = "nftables", "iptables", "ipvs"
REFUSED = (BatchError, TablesError, IpvsError)
PROC = Path("/proc")

IPVS_SYSCTLS = ("conntrack", "expire_nodest_conn", "expire_quiescent_template")
"""What kube-proxy sets, too: connection tracking knows of IPVS's translation, without which nobody can be
masqueraded; a connection to an endpoint that is gone ends; clients with affinity to one that is on its way
out get another one. They are about all of IPVS on the node. What else kube-proxy sets: arp_ignore and
arp_announce, for service addresses of the node's subnets, which only cluster addresses are not here; and
conn_reuse_mode, for kernels before 5.9.
"""


@dataclass(frozen=True, slots=True)
class Programs:
    """The tables of a variant and family, read and edited by the programs of iptables."""

    kind: Variant
    family: Family

    @property
    def variant(self) -> str:
        """Return `legacy` or `nft`."""
        return self.kind.value

    def read(self) -> tuple[TableState, ...]:
        """Return the tables that are there. Raises TablesError."""
        remarks: list[str] = []
        found = xtables.read(self.kind, self.family, PROC, remarks, exact=True)
        if remarks:
            raise TablesError("; ".join(remarks))
        return found

    def edit(self, text: str) -> None:
        """Give iptables-restore a text. Raises TablesError."""
        try:
            xtables.edit(self.kind, self.family, text)
        except XtablesError as error:
            raise TablesError(str(error), text) from None


def kind_of(mode: str) -> str:
    """Return the kind that a mode means on this node."""
    if mode != IPTABLES:
        return mode
    remarks: list[str] = []
    there = {v.value: xtables.read(v, Family.V4, PROC, remarks, exact=False) for v in Variant}
    try:
        version = xtables.run("iptables", "--version")
    except XtablesError:
        version = ""
    return f"{IPTABLES}-{choose(there, version)}"


@contextmanager
def opened(kind: str, family: Family, port: int = places.PORT, scheduler: str = "rr") -> Iterator[Dataplane]:
    """Open a dataplane of a kind, in the calling thread's network namespace.

    `port` is where the node's L7 proxy listens, `scheduler` how IPVS balances. Raises NetlinkError.
    """
    if kind == NFTABLES:
        with Nft(family, TABLE) as nft:
            yield Nftables(nft, port)
    elif kind == IPVS:
        with _ipvs(family, port, scheduler) as dataplane:
            _set_sysctls()
            yield dataplane
    else:
        yield Iptables(Programs(Variant(kind.removeprefix(f"{IPTABLES}-")), family), port=port)


@contextmanager
def _ipvs(
    family: Family, port: int = places.PORT, scheduler: str = "rr", *, needed: bool = True
) -> Iterator[Dataplane]:
    """Open the IPVS dataplane, and change nothing; without IPVS, too, if it is not `needed`.

    What it is made of is imported for it alone.
    """
    from netlink.delivery import Delivery
    from netlink.ipvs import Absent, Ipvs, Servers
    from netlink.rtnl import Rtnl
    from proxy.ipvs import places as ours
    from proxy.ipvs.dataplane import Dataplane as IpvsDataplane

    with ExitStack() as stack:
        nft, rtnl = stack.enter_context(Nft(family, ours.TABLE)), stack.enter_context(Rtnl())
        try:
            ipvs: Servers = stack.enter_context(Ipvs())
        except NetlinkError:
            if needed:
                raise
            ipvs = Absent()
        ground = Delivery(rtnl, family, ours.DEVICE, ours.MARKED)
        yield IpvsDataplane(nft, ipvs, ground, scheduler, port)


def _set_sysctls() -> None:
    """Set what IPVS needs; what it was is noted. Raises NetlinkError."""
    for name in IPVS_SYSCTLS:
        path = sysctls.ROOT / "net/ipv4/vs" / name
        try:
            sysctls.put(path, "1")
        except OSError as error:
            raise NetlinkError(error.errno or 0, f"cannot set {sysctls.name_of(path)} to 1") from None


def remove(kind: str) -> None:
    """Take away what a dataplane of a kind has made here. Raises NetlinkError."""
    for family in Family:
        with _ipvs(family, needed=False) if kind == IPVS else opened(kind, family) as dataplane:
            dataplane.remove()


def is_ours(tables: tuple[TableState, ...]) -> bool:
    """Whether chains of kube-proxy's names in these tables are podwire's."""
    return any(t.name == POD_POSTROUTING.table and POD_POSTROUTING.name in t.chains for t in tables)
