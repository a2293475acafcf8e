import json
import subprocess
from pathlib import Path

import pytest

from cni import h2, install, shim, spec
from cni.install import InstallError

PLACES = {"socket": "/run/podwire/podwire.sock", "state_dir": "/var/lib/podwire"}


def rendered(**changes: object) -> str:
    values = {"python": "/usr/bin/python3", "path": ["/opt/it's"], **PLACES} | changes
    return install.render_binary(**values)  # type: ignore[arg-type]


def test_the_binary_is_a_script_that_finds_its_modules_and_knows_its_places() -> None:
    text = rendered()
    assert text.startswith("#!/usr/bin/python3 -IS\n")
    assert 'sys.path[:0] = ["/opt/it\'s"]' in text
    assert "main('/run/podwire/podwire.sock', '/var/lib/podwire')" in text
    compile(text, "podwire", "exec")


@pytest.mark.parametrize("python", ["python3", "/opt/my python/bin/python3", ""])
def test_an_interpreter_that_no_first_line_can_name_is_refused(python: str) -> None:
    with pytest.raises(InstallError, match="needs an absolute path without white space"):
        rendered(python=python)


def test_the_binary_is_executable_and_replaces_an_older_one_in_one_step(tmp_path: Path) -> None:
    directory = tmp_path / "cni" / "bin"
    binary = install.install_binary(directory, **PLACES)
    inode = binary.stat().st_ino
    with binary.open() as running:
        assert install.install_binary(directory, socket="/new", state_dir="/new") == binary
        assert "/run/podwire" in running.read()
    assert binary.stat().st_ino != inode
    assert binary.stat().st_mode & 0o7777 == 0o755
    assert "main('/new', '/new')" in binary.read_text()
    assert [file.name for file in directory.iterdir()] == ["podwire"]


def test_what_the_binary_imports_is_compiled(tmp_path: Path) -> None:
    sources = [Path(module.__file__ or "") for module in (shim, h2)]
    install.install_binary(tmp_path, **PLACES)
    for source in sources:
        (compiled,) = source.parent.glob(f"__pycache__/{source.stem}.cpython-311.pyc")
        assert compiled.stat().st_mtime >= source.stat().st_mtime


def test_a_binary_whose_modules_are_gone_answers_with_a_cni_error(tmp_path: Path) -> None:
    binary = install.install_binary(tmp_path / "bin", path=[str(tmp_path)], **PLACES)
    done = subprocess.run([binary], input=b"{}", env={"CNI_COMMAND": "DEL"}, capture_output=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["msg"] == "podwire cannot be imported"
    assert done.stderr.startswith(b"podwire: No module named 'cni'")


def test_the_conflist_names_the_plugin_alone(tmp_path: Path) -> None:
    """With the older version first, which libcni 1.1 takes, and the newer for libcni 1.2's STATUS and GC."""
    conflist = install.install_conflist(tmp_path / "net.d")
    assert conflist.name == "10-podwire.conflist"
    assert conflist.stat().st_mode & 0o7777 == 0o644
    capabilities = [
        "portMappings",
        "bandwidth",
        "ips",
        "mac",
        "ipRanges",
        "io.kubernetes.cri.pod-annotations",
    ]
    assert json.loads(conflist.read_text()) == {
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "podwire",
        "plugins": [{"type": "podwire", "capabilities": dict.fromkeys(capabilities, True)}],
    }
    assert {*install.CNI_VERSIONS, install.CNI_VERSION} <= {*spec.SUPPORTED_VERSIONS}
    assert install.CNI_VERSIONS[-1] == spec.LATEST_VERSION


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = install.install_conflist(tmp_path)
    monkeypatch.setattr(install, "render_conflist", lambda: "\udcff")
    with pytest.raises(UnicodeEncodeError):
        install.install_conflist(tmp_path)
    assert list(tmp_path.iterdir()) == [old]
    assert json.loads(old.read_text())["name"] == "podwire"


def test_the_path_holds_podwire_first_and_every_package_once() -> None:
    path = install.python_path()
    assert Path(path[0], "cni", "shim.py").is_file()
    assert len(path) == len(set(path))
    for package in ("netaddr", "pyroute2", "msgspec"):
        assert any(Path(entry, package).is_dir() for entry in path)


def test_removal_takes_both_and_may_be_repeated(tmp_path: Path) -> None:
    other = tmp_path / "net.d" / "99-other.conf"
    binary = install.install_binary(tmp_path / "bin", **PLACES)
    conflist = install.install_conflist(tmp_path / "net.d")
    other.touch()
    assert install.remove(binary.parent, conflist.parent) == (conflist, binary)
    assert install.remove(binary.parent, conflist.parent) == ()
    assert list(tmp_path.glob("*/*")) == [other]


@pytest.fixture
def lib_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "HOME", tmp_path / "home")
    monkeypatch.setattr(install, "LIB_DIR", tmp_path / "home/lib")
    return tmp_path / "home/lib"


def lib(directory: Path, digit: str = "0") -> Path:
    path = directory / f"plugin-{digit * 16}"
    (path / "cni").mkdir(parents=True)
    return path


