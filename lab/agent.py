"""What runs on each machine of a lab, started by `lab.remote` through ssh: makes calls that it is told.

    stdin   frames of (number, a pickle of (function, arguments, keywords))
    stdout  frames of (number, None, result) or (number, kind of error, its arguments)

A frame is its length in four bytes, the highest first, and a pickle. Calls run at the same time and are
answered as they end. It ends with its input.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from lab.runtime import PluginError
from lab.topology import LabError

LENGTH = struct.Struct("!I")
THREADS = 32


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Return the next frame's content; None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    content = stream.read(length)
    return content if len(content) == length else None


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Write a frame."""
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def answer(call: bytes) -> tuple[Any, Any]:
    """Make a call; return (None, result) or an error's kind and arguments, which both sides know."""
    name = "a call"
    try:
        function, args, kwargs = pickle.loads(call)
        name = function.__name__
        return None, function(*args, **kwargs)
    except PluginError as error:
        return "plugin", (str(error), error.code)
    except LabError as error:
        return "lab", (str(error),)
    except OSError as error:
        return "os", (error.errno, error.strerror or str(error), error.filename and str(error.filename))
    except BaseException as error:  # also SystemExit: a caller waits for each answer
        traceback.print_exc()
        return "lab", (f"{name}: {type(error).__name__}: {error}",)


def main() -> None:
    """Serve the calls of standard input."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints must not be taken for an answer
    lock = threading.Lock()

    def work(number: int, call: bytes) -> None:
        content = pickle.dumps((number, *answer(call)))
        with lock:
            write_frame(out, content)

    with ThreadPoolExecutor(THREADS) as pool:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            pool.submit(work, *pickle.loads(frame))


if __name__ == "__main__":
    main()
