"""The socket that commits operations: all or none, in one atomic batch.

Nothing is listed first, which is what makes the `nft` program slow on a large ruleset.
Source: linux/netfilter/nfnetlink.h, nf_tables.h.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from netlink.attributes import number, parsed
from netlink.errors import NetlinkError
from netlink.family import Family
from netlink.messages import (
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_code,
    pack,
    split,
)
from netlink.nftables import dump
from netlink.nftables.objects import Elements, Map, Table
from netlink.nftables.operations import Operation, Pairs, encode

NFNL_SUBSYS_NFTABLES = 10
BATCH_BEGIN, BATCH_END, BATCH_GENERATION = 0x10, 0x11, 1

NLMSGERR_ATTR_MSG, NLMSGERR_ATTR_OFFS = 1, 2
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

RECEIVE_BYTES = 1 << 20
SMALL_BATCH = 64 << 10
"""What fits any socket's send buffer."""


class BatchError(NetlinkError):
    """The kernel refused a batch and changed nothing; names the operation, and the element if it is one."""

    def __init__(self, code: int, operation: Operation | None, element: bytes | None, detail: str) -> None:
        what = "commit the nftables batch" if operation is None else str(operation)
        if element is not None:
            what += f", element {element.hex()}"
        super().__init__(code, f"cannot {what}", detail)
        self.operation = operation
        self.element = element

    @property
    def outdated(self) -> bool:
        """Whether the ruleset is no longer of the generation that the batch was made for (ERESTART)."""
        return self.errno == errno.ERESTART


