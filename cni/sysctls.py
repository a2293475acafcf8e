"""Sysctls of the node itself that podwire sets, and what they were before, so that they can be set back.

    keep_in(state_dir), once ── put ──▶ /proc/sys, and noted in FILE ── noted ──▶ restore, forget

What is set on podwire's own interfaces, or inside pods, goes with these and is not noted. A note counts for
one boot and one network namespace, as sysctls do; where a value was changed more than once, what it was the
last time counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

log = logging.getLogger("podwire.sysctls")

FILE = "sysctls.json"
ROOT = Path("/proc/sys")

_directory: Path | None = None


class Noted(msgspec.Struct, frozen=True):
    """A sysctl that was `before` and was set to `value`.

    `beside` are others that the kernel sets along with it, by path: what they were, and what they were then.
    """

    before: str
    value: str
    beside: dict[str, tuple[str, str]] = {}


class _Notes(msgspec.Struct):
    boot: str
    network: int
    sysctls: dict[str, Noted]


_NOTES = msgspec.json.Decoder(_Notes)


def keep_in(directory: Path | None) -> None:
    """Note what sysctls were in a state directory, from now on in this process; None: nowhere."""
    global _directory
    _directory = directory


def put(path: Path, value: str, beside: Iterable[Path] = ()) -> None:
    """Set a sysctl that has another value; what it was is noted before. Raises OSError.

    `beside` are those that the kernel sets along with it.
    """
    before = path.read_text().strip()
    if before == value:
        return
    earlier = noted(_directory).get(path) if _directory else None
    if earlier and earlier.value == before:  # our own, raised again
        before = earlier.before
    others = {str(other): _read(other) for other in beside} if _directory else {}
    _note(path, Noted(before, value))  # a process that dies now has noted too much rather than nothing
    path.write_text(value)
    if others:
        _note(path, Noted(before, value, {p: (was, _read(Path(p))) for p, was in others.items()}))


def noted(directory: Path) -> dict[Path, Noted]:
    """Return what counts of what was noted in a state directory, in the order in which it was set."""
    notes = _load(directory / FILE)
    return {Path(path): found for path, found in notes.sysctls.items()}


def restore(path: Path, found: Noted) -> None:
    """Set a sysctl back, and what the kernel sets along with it; what others changed meanwhile stays.

    Raises OSError. One whose interface is gone is fine.
    """
    now = {other: _read(Path(other)) for other in found.beside}
    with contextlib.suppress(FileNotFoundError):
        path.write_text(found.before)
    for other, (before, after) in found.beside.items():
        wanted = before if now[other] == after else now[other]
        if wanted and _read(Path(other)) != wanted:
            with contextlib.suppress(FileNotFoundError):
                Path(other).write_text(wanted)


def forget(directory: Path, path: Path) -> None:
    """Take out a note: what it was about is as before, or is somebody else's by now. Raises OSError."""
    notes = _load(directory / FILE)
    if notes.sysctls.pop(str(path), None):
        _save(directory / FILE, notes)


def name_of(path: Path) -> str:
    """Return a sysctl's name as sysctl(8) has it: dots between the parts, slashes for dots in them."""
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts
    return ".".join(part.replace(".", "/") for part in parts)


def _note(path: Path, found: Noted) -> None:
    if _directory is None:
        return
    try:
        notes = _load(_directory / FILE)
        notes.sysctls.pop(str(path), None)
        notes.sysctls[str(path)] = found
        _save(_directory / FILE, notes)
    except OSError as error:  # the network counts more
        log.warning("what %s was before is not noted: %s", name_of(path), error)


def _load(file: Path) -> _Notes:
    """Return the notes of this boot and namespace; none, where the file is of another or is broken."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    here = _Notes(boot, Path("/proc/thread-self/ns/net").stat().st_ino, {})
    try:
        found = _NOTES.decode(file.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return here
    return found if (found.boot, found.network) == (here.boot, here.network) else here


def _save(file: Path, notes: _Notes) -> None:
    """Replace the file in one step; without notes there is none."""
    if not notes.sysctls:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.tmp")
    with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
        opened.write(msgspec.json.encode(notes))
    staging.replace(file)


def _read(path: Path) -> str:
    """Return a sysctl's value, nothing where there is no such one (any more)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
