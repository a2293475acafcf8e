"""Kernels for virtual machines: fetched from Debian by apt, verified by Debian's keyring, installed nowhere.

apt works in a directory of its own with sources of its own; of the machine's configuration only apt.conf
counts (a proxy, say).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from lab.qemu import cache, initrd
from lab.qemu.cache import Tell
from lab.qemu.disk import make_ext4
from lab.topology import LabError

MIRROR = "http://deb.debian.org"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FRESH_SECONDS = 7 * 24 * 3600
"""After that long it is asked again which release is the newest."""
SETTLED_SECONDS = 60.0
"""Processes that start together ask Debian once, and a release that was asked for can be fetched."""
META_PACKAGE = "linux-image-cloud-amd64"
IMAGE_PACKAGE = re.compile(r"\blinux-image-(\d[\w.+~-]*-cloud-amd64)\b")


class Kernel(NamedTuple):
    """A kernel that machines boot: `image` is what QEMU loads, `modules` an ext4 image, label `modules`.

    Mounted at /usr/lib/modules it has the kernel's `release` as its only folder.
    """

    name: str
    release: str
    image: Path
    modules: Path
    initrd: Path


SUITES = {
    "stable": ("debian bookworm", "debian-security bookworm-security"),
    "old": ("debian bullseye", "debian-security bullseye-security"),
    "backports": ("debian bookworm-backports",),
}
"""By name: what is in Debian 12 today, the oldest that podwire supports, and Debian 12's newest."""


def prepare(name: str, tell: Tell) -> Kernel:
    """Return the newest kernel of that name, fetched when there is none or a week has gone by.

    Without a network, a kernel that is here already does. Raises LabError.
    """
    if name not in SUITES:
        raise LabError(f"kernel {name!r} is none of {', '.join(SUITES)}")
    cache.need_root()
    pointer = cache.root() / "kernels" / name / "release"
    release = _known(pointer, FRESH_SECONDS)
    if release is None:
        try:
            release = _ask(name, pointer, tell)
        except LabError as error:
            release = _known(pointer, None)
            if release is None:
                raise
            reason = str(error).splitlines()[-1].strip()
            tell(f"kernel {name}: still {release}, as Debian was not reached ({reason})")
    # The initrd's script counts in the key: it changes with podwire, not with the kernel.
    key = f"{release}-{initrd.KEY}"
    layer = cache.layer(f"kernels/{name}/layers", key, lambda part: _make(name, release, part, tell), tell)
    return Kernel(name, release, layer / "vmlinuz", layer / "modules.img", layer / "initrd")


def parse_release(dependencies: str) -> str:
    """Return the kernel's release from what apt tells of the package that depends on the newest.

    Of several versions apt tells the newest first.
    """
    for line in dependencies.splitlines():
        if line.startswith("Depends:") and (match := IMAGE_PACKAGE.search(line)):
            return match[1]
    raise LabError(f"Debian's package {META_PACKAGE} names no kernel; apt says:\n{cache.tail(dependencies)}")


def _known(pointer: Path, fresh: float | None) -> str | None:
    try:
        if fresh is not None and time.time() - pointer.stat().st_mtime > fresh:
            return None
        return pointer.read_text().strip()
    except FileNotFoundError:
        return None


def _ask(name: str, pointer: Path, tell: Tell) -> str:
    """Ask Debian for the newest release and remember it."""
    shown = cache.run(["apt-cache", *_options(_apt(name, tell)), "show", "--no-all-versions", META_PACKAGE])
    release = parse_release(shown)
    part = pointer.with_name(f"{pointer.name}.{os.getpid()}")
    part.write_text(f"{release}\n")
    part.rename(pointer)
    return release


def _apt(name: str, tell: Tell) -> Path:
    """Return the directory in which apt knows what Debian has now; it is asked once in so many seconds."""

    def update(part: Path) -> None:
        with cache.step(tell, f"kernel {name}: what Debian has"):
            for directory in ("state/lists/partial", "cache/archives/partial", "none"):
                (part / directory).mkdir(parents=True)
            (part / "sources.list").write_text("".join(f"{line}\n" for line in _sources(name)))
            cache.run(["apt-get", *_options(part), "update", "--error-on=any"])

    cache.need_file(KEYRING, "debian-archive-keyring")
    return cache.layer(f"kernels/{name}/apt", str(int(time.time() // SETTLED_SECONDS)), update, tell)


def _sources(name: str) -> list[str]:
    return [f"deb [signed-by={KEYRING}] {MIRROR}/{archive} main" for archive in SUITES[name]]


def _options(apt: Path) -> list[str]:
    """Return the options by which apt has its own directory, and asks for amd64 whatever this machine is."""
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "none",
        "Dir::Etc::preferences": apt / "none/preferences",
        "Dir::Etc::preferencesparts": apt / "none",
        "Dir::State": apt / "state",
        "Dir::State::lists": apt / "state/lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        # Root's own directories are no place for the user _apt.
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _make(name: str, release: str, part: Path, tell: Tell) -> None:
    """Fetch the package, and make of it the kernel, its initrd and the disk of its modules."""
    apt = _apt(name, tell)
    part.mkdir()
    tree = part / "tree"
    with cache.step(tell, f"kernel {name}: fetched {release}"):
        words = ["download", f"linux-image-{release}"]
        cache.run(["apt-get", *_options(apt.resolve()), *words], cwd=part)
        (package,) = part.glob("*.deb")
        cache.run(["dpkg-deb", "--extract", package, tree])
        package.unlink()
    with cache.step(tell, f"kernel {name}: disk of modules, initrd"):
        modules = tree / "lib/modules"
        # Newer ones are compressed, which costs an emulated processor more than reading them costs.
        compressed = [str(path) for path in modules.rglob("*.ko.xz")]
        if compressed:
            cache.run(["xz", "--decompress", "--threads=0", *compressed])
        cache.run(["depmod", "--basedir", tree, release])
        (tree / "boot" / f"vmlinuz-{release}").rename(part / "vmlinuz")
        initrd.make(tree, release, part / "initrd")
        make_ext4(part / "modules.img", modules, "modules")
        shutil.rmtree(tree)
