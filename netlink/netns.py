"""Network namespaces: made, removed and entered.

A namespace belongs to a thread. `run` moves the calling thread there and back, which costs 15 µs; a thread
of its own would cost 200 µs, a forked helper process, as pyroute2's NetNS uses, 6 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from netlink.errors import NetlinkError

T = TypeVar("T")
P = ParamSpec("P")

DIRECTORY = Path("/run/netns")

# linux/sched.h and linux/mount.h
CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 0x100000, 0x2

_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """Return where a named namespace is mounted; a path is returned as it is."""
    return Path(name) if name.startswith("/") else DIRECTORY / name


@contextlib.contextmanager
def opened(name: str | Path) -> Iterator[int]:
    """Open a namespace by name or path for the length of a block.

    Raises FileNotFoundError when there is none. Whether it is a namespace is for `is_namespace` to say.
    """
    fd = os.open(path(str(name)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def is_namespace(fd: int) -> bool:
    """Whether a descriptor is a network namespace (ioctl_ns(2), NS_GET_NSTYPE)."""
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def enter(fd: int) -> None:
    """Move the calling thread into the namespace open as `fd`, for good."""
    if _libc.setns(fd, CLONE_NEWNET):
        raise NetlinkError(ctypes.get_errno(), "enter the network namespace")


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Bring the calling thread back to its namespace at the end of a block.

    A thread that cannot come back must not go on: it would do a pod's work to the node.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        if _libc.setns(home, CLONE_NEWNET):
            os.abort()
        os.close(home)


def run(name: str | Path | int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function inside a namespace (name, path or open descriptor); return or raise what it does."""
    with contextlib.ExitStack() as stack:
        fd = name if isinstance(name, int) else stack.enter_context(opened(name))
        stack.enter_context(_returning())
        enter(fd)
        return function(*args, **kwargs)


def is_here(fd: int) -> bool:
    """Whether a descriptor is the namespace that the calling thread is in."""
    here, there = Path("/proc/thread-self/ns/net").stat(), os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def create(name: str) -> Path:
    """Make a named namespace, as `ip netns add` does; return its path.

    Raises FileExistsError when the name is taken.
    """
    _prepare_directory()
    target = path(name)
    os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0))

    try:
        with _returning():
            if _libc.unshare(CLONE_NEWNET):
                raise NetlinkError(ctypes.get_errno(), "make a network namespace")
            _mount("/proc/thread-self/ns/net", target, MS_BIND)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


def delete(name: str) -> None:
    """Remove a named namespace; a missing one is fine. The kernel keeps it while a process is in it."""
    target = path(name)
    while _libc.umount2(os.fsencode(target), MNT_DETACH) == 0:
        pass  # the same namespace can be mounted more than once
    target.unlink(missing_ok=True)


def _prepare_directory() -> None:
    """Make /run/netns a shared mount, so that namespaces made later are seen in other mount namespaces."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        _mount(None, DIRECTORY, MS_SHARED | MS_REC)
    except NetlinkError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a mount point yet
            raise
        _mount(str(DIRECTORY), DIRECTORY, MS_BIND | MS_REC)
        _mount(None, DIRECTORY, MS_SHARED | MS_REC)


def _mount(source: str | None, target: Path, flags: int) -> None:
    source_bytes = None if source is None else os.fsencode(source)
    if _libc.mount(source_bytes or b"none", os.fsencode(target), b"none", ctypes.c_ulong(flags), None):
        raise NetlinkError(ctypes.get_errno(), f"mount {target}")
