"""WireGuard's keys of a node: the private ones are in files of root's, and leave them for the kernel only.

`DIR/key0` and `key1` (base64, as `wg genkey` prints it), one for each device. What the public ones are only
the kernel computes; it tells them of a device that has a private key.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from netlink.wireguard import KEY_BYTES, new_private_key

SLOTS = (0, 1)
FOLDER, ROTATION = "wireguard", "rotation.json"
"""Below the state's folder; and the file there that says where a change of keys is."""


class KeyFileError(Exception):
    """A file with a private key cannot be used; a sentence."""


class Keys:
    """The keys of the two devices. `public` are those that the kernel has told, by device (0 or 1)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[int, tuple[int, int]] = {}
        self.public: dict[int, str] = {}

    def __repr__(self) -> str:
        return f"Keys({self._directory}, {self.public})"

    def private(self, slot: int) -> bytes:
        """Return a private key, which is made if there is none. Raises KeyFileError."""
        path = self._path(slot)
        try:
            found = path.stat()
            text = path.read_text("ascii")
        except FileNotFoundError:
            return self.renew(slot)
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"{path} cannot be read: {error}") from None
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except binascii.Error:
            key = b""
        if len(key) != KEY_BYTES:
            wanted = f"a key of {KEY_BYTES} bytes in base64"
            raise KeyFileError(f"{path} is not {wanted}: remove it, and the daemon makes another")
        file = found.st_ino, found.st_mtime_ns
        if self._read.setdefault(slot, file) != file:  # somebody put another key there
            self._read[slot] = file
            self.public.pop(slot, None)
        return key

    def renew(self, slot: int) -> bytes:
        """Replace a private key by a new one, and return that; the device does not have it yet.

        Raises KeyFileError.
        """
        path, key = self._path(slot), new_private_key()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            put(path, base64.b64encode(key) + b"\n")
        except OSError as error:
            raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
        self.public.pop(slot, None)
        return key

    def made(self, slot: int) -> float:
        """Return when a private key was made (seconds since the epoch); 0: there is none."""
        try:
            return self._path(slot).stat().st_mtime
        except OSError:
            return 0.0

    def _path(self, slot: int) -> Path:
        return self._directory / f"key{slot}"


def files(directory: Path) -> list[Path]:
    """Return what can be in the folder of keys, be it from a write that a crash has ended."""
    found = [directory / name for name in (*(f"key{slot}" for slot in SLOTS), ROTATION)]
    return [*found, *map(_temporary, found)]


def put(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read; whoever reads it finds the old content or the new one."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(opened, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
