"""The HTTP/2 side of the plugin binary, without a socket: peers here are byte strings or simulated."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cni import h2
from cni.h2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ShimError,
    encode_frame,
    split_frame,
)

PATH = b"/podwire.v1.Cni/Attach"
START = encode_frame(SETTINGS, 0, 0, b"") + encode_frame(HEADERS, END_HEADERS, 1, b"\x88")
END = encode_frame(HEADERS, END_HEADERS | END_STREAM, 1, b"trailers")


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "big")


def prefixed(message: bytes) -> bytes:
    return b"\0" + number(len(message)) + message


def data(payload: bytes, flags: int = 0) -> bytes:
    return encode_frame(DATA, flags, 1, payload)


def talk(chunks: Iterable[bytes], request: bytes = b"request") -> tuple[bytes, bytes]:
    """Hand the chunks to a call and then the end; return its reply and all that it sent."""
    sent: list[bytes] = []
    incoming = iter(chunks)
    return h2.unary(PATH, request, sent.append, lambda: next(incoming, b"")), b"".join(sent)


def frames_of(sent: bytes) -> list[tuple[int, int, int, bytes]]:
    at = sent.index(b"SM\r\n\r\n") + 6
    found: list[tuple[int, int, int, bytes]] = []
    while frame := split_frame(sent, at):
        found.append(frame[:4])
        at = frame[4]
    assert at == len(sent)
    return found


def test_a_message_and_trailers_are_a_reply() -> None:
    reply, sent = talk([START + data(prefixed(b"hello")) + END])
    assert reply == b"hello"
    kinds = [kind for kind, *_ in frames_of(sent)]
    assert kinds == [SETTINGS, WINDOW_UPDATE, HEADERS, DATA]


def test_settings_and_pings_are_acknowledged_and_acknowledgements_are_not() -> None:
    acks = encode_frame(SETTINGS, ACK, 0, b"") + encode_frame(PING, ACK, 0, b"-" * 8)
    _, sent = talk([START + acks + encode_frame(PING, 0, 0, b"12345678"), data(prefixed(b"")) + END])
    assert frames_of(sent)[4:] == [(SETTINGS, ACK, 0, b""), (PING, ACK, 0, b"12345678")]


def test_padding_is_no_part_of_the_message_and_unknown_frames_are_ignored() -> None:
    padded = data(b"\x03" + prefixed(b"hello") + b"\0\0\0", PADDED)
    other = encode_frame(0xEE, 0xFF, 77, b"?") + encode_frame(PRIORITY, 0, 9, b"12345")
    assert talk([START + other + padded + END])[0] == b"hello"


def test_headers_may_go_on_in_continuations() -> None:
    trailers = encode_frame(HEADERS, END_STREAM, 1, b"a") + encode_frame(CONTINUATION, 0, 1, b"b")
    trailers += encode_frame(CONTINUATION, END_HEADERS, 1, b"c")
    assert talk([START + data(prefixed(b"hello")) + trailers])[0] == b"hello"


def test_a_daemon_that_takes_no_new_calls_still_answers_this_one() -> None:
    goaway = encode_frame(GOAWAY, 0, 0, number(h2.LARGEST_WINDOW) + number(0))
    assert talk([START + goaway + data(prefixed(b"hello")) + END])[0] == b"hello"


@given(st.data())
def test_a_reply_is_the_same_however_it_is_cut(draws: st.DataObject) -> None:
    stream = START + data(prefixed(b"hello")[:3]) + data(prefixed(b"hello")[3:]) + END
    cuts = sorted(draws.draw(st.sets(st.integers(1, len(stream) - 1))))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert talk(pieces)[0] == b"hello"


MALFORMED = {
    "nothing": b"",
    "an end in the middle": START + data(prefixed(b"hello")),
    "trailers without a message": START + END,
    "half a message": START + data(prefixed(b"hello")[:-1]) + END,
    "more than a message": START + data(prefixed(b"hello") + b"!") + END,
    "a compressed message": START + data(b"\1" + prefixed(b"hello")[1:]) + END,
    "a reset": START + encode_frame(RST_STREAM, 0, 1, number(2)),
    "a refusal by GOAWAY": encode_frame(GOAWAY, 0, 0, number(0) + number(0)),
    "a fault by GOAWAY": encode_frame(GOAWAY, 0, 0, number(9) + number(1)),
    "a short GOAWAY": encode_frame(GOAWAY, 0, 0, b"1234"),
    "a push": encode_frame(PUSH_PROMISE, END_HEADERS, 1, number(2)),
    "a continuation of nothing": encode_frame(CONTINUATION, END_HEADERS, 1, b""),
    "a frame amid headers": encode_frame(HEADERS, 0, 1, b"") + encode_frame(SETTINGS, 0, 0, b""),
    "an unknown frame amid headers": encode_frame(HEADERS, 0, 1, b"") + encode_frame(99, 0, 0, b""),
    "another stream": encode_frame(DATA, 0, 3, b""),
    "settings of a stream": encode_frame(SETTINGS, 0, 1, b""),
    "settings of odd size": encode_frame(SETTINGS, 0, 0, b"12345"),
    "a vast window": encode_frame(SETTINGS, 0, 0, number(INITIAL_WINDOW, 2) + number(2**31)),
    "a window wider by nothing": encode_frame(WINDOW_UPDATE, 0, 1, number(0)),
    "a window wider than allowed": encode_frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1)),
    "a short ping": encode_frame(PING, 0, 0, b"1234567"),
    "padding alone": data(b"\x05123", PADDED),
    "an empty padded frame": data(b"", PADDED),
    "a long frame": data(b"x" * 16385),
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("stream", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_makes_no_sense_is_no_reply(stream: bytes) -> None:
    with pytest.raises(ShimError):
        talk([stream])


def test_a_reply_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2, "REPLY_BYTES", 1 << 20)
    with pytest.raises(ShimError, match="longer than 1048576 bytes"):
        talk(data(b"x" * 16384) for _ in range(1 << 30))


kinds = st.one_of(st.integers(0, 9), st.integers(0, 255))
streams = st.one_of(st.sampled_from([0, 1]), st.integers(0, 2**32 - 1))
payloads = st.one_of(st.binary(max_size=40), st.just(prefixed(b"hello")))
frames = st.builds(encode_frame, kinds, st.integers(0, 255), streams, payloads)


@given(st.lists(st.one_of(st.binary(max_size=30), frames, st.sampled_from([START, END])), max_size=12))
@example([b"\0\0\0\1\4\0\0\0\1"])
def test_any_peer_leads_to_a_reply_or_a_shim_error(chunks: list[bytes]) -> None:
    try:
        assert isinstance(talk(filter(None, chunks))[0], bytes)
    except ShimError as error:
        assert str(error)


@given(
    size=st.integers(0, 400_000),
    window=st.integers(0, 200_000),
    grants=st.lists(st.integers(1, 100_000), min_size=1, max_size=5),
)
@example(size=300_000, window=0, grants=[1, 65536])
def test_a_request_of_any_size_keeps_to_the_peers_windows(size: int, window: int, grants: list[int]) -> None:
    """A smaller initial window can leave the stream's window below zero; the call waits until it is open."""
    request = bytes(size)
    call = h2.Call(PATH, request)
    allowed = {"connection": 65535, "stream": 65535}
    body, turn = b"", 0
    sent = frames_of(call.opening())
    while True:
        for _, _, _, payload in (frame for frame in sent if frame[0] == DATA):
            assert len(payload) <= 16384
            body += payload
            allowed = {key: left - len(payload) for key, left in allowed.items()}
            assert min(allowed.values()) >= 0
        if sent and sent[-1][:2] == (DATA, END_STREAM):
            break
        if turn == 0:
            out = call.receive(encode_frame(SETTINGS, 0, 0, number(INITIAL_WINDOW, 2) + number(window)))
            allowed["stream"] += window - 65535
        else:
            step = grants[turn % len(grants)] + 20_000
            out = call.receive(encode_frame(WINDOW_UPDATE, 0, turn % 2, number(step)))
            allowed["stream" if turn % 2 else "connection"] += step
        sent = frames_of(b"SM\r\n\r\n" + out)
        turn += 1
    assert body == prefixed(request)
