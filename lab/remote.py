"""Calls to other machines of a lab, by an agent on each, over ssh.

What comes back is read with care: of the classes a machine can name in an answer only those of `KNOWN` are
made, so that nothing on it can run code here.
"""

from __future__ import annotations

import builtins
import io
import itertools
import pickle
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from typing import IO, Any, ParamSpec, TypeVar

from lab import capture, probe
from lab.agent import read_frame, write_frame
from lab.runtime import PluginError
from lab.topology import LabError

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_SECONDS = 180.0
KNOWN = {(kind.__module__, kind.__qualname__): kind for kind in (probe.Answer, probe.Failure, capture.Hop)}


class Remote:
    """The machines that commands reach: `command(machine)` is what starts an agent there."""

    def __init__(self, command: Callable[[str], Sequence[str]]) -> None:
        self._command = command
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()

    def call(self, machine: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have a machine's agent call a function. Raises LabError, and what the function does."""
        with self._lock:
            link = self._links.get(machine)
            if link is not None and link.broken:
                link.close()
                link = None
            if link is None:
                link = self._links[machine] = _Link(machine, self._command(machine))
        result: T = link.call(function, args, kwargs)
        return result

    def close(self, *machines: str) -> None:
        """End the agents of these machines, or all."""
        with self._lock:
            for machine in machines or tuple(self._links):
                if link := self._links.pop(machine, None):
                    link.close()


class _Link:
    """An agent and the calls that it has not answered yet."""

    def __init__(self, machine: str, command: Sequence[str]) -> None:
        self._machine = machine
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._said: list[bytes] = []
        self._lock = threading.Lock()
        self.broken = False
        self._threads = [
            threading.Thread(target=work, name=f"{machine}-{work.__name__}", daemon=True)
            for work in (self._read, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def call(self, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, found = next(self._numbers), Future[Any]()
        content = pickle.dumps((number, pickle.dumps((function, args, kwargs))))
        try:
            with self._lock:
                if self.broken:
                    raise BrokenPipeError
                self._waiting[number] = found
                write_frame(_not_none(self._process.stdin), content)
            kind, value = found.result(ANSWER_SECONDS)
        except (OSError, TooLate):
            with self._lock:
                self._waiting.pop(number, None)
            raise LabError(self._silent()) from None
        if kind is None:
            return value
        raise _error(kind, value)

    def close(self) -> None:
        self._process.kill()  # the other end ends with its input
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                _not_none(stream).close()
            except BrokenPipeError:
                pass

    def _read(self) -> None:
        stream = _not_none(self._process.stdout)
        while (frame := read_frame(stream)) is not None:
            number, kind, value = _Careful(io.BytesIO(frame)).load()
            with self._lock:
                waiting = self._waiting.pop(number, None)
            if waiting is not None:
                waiting.set_result((kind, value))
        with self._lock:
            self.broken, left = True, list(self._waiting.values())
        for waiting in left:
            waiting.set_exception(BrokenPipeError())

    def _listen(self) -> None:
        for line in _not_none(self._process.stderr):
            self._said = [*self._said[-20:], line]

    def _silent(self) -> str:
        said = b"".join(self._said).decode(errors="replace").strip()
        return f"{self._machine} does not answer" + (f": {said}" if said else "")


class _Careful(pickle.Unpickler):
    """Makes what is known, and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "pathlib" and name == "PosixPath":
            from pathlib import PosixPath

            return PosixPath
        if module == "builtins" and name in ("set", "frozenset"):
            return getattr(builtins, name)
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that a machine may send")


def _error(kind: str, value: tuple[Any, ...]) -> Exception:
    if kind == "plugin":
        return PluginError(*value)
    return OSError(*value) if kind == "os" else LabError(*value)


def _not_none(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
