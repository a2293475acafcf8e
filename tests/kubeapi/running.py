"""A handle for tests: starts the server as a process of its own, speaks to it, and asks it for faults."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from netlink import netns
from tests.kubeapi import certificates
from tests.kubeapi.client import KubeClient, Refused, Stream
from tests.kubeapi.faults import Counters, Line

__all__ = ["KubeApi", "Refused", "Stream", "start"]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 10.0


@dataclass
class KubeApi(KubeClient):
    """The running server. What it is asked for and how: the package's docstring."""

    pid: int = 0
    directory: Path = Path()
    ca: certificates.Pair | None = None
    _control: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX), repr=False)

    def __post_init__(self) -> None:
        self._answers = self._control.makefile("rb")

    def command(self, do: str, **arguments: Any) -> Any:
        """Give a command (tests.kubeapi.control); return its answer, raise RuntimeError with what it says."""
        self._control.sendall(msgspec.json.encode({"do": do, **arguments}) + b"\n")
        answer = msgspec.json.decode(self._answers.readline() or b'{"error": "the server has ended"}')
        if "error" in answer:
            raise RuntimeError(f"the API server of the tests, {do}: {answer['error']}")
        return answer["ok"]

    # Faults: `verb` as in RBAC, `path` a regular expression (of path and query), `times` None: until clear()

    def fault(self, action: str, **more: Any) -> None:
        """Put a fault in force (tests.kubeapi.faults.Fault)."""
        self.command("fault", action=action, **more)

    def fail(self, code: int, *, times: int | None = None, **more: Any) -> None:
        """Answer with a status: verb, path, retry_after (whole seconds), message, plain (no object)."""
        self.fault("status", code=code, times=times, **more)

    def hang(self, *, times: int | None = None, **more: Any) -> None:
        """Accept and answer nothing; a watch begins and then is silent."""
        self.fault("hang", times=times, **more)

    def half(self, *, times: int | None = 1, **more: Any) -> None:
        """Send half of the answer, of a watch half of its first event, and close."""
        self.fault("half", times=times, **more)

    def close(self, *, times: int | None = 1, **more: Any) -> None:
        """Close the connection instead of an answer."""
        self.fault("close", times=times, **more)

    def delay(self, seconds: float, *, times: int | None = None, **more: Any) -> None:
        """Answer later."""
        self.fault("delay", seconds=seconds, times=times, **more)

    def clear(self) -> None:
        """End all faults, delays and lives of watches; what hangs is closed."""
        self.command("clear")

    def cut_watches(self, *, clean: bool = False, path: str | None = None) -> int:
        """End the open watches: `clean` as the real one at a timeout, else in the middle. Return how many."""
        return int(self.command("watches", cut="clean" if clean else "abrupt", path=path))

    def stall_watches(self, *, partial: bool = False, path: str | None = None) -> int:
        """Send nothing more in the open watches, `partial`: half an event first; they stay open."""
        return int(self.command("watches", stall="partial" if partial else "silent", path=path))

    def watch_life(self, seconds: float | None, *, clean: bool = False) -> None:
        """Cut every watch, of now and later, after so long; None: no more."""
        self.set(watch_life=seconds, cut_clean=clean)

    def down(self) -> None:
        """Stop listening and end all connections; the state stays."""
        self.command("down")

    def up(self) -> None:
        """Listen again, at the same address."""
        self.command("up")

    def restart(self, *, forget: bool = False) -> None:
        """Go down and up again; `forget`: also history, so that watches from before get 410."""
        self.down()
        if forget:
            self.compact()
        self.up()

    def compact(self) -> None:
        """Forget history: older versions are 410. Watches that are open go on."""
        self.command("compact")

    def set(self, **settings: Any) -> None:
        """Change settings (tests.kubeapi.faults.Settings)."""
        self.command("set", **settings)

    def set_tokens(self, *tokens: str) -> None:
        """Let in who has one of these, and nobody else (none at all: everybody)."""
        self.command("tokens", tokens=tokens)

    def new_certificate(
        self, *, new_authority: bool = False, names: tuple[str, ...] | None = None
    ) -> Path | None:
        """Use a new certificate for new connections; return the authority's file.

        With `new_authority` that is another file, which clients do not trust yet; this handle does at once.
        """
        if self.ca is None:
            raise RuntimeError("the server speaks HTTP: start(tls=True)")
        if new_authority:
            self.ca = certificates.authority(self.directory, "another test authority")
        host = self.url.removeprefix("https://").rpartition(":")[0].strip("[]")
        pair = certificates.signed(self.directory, self.ca, names or (host, "localhost"))
        self.command("certificate", certificate=str(pair.certificate), key=str(pair.key))
        self.ca_file = self.ca.certificate
        self.__dict__.pop("_trusted", None)
        return self.ca_file

    # Load

    def churn(self, *, rate: float, seconds: float, **more: Any) -> None:
        """Have the server change random EndpointSlices, `rate` a second (tests.kubeapi.generate.Rate).

        kind="nodes": heartbeats of Nodes instead. Returns at once; `counters()` say how many, and if it runs.
        """
        self.command("churn", rate=rate, seconds=seconds, **more)

    def calm(self) -> int:
        """End the changes; return how many there were."""
        return int(self.command("calm"))

    # What happened

    def counters(self) -> Counters:
        """Return the counters."""
        return msgspec.convert(self.command("counters"), Counters)

    def requests(self, verb: str | None = None, path: str = "") -> list[Line]:
        """Return the last requests, oldest first, of a verb and with a text in the target."""
        lines = msgspec.convert(self.command("requests"), list[Line])
        return [line for line in lines if verb in (None, line.verb) and path in line.target]

    def reset_counters(self) -> None:
        """Begin counting anew."""
        self.command("reset")

    def wait_for(self, condition: Callable[[Counters], bool], timeout: float = 10.0) -> Counters:
        """Wait until the counters meet a condition; raises TimeoutError with what they are."""
        deadline = time.monotonic() + timeout
        while not condition(counters := self.counters()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s: {counters}")
            time.sleep(0.01)
        return counters


@contextlib.contextmanager
def start(
    namespace: str | None = None,
    *,
    listen: str = "127.0.0.1:0",
    tls: bool = True,
    generate: dict[str, int] | None = None,
    load: Path | None = None,
    **settings: Any,
) -> Iterator[KubeApi]:
    """Start a server, inside a network namespace (name) or in ours; it is gone at the end of the block.

    `settings` are those of tests.kubeapi.faults.Settings. One token, `api.token`, is let in.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kubeapi-")))
        host = listen.rpartition(":")[0].strip("[]")
        token = secrets.token_hex(16)
        options = ["--listen", listen, "--token", token, "--control", str(directory / "control")]
        ca = None
        if tls:
            ca = certificates.authority(directory)
            pair = certificates.signed(directory, ca, (host, "localhost"))
            options += ["--tls", str(pair.certificate), str(pair.key)]
        if generate:
            options += ["--generate", ",".join(f"{k}={v}" for k, v in generate.items())]
        if load:
            options += ["--load", str(load)]
        options += ["--set", msgspec.json.encode(settings).decode()]
        process, port = _started(stack, namespace, options)
        control = stack.enter_context(socket.socket(socket.AF_UNIX))
        control.connect(str(directory / "control"))
        shown = f"[{host}]" if ":" in host else host
        api = KubeApi(
            url=f"{'https' if tls else 'http'}://{shown}:{port}",
            token=token,
            ca_file=ca.certificate if ca else None,
            namespace=namespace,
            pid=process.pid,
            directory=directory,
            ca=ca,
            _control=control,
        )
        stack.callback(api._answers.close)
        yield api


def _started(
    stack: contextlib.ExitStack, namespace: str | None, options: list[str]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process and wait until it listens; the stack ends it."""
    command = [sys.executable, "-m", "tests.kubeapi", "--until-closed", *options]

    def spawn() -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, start_new_session=True)

    process = netns.run(namespace, spawn) if namespace else spawn()
    stack.callback(_stopped, process)
    assert process.stdout
    words = process.stdout.readline().split()
    if len(words) != 2 or words[0] != b"ready":
        raise RuntimeError(
            f"the API server of the tests did not start: exit status {process.wait(STOP_SECONDS)}"
        )
    return process, int(words[1])


def _stopped(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
