"""What is costly to make is kept in layers: directories or files by kind and key, whole or not there at all.

A layer is made under another name and renamed, by one process at a time (flock(2): the lock ends with its
process, however that ends). Commands that make one run where their mounts end with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.topology import LabError

Tell = Callable[[str], None]

VARIABLE = "PODWIRE_VM_CACHE"
DEFAULT = Path("/var/cache/podwire/vm-lab")
KEEP = 2
"""So many layers of a kind stay, the last ones used."""

PART = ".part"
SHOWN = 300
"""So many characters of a command are in a message."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "debootstrap": "debootstrap",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "du": "coreutils",
    "find": "findutils",
    "git": "git",
    "mke2fs": "e2fsprogs",
    "modprobe": "kmod",
    "python3": "python3-venv",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "unshare": "util-linux",
    "xz": "xz-utils",
}
"""Debian's package of each program used here."""

# Mounts made inside are seen by nobody else and end with the command, and so do its processes, whether it
# ends, is killed, or we are.
CONTAINED = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)


def root() -> Path:
    """Return the directory of the cache."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def layer(kind: str, key: str, make: Callable[[Path], None], tell: Tell) -> Path:
    """Return the layer of this kind and key; `make` writes it to the path it gets where there is none yet.

    All but the two layers of the kind that were used last are removed then, and what processes that were
    killed have left.
    """
    path = root() / kind / key
    if not _use(path):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _locked(path.parent, tell):
            if not _use(path):
                remove(path.parent.glob(f"*{PART}"))
                part = path.with_name(path.name + PART)
                try:
                    make(part)
                    part.rename(path)
                finally:
                    remove([part])
                _use(path)
                old = sorted(path.parent.iterdir(), key=lambda entry: entry.lstat().st_mtime)
                remove([entry for entry in old if not entry.name.startswith(".")][:-KEEP])
    return path


def remove(paths: Iterable[Path]) -> None:
    """Remove files and directory trees; what is gone already is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def digest(*parts: str | bytes) -> str:
    """Return a key made of the parts, each with its length, so that their borders count."""
    sum_ = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sum_.update(len(data).to_bytes(8, "big") + data)
    return sum_.hexdigest()[:16]


@contextmanager
def step(tell: Tell, what: str) -> Iterator[None]:
    """Tell what was done, and in how many seconds."""
    start = time.monotonic()
    yield
    tell(f"{what}: {time.monotonic() - start:.0f} s")


def run(words: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command and return its standard output.

    Words may be paths. `env` is the whole environment where it is given. Raises LabError, with the package of
    a program that is missing, or the last lines of what a command wrote that failed.
    """
    command = [str(word) for word in words]
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    full = {**(os.environ if env is None else env), "PATH": path, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [find(command[0]), *command[1:]],
        env=full,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        shown = " ".join(command).removeprefix(" ".join(CONTAINED)).strip()[:SHOWN]
        written = tail(done.stdout + done.stderr)
        raise LabError(f"`{shown}` failed with status {done.returncode}; what it wrote ends:\n{written}")
    return done.stdout


def find(program: str) -> str:
    """Return the path of a program, or raise LabError with its Debian package."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if found is None:
        package = PACKAGES.get(program, program)
        raise LabError(f"{program} is missing: `scripts/setup vm` installs it (Debian's package {package})")
    return found


def need_file(path: Path, package: str) -> None:
    """Raise LabError with the Debian package of a file that is missing."""
    if not path.exists():
        raise LabError(f"{path} is missing: `scripts/setup vm` installs it (Debian's package {package})")


def tail(text: str, lines: int = 8) -> str:
    """Return the last lines of a text, indented."""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (nothing)"


def need_root() -> None:
    """Raise LabError without root's rights: layers hold devices and files of several owners."""
    if os.geteuid() != 0:
        raise LabError("the machines of the lab are made by root (mounts, devices, owners of files)")


def _use(path: Path) -> bool:
    """Mark a layer as used just now; return whether there is one."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(directory: Path, tell: Tell) -> Iterator[None]:
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another process is making {directory}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
