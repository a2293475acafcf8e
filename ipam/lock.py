"""One process and thread at a time on a container."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL = 0.005  # seconds; only two commands for the same container ever wait


class LockTimeout(Exception):
    """Another command for the container did not end in time."""


@contextmanager
def container_lock(directory: Path, container_id: str, timeout: float = 10.0) -> Iterator[None]:
    """Hold the container's lock; wait for it at most `timeout` seconds, else raise LockTimeout.

    The lock is one byte of `attachments.lock`, at an offset hashed from the container id: no file per
    container to leave behind, no unlink to race with. It belongs to the open file description (fcntl(2),
    F_OFD_SETLK), so threads exclude each other too, and the kernel drops it when the holder dies.
    Not reentrant.
    """
    offset = int.from_bytes(hashlib.blake2b(container_id.encode(), digest_size=7).digest(), "big")
    descriptor = _open(directory)
    try:
        deadline = time.monotonic() + timeout
        while not _set(descriptor, fcntl.F_WRLCK, offset):
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    f"container {container_id!r}: another command for it is still running after {timeout:g} s"
                )
            time.sleep(POLL)
        try:
            yield
        finally:
            # Closing is not enough: a child forked meanwhile shares the description and would keep the lock.
            _set(descriptor, fcntl.F_UNLCK, offset)
    finally:
        os.close(descriptor)


def _open(directory: Path) -> int:
    try:
        return os.open(f"{directory}/attachments.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _open(directory)


def _set(descriptor: int, kind: int, offset: int) -> bool:
    """Lock or unlock one byte without waiting; False when another description has it."""
    # struct flock: type, whence, start, length, pid (0 for F_OFD_SETLK), padded to the C size.
    request = struct.pack("hhqqi0q", kind, os.SEEK_SET, offset, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except BlockingIOError:
        return False
    return True
