"""Layers of the VM lab's cache, what counts for an image, what apt tells of kernels; without a machine."""

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import cache, image, kernels
from lab.topology import LabError

PROJECT = '[tool.setuptools]\npackages = ["node", "node.kube"]\n'
NOBODY_TELLS: list[str] = []


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def writes(text: str) -> Callable[[Path], None]:
    return lambda part: part.write_text(text) and None


def made(kind: str, key: str, text: str = "made") -> Path:
    return cache.layer(kind, key, writes(text), NOBODY_TELLS.append)


def test_a_layer_is_made_once() -> None:
    assert made("kind", "key", "first") == made("kind", "key", "second")
    assert made("kind", "key").read_text() == "first"


def test_a_layer_that_fails_half_way_leaves_nothing(own_cache: Path) -> None:
    def fail(part: Path) -> None:
        part.mkdir()
        (part / "half").touch()
        raise LabError("no")

    with pytest.raises(LabError):
        cache.layer("kind", "key", fail, NOBODY_TELLS.append)
    assert [path.name for path in (own_cache / "kind").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed_by_the_next(own_cache: Path) -> None:
    left = own_cache / "kind" / f"tree{cache.PART}"
    left.mkdir(parents=True)
    made("kind", "key")
    assert not left.exists()


def test_the_two_layers_used_last_stay(own_cache: Path) -> None:
    for number, key in enumerate(("a", "b")):
        os.utime(made("kind", key), (number, number))
    made("kind", "a")
    made("kind", "c")
    assert sorted(path.name for path in (own_cache / "kind").iterdir()) == [".lock", "a", "c"]


def test_a_second_maker_waits_says_so_and_makes_nothing() -> None:
    said, entered, release, waits = list[str](), threading.Event(), threading.Event(), threading.Event()

    def slow(part: Path) -> None:
        entered.set()
        assert release.wait(10)
        part.write_text("first")

    def tell(text: str) -> None:
        said.append(text)
        waits.set()

    first = threading.Thread(target=cache.layer, args=("kind", "key", slow, NOBODY_TELLS.append))
    second = threading.Thread(target=cache.layer, args=("kind", "key", writes("second"), tell))
    first.start()
    assert entered.wait(10)
    second.start()
    assert waits.wait(10)
    release.set()
    first.join(10)
    second.join(10)
    assert made("kind", "key").read_text() == "first"
    assert len(said) == 1
    assert "another process" in said[0]


def test_a_program_that_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(LabError, match=r"mke2fs is missing: .*e2fsprogs"):
        cache.run(["mke2fs", "-V"])


def test_a_command_that_fails_is_named_with_its_last_lines() -> None:
    with pytest.raises(LabError) as failed:
        cache.run(["sh", "-c", "seq 20 >&2; exit 3"])
    text = str(failed.value)
    assert "`sh -c seq 20" in text
    assert "status 3" in text
    assert [line.strip() for line in text.splitlines()[1:]] == [str(number) for number in range(13, 21)]


def test_only_what_is_installed_counts_for_an_image() -> None:
    counted = ["README.md", "deploy/unit", "node/a.py", "vm-lab/provision/x.sh"]
    others = ["docs/README.md", "nodes/b.py", "requirements/dev.txt", "tests/c.py", "vm-lab/README.md", ""]
    found = image.installed([*others, *counted], PROJECT)
    assert [str(path) for path in found] == counted


def test_the_key_of_an_image_depends_on_each_byte_and_on_modes(tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text("one")

    def key() -> str:
        return image.image_key({Path("script"): image.Content.of(file)}, "base", "wheels")

    first = key()
    assert key() == first
    file.chmod(0o755)
    second = key()
    file.write_text("two")
    assert len({first, second, key()}) == 3


def test_files_that_are_new_count_and_deleted_or_ignored_ones_do_not(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    for name, text in {"pyproject.toml": PROJECT, ".gitignore": "*.pyc\n", "node/old.py": ""}.items():
        (tmp_path / name).write_text(text)
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "node/old.py").unlink()
    (tmp_path / "node/new.py").touch()
    (tmp_path / "node/new.pyc").touch()
    assert [str(path) for path in image._files(tmp_path)] == ["node/new.py", "pyproject.toml"]


def test_the_release_is_that_of_the_package_depended_on() -> None:
    line = "Depends: linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)"
    release = kernels.parse_release(f"Package: linux-image-cloud-amd64\n{line}\n")
    assert release == "6.12.95+deb12-cloud-amd64"


def test_an_unknown_kernel_is_refused_with_those_there_are() -> None:
    with pytest.raises(LabError, match="'newest' is none of stable, old, backports"):
        kernels.prepare("newest", NOBODY_TELLS.append)
