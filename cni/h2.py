"""One unary gRPC call over HTTP/2, from bytes to bytes: what the plugin binary needs, and no more.

It imports nothing, because start-up is most of the binary's time. The peer's headers are not decoded: a
complete message and the end of the stream are an answer; anything else is a `ShimError`, after which the
binary does the work itself. Source: RFC 9113 (frames), RFC 7541 (headers), gRPC's PROTOCOL-HTTP2.
"""

TYPE_CHECKING = False  # `typing` would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable

    Send = Callable[[bytes], object]
    Recv = Callable[[], bytes]


class ShimError(Exception):
    """The daemon gave no usable answer; the text says why."""


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
LAST_KNOWN = CONTINUATION
OF_STREAM = (DATA, HEADERS, RST_STREAM, CONTINUATION)
OF_CONNECTION = (SETTINGS, PING, GOAWAY)
LENGTHS = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
PADDED = 0x8
ENABLE_PUSH, INITIAL_WINDOW = 2, 4

STREAM = 1
FRAME_BYTES = 16384  # every peer must take as much, and may send no more unless we allowed it
WINDOW = 65535
LARGEST_WINDOW = 2**31 - 1
REPLY_BYTES = 64 << 20
PREFIX_BYTES = 5  # before a gRPC message: a byte that says whether it is compressed, then its length


def encode_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), payload)


def split_frame(buffer: bytes, at: int) -> tuple[int, int, int, bytes, int] | None:
    """Return the frame at an offset as (type, flags, stream, payload, end); None while it is incomplete."""
    start = at + 9
    if len(buffer) < start:
        return None
    length = int.from_bytes(buffer[at : at + 3], "big")
    if length > FRAME_BYTES:
        raise ShimError(f"the daemon sent a frame of {length} bytes")
    if len(buffer) < start + length:
        return None
    stream = int.from_bytes(buffer[at + 5 : start], "big") & LARGEST_WINDOW
    return buffer[at + 3], buffer[at + 4], stream, buffer[start : start + length], start + length


def encode_headers(path: bytes) -> bytes:
    """Return a header block for a method's path (under 127 bytes) that needs no state on either side."""
    return (
        b"\x83\x86"  # :method POST, :scheme http: entries 3 and 6 of the static table
        b"\x01\x09localhost"  # :authority
        b"\x04%c%b"  # :path
        b"\x0f\x10\x10application/grpc"  # content-type
        b"\x00\x02te\x08trailers"
    ) % (len(path), path)


def _setting(key: int, value: int) -> bytes:
    return key.to_bytes(2, "big") + value.to_bytes(4, "big")


# The whole reply fits the windows given here, so that none needs to be renewed later.
OPENING = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + encode_frame(SETTINGS, 0, 0, _setting(ENABLE_PUSH, 0) + _setting(INITIAL_WINDOW, LARGEST_WINDOW))
    + encode_frame(WINDOW_UPDATE, 0, 0, (LARGEST_WINDOW - WINDOW).to_bytes(4, "big"))
)


