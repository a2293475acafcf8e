"""WireGuard's keys on a node: made once, kept, changed step by step over restarts, told of in public only."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from msgspec import structs

from netlink.wireguard import Known, Peer
from node.annotations import FILE, AnnotationFile
from node.backends.hops import Turning
from node.backends.rotation import LEAST_SECONDS, Step
from node.sources.annotations import WIREGUARD_DETOUR, WIREGUARD_KEYS
from node.wireguard import DAY, NO_KEYS, OTHERS_SECONDS, Wireguard
from node.wireguard_keys import KeyFileError, Keys
from node.wireguard_tunnels import Seen
from proxy.model import Node

PEER = Node("node2", wireguard_keys=("k0", "k1"))
NODES = {"node1": Node("node1"), "node2": PEER}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_made_once_and_is_roots_alone(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "state/wireguard")
    first = keys.private(0)
    assert len(first) == 32
    assert Keys(tmp_path / "state/wireguard").private(0) == first != keys.private(1)
    path = tmp_path / "state/wireguard/key0"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert base64.b64decode(path.read_text()) == first
    assert base64.b64encode(first).decode() not in repr(keys)


def test_a_new_key_is_not_the_one_that_the_kernel_has(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    keys.private(0)
    keys.public[0] = "told by the kernel"
    assert keys.renew(0) == keys.private(0)
    assert keys.public == {}
    keys.public[0] = "told by the kernel"
    other = Keys(tmp_path / "other")
    other.private(0)
    (tmp_path / "other/key0").rename(tmp_path / "key0")
    keys.private(0)
    assert keys.public == {}, "somebody put another file there"


@pytest.mark.parametrize("content", ["", "c2hvcnQ=", "no base64!", "\u00e9"])
def test_a_file_that_is_no_key_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "key1").write_text(content)
    with pytest.raises(KeyFileError, match=f"^{tmp_path}/key1 (is not a key of 32 bytes|cannot be read)"):
        Keys(tmp_path).private(1)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match=r"key0 cannot be (written|read): "):
        Keys(tmp_path / "file").private(0)


def made(path: Path, clock: Clock) -> Wireguard:
    """A node whose devices have their keys."""
    found = Wireguard(path, "node1", clock)
    found.used = True
    tell(found)
    return found


def tell(wireguard: Wireguard) -> None:
    """Tell public keys as the kernel does; which ones they are does not matter here."""
    for slot in (0, 1):
        private = wireguard.keys.private(slot)
        wireguard.keys.public[slot] = base64.b64encode(bytes(reversed(private))).decode()


def look(clock: Clock, *, age: float = -1.0, received: int = 0) -> Seen:
    one = Known(Peer("k0"), clock.now - age, received)
    return {"node2": one}, {"node2": one}


def published(wireguard: Wireguard) -> dict[str, Node]:
    told = wireguard.annotations
    keys = tuple((told.get(WIREGUARD_KEYS) or "").split(","))
    detour = told.get(WIREGUARD_DETOUR) == "true"
    return {**NODES, "node1": Node("node1", wireguard_keys=keys, wireguard_detour=detour)}


def test_nothing_is_told_before_both_keys_are_known_and_nothing_is_left_of_another_backend(
    tmp_path: Path,
) -> None:
    wireguard = Wireguard(tmp_path, "node1")
    assert wireguard.annotations == NO_KEYS
    wireguard.used = True
    assert wireguard.annotations == {}
    tell(wireguard)
    keys = wireguard.keys.public
    assert wireguard.annotations == {WIREGUARD_KEYS: f"{keys[0]},{keys[1]}", WIREGUARD_DETOUR: None}
    assert wireguard.lacking(NODES) == WIREGUARD_KEYS
    assert wireguard.lacking(published(wireguard)) == ""


def test_a_change_of_keys_goes_on_after_a_restart_wherever_it_was(tmp_path: Path) -> None:
    clock = Clock()
    wireguard = made(tmp_path, clock)
    first = wireguard.annotations[WIREGUARD_KEYS]
    assert wireguard.ask() == ""
    steps = [wireguard.rotation.step]
    for _ in range(100):
        clock.now += LEAST_SECONDS
        wireguard.tick(published(wireguard), 0, lambda: look(clock))
        if wireguard.rotation.step is not steps[-1]:
            steps.append(wireguard.rotation.step)
            assert wireguard.ask() == ("" if steps[-1] is Step.IDLE else "the keys are being changed already")
            before = wireguard.rotation
            wireguard = made(tmp_path, clock)  # a crash, and a start
            assert wireguard.rotation == before
        tell(wireguard)
        if len(steps) == 5:
            break
    assert steps == [Step.IDLE, Step.SPARE, Step.DETOUR, Step.USUAL, Step.IDLE]
    now = wireguard.annotations[WIREGUARD_KEYS]
    assert first and now and set(first.split(",")).isdisjoint(now.split(","))
    assert wireguard.turning == Turning()


def test_a_node_that_turns_to_another_backend_takes_no_detour(tmp_path: Path) -> None:
    clock = Clock()
    wireguard = made(tmp_path, clock)
    wireguard.ask()
    clock.now += 1
    assert wireguard.tick(NODES, 0, lambda: look(clock))
    assert wireguard.turning != Turning()
    wireguard.used = False
    assert (wireguard.turning, wireguard.problems) == (Turning(), ())
    assert wireguard.ask() == "this node's backend is not wireguard, so there are no keys to change"
    assert not wireguard.tick(NODES, 0, lambda: look(clock))


def test_keys_change_by_themselves_after_their_days_and_not_on_all_nodes_at_once(tmp_path: Path) -> None:
    clock = Clock()
    wireguard = made(tmp_path, clock)
    clock.now = (tmp_path / "key0").stat().st_mtime + 30 * DAY
    assert not wireguard.tick(NODES, 30, lambda: look(clock)), "by some days more"
    clock.now += 4 * DAY
    assert not wireguard.tick(NODES, 0, lambda: look(clock))
    clock.now += 2
    assert wireguard.tick(NODES, 30, lambda: look(clock))


def test_one_node_after_the_other(tmp_path: Path) -> None:
    clock = Clock()
    wireguard = made(tmp_path, clock)
    detour = {**NODES, "node2": structs.replace(PEER, wireguard_detour=True)}
    wireguard.ask()
    for nodes, begins in (
        (detour, False),
        (NODES, True),
    ):
        clock.now += 2
        assert wireguard.tick(nodes, 0, lambda: look(clock)) is begins
        told = () if begins else ("WireGuard: keys are not changed yet: node node2 is changing its own",)
        assert wireguard.problems == told


def test_a_node_that_has_begun_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    clock = Clock()
    wireguard = made(tmp_path, clock)
    wireguard.tick(NODES, 0, lambda: look(clock))
    begun = {**NODES, "node2": structs.replace(PEER, wireguard_keys=("k0", "another"))}
    wireguard.ask()
    clock.now += 2
    assert not wireguard.tick(begun, 0, lambda: look(clock))
    clock.now += OTHERS_SECONDS
    assert wireguard.tick(begun, 0, lambda: look(clock))


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "rotation.json").write_text("{")
    assert Wireguard(tmp_path, "node1").rotation.step is Step.IDLE


def test_what_a_manifest_is_to_have_is_in_a_file_until_it_has(tmp_path: Path) -> None:
    file = AnnotationFile(tmp_path, "node1")
    file.keep({WIREGUARD_KEYS: "a,b", WIREGUARD_DETOUR: None}, WIREGUARD_KEYS)
    wanted = {"metadata": {"name": "node1", "annotations": {WIREGUARD_KEYS: "a,b"}}}
    assert json.loads((tmp_path / FILE).read_text()) == wanted
    assert file.problems == (
        f"node node1: its manifest is to have the annotations in {tmp_path / FILE}: {WIREGUARD_KEYS} differs",
    )
    file.keep({WIREGUARD_KEYS: "a,b", WIREGUARD_DETOUR: None}, "")
    assert file.problems == ()
    file.keep(NO_KEYS, WIREGUARD_KEYS)
    assert (file.problems, (tmp_path / FILE).exists()) == ((), False)
