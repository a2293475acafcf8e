"""The `podwire` command."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from cli.output import CommandError, complain

DESCRIPTION = "Node networking for Kubernetes: CNI plugin, IPAM, routes and service proxy in one package."


MODULES = {
    "daemon": "cli.daemon",
    "config": "cli.config",
    "install": "cli.install",
    **dict.fromkeys(("status", "pods", "frontends", "routes"), "cli.inspect"),
    "services": "cli.services",
    "l7": "cli.l7",
    "wireguard": "cli.wireguard",
    "render": "cli.render",
    "ipam": "cli.ipam",
    "doctor": "cli.doctor",
    "trace": "cli.trace",
    "cleanup": "cli.cleanup",
    "lab": "cli.lab",
}
"""Where each command is."""


def parser(command: str = "") -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or of one command; each command sets `run`.

    To load all of them takes as long as to load the daemon.
    """
    top = argparse.ArgumentParser(prog="podwire", description=DESCRIPTION)
    top.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for module in dict.fromkeys([MODULES[command]] if command in MODULES else MODULES.values()):
        import_module(module).add_parser(commands)
    return top


class _Version(argparse.Action):
    """Looks for the version only when asked: it takes a tenth of what the daemon's start does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"podwire {version('podwire')}")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed with a sentence, 2 wrong usage."""
    words = sys.argv[1:] if argv is None else argv
    args = parser(words[0] if words else "").parse_args(words)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        complain(str(error))
        return 1
    except BrokenPipeError:
        # The reader of our output went away; what was asked for is done. Keep Python quiet at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = error.strerror or str(error)
        complain(f"{error.filename}: {what}" if error.filename else what)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
