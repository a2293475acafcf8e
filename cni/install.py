"""Put on a node what its container runtime looks for: the plugin binary and, once it works, the conflist.

Each file is written at once or not at all. For an init container (`host_root`), whose packages the node does
not have, those that the plugin imports are copied beside it, and from a bundle the interpreter: each into a
directory of its own for every version, so that a binary and what it names are always of the same one.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

BINARY = "podwire"
CONFLIST = "10-podwire.conflist"
CNI_VERSION = "1.0.0"
CNI_VERSIONS = ("1.0.0", "1.1.0")
"""Why both keys: libcni 1.0 and 1.1 (containerd 1.6 and 1.7, podman 4) know `cniVersion` only. They pass it
on whatever it is, and cannot read an answer in 1.1.0: every ADD would fail. libcni 1.2 and later (containerd
2) take the highest version of both keys that they know, and call STATUS and GC from 1.1.0 on only."""

CAPABILITIES = ("portMappings", "bandwidth", "ips", "mac", "ipRanges", "io.kubernetes.cri.pod-annotations")
"""What a runtime may put into runtimeConfig, which is what `cni.options` reads."""

COMPILED = ("cni", "ipam", "netlink")  # what the binary may import of podwire
PACKAGES = (*COMPILED, "msgspec", "netaddr", "pyroute2")  # and all that it may import
HOME = Path("/opt/podwire")  # where nodes have what is copied; an interpreter runs nowhere else
LIB_DIR = HOME / "lib"
LIB_PREFIX = "plugin-"  # of our directories there; an environment in /opt/podwire has a lib, too
PYTHON_PREFIX = "python-"
COPY_NAME = re.compile(r"(plugin|python)-[0-9a-f]{16}|\.(plugin|python)-[0-9a-f]{16}\..*")
BUNDLE = Path("/usr/lib/podwire/bundle")  # where the image has what `scripts/bundle` made
PATH_LINE = "sys.path[:0] = "
LINKS = 255  # how many names a path may have, links included

STATUS_INPUT = json.dumps({"cniVersion": CNI_VERSIONS[-1], "name": "podwire", "type": BINARY}).encode()
POLL_SECONDS = 0.5
CHROOT = "/usr/sbin/chroot"
CHROOT_FAILED = {
    125: errno.EPERM,
    126: errno.EACCES,
    127: errno.ENOENT,
}  # its own exit statuses, not the program's
STATUS_SECONDS = 10.0
"""How long one STATUS may take at least, however little of the time to wait is left."""

# -I and -S keep out the environment, the user's and the site's modules: start-up time, and safety as root.
SCRIPT = """\
#!{python} -IS
# The CNI plugin of podwire, written by `podwire install`.
import sys
sys.path[:0] = {path!a}
try:
    from cni.shim import main
except ImportError as error:
    print('{{"cniVersion": "{version}", "code": 100, "msg": "podwire cannot be imported", "details": ""}}')
    sys.exit(f"podwire: {{error}}; `podwire install` writes this file anew")
main({socket!a}, {state_dir!a})
"""


class InstallError(Exception):
    """What was asked for cannot be installed; the message is one sentence."""


def render_binary(*, python: str, path: Sequence[str], socket: str, state_dir: str) -> str:
    """Return the text of the plugin binary: the interpreter's path, where modules are, and its two constants.

    Raises InstallError for an interpreter that the kernel could not start from a first line.
    """
    if not python.startswith("/") or any(character.isspace() for character in python):
        raise InstallError(f"the interpreter {python!r} needs an absolute path without white space")
    return SCRIPT.format(
        python=python, path=list(path), socket=socket, state_dir=state_dir, version=CNI_VERSION
    )


def render_conflist(name: str = "podwire") -> str:
    """Return the network configuration list: this plugin alone."""
    plugin = {"type": BINARY, "capabilities": dict.fromkeys(CAPABILITIES, True)}
    document = {"cniVersion": CNI_VERSION, "cniVersions": CNI_VERSIONS, "name": name, "plugins": [plugin]}
    return json.dumps(document, indent=2) + "\n"


def python_path() -> list[str]:
    """Return the directories of podwire's packages and of those it depends on; often they are the same."""
    return list(dict.fromkeys(_home(package) for package in PACKAGES))


def base_python() -> str:
    """Return the interpreter under the environment that runs this: finding an environment costs time."""
    return str(Path(sys.executable).resolve())


def install_binary(
    directory: Path,
    *,
    socket: str,
    state_dir: str,
    python: str | None = None,
    path: Sequence[str] | None = None,
) -> Path:
    """Write the plugin binary and compile what it imports, so that the first ADD is as fast as the next."""
    python = python or base_python()
    path = python_path() if path is None else path
    text = render_binary(python=python, path=path, socket=socket, state_dir=state_dir)
    packages = [str(found) for entry in path for name in COMPILED if (found := Path(entry, name)).is_dir()]
    # Modules on a read-only disk stay as they are: the binary works, a little later.
    if packages:  # without a name, compileall takes everything it finds
        subprocess.run([python, "-I", "-m", "compileall", "-q", *packages], capture_output=True, check=False)
    return write_binary(directory, text)


