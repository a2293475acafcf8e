"""Follow a folder of Kubernetes YAML and JSON: what it says is what the node does, within 100 ms.

A file that cannot be read (half written, say) keeps what it said before; so does each object in it that
is wrong. Only complete writes are looked at: closed after writing, moved in, moved out, deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml
from inotify_simple import INotify, flags

from node.sources.objects import Object, ObjectError, identity, parse

log = logging.getLogger("podwire.manifests")

SUFFIXES = (".yaml", ".yml", ".json")
EVENTS = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR
Identity = tuple[str, str]
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SourceError(Exception):
    """The folder cannot be followed."""


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

    def read(self) -> Content:
        """Read what is new or changed since the last call; return all."""
        present = {p: s for p in self._paths() if (s := _signature(p))}
        for gone in self._files.keys() - present.keys():
            del self._files[gone]
        for path, signature in present.items():
            known = self._files.get(path)
            if known is None or known.signature != signature:
                self._files[path] = _read(path, signature, known)
        return self._content()

    def follow(self, deliver: Callable[[Content], None], stopped: Callable[[], bool]) -> None:
        """Deliver the content now and after every change, until `stopped` (asked twice a second) says so."""
        if not self._folder.is_dir():
            raise SourceError(f"--source {self._folder} is not a folder")
        with INotify() as inotify:
            inotify.add_watch(self._folder, EVENTS)
            deliver(self.read())
            while not stopped():
                # A short wait after the first event gathers the files of one copy into one change.
                if inotify.read(timeout=500, read_delay=5):
                    deliver(self.read())

    def _paths(self) -> list[Path]:
        try:
            return sorted(
                p for p in self._folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".")
            )
        except OSError as error:
            log.error("the folder %s cannot be read: %s", self._folder, error.strerror)
            return sorted(self._files)

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


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(path: Path, signature: tuple[int, int, int], before: _File | None) -> _File:
    """Read one file; where it is wrong, keep what it said before."""
    known = before.objects if before else {}
    try:
        documents = list(_documents(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).split())
        return _File(signature, known, [f"{path.name}: not readable as YAML or JSON: {what}"])
    found = _File(signature)
    for document in documents:
        name = identity(document)
        try:
            value = parse(document)
        except ObjectError as error:
            found.problems.append(f"{path.name}: {error}")
            value = known.get(name)
        if value is not None:
            found.objects[name] = value
    return found


def _documents(path: Path) -> Iterator[Any]:
    """Yield the objects in a file; the items of a List are objects of their own."""
    data = path.read_bytes()
    loaded = [msgspec.json.decode(data)] if path.suffix == ".json" else yaml.load_all(data, Loader)
    for document in loaded:
        if isinstance(document, dict) and str(document.get("kind", "")).endswith("List"):
            yield from document.get("items") or []
        elif document is not None:
            yield document
