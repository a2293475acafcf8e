"""What the ledger holds, and what it answers when it cannot: values and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from netaddr import AddrFormatError, IPAddress

PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}  # IANA protocol numbers


class State(StrEnum):
    """Where an attachment is in its life; its addresses are taken in every state."""

    PENDING = "pending"
    ATTACHED = "attached"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Key:
    """What CNI identifies an attachment by."""

    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"interface {self.ifname!r} of container {self.container_id!r}"


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the node that leads to a pod: protocol 6, 17 or 132.

    `host_ip` "" is every address of the node; "0.0.0.0" and "::" are every one of that family.
    """

    protocol: int
    host_port: int
    container_port: int
    host_ip: str = ""

    def __str__(self) -> str:
        where = f" on {self.host_ip}" if self.host_ip else ""
        return f"{self.host_port}/{PROTOCOLS.get(self.protocol, self.protocol)}{where}"

    def conflicts(self, other: HostPort) -> bool:
        """Say whether some packet would be for both."""
        if (self.protocol, self.host_port) != (other.protocol, other.host_port):
            return False
        if not self.host_ip or not other.host_ip:
            return True
        try:
            mine, theirs = IPAddress(self.host_ip), IPAddress(other.host_ip)
        except (AddrFormatError, ValueError):
            return self.host_ip == other.host_ip
        return mine.version == theirs.version and (mine == theirs or not mine or not theirs)


@dataclass(frozen=True, slots=True)
class Claim:
    """What an ADD says of the attachment it wants; `network` is the name of its network configuration.

    `pod` is "namespace/name" ("" unknown). `sticky` is for how many seconds after its end its addresses are
    kept for a pod of the same name; it needs `pod`. `mac` and `wiring` (what the CNI plugin must know to wire
    the pod again) are kept as they are.
    """

    network: str
    netns: str
    host_ifname: str
    request_id: str
    pod: str = ""
    mac: str = ""
    host_ports: tuple[HostPort, ...] = ()
    wiring: str = ""
    sticky: float = 0.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod interface. `result` is the ADD result as JSON ("" while pending), `created` epoch seconds."""

    key: Key
    network: str  # the name of the network configuration that asked for it
    netns: str
    host_ifname: str
    addresses: tuple[IPAddress, ...]  # in the order of the demands
    state: State
    request_id: str
    result: str
    boot_id: str
    created: float
    pod: str = ""
    mac: str = ""
    host_ports: tuple[HostPort, ...] = ()
    wiring: str = ""
    sticky: float = 0.0

    @property
    def holder(self) -> str:
        """The attachment in words, for whom it stands in the way of."""
        return f"pod {self.pod} ({self.key})" if self.pod else str(self.key)


@dataclass(frozen=True, slots=True)
class Kept:
    """A free address that waits for a pod to come back, at most until `until` (epoch seconds)."""

    address: IPAddress
    network: str
    ifname: str
    pod: str
    until: float


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a group of ranges is, in addresses.

    `capacity` is how many may be given without being asked for by name; `used` of them have a pod (with
    `releasing`, whose pod is going), `quarantined` were freed a moment ago, `kept` wait for their pod.
    `reserved` are given on request only, `excluded` never; neither counts in the other figures.
    """

    name: str  # "10.1.0.0/24", or a pool's name
    version: int
    capacity: int
    used: int
    releasing: int
    quarantined: int
    kept: int
    reserved: int
    excluded: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a source has no address: how many it has, and what becomes of those. `wait` is in seconds."""

    source: str
    size: int
    releasing: int
    kept: int
    wait: float | None  # until the next one leaves quarantine

    def __str__(self) -> str:
        parts = []
        if self.releasing:
            parts.append(f"{self.releasing} being released")
        if self.kept:
            parts.append(f"{self.kept} kept for pods that may come back")
        if self.wait is not None:
            parts.append(f"the next one leaves quarantine in {math.ceil(self.wait)} s")
        text = f"{self.source} ({self.size} addresses)"
        return f"{text}: {', '.join(parts)}" if parts else text


class LedgerError(Exception):
    """The ledger cannot do what was asked; the message is one sentence."""


class LedgerBusy(LedgerError):
    """Another process kept the ledger locked for the whole busy timeout: try again."""


class InTheWay(LedgerError):
    """A reservation failed; `releasing` are the attachments whose end (`forget`) may let it succeed."""

    def __init__(self, message: str, releasing: tuple[Attachment, ...] = ()) -> None:
        super().__init__(message)
        self.releasing = releasing


class Exhausted(InTheWay):
    """A range has no free address now. `retry_after`: seconds until quarantine lets one go, if it has one."""

    def __init__(self, shortages: Sequence[Shortage], releasing: tuple[Attachment, ...] = ()) -> None:
        super().__init__(f"no free pod address in {' and in '.join(map(str, shortages))}", releasing)
        self.shortages = tuple(shortages)
        waits = [shortage.wait for shortage in shortages]
        self.retry_after = None if None in waits else max(wait for wait in waits if wait is not None)


class AddressTaken(InTheWay):
    """The address that was asked for by name is somebody else's; `holder` says whose, in words."""

    def __init__(self, address: IPAddress, holder: str, releasing: tuple[Attachment, ...] = ()) -> None:
        super().__init__(f"the address {address} is taken: {holder}", releasing)
        self.address = address
        self.holder = holder


class HostPortTaken(LedgerError):
    """A port of the node that was asked for is another pod's; `holder` says whose, in words."""

    def __init__(self, host_port: HostPort, holder: str) -> None:
        super().__init__(f"the host port {host_port} is taken by {holder}")
        self.host_port = host_port
        self.holder = holder


class AlreadyAttached(LedgerError):
    """The key has an attachment in use; the same `request_id` means that this is a repeated try."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(f"{attachment.key} is attached already")
        self.attachment = attachment


class StillReleasing(InTheWay):
    """An attachment's link is not gone yet: the key's own, or one whose addresses this pod is to get again.

    Remove its link, `forget` it, try again.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(f"{attachment.key} is still being released", (attachment,))
        self.attachment = attachment
