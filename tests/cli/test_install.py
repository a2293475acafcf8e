"""`podwire install` as its user runs it: real processes, a temporary tree, a daemon's socket there or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from api import podwire_pb2 as pb
from cli.main import main
from cni import install
from tests.cni.test_shim import Answer, fixed, serving

NOT_YET = json.dumps({"code": 50, "msg": "no podCIDR is known: the daemon has not synced yet"}).encode()
SOON = 30.0  # seconds in which something happens here for certain


@dataclass(frozen=True)
class Tree:
    """A node's folders, in a temporary one."""

    root: Path

    @property
    def socket(self) -> Path:
        return self.root / "podwire.sock"

    @property
    def binary(self) -> Path:
        return self.root / "bin/podwire"

    @property
    def conflist(self) -> Path:
        return self.root / "net.d/10-podwire.conflist"

    @property
    def words(self) -> list[str]:
        places = ["--bin-dir", self.binary.parent, "--conf-dir", self.conflist.parent]
        return [*map(str, [*places, "--socket", self.socket, "--state-dir", self.root / "state"])]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cli.main", "install", *self.words, *words]

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, check=False, timeout=2 * SOON
        )

    @contextmanager
    def started(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Start an install that waits; it is ended at the end."""
        with subprocess.Popen(
            self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def files(self) -> list[str]:
        folders = (self.root / "bin", self.root / "net.d")
        return sorted(file.name for folder in folders if folder.is_dir() for file in folder.iterdir())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    return process.stderr.readline()


def test_with_a_daemon_that_is_ready_both_files_are_written_and_named(tree: Tree) -> None:
    with serving(tree.socket, fixed(0, b"")) as (daemon, _):
        done = tree.install()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(tree.binary), str(tree.conflist)]
    ((method, request),) = daemon.calls
    assert (method, request.command) == ("Status", "STATUS")
    assert json.loads(request.config) == {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}
    assert json.loads(tree.conflist.read_text())["plugins"][0]["type"] == "podwire"


def test_without_a_daemon_the_plugin_is_there_the_conflist_is_not_and_status_says_why(tree: Tree) -> None:
    done = tree.install("--wait", "0")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [str(tree.binary)]
    assert tree.files == ["podwire"]
    (complaint,) = done.stderr.splitlines()
    start = "podwire: no conflist is written, STATUS is not good after 0 s: "
    assert complaint.startswith(start)
    assert complaint != start
    again = subprocess.run(
        [tree.binary],
        env={"CNI_COMMAND": "STATUS"},
        input=install.STATUS_INPUT,
        capture_output=True,
        check=False,
    )
    assert complaint.endswith(json.loads(again.stdout)["msg"])


def test_it_waits_for_a_daemon_that_starts_later_and_says_what_for(tree: Tree) -> None:
    with tree.started() as process:
        assert line(process).startswith("podwire: waiting up to 60 s for a good STATUS: ")
        assert tree.files == ["podwire"]
        with serving(tree.socket, fixed(0, b"")):
            assert process.wait(SOON) == 0
    assert tree.files == ["10-podwire.conflist", "podwire"]


def test_it_waits_until_the_daemon_is_ready_and_the_conflist_is_not_there_before(tree: Tree) -> None:
    seen: list[list[str]] = []

    def third_time_good(request: pb.CniRequest, context: object) -> pb.CniReply:
        seen.append(tree.files)
        return pb.CniReply(exit_code=0) if len(seen) > 2 else pb.CniReply(exit_code=1, stdout=NOT_YET)

    answer: Answer = third_time_good
    with serving(tree.socket, answer):
        done = tree.install()
    assert done.returncode == 0
    assert seen == [["podwire"]] * 3
    (told,) = done.stderr.splitlines()
    assert told.endswith("for a good STATUS: no podCIDR is known: the daemon has not synced yet")


def test_a_daemon_that_is_not_ready_in_time_is_failure_with_its_sentence(tree: Tree) -> None:
    with serving(tree.socket, fixed(1, NOT_YET)):
        done = tree.install("--wait", "0.6")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "podwire: no conflist is written, STATUS is not good after 0.6 s: "
        "no podCIDR is known: the daemon has not synced yet"
    )
    assert tree.files == ["podwire"]


def test_an_install_that_dies_before_the_conflist_leaves_a_plugin_that_works_and_can_be_repeated(
    tree: Tree,
) -> None:
    with tree.started() as process:
        line(process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(SOON) == -signal.SIGKILL
    assert tree.files == ["podwire"]
    version = subprocess.run(
        [tree.binary],
        env={"CNI_COMMAND": "VERSION"},
        input=b'{"cniVersion": "1.0.0"}',
        capture_output=True,
        check=True,
    )
    assert json.loads(version.stdout)["cniVersion"] == "1.0.0"
    with serving(tree.socket, fixed(0, b"")):
        assert tree.install().returncode == 0
    assert tree.files == ["10-podwire.conflist", "podwire"]


def test_an_upgrade_that_is_not_good_leaves_the_conflist_that_is_there(tree: Tree) -> None:
    with serving(tree.socket, fixed(0, b"")):
        assert tree.install().returncode == 0
    before = tree.conflist.stat()
    assert tree.install("--wait", "0").returncode == 1
    assert tree.conflist.stat() == before


def test_no_conflist_is_the_plugin_alone_at_once(tree: Tree) -> None:
    done = tree.install("--no-conflist")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tree.binary}\n", "")
    assert tree.files == ["podwire"]


def test_removal_prints_what_was_there_and_leaves_what_is_others(tree: Tree) -> None:
    with serving(tree.socket, fixed(0, b"")):
        assert tree.install().returncode == 0
    others = [tree.binary.with_name("bridge"), tree.conflist.with_name("99-other.conflist")]
    for other in others:
        other.touch()
    done = tree.install("--remove")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(tree.conflist), str(tree.binary)]
    assert tree.files == ["99-other.conflist", "bridge"]
    again = tree.install("--remove")
    assert (again.returncode, again.stdout) == (0, "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--wait", "-1"], "--wait -1.0 is not a number of seconds"),
        (["--wait", "nan"], "--wait nan is not a number of seconds"),
        (["--wait", "inf"], "--wait inf is not a number of seconds"),
        (["--host-root", "/nowhere"], "--host-root /nowhere is not a folder"),
        (["--python", "/no/python"], "the interpreter /no/python cannot be run: No such file or directory"),
        (
            ["--python", "/bin/true"],
            "the interpreter /bin/true is broken (exit status 0), but podwire needs cpython-311",
        ),
        (
            ["--host-root", "/", "--bin-dir", "bin"],
            "bin is not an absolute path, as it must be with --host-root",
        ),
    ],
)
def test_a_bad_value_is_one_sentence(
    tree: Tree, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["install", *tree.words, *words]) == 1
    assert capsys.readouterr().err == f"podwire: {complaint}\n"
    assert tree.files == []


def test_what_excludes_each_other_is_wrong_usage(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["install", *tree.words, "--remove", "--no-conflist"])
    assert "not allowed with" in capsys.readouterr().err


def test_help_explains_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["install", "--help"])
    told = capsys.readouterr().out
    for words in ("--wait SECONDS", "--host-root DIR", "--no-conflist", "examples:", "exit status is 1"):
        assert words in told


def test_the_daemon_takes_a_folder_for_the_conflist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["daemon", "--source", str(tmp_path), "--cni-conf-dir", str(tmp_path / "file")]
    assert main(words) == 1
    assert capsys.readouterr().err == f"podwire: --cni-conf-dir {tmp_path / 'file'} is not a folder\n"


# An init container: the node's file system is mounted at DIR.

ON_A_NODE = textwrap.dedent("""
    set -e
    for folder in /usr /dev /proc; do mkdir "$1$folder"; mount --rbind "$folder" "$1$folder"; done
    for link in bin lib lib64 sbin; do ! [ -L /$link ] || ln -s usr/$link "$1/$link"; done
    shift
    exec "$@"
""")


class Host:
    """A node's file system with nothing but an interpreter, which a container sees at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    @property
    def libs(self) -> list[Path]:
        return sorted((self.root / "opt/podwire/lib").glob("*"))

    @property
    def files(self) -> list[str]:
        folders = ("opt", "etc")
        found = (path for folder in folders for path in (self.root / folder).rglob("*") if path.is_file())
        paths = (path.relative_to(self.root) for path in found)
        return sorted(str(path) for path in paths if not path.is_relative_to("opt/podwire"))

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command in a mount namespace of its own, where the node has /usr, too."""
        for name in ("usr", "dev", "proc"):
            if (self.root / name).is_dir():
                (self.root / name).rmdir()
        for name in ("bin", "lib", "lib64", "sbin"):
            (self.root / name).unlink(missing_ok=True)
        inside = ["unshare", "--mount", "sh", "-c", ON_A_NODE, "sh", str(self.root), *command]
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            inside, capture_output=True, text=True, check=False, timeout=2 * SOON, **options
        )

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "cli.main", "install", "--host-root", str(self.root), *words)

    def plugin(self, command: str, stdin: str) -> subprocess.CompletedProcess[str]:
        """Run the plugin as the node's runtime does: none of our paths are there."""
        words = ("chroot", str(self.root), "/opt/cni/bin/podwire")
        return self.run(*words, input=stdin, env={"PATH": os.environ["PATH"], "CNI_COMMAND": command})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def test_on_a_node_without_our_packages_the_plugin_works_from_its_copies(host: Host) -> None:
    done = host.install("--no-conflist")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{host.root}/opt/cni/bin/podwire\n"
    (lib,) = host.libs
    text = (host.root / "opt/cni/bin/podwire").read_text()
    assert text.startswith("#!/usr/bin/python3 -IS\n")
    assert f'["/opt/podwire/lib/{lib.name}"]'.replace('"', "'") in text
    assert str(host.root) not in text
    version = host.plugin("VERSION", '{"cniVersion": "1.1.0"}')
    assert (version.returncode, json.loads(version.stdout)["cniVersion"]) == (0, "1.1.0")
    status = host.plugin("STATUS", install.STATUS_INPUT.decode())
    assert json.loads(status.stdout)["code"] == 50, status.stderr


def test_from_a_container_status_is_asked_on_the_node(host: Host) -> None:
    done = host.install("--wait", "0")
    assert done.returncode == 1
    assert "no podCIDR is known" in done.stderr
    assert host.files == ["opt/cni/bin/podwire"]
    (host.root / "run/podwire").mkdir(parents=True)
    with serving(host.root / "run/podwire/podwire.sock", fixed(0, b"")) as (daemon, _):
        done = host.install("--wait", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert [method for method, _ in daemon.calls] == ["Status"]
    assert host.files == ["etc/cni/net.d/10-podwire.conflist", "opt/cni/bin/podwire"]


def test_a_newer_version_keeps_the_modules_of_the_one_before_and_none_older(host: Host) -> None:
    lib_dir = host.root / "opt/podwire/lib"
    older, broken_off, environment = (
        lib_dir / name for name in (f"plugin-{'0' * 16}", f".plugin-{'0' * 16}.x", "python3.11")
    )
    for path in (older, broken_off, environment):
        (path / "cni").mkdir(parents=True)
    before = lib_dir / f"plugin-{'1' * 16}"
    before.mkdir()
    install.install_binary(
        host.root / "opt/cni/bin",
        path=[f"/opt/podwire/lib/{before.name}"],
        socket="/run/podwire/podwire.sock",
        state_dir="/var/lib/podwire",
    )
    assert host.install("--no-conflist").returncode == 0
    (new,) = (path for path in host.libs if path not in (before, environment))
    assert new not in (older, broken_off)
    assert (new / "cni/shim.py").is_file()


def test_removal_from_a_container_takes_all_of_ours_and_leaves_the_rest(host: Host) -> None:
    assert host.install("--no-conflist").returncode == 0
    install.install_conflist(host.root / "etc/cni/net.d")
    (lib,) = host.libs
    environment = host.root / "opt/podwire/lib/python3.11"
    environment.mkdir()
    done = host.install("--remove")
    assert done.stdout.splitlines() == [
        f"{host.root}/etc/cni/net.d/10-podwire.conflist",
        f"{host.root}/opt/cni/bin/podwire",
        str(lib),
    ]
    assert host.files == []
    assert host.libs == [environment]


def test_a_node_without_python_is_named_as_such(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install", "--host-root", str(host.root), "--no-conflist"]) == 1
    assert capsys.readouterr().err == (
        f"podwire: the interpreter /usr/bin/python3 of {host.root} cannot be run: No such file or directory\n"
    )
    assert host.files == []
