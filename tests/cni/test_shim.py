"""The plugin binary against a real gRPC server, and without one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_UNIX, socket

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import podwire_pb2 as pb
from api import podwire_pb2_grpc as rpc
from cni import install, plugin, shim, spec
from cni.h2 import ACK, PING, ShimError, encode_frame

Answer = Callable[[pb.CniRequest, grpc.ServicerContext], pb.CniReply]

ENVIRON = {
    b"CNI_COMMAND": b"ADD",
    b"CNI_CONTAINERID": b"c0ffee",
    b"CNI_NETNS": b"/run/netns/blue",
    b"CNI_IFNAME": b"eth0",
    b"CNI_ARGS": b"K8S_POD_NAME=web",
    b"CNI_PATH": b"/opt/cni/bin",
}
CONFIG = b'{"cniVersion": "1.0.0", "name": "podwire", "type": "podwire"}'
METHODS = {"ADD": "Attach", "DEL": "Detach", "CHECK": "Check", "GC": "Gc", "STATUS": "Status"}
MEGABYTE = 1 << 20


@dataclass
class Daemon(rpc.CniServicer):
    """Answers every method the same way and keeps what it was asked."""

    answer: Answer
    calls: list[tuple[str, pb.CniRequest]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for method in METHODS.values():
            setattr(self, method, self._handler(method))

    def _handler(self, method: str) -> Answer:
        def handle(request: pb.CniRequest, context: grpc.ServicerContext) -> pb.CniReply:
            self.calls.append((method, request))
            return self.answer(request, context)

        return handle


def fixed(code: int, stdout: bytes) -> Answer:
    return lambda request, context: pb.CniReply(exit_code=code, stdout=stdout)


@contextmanager
def serving(path: Path, answer: Answer) -> Iterator[tuple[Daemon, grpc.Server]]:
    size = [("grpc.max_receive_message_length", 64 * MEGABYTE)]
    server = grpc.server(ThreadPoolExecutor(2), options=size)
    daemon = Daemon(answer)
    rpc.add_CniServicer_to_server(daemon, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield daemon, server
    finally:
        server.stop(0).wait()


@dataclass(frozen=True)
class Node:
    """A place for a socket and state, with the binary installed; `local` collects what is done in process."""

    socket: Path
    state: Path
    binary: Path
    local: list[tuple[dict[str, str], bytes]]

    def run(
        self, command: bytes = b"ADD", config: bytes = CONFIG, timeout: float = 20.0
    ) -> tuple[int, bytes]:
        environ = ENVIRON | {b"CNI_COMMAND": command}
        return shim.run(environ, config, str(self.socket), str(self.state), timeout)

    def execute(
        self, env: dict[bytes, bytes], config: bytes = CONFIG, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        command = (
            [install.base_python(), "-IS", *options, str(self.binary)] if options else [str(self.binary)]
        )
        return subprocess.run(
            [*command, str(self.binary)], input=config, env=env, capture_output=True, check=False, timeout=30
        )


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    local: list[tuple[dict[str, str], bytes]] = []

    def in_process(env: dict[str, str], stdin: bytes, state_dir: str) -> tuple[int, bytes]:
        local.append((env, stdin))
        return 7, b"in process"

    monkeypatch.setattr(plugin, "in_process", in_process)
    path, state = tmp_path / "podwire.sock", tmp_path / "state"
    binary = install.install_binary(tmp_path / "bin", socket=str(path), state_dir=str(state))
    return Node(path, state, binary, local)


@pytest.mark.parametrize(("command", "method"), METHODS.items())
def test_each_command_is_a_method_and_the_answer_is_passed_on(node: Node, command: str, method: str) -> None:
    with serving(node.socket, fixed(3, b'{"code": 3}')) as (daemon, _):
        assert node.run(command.encode()) == (3, b'{"code": 3}')
    ((called, request),) = daemon.calls
    assert called == method
    assert request.request_id
    request.request_id = ""
    assert request == pb.CniRequest(
        command=command,
        container_id="c0ffee",
        netns="/run/netns/blue",
        ifname="eth0",
        args="K8S_POD_NAME=web",
        path="/opt/cni/bin",
        config=CONFIG,
    )


@pytest.mark.parametrize("reply", [0, MEGABYTE, 5 * MEGABYTE])
@pytest.mark.parametrize("request_size", [0, MEGABYTE, 5 * MEGABYTE])
def test_size_does_not_matter(node: Node, request_size: int, reply: int) -> None:
    config, stdout = os.urandom(request_size), os.urandom(reply)
    with serving(node.socket, fixed(0, stdout)) as (daemon, _):
        assert node.run(config=config) == (0, stdout)
    assert daemon.calls[0][1].config == config


def test_trailers_longer_than_a_frame_are_read(node: Node) -> None:
    def answer(request: pb.CniRequest, context: grpc.ServicerContext) -> pb.CniReply:
        context.set_trailing_metadata((("podwire", "x" * 40_000),))
        return pb.CniReply(stdout=b"done")

    with serving(node.socket, answer):
        assert node.run() == (0, b"done")


def test_every_execution_has_a_request_id_of_its_own(node: Node) -> None:
    with serving(node.socket, fixed(0, b"")) as (daemon, _):
        for _ in range(3):
            node.run()
    assert len({request.request_id for _, request in daemon.calls}) == 3


def refuse(request: pb.CniRequest, context: grpc.ServicerContext) -> pb.CniReply:
    context.abort(grpc.StatusCode.INTERNAL, "no")


def test_a_refused_request_is_done_in_process_under_the_same_id(node: Node) -> None:
    with serving(node.socket, refuse) as (daemon, _):
        assert node.run() == (7, b"in process")
    ((env, stdin),) = node.local
    given_env = {name.decode(): value.decode() for name, value in ENVIRON.items()}
    assert env == given_env | {"PODWIRE_REQUEST_ID": daemon.calls[0][1].request_id}
    assert stdin == CONFIG


@pytest.mark.parametrize("command", [b"VERSION", b"REFORM", b""])
def test_what_is_no_command_of_the_daemon_never_goes_there(node: Node, command: bytes) -> None:
    with serving(node.socket, fixed(0, b"")) as (daemon, _):
        assert node.run(command) == (7, b"in process")
    assert not daemon.calls


def test_without_a_socket_the_work_is_done_in_process(node: Node) -> None:
    assert node.run() == (7, b"in process")


def test_with_a_socket_that_nobody_serves_the_work_is_done_in_process(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(node.socket, fixed(0, b"")):
        kept = node.socket.with_name("kept")
        kept.hardlink_to(node.socket)
    kept.rename(node.socket)
    assert node.run() == (7, b"in process")
    assert "Connection refused" in capfd.readouterr().err


def test_bytes_that_are_not_text_reach_the_plugin_as_the_environment_has_them(node: Node) -> None:
    with serving(node.socket, fixed(0, b"")):
        environ = ENVIRON | {b"CNI_NETNS": b"/run/\xff"}
        code, _ = shim.run(environ, CONFIG, str(node.socket), str(node.state))
    assert code == 7
    assert os.fsencode(node.local[0][0]["CNI_NETNS"]) == b"/run/\xff"


def test_a_daemon_that_hangs_is_not_waited_for_longer_than_the_timeout(node: Node) -> None:
    release = threading.Event()

    def hang(request: pb.CniRequest, context: grpc.ServicerContext) -> pb.CniReply:
        release.wait(20)
        return pb.CniReply()

    with serving(node.socket, hang):
        try:
            assert node.run(timeout=0.2) == (7, b"in process")
        finally:
            release.set()


def test_a_daemon_that_sends_for_ever_is_not_waited_for_longer_than_the_timeout(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    def dribble() -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            while True:
                peer.sendall(encode_frame(PING, ACK, 0, bytes(8)))

    with socket(AF_UNIX) as listener, ThreadPoolExecutor(1) as threads:
        listener.bind(str(node.socket))
        listener.listen()
        threads.submit(dribble)
        assert node.run(timeout=0.2) == (7, b"in process")
    assert capfd.readouterr().err == "podwire: working without the daemon: no answer in 0.2 s\n"


def test_a_daemon_that_stops_in_the_middle_of_a_call_is_replaced(node: Node) -> None:
    stopped = threading.Event()

    def stop(request: pb.CniRequest, context: grpc.ServicerContext) -> pb.CniReply:
        server.stop(0)
        stopped.wait(20)
        return pb.CniReply()

    with serving(node.socket, stop) as (_, server):
        try:
            assert node.run() == (7, b"in process")
        finally:
            stopped.set()


KILLED = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.cni.test_shim import serving
with serving(Path({socket!r}), lambda request, context: os.kill(os.getpid(), signal.SIGKILL)):
    print("ready", flush=True)
    threading.Event().wait(30)
"""


