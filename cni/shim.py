"""The plugin binary: hand the request to the daemon unread, print its answer; without it, do the work here.

Start-up is most of its time, so until the daemon fails to answer nothing is imported that the interpreter
has not built in, not even `__future__` or `typing`; a test holds the list. VERSION is answered right here.
"""

import _socket
import posix
import time

from cni.h2 import ShimError, unary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

TIMEOUT = 60.0  # seconds for everything the daemon does

METHODS = {
    b"ADD": b"/podwire.v1.Cni/Attach",
    b"DEL": b"/podwire.v1.Cni/Detach",
    b"CHECK": b"/podwire.v1.Cni/Check",
    b"GC": b"/podwire.v1.Cni/Gc",
    b"STATUS": b"/podwire.v1.Cni/Status",
}

# In the order of the fields of CniRequest, from 1; the configuration and the request id follow as 7 and 8.
VARIABLES = (b"CNI_COMMAND", b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME", b"CNI_ARGS", b"CNI_PATH")

# Fields of CniReply as tags: number << 3 | wire type (0 a varint, 2 bytes with their length before them).
EXIT_CODE = 1 << 3 | 0
STDOUT = 2 << 3 | 2
FIXED_BYTES = {1: 8, 5: 4}  # wire types of fixed size

# What `cni.spec` answers to VERSION, word for word; a test compares the two.
VERSION_JSON = b'{"cniVersion":"%b","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}'
BLANKS = b" \t\r\n"


def main(socket_path: str, state_dir: str) -> "NoReturn":
    """Handle this process's request and end the process. Failures become CNI errors on standard output."""
    try:
        stdin = read_all(0)
        code, stdout = run(posix.environ, stdin, socket_path, state_dir)
    except BaseException as error:
        code, stdout = 1, failure(error)
    try:
        write_all(1, stdout)
    except OSError:
        code = code or 1  # the runtime is gone, and with it whoever would read why
    posix._exit(code)


def run(
    environ: "Mapping[bytes, bytes]", stdin: bytes, socket_path: str, state_dir: str, timeout: float = TIMEOUT
) -> tuple[int, bytes]:
    """Return the exit code and standard output for a request: the daemon's or, without it, this process's.

    Both tries carry the same request id, so an ADD that the daemon finished without our hearing of it is
    answered the second time, not refused.
    """
    if environ.get(b"CNI_COMMAND") == b"VERSION" and (version := plain_version(stdin)):
        return 0, VERSION_JSON % version
    request_id = b"%d-%x" % (posix.getpid(), time.time_ns())
    values = [environ.get(name, b"") for name in VARIABLES]
    method = METHODS.get(values[0])
    if method:
        try:
            return ask(method, encode_request(*values, stdin, request_id), socket_path, timeout)
        except ShimError as error:
            note(f"working without the daemon: {error}")
    from cni.plugin import in_process

    names = (*VARIABLES, b"PODWIRE_REQUEST_ID")
    given = zip(names, (*values, request_id), strict=True)
    env = {name.decode(): value.decode("utf-8", "surrogateescape") for name, value in given if value}
    return in_process(env, stdin, state_dir)


def plain_version(stdin: bytes) -> bytes:
    """Return the version in {"cniVersion": "1.0.0"}, as runtimes ask; nothing for any other way to write it.

    That is for the full parser, as are faults: it has the words for them.
    """
    text = stdin.strip(BLANKS)
    key, _, value = text[1:-1].partition(b":")
    value = value.strip(BLANKS)
    version = value[1:-1]
    plain = (
        text == b"{%b}" % text[1:-1] and key.strip(BLANKS) == b'"cniVersion"' and value == b'"%b"' % version
    )
    return version if plain and not version.strip(b"0123456789.") else b""


def ask(method: bytes, message: bytes, socket_path: str, timeout: float) -> tuple[int, bytes]:
    """Return the daemon's exit code and standard output. Raises ShimError within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)

    def hurry() -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer in {timeout:g} s")
        peer.settimeout(left)

    def send(data: bytes) -> None:
        hurry()
        peer.sendall(data)

    def recv() -> bytes:
        hurry()
        return peer.recv(1 << 16)

    try:
        hurry()
        peer.connect(socket_path)
        return decode_reply(unary(method, message, send, recv))
    except TimeoutError:
        raise ShimError(f"no answer in {timeout:g} s") from None
    except OSError as error:
        raise ShimError(f"{socket_path}: {error.strerror or error}") from None
    finally:
        peer.close()


def encode_request(*fields: bytes) -> bytes:
    """Return a protobuf message of strings or bytes, numbered from 1; empty ones are left out."""
    parts: list[bytes] = []
    for number, value in enumerate(fields, 1):
        if value:
            parts += (bytes((number << 3 | 2,)), encode_varint(len(value)), value)
    return b"".join(parts)


def decode_reply(message: bytes) -> tuple[int, bytes]:
    """Return exit code and standard output of a CniReply; unknown fields are skipped. Raises ShimError."""
    code, stdout, at = 0, b"", 0
    while at < len(message):
        tag, at = decode_varint(message, at)
        if tag == EXIT_CODE:
            code, at = decode_varint(message, at)
            continue
        start, at = skip_field(message, at, tag)
        if tag == STDOUT:
            stdout = message[start:at]
    if code > 255:
        raise ShimError(f"the daemon's exit code is {code}")  # the kernel would keep its low byte only
    return code, stdout


def skip_field(message: bytes, at: int, tag: int) -> tuple[int, int]:
    """Return where a field's value starts and where it ends. Raises ShimError when it does not fit."""
    wire = tag & 7
    if wire == 0:
        start, end = at, decode_varint(message, at)[1]
    elif wire == 2:
        length, start = decode_varint(message, at)
        end = start + length
    else:
        start, end = at, at + FIXED_BYTES.get(wire, len(message) + 1)
    if end > len(message) or tag < 8:
        raise ShimError("the daemon's reply cannot be decoded")
    return start, end


def encode_varint(value: int) -> bytes:
    """Return a number as protobuf's base-128 varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the varint at an offset, and where it ends. Raises ShimError when it does not, in ten bytes."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ShimError("the daemon's reply ends in the middle of a number")


def failure(error: BaseException) -> bytes:
    """Return the CNI error for what should not have happened, and say it on standard error too."""
    import json

    code, kind = (5, "I/O") if isinstance(error, OSError) else (100, "internal")
    what = f"{kind} error: {type(error).__name__}: {error}"
    note(what)
    return json.dumps({"cniVersion": "1.0.0", "code": code, "msg": what, "details": ""}).encode()


def note(text: str) -> None:
    """Write one line for the runtime's log."""
    line = " ".join(text.split())
    try:
        write_all(2, f"podwire: {line}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody listens


def read_all(fd: int) -> bytes:
    """Read to the end of a file."""
    chunks = []
    while chunk := posix.read(fd, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def write_all(fd: int, data: bytes) -> None:
    """Write everything; a pipe may take it in pieces."""
    while data:
        data = data[posix.write(fd, data) :]
