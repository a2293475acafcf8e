"""The things of podwire's that can be told and taken away, each with how; node.uninstall finds them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cni import flat, install, sysctls, wiring
from cni.attachments import wired
from cni.plugin import ledger_of
from cni.settings import Mode
from cni.sysctls import Noted
from ipam.ledger import Attachment
from ipam.lock import container_lock
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.requests import (
    RT_TABLE_MAIN,
    Request,
    Route,
    Rule,
    address_delete,
    route_delete,
    rule_delete,
)
from netlink.rtnl import Rtnl
from netlink.xtables import Variant
from node.dataplanes import IPTABLES, opened
from node.leftover_chains import counted

LOOPBACK_INDEX = 1


def _commit(request: Request) -> None:
    """Have something removed; what is gone already is fine."""
    with Rtnl() as rtnl:
        try:
            rtnl.commit(request)
        except NetlinkError as error:
            if not error.gone:
                raise


@dataclass(frozen=True, slots=True)
class Plugin:
    """The conflist, the plugin, and what was copied for it."""

    bin_dir: Path
    conf_dir: Path
    copies: tuple[Path, ...]
    names: tuple[str, ...]
    kind = "plugin"

    def __str__(self) -> str:
        return f"plugin {', '.join(self.names)}"

    def remove(self) -> None:
        """Take them away, the conflist first."""
        install.remove(self.bin_dir, self.conf_dir, tuple(c for c in self.copies if c.exists()))


@dataclass(frozen=True, slots=True)
class Pod:
    """An attachment in the ledger, with its interface, and with what flat mode answers for."""

    attachment: Attachment
    state_dir: Path
    kind = "pod"

    @property
    def names(self) -> tuple[str, ...]:
        """The interface and the addresses."""
        return (self.attachment.host_ifname, *map(str, self.attachment.addresses))

    def __str__(self) -> str:
        whose = self.attachment.pod or self.attachment.key.container_id
        return f"pod {whose} with {', '.join(self.names)}"

    def remove(self) -> None:
        """Take it back as DEL would, but for its rules: their tables go as a whole."""
        attachment, key = self.attachment, self.attachment.key
        with (
            container_lock(self.state_dir, key.container_id),
            ledger_of(self.state_dir) as ledger,
        ):
            ledger.release(key)
            how = wired(attachment)
            if how.mode is Mode.FLAT:
                flat.answer_no_more(how.uplink, map(str, attachment.addresses))
            wiring.remove(attachment.host_ifname)
            ledger.forget(key)


@dataclass(frozen=True, slots=True)
class Proxies:
    """Addresses of pods that are gone, for which the node still answers."""

    uplink: str
    names: tuple[str, ...]
    kind = "neighbour"

    def __str__(self) -> str:
        return f"answers for {', '.join(self.names)} on {self.uplink}"

    def remove(self) -> None:
        """Stop answering."""
        flat.answer_no_more(self.uplink, self.names)


@dataclass(frozen=True, slots=True)
class Interface:
    """A bridge, a tunnel to other nodes, or a pod's interface that the ledger does not know."""

    name: str
    kind = "interface"

    @property
    def names(self) -> tuple[str, ...]:
        """The interface."""
        return (self.name,)

    def __str__(self) -> str:
        return f"interface {self.name}"

    def remove(self) -> None:
        """Take the interface away."""
        wiring.remove(self.name)


@dataclass(frozen=True, slots=True)
class Chains:
    """The chains of services in the tables of iptables, and what leads to them."""

    variant: Variant
    family: Family
    kind = "iptables"

    @property
    def names(self) -> tuple[str, ...]:
        """The variant."""
        return (self.variant.value,)

    def __str__(self) -> str:
        return f"chains of services in iptables-{self.variant.value} (IPv{self.family.value})"

    def remove(self) -> None:
        """Take them away; chains that others lead to stay."""
        with opened(f"{IPTABLES}-{self.variant.value}", self.family) as dataplane:
            dataplane.remove()


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """A route with podwire's protocol number."""

    route: Route
    kind = "route"

    @property
    def names(self) -> tuple[str, ...]:
        """The destination."""
        return (self.route.destination,)

    def __str__(self) -> str:
        via = f" via {self.route.gateway}" if self.route.gateway else ""
        table = f" in table {self.route.table}" if self.route.table != RT_TABLE_MAIN else ""
        return f"route to {self.route.destination}{via}{table}"

    def remove(self) -> None:
        """Take the route away; one of another protocol number to the same destination stays."""
        _commit(route_delete(self.route))


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """A policy rule with podwire's protocol number."""

    rule: Rule
    kind = "rule"

    @property
    def names(self) -> tuple[str, ...]:
        """The range that it is about."""
        return (self.rule.source,)

    def __str__(self) -> str:
        return f"policy rule from {self.rule.source} to table {self.rule.table}"

    def remove(self) -> None:
        """Take the rule away."""
        _commit(rule_delete(self.rule))


@dataclass(frozen=True, slots=True)
class RangeAddress:
    """An address of the node in its own podCIDR, on loopback."""

    address: str
    kind = "address"

    @property
    def names(self) -> tuple[str, ...]:
        """The address."""
        return (self.address,)

    def __str__(self) -> str:
        return f"address {self.address} of lo"

    def remove(self) -> None:
        """Take the address away."""
        _commit(address_delete(LOOPBACK_INDEX, self.address))


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A sysctl that podwire has set, and nobody else since."""

    path: Path
    noted: Noted
    state_dir: Path
    kind = "sysctl"

    @property
    def names(self) -> tuple[str, ...]:
        """The sysctl."""
        return (sysctls.name_of(self.path),)

    def __str__(self) -> str:
        return f"{self.names[0]} = {self.noted.value}: {self.noted.before} as before"

    def remove(self) -> None:
        """Set it back."""
        sysctls.restore(self.path, self.noted)
        sysctls.forget(self.state_dir, self.path)


@dataclass(frozen=True, slots=True)
class Files:
    """Files, and the folder that they were alone in."""

    kind: str
    names: tuple[str, ...]
    folder: Path | None

    def __str__(self) -> str:
        if len(self.names) > 1 and self.folder:
            return f"{counted(len(self.names), 'file')} in {self.folder}"
        return f"{self.kind} {', '.join(self.names) or self.folder}"

    def remove(self) -> None:
        """Take away the files, and the folder unless something else is in it."""
        for name in self.names:
            Path(name).unlink(missing_ok=True)
        if self.folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
