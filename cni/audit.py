"""Compare what the ledger says of a node's pods with what the kernel and the runtime have.

`observe` looks, `findings` judges and is pure. Nothing here changes anything.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cni.attachments import rules_of, wired
from cni.rules import Rules, RulesError
from cni.settings import Mode
from cni.wiring import HOST_PREFIX
from ipam.ledger import Attachment, State
from netlink.requests import ROUTE_PROTOCOL
from netlink.rtnl import Rtnl

BY_RUNTIME = "the runtime's DEL or GC removes it; `podwire ipam release {}` does it now"
BY_DAEMON = "the daemon sets it again within seconds; is it running?"
BY_RESTART = "a new sandbox of the pod gets it again; delete the pod"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the kernel and the runtime have.

    `interfaces` are host ends by name, with their index; `routes` the interface index by pod address;
    `namespaces` those paths of the ledger that exist; `missing_rules` sentences by host interface;
    `sandboxes` whether each is ready, by container id, or None where no runtime was asked.
    """

    interfaces: Mapping[str, int]
    routes: Mapping[str, int]
    namespaces: frozenset[str]
    missing_rules: Mapping[str, str]
    sandboxes: Mapping[str, bool] | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference, in a sentence, and what mends it. `pod` is "namespace/name" or the container's id."""

    pod: str
    address: str
    what: str
    remedy: str


def observe(
    attachments: Iterable[Attachment], rules: Rules, sandboxes: Mapping[str, bool] | None = None
) -> Seen:
    """Look at the kernel, from inside the node's network namespace."""
    attachments = tuple(attachments)
    with Rtnl() as rtnl:
        routes = {
            r.destination.split("/")[0]: r.oif for r in rtnl.routes(ROUTE_PROTOCOL) if r.oif and not r.gateway
        }
    missing: dict[str, str] = {}
    for attachment in attachments:
        try:
            if attachment.state is State.ATTACHED:
                rules.check(rules_of(attachment))
        except RulesError as error:
            missing[attachment.host_ifname] = str(error)
    return Seen(
        interfaces={name: index for index, name in socket.if_nameindex() if name.startswith(HOST_PREFIX)},
        routes=routes,
        namespaces=frozenset(a.netns for a in attachments if Path(a.netns).exists()),
        missing_rules=missing,
        sandboxes=sandboxes,
    )


def findings(attachments: Iterable[Attachment], seen: Seen) -> tuple[Finding, ...]:
    """Return what differs, by pod and then what the ledger does not know."""
    attachments = tuple(attachments)
    found = [finding for attachment in attachments for finding in _of_attachment(attachment, seen)]
    known = {attachment.host_ifname for attachment in attachments}
    addresses = {index: address for address, index in seen.routes.items()}
    for name, index in sorted(seen.interfaces.items()):
        if name not in known:
            what = f"the interface {name} is in no attachment of the ledger"
            found.append(
                Finding("-", addresses.get(index, "-"), what, f"`ip link del {name}` if no pod runs on it")
            )
    return tuple(found)


def _of_attachment(attachment: Attachment, seen: Seen) -> Iterable[Finding]:
    container = attachment.key.container_id
    address = ", ".join(map(str, attachment.addresses))

    def finding(what: str, remedy: str) -> Finding:
        return Finding(attachment.pod or container, address, what, remedy.format(container))

    if attachment.state is State.PENDING:
        yield finding("an ADD is under way, or died", "the next ADD, DEL or start of the daemon ends it")
        return
    if attachment.state is State.RELEASED:
        yield finding("its DEL is done, its interface is on its way out", "the daemon removes it")
        return
    index = seen.interfaces.get(attachment.host_ifname)
    if attachment.netns not in seen.namespaces:
        yield finding(f"its network namespace {attachment.netns} is gone: it got no DEL", BY_RUNTIME)
    elif index is None:
        yield finding(f"its host interface {attachment.host_ifname} is gone", BY_RESTART)
    if seen.sandboxes is not None and container not in seen.sandboxes:
        yield finding("the runtime has no such sandbox: it got no DEL", BY_RUNTIME)
    elif seen.sandboxes is not None and not seen.sandboxes[container]:
        yield finding("the runtime has stopped its sandbox without a DEL", BY_RUNTIME)
    if index is not None and wired(attachment).mode is not Mode.BRIDGE:
        for ip in map(str, attachment.addresses):
            if ip not in seen.routes:
                yield finding(f"the host route to {ip} is gone", BY_RESTART)
            elif seen.routes[ip] != index:
                yield finding(f"the host route to {ip} leads to another interface", BY_RESTART)
    if index is not None and attachment.host_ifname in seen.missing_rules:
        yield finding(seen.missing_rules[attachment.host_ifname], BY_DAEMON)
