"""What the kernel refused, in a sentence."""

from __future__ import annotations

import errno
import os


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says why, the text says which request.

    Branch on `errno`, never on the text.
    """

    def __init__(self, code: int, what: str, detail: str = "") -> None:
        reason = detail or os.strerror(code)
        super().__init__(code, f"{what}: {reason}")
        self.what = what

    def __str__(self) -> str:
        return str(self.args[1])

    @property
    def exists(self) -> bool:
        """Whether what was to be made is there already (EEXIST)."""
        return self.errno == errno.EEXIST

    @property
    def gone(self) -> bool:
        """Whether what was to be changed or removed is not there."""
        return self.errno in (errno.ENOENT, errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL)
