"""Write what the container runtime looks for, plugin binary and conflist, each at once or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

BINARY = "podwire"
CONFLIST = "10-podwire.conflist"
CNI_VERSION = "1.0.0"  # every runtime in use knows it, and speaks 1.1.0's commands to us if it has them
COMPILED = ("cni", "ipam", "netlink")  # what the binary may import of podwire

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


def render_conflist(name: str = "podwire", cni_version: str = CNI_VERSION) -> str:
    """Return the network configuration list: this plugin alone."""
    document = {"cniVersion": cni_version, "name": name, "plugins": [{"type": BINARY}]}
    return json.dumps(document, indent=2) + "\n"


def python_path() -> list[str]:
    """Return the directories of podwire's packages and of those it depends on; often they are the same."""
    return list(dict.fromkeys(_home(package) for package in ("cni", "msgspec", "netaddr", "pyroute2")))


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
    return _write(directory / BINARY, text, 0o755)


def install_conflist(directory: Path) -> Path:
    """Write the conflist. From then on the runtime believes that there is a network, so it comes last."""
    return _write(directory / CONFLIST, render_conflist(), 0o644)


def remove(bin_dir: Path, conf_dir: Path) -> tuple[Path, ...]:
    """Remove conflist and binary, in this order, and return those that were there."""
    found = tuple(file for file in (conf_dir / CONFLIST, bin_dir / BINARY) if file.exists())
    for file in found:
        file.unlink(missing_ok=True)
    return found


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
