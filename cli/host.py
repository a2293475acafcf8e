"""What commands that work on the node itself have in common."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cli.output import CommandError

STATE_DIR = "/var/lib/podwire"
SOCKET = "/run/podwire/podwire.sock"


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Add the options for the ledger and the daemon's socket."""
    add_state_dir(parser)
    parser.add_argument("--socket", type=Path, default=Path(SOCKET), help="(default: %(default)s)")


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option for the ledger."""
    parser.add_argument(
        "--state-dir", type=Path, default=Path(STATE_DIR), help="the ledger (default: %(default)s)"
    )


def need_root(what: str) -> None:
    """Refuse to go on as anybody else."""
    if os.geteuid() != 0:
        raise CommandError(f"{what} needs root")
