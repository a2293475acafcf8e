"""A folder of manifests: what it says counts, whatever state its files are in."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.sources.manifests import Content, ManifestFolder, SourceError

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {ip}
  ports: [{{port: 80}}]
"""
NODE = "kind: Node\nmetadata: {name: node1}\n"


def service(name: str, ip: str = "10.96.0.1") -> str:
    return SERVICE.format(name=name, ip=ip)


def names(content: Content) -> list[str]:
    return sorted(f"{kind} {name}" for kind, name in content.objects)


def address(content: Content, name: str) -> str:
    return content.objects["Service", f"default/{name}"].cluster_ips[0]  # type: ignore[union-attr]


def test_several_documents_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(f"{service('a')}---\n---\n{service('b')}---\n{NODE}")
    content = ManifestFolder(tmp_path).read()
    assert names(content) == ["Node node1", "Service default/a", "Service default/b"]
    assert content.problems == ()


def test_json_and_lists(tmp_path: Path) -> None:
    def document(name: str) -> dict[str, object]:
        return {"kind": "Service", "metadata": {"name": name}, "spec": {"clusterIP": "10.96.0.1"}}

    (tmp_path / "one.json").write_text(json.dumps(document("a")))
    items = {"apiVersion": "v1", "kind": "List", "items": [document("b"), document("c")]}
    (tmp_path / "list.json").write_text(json.dumps(items))
    (tmp_path / "empty.yml").write_text("kind: ServiceList\nitems: null\n---\nkind: NodeList\n")
    content = ManifestFolder(tmp_path).read()
    assert names(content) == ["Service default/a", "Service default/b", "Service default/c"]
    assert content.problems == ()


