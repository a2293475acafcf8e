"""What is changed in a running HAProxy, and asked of it: commands, answers, and the sockets for them.

Source: HAProxy 2.6 management guide, 9.3 (worker) and 9.4 (master).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from proxy.l7.endpoints import is_checked, server_words
from proxy.l7.model import Backend, Server
from proxy.l7.words import command_word

SECONDS = 10.0
"""How long an answer may take."""
PAYLOAD_BYTES = 8_192
"""Of map entries in one command; HAProxy takes a command of 20 kB at most, the buffer's size."""
CHUNK = 65_536
PROMPT = b"\n> "
MAINTENANCE, DRAINING = 0x01 | 0x02 | 0x04 | 0x20 | 0x40, 0x08 | 0x10
"""Bits of srv_admin_state (`show servers state`)."""


class CommandError(Exception):
    """HAProxy does not do what it was told."""

    def __init__(self, command: str, answer: str) -> None:
        super().__init__(f"HAProxy answers {answer!r} to {command.splitlines()[0]!r}")
        self.command, self.answer = command, answer


class Command(NamedTuple):
    """A line, or several if values follow, and what the answer to one that was done has in it; "": none."""

    text: str
    good: str = ""


class ServerState(NamedTuple):
    """An endpoint as HAProxy has it; one that is not `ready` gets no new requests."""

    backend: str
    server: Server
    ready: bool


class Worker(NamedTuple):
    """Who answers: its process, and the description in its configuration."""

    pid: int
    description: str


def add_server(backend: Backend, server: Server, authorities: Path) -> Iterator[Command]:
    """Yield what adds an endpoint and lets it have requests."""
    name = _name(backend.name, server)
    words = " ".join(map(command_word, server_words(backend, server, authorities)))
    yield Command(f"add server {name} {words}", "New server registered")
    if is_checked(backend.policy):
        yield Command(f"enable health {name}")
    yield Command(f"enable server {name}")


def hold_server(backend: str, server: Server) -> Command:
    """Return what keeps new requests from an endpoint; those that it has go on."""
    return Command(f"set server {_name(backend, server)} state maint")


def resume_server(backend: str, server: Server) -> Command:
    """Return what lets an endpoint have requests again."""
    return Command(f"set server {_name(backend, server)} state ready")


def delete_server(backend: str, server: Server) -> Command:
    """Return what removes an endpoint that is held; it is refused while that has connections."""
    return Command(f"del server {_name(backend, server)}", "Server deleted")


def _name(backend: str, server: Server) -> str:
    return f"{backend}/{server.name}"


def change_map(path: Path, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Command]:
    """Yield what makes one entry of a map what it shall be. Several are a matter of `replace_map`."""
    reference = command_word(str(path))
    for key in after.keys() - before.keys():
        yield Command(f"add map {reference} {command_word(key)} {command_word(after[key])}")
    for key in after.keys() & before.keys():
        if after[key] != before[key]:
            yield Command(f"set map {reference} {command_word(key)} {command_word(after[key])}")
    for key in before.keys() - after.keys():
        yield Command(f"del map {reference} {command_word(key)}")


def replace_map(path: Path, version: int, after: Mapping[str, str]) -> Iterator[Command]:
    """Yield what fills a new version of a map and makes it the one that counts, at one moment."""
    reference = command_word(str(path))
    for lines in _portions(f"{key} {value}\n" for key, value in after.items()):
        yield Command(f"add map @{version} {reference} <<\n{lines}")
    yield Command(f"commit map @{version} {reference}")


def _portions(lines: Iterable[str]) -> Iterator[str]:
    portion = ""
    for line in lines:
        if len(portion) + len(line) > PAYLOAD_BYTES:
            yield portion
            portion = ""
        portion += line
    if portion:
        yield portion


def server_states(answer: str) -> Iterator[ServerState]:
    """Yield the endpoints in an answer to `show servers state`. Raises CommandError for what is none."""
    columns: dict[str, int] = {}
    for line in answer.splitlines():
        if line.startswith("# "):
            columns = {name: index for index, name in enumerate(line[2:].split())}
        elif " " in line:
            try:
                fields = line.split(" ")
                address, _, port = fields[columns["srv_name"]].rpartition(":")
                admin = int(fields[columns["srv_admin_state"]])
                server = Server(address, int(port))
                yield ServerState(fields[columns["be_name"]], server, not admin & (MAINTENANCE | DRAINING))
            except (KeyError, IndexError, ValueError):
                raise CommandError("show servers state", line) from None


def map_entries(answer: str) -> Mapping[str, str]:
    """Return the entries in an answer to `show map FILE`: a pointer, the key and the value in each line."""
    words = (line.split(" ", 2) for line in answer.splitlines() if line)
    return {key: value for _, key, value in words}


def worker_of(answer: str) -> Worker:
    """Return who has answered `show info`. Raises CommandError for what is no answer to that."""
    found = dict(line.partition(": ")[::2] for line in answer.splitlines())
    if not found.get("Pid", "").isdigit():
        raise CommandError("show info", answer[:80])
    return Worker(int(found["Pid"]), found.get("description", ""))


def master_of(answer: str) -> int:
    """Return the master's process in an answer to `show proc`. Raises CommandError for what is none."""
    for line in answer.splitlines():
        fields = line.split()
        if len(fields) > 1 and fields[1] == "master" and fields[0].isdigit():
            return int(fields[0])
    raise CommandError("show proc", answer[:80])


def ask(path: Path, command: str, seconds: float = SECONDS) -> str:
    """Return the answer to a command on a connection of its own. Raises OSError where nobody answers."""
    with _connected(path, seconds) as connection:
        connection.sendall(command.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)  # without, the master does not end its answer
        answer = bytearray()
        while piece := connection.recv(CHUNK):
            answer += piece
        return answer.decode(errors="replace")


def _connected(path: Path, seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class Session:
    """A connection for several commands, one after the other; for the length of a block.

    Raises OSError where nobody answers, CommandError for a command that was not done.
    """

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self._path, self._seconds = path, seconds

    def __enter__(self) -> Self:
        self._connection = _connected(self._path, self._seconds)
        try:
            self._exchange("prompt")
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def do(self, command: Command) -> None:
        """Have a command done."""
        # With values behind it, a command has other prompts: it goes by itself.
        several = "\n" in command.text
        answer = ask(self._path, command.text, self._seconds) if several else self._exchange(command.text)
        wanted = command.good in answer if command.good else not answer.strip()
        if not wanted:
            raise CommandError(command.text, answer.strip())

    def new_version(self, path: Path) -> int:
        """Begin a new version of a map; return its number."""
        command = f"prepare map {command_word(str(path))}"
        answer = self._exchange(command).strip()
        number = answer.rpartition(" ")[2]
        if not number.isdigit():
            raise CommandError(command, answer)
        return int(number)

    def _exchange(self, command: str) -> str:
        self._connection.sendall(command.encode() + b"\n")
        answer = bytearray(b"\n")
        while not answer.endswith(PROMPT):
            piece = self._connection.recv(CHUNK)
            if not piece:
                raise ConnectionResetError(f"HAProxy has closed the connection at {command!r}")
            answer += piece
        return answer[1 : -len(PROMPT)].decode(errors="replace")
