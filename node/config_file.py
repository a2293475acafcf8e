"""Read the configuration file, and what the command line says over it: one Configuration, or all problems.

text ──YAML──▶ Document (plain values, and the line of each) ──▶ values by key, problems
flags ─────────────────────────────────────────────────────────▶ values by key, problems
both, flags over the file ──build──▶ Configuration ──▶ problems between keys
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec.inspect import StructType, VarTupleType

from ipam.pools import IpamConfig
from ipam.ranges import RangeError
from node.config import ConfigError, Option, bare, build, ipam_of, options
from node.config_keys import KUBERNETES, PRIMARY, AddressPool, Configuration, Ipam

LARGEST = 1 << 20  # bytes of a file; what is larger is another file
MOST_PROBLEMS = 20

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and the line of each key as it is written in messages ("pods.mtu", "a.b[0]")."""

    name: str
    value: Any
    lines: Mapping[str, int]
    problems: tuple[tuple[str, str], ...] = ()  # keys and sentences

    def line(self, place: str) -> int:
        """Return the line of a key, or of the list that an item is in; 0 when the file has neither."""
        return self.lines.get(place) or self.lines.get(place.rpartition("[")[0], 0)

    def problem(self, place: str, sentence: str) -> str:
        """Return a sentence with where in the file it belongs."""
        line = self.line(place)
        return f"{self.name}:{line}: {sentence}" if line else f"{self.name}: {sentence}"


def load(path: Path | None, flags: Mapping[str, Any]) -> Configuration:
    """Return defaults, with the file over them, and flags, by their keys, over both.

    A file named in `ipam.file` is read too, its content stands in the other keys of `ipam`. Raises
    ConfigError with all problems; OSError for a file that cannot be read.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    document = None
    if path is not None:
        document = read(path)
        values, problems = of_document(document)
    given, wrong = of_flags(flags)
    problems += wrong
    if "ipam.file" in given:  # the flag stands for the whole section, not beside it
        values = {key: value for key, value in values.items() if not key.startswith("ipam.")}
    if problems:
        raise ConfigError(*problems)
    names = _Names(document, frozenset(given))
    configuration = build(values | given)
    if problems := list(_between(configuration, names)):
        raise ConfigError(*problems)
    return _with_ipam(configuration, names)


def read(path: Path) -> Document:
    """Read a YAML file. Raises ConfigError where it is no YAML, OSError where it cannot be read."""
    from node.sources.manifests import Loader

    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: more than {LARGEST} bytes are no configuration")
    try:
        loader = Loader(content.decode())
        try:
            root = loader.get_single_node()
            value = loader.construct_document(root) if root else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        begun = error.context or ""
        if begun.startswith("while") and error.context_mark:
            begun += f" of line {error.context_mark.line + 1}"
        words = ", ".join(filter(None, (begun, error.problem)))
        raise ConfigError(f"{where}: {' '.join(words.split())}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, no date, no number
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    lines = _Lines()
    if root:
        lines.walk(root, "")
    return Document(str(path), value, lines.found, tuple(lines.problems))


@dataclass(slots=True)
class _Lines:
    """The lines of a document's keys; and what is in it twice, of which YAML would take the last."""

    found: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def walk(self, node: yaml.Node, place: str) -> None:
        if id(node) in self._seen:  # an alias; it may lead back to where it stands
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._at(item, f"{place}[{index}]")
                self.walk(item, f"{place}[{index}]")
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = str(key.value)
                here = f"{place}.{name}" if place else name
                if here in self.found:
                    self.problems.append((here, f"{here} is in line {self.found[here]} already"))
                self._at(key, here)
                self.walk(value, here)

    def _at(self, node: yaml.Node, place: str) -> None:
        self.found[place] = node.start_mark.line + 1


def of_document(document: Document) -> tuple[dict[str, Any], list[str]]:
    """Return the values in a document by key, and all that is wrong with it."""
    values: dict[str, Any] = {}
    inspected = msgspec.inspect.type_info(Configuration)
    assert isinstance(inspected, StructType)
    found = [*document.problems, *_walk(inspected, document.value, "", values)]
    found.sort(key=lambda problem: document.line(problem[0]))
    problems = [document.problem(place, sentence) for place, sentence in found]
    if len(problems) > MOST_PROBLEMS:
        more = len(problems) - MOST_PROBLEMS
        problems = [*problems[:MOST_PROBLEMS], f"{document.name}: {more} more problems"]
    return values, problems


