"""The root disk of the lab's machines, of Debian's packages and of podwire as a checkout has it.

Three layers, each made when there is none of its key: `base` is a tree of Debian's packages, `wheels` is what
podwire depends on, `image` is the disk with podwire of the checkout, as it is, committed or not.
What is installed and how is in vm-lab/provision, which machines of other makes use too.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lab.qemu import cache
from lab.qemu.cache import CONTAINED, Tell
from lab.qemu.disk import make_ext4
from lab.qemu.kernels import KEYRING, MIRROR
from lab.topology import LabError

SUITE = "bookworm"
SIZE_MB = 6 * 1024
LABEL = "podwire"
PYTHON = "python3.11"
"""Debian 12's: what wheels have to be made for."""

PROVISION = Path("vm-lab/provision")
GUEST = Path("vm-lab/guest")
PACKAGES_SCRIPT = PROVISION / "packages.sh"
RUNTIME = Path("requirements/runtime.txt")
WHEEL = "usr/share/podwire"
"""Where a machine has podwire's own wheel, for those who install it again."""
SINGLE = ("pyproject.toml", "README.md", "LICENSE", str(RUNTIME))
FOLDERS = ("deploy", str(PROVISION), str(GUEST))
"""What goes into an image, beside the packages that pyproject.toml names."""

# Files of a machine that lives for minutes: nothing is flushed to disk, no package brings what only people
# read, and no package's scripts start a service (exit status 101 says so, invoke-rc.d(8)).
SETTINGS = {
    "etc/dpkg/dpkg.cfg.d/podwire-lab": "force-unsafe-io\n"
    + "".join(f"path-exclude=/usr/share/{name}/*\n" for name in ("doc", "man", "info", "locale", "lintian")),
    "etc/apt/apt.conf.d/podwire-lab": 'Acquire::Languages "none";\n',
}
NO_STARTS = "usr/sbin/policy-rc.d"
PRELOAD = "libeatmydata.so"
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")

COMPILE = ("/usr/bin/python3", "-m", "compileall", "-q", "-j", "0")

# In CONTAINED: tree, source and command. The source is seen at /mnt.
IN_TREE = """
set -e
tree=$1 source=$2
shift 2
mount -t proc proc "$tree/proc"
mount --bind "$source" "$tree/mnt"
exec chroot "$tree" "$@"
"""


class Content(NamedTuple):
    """What a file holds, and whether it is a program."""

    data: bytes
    executable: bool

    @classmethod
    def of(cls, file: Path) -> Content:
        """Read a file."""
        return cls(file.read_bytes(), os.access(file, os.X_OK))


def prepare(checkout: Path, tell: Tell) -> Path:
    """Return the root disk with podwire of this checkout: a sparse raw image, to be used as a backing file.

    Raises LabError naming what is missing or failed.
    """
    cache.need_root()
    files = _files(checkout)
    base_key = cache.digest(SUITE, (checkout / PACKAGES_SCRIPT).read_bytes(), *SETTINGS.values())
    wheels_key = cache.digest(PYTHON, (checkout / RUNTIME).read_bytes())
    # Read once: what is edited while a layer is made is not in this image, nor in its key.
    contents = {file: Content.of(checkout / file) for file in files}
    key = image_key(contents, base_key, wheels_key)

    def make(part: Path) -> None:
        # Wheels take the network and a compiler while the base unpacks.
        with ThreadPoolExecutor(max_workers=1) as pool:
            wheels = pool.submit(
                cache.layer, "wheels", wheels_key, lambda to: _make_wheels(checkout, to, tell), tell
            )
            base = cache.layer("base", base_key, lambda to: _make_base(checkout, to, tell), tell)
        _make_image(checkout, contents, (base, wheels.result()), part, tell)

    return cache.layer("image", f"{key}.raw", make, tell)


def image_key(contents: Mapping[Path, Content], base_key: str, wheels_key: str) -> str:
    """Return the key of an image: by the layers below and by name, mode and content of each file."""
    parts: list[str | bytes] = [base_key, wheels_key]
    for file, content in sorted(contents.items()):
        parts += [str(file), "x" if content.executable else "", content.data]
    return cache.digest(*parts)


def installed(names: Iterable[str], project: str) -> list[Path]:
    """Return those of a checkout's files that count for an image, by its pyproject.toml; sorted."""
    packages = tomllib.loads(project)["tool"]["setuptools"]["packages"]
    folders = tuple(f"{name}/" for name in (*{name.partition(".")[0] for name in packages}, *FOLDERS))
    return sorted(Path(name) for name in set(names) if name in SINGLE or name.startswith(folders))


def _files(checkout: Path) -> list[Path]:
    """Return the checkout's files that count, tracked or new, but none that git ignores."""
    words = ["git", "-c", "safe.directory=*", "-C", checkout, "ls-files", "-z", "--cached", "--others"]
    names = cache.run([*words, "--exclude-standard"]).split("\0")
    try:
        project = (checkout / "pyproject.toml").read_text()
    except FileNotFoundError:
        raise LabError(f"{checkout} is no checkout of podwire: it has no pyproject.toml") from None
    # What is deleted but not yet committed is still listed.
    return [file for file in installed(names, project) if (checkout / file).is_file()]


