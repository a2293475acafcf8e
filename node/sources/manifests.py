"""Follow a folder of Kubernetes YAML and JSON: what it says is what the node does, within milliseconds.

A file that cannot be read (half written, say) keeps what it said before; so does each object in it that
is wrong. Only complete writes are looked at: closed after writing, moved in, moved out, deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import yaml
from inotify_simple import INotify, flags

from node.sources.objects import Object, ObjectError, identity, parse
from node.store import Identity, Store

log = logging.getLogger("podwire.source")

SUFFIXES = (".yaml", ".yml", ".json")
EVENTS = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR
DEEPEST = 100
"""Levels of nesting: no Kubernetes object comes near, and libyaml's recursion would overrun the stack."""

Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class SourceError(Exception):
    """The folder cannot be followed."""


class Loader(Base):  # type: ignore[misc]
    """YAML as Kubernetes reads it: a timestamp is a string; and never nested too deep to be read safely."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [r for r in resolvers if r[0] != TIMESTAMP]
        for first, resolvers in Base.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def descend_resolver(self, current_node: Any, current_index: Any) -> None:
        """Count a level; PyYAML calls this for each node that it enters."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} levels deep")

    def ascend_resolver(self) -> None:
        """Leave a level."""
        self._depth -= 1


@dataclass(slots=True)
class _File:
    """What a file said when it was last read."""

    signature: tuple[int, int, int]
    objects: dict[Identity, Object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Content:
    """All objects of the folder, and what is wrong with it, in sentences."""

    objects: dict[Identity, Object]
    problems: tuple[str, ...]


class ManifestFolder:
    """A folder of manifests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, _File] = {}

    def read(self, written: Set[str] = frozenset()) -> Content:
        """Read what is new or changed since the last call, and what was `written` (names); return all.

        While the folder itself cannot be read, what it said last still counts.
        """
        try:
            paths = self._paths()
        except OSError as error:
            sentence = f"the folder {self._folder} cannot be read ({error.strerror}): its last content counts"
            content = self._content()
            return Content(content.objects, (sentence, *content.problems))
        present = {p: s for p in paths if (s := _signature(p))}
        for gone in self._files.keys() - present.keys():
            del self._files[gone]
        for path, signature in present.items():
            known = self._files.get(path)
            # Two writes within a tick of the file system's clock can leave the same signature.
            if known is None or known.signature != signature or path.name in written:
                self._files[path] = _read(path, signature, known)
        return self._content()

    def follow(self, deliver: Callable[[Content], None], stopped: Callable[[], bool]) -> None:
        """Deliver the content now and after every change, until `stopped` (asked twice a second) says so."""
        if not self._folder.is_dir():
            raise SourceError(f"--source {self._folder} is not a folder")
        with INotify() as inotify:
            watched = self._watch(inotify)
            deliver(self.read())
            while not stopped():
                # A short wait after the first event gathers the files of one copy into one change.
                events = inotify.read(timeout=500, read_delay=5)
                # A folder made anew can have the old one's inode; its watch is gone all the same.
                moved = _inode(self._folder) != watched or any(e.mask & flags.IGNORED for e in events)
                if moved:
                    watched = self._watch(inotify)
                if events or moved:
                    deliver(self.read({event.name for event in events}))

    def _watch(self, inotify: INotify) -> int | None:
        """Watch what is at the folder's path now; return its inode, None when there is nothing."""
        try:
            found = _inode(self._folder)
            inotify.add_watch(self._folder, EVENTS)
        except OSError:
            return None
        return found

    def _paths(self) -> list[Path]:
        return sorted(
            p for p in self._folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".")
        )

    def _content(self) -> Content:
        objects: dict[Identity, Object] = {}
        owner: dict[Identity, Path] = {}
        problems: list[str] = []
        for path, known in sorted(self._files.items()):
            problems += known.problems
            for name, value in known.objects.items():
                if name in objects:
                    kind, text = name
                    problems.append(f"{path.name}: {kind} {text} is in {owner[name].name} too, which counts")
                else:
                    objects[name], owner[name] = value, path
        return Content(objects, tuple(problems))


class Manifests:
    """A folder of manifests as the daemon's source."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = ManifestFolder(folder), store
        self.described = f"folder {folder}"
        self.problems: tuple[str, ...] = ()

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Follow the folder until `stopped`, which waits so many seconds, says so. Raises SourceError."""
        self._folder.follow(self._take, lambda: stopped(0))

    def _take(self, content: Content) -> None:
        for problem in content.problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = content.problems
        self._store.replace(content.objects)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _inode(path: Path) -> int | None:
    signature = _signature(path)
    return signature[2] if signature else None


def _read(path: Path, signature: tuple[int, int, int], before: _File | None) -> _File:
    """Read one file; where it is wrong, keep what it said before."""
    known = before.objects if before else {}
    try:
        documents = list(_documents(path))
    except Exception as error:  # PyYAML's constructors raise what they please for what people write
        what = " ".join(str(error).replace('in "<byte string>", ', "").split())
        return _File(signature, known, [f"{path.name}: not readable as YAML or JSON: {what}"])
    found = _File(signature)
    for document in documents:
        name = identity(document)
        left_out: list[str] = []
        try:
            value = parse(document, left_out)
        except ObjectError as error:
            found.problems.append(f"{path.name}: {error}")
            value = known.get(name)
        found.problems += [f"{path.name}: {sentence}" for sentence in left_out]
        if value is not None:
            found.objects[name] = value
    return found


def _documents(path: Path) -> Iterator[Any]:
    """Yield the objects in a file; the items of a List are objects of their own."""
    data = path.read_bytes()
    loaded = [msgspec.json.decode(data)] if path.suffix == ".json" else yaml.load_all(data, Loader)
    for document in loaded:
        if isinstance(document, dict) and str(document.get("kind", "")).endswith("List"):
            items = document.get("items") or []
            if not isinstance(items, list):
                raise ValueError(f"items of {document['kind']} is not a list")
            yield from items
        elif document is not None:
            yield document
