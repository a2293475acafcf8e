"""The last known state of the cluster, on disk: for a start while the API server is away.

One file, replaced at once or not at all: a line of JSON that says what it is, then the objects (MessagePack,
deflated).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from node.sources.objects import Object
from node.store import Identity
from proxy.model import EndpointSlice, Node, Service

FORMAT = 1
"""Raise it whenever a model value of `proxy.model` gets a field that older files do not have a default for,
or one changes its meaning."""
FILE = "cluster-state"


class Header(msgspec.Struct):
    """What the file is: `written` is in seconds since the epoch."""

    format: int
    node: str
    written: float


class Body(msgspec.Struct):
    """The objects of each kind, by name."""

    services: dict[str, Service]
    slices: dict[str, EndpointSlice]
    nodes: dict[str, Node]


HEADER = msgspec.json.Decoder(Header)
BODY = msgspec.msgpack.Decoder(Body)


class SavedError(Exception):
    """There is no state to go by; the text is one sentence."""


def save(directory: Path, node: str, objects: Mapping[Identity, Object], now: float) -> None:
    """Write the state. Raises OSError; the file before stays then."""
    header = msgspec.json.encode(Header(FORMAT, node, now))
    data = header + b"\n" + zlib.compress(msgspec.msgpack.encode(_body(objects)), level=1)
    descriptor, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=directory)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(directory / FILE)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def load(directory: Path, node: str) -> tuple[dict[Identity, Object], float]:
    """Return the objects, and when they were written. Raises SavedError."""
    path = directory / FILE
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
        header = HEADER.decode(first)
        if header.format != FORMAT:
            raise SavedError(f"{path} has format {header.format}, not {FORMAT}: it is of another version")
        if header.node != node:
            raise SavedError(f"{path} is of node {header.node}, not {node}")
        body = BODY.decode(zlib.decompress(rest))
    except FileNotFoundError:
        raise SavedError(f"there is no {path}") from None
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, zlib.error) as error:
        raise SavedError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    kinds: dict[str, Mapping[str, Object]] = {
        "Service": body.services,
        "EndpointSlice": body.slices,
        "Node": body.nodes,
    }
    return {(kind, name): v for kind, found in kinds.items() for name, v in found.items()}, header.written


def _body(objects: Mapping[Identity, Object]) -> Body:
    body = Body({}, {}, {})
    for (_, name), value in objects.items():
        match value:
            case Service():
                body.services[name] = value
            case EndpointSlice():
                body.slices[name] = value
            case Node():
                body.nodes[name] = value
    return body
