"""The state on disk: what was saved is what is loaded, and a file that is not whole counts as none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from node.sources import saved
from node.sources.objects import Object
from node.sources.saved import SavedError
from node.store import Identity
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)

WEB = ObjectName("shop", "web")
OBJECTS: dict[Identity, Object] = {
    ("Service", "shop/web"): Service(
        WEB,
        ("10.96.0.1", "fd00::1"),
        (ServicePort("http", Protocol.TCP, 80, 30080), ServicePort("dns", Protocol.UDP, 53)),
        external_policy=TrafficPolicy.LOCAL,
        source_ranges=("192.0.2.0/24",),
        affinity_seconds=10800,
        health_port=32000,
    ),
    ("EndpointSlice", "shop/web-1"): EndpointSlice(
        ObjectName("shop", "web-1"),
        WEB,
        Family.V6,
        (EndpointPort("http", Protocol.TCP, 8080),),
        (Endpoint("fd00::2", "node2", ready=False, terminating=True, zone_hints=("z1",)),),
        triggered=12.5,
    ),
    ("Node", "node1"): Node("node1", ("10.244.1.0/24",), ("192.0.2.1",), zone="z1", deleting=True),
}


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved.save(tmp_path, "node1", OBJECTS, 1234.5)
    assert saved.load(tmp_path, "node1") == (OBJECTS, 1234.5)
    assert [p.name for p in tmp_path.iterdir()] == [saved.FILE]


def test_a_state_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SavedError, match="there is no"):
        saved.load(tmp_path, "node1")


def test_the_state_of_another_node_does_not_count(tmp_path: Path) -> None:
    saved.save(tmp_path, "node2", OBJECTS, 0)
    with pytest.raises(SavedError, match="is of node node2, not node1"):
        saved.load(tmp_path, "node1")


def test_a_state_in_another_format_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.save(tmp_path, "node1", OBJECTS, 0)
    monkeypatch.setattr(saved, "FORMAT", saved.FORMAT + 1)
    with pytest.raises(SavedError, match="has format 1, not 2"):
        saved.load(tmp_path, "node1")


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    saved.save(tmp_path, "node1", OBJECTS, 1.0)
    with pytest.raises(OSError):
        saved.save(tmp_path / "gone", "node1", OBJECTS, 2.0)
    assert saved.load(tmp_path, "node1")[1] == 1.0


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), value=st.integers(1, 255))
def test_a_damaged_file_is_a_state_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    saved.save(folder, "node1", OBJECTS, 1.0)
    data = bytearray((folder / saved.FILE).read_bytes())
    data[flip % len(data)] ^= value
    (folder / saved.FILE).write_bytes(data[: len(data) - cut % len(data)])
    try:
        saved.load(folder, "node1")
    except SavedError as error:
        assert "\n" not in str(error)