def _make_base(checkout: Path, tree: Path, tell: Tell) -> None:
    """Make the tree of Debian's packages."""
    cache.need_file(KEYRING, "debian-archive-keyring")
    (tree / "mnt").mkdir(parents=True)
    for name, text in SETTINGS.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / LIBRARIES).mkdir(parents=True)
    cache.need_file("/" / LIBRARIES / PRELOAD, "eatmydata")
    shutil.copy("/" / LIBRARIES / PRELOAD, tree / LIBRARIES / PRELOAD)
    with cache.step(tell, "image: Debian's base system"):
        program = cache.find("debootstrap")
        words = ["--variant=minbase", f"--keyring={KEYRING}", SUITE, tree, f"{MIRROR}/debian"]
        cache.run([*CONTAINED, program, *words], env={**os.environ, "LD_PRELOAD": PRELOAD})
    with cache.step(tell, "image: packages of the lab"):
        # Now: debootstrap has one of its own, and removes it.
        (tree / NO_STARTS).write_text("#!/bin/sh\nexit 101\n")
        (tree / NO_STARTS).chmod(0o755)
        (tree / "etc/apt/sources.list").write_text(
            f"deb {MIRROR}/debian {SUITE} main\ndeb {MIRROR}/debian {SUITE}-updates main\n"
            f"deb {MIRROR}/debian-security {SUITE}-security main\n"
        )
        shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
        _in_tree(tree, checkout / PROVISION, ["sh", f"/mnt/{PACKAGES_SCRIPT.name}"])
        _in_tree(tree, checkout, [*COMPILE, "/usr/lib/python3.11", "/usr/lib/python3/dist-packages"])
        _in_tree(tree, checkout, ["sh", "-c", "apt-get clean && rm -rf /var/lib/apt/lists/*"])
    (tree / NO_STARTS).unlink()
    (tree / "etc/resolv.conf").unlink()


def _make_wheels(checkout: Path, to: Path, tell: Tell) -> None:
    """Make or fetch the wheels of all that podwire depends on, each checked by its hash."""
    with cache.step(tell, "image: wheels of what podwire depends on"):
        words = ["--require-hashes", "-r", checkout / RUNTIME, "--wheel-dir", to]
        cache.run([*_pip(checkout), "wheel", "--quiet", *words])


def _make_image(
    checkout: Path, contents: Mapping[Path, Content], layers: tuple[Path, Path], disk: Path, tell: Tell
) -> None:
    """Make the disk: the base, podwire as its documentation installs it, and what makes the boot quick."""
    base, wheels = layers
    tree, source = (disk.with_name(f"{name}{cache.PART}") for name in ("tree", "source"))
    try:
        with cache.step(tell, "image: podwire's wheel"):
            for file, content in contents.items():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                (source / file).write_bytes(content.data)
                (source / file).chmod(0o755 if content.executable else 0o644)
            shutil.copytree(wheels, source / "wheels")
            isolation = ["--no-build-isolation"] if _has_backend(checkout) else []
            words = ["--no-deps", *isolation, "--wheel-dir", source / "wheels", source]
            cache.run([*_pip(checkout), "wheel", "--quiet", *words])
        with cache.step(tell, "image: podwire installed"):
            cache.run(["cp", "--archive", "--reflink=auto", base, tree])
            _in_tree(tree, source, ["env", "WHEELS=/mnt/wheels", "sh", "/mnt/vm-lab/provision/podwire.sh"])
            (tree / WHEEL).mkdir(parents=True)
            for wheel in (source / "wheels").glob("podwire-*.whl"):
                shutil.copy(wheel, tree / WHEEL)
            _in_tree(tree, source, ["sh", "/mnt/vm-lab/provision/slim.sh"])
            _in_tree(tree, source, [*COMPILE, "/opt/podwire/lib"])
            cache.run(["cp", "--recursive", "--no-preserve=ownership", f"{source / GUEST}/.", tree])
            (tree / LIBRARIES / PRELOAD).unlink()
        with cache.step(tell, "image: disk"):
            make_ext4(disk, tree, LABEL, SIZE_MB)
    finally:
        cache.remove([tree, source])


def _in_tree(tree: Path, source: Path, command: Sequence[str]) -> None:
    """Run a command with the tree as its root, the source at /mnt, and nothing of our environment."""
    environment = ["/usr/bin/env", "-i", f"PATH={cache.SYSTEM_PATH}", "HOME=/root", "LC_ALL=C.UTF-8"]
    preload = [f"LD_PRELOAD={PRELOAD}"]
    cache.run([*CONTAINED, "sh", "-c", IN_TREE, "sh", tree, source, *environment, *preload, *command])


def _python(checkout: Path) -> Path:
    """Return an interpreter with pip that makes wheels for Debian 12: the checkout's own, or ours."""
    for path in (checkout / ".venv/bin/python", Path(sys.executable)):
        if (path.parent / PYTHON).exists() or path.resolve().name == PYTHON:
            return path
    raise LabError(f"wheels for the machines need {PYTHON}: `make setup` makes {checkout}/.venv with it")


def _pip(checkout: Path) -> list[str | Path]:
    return [_python(checkout), "-m", "pip", "--disable-pip-version-check"]


def _has_backend(checkout: Path) -> bool:
    """Whether the interpreter has the build backend at hand, as `make setup` pins it; else pip fetches it."""
    return any((_python(checkout).parent.parent / "lib" / PYTHON / "site-packages").glob("setuptools-*"))