def write_binary(directory: Path, text: str) -> Path:
    """Write the plugin binary."""
    return _write(directory / BINARY, text, 0o755)


def install_below(root: Path, bin_dir: Path, *, python: str | Path, socket: str, state_dir: str) -> Path:
    """Write the plugin binary for the node whose file system is at `root`, and copy what it imports.

    `python` is the node's interpreter, or as a Path a bundle to copy one from. All other paths are the
    node's. What the binary before this one named stays: it may be running.
    """
    directory = below(root, bin_dir)
    keep = {*copies_of(directory / BINARY, root)}
    if isinstance(python, Path):
        copy = install_python(below(root, HOME), python)
        keep.add(copy)
        python = str(HOME / copy.name / "bin/python3")
    check_interpreter(root, python)
    lib = install_lib(below(root, LIB_DIR), LIB_DIR)
    path = [str(LIB_DIR / lib.name)]
    binary = write_binary(
        directory, render_binary(python=python, path=path, socket=socket, state_dir=state_dir)
    )
    for other in {*copies_below(root)} - keep - {lib}:
        shutil.rmtree(other)
    return binary


def install_python(directory: Path, bundle: Path) -> Path:
    """Copy the interpreter that a bundle holds (`scripts/bundle`) into a directory, and return the copy.

    What is there already stays. Raises InstallError for what is no bundle.
    """
    found = [path for path in copies_in(bundle) if path.name.startswith(PYTHON_PREFIX)]
    if len(found) != 1:
        raise InstallError(f"the bundle {bundle} holds {len(found)} folders {PYTHON_PREFIX}…, and not one")
    target = directory / found[0].name
    if not target.is_dir():
        with _at_once(target) as staging:
            shutil.copytree(found[0], staging, symlinks=True, dirs_exist_ok=True)
    return target