def test_removal_takes_the_modules_that_the_binary_names_and_no_other_folder(
    tmp_path: Path, lib_dir: Path
) -> None:
    """Neither an environment's packages nor the checkout of somebody who develops podwire."""
    ours, another, environment = lib(lib_dir), lib(lib_dir, "1"), lib_dir / "python3.11"
    checkout = lib(tmp_path)
    environment.mkdir()
    path = [str(ours), str(environment), str(checkout)]
    binary = install.install_binary(tmp_path / "bin", path=path, **PLACES)
    assert install.remove(tmp_path / "bin", tmp_path / "net.d") == (binary, ours)
    assert sorted(lib_dir.iterdir()) == [another, environment]
    assert checkout.is_dir()


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"sys.path[:0] = [", b"sys.path[:0] = 5", b"#!/bin/sh\nexit 0\n"]
)
def test_a_plugin_that_is_not_ours_to_read_names_no_modules(
    tmp_path: Path, lib_dir: Path, text: bytes
) -> None:
    kept = lib(lib_dir)
    (tmp_path / "podwire").write_bytes(text)
    assert install.copies_of(tmp_path / "podwire") == ()
    assert kept.is_dir()


def test_the_copied_modules_are_all_that_the_plugin_needs(tmp_path: Path) -> None:
    copied = install.install_lib(tmp_path, Path("/opt/podwire/lib"))
    assert [path.name for path in tmp_path.iterdir()] == [copied.name]
    assert sorted(path.name for path in copied.iterdir()) == sorted(install.PACKAGES)
    code = f"import sys; sys.path[:0] = [{str(copied)!r}]; import cni.plugin; print(cni.plugin.__file__)"
    done = subprocess.run(
        [install.base_python(), "-IS", "-c", code], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == str(copied / "cni/plugin.py")
    (compiled,) = (copied / "cni/__pycache__").glob("plugin.*.pyc")
    assert f"/opt/podwire/lib/{copied.name}/cni/plugin.py".encode() in compiled.read_bytes()


def test_a_copy_that_is_there_is_not_made_again_and_a_broken_off_one_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    copied = install.install_lib(tmp_path, tmp_path)
    inode = copied.stat().st_ino
    assert install.install_lib(tmp_path, tmp_path) == copied
    assert copied.stat().st_ino == inode
    staging = copied.rename(tmp_path / f".{copied.name}.abcdef")
    assert install.install_lib(tmp_path, tmp_path) == copied
    assert set(install.copies_in(tmp_path)) == {copied, staging}


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match="No space left"):
        install.install_lib(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_as_the_node_would(tmp_path: Path) -> None:
    """As k3s has it: /etc/cni/net.d is a link to another place of the node, not of the container."""
    (tmp_path / "etc/cni").mkdir(parents=True)
    (tmp_path / "etc/cni/net.d").symlink_to("/var/lib/k3s/net.d")
    (tmp_path / "var").symlink_to("data/../data")
    (tmp_path / "loop").symlink_to("/loop")
    assert install.below(tmp_path, Path("/etc/cni/net.d")) == tmp_path / "data/lib/k3s/net.d"
    assert install.below(tmp_path, Path("/../../opt")) == tmp_path / "opt"
    assert install.below(tmp_path, Path("/")) == tmp_path
    with pytest.raises(InstallError, match="link to itself"):
        install.below(tmp_path, Path("/loop/x"))
    with pytest.raises(InstallError, match="not an absolute path"):
        install.below(tmp_path, Path("opt"))


def test_an_interpreter_that_cannot_load_our_modules_is_refused(tmp_path: Path) -> None:
    install.check_interpreter(Path("/"), install.base_python())
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\necho cpython-39\n")
    other.chmod(0o755)
    with pytest.raises(
        InstallError, match=f"^the interpreter {other} is cpython-39, but podwire needs cpython-"
    ):
        install.check_interpreter(Path("/"), str(other))
    with pytest.raises(InstallError, match="cannot be run: No such file"):
        install.check_interpreter(Path("/"), str(tmp_path / "nothing"))
    with pytest.raises(
        InstallError, match=f"^the interpreter /bin/python3 of {tmp_path} cannot be run: No such"
    ):
        install.check_interpreter(tmp_path, "/bin/python3")


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("exit 0", ""),
        ('echo \'{"code": 50, "msg": "no podCIDR is known"}\'; exit 1', "no podCIDR is known"),
        ("echo oops >&2; exit 3", "{} ended with status 3: oops"),
        ("echo '[]'; exit 1", "{} ended with status 1: []"),
        ("exit 1", "{} ended with status 1: it said nothing"),
        ("sleep 30", "STATUS has not answered within 0 s"),
    ],
)
def test_what_is_wrong_with_status_is_its_own_sentence(tmp_path: Path, script: str, wrong: str) -> None:
    binary = tmp_path / "podwire"
    binary.write_text(f"#!/bin/sh\n[ $CNI_COMMAND = STATUS ] || exit 9\n{script}\n")
    binary.chmod(0o755)
    timeout = 0.2 if "sleep" in script else 10.0
    assert install.status(binary, timeout=timeout) == wrong.format(binary)


def test_a_plugin_that_cannot_be_run_is_what_is_wrong(tmp_path: Path) -> None:
    assert "cannot be run" in install.status(tmp_path / "podwire")


def test_status_is_asked_until_it_is_good_and_each_answer_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install, "POLL_SECONDS", 0.0)
    answers = iter(["no daemon", "no daemon", "no podCIDR", ""])
    told: list[str] = []
    assert install.wait_until_good(lambda timeout: next(answers), 60, told.append) == ""
    assert told == ["no daemon", "no podCIDR"]


def test_with_no_time_status_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    told: list[str] = []
    assert install.wait_until_good(lambda t: asked.append(t) or "bad", 0, told.append) == "bad"  # type: ignore[func-returns-value]
    assert asked == [install.STATUS_SECONDS]
    assert told == []
