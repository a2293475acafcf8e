import json
import subprocess
from pathlib import Path

import pytest

from cni import h2, install, shim
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
    conflist = install.install_conflist(tmp_path / "net.d")
    assert conflist.name == "10-podwire.conflist"
    assert conflist.stat().st_mode & 0o7777 == 0o644
    assert json.loads(conflist.read_text()) == {
        "cniVersion": "1.0.0",
        "name": "podwire",
        "plugins": [{"type": "podwire"}],
    }


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
