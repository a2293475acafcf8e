"""Run a command as a unit of systemd has it run, where systemd is not process 1.

    python -m tests.node.sandbox UNIT WRITABLE[,WRITABLE] COMMAND...

Capabilities, system calls, address families, namespaces, memory and the read-only file system are those of
the unit's directives; the tests' own places stand in for RuntimeDirectory and the like. PrivateTmp and
ProtectHome are left out: the tests, or the checkout, may be there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

UNIT = Path(__file__).resolve().parents[2] / "deploy/systemd/podwire.service"
LIBRARY = "libseccomp.so.2"

ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # seccomp.h
NE, GE, EQ, MASKED_EQ = 1, 5, 4, 7
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38  # linux/prctl.h
CLONE_NEWNS, MS_BIND, MS_REC, MS_SLAVE = 0x20000, 0x1000, 0x4000, 1 << 19
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
IN_ORDER = (  # linux/capability.h
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable "
    "net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot "
    "sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease "
    "audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read "
    "perfmon bpf checkpoint_restore"
)
CAPABILITIES = IN_ORDER.split()
NAMESPACES = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000}
NAMESPACES |= {"pid": 0x20000000, "net": 0x40000000}

libc = ctypes.CDLL(None, use_errno=True)


class Comparison(ctypes.Structure):
    """scmp_arg_cmp of seccomp.h."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class Filter:
    """A seccomp filter; system calls that this kernel does not have are left out."""

    def __init__(self, otherwise: int) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(otherwise)))

    def add(self, action: int, call: str, *comparisons: tuple[int, int, int, int]) -> None:
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return
        array = (Comparison * len(comparisons))(*comparisons)
        count = ctypes.c_uint(len(comparisons))
        action_ = ctypes.c_uint32(action)
        failed = self._library.seccomp_rule_add_array(self._context, action_, number, count, array)
        assert not failed, (call, os.strerror(-failed))

    def load(self) -> None:
        failed = self._library.seccomp_load(self._context)
        assert not failed, os.strerror(-failed)


def directives(unit: Path) -> dict[str, list[str]]:
    """Return each directive's values, in the order of their lines."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def calls(words: list[str]) -> set[str]:
    """Return the system calls that names and groups stand for, as systemd knows them."""
    found: set[str] = set()
    for word in words:
        if not word.startswith("@"):
            found.add(word)
            continue
        command = ["systemd-analyze", "syscall-filter", word]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [line.strip() for line in text.splitlines()[1:]]
        found |= calls([line for line in lines if line and not line.startswith("#")])
    return found


def allowed_calls(lines: list[str]) -> set[str]:
    found: set[str] = set()
    for line in lines:
        if line.startswith("~"):
            found -= calls(line[1:].split())
        else:
            found |= calls(line.split())
    return found | calls(["@default"])


def mount_read_only(writable: list[str]) -> None:
    """Make mounts as ProtectSystem=strict does: what the node mounts later comes in, nothing gets out."""
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
    for path in writable:
        check(libc.mount(path.encode(), path.encode(), None, MS_BIND | MS_REC, None))
    set_attributes("/", RDONLY, 0)
    for path in (*writable, "/proc", "/sys", "/dev"):
        set_attributes(path, 0, RDONLY)


def set_attributes(path: str, set_: int, clear: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(set_, clear, 0, 0)
    check(
        libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(32)
        )
    )


def drop_capabilities(kept: list[str]) -> None:
    names = {name.removeprefix("CAP_").lower() for name in kept}
    assert names <= set(CAPABILITIES)
    for number, name in enumerate(CAPABILITIES):
        if name not in names:
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))


def restrict(unit: dict[str, list[str]], permitted: set[str]) -> None:
    """Load the filters; each is one of its own, as systemd has them."""
    families = {int(getattr(socket, name)) for name in unit["RestrictAddressFamilies"][0].split()}
    sockets = Filter(ALLOW)
    for family in set(range(max(families) + 1)) - families:
        sockets.add(ERRNO | errno.EAFNOSUPPORT, "socket", (0, EQ, family, 0))
    sockets.add(ERRNO | errno.EAFNOSUPPORT, "socket", (0, GE, max(families) + 1, 0))
    memory = Filter(ALLOW)  # PROT_WRITE | PROT_EXEC, PROT_EXEC, SHM_EXEC
    memory.add(ERRNO | errno.EPERM, "mmap", (2, MASKED_EQ, 6, 6))
    memory.add(ERRNO | errno.EPERM, "mprotect", (2, MASKED_EQ, 4, 4))
    memory.add(ERRNO | errno.EPERM, "shmat", (2, MASKED_EQ, 0o100000, 0o100000))
    spaces = Filter(ALLOW)
    spaces.add(ERRNO | errno.ENOSYS, "clone3")
    spaces.add(ERRNO | errno.EPERM, "setns", (1, EQ, 0, 0))
    for name in NAMESPACES.keys() - set(unit["RestrictNamespaces"][0].split()):
        for call, argument in (("unshare", 0), ("clone", 0), ("setns", 1)):
            flag = NAMESPACES[name]
            spaces.add(ERRNO | errno.EPERM, call, (argument, MASKED_EQ, flag, flag))
    system = Filter(ERRNO | errno.EPERM)
    for call in permitted | {"seccomp", "prctl"}:
        system.add(ALLOW, call)
    denied = (memory,) if unit["MemoryDenyWriteExecute"] == ["yes"] else ()
    for each in (sockets, *denied, spaces, system):
        each.load()


def check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(unit: str, writable: str, *command: str) -> None:
    found = directives(Path(unit))
    permitted = allowed_calls(found["SystemCallFilter"])
    mount_read_only(writable.split(","))
    drop_capabilities(found["CapabilityBoundingSet"][0].split())
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    restrict(found, permitted)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
