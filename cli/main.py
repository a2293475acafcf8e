"""The `podwire` command."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version

from cli import cleanup, daemon, doctor, inspect, install, ipam, lab, render, services
from cli.output import CommandError, complain

DESCRIPTION = "Node networking for Kubernetes: CNI plugin, IPAM, routes and service proxy in one package."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; each command sets `run`."""
    top = argparse.ArgumentParser(prog="podwire", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"podwire {version('podwire')}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    daemon.add_parser(commands)
    install.add_parser(commands)
    inspect.add_parsers(commands)
    services.add_parser(commands)
    render.add_parser(commands)
    ipam.add_parser(commands)
    doctor.add_parser(commands)
    cleanup.add_parser(commands)
    lab.add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed with a sentence, 2 wrong usage."""
    args = parser().parse_args(argv)
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