def test_a_daemon_that_is_killed_in_the_middle_of_a_call_is_replaced(node: Node) -> None:
    code = KILLED.format(root=install.python_path()[0], socket=str(node.socket))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            assert node.run() == (7, b"in process")
        finally:
            server.kill()


@pytest.mark.parametrize(("code", "stdout"), [(0, b'{"ips": []}'), (11, b'{"code": 11}'), (0, b"")])
def test_the_binary_prints_the_daemons_answer_and_nothing_else(node: Node, code: int, stdout: bytes) -> None:
    with serving(node.socket, fixed(code, stdout)):
        done = node.execute(ENVIRON)
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, b"")


def test_the_binary_takes_and_prints_megabytes(node: Node) -> None:
    config, stdout = os.urandom(5 * MEGABYTE), os.urandom(5 * MEGABYTE)
    with serving(node.socket, fixed(0, stdout)) as (daemon, _):
        done = node.execute(ENVIRON, config)
    assert (done.returncode, done.stdout) == (0, stdout)
    assert daemon.calls[0][1].config == config


def test_the_binary_answers_version_without_a_daemon(node: Node) -> None:
    done = node.execute({b"CNI_COMMAND": b"VERSION"}, b'{"cniVersion": "0.4.0"}')
    answer = {"cniVersion": "0.4.0", "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]}
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, answer, b"")