def install_lib(directory: Path, name: Path) -> Path:
    """Copy what the plugin imports into a directory below `directory`, and return the one for this version.

    `name` is what `directory` is to the node; compiled modules carry it. What is there already stays.
    """
    sources = [Path(_home(package), package) for package in PACKAGES]
    target = directory / f"{LIB_PREFIX}{_digest(sources)}"
    if target.is_dir():  # it is whole: it was renamed when it was
        return target
    with _at_once(target) as staging:
        for source in sources:
            shutil.copytree(source, staging / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        where = ["-s", str(staging), "-p", str(name / target.name)]
        command = [base_python(), "-I", "-m", "compileall", "-q", *where, str(staging)]
        subprocess.run(command, capture_output=True, check=False)
    return target


def install_conflist(directory: Path) -> Path:
    """Write the conflist. From then on the runtime believes that there is a network, so it comes last."""
    return _write(directory / CONFLIST, render_conflist(), 0o644)


def status(binary: Path, root: Path = Path("/"), timeout: float = STATUS_SECONDS) -> str:
    """Run the installed plugin's STATUS as seen from `root`; return what is wrong, or nothing."""
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": str(binary.parent)}
    try:
        done = _run_in(root, [str(binary)], environment, STATUS_INPUT, timeout)
    except subprocess.TimeoutExpired:
        return f"STATUS has not answered within {timeout:.0f} s"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{binary} cannot be run: {error}"
    if done.returncode == 0:
        return ""
    try:
        return str(json.loads(done.stdout)["msg"])
    except (ValueError, TypeError, KeyError):
        said = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
        return f"{binary} ended with status {done.returncode}: {said or 'it said nothing'}"


def wait_until_good(ask: Callable[[float], str], seconds: float, tell: Callable[[str], None]) -> str:
    """Ask STATUS until it is good, or the time is up; return what is wrong then, or nothing.

    `ask` is told how long it may take. `tell` hears what is wrong, each sentence once.
    """
    deadline = time.monotonic() + seconds
    said = ""
    while wrong := ask(max(deadline - time.monotonic(), STATUS_SECONDS)):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        if wrong != said:
            tell(wrong)
            said = wrong
        time.sleep(min(POLL_SECONDS, left))
    return wrong


def check_interpreter(root: Path, python: str) -> None:
    """Refuse an interpreter that is not there or cannot load our compiled modules. Raises InstallError."""
    where = python if root == Path("/") else f"{python} of {root}"
    command = [python, "-IS", "-c", "import sys; print(sys.implementation.cache_tag)"]
    try:
        done = _run_in(root, command, {}, b"", STATUS_SECONDS)
    except OSError as error:
        raise InstallError(f"the interpreter {where} cannot be run: {error.strerror}") from None
    except subprocess.SubprocessError as error:
        raise InstallError(f"the interpreter {where} cannot be run: {error}") from None
    found, ours = done.stdout.decode(errors="replace").strip(), sys.implementation.cache_tag
    if found != ours:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        broken = f"broken ({words[-1] if words else f'exit status {done.returncode}'})"
        raise InstallError(f"the interpreter {where} is {found or broken}, but podwire needs {ours}")


def below(root: Path, path: Path) -> Path:
    """Return where a node's path is below `root`, following symbolic links as the node would."""
    if not path.is_absolute():
        raise InstallError(f"{path} is not an absolute path, as it must be with --host-root")
    found, left = root, list(path.parts[1:])
    for _ in range(LINKS):
        if not left:
            return found
        part = left.pop(0)
        if part == "..":
            found = found.parent if found != root else root
        elif (found / part).is_symlink():
            link = (found / part).readlink()
            left = [*link.parts, *left]
            if link.is_absolute():
                found, left = root, left[1:]
        else:
            found = found / part
    raise InstallError(f"{path} below {root} is a link to itself")


def remove(bin_dir: Path, conf_dir: Path, copies: Iterable[Path] | None = None) -> tuple[Path, ...]:
    """Remove conflist, binary and what was copied for it, in this order; return those that were there.

    Without `copies` (`copies_below`), those that the binary names.
    """
    binary = bin_dir / BINARY
    copies = copies_of(binary) if copies is None else tuple(copies)
    removed = []
    for file in (conf_dir / CONFLIST, binary):
        if file.exists() or file.is_symlink():
            file.unlink(missing_ok=True)
            removed.append(file)
    for copy in copies:
        shutil.rmtree(copy)
        removed.append(copy)
        with contextlib.suppress(OSError):  # others live there, too
            for parent in copy.parents:
                if parent.name not in (LIB_DIR.name, HOME.name):
                    break
                parent.rmdir()
    return tuple(removed)


def copies_in(directory: Path) -> tuple[Path, ...]:
    """Return the copied modules and interpreters in a directory, also those that were never finished."""
    found = (path for path in directory.glob("*") if COPY_NAME.fullmatch(path.name))
    return tuple(sorted(path for path in found if path.is_dir() and not path.is_symlink()))


def copies_below(root: Path, named: Container[Path] | None = None) -> tuple[Path, ...]:
    """Return all that was ever copied to a node, or what of it bears one of these names there."""
    return tuple(
        copy
        for place in (LIB_DIR, HOME)
        for copy in copies_in(below(root, place))
        if named is None or place / copy.name in named
    )


def copies_of(binary: Path, root: Path = Path("/")) -> tuple[Path, ...]:
    """Return what was copied for a binary, as it names it; nothing for what is no binary of ours.

    Strict, because they are removed: a checkout that somebody works in may be named there, too.
    """
    with contextlib.suppress(OSError, ValueError, SyntaxError, TypeError):
        first, *lines = binary.read_text().splitlines()
        python = Path(first.removeprefix("#!").removesuffix(" -IS"))
        for line in lines:
            if line.startswith(PATH_LINE):
                path = {Path(path) for path in ast.literal_eval(line.removeprefix(PATH_LINE))}
                return copies_below(root, {python.parent.parent, *path})
    return ()


def _run_in(
    root: Path, command: Sequence[str], environment: dict[str, str], stdin: bytes, timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """Run a program that sees `root` as its file system. Raises OSError for one that cannot be run.

    Not by a fork of our own: a process in which gRPC runs must not be copied.
    """
    elsewhere = root != Path("/")
    done = subprocess.run(
        [CHROOT, str(root), *command] if elsewhere else command,
        input=stdin,
        env=environment,
        capture_output=True,
        check=False,
        timeout=timeout,
    )
    if elsewhere and done.returncode in CHROOT_FAILED and done.stderr.startswith(CHROOT.encode()):
        words = done.stderr.decode(errors="replace").strip()
        raise OSError(CHROOT_FAILED[done.returncode], words.rpartition(": ")[2])
    return done


@contextlib.contextmanager
def _at_once(target: Path) -> Iterator[Path]:
    """Give a directory to fill, which then gets its name, or is gone if it could not be filled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        os.sync()  # a name must not outlive a power cut that its contents do not
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _digest(sources: Iterable[Path]) -> str:
    """Return what tells one version of the packages from another."""
    digest = hashlib.sha256(str(sys.implementation.cache_tag).encode())
    for source in sources:
        for file in sorted(source.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(source.parent)}\0{file.stat().st_size}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _home(package: str) -> str:
    """Return the directory a package is imported from."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InstallError(f"the package {package} is not there")
    return str(Path(spec.origin).absolute().parent.parent)


def _write(target: Path, text: str, mode: int) -> Path:
    """Replace a file in one step. The temporary name has no suffix that a runtime would read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target
