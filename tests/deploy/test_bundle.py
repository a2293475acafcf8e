"""The interpreter that nodes get from the image: on a node that has nothing else, no libc and no shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import main
from cni import install
from netlink import netns
from tests.cni.world import CONFIG, Node, request_env

SCRIPT = Path(__file__).parents[2] / "scripts/bundle"
SOON = 60.0  # seconds in which anything here is done
STARTS = 25
ENTER = 'for d in proc run/netns; do mkdir -p "$1/$d"; mount --rbind "/$d" "$1/$d"; done; exec chroot "$@"'


def make(directory: Path) -> Path:
    command = [install.base_python(), SCRIPT, directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SOON)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("patchelf"):
        pytest.skip("patchelf is not installed (scripts/setup tests)")
    return make(tmp_path_factory.mktemp("bundle"))


@dataclass(frozen=True)
class Bare:
    """A node whose file system holds what `podwire install` put there, and in `var` its ledger."""

    root: Path
    node: Node

    @property
    def python(self) -> str:
        return self.binary.read_text().split()[0].removeprefix("#!")

    @property
    def binary(self) -> Path:
        return self.root / "opt/cni/bin/podwire"

    def run(
        self, *command: str, stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the node in its network, with its /proc."""
        inside = ["nsenter", f"--net={netns.path(self.node.namespace)}", "unshare", "--mount"]
        return subprocess.run(
            [*inside, "sh", "-c", ENTER, "sh", str(self.root), *command],
            input=stdin,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | (env or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=SOON,
        )

    def plugin(self, command: str, pod: str = "") -> tuple[int, str]:
        """Run the plugin as the runtime does; return its status and what it printed."""
        env = request_env(command, "c1", str(netns.path(pod))) if pod else {"CNI_COMMAND": command}
        done = self.run("/opt/cni/bin/podwire", stdin=json.dumps(CONFIG), env=env)
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def bare(bundle: Path, namespaces: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Bare:
    root = tmp_path_factory.mktemp("node")
    words = ["install", "--host-root", str(root), "--no-conflist", "--bundle", str(bundle.parent)]
    assert main(words) == 0
    return Bare(root, Node(namespaces, root / "var/lib/podwire"))


def copies(root: Path) -> list[str]:
    return [path.name for path in install.copies_below(root)]


def test_all_that_the_interpreter_loads_is_in_the_bundle(bare: Bare, bundle: Path) -> None:
    """Also what compiled modules load, those that the plugin imports and those that it might."""
    (lib,) = (path.name for path in install.copies_in(bare.root / "opt/podwire/lib"))
    code = f"""
import sys
sys.path.append("/opt/podwire/lib/{lib}")
import cni.plugin, asyncio, bz2, ctypes, decimal, hashlib, json, lzma, mmap, msgspec, sqlite3, uuid, zoneinfo
print(sys.prefix)
print(*{{line.split()[5] for line in open("/proc/self/maps") if len(line.split()) > 5}})
"""
    done = bare.run(bare.python, "-IS", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    prefix, loaded = done.stdout.splitlines()
    assert prefix == f"/opt/podwire/{bundle.name}"
    files = [path for path in loaded.split() if path.startswith("/")]
    assert {Path(file).name for file in files} >= {"python3", "libc.so.6", "libsqlite3.so.0"}
    assert [file for file in files if not file.startswith(f"{prefix}/") and lib not in file] == []


def test_without_a_daemon_the_plugin_adds_and_deletes_a_pod(
    bare: Bare, namespaces: Callable[[], str]
) -> None:
    assert bare.plugin("STATUS") == (0, "")
    code, version = bare.plugin("VERSION")
    assert (code, json.loads(version)["cniVersion"]) == (0, "1.1.0")
    pod = namespaces()
    code, result = bare.plugin("ADD", pod)
    assert code == 0, result
    assert [ip["address"] for ip in json.loads(result)["ips"]] == ["10.1.0.2/32", "fd00:1::2/128"]
    assert len(bare.node.host_links()) == 1
    assert bare.plugin("DEL", pod) == (0, "")
    assert bare.node.host_links() == set()


def test_it_starts_as_quickly_as_the_interpreter_it_was_made_of(bare: Bare) -> None:
    def start(*command: str) -> float:
        begin = time.perf_counter()
        subprocess.run([*command, "-IS", "-c", "pass"], check=True)
        return time.perf_counter() - begin

    commands: Sequence[tuple[str, ...]] = (
        ("chroot", str(bare.root), bare.python),
        ("chroot", "/", install.base_python()),
    )
    # In turn, so that whatever else the machine does is shared; the least, as noise only adds.
    ours, theirs = (
        min(times) for times in zip(*([start(*c) for c in commands] for _ in range(STARTS)), strict=True)
    )
    assert ours < 1.5 * theirs, f"{ours * 1e3:.1f} ms, and {theirs * 1e3:.1f} ms"


def test_the_same_system_gives_the_same_name_and_what_is_there_stays(bundle: Path, tmp_path: Path) -> None:
    inode = bundle.stat().st_ino
    assert make(bundle.parent) == bundle
    assert bundle.stat().st_ino == inode
    (tmp_path / f".{bundle.name}.broken").mkdir()
    assert make(tmp_path).name == bundle.name
    files = [{str(f.relative_to(b)) for f in b.rglob("*")} for b in (bundle, tmp_path / bundle.name)]
    assert files[0] == files[1]
    for name in ("bin/python3", "lib/python3.11/__pycache__/os.cpython-311.pyc"):
        assert (bundle / name).read_bytes() == (tmp_path / bundle.name / name).read_bytes()


def test_a_newer_interpreter_keeps_the_one_before_and_none_older(bundle: Path, tmp_path: Path) -> None:
    words = ["install", "--host-root", str(tmp_path), "--no-conflist", "--bundle", str(bundle.parent)]
    before, older = f"python-{'1' * 16}", f"python-{'0' * 16}"
    for name in (before, older, f".{older}.broken"):
        (tmp_path / "opt/podwire" / name / "bin").mkdir(parents=True)
    (tmp_path / "opt/podwire/bin").mkdir()  # of an environment
    text = install.render_binary(
        python=f"/opt/podwire/{before}/bin/python3", path=[], socket="/s", state_dir="/d"
    )
    install.write_binary(tmp_path / "opt/cni/bin", text)
    assert main(words) == 0
    lib, *pythons = copies(tmp_path)
    assert pythons == sorted([before, bundle.name])
    assert main(words) == 0
    assert copies(tmp_path) == [lib, bundle.name]
    assert main(["install", "--host-root", str(tmp_path), "--remove"]) == 0
    assert [path.name for path in (tmp_path / "opt/podwire").iterdir()] == ["bin"]


def test_removal_leaves_nothing_where_nothing_was(bundle: Path, tmp_path: Path) -> None:
    words = ["install", "--host-root", str(tmp_path)]
    assert main([*words, "--no-conflist", "--bundle", str(bundle.parent)]) == 0
    assert main([*words, "--remove"]) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "opt/podwire").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--bundle", "/usr"], "--bundle needs --host-root, and excludes --python"),
        (
            ["--bundle", "/usr", "--host-root", "{}", "--python", "/usr/bin/python3"],
            "--bundle needs --host-root, and excludes --python",
        ),
        (
            ["--bundle", "{}", "--host-root", "{}"],
            "the bundle {} holds 0 folders python-…, and not one",
        ),
    ],
)
def test_what_is_no_bundle_is_one_sentence(
    tmp_path: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(tmp_path) for word in words]
    assert main(["install", "--no-conflist", *words]) == 1
    assert capsys.readouterr().err == f"podwire: {complaint.format(tmp_path)}\n"
    assert not (tmp_path / "opt/cni").exists()


def test_a_node_takes_the_image_s_own_bundle_if_there_is_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "BUNDLE", bundle.parent)
    assert main(["install", "--host-root", str(tmp_path), "--no-conflist"]) == 0
    text = (tmp_path / "opt/cni/bin/podwire").read_text()
    assert text.startswith(f"#!/opt/podwire/{bundle.name}/bin/python3 -IS\n")