def test_the_binary_works_without_the_daemon_and_says_so_in_one_line(node: Node) -> None:
    done = node.execute({b"CNI_COMMAND": b"STATUS"})
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 50
    first = done.stderr.splitlines()[0].decode()
    assert first == f"podwire: working without the daemon: {node.socket}: No such file or directory"


def test_a_fault_of_our_own_is_a_cni_error_without_a_traceback(node: Node) -> None:
    """Here: a state directory that is a file, so not even the ledger can be opened."""
    node.state.touch()
    done = node.execute(ENVIRON)
    error = json.loads(done.stdout)
    assert done.returncode == 1
    assert error["cniVersion"] == "1.0.0"
    assert error["code"] in (5, 100)
    assert error["msg"] in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 2  # that the daemon is not there, and the error
    assert b"Traceback" not in done.stderr


def test_any_exception_becomes_an_internal_error(capfd: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(shim.failure(RuntimeError('a "quoted"\nlong story \udcff')))
    assert (answer["code"], answer["cniVersion"], answer["details"]) == (100, "1.0.0", "")
    assert answer["msg"].startswith('internal error: RuntimeError: a "quoted"')
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("podwire: internal error: RuntimeError")


def test_a_runtime_that_does_not_read_the_answer_gets_a_failure(node: Node) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with serving(node.socket, fixed(0, b"answer")):
        with subprocess.Popen([node.binary], env=ENVIRON, stdin=subprocess.DEVNULL, stdout=writer) as process:
            os.close(writer)
        assert process.returncode == 1


def imported(done: subprocess.CompletedProcess[bytes]) -> set[str]:
    """Return the modules in the output of -X importtime."""
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines[1:]}


def test_the_way_to_the_daemon_imports_nothing_that_is_not_built_in(node: Node) -> None:
    bare = [install.base_python(), "-IS", "-X", "importtime", "-c", "pass"]
    before = imported(subprocess.run(bare, capture_output=True, check=True))
    with serving(node.socket, fixed(0, b"answer")):
        done = node.execute(ENVIRON, options=["-X", "importtime"])
    assert done.stdout == b"answer"
    assert imported(done) - before == {"_socket", "cni", "cni.h2", "cni.shim"}


