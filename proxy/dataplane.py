"""What every dataplane can do: bring frontends to the kernel, whatever they are made of there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from netlink.errors import NetlinkError
from proxy.frontends import Frontend, FrontendKey
from proxy.table import Change


@dataclass(frozen=True, slots=True)
class NodeRanges:
    """What the node rules need to know beside services; of any family, in any order, in canonical form.

    `node_ports` are those of the node's addresses that have node ports; `node_pods` are the ranges of its own
    pods, and `local_pod_cidrs` those of them that get another address on the way out: that of their family in
    `egress`, or the interface's. They keep their own towards `pod_cidrs`, `node_addresses` and
    `no_masquerade`. The ranges of a field may overlap. Fields that are large are `Members`, so that the
    difference between two values is found at once.
    """

    pod_cidrs: Collection[str] = ()
    local_pod_cidrs: tuple[str, ...] = ()
    no_masquerade: tuple[str, ...] = ()
    node_ports: tuple[str, ...] = ("0.0.0.0/0", "::/0")
    node_pods: tuple[str, ...] = ()
    node_addresses: Collection[str] = ()
    egress: tuple[str, ...] = ()


NOTHING = NodeRanges(node_ports=())


class Dataplane(Protocol):
    """The service proxy of one IP family in the kernel.

    After a failed `apply` what it knows may be wrong: call `load` before anything else.
    """

    @property
    def name(self) -> str:
        """What kube-proxy calls its mode: nftables or iptables."""

    @property
    def elements(self) -> int:
        """How much the kernel holds: map elements, or rules."""

    @property
    def commits(self) -> int:
        """How often it has raised the generation of nftables' rulesets."""

    @property
    def gone(self) -> tuple[FrontendKey, ...]:
        """What the last load took out of the kernel: frontends that went while nobody looked."""

    def load(self, frontends: Iterable[Frontend], ranges: NodeRanges) -> bool:
        """Make the kernel hold exactly this; return whether something of ours was there to start from."""

    def apply(self, changes: Iterable[Change], ranges: NodeRanges | None = None) -> int:
        """Bring changes of frontends, and ranges if given, to the kernel; return how much moved.

        Raises NetlinkError.
        """

    def intact(self) -> bool:
        """Whether nobody removed anything that is found without looking at every element."""

    def tidy(self) -> None:
        """Do what can wait until changes pause."""

    def remove(self) -> None:
        """Take exactly our own out of the kernel."""

    def culprit(self, error: NetlinkError, frontends: Iterable[Frontend]) -> Frontend | None:
        """Return a frontend that the kernel refused; None for anything else."""
