"""The daemon's configuration: what can be set, what it means, and what it is when nobody sets it.

    Configuration  the file's content and every option of the command line, a frozen value (node.config_keys)
    Option         one of its keys, with what help, schema and documentation say of it: the only table of them
    changes        what differs between two configurations, and whether it counts without a restart

Reading a file is `node.config_file`. Keys are written as Kubernetes writes those of its own components.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import msgspec
from msgspec import Struct

from node.config_keys import Configuration, Facts

if TYPE_CHECKING:
    from ipam.pools import IpamConfig

DEFAULT_PATH = "/etc/podwire/config.yaml"


class ConfigError(Exception):
    """A configuration that cannot be used; each problem is a sentence."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


NOTHING = Facts()


@dataclass(frozen=True, slots=True)
class Option:
    """One key: `place` are its attributes in a Configuration, `key` its name in the file.

    `kind` is the inspected type, without its description; of a list, `items` that of its items.
    """

    place: tuple[str, ...]
    key: str
    type: Any
    kind: msgspec.inspect.Type
    default: Any
    description: str
    facts: Facts = NOTHING

    @property
    def items(self) -> msgspec.inspect.Type | None:
        """The type of a list's items; None when the value is no list."""
        kind = self.kind
        return kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed, where they can be listed."""
        # Not kind.values: those are sorted, and the type has them as people should read them.
        listed = isinstance(self.kind, msgspec.inspect.LiteralType)
        return tuple(get_args(get_args(self.type)[0])) if listed else ()

    @property
    def wanted(self) -> str:
        """What a value has to be, to complete "… is not"."""
        kind = self.kind
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = kind.types[0]
        if self.facts.wanted:
            return self.facts.wanted
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(kind, msgspec.inspect.IntType):
            return f"between {kind.ge} and {kind.le}"
        return "true or false" if isinstance(kind, msgspec.inspect.BoolType) else "text"

    def of(self, configuration: Configuration) -> Any:
        """Return the value that a configuration has for it."""
        return functools.reduce(getattr, self.place, configuration)


@functools.cache
def options() -> Mapping[str, Option]:
    """Return every option by its key, in the order of the file."""
    return {option.key: option for option in _options(Configuration, (), "")}


def _options(struct: type[Struct], place: tuple[str, ...], prefix: str) -> Iterator[Option]:
    inspected = msgspec.inspect.type_info(struct)
    assert isinstance(inspected, msgspec.inspect.StructType)
    declared = {field.name: field for field in msgspec.structs.fields(struct)}
    for field in inspected.fields:
        here, key = (*place, field.name), f"{prefix}{field.encode_name}"
        kind, facts, description = field.type, NOTHING, ""
        while isinstance(kind, msgspec.inspect.Metadata):
            facts = (kind.extra or {}).get("facts", facts)
            description = (kind.extra_json_schema or {}).get("description", description)
            kind = kind.type
        if isinstance(kind, msgspec.inspect.StructType):
            yield from _options(kind.cls, here, f"{key}.")
        else:
            default = declared[field.name].default
            yield Option(here, key, declared[field.name].type, kind, default, description, facts)


def bare(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Return an inspected type without what is only said about it."""
    return bare(kind.type) if isinstance(kind, msgspec.inspect.Metadata) else kind


def build(values: Mapping[str, Any]) -> Configuration:
    """Return a configuration of values by their keys; what is not named has its default."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        *section, name = options()[key].place
        (sections.setdefault(section[0], {}) if section else top)[name] = value
    default = Configuration()
    for name, found in sections.items():
        top[name] = msgspec.structs.replace(getattr(default, name), **found)
    return Configuration(**top)


def changes(old: Configuration, new: Configuration) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys whose value differs: those that count at once, and those that need a restart."""
    differing = [option for option in options().values() if option.of(old) != option.of(new)]
    return (
        tuple(option.key for option in differing if option.facts.reload),
        tuple(option.key for option in differing if not option.facts.reload),
    )


def taken_over(old: Configuration, new: Configuration) -> Configuration:
    """Return what a daemon runs by after a reload: the new value where that counts at once, else the old."""
    return build({o.key: o.of(new if o.facts.reload else old) for o in options().values()})


def ipam_of(configuration: Configuration) -> IpamConfig:
    """Return how the node gives addresses; in mode flat with a pool for everybody.

    Raises RangeError, whose field is a key under `ipam`.
    """
    from ipam.pools import IpamConfig, Pool
    from ipam.ranges import parse_range

    raw = msgspec.structs.asdict(configuration.ipam)
    raw["pools"] = [msgspec.structs.asdict(pool) for pool in configuration.ipam.pools]
    del raw["file"]
    config = IpamConfig.parse(raw)
    ranges = tuple(parse_range(text) for text in configuration.pods.flat_addresses)
    if configuration.pods.mode != "flat" or not ranges:
        return config
    everybody = Pool("flat", ranges, ("*",))
    return IpamConfig.from_json(replace(config, pools=(*config.pools, everybody)).to_json())


def schema() -> dict[str, Any]:
    """Return the JSON schema of the file."""
    found = msgspec.json.schema(Configuration)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://podwire.io/v1alpha1/configuration.json",
        **found,
    }


def plain(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration as the file would have it: every key, with its value."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(configuration))
    return found
