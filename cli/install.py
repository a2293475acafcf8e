"""`podwire install`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cli.host import add_paths, need_root
from cli.output import CommandError, complain

HOST_PYTHON = "/usr/bin/python3"
INSTALL = """
Write the CNI plugin `podwire`, wait until it would work, then write its conflist. The conflist comes last,
because the container runtime takes the node's network for ready as soon as it is there: the plugin is asked
for its STATUS until that is good, which it is when the daemon has synced. If it is not good in time, the
plugin stays, the conflist is not written, and the exit status is 1. Each file is written at once or not at
all, and a repetition is harmless. The names of the files go to standard output.
"""

INSTALL_EXAMPLES = """
examples:
  podwire install
      on a node whose daemon is running: /opt/cni/bin/podwire, /etc/cni/net.d/10-podwire.conflist
  podwire install --wait 300 --conf-dir /var/lib/rancher/k3s/agent/etc/cni/net.d
  podwire install --no-conflist
      the plugin alone, before the daemon starts; `podwire daemon --cni-conf-dir DIR` writes the conflist
  podwire install --host-root /host --no-conflist
      from an init container with the node's file system at /host: what the plugin imports is copied to
      /opt/podwire of the node, from a bundle also the interpreter, else the node's own Python runs it
  podwire install --remove
      take all of it out again; pods that run go on running
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    install = commands.add_parser(
        "install",
        help="write the CNI plugin and its conflist",
        description=INSTALL,
        epilog=INSTALL_EXAMPLES,
        formatter_class=raw,
    )
    _add_install(install)


def _add_install(install: argparse.ArgumentParser) -> None:
    install.add_argument(
        "--bin-dir", type=Path, default=Path("/opt/cni/bin"), help="folder of plugins (default: %(default)s)"
    )
    install.add_argument(
        "--conf-dir",
        type=Path,
        default=Path("/etc/cni/net.d"),
        help="folder of network configurations (default: %(default)s)",
    )
    add_paths(install)
    install.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long STATUS may take to become good; 0 asks once (default: %(default)g)",
    )
    install.add_argument(
        "--host-root",
        type=Path,
        metavar="DIR",
        help="write below DIR, a node's file system; all other paths are the node's own",
    )
    install.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="with --host-root: copy from there the interpreter that runs the plugin, made by scripts/bundle "
        "(default: the image's own, if it has one)",
    )
    install.add_argument(
        "--python",
        metavar="FILE",
        help="what runs the plugin (default: what runs this; with --host-root, that of the bundle, or "
        f"{HOST_PYTHON})",
    )
    what = install.add_mutually_exclusive_group()
    what.add_argument("--no-conflist", action="store_true", help="write the plugin only, and do not wait")
    what.add_argument(
        "--remove",
        action="store_true",
        help="take out the conflist, then the plugin, then what was copied for it; print what was there",
    )
    install.set_defaults(run=run_install)


def run_install(args: argparse.Namespace) -> int:
    """Write the plugin and, once it works, the conflist; or remove them. Print the files."""
    from cni import install

    need_root("install")
    if not (math.isfinite(args.wait) and args.wait >= 0):
        raise CommandError(f"--wait {args.wait} is not a number of seconds")
    if args.bundle and (args.python or not args.host_root):
        raise CommandError("--bundle needs --host-root, and excludes --python")
    root = args.host_root or Path("/")
    if not root.is_dir():
        raise CommandError(f"--host-root {root} is not a folder")
    try:
        bin_dir, conf_dir = args.bin_dir, args.conf_dir
        if args.host_root:
            bin_dir, conf_dir = install.below(root, bin_dir), install.below(root, conf_dir)
        if args.remove:
            copies = install.copies_below(root) if args.host_root else None
            for path in install.remove(bin_dir, conf_dir, copies):
                print(path)
            return 0
        print(_install_binary(args), flush=True)
        if not args.no_conflist:
            _wait_until_good(args, root)
            print(install.install_conflist(conf_dir))
    except install.InstallError as error:
        raise CommandError(str(error)) from None
    return 0


def _install_binary(args: argparse.Namespace) -> Path:
    from cni import install

    places = {"socket": str(args.socket), "state_dir": str(args.state_dir)}
    if args.host_root:
        bundle = args.bundle or (install.BUNDLE if install.BUNDLE.is_dir() else None)
        python = args.python or bundle or HOST_PYTHON
        return install.install_below(args.host_root, args.bin_dir, python=python, **places)
    if args.python:
        install.check_interpreter(Path("/"), args.python)
    return install.install_binary(args.bin_dir, python=args.python, **places)


def _wait_until_good(args: argparse.Namespace, root: Path) -> None:
    """Return when the plugin that was just written has a good STATUS; CommandError with what is wrong."""
    from cni import install

    def ask(timeout: float) -> str:
        return install.status((args.bin_dir / install.BINARY).absolute(), root, timeout)

    def tell(wrong: str) -> None:
        complain(f"waiting up to {args.wait:g} s for a good STATUS: {wrong}")

    if wrong := install.wait_until_good(ask, args.wait, tell):
        raise CommandError(f"no conflist is written, STATUS is not good after {args.wait:g} s: {wrong}")
