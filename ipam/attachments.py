"""The table of attachments: its rows, and what is asked of them. Works inside the caller's transaction."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from netaddr import IPAddress

from ipam.ranges import address_of
from ipam.records import Attachment, Claim, HostPort, HostPortTaken, Key, State, StillReleasing

COLUMNS = (
    "container_id, ifname, network, netns, host_ifname, addresses, state, request_id, result, boot_id,"
    " created, pod, mac, host_ports, wiring, sticky"
)

# What makes version 1 of the tables, and what makes version 2 of version 1.
SCHEMA_1 = (
    """CREATE TABLE attachment (
        container_id TEXT NOT NULL, ifname TEXT NOT NULL, network TEXT NOT NULL, netns TEXT NOT NULL,
        host_ifname TEXT NOT NULL, addresses TEXT NOT NULL, state TEXT NOT NULL,
        request_id TEXT NOT NULL, result TEXT NOT NULL, boot_id TEXT NOT NULL, created REAL NOT NULL,
        PRIMARY KEY (container_id, ifname)
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
)
# Both indexes have few rows, and cost the plain ADD nothing.
SCHEMA_2 = (
    "ALTER TABLE attachment ADD COLUMN pod TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE attachment ADD COLUMN mac TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE attachment ADD COLUMN host_ports TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE attachment ADD COLUMN wiring TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE attachment ADD COLUMN sticky REAL NOT NULL DEFAULT 0",
    "CREATE INDEX attachment_sticky ON attachment (pod) WHERE sticky > 0",
    "CREATE INDEX attachment_host_ports ON attachment (state) WHERE host_ports != ''",
)


def save(db: sqlite3.Connection, attachment: Attachment) -> None:
    """Write an attachment; one of the same key is replaced."""
    db.execute(
        f"INSERT OR REPLACE INTO attachment ({COLUMNS})"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        _row(attachment),
    )


def find(db: sqlite3.Connection, key: Key) -> Attachment | None:
    """Return the attachment of the key."""
    row = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE container_id = ? AND ifname = ?",
        (key.container_id, key.ifname),
    ).fetchone()
    return attachment_of(row) if row else None


def releasing(db: sqlite3.Connection) -> tuple[Attachment, ...]:
    """Return the released attachments, oldest first."""
    rows = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE state = 'released' ORDER BY created"
    ).fetchall()
    return tuple(map(attachment_of, rows))


def holding(db: sqlite3.Connection, address: IPAddress) -> Attachment | None:
    """Return the attachment that has the address. Reads every one: for messages."""
    rows = db.execute(f"SELECT {COLUMNS} FROM attachment").fetchall()
    return next((a for a in map(attachment_of, rows) if address in a.addresses), None)


def await_own(db: sqlite3.Connection, key: Key, claim: Claim) -> None:
    """Raise StillReleasing while addresses that will be kept for this pod are still on their way there."""
    if not claim.pod:
        return
    row = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE state = 'released' AND pod = ? AND network = ?"
        " AND ifname = ? AND sticky > 0",
        (claim.pod, claim.network, key.ifname),
    ).fetchone()
    if row:
        raise StillReleasing(attachment_of(row))


def check_host_ports(db: sqlite3.Connection, key: Key, wanted: Sequence[HostPort]) -> None:
    """Raise HostPortTaken when an attachment in use has one of the ports; a released one has none."""
    if not wanted:
        return
    rows = db.execute(
        f"SELECT {COLUMNS} FROM attachment WHERE state IN ('pending', 'attached') AND host_ports != ''"
    ).fetchall()
    for other in map(attachment_of, rows):
        for theirs in other.host_ports if other.key != key else ():
            for ours in wanted:
                if ours.conflicts(theirs):
                    raise HostPortTaken(ours, other.holder)


def attachment_of(row: Sequence[Any]) -> Attachment:
    """Return the attachment of a row with COLUMNS."""
    container_id, ifname, network, netns, host_ifname, addresses, state, *rest = row
    request_id, result, boot_id, created, pod, mac, host_ports, wiring, sticky = rest
    return Attachment(
        key=Key(container_id, ifname),
        network=network,
        netns=netns,
        host_ifname=host_ifname,
        addresses=tuple(_address(text) for text in addresses.split()),
        state=State(state),
        request_id=request_id,
        result=result,
        boot_id=boot_id,
        created=created,
        pod=pod,
        mac=mac,
        host_ports=tuple(_host_port(text) for text in host_ports.split()),
        wiring=wiring,
        sticky=sticky,
    )


def _row(attachment: Attachment) -> tuple[str | float, ...]:
    return (
        attachment.key.container_id,
        attachment.key.ifname,
        attachment.network,
        attachment.netns,
        attachment.host_ifname,
        " ".join(map(str, attachment.addresses)),
        attachment.state,
        attachment.request_id,
        attachment.result,
        attachment.boot_id,
        attachment.created,
        attachment.pod,
        attachment.mac,
        _host_ports_text(attachment.host_ports),
        attachment.wiring,
        attachment.sticky,
    )


def _address(text: str) -> IPAddress:
    # Our own text, read four times in a pod's life: netaddr's parser takes 7 µs, this takes 1.
    version, family = (6, socket.AF_INET6) if ":" in text else (4, socket.AF_INET)
    return address_of(version, int.from_bytes(socket.inet_pton(family, text), "big"))


def _host_ports_text(host_ports: Iterable[HostPort]) -> str:
    return " ".join(f"{p.protocol},{p.host_port},{p.container_port},{p.host_ip}" for p in host_ports)


def _host_port(text: str) -> HostPort:
    protocol, host_port, container_port, host_ip = text.split(",")
    return HostPort(int(protocol), int(host_port), int(container_port), host_ip)