class Nftables(Protocol):
    """One table of nftables: what the kernel and the fake both do."""

    family: Family

    @property
    def commits(self) -> int:
        """Batches that were committed."""

    def commit(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or, with BatchError, none."""
        ...

    def table_comment(self) -> str | None:
        """Return the comment of our table, or None when there is no table."""
        ...

    def chains(self) -> frozenset[str]:
        """Return the names of the table's chains."""
        ...

    def rules(self) -> dict[str, tuple[str, ...]]:
        """Return the comments of the table's rules, in order, by chain."""
        ...

    def maps(self) -> frozenset[str]:
        """Return the names of the table's sets and maps, but for those that rules write in braces."""
        ...

    def elements(self, which: Map) -> Elements:
        """Return what is in a map."""
        ...


class Nft:
    """The kernel's nftables, seen through one table, in the network namespace of the thread that opens it."""

    def __init__(self, family: Family, table: str) -> None:
        self.family = family
        self.table = Table(family, table)
        self._socket = NftSocket()

    def __enter__(self) -> Self:
        self._socket.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.__exit__()

    @property
    def commits(self) -> int:
        """Batches that the kernel took."""
        return self._socket.commits

    def commit(self, operations: Sequence[Operation]) -> None:
        """Apply all operations or, with BatchError, none."""
        self._socket.commit((self.table, operations))

    def table_comment(self) -> str | None:
        """Return the comment of our table, or None when there is no table."""
        return self._socket.table_comment(self.table)

    def chains(self) -> frozenset[str]:
        """Return the names of the table's chains."""
        return self._socket.chains(self.table)

    def rules(self) -> dict[str, tuple[str, ...]]:
        """Return the comments of the table's rules, in order, by chain."""
        return self._socket.rules(self.table)

    def maps(self) -> frozenset[str]:
        """Return the names of the table's sets and maps, but for those that rules write in braces."""
        return self._socket.maps(self.table)

    def elements(self, which: Map) -> Elements:
        """Return what is in a map."""
        return self._socket.elements(self.table, which)


class NftSocket:
    """The kernel's nftables: any tables of the network namespace of the thread that opens it.

    A batch may span tables and families. One thread at a time.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._send_bytes = SMALL_BATCH
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._sequence = 0
        self.commits = 0
        """Batches that the kernel took: each raised the generation by one."""

    def __enter__(self) -> Self:
        if self._socket is not None:
            raise RuntimeError("the nftables socket is open already")
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, flags, 12)  # NETLINK_NETFILTER
        self._socket.bind((0, 0))
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def commit(self, *parts: tuple[Table, Sequence[Operation]], generation: int = 0) -> None:
        """Apply the operations of all parts or, with BatchError, none.

        Given a `generation`, the kernel refuses the batch (`BatchError.outdated`) once that is past.
        """
        operations = [(table, operation) for table, some in parts for operation in some]
        encoded = [
            (table, operation, message)
            for index, (table, operation) in enumerate(operations)
            for message in encode(table, operation, index)
        ]
        if not encoded:
            return
        first = self._sequence + 1
        known = number(BATCH_GENERATION, generation) if generation else b""
        messages = [self._frame(BATCH_BEGIN, 0, known, subsystem=0, resource=NFNL_SUBSYS_NFTABLES)]
        for table, _, (kind, flags, body, _) in encoded:
            flags |= NLM_F_ACK if len(messages) == len(encoded) else 0
            messages.append(self._frame(kind, flags, body, family=table.family.af))
        sent = [(operation, elements) for _, operation, (*_, elements) in encoded]
        messages.append(self._frame(BATCH_END, 0, b"", subsystem=0, resource=NFNL_SUBSYS_NFTABLES))
        data = b"".join(messages)
        if len(data) > self._send_bytes:
            self._send_bytes = 2 * len(data)
            self._open.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self._send_bytes)
        self._open.send(data)
        self._collect(sent, messages, first + 1)
        self.commits += 1

    def generation(self) -> int:
        """Return the number of the last change that anybody made to this namespace's ruleset; 10 µs."""
        return dump.generation(functools.partial(self._ask, 0))

    def table_comment(self, table: Table) -> str | None:
        """Return the comment of a table, or None when there is no such table."""
        return dump.table_comment(functools.partial(self._ask, table.family.af), table)

    def chains(self, table: Table) -> frozenset[str]:
        """Return the names of a table's chains."""
        return dump.chains(functools.partial(self._ask, table.family.af), table)

    def rules(self, table: Table) -> dict[str, tuple[str, ...]]:
        """Return the comments of a table's rules, in order, by chain."""
        return dump.rules(functools.partial(self._ask, table.family.af), table)

    def maps(self, table: Table) -> frozenset[str]:
        """Return the names of a table's sets and maps, but for those that rules write in braces."""
        return dump.maps(functools.partial(self._ask, table.family.af), table)

    def elements(self, table: Table, which: Map) -> Elements:
        """Return what is in a map of a table."""
        return dump.elements(functools.partial(self._ask, table.family.af), table, which)

    @property
    def _open(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError("the nftables socket is not open")
        return self._socket

    def _frame(
        self, kind: int, flags: int, body: bytes, *, family: int = 0, subsystem: int = 10, resource: int = 0
    ) -> bytes:
        self._sequence += 1
        nfgenmsg = struct.pack(">BBH", family, 0, resource)
        return pack(subsystem << 8 | kind, flags, self._sequence, nfgenmsg + body)

    def _collect(
        self,
        sent: Sequence[tuple[Operation, Pairs]],
        messages: Sequence[bytes],
        first: int,
    ) -> None:
        """Read the answers to a batch: the last operation's acknowledgement, or errors.

        The kernel works during `send`, so the answers are there.
        """
        wanted = first + len(sent) - 1
        while True:
            for kind, flags, sequence, body in self._receive():
                if kind != NLMSG_ERROR or sequence < first - 1:
                    continue
                code = error_code(body)
                if code:
                    self._drain()
                    position = sequence - first
                    inside = 0 <= position < len(sent)
                    operation, elements = sent[position] if inside else (None, ())
                    detail, offset = _extended(body, flags)
                    element = _element_at(messages[position + 1], offset, elements) if inside else None
                    raise BatchError(code, operation, element, detail)
                if sequence == wanted:
                    return

    def _drain(self) -> None:
        """Drop the other answers to a refused batch."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._open.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)

    def _ask(self, family: int, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Send one question; yield (message type, flags, whole message) of each answer up to the end."""
        self._open.send(self._frame(kind, flags, body, family=family))
        wanted = self._sequence
        multi = bool(flags & NLM_F_DUMP)
        while True:
            for answer, answer_flags, sequence, message in self._receive():
                if sequence != wanted:
                    continue
                yield answer, answer_flags, message
                if not multi or answer in (NLMSG_DONE, NLMSG_ERROR):
                    return

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        size = self._open.recv_into(self._received)
        yield from split(bytes(self._received[:size]))


def _extended(body: bytes, flags: int) -> tuple[str, int]:
    """Return the kernel's own words and the offset of the offending attribute (0 if unknown)."""
    if not flags & NLM_F_ACK_TLVS:
        return "", 0
    start = 36 if flags & NLM_F_CAPPED else 20 + struct.unpack_from("=I", body, 20)[0]
    found = parsed(body, start)
    words = found.get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    offset = found.get(NLMSGERR_ATTR_OFFS)
    return words, struct.unpack("=I", offset)[0] if offset else 0


def _element_at(message: bytes, offset: int, elements: Pairs) -> bytes | None:
    """Return the key of the element that stands at an offset of a message, if one does."""
    if not offset or not elements:
        return None
    position = 20
    while position < len(message):
        length, kind = struct.unpack_from("=HH", message, position)
        if kind & 0x3FFF == 3:
            break
        position += (length + 3) & ~3
    position += 4
    for key, _ in elements:
        length = (struct.unpack_from("=H", message, position)[0] + 3) & ~3
        if position <= offset < position + length:
            return key
        position += length
    return None