def test_only_manifests_are_read(tmp_path: Path) -> None:
    for name in (".hidden.yaml", "notes.txt", "a.yaml~", "a.yaml.swp"):
        (tmp_path / name).write_text(service("a"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    content = ManifestFolder(tmp_path).read()
    assert content.objects == {}
    assert content.problems == ("folder.yaml: not readable as YAML or JSON: [Errno 21] Is a directory: "
                                f"'{tmp_path}/folder.yaml'",)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "kind: Service\nmetadata: {name: a",
        "kind: Service\n\tmetadata:",
        "kind: List\nitems: 5\n",
        "a: *nowhere",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!python/object:os.system x",
        "{[1]: 2}",
        "\0",
        "[" * 200_000,
        "- " * 200_000,
        "{a: " * 200_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_half_written_or_hostile_file_keeps_what_it_said_and_others_go_on(
    tmp_path: Path, text: str
) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(service("a"))
    b.write_text(service("b"))
    folder = ManifestFolder(tmp_path)
    folder.read()
    a.write_text(text)
    b.write_text(service("b", "10.96.0.22"))
    content = folder.read()
    assert names(content) == ["Service default/a", "Service default/b"]
    assert address(content, "b") == "10.96.0.22"
    (problem,) = content.problems
    assert problem.startswith("a.yaml: not readable as YAML or JSON: ")
    assert "\n" not in problem
    a.write_text(service("a", "10.96.0.11"))
    content = folder.read()
    assert address(content, "a") == "10.96.0.11"
    assert content.problems == ()


def test_half_written_json_keeps_what_it_said(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    text = json.dumps({"kind": "Service", "metadata": {"name": "a"}, "spec": {"clusterIP": "10.96.0.1"}})
    file.write_text(text)
    folder = ManifestFolder(tmp_path)
    before = folder.read().objects
    for half in (text[:-3], "[" * 100_000, "\udcff".encode(errors="surrogateescape").decode("latin-1")):
        file.write_text(half)
        content = folder.read()
        assert content.objects == before
        assert len(content.problems) == 1


def test_a_wrong_object_keeps_its_last_version_and_its_neighbours_count(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(service("a") + "---\n" + service("b"))
    folder = ManifestFolder(tmp_path)
    folder.read()
    file.write_text(service("a", "10.96.0.256") + "---\n" + service("b", "10.96.0.22"))
    content = folder.read()
    assert (address(content, "a"), address(content, "b")) == ("10.96.0.1", "10.96.0.22")
    assert content.problems == (
        "all.yaml: Service default/a: spec.clusterIPs '10.96.0.256' is not an IP address",
    )


def test_a_wrong_object_that_was_never_right_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a", "x"))
    content = ManifestFolder(tmp_path).read()
    assert content.objects == {}
    assert len(content.problems) == 1


def test_of_two_files_with_an_object_the_first_counts(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(service("web", "10.96.0.2"))
    folder = ManifestFolder(tmp_path)
    folder.read()
    (tmp_path / "a.yaml").write_text(service("web", "10.96.0.1"))
    content = folder.read()
    assert address(content, "web") == "10.96.0.1"
    assert content.problems == ("b.yaml: Service default/web is in a.yaml too, which counts",)
    (tmp_path / "a.yaml").unlink()
    content = folder.read()
    assert (address(content, "web"), content.problems) == ("10.96.0.2", ())


def test_a_removed_file_takes_its_objects_along(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(service(name))
    folder = ManifestFolder(tmp_path)
    folder.read()
    (tmp_path / "a.yaml").unlink()
    assert names(folder.read()) == ["Service default/b"]


def test_a_headless_version_of_a_service_removes_it(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    folder = ManifestFolder(tmp_path)
    folder.read()
    file.write_text(service("a", "None"))
    assert folder.read() == Content({}, ())


def test_an_unquoted_timestamp_is_a_string_as_in_kubernetes(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(
        "kind: Node\nmetadata: {name: n, deletionTimestamp: 2024-05-01T10:00:00Z}\n"
    )
    content = ManifestFolder(tmp_path).read()
    assert content.problems == ()
    assert content.objects["Node", "n"].deleting  # type: ignore[union-attr]


def test_a_folder_that_goes_away_keeps_what_it_said(tmp_path: Path) -> None:
    place = tmp_path / "manifests"
    place.mkdir()
    (place / "a.yaml").write_text(service("a"))
    folder = ManifestFolder(place)
    before = folder.read()
    shutil.rmtree(place)
    content = folder.read()
    assert content.objects == before.objects
    assert content.problems[0].startswith(f"the folder {place} cannot be read (No such file or directory)")


@given(st.binary(max_size=200) | st.text().map(str.encode), st.sampled_from(["x.yaml", "x.json"]))
def test_any_bytes_are_objects_or_sentences(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    place = tmp_path_factory.getbasetemp() / "any"
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(data)
    content = ManifestFolder(place).read()
    assert all("\n" not in problem for problem in content.problems)
    (place / name).unlink()


class Followed:
    """What a followed folder delivered, with a way to wait for more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last: Content | None = None

    def deliver(self, content: Content) -> None:
        with self._changed:
            self._last = content
            self._changed.notify_all()

    def until(self, good: Callable[[Content], bool]) -> Content:
        with self._changed:
            found = self._changed.wait_for(lambda: self._last is not None and good(self._last), 5)
        assert found, f"delivered last: {self._last}"
        assert self._last
        return self._last


@contextmanager
def following(place: Path) -> Iterator[Followed]:
    followed, stop = Followed(), threading.Event()
    thread = threading.Thread(target=ManifestFolder(place).follow, args=(followed.deliver, stop.is_set))
    thread.start()
    try:
        followed.until(lambda _: True)
        yield followed
    finally:
        stop.set()
        thread.join()


def test_follow_delivers_what_is_there_and_every_kind_of_change(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "manifests", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    (place / "a.yaml").write_text(service("a"))
    with following(place) as followed:
        followed.until(lambda c: names(c) == ["Service default/a"])
        (place / "a.yaml").write_text(service("a", "10.96.0.2"))
        followed.until(lambda c: address(c, "a") == "10.96.0.2")
        # As kubectl and editors save: a temporary file in the same folder, renamed over the old one.
        temporary = place / ".a.yaml.tmp"
        temporary.write_text(service("a", "10.96.0.3"))
        temporary.replace(place / "a.yaml")
        followed.until(lambda c: address(c, "a") == "10.96.0.3")
        (elsewhere / "b.yaml").write_text(service("b"))
        (elsewhere / "b.yaml").rename(place / "b.yaml")
        followed.until(lambda c: names(c) == ["Service default/a", "Service default/b"])
        (place / "b.yaml").rename(elsewhere / "b.yaml")
        followed.until(lambda c: names(c) == ["Service default/a"])
        (place / "a.yaml").unlink()
        followed.until(lambda c: names(c) == [])


def test_follow_sees_a_mounted_config_map_change(tmp_path: Path) -> None:
    """The kubelet swaps the link ..data; the files are links through it."""
    for version, ip in (("v1", "10.96.0.1"), ("v2", "10.96.0.2")):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}/a.yaml").write_text(service("a", ip))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    with following(tmp_path) as followed:
        followed.until(lambda c: address(c, "a") == "10.96.0.1")
        (tmp_path / "..tmp").symlink_to("..v2")
        (tmp_path / "..tmp").replace(tmp_path / "..data")
        followed.until(lambda c: address(c, "a") == "10.96.0.2")


def test_follow_sees_a_write_that_leaves_size_and_time_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a", "10.96.0.1"))
    stat = file.stat()
    with following(tmp_path) as followed:
        descriptor = os.open(file, os.O_WRONLY)
        os.write(descriptor, service("a", "10.96.0.2").encode())
        os.utime(descriptor, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.close(descriptor)
        followed.until(lambda c: address(c, "a") == "10.96.0.2")


def test_follow_goes_on_when_the_folder_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "manifests"
    place.mkdir()
    (place / "a.yaml").write_text(service("a"))
    with following(place) as followed:
        place.rename(tmp_path / "old")
        followed.until(lambda c: bool(c.problems) and names(c) == ["Service default/a"])
        place.mkdir()
        followed.until(lambda c: names(c) == [])
        (place / "b.yaml").write_text(service("b"))
        followed.until(lambda c: names(c) == ["Service default/b"])


def test_what_is_no_folder_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"--source {tmp_path}/no is not a folder"):
        ManifestFolder(tmp_path / "no").follow(lambda _: None, lambda: True)
