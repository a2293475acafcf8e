"""Generic netlink (linux/genetlink.h): families of messages, numbered by the kernel as modules are loaded."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import ClassVar, Self

from netlink.attributes import parsed, text
from netlink.errors import NetlinkError
from netlink.messages import NLMSG_ERROR, error_code, pack, split

NETLINK_GENERIC, GENL_ID_CTRL = 16, 16
CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 3, 1, 2
RECEIVE_BYTES = 1 << 18

_HEADER = struct.Struct("=BBxx")  # struct genlmsghdr: command, version
BODY = 16 + _HEADER.size
"""Where a message's attributes begin."""


class Generic:
    """A socket for one family, in the network namespace of the thread that opens it; one thread at a time.

    Opening it loads the module; it raises NetlinkError where the kernel has no such family.
    """

    NAME: ClassVar[str]
    """What the kernel calls the family."""
    MISSING: ClassVar[tuple[str, str]]
    """What is told where there is none: what cannot be done, and why."""
    VERSION: ClassVar[int] = 1

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0
        self._family = 0

    def __enter__(self) -> Self:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.bind((0, 0))
            self._family = self._find()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _frame(self, command: int, flags: int, body: bytes) -> bytes:
        """Return the next request."""
        self._sequence += 1
        return pack(self._family, flags, self._sequence, _HEADER.pack(command, self.VERSION) + body)

    def _send(self, requests: bytes) -> None:
        self._open.send(requests)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield (type, flags, sequence, whole message) of what is received next."""
        return split(self._open.recv(RECEIVE_BYTES))

    def _find(self) -> int:
        """Return the family's number."""
        what, why = self.MISSING
        self._sequence += 1
        body = _HEADER.pack(CTRL_CMD_GETFAMILY, 1) + text(CTRL_ATTR_FAMILY_NAME, self.NAME)
        self._send(pack(GENL_ID_CTRL, 0, self._sequence, body))
        for kind, _, _, message in self._receive():
            if kind == NLMSG_ERROR:
                code = error_code(message)
                raise NetlinkError(code, what, why if code == errno.ENOENT else "")
            return int(struct.unpack("=H", parsed(message, BODY)[CTRL_ATTR_FAMILY_ID])[0])
        raise NetlinkError(errno.EPROTO, what)

    @property
    def _open(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError(f"the netlink socket for {self.NAME} is not open")
        return self._socket
