"""A node made of namespaces, what a runtime does to it, and what must be true of it at any time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from netaddr import IPNetwork

from cni.plugin import Plugin, ledger_of, rules_for
from cni.reaper import Reaper
from cni.settings import Mode, NodeSettings
from cni.wiring import HOST_PREFIX
from ipam.ledger import Ledger, State
from ipam.pools import IpamConfig
from netlink import netns
from netlink.decode import Link
from netlink.requests import IFF_UP, ROUTE_PROTOCOL, RTM_NEWLINK, Request, address_add
from netlink.rtnl import Rtnl

CIDRS = (IPNetwork("10.1.0.0/24"), IPNetwork("fd00:1::/64"))
AT_ONCE = IpamConfig(quarantine=0.0)  # an address that was freed may be given again at once
ROUTED = NodeSettings(Mode.ROUTED, 1400, CIDRS, AT_ONCE)
BRIDGED = NodeSettings(Mode.BRIDGE, 1400, CIDRS, AT_ONCE)
SMALL = replace(ROUTED, pod_cidrs=(IPNetwork("10.1.0.0/29"),))  # room for five pods
CONFIG = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}
RTM_DELADDR = 21  # linux/rtnetlink.h; podwire itself never removes an address


def request_env(command: str, container: str, namespace: str = "", **more: str) -> dict[str, str]:
    """Return the environment of one execution; more variables without their `CNI_`."""
    values = {"COMMAND": command, "CONTAINERID": container, "NETNS": namespace, "IFNAME": "eth0"} | more
    return {f"CNI_{name}": value for name, value in values.items() if value}


def stdin(**more: Any) -> bytes:
    return json.dumps(CONFIG | more).encode()


@dataclass(slots=True)
class Node:
    """A node with the ledger in `state_dir`; `pods` has the namespace's name of each container."""

    make_namespace: Callable[[], str]
    state_dir: Path
    settings: NodeSettings | None = ROUTED
    namespace: str = field(init=False)
    pods: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.namespace = self.make_namespace()
        if self.settings:
            with ledger_of(self.state_dir) as ledger:
                ledger.save_settings(self.settings.to_mapping())
                netns.run(self.namespace, reconcile, ledger)

    def env(self, command: str, container: str, **more: str) -> dict[str, str]:
        """Return the environment of an execution for a container, whose namespace is made if need be."""
        if container not in self.pods:
            self.pods[container] = self.make_namespace()
        return request_env(command, container, str(netns.path(self.pods[container])), **more)

    def handle(
        self, plugin: Plugin, env: dict[str, str], config: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Let a plugin handle a request on this node; return the status and what it printed."""
        code, out = netns.run(self.namespace, plugin.handle, env, stdin() if config is None else config)
        return code, json.loads(out) if out else {}

    def cni(self, command: str, container: str) -> tuple[int, dict[str, Any]]:
        """Handle a request as the binary does while the daemon is down."""
        with ledger_of(self.state_dir) as ledger:
            return self.handle(Plugin(ledger, self.state_dir), self.env(command, container))

    def recover(self) -> None:
        """Do what a daemon that starts does, and wait for the end of it."""

        def start_and_stop() -> None:
            with ledger_of(self.state_dir) as ledger, Reaper(ledger, self.state_dir) as reaper:
                reaper.recover()
                reconcile(ledger)

        netns.run(self.namespace, start_and_stop)

    def host_links(self) -> set[str]:
        """Return the names of the pods' interfaces on the node."""
        return {link.name for link in netns.run(self.namespace, links) if link.name.startswith(HOST_PREFIX)}

    def host_routes(self) -> list[str]:
        """Return the destinations of the node's routes that are ours."""
        return sorted(r.destination for r in netns.run(self.namespace, routes, ROUTE_PROTOCOL))

    def pod_addresses(self) -> list[str]:
        """Return every address in every pod, without those that the kernel gives by itself."""
        found = [a.split("/")[0] for name in self.pods.values() for a in netns.run(name, addresses)]
        return sorted(a for a in found if not a.startswith("fe80:") and a not in ("127.0.0.1", "::1"))


class Runtime:
    """A node, its ledger and a plugin, as a runtime sees them."""

    def __init__(self, node: Node, ledger: Ledger) -> None:
        self.node, self.ledger = node, ledger
        self.plugin = Plugin(ledger, node.state_dir)

    def configure(self, settings: NodeSettings) -> None:
        self.ledger.save_settings(settings.to_mapping())

    def call(self, command: str, container: str = "c1", **config: Any) -> tuple[int, dict[str, Any]]:
        return self.node.handle(self.plugin, self.node.env(command, container), stdin(**config))

    def add(self, container: str = "c1", **config: Any) -> dict[str, Any]:
        code, result = self.call("ADD", container, **config)
        assert code == 0, result
        return result

    def address(self, container: str, **config: Any) -> str:
        """Add a pod and return its first address."""
        return str(self.add(container, **config)["ips"][0]["address"]).split("/")[0]

    def delete(self, container: str = "c1") -> None:
        assert self.call("DEL", container) == (0, {})

    def refused(self, command: str, container: str = "c1", **config: Any) -> tuple[int, str]:
        """Let a request fail; return code and sentence."""
        code, error = self.call(command, container, **config)
        assert code == 1
        assert error["cniVersion"] == "1.1.0"
        return error["code"], error["msg"]


def assert_consistent(node: Node, expected: set[str] | None = None) -> None:
    """Ledger and kernel agree, no address is doubled and none is leaked; given, these are the containers."""
    with ledger_of(node.state_dir) as ledger:
        rows = ledger.attachments()
        assert netns.run(node.namespace, reconcile, ledger) == 0
    assert {row.state for row in rows} <= {State.ATTACHED}
    held = sorted(str(address) for row in rows for address in row.addresses)
    assert len(set(held)) == len(held)
    assert node.host_links() == {row.host_ifname for row in rows}
    assert node.pod_addresses() == held
    assert node.host_routes() == sorted(f"{a}/{128 if ':' in a else 32}" for a in held)
    if expected is not None:
        assert {row.key.container_id for row in rows} == expected


def reconcile(ledger: Ledger) -> int:
    """Set the nftables tables of pods right; return how much had to be changed."""
    with rules_for(ledger) as rules:
        return rules.reconcile()


def links() -> tuple[Link, ...]:
    with Rtnl() as rtnl:
        return rtnl.links()


def link(name: str) -> Link | None:
    with Rtnl() as rtnl:
        return rtnl.link(name)


def routes(protocol: int | None = None) -> tuple[Any, ...]:
    with Rtnl() as rtnl:
        return rtnl.routes(protocol)


def addresses() -> list[str]:
    with Rtnl() as rtnl:
        return [a.cidr for a in rtnl.addresses()]


def commit(*requests: Request) -> None:
    with Rtnl() as rtnl:
        rtnl.commit(*requests)


def link_down(index: int) -> Request:
    # struct ifinfomsg: no family, no type, the index, no flags, and that IFF_UP is the one that changes
    return Request(f"take down {index}", RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, IFF_UP))


def address_delete(index: int, address: str) -> Request:
    return replace(address_add(index, address), kind=RTM_DELADDR, flags=0)