class Call:
    """One call on a new connection: bytes received in, bytes to send out. It does no I/O."""

    __slots__ = (
        "_body",
        "_buffer",
        "_connection_window",
        "_ends",
        "_in_headers",
        "_initial_window",
        "_path",
        "_stream_window",
        "_unsent",
        "done",
    )

    def __init__(self, path: bytes, message: bytes) -> None:
        self.done = False
        self._path = path
        self._unsent = memoryview(b"\0" + len(message).to_bytes(4, "big") + message)
        self._buffer = b""
        self._body = bytearray()
        self._connection_window = self._stream_window = self._initial_window = WINDOW
        self._in_headers = False
        self._ends = False

    def opening(self) -> bytes:
        """Return what to send first: the connection's preface and as much of the request as it may be."""
        headers = encode_frame(HEADERS, END_HEADERS, STREAM, encode_headers(self._path))
        return OPENING + headers + self._sendable()

    def receive(self, data: bytes) -> bytes:
        """Take what the daemon sent and return what to send in turn. Raises ShimError for nonsense."""
        buffer, at = self._buffer + data, 0
        replies = []
        while not self.done and (frame := split_frame(buffer, at)):
            kind, flags, stream, payload, at = frame
            replies.append(self._take(kind, flags, stream, payload))
        self._buffer = buffer[at:]
        return b"".join(replies) + self._sendable()

    def message(self) -> bytes:
        """Return the reply once the call is done. Raises ShimError when there is not exactly one."""
        if not self._body:
            raise ShimError("the daemon refused the request")
        length = int.from_bytes(self._body[1:PREFIX_BYTES], "big")
        if self._body[0] or len(self._body) != PREFIX_BYTES + length:
            raise ShimError("the daemon's reply is not one plain message")
        return bytes(self._body[PREFIX_BYTES:])

    def _sendable(self) -> bytes:
        """Return DATA frames for as much of the request as the daemon's windows allow now."""
        frames = []
        while self._unsent:
            window = min(self._connection_window, self._stream_window, FRAME_BYTES)
            if window <= 0:
                break
            chunk, self._unsent = self._unsent[:window], self._unsent[window:]
            self._connection_window -= len(chunk)
            self._stream_window -= len(chunk)
            frames.append(encode_frame(DATA, 0 if self._unsent else END_STREAM, STREAM, bytes(chunk)))
        return b"".join(frames)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        """Handle one frame and return the frame that answers it, or nothing."""
        if kind > LAST_KNOWN and not self._in_headers:
            return b""  # RFC 9113, 4.1: types that nobody knows are ignored
        self._check(kind, flags, stream, payload)
        if kind == DATA:
            self._take_data(flags, payload)
        elif kind in (HEADERS, CONTINUATION):
            self._take_headers(kind, flags)
        elif kind == RST_STREAM:
            raise ShimError(f"the daemon cancelled the request (code {int.from_bytes(payload, 'big')})")
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
            return encode_frame(SETTINGS, ACK, 0, b"")
        elif kind == PING and not flags & ACK:
            return encode_frame(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self._take_goaway(payload)
        elif kind == WINDOW_UPDATE:
            self._take_window(stream, int.from_bytes(payload, "big") & LARGEST_WINDOW)
        return b""

    def _check(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Refuse a frame that may not come now, not on this stream, or not in this size."""
        if self._in_headers != (kind == CONTINUATION) or kind == PUSH_PROMISE:
            raise ShimError(f"the daemon sent a frame of type {kind} out of place")
        if (kind in OF_STREAM and stream != STREAM) or (kind in OF_CONNECTION and stream):
            raise ShimError(f"the daemon sent a frame of type {kind} on stream {stream}")
        wrong_settings = kind == SETTINGS and len(payload) % 6
        if len(payload) != LENGTHS.get(kind, len(payload)) or wrong_settings:
            raise ShimError(f"the daemon sent a frame of type {kind} with {len(payload)} bytes")

    def _take_data(self, flags: int, payload: bytes) -> None:
        if flags & PADDED:
            if not payload or payload[0] >= len(payload):
                raise ShimError("the daemon sent DATA with more padding than bytes")
            payload = payload[1 : len(payload) - payload[0]]
        self._body += payload
        if len(self._body) > REPLY_BYTES:
            raise ShimError(f"the daemon's reply is longer than {REPLY_BYTES} bytes")
        self.done = bool(flags & END_STREAM)

    def _take_headers(self, kind: int, flags: int) -> None:
        if kind == HEADERS:
            self._ends = bool(flags & END_STREAM)
        self._in_headers = not flags & END_HEADERS
        self.done = self._ends and not self._in_headers

    def _take_settings(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            key = int.from_bytes(payload[at : at + 2], "big")
            value = int.from_bytes(payload[at + 2 : at + 6], "big")
            if key == INITIAL_WINDOW:
                # RFC 9113, 6.9.2: the difference counts at once, and may leave less than nothing.
                self._stream_window += value - self._initial_window
                self._initial_window = value
                if value > LARGEST_WINDOW or self._stream_window > LARGEST_WINDOW:
                    raise ShimError(f"the daemon's window is {value} bytes")

    def _take_goaway(self, payload: bytes) -> None:
        """Go on when the daemon only takes no new calls; this one still counts."""
        last, code = int.from_bytes(payload[:4], "big") & LARGEST_WINDOW, int.from_bytes(payload[4:8], "big")
        if len(payload) < 8 or last < STREAM or code:
            raise ShimError(f"the daemon is closing the connection (code {code})")

    def _take_window(self, stream: int, increment: int) -> None:
        if stream == 0:
            self._connection_window += increment
        elif stream == STREAM:
            self._stream_window += increment
        if not increment or max(self._connection_window, self._stream_window) > LARGEST_WINDOW:
            raise ShimError(f"the daemon widened the window of stream {stream} by {increment}")


def unary(path: bytes, message: bytes, send: "Send", recv: "Recv") -> bytes:
    """Make one call and return the reply's message. Raises ShimError, and what `send` and `recv` raise.

    `recv` returns some bytes, or none at the end; it must give up at some time, for a peer may send for ever.
    """
    call = Call(path, message)
    send(call.opening())
    while not call.done:
        data = recv()
        if not data:
            raise ShimError("the daemon closed the connection")
        reply = call.receive(data)
        if reply and not call.done:
            send(reply)
    return call.message()
