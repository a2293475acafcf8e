"""The daemon's options on a command line, made from the table of its configuration (node.config)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cli.output import CommandError, complain
from node.config import DEFAULT_PATH, ConfigError, Option, options
from node.config_keys import Configuration

GROUPS = ("kubernetes", "pods", "services")
"""Parts of the configuration that have a heading of their own in --help."""

ALSO = {"--proxy-mode": ("--dataplane",)}
"""Other spellings of flags."""

SHORT = {"-v": ("logs.level", "debug", "as --log-level debug: log every change")}


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add --config and the flag of every key that has one."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"configuration file; flags count over it (default: {DEFAULT_PATH}, if it is there)",
    )
    groups: dict[str, Any] = {}
    for option in options().values():
        topic = option.key.partition(".")[0] if "." in option.key else ""
        topic = "pods" if topic == "ipam" else topic
        if topic in GROUPS and topic not in groups:
            groups[topic] = parser.add_argument_group(topic)
        if option.facts.flag:
            add(groups.get(topic, parser), option)
    for flag, (key, value, words) in SHORT.items():
        parser.add_argument(
            flag,
            "--verbose",
            dest=key,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=words,
        )


def add(group: Any, option: Option) -> None:
    """Add one option; absent from the result unless it is given, so that the file counts."""
    facts, kind = option.facts, option.kind
    shared: dict[str, Any] = {"dest": option.key, "default": argparse.SUPPRESS, "help": _help(option)}
    if isinstance(kind, msgspec.inspect.BoolType):
        shared["action"] = argparse.BooleanOptionalAction
    elif option.items:
        shared |= {"action": _Append, "metavar": facts.metavar}
    elif option.choices:
        shared["choices"] = option.choices
    else:
        numbers = isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.UnionType)
        shared |= {"metavar": facts.metavar, "type": int if numbers else str}
    group.add_argument(facts.flag, *ALSO.get(facts.flag, ()), **shared)


class _Append(argparse.Action):
    """Gather a list: from commas, and from each time the flag is given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, ())
        setattr(namespace, self.dest, (*before, *str(values).split(",")))


def _help(option: Option) -> str:
    words = option.description.replace("%", "%%")
    if option.items:
        words += "; can be repeated"
    if option.kind and option.default not in ("", (), None, False):
        shown = ",".join(option.default) if isinstance(option.default, tuple) else option.default
        words += f" (default: {shown})"
    return words


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that were given, by key."""
    return {key: value for key, value in vars(args).items() if key in options()}


def config_path(args: argparse.Namespace) -> Path | None:
    """Return the file that counts: the one named, else the usual one if it is there."""
    named: Path | None = args.config
    usual = Path(DEFAULT_PATH)
    return named or (usual if usual.exists() else None)


def configuration(args: argparse.Namespace) -> Configuration:
    """Return what file and flags say together. Raises ConfigError."""
    from node.config_file import load

    path = config_path(args)
    try:
        return load(path, given(args))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def refuse(error: ConfigError) -> CommandError:
    """Say each problem of a configuration; return the last, to be raised."""
    *others, last = error.problems
    for problem in others:
        complain(problem)
    return CommandError(last)