def of_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that flags give, by key, and all that is wrong with them."""
    values, problems = {}, []
    for key, value in flags.items():
        option = options()[key]
        found = [*_wrong(option, value)]
        for item, told in found:
            problems.append(f"{option.facts.flag} {told if item is None else f'{value[item]}: {told}'}")
        if not found:
            values[key] = msgspec.convert(value, option.type)
    return values, problems


# A problem: the key, with an index where it is an item's, and the sentence.
_Problems = Iterator[tuple[str, str]]


def _walk(kind: StructType, raw: object, place: str, values: dict[str, Any]) -> _Problems:
    """Put what a mapping says into `values`, and yield what is wrong with it."""
    if raw is None:
        return
    prefix = f"{place}." if place else ""
    fields = {f.encode_name: f for f in kind.fields}
    if not isinstance(raw, Mapping):
        yield (
            place,
            f"{place or 'the file'}: {_short.repr(raw)} is no mapping with keys such as {next(iter(fields))}",
        )
        return
    for key in raw:
        if key not in fields:
            yield f"{prefix}{key}", f"unknown key {prefix}{key}; {_nearest(str(key), [*fields], prefix)}"
    for name, inner in fields.items():
        value = raw.get(name)
        if value is None:  # as Kubernetes reads it: null is not given
            continue
        if isinstance(inner.type, StructType):
            yield from _walk(inner.type, value, f"{prefix}{name}", values)
            continue
        key = f"{prefix}{name}"
        wrong = [*_wrong_in_file(options()[key], value)]
        if not wrong:
            values[key] = msgspec.convert(value, options()[key].type)
        yield from wrong


def _wrong_in_file(option: Option, value: object) -> _Problems:
    key = option.key
    if isinstance(option.items, StructType) and isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _wrong_entry(option.items, entry, f"{key}[{index}]")
        return
    for item, told in _wrong(option, value):
        place = key if item is None else f"{key}[{item}]"
        yield place, f"{place}: {told}"


def _wrong_entry(kind: StructType, raw: object, place: str) -> _Problems:
    """Yield what is wrong with an entry of a list of mappings; IPAM itself looks at what the texts say."""
    fields = {f.encode_name: f for f in kind.fields}
    if not isinstance(raw, Mapping):
        yield place, f"{place}: {_short.repr(raw)} is not a mapping with the keys {', '.join(fields)}"
        return
    for key in raw:
        if key not in fields:
            hint = _nearest(str(key), [*fields], f"{place}.")
            yield f"{place}.{key}", f"unknown key {place}.{key}; {hint}"
    for name, inner in fields.items():
        key, value = f"{place}.{name}", raw.get(name)
        if value is None:
            if inner.required:
                yield place, f"{key} is missing"
        elif isinstance(bare(inner.type), VarTupleType):
            for index, told in _wrong_items(value, None):
                here = key if index is None else f"{key}[{index}]"
                yield here, f"{here}: {told}"
        elif not isinstance(value, str):
            yield key, f"{key}: {_short.repr(value)} is not text"


# What is wrong with a value, which is in the words; and the index of a list's item.
_Told = Iterator[tuple[int | None, str]]


def _wrong(option: Option, value: object) -> _Told:
    if option.items:
        yield from _wrong_items(value, option.facts.wrong)
        return
    try:
        converted = msgspec.convert(value, option.type)
    except msgspec.ValidationError:
        yield None, f"{_short.repr(value)} is not {option.wanted}"
        return
    if isinstance(converted, str) and not converted.isprintable():
        yield None, f"{_short.repr(value)} is not {option.wanted} in one line"
    elif option.facts.wrong and (told := option.facts.wrong(converted)):
        yield None, told


def _wrong_items(value: object, wrong: Callable[[str], str] | None) -> _Told:
    if not isinstance(value, list | tuple):
        yield None, f"{_short.repr(value)} is not a list"
        return
    for index, item in enumerate(value):
        if not isinstance(item, str) or not item.isprintable():
            yield index, f"{_short.repr(item)} is not text in one line"
        elif wrong and (told := wrong(item)):
            yield index, told


def _nearest(key: str, fields: Sequence[str], prefix: str) -> str:
    """Say which key was meant: one beside it, or one elsewhere in the file; else which there are."""

    def normal(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    beside = {normal(name): name for name in fields}
    elsewhere = {normal(known.rpartition(".")[2]): known for known in options()}
    elsewhere |= {normal(o.facts.flag): o.key for o in options().values() if o.facts.flag}
    for names in (beside, elsewhere):
        if near := difflib.get_close_matches(normal(key), names, 1, 0.75):
            return f"did you mean {names[near[0]]}?"
    where = f"in {prefix[:-1]}" if prefix else "at the top"
    return f"known {where} are {', '.join(fields)}"


@dataclass(frozen=True, slots=True)
class _Names:
    """How to call a key in a message: as the one who has to change it knows it."""

    document: Document | None
    given: frozenset[str]

    def __call__(self, key: str) -> str:
        flag = options()[key].facts.flag
        return flag if flag and (key in self.given or self.document is None) else key

    def problem(self, key: str, sentence: str) -> str:
        """Return a sentence that begins with the key, with where it is if the file says it."""
        told = f"{self(key)}{sentence}"
        in_file = self.document and key not in self.given
        return self.document.problem(key, told) if self.document and in_file else told


def _between(configuration: Configuration, name: _Names) -> Iterator[str]:
    """Yield what is wrong between values that are right by themselves."""
    pods, ipam = configuration.pods, configuration.ipam
    if pods.mode != "flat" and (pods.flat_addresses or pods.flat_interface):
        key = "pods.flatAddresses" if pods.flat_addresses else "pods.flatInterface"
        both = f" and {name('pods.flatInterface')} need {name('pods.mode')} flat"
        yield name.problem(key, both if pods.flat_addresses else f" needs {name('pods.mode')} flat")
    if pods.mode == "flat" and not (pods.flat_addresses or ipam.pools or ipam.file):
        yield name.problem(
            "pods.mode", f" flat needs {name('pods.flatAddresses')}, or pools in {name('ipam.file')}"
        )
    ports = configuration.services.node_port_addresses
    if PRIMARY in ports and len(ports) > 1:
        yield name.problem("services.nodePortAddresses", f" {PRIMARY} stands alone: it is no range")
    egress = {6 if ":" in address else 4: address for address in pods.egress_addresses}
    if len(egress) < len(pods.egress_addresses):
        yield name.problem("pods.egressAddresses", " has more than one address of a family")
    if ipam.file and msgspec.structs.replace(ipam, file="") != Ipam():
        yield name.problem("ipam.file", " stands alone: the file has what the other keys of ipam would say")
    yield from _wrong_claims(configuration, name)
    if configuration.source not in ("", KUBERNETES):
        for key in sorted(key for key in name.given if key.startswith("kubernetes.")):
            yield f"{name(key)} needs {name('source')} {KUBERNETES}"


def _wrong_claims(configuration: Configuration, name: _Names) -> Iterator[str]:
    """Yield what is wrong with the ranges that podCIDRs are claimed from."""
    api = configuration.kubernetes
    sizes = {
        4: ("kubernetes.nodeCIDRMaskSize", api.node_cidr_mask_size),
        6: ("kubernetes.nodeCIDRMaskSizeIPv6", api.node_cidr_mask_size_ipv6),
    }
    seen: dict[int, str] = {}
    for cidr in api.cluster_cidrs:
        network = ip_network(cidr)
        first = seen.setdefault(network.version, cidr)
        if first != cidr:
            told = f" {cidr} is a second IPv{network.version} range beside {first}"
            yield name.problem("kubernetes.clusterCIDRs", told)
        key, size = sizes[network.version]
        if size < network.prefixlen:
            yield name.problem(key, f" {size}: a podCIDR of /{size} does not fit into {cidr}")


def _with_ipam(configuration: Configuration, name: _Names) -> Configuration:
    """Return it with what `ipam.file` says, checked."""
    file = configuration.ipam.file
    if file:
        try:
            raw = read(Path(file)).value
            found = IpamConfig.parse({} if raw is None else raw)
        except OSError as error:
            raise ConfigError(name.problem("ipam.file", f" {file}: {error.strerror}")) from None
        except RangeError as error:
            raise ConfigError(name.problem("ipam.file", f" {file}: {error}")) from None
        except ConfigError as error:
            raise ConfigError(name.problem("ipam.file", f" {error}")) from None
        configuration = msgspec.structs.replace(configuration, ipam=_section(found, file))
    try:
        ipam_of(configuration)
    except RangeError as error:
        place, _, told = str(error).partition(": ")
        key = f"ipam.{place}"
        sentence = f"{key}: {told}" if not file else str(error)
        if name.document and not file:
            sentence = name.document.problem(key, sentence)
        raise ConfigError(sentence) from None
    return configuration


def _section(config: IpamConfig, file: str) -> Ipam:
    pools = tuple(
        AddressPool(name=p.name, ranges=(*map(str, p.ranges),), namespaces=p.namespaces) for p in config.pools
    )
    return Ipam(
        file=file,
        pools=pools,
        exclude=tuple(map(str, config.exclude)),
        reserve=tuple(map(str, config.reserve)),
        quarantine=config.quarantine,
        exhausted_status=config.exhausted_status,
    )
