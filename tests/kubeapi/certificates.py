"""Certificates for tests, by the openssl program: an authority, and what it signs."""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, PEM files."""

    certificate: Path
    key: Path


def authority(directory: Path, name: str = "test authority") -> Pair:
    """Make an authority."""
    pair = _pair(directory, "ca")
    extensions = (
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
    )
    _request(pair, name, extensions)
    return pair


def signed(directory: Path, ca: Pair, addresses: tuple[str, ...]) -> Pair:
    """Make a server's certificate for addresses and names."""
    pair = _pair(directory, "server")
    names = ",".join(
        f"{'IP' if a.replace('.', '').isdecimal() or ':' in a else 'DNS'}:{a}" for a in addresses
    )
    extensions = (
        f"subjectAltName={names}",
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        "extendedKeyUsage=serverAuth",
    )
    _request(pair, "kube-apiserver", extensions, "-CA", ca.certificate, "-CAkey", ca.key)
    return pair


def _pair(directory: Path, name: str) -> Pair:
    number = next(_numbers)
    return Pair(directory / f"{name}-{number}.crt", directory / f"{name}-{number}.key")


def _request(pair: Pair, name: str, extensions: tuple[str, ...], *more: str | Path) -> None:
    key: tuple[str | Path, ...] = (
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        pair.key,
    )
    added: list[str | Path] = [part for extension in extensions for part in ("-addext", extension)]
    command: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        *key,
        "-out",
        pair.certificate,
        "-days",
        "30",
        "-subj",
        f"/CN={name}",
    ]
    done = subprocess.run([*command, *added, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl could not make a certificate: {done.stderr}")
