"""What HAProxy is to do: the backends of all services that ask for it, and what leads to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from netlink.family import Family, with_port
from proxy.l7.policy import Policy, Protocol
from proxy.struct import Struct


class Server(NamedTuple):
    """An endpoint; ordered by address and port."""

    address: str
    port: int

    @property
    def name(self) -> str:
        """What HAProxy calls it: 10.244.1.5:8080, or fd00::5:8080."""
        return f"{self.address}:{self.port}"

    @property
    def target(self) -> str:
        """The same with an IPv6 address in brackets, as text of addresses has it."""
        return with_port(self.address, self.port)


class Route(NamedTuple):
    """What a client addresses; an empty address is every address of the node: a node port. In one family."""

    family: Family
    address: str
    port: int


class Backend(Struct, frozen=True):
    """One service port, in one family, for one kind of client: where its requests go, and how.

    `name` is HAProxy's (letters, digits, `_`, `-`, `.`), `service` the port's title ("namespace/name:port").
    """

    name: str
    service: str
    family: Family
    policy: Policy
    routes: tuple[Route, ...]
    servers: tuple[Server, ...]

    @property
    def protocol(self) -> Protocol:
        """Which of the two listeners its connections come by."""
        return self.policy.protocol


Backends = Mapping[str, Backend]
"""All of them, by name."""
