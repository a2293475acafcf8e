"""The daemon, as the commands ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc

from api import podwire_pb2_grpc as rpc
from cli.output import CommandError

TIMEOUT_SECONDS = 5.0
MESSAGE_BYTES = 64 << 20  # 10,000 services are 6 MB of frontends


@contextlib.contextmanager
def connected(socket: str) -> Iterator[rpc.InspectStub]:
    """Connect to the daemon; a failed call becomes one sentence."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            yield rpc.InspectStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise CommandError(f"no daemon answers on {socket}; `podwire daemon` runs one") from None
            raise CommandError(f"the daemon on {socket} failed: {error.details()}") from None


def fields(message: Any) -> dict[str, Any]:
    """Return a message's fields by name, repeated ones as lists, messages in it likewise."""
    found = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        plain = fields if descriptor.message_type else _same
        found[descriptor.name] = [plain(v) for v in value] if descriptor.is_repeated else plain(value)
    return found


def _same(value: Any) -> Any:
    return value