def test_version_costs_one_start_of_the_interpreter_and_asks_nobody(node: Node) -> None:
    bare = [install.base_python(), "-IS", "-X", "importtime", "-c", "pass"]
    before = imported(subprocess.run(bare, capture_output=True, check=True))
    with serving(node.socket, fixed(0, b"answer")) as (daemon, _):
        env = {b"CNI_COMMAND": b"VERSION"}
        done = node.execute(env, b'{"cniVersion": "1.1.0"}', options=["-X", "importtime"])
    assert json.loads(done.stdout)["cniVersion"] == "1.1.0"
    assert imported(done) - before == {"_socket", "cni", "cni.h2", "cni.shim"}
    assert daemon.calls == []


def full_answer(stdin: bytes) -> bytes:
    """Return what the full parser answers to VERSION."""
    return spec.version_json(spec.parse_request({"CNI_COMMAND": "VERSION"}, stdin).config.cni_version)


@pytest.mark.parametrize("version", [*spec.SUPPORTED_VERSIONS, "0.1.0", "9.9.9"])
@pytest.mark.parametrize("form", ['{"cniVersion":"%s"}', ' {\t"cniVersion" : "%s"\r\n}\n'])
def test_the_short_answer_to_version_is_the_full_one_word_for_word(form: str, version: str) -> None:
    stdin = (form % version).encode()
    assert shim.run({b"CNI_COMMAND": b"VERSION"}, stdin, "", "") == (0, full_answer(stdin))


ODD = [
    b"",
    b"{}",
    b'{"cniVersion": ""}',
    b'{"cniVersion": "1.0.0"',
    b'{"cniVersion": "1.0.0", "name": "podwire"}',
    b'{"cniVersion": "1.0.0\\n"}',
    b'{"cniVersion": "1.0.0"} {}',
    b'{"cniVersion": 1}',
    b'{"cniversion": "1.0.0"}',
    b'[{"cniVersion": "1.0.0"}]',
    b'{"cniVersion":"}',
    b"{:}",
    b"{",
]


@pytest.mark.parametrize("stdin", ODD)
def test_what_is_written_in_another_way_is_left_to_the_full_parser(node: Node, stdin: bytes) -> None:
    assert node.run(b"VERSION", stdin) == (7, b"in process")


pieces = st.sampled_from(
    [b"{", b"}", b'"', b":", b" ", b"\x0b", b'"cniVersion"', b'"1.0.0"', b"1.0", b",", b"\\u0031"]
)


@given(st.one_of(st.binary(max_size=30), st.lists(pieces, max_size=9).map(b"".join)))
def test_the_short_answer_never_differs_from_the_full_one(stdin: bytes) -> None:
    if version := shim.plain_version(stdin):
        assert shim.VERSION_JSON % version == full_answer(stdin)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(st.lists(texts, min_size=6, max_size=6), st.binary(max_size=300), texts)
def test_requests_are_the_protobuf_messages_of_the_contract(
    variables: list[str], config: bytes, request_id: str
) -> None:
    names = ("command", "container_id", "netns", "ifname", "args", "path")
    message = pb.CniRequest(**dict(zip(names, variables, strict=True)), config=config, request_id=request_id)
    values = [value.encode() for value in variables]
    assert shim.encode_request(*values, config, request_id.encode()) == message.SerializeToString()


@given(st.integers(0, 255), st.binary(max_size=300))
def test_replies_are_the_protobuf_messages_of_the_contract(code: int, stdout: bytes) -> None:
    message = pb.CniReply(exit_code=code, stdout=stdout).SerializeToString()
    assert shim.decode_reply(message) == (code, stdout)
    later = b"\x1a\x03new" + b"\x20\x05" + b"\x29" + bytes(8) + b"\x35" + bytes(4)
    assert shim.decode_reply(later + message + later) == (code, stdout)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_reply_or_a_shim_error(message: bytes) -> None:
    try:
        code, stdout = shim.decode_reply(message)
    except ShimError as error:
        assert str(error)
    else:
        assert 0 <= code <= 255
        assert isinstance(stdout, bytes)


def test_an_exit_code_that_a_process_cannot_have_is_refused() -> None:
    with pytest.raises(ShimError, match="exit code is 256"):
        shim.decode_reply(pb.CniReply(exit_code=256).SerializeToString())
