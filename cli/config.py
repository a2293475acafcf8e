"""`podwire config`: look at the daemon's configuration without a daemon."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import msgspec

from cli.options import add_all, configuration, refuse
from cli.output import complain
from node.config import DEFAULT_PATH, ConfigError, plain, schema

DESCRIPTION = """
The daemon's configuration is a YAML file, /etc/podwire/config.yaml, and the flags of `podwire daemon`, which
count over it. These commands need no root, no daemon and no cluster, and change nothing.
"""

EXAMPLES = """
examples:
  podwire config check
  podwire config check new.yaml
  podwire config show --mode bridge -o json
  podwire config schema
"""

CHECK = """
Look for mistakes in a configuration file: YAML that cannot be read, unknown keys, wrong values, values that
contradict each other; also in the file that `ipam.file` names. Each is a sentence on standard error with
the line it is in. Whether folders and files that the daemon will use exist is not looked at: the file may be
meant for another node.

The exit status is 0 when the file is right, 1 when it is not or cannot be read, and 2 for wrong usage.
"""

CHECK_EXAMPLES = """
examples:
  podwire config check
      /etc/podwire/config.yaml
  podwire config check new.yaml
      before it takes the other's place
"""

SHOW = """
Print the configuration that counts: defaults, over them the file, over that the flags given here, which are
those of `podwire daemon`. What is printed is a complete file, which has the same effect.

The exit status is 0, 1 with a sentence for each mistake in file or flags, and 2 for wrong usage.
"""

SHOW_EXAMPLES = """
examples:
  podwire config show
  podwire config show --config new.yaml
  podwire config show --source kubernetes --kubeconfig /etc/podwire/kubeconfig
      what is printed can be the file instead of the flags
  podwire config show -o json
"""

SCHEMA = """
Print the JSON schema (draft 2020-12) of the configuration file, with a description, the default and the
bounds of each key, for editors and for checks where podwire is not installed.
"""

SCHEMA_EXAMPLES = """
examples:
  podwire config schema
      into a file podwire.schema.json, say: editors use it for a configuration that begins with the line
      `# yaml-language-server: $schema=podwire.schema.json`
"""


def add_parser(commands: Any) -> None:
    """Add the command and its verbs to the parser."""
    parser = commands.add_parser(
        "config",
        help="check and show the daemon's configuration",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    check = _verb(verbs, "check", "look for mistakes in a configuration file", CHECK, CHECK_EXAMPLES)
    check.add_argument("file", nargs="?", type=Path, default=Path(DEFAULT_PATH), metavar="FILE",
                       help="(default: %(default)s)")  # fmt: skip
    check.set_defaults(run=run_check)
    show = _verb(verbs, "show", "print the configuration that counts", SHOW, SHOW_EXAMPLES)
    show.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="(default: yaml)")
    add_all(show)
    show.set_defaults(run=run_show)
    _verb(verbs, "schema", "print the JSON schema of the file", SCHEMA, SCHEMA_EXAMPLES).set_defaults(
        run=run_schema
    )


def _verb(verbs: Any, name: str, words: str, description: str, examples: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=words,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return verb


def run_check(args: argparse.Namespace) -> int:
    """Say what is wrong with a file; exit status 1 if anything is."""
    from node.config_file import load

    try:
        found = load(args.file, {})
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
        return 1
    note = "" if found.source else " (it names no source: `podwire daemon` needs --source with it)"
    print(f"{args.file}: no mistakes found{note}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print what file and flags come to."""
    import yaml

    try:
        found = configuration(args)
    except ConfigError as error:
        raise refuse(error) from None
    # With the file's content in the other keys, it is the whole truth without the file.
    shown = msgspec.structs.replace(
        found,
        node_name=found.node_name or socket.gethostname().lower(),
        ipam=msgspec.structs.replace(found.ipam, file=""),
    )
    if args.output == "json":
        print(json.dumps(plain(shown), indent=2))
    else:
        print(yaml.safe_dump(plain(shown), sort_keys=False, allow_unicode=True), end="")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    """Print the JSON schema."""
    print(json.dumps(schema(), indent=2))
    return 0
